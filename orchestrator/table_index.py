"""The runs that an MLflow store has, by what was trained.

Asking a store for thousands of runs takes many seconds, so what is known of runs that have ended is kept in a file of
the work folder, one per store. A refresh asks for what ended since, and for what was deleted; where the store is a file
that has not changed, it asks nothing, and MLflow is not even loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from envs.files import DiskFullError, write_atomically
from orchestrator.hashing import digest
from orchestrator.tracking import TrackingError, absolute_uri, check_reachable, mlflow_client, shown_uri, store_file

LAYOUT = 2  # of the file: another one is not read
FOLDER = "mlflow-index"  # of the work folder
OUTCOMES = ("finished", "diverged")  # of runs that say something about their settings
OVERLAP_MS = 3600 * 1000  # before the last end known: runs may be sent that much later than they ended
PAGE = 1000  # runs that MLflow is asked for at once
THREADS = 8  # that ask for metrics
OFFLINE = "offline/"  # metrics of the data alone


@dataclass(frozen=True)
class IndexedRun:
    """A run that has ended, with what it is found by."""

    run_id: str
    experiment_id: str
    ended: int  # milliseconds
    study: str
    seed: int
    outcome: str
    settings_hash: str
    dataset: str
    dataset_hash: str  # as MLflow has it: the first 16 digits
    stage: str = ""  # search or confirm, of a search's runs
    trial: str = ""
    offline: list[str] = field(default_factory=list)  # metrics of the data alone that it has


@dataclass(frozen=True)
class Course:
    """A metric of a run over its updates."""

    updates: list[int]
    values: list[float]


class RunIndex:
    """What is known of a store's runs.

    Args:
        uri: of the store.
        workdir: work folder, where it is kept.
    """

    def __init__(self, uri: str, workdir: Path) -> None:
        self.uri = absolute_uri(uri)
        self.path = workdir / FOLDER / f"{digest(self.uri)}.json"
        self.courses_path = self.path.with_suffix(".courses.json")
        self._runs: dict[str, IndexedRun] = {}
        self._stamp: list[int] | None = None
        self._client: Any = None
        content = _read(self.path)
        if content.get("layout") == LAYOUT:
            self._runs = {run["run_id"]: IndexedRun(**run) for run in content["runs"]}
            self._stamp = content["stamp"]

    def refresh(self, anew: bool = False) -> None:
        """Take in what has ended since the last time, and leave out what was deleted.

        Args:
            anew: ask for everything, however long ago it ended; without, runs that were sent later than an hour
                after they had ended can be missed.

        Raises:
            UserError: the store cannot be reached.
        """
        stamp = self._file_stamp()  # before anything is asked: what comes meanwhile makes the next refresh ask again
        if stamp is not None and not any(stamp):  # no file yet
            self._runs = {}
            return
        if stamp is not None and stamp == self._stamp and not anew:
            return
        check_reachable(self.uri)
        with self._asking():
            self._take_in(anew)
        self._stamp = stamp
        keep(self.path, json.dumps({
            "layout": LAYOUT, "store": shown_uri(self.uri), "stamp": stamp,
            "runs": [asdict(run) for run in self._runs.values()],
        }))  # fmt: skip

    def _take_in(self, anew: bool) -> None:
        since = 0 if anew else max((run.ended for run in self._runs.values()), default=0) - OVERLAP_MS
        runs = {} if anew else self._runs
        found = self._search("ACTIVE_ONLY", f"attributes.end_time >= {max(0, since)}")
        runs |= {run.run_id: run for run in found}
        gone = [] if anew else [run.run_id for run in self._search("DELETED_ONLY")]
        self._runs = {run_id: run for run_id, run in runs.items() if run_id not in gone}

    def by_settings(self) -> dict[str, list[IndexedRun]]:
        """All runs by the hash of their settings; what ended first comes first."""
        found: dict[str, list[IndexedRun]] = {}
        for run in sorted(self._runs.values(), key=lambda run: (run.ended, run.run_id)):
            found.setdefault(run.settings_hash, []).append(run)
        return found

    def confirmed(self, study: str) -> dict[str, list[IndexedRun]]:
        """The runs of a search's confirm stage, by the trial that they repeat."""
        found: dict[str, list[IndexedRun]] = {}
        for run in self._runs.values():
            if (run.study, run.stage) == (study, "confirm"):
                found.setdefault(run.trial, []).append(run)
        return found

    def courses(self, runs: Sequence[IndexedRun], metric: str) -> dict[str, dict[str, Course]]:
        """By run and metric: one metric's evaluations, and those of the data alone. Each is asked for once.

        Raises:
            UserError: the store cannot be reached.
        """
        wanted = [(run.run_id, name) for run in runs for name in (metric, *run.offline)]
        known = _read(self.courses_path)
        missing = [key for key in wanted if key[1] not in known.get(key[0], {})]
        if missing:
            with self._asking(), ThreadPoolExecutor(THREADS) as pool:
                for (run_id, name), points in zip(missing, pool.map(self._history, missing), strict=True):
                    known.setdefault(run_id, {})[name] = points
            keep(self.courses_path, json.dumps(known))
        return {run.run_id: {name: Course(*known[run.run_id][name]) for name in (metric, *run.offline)} for run in runs}

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """With a client, whose errors are the user's to mend."""
        from mlflow.exceptions import MlflowException

        self._client = self._client or mlflow_client(self.uri)
        try:
            yield
        except MlflowException as error:
            raise TrackingError(
                f"{shown_uri(self.uri)} does not give its runs: {str(error).splitlines()[0]}"
            ) from error

    def _history(self, key: tuple[str, str]) -> tuple[list[int], list[float]]:
        points = {point.step: point.value for point in self._client.get_metric_history(*key)}
        updates = sorted(points)
        return updates, [points[update] for update in updates]

    def _search(self, view: str, more: str = "") -> Iterator[IndexedRun]:
        from mlflow.entities import ViewType

        words = " and ".join(filter(None, ["tags.settings_hash LIKE '%'", more]))
        experiments = [experiment.experiment_id for experiment in self._experiments()]
        token = None
        while experiments:
            page = self._client.search_runs(
                experiments, words, ViewType.from_string(view.lower()), PAGE, page_token=token
            )
            yield from filter(None, map(_indexed, page))
            token = page.token
            if not token:
                return

    def _experiments(self) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_experiments(page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _file_stamp(self) -> list[int] | None:
        """What changes with a store that is a file; None of others."""
        path = store_file(self.uri)
        if path is None:
            return None
        stamp = []
        for file in (path, path.with_name(path.name + "-wal")):
            try:
                stat = file.stat()
                stamp += [stat.st_mtime_ns, stat.st_size]
            except OSError:
                stamp += [0, 0]
        return stamp


def _indexed(run: Any) -> IndexedRun | None:
    """None of what says nothing about its settings."""
    tags: Mapping[str, str] = run.data.tags
    if tags.get("outcome") not in OUTCOMES or run.info.end_time is None:
        return None
    digests = [given.dataset.digest for given in run.inputs.dataset_inputs]
    return IndexedRun(
        run.info.run_id, run.info.experiment_id, run.info.end_time, tags.get("study", ""), int(tags.get("seed", 0)),
        tags["outcome"], tags["settings_hash"], tags.get("dataset", ""),
        digests[0] if digests else "", tags.get("stage", ""), tags.get("trial", ""),
        sorted(name for name in run.data.metrics if name.startswith(OFFLINE)),
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """A file of the index; nothing where it is missing or damaged, since all can be asked for again."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content


def keep(path: Path, text: str) -> None:
    """Write what can be asked for again, and so need not be kept where nothing can be written."""
    with suppress(OSError, DiskFullError):
        write_atomically(path, lambda temporary: temporary.write_text(text))
