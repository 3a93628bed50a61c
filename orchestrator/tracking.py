"""The tracker: carries what runs spooled to MLflow, once and in order. What a machine spools is sent by one tracker.

The spool files are the truth and what is sent is a function of their content and of what MLflow has, so a tracker
may die anywhere, and a run may go on on another machine, with another tracker:
- A run is found by its tag `offsweep.run_key` before one is created.
- A metric carries the time at which it was logged; MLflow keeps one row per (run, key, step, time, value), so
  sending a batch a second time adds nothing.
- Of a step that a run logs again after a resume only the first occurrence is sent. Which step of a metric was the last
  to be sent is asked of MLflow where a tracker meets a run for the first time, and where a run starts again.
- A run's tag `offsweep.started` says when its latest life began. What an earlier one has left on another machine, to
  be sent late, adds points that are missing and changes nothing else.
- Parameters are write-once in MLflow: those that a run has are never sent again.
The state file only saves work; losing it is harmless.

Runs are top-level runs of one experiment per study (no `mlflow.parentRunId`): MLflow's table and charts
collapse children into their parent. MLflow is imported when it is first needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import secrets
import sqlite3
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from envs.errors import UserError
from orchestrator.spool import SUFFIX, count_lines, read_records

RUN_KEY_TAG = "offsweep.run_key"
STATE_FILE = "tracker.json"
STARTED_TAG = "offsweep.started"  # milliseconds since 1970
NOTE_TAG = "mlflow.note.content"

# Limits of one log_batch call and of single values (mlflow.utils.validation).
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
TAGS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_NOTE_LENGTH = 20000
_DIGEST_LENGTH = 36

_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 60.0
_STATE_INTERVAL_S = 1.0
# Looking through the spool folder, and saving the state, take longer the more runs there are; no more than this share
# of the time goes to either.
_UPKEEP_SHARE = 0.05
# One poll leaves a run with a long backlog after this many batches, so that the others are not kept waiting.
_BATCHES_PER_TURN = 10

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class TrackingError(UserError):
    """The tracking store cannot be used: wrong address, nobody answers, not an MLflow store."""


@dataclass(frozen=True)
class TrackerStatus:
    """What has been sent and what waits.

    Attributes:
        pending_lines: whole spool lines not sent yet, of all runs.
        pending_runs: how many runs have such lines.
        sent_metrics: metric values sent by this tracker.
        repeated_metrics: values left out because their step had been sent (logged again after a resume).
        damaged_lines: spool lines that could not be read (torn by a kill).
        last_error: the latest failure as a sentence, None once everything went through again.
        next_attempt_s: seconds until an unanswering store is tried again, 0 if it answers.
        refused: run key -> why MLflow refuses this run's data; the run waits and the others go on.
        notes: run key -> what was left out on purpose (parameters that changed, artifacts that are gone).
    """

    pending_lines: int
    pending_runs: int
    sent_metrics: int
    repeated_metrics: int
    damaged_lines: int
    last_error: str | None
    next_attempt_s: float
    refused: dict[str, str]
    notes: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Backlog:
    """What waits to be sent, by sizes alone: cheap to ask, however long it is."""

    runs: int
    bytes: int
    last_error: str | None


@dataclass
class _Run:
    """Where one run's spool file stands. The first four fields are kept in the state file."""

    run_id: str | None = None
    offset: int = 0
    steps: dict[str, int] = field(default_factory=dict)  # metric key -> last step sent; nothing of a run that has ended
    started: int = 0  # time of the last `start` that was sent from here

    known: bool = False  # whether MLflow has been asked what it has of this run
    stale: bool = False  # whether the run has started elsewhere since
    torn_size: int = -1  # file size at which nothing but a torn line was left
    delay_s: float = 0.0
    retry_at: float = 0.0
    refused: str | None = None
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set


