"""A tracker on every machine of a cluster, each of which sends what is logged on its own disk (`compute.spool_folder`).

```
machine A   learners -> A's spool folder -> A's tracker -.
machine B   learners -> B's spool folder -> B's tracker --+-> MLflow server
driver      the study's own run -> its spool -> tracker --'
```

What is logged crosses the network on its way to MLflow only, and no folder has the files of all runs. A machine's death
is harmless because its unsent lines lie elsewhere, too: in the checkpoint of a pack under way, from which the machine
that goes on with it takes them in (`Learner`), and with the driver once a pack has ended (`keep_unsent`), until they
are known to be sent. Points are not doubled because a tracker asks MLflow what it has (`orchestrator.tracking`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import UserError
from orchestrator.spool import SUFFIX, RunSpool, spool_folder
from orchestrator.tracking import STATE_FILE, Tracker, shown_uri

LOOK_SECONDS = 5.0  # between looks at which machines there are and what waits on them
ANSWER_SECONDS = 10.0  # that a machine's tracker may take to say what waits
UNSENT_FOLDER = "unsent"  # of a study: lines of packs that have ended, by machine
_LOCK_FILE = "tracker.lock"

CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH", "PGPASSWORD",
)  # fmt: skip
"""Variables of the driver's that its machines' trackers use, too."""


class Secrets:
    """Variables that are shown nowhere. They travel as an argument: Ray writes the environments of workers to its logs
    and shows them on its dashboard."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    @classmethod
    def of_this_process(cls) -> Secrets:
        return cls({name: os.environ[name] for name in CREDENTIALS if name in os.environ})

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self._values)})"

    def set(self) -> None:
        """Set them in this process, but for those that it has."""
        for name, value in self._values.items():
            os.environ.setdefault(name, value)


@dataclass(frozen=True)
class NodeBacklog:
    """What waits on a machine."""

    place: str  # host and folder
    runs: int
    bytes: int
    last_error: str | None


def place_of(folder: Path) -> str:
    """How the spool folder of a machine is told from those of others."""
    return f"{socket.gethostname()}:{folder}"