class Tracker:
    """Sends a study's spool files to MLflow.

    Args:
        tracking_uri: the store, see `default_tracking_uri`.
        experiment: name of the experiment, the study's name; created on first use.
        spool_folder: where the runs' spool files are; need not exist yet.
        state_file: where this tracker remembers what it has sent.
        artifact_root: folder (or URI) of artifacts, used when the experiment is created. By default
            `mlartifacts` beside an SQLite store, and the server's own choice otherwise.
        experiment_tags: tags of the experiment.
        client_factory: makes the MLflow client from the tracking URI; for tests.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        spool_folder: str | Path,
        state_file: str | Path,
        artifact_root: str | Path | None = None,
        experiment_tags: Mapping[str, str] | None = None,
        client_factory: Callable[[str], Any] | None = None,
    ) -> None:
        self.tracking_uri = absolute_uri(tracking_uri)
        self.experiment = experiment
        self.spool_folder = Path(spool_folder)
        self.state_file = Path(state_file)
        self._artifact_root = artifact_root
        self._client_factory = client_factory or mlflow_client
        self._client: Any = None
        self._experiment_id: str | None = None
        self._lock = threading.RLock()

        self._tags_lock = threading.Lock()
        self._new_experiment_tags = {key: str(value) for key, value in (experiment_tags or {}).items()}

        self._runs: dict[str, _Run] = {}
        self._unsaved = False
        self._save_next = 0.0
        self._upkeep_s = 0.0  # of the last look through the spool folder
        self._delay_s = 0.0
        self._retry_at = 0.0
        self._last_error: str | None = None
        self._sent = 0
        self._repeated = 0
        self._damaged = 0
        self._load_state()

    # What the driver calls

    def connect(self) -> str:
        """Opens the store and finds or creates the experiment; returns its MLflow id.

        `poll` does this by itself. Call it first to learn of a bad store before any compute is spent.

        Raises:
            TrackingError: the store cannot be used, or the experiment was deleted in MLflow.
        """
        with self._lock:
            try:
                self._connect()
            except TrackingError:
                raise
            except Exception as error:
                raise TrackingError(
                    f"The experiment {self.experiment!r} cannot be opened in {shown_uri(self.tracking_uri)}:"
                    f" {self._said(error)}"
                ) from error
            assert self._experiment_id is not None
            return self._experiment_id

    def set_experiment_note(self, text: str) -> None:
        """Sets the description that MLflow shows above the study's runs (Markdown); sent by the next poll."""
        with self._tags_lock:
            self._new_experiment_tags[NOTE_TAG] = text[:_NOTE_LENGTH]

    def poll(self) -> int:
        """Sends what is new, unless the store is being left alone after a failure; never raises.

        Returns:
            Number of metric values sent.
        """
        return self._patient_poll(threading.Event())

    def run_loop(self, stop_event: threading.Event, interval: float = 2.0) -> None:
        """Polls every `interval` seconds until the event is set; meant for a thread."""
        while not stop_event.is_set():
            # Under a backlog there is no reason to rest between polls.
            if self._patient_poll(stop_event) == 0:
                stop_event.wait(max(interval, self._upkeep_s / _UPKEEP_SHARE))

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Sends everything that is spooled, trying again until it is through or the time is up.

        Returns:
            True if nothing is left; False if the time is up (a call in progress is waited for) or MLflow
            refuses what is left. What is left stays in the spool and is sent by the next tracker.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._poll(patient=False, stop=threading.Event())
                waiting = [run_key for run_key, _ in self._backlog()]
                refused = [run_key for run_key in waiting if self._runs[run_key].refused]
                done = not waiting and not self._new_experiment_tags
            if done:
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or (waiting and len(refused) == len(waiting)):
                return False
            if self._last_error is not None:
                time.sleep(min(0.5, remaining))

    def status(self) -> TrackerStatus:
        """What has been sent and what waits (reads the unsent part of the spool to count its lines)."""
        # Without the lock: a poll may hold it for as long as a server takes to answer, and the driver's
        # display must not freeze. The numbers may be of slightly different moments.
        backlog = self._backlog()
        runs = list(self._runs.items())
        return TrackerStatus(
            pending_lines=sum(count_lines(path, self._runs[run_key].offset) for run_key, path in backlog),
            pending_runs=len(backlog),
            sent_metrics=self._sent,
            repeated_metrics=self._repeated,
            damaged_lines=self._damaged,
            last_error=self._last_error,
            next_attempt_s=max(0.0, self._retry_at - time.monotonic()),
            refused={run_key: run.refused for run_key, run in runs if run.refused},
            notes={run_key: tuple(run.notes) for run_key, run in runs if run.notes},
        )

    def backlog(self) -> Backlog:
        """What waits to be sent; reads no file."""
        waiting = self._backlog()
        with suppress(OSError):
            unsent = sum(path.stat().st_size - self._runs[run_key].offset for run_key, path in waiting)
            return Backlog(len(waiting), unsent, self._last_error)
        return Backlog(len(waiting), 0, self._last_error)

    def run_ids(self) -> dict[str, str]:
        """run key -> MLflow run id of the runs that have been created."""
        return {run_key: run.run_id for run_key, run in list(self._runs.items()) if run.run_id is not None}

    # One poll

    def _patient_poll(self, stop: threading.Event) -> int:
        with self._lock:
            return 0 if time.monotonic() < self._retry_at else self._poll(patient=True, stop=stop)

    def _poll(self, patient: bool, stop: threading.Event) -> int:
        sent_before = self._sent
        try:
            began = time.perf_counter()
            backlog = self._backlog()
            self._upkeep_s = time.perf_counter() - began
            if backlog or self._new_experiment_tags:
                self._send_backlog(backlog, patient, stop)
            if not patient or time.monotonic() > self._save_next:
                self._save_state()
        except Exception as error:
            # Of the whole store, the spool folder or the state file: nothing that a single run can be blamed
            # for.
            self._leave_alone(error)
        return self._sent - sent_before

    def _backlog(self) -> list[tuple[str, Path]]:
        """Runs whose file holds more than was sent; one directory scan, no file is opened."""
        backlog = []
        try:
            entries = sorted(os.scandir(self.spool_folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            return []
        for entry in entries:
            if not entry.name.endswith(SUFFIX):
                continue
            run = self._runs.setdefault(entry.name.removesuffix(SUFFIX), _Run())
            size = entry.stat().st_size
            if size < run.offset:
                # Somebody put a shorter file in its place: read it from the start; the steps sent are still
                # known.
                run.offset = 0
                run.torn_size = -1
            if size > run.offset and size != run.torn_size:
                backlog.append((entry.name.removesuffix(SUFFIX), Path(entry.path)))
        return backlog

    def _send_backlog(self, backlog: list[tuple[str, Path]], patient: bool, stop: threading.Event) -> None:
        self._connect()
        failed_in_a_row = 0
        any_failure = False
        for run_key, path in backlog:
            run = self._runs[run_key]
            if stop.is_set():
                return
            if patient and time.monotonic() < run.retry_at:
                any_failure = True
                continue
            try:
                self._send_run(run_key, run, path, stop)
            except Exception as error:
                any_failure = True
                run.known = False  # it may have gone on elsewhere by the time that this store answers again
                self._last_error = f"Run {run_key}: {self._said(error)}"
                run.delay_s, run.retry_at = _next_delay(run.delay_s)
                if _error_code(error) == "RESOURCE_DOES_NOT_EXIST":
                    # The store was emptied or replaced; the spool holds all that is needed to fill it again.
                    self._runs[run_key] = _Run(delay_s=run.delay_s, retry_at=run.retry_at)
                    self._experiment_id = None
                    return
                if _is_refusal(error):
                    run.refused = self._said(error)
                    continue
                # One run may have data that the server chokes on; two in a row, or the only one, is an
                # outage.
                failed_in_a_row += 1
                if failed_in_a_row == 2 or len(backlog) == 1:
                    self._leave_alone(error)
                    return
            else:
                failed_in_a_row = 0
                run.delay_s, run.retry_at, run.refused = 0.0, 0.0, None
            if time.monotonic() > self._save_next:
                self._save_state()
        self._delay_s = self._retry_at = 0.0
        if not any_failure:
            self._last_error = None

    def _leave_alone(self, error: Exception) -> None:
        self._last_error = self._said(error)
        self._delay_s, self._retry_at = _next_delay(self._delay_s)

    def _said(self, error: BaseException) -> str:
        """What went wrong, without the password that the store's address may hold."""
        return _without_password(_sentence(error), self.tracking_uri)

    def _send_run(self, run_key: str, run: _Run, path: Path, stop: threading.Event) -> None:
        """Sends up to `_BATCHES_PER_TURN` batches of one run; the offset moves only behind what was sent."""
        from mlflow.entities import Metric

        if not run.known:
            self._look_up(run_key, run)
        batch: list[Metric] = []
        steps: dict[str, int] = {}  # of the batch, on top of run.steps
        position = run.offset
        repeated = damaged = batches = 0

        def flush() -> None:
            nonlocal repeated, damaged, batches
            if batch:
                run_id = self._ensure_run(run_key, run)
                for start in range(0, len(batch), METRICS_PER_BATCH):
                    self._client.log_batch(run_id, metrics=batch[start : start + METRICS_PER_BATCH])
                    batches += 1
            if position != run.offset:
                run.offset = position
                self._unsaved = True
            run.steps.update(steps)
            self._sent += len(batch)
            self._repeated += repeated
            self._damaged += damaged
            batch.clear()
            steps.clear()
            repeated = damaged = 0

        for record, end in read_records(path, run.offset):
            if record is None:
                damaged += 1
            elif record["type"] == "metrics":
                step = record["step"]
                values = {
                    key: value
                    for key, value in record["values"].items()
                    if (last := steps.get(key, run.steps.get(key))) is None or step > last
                }
                if len(batch) + len(values) > METRICS_PER_BATCH:
                    flush()
                    if batches >= _BATCHES_PER_TURN or stop.is_set():
                        return
                repeated += len(record["values"]) - len(values)
                batch.extend(Metric(key, float(value), record["time"], step) for key, value in values.items())
                steps.update(dict.fromkeys(values, step))
            else:
                flush()
                self._send_event(run_key, run, record)
            position = end
        flush()
        with suppress(OSError):
            size = path.stat().st_size
            if size > run.offset and next(read_records(path, run.offset), None) is None:
                run.torn_size = size  # do not open the file again before it grows

    def _send_event(self, run_key: str, run: _Run, record: dict[str, Any]) -> None:
        kind = record["type"]
        if kind == "start":
            self._start_run(run_key, run, record)
            return
        if kind == "close":
            self._close_run(run, record)
            return
        if run.stale:
            return
        run_id = self._ensure_run(run_key, run)
        if kind == "tags":
            self._send_tags(run_id, record["tags"])
        elif kind == "artifact":
            self._send_artifact(run_id, run, record)
        elif kind == "end":
            self._client.set_terminated(run_id, status=record["status"], end_time=record["time"])
            # nothing of it is needed any more; should the run go on, MLflow is asked again
            run.steps, run.known = {}, False

    def _close_run(self, run: _Run, record: dict[str, Any]) -> None:
        """End a run that nobody has ended, on behalf of a machine that cannot."""
        if run.run_id is None or self._client.get_run(run.run_id).info.status != "RUNNING":
            return
        self._send_tags(run.run_id, record["tags"])
        self._client.set_terminated(run.run_id, status=record["status"], end_time=record["time"])

    def _start_run(self, run_key: str, run: _Run, record: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = {key: value[:_PARAM_LENGTH] for key, value in record["params"].items()}
        tags = {**record["tags"], STARTED_TAG: str(record["time"])}
        if run.run_id is not None:
            # another machine's tracker may have sent points since
            stored = self._take_stock(run)
            if run.stale and _started(stored) > record["time"]:
                return
            if stored.info.status != "RUNNING" or stored.info.run_name != record["run_name"]:
                self._client.update_run(run.run_id, status="RUNNING", name=record["run_name"])
            self._send_tags(run.run_id, tags)
            for key in params.keys() & stored.data.params.keys():
                stays, comes = stored.data.params[key], params.pop(key)
                if stays != comes:
                    run.notes[f"parameter {key} stays {stays!r}, the resumed run has {comes!r}"] = None
        else:
            self._create_run(run_key, run, record["run_name"], tags, record["time"])
        assert run.run_id is not None
        run.started, run.stale = record["time"], False
        for chunk in _chunks(params, PARAMS_PER_BATCH):
            self._client.log_batch(run.run_id, params=[Param(key, value) for key, value in chunk.items()])
        if record["datasets"]:
            self._client.log_inputs(run.run_id, [_dataset_input(dataset) for dataset in record["datasets"]])

    def _send_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        for chunk in _chunks(tags, TAGS_PER_BATCH):
            entities = [RunTag(key, value[:_TAG_LENGTH]) for key, value in chunk.items()]
            self._client.log_batch(run_id, tags=entities)

    def _send_artifact(self, run_id: str, run: _Run, record: dict[str, Any]) -> None:
        if not os.path.exists(record["path"]):
            run.notes[f"artifact {record['path']} was gone before it could be uploaded"] = None
            return
        try:
            self._client.log_artifact(run_id, record["path"], record["artifact_path"])
        except Exception as error:
            # The file is still on disk; metrics behind it must not wait for a folder without write
            # permission.
            if not isinstance(error, PermissionError) and not _is_refusal(error):
                raise
            if _error_code(error) == "RESOURCE_DOES_NOT_EXIST":
                raise
            run.notes[f"artifact {record['path']} was not uploaded: {self._said(error)}"] = None

    # Runs and the experiment

    def _ensure_run(self, run_key: str, run: _Run) -> str:
        # Without a `start` line in front (it can be the torn one) the run is at least found by its key.
        if run.run_id is None:
            self._create_run(run_key, run, run_key, {}, None)
        assert run.run_id is not None
        return run.run_id

    def _look_up(self, run_key: str, run: _Run) -> None:
        """Learn what MLflow has of a run."""
        if run.run_id is None:
            found = self._client.search_runs(
                [self._experiment_id], filter_string=f"tags.`{RUN_KEY_TAG}` = '{run_key}'", max_results=1
            )
            if found:
                run.run_id = found[0].info.run_id
                self._unsaved = True
        if run.run_id is not None:
            self._take_stock(run)
        run.known = True

    def _take_stock(self, run: _Run) -> Any:
        """Learn up to which step MLflow has each metric of a run, and whether it has started elsewhere since; returns
        the run as MLflow has it."""
        stored = self._client.get_run(run.run_id)
        # RunData.metrics has the same without the steps
        for metric in stored.data._metric_objs:
            run.steps[metric.key] = max(metric.step, run.steps.get(metric.key, metric.step))
        run.stale = _started(stored) > run.started
        return stored

    def _create_run(self, run_key: str, run: _Run, run_name: str, tags: dict[str, str], start_time: int | None) -> None:
        tags = {key: value[:_TAG_LENGTH] for key, value in tags.items()}
        created = self._client.create_run(
            self._experiment_id, start_time=start_time, tags={**tags, RUN_KEY_TAG: run_key}, run_name=run_name
        )
        run.run_id = created.info.run_id
        self._unsaved = True

    def _connect(self) -> None:
        if self._client is None:
            if _scheme(self.tracking_uri) == "sqlite":
                ensure_store(self.tracking_uri, self._artifact_root)
            elif _scheme(self.tracking_uri) in _DATABASES:
                # MLflow itself would retry for most of an hour inside its constructor.
                _check_database(self.tracking_uri)
            self._client = self._client_factory(self.tracking_uri)
        if self._experiment_id is None:
            self._experiment_id = self._find_or_create_experiment()
        with self._tags_lock:
            tags = dict(self._new_experiment_tags)
        for key, value in tags.items():
            self._client.set_experiment_tag(self._experiment_id, key, value)
            with self._tags_lock:
                if self._new_experiment_tags.get(key) == value:
                    del self._new_experiment_tags[key]

    def _find_or_create_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self.experiment, self._artifact_location()))
            except Exception as error:
                if _error_code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(self.experiment)
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"The experiment {self.experiment!r} was deleted in MLflow and its name cannot be used again:"
                f" restore it (mlflow experiments restore --experiment-id {found.experiment_id})"
                " or give the study another name."
            )
        return str(found.experiment_id)

    def _artifact_location(self) -> str | None:
        root = self._artifact_root
        if root is None:
            if _scheme(self.tracking_uri) != "sqlite":
                return None
            root = _default_artifact_root(self.tracking_uri)
        # MLflow's own default would be relative to whatever folder the process happens to run in.
        folder = re.sub(r"[^\w.-]+", "-", self.experiment)
        return f"{_root_uri(root)}/{folder}"

    # State

    def _target(self) -> str:
        # A digest, because the address of a database can hold a password.
        return hashlib.sha256(f"{self.tracking_uri}\n{self.experiment}".encode()).hexdigest()

    def _load_state(self) -> None:
        try:
            state = json.loads(self.state_file.read_bytes())
            if state["target"] != self._target():
                return  # another store: it gets everything from the start
            self._runs = {
                run_key: _Run(
                    str(run["run_id"]) if run["run_id"] else None,
                    int(run["offset"]),
                    dict(run["steps"]),
                    int(run.get("started", 0)),
                )
                for run_key, run in state["runs"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._runs = {}

    def _save_state(self) -> None:
        if not self._unsaved:
            return
        began = time.monotonic()
        runs = {
            run_key: {"run_id": run.run_id, "offset": run.offset, "steps": run.steps, "started": run.started}
            for run_key, run in self._runs.items()
        }
        content = json.dumps({"target": self._target(), "runs": runs}, separators=(",", ":"))
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state_file.with_name(f".{self.state_file.name}.{os.getpid()}.tmp")
        temporary.write_text(content)
        os.replace(temporary, self.state_file)
        self._unsaved = False
        now = time.monotonic()
        self._save_next = now + max(_STATE_INTERVAL_S, (now - began) / _UPKEEP_SHARE)


# The store


def default_tracking_uri(workdir: str | Path) -> str:
    """The store to use: MLFLOW_TRACKING_URI if set, else the SQLite file `mlflow.db` in the work folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(workdir).resolve() / 'mlflow.db'}"


def absolute_uri(uri: str) -> str:
    """The URI with an SQLite path made absolute, so that it means the same in every process.

    Raises:
        TrackingError: MLflow has no such kind of store.
    """
    scheme = _scheme(uri)
    if scheme == "sqlite":
        path = uri.partition(":///")[2]
        if not path or path == ":memory:" or "?" in path:
            raise TrackingError(
                f"The tracking store {uri!r} does not name a file: write sqlite:////absolute/path/mlflow.db."
            )
        return f"sqlite:///{os.path.abspath(path)}"
    if scheme in ("http", "https", *_DATABASES):
        return uri
    if scheme in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return uri
    raise TrackingError(
        f"MLflow cannot keep runs in {shown_uri(uri)!r}: give sqlite:////absolute/path/mlflow.db,"
        " the http(s) address of an MLflow server, or a postgresql:// or mysql:// database."
    )


def ensure_store(uri: str, artifact_root: str | Path | None = None) -> str:
    """Creates an SQLite store if it does not exist; other stores are left to their server.

    MLflow lets processes that meet a missing database destroy each other's set-up, and a killed one leaves
    half a database. So it is made under a lock in a file beside, and renamed when it is complete.

    Args:
        uri: the store.
        artifact_root: folder for artifacts of the default experiment; `mlartifacts` beside the database if
            None.

    Returns:
        The absolute URI.

    Raises:
        TrackingError: the file cannot be made, or is no database.
    """
    uri = absolute_uri(uri)
    if _scheme(uri) != "sqlite":
        return uri
    path = _sqlite_path(uri)
    if path.exists():
        return uri
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return uri
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            os.close(handle)
            try:
                root = artifact_root if artifact_root is not None else _default_artifact_root(uri)
                _create_database(f"sqlite:///{name}", _root_uri(root))
                os.chmod(name, 0o644)
                os.replace(name, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)
    except Exception as error:
        raise TrackingError(
            f"The tracking store {path} cannot be created ({_sentence(error)}): choose a folder that can be written to."
        ) from error
    return uri


def check_reachable(uri: str, timeout_s: float = 5.0) -> None:
    """Makes sure, before any compute is spent, that runs can be recorded in the store.

    A missing SQLite file is fine if it can be created.

    Raises:
        TrackingError: one sentence saying what does not answer, and what to do.
    """
    uri = absolute_uri(uri)
    scheme = _scheme(uri)
    if scheme == "sqlite":
        path = _sqlite_path(uri)
        if path.exists():
            _check_database(uri)
            if not os.access(path, os.W_OK):
                raise TrackingError(f"The tracking store {path} cannot be written to: mend its permissions.")
        else:
            _check_folder(path.parent)
        return
    if scheme in _DATABASES:
        _check_database(uri)
    elif scheme in ("http", "https"):
        _check_server(uri, timeout_s)


def ui_command(
    uri: str,
    artifact_root: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 5000,
    allowed_hosts: str | None = None,
    auth: bool = False,
) -> list[str]:
    """The command that serves MLflow's pages for a store: one worker, job execution off (0.4 GB instead of 1
    GB).

    Args:
        allowed_hosts: names under which it may be asked, with commas; None: MLflow's own choice, this machine and
            private addresses.
        auth: ask for a name and a password.

    Raises:
        TrackingError: the store is a server itself; what passwords need is not installed.
    """
    uri = absolute_uri(uri)
    if _scheme(uri) in ("http", "https"):
        raise TrackingError(f"{shown_uri(uri)} is an MLflow server already: open this address in a browser.")
    command = ["env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true"]
    command += [sys.executable, "-m", "mlflow", "server"]
    if not _passwords(uri):  # else it comes by the environment, which others on this machine do not see
        command += ["--backend-store-uri", uri]
    root = artifact_root
    if root is None and _scheme(uri) == "sqlite":
        root = _default_artifact_root(uri)
    if root is not None:
        command += ["--default-artifact-root", _root_uri(root)]
    if allowed_hosts is not None:
        command += ["--allowed-hosts", allowed_hosts]
    if auth:
        if importlib.util.find_spec("flask_wtf") is None:
            raise TrackingError("--auth needs packages that are not installed: pip install 'mlflow[auth]'.")
        command += ["--app-name", "basic-auth"]
    return [*command, "--host", host, "--port", str(port), "--workers", "1"]


def ui_environment(uri: str, auth: bool = False) -> dict[str, str]:
    """Variables that the command of `ui_command` needs: what must not be seen in a list of processes."""
    variables = {"MLFLOW_BACKEND_STORE_URI": absolute_uri(uri)}
    if auth and not os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY"):
        variables["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(16)
    return variables


def mlflow_client(uri: str) -> Any:
    """MLflow's client of a store, whose loading takes seconds."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _create_database(uri: str, artifact_root: str) -> None:
    import logging

    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    talkers = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.WARNING)  # they print a line for each of some sixty migrations
    try:
        SqlAlchemyStore(uri, artifact_root).engine.dispose()
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_folder(folder: Path) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise TrackingError(f"The folder {folder} for the tracking store cannot be written to: choose another one.")


def _check_database(uri: str) -> None:
    if _scheme(uri) == "sqlite":
        path = _sqlite_path(uri)
        try:
            # not for reading only: what a killed process has written half-way is then not rolled back
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            raise TrackingError(
                f"{path} is not an SQLite database MLflow can use ({error}): move it away or name another file."
            ) from error
        return
    import sqlalchemy

    options = {} if _scheme(uri) == "mssql" else {"connect_timeout": 5}
    try:
        engine = sqlalchemy.create_engine(uri, connect_args=options)
        with engine.connect():
            pass
        engine.dispose()
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"The driver for {shown_uri(uri)} is not installed (no module named {error.name!r}): install it, for"
            " PostgreSQL with pip install 'psycopg[binary]'."
        ) from error
    except Exception as error:
        raise TrackingError(
            f"The database {shown_uri(uri)} does not accept a connection ({_without_password(_sentence(error), uri)}):"
            " start it or correct the tracking URI."
        ) from error


def _check_server(uri: str, timeout_s: float) -> None:
    shown = shown_uri(uri)
    try:
        # Asked first because MLflow's own client would wait two minutes for a host that never answers.
        # (Without the name and password that the address may hold, which urllib would take for a part of the host.)
        parts = urlsplit(uri)
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        urllib.request.urlopen(f"{plain.rstrip('/')}/health", timeout=timeout_s).close()
    except urllib.error.HTTPError:
        pass  # somebody answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"No MLflow server answers at {shown} ({reason}): start it, or unset the tracking URI"
            " to record in a local file."
        ) from error
    try:
        mlflow_client(uri).search_experiments(max_results=1)
    except Exception as error:
        raise TrackingError(
            f"{shown} answers, but not as an MLflow server that lets us in"
            f" ({_without_password(_sentence(error), uri)}):"
            " check the address and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        ) from error


# Small helpers


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0].lower() if ":" in uri else ""