class NodeTracker:
    """Sends what is spooled in a folder of this machine; in the driver's process, or a Ray actor.

    One of several for the same folder works and the others wait for its end, which a lock of the folder sees to.

    Args:
        tracking_uri, experiment: as `Tracker` takes them.
        study_folder: by which the study is told from others; need not exist on this machine.
        own_disk: `compute.spool_folder`.
        secrets: what MLflow is opened with.
    """

    def __init__(
        self, tracking_uri: str, experiment: str, study_folder: str, own_disk: str, secrets: Secrets | None = None
    ) -> None:
        if secrets is not None:
            secrets.set()
        self.folder = spool_folder(study_folder, own_disk)
        self._address, self._experiment = tracking_uri, experiment
        self._tracker: Tracker | None = None
        self._decided = threading.Event()  # whether it is this one or another that sends what is here
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="node-tracker", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with self._only_one() as first:
            if first:
                self._tracker = Tracker(self._address, self._experiment, self.folder, self.folder / STATE_FILE)
                self._decided.set()
                self._tracker.run_loop(self._stop)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[bool]:
        """Wait until no other process sends what is in the folder; False: told to stop meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / _LOCK_FILE, "a") as file:
            while not self._stop.is_set():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._decided.set()
                    self._stop.wait(1.0)
                else:
                    yield True
                    return
            yield False

    def backlog(self) -> NodeBacklog | None:
        """What waits here; None: another process sends it."""
        if self._tracker is None:
            return None
        waiting = self._tracker.backlog()
        return NodeBacklog(place_of(self.folder), waiting.runs, waiting.bytes, waiting.last_error)

    def drain(self, timeout_s: float) -> NodeBacklog | None:
        """Send all that is spooled here, within the time; what is then left. None: another process sends it."""
        self._decided.wait(timeout_s)
        if self._tracker is None:
            return None
        self._tracker.drain(timeout_s)
        return self.backlog()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class NodeTrackers:
    """A tracker on every machine while a study runs; use it in a `with` statement, inside Ray's connection.

    At the end it waits until all is sent; `left` then says what is not.

    Args:
        tracker: of the driver, to whose store and experiment all is sent.
        study_folder: whose spools.
        own_disk: `compute.spool_folder`.
        patience_s: that the end may take.

    Raises:
        UserError: the store is a file, which other machines cannot write to.
    """

    def __init__(self, tracker: Tracker, study_folder: Path, own_disk: str, patience_s: float) -> None:
        self._tracker, self._study_folder, self._patience_s = tracker, study_folder, patience_s
        self._arguments = (tracker.tracking_uri, tracker.experiment, str(study_folder), own_disk)
        self._here: NodeTracker | None = None
        self._actors: dict[str, Any] = {}  # by Ray's id of the node
        self._known: dict[str, NodeBacklog] = {}  # as the last answers have it, by place
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="node-trackers", daemon=True)
        self.left: list[str] = []
        self._check_store()

    def _check_store(self) -> None:
        hosts = {node["NodeManagerHostname"] for node in _nodes()} - {socket.gethostname()}
        if hosts and self._tracker.tracking_uri.startswith("sqlite"):
            raise UserError(
                f"compute.spool_folder has every machine send its own runs, and {', '.join(sorted(hosts)[:3])} cannot "
                f"write to {shown_uri(self._tracker.tracking_uri)}, a file of this machine; name an MLflow server with "
                "tracking_uri, or leave compute.spool_folder out"
            )

    def __enter__(self) -> NodeTrackers:
        if not _in_ray():
            self._here = NodeTracker(*self._arguments)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._drain()
        self._take_over()
        if self._here is not None:
            self._here.stop()
        self._end_actors()

    def backlogs(self) -> list[NodeBacklog]:
        """What waits on each machine, as of some seconds ago."""
        return sorted(self._known.values(), key=lambda backlog: backlog.place)

    # ---- while the study runs ---------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        while not self._stop.is_set():
            # a cluster that is being shaken is looked at again in a moment; the study must not fail by its tracking
            with contextlib.suppress(Exception):
                self._start_missing()
                asked = time.time()
                self._learn(self._call("backlog", ANSWER_SECONDS), asked)
            self._stop.wait(LOOK_SECONDS)

    def _start_missing(self) -> None:
        if self._here is not None:
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = {node["NodeID"] for node in _nodes()}
        for node_id in self._actors.keys() - alive:
            del self._actors[node_id]
        for node_id in alive - self._actors.keys():
            self._actors[node_id] = (
                ray.remote(NodeTracker)
                .options(
                    num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=2,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                )
                .remote(*self._arguments, Secrets.of_this_process())
            )  # fmt: skip

    def _call(self, method: str, patience_s: float, *args: Any) -> list[NodeBacklog]:
        """The answers of the trackers that answer in time."""
        if self._here is not None:
            answer = getattr(self._here, method)(*args)
            return [] if answer is None else [answer]
        import ray

        calls = [getattr(actor, method).remote(*args) for actor in self._actors.values()]
        answers = []
        for reference in ray.wait(calls, num_returns=len(calls), timeout=patience_s)[0] if calls else []:
            with contextlib.suppress(ray.exceptions.RayError):
                answer = ray.get(reference)
                if answer is not None:
                    answers.append(answer)
        return answers

    def _learn(self, answers: list[NodeBacklog], asked: float) -> None:
        """Take in what has been answered; forget the lines kept for a machine that has sent all of them."""
        for answer in answers:
            self._known[answer.place] = answer
            if not answer.runs:
                for path in _kept(self._study_folder).get(answer.place, []):
                    if path.stat().st_mtime < asked:
                        path.unlink()

    # ---- at its end -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        asked, answers = time.time(), []
        if not _in_ray():  # its head was lost, and nobody answers
            self._actors.clear()
        with contextlib.suppress(Exception):
            self._start_missing()
            answers = self._call("drain", self._patience_s + ANSWER_SECONDS, self._patience_s)
        self._learn(answers, asked)
        answered = {answer.place for answer in answers}
        for backlog in self.backlogs():
            if backlog.runs:
                why = "its tracker does not answer" if backlog.place not in answered else backlog.last_error
                self.left.append(f"{backlog.bytes} bytes of {backlog.runs} runs on {backlog.place} ({why})")
        self._answered = answered

    def _take_over(self) -> None:
        """Have the driver's tracker send the lines kept for machines that are gone."""
        for place, paths in _kept(self._study_folder).items():
            if place in self._answered:
                continue  # that machine's tracker has them, and two must not send the same
            for path in paths:
                with RunSpool(self._study_folder / "spool", path.name.removesuffix(SUFFIX)) as spool:
                    spool.take_in(path.read_text())
                path.unlink()

    def _end_actors(self) -> None:
        if not self._actors:
            return
        import ray

        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors.clear()


def keep_unsent(study_folder: Path, place: str, lines: Mapping[str, str]) -> None:
    """Keep what runs of an ended pack had logged on a machine and not sent, should the machine die before it does.

    Args:
        place: as `place_of` has it.
        lines: by run key.
    """
    folder = study_folder / UNSENT_FOLDER / _folder_name(place)
    for run_key, text in lines.items():
        if text:
            with RunSpool(folder, run_key) as spool:
                spool.take_in(text)
    if folder.exists():
        (folder / "place").write_text(place)


def _kept(study_folder: Path) -> dict[str, list[Path]]:
    """The files that `keep_unsent` has written, by place."""
    return {
        file.read_text(): sorted(file.parent.glob(f"*{SUFFIX}"))
        for file in (study_folder / UNSENT_FOLDER).glob("*/place")
    }


def _folder_name(place: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in place)


def unsent_lines(spools: Mapping[str, RunSpool]) -> dict[str, str]:
    """What some runs of a folder have logged and its tracker has not sent, by run key."""
    offsets: dict[str, int] = {}
    for spool in spools.values():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((spool.path.parent / STATE_FILE).read_bytes())
            offsets = {key: int(run["offset"]) for key, run in state["runs"].items()}
        break
    return {key: spool.unsent(offsets.get(spool.run_key, 0)) for key, spool in spools.items()}


def _in_ray() -> bool:
    import ray

    return bool(ray.is_initialized())


def _nodes() -> list[dict[str, Any]]:
    """Ray's nodes that learners can be on."""
    if not _in_ray():
        return []
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