def store_file(uri: str) -> Path | None:
    """The file of a store that is one (SQLite)."""
    return _sqlite_path(uri) if _scheme(uri) == "sqlite" else None


def _sqlite_path(uri: str) -> Path:
    return Path(uri.partition(":///")[2])


def _default_artifact_root(uri: str) -> Path:
    return _sqlite_path(uri).parent / "mlartifacts"


def _root_uri(root: str | Path) -> str:
    if isinstance(root, str) and "://" in root:
        return root.rstrip("/")
    return Path(os.path.abspath(root)).as_uri()


def shown_uri(uri: str) -> str:
    """The address without a password in it."""
    return _without_password(uri, uri)


def check_no_password(uri: str) -> str:
    """The address itself, which is kept in a study's files.

    Raises:
        TrackingError: it holds a password.
    """
    if _passwords(uri):
        raise TrackingError(
            f"tracking_uri={shown_uri(uri)} holds a password, which would be written to the study's files; leave it out"
            " and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a server) or PGPASSWORD (of a"
            " PostgreSQL database)."
        )
    return uri


def _passwords(uri: str) -> list[str]:
    """The passwords that an address holds, as they stand in it."""
    try:
        parts = urlsplit(uri)
        found = [parts.password] if parts.password else []
    except ValueError:
        return []
    return found + re.findall(r"[?&][^=&]*passw(?:or)?d=([^&]+)", parts.query and f"?{parts.query}", re.IGNORECASE)


def _without_password(text: str, uri: str) -> str:
    for password in _passwords(uri):
        for written in {password, unquote(password)}:
            text = text.replace(written, "***")
    return text


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}..."


def _error_code(error: BaseException) -> str:
    return str(getattr(error, "error_code", ""))


def _is_refusal(error: BaseException) -> bool:
    """Whether MLflow understood a request and says no, so that asking again soon is pointless."""
    if _is_of_database(error):
        return False
    status = getattr(error, "get_http_status_code", None)
    # 401, 403: a login that expired concerns all runs; 408, 429: the server is busy.
    return callable(status) and 400 <= status() < 500 and status() not in (401, 403, 408, 429)


def _is_of_database(error: BaseException) -> bool:
    """Whether it is the database behind a store that failed, such as one that has become read-only, which MLflow
    reports as a bad request; not because of what it was given."""
    text = str(error)
    return "sqlalche.me" in text and not re.search(r"\.(DataError|IntegrityError|NumericValueOutOfRange)\b", text)


def _started(run: Any) -> int:
    """When the latest life of a run began that MLflow knows of."""
    text = run.data.tags.get(STARTED_TAG, "0")
    return int(text) if text.isdigit() else 0


def _next_delay(delay_s: float) -> tuple[float, float]:
    """(the next delay of an exponential back-off, the moment it ends on the monotonic clock)."""
    delay_s = min(_LONGEST_DELAY_S, 2 * delay_s) if delay_s else _FIRST_DELAY_S
    return delay_s, time.monotonic() + delay_s


def _chunks(values: Mapping[str, str], size: int) -> Iterator[dict[str, str]]:
    items = list(values.items())
    for start in range(0, len(items), size):
        yield dict(items[start : start + size])


def _dataset_input(record: dict[str, Any]) -> Any:
    """MLflow's entity for a dataset, described but not stored."""
    import numpy as np
    from mlflow.data.schema import TensorDatasetSchema
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.types import Schema, TensorSpec

    source = record.get("source", "")
    if source.startswith(("http://", "https://")):
        source_type, source_fields = "http", {"url": source}
    elif source.startswith(("/", "file://")):
        source_type, source_fields = "local", {"uri": source}
    else:
        source_type, source_fields = "code", {"tags": {"source": source or "unknown"}}
    schema = None
    if record.get("schema"):
        columns: list[Any] = [
            TensorSpec(np.dtype(column["dtype"]), tuple(column["shape"]), name)
            for name, column in record["schema"].items()
        ]
        schema = json.dumps(TensorDatasetSchema(Schema(columns)).to_dict())
    # MLflow allows 36 characters of a digest; the whole hash goes into the profile.
    profile = {**record.get("profile", {}), "content_hash": record["digest"]}
    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:_DIGEST_LENGTH],
        source_type=source_type,
        source=json.dumps(source_fields),
        schema=schema,
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", record.get("context", "training"))])
