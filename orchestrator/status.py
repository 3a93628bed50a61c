"""How studies stand: `status.json`, which the driver of a study writes every few seconds, and `offsweep status`, which
reads it.

Reading needs the work folder only, neither Ray nor MLflow nor torch, and takes no longer with many trials. A study from
before this file was written is read from its journal.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from envs.errors import UserError
from envs.files import write_atomically
from orchestrator.reading import driver_state, duration
from sweeps.confirm import FOLDER as CONFIRM_FOLDER
from sweeps.study import SPEC_FILE, Study
from sweeps.summary import failures, state_counts

if TYPE_CHECKING:
    from orchestrator.driver import Progress
    from orchestrator.node_tracking import NodeBacklog
    from orchestrator.tracking import Backlog

STATUS_FILE = "status.json"
WRITE_SECONDS = 2.0  # between two versions of it, or more where writing takes long
WRITE_SHARE = 0.01  # of the driver's time, at most
FRESH_SECONDS = 60.0  # a file written within this time is of a driver at work, wherever that is
_SHOWN_PACKS = 20


class StatusFile:
    """Writes a study's `status.json`; called with the driver's progress whenever something happens.

    Args:
        folder: of the study.
        backlog: what waits for MLflow here.
        nodes: the same on machines with trackers of their own.
        dashboard: Ray's, as a URL.
    """

    def __init__(
        self,
        folder: Path,
        backlog: Callable[[], Backlog],
        nodes: Callable[[], Sequence[NodeBacklog]] = lambda: (),
        dashboard: str | None = None,
    ) -> None:
        self._folder, self._backlog, self._nodes, self._dashboard = folder, backlog, nodes, dashboard
        self.latest: dict[str, Any] | None = None  # what was written last
        self._next = 0.0
        self._began = time.time()
        self._told: tuple[int, dict[str, int], dict[str, list[int]]] | None = None

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() >= self._next:
            self.write(progress)

    def write(self, progress: Progress, finished: bool = False) -> None:
        """Write it now.

        Args:
            finished: whether the driver has come to the study's end.
        """
        started = time.monotonic()
        self.latest = self._content(progress, finished)
        content = json.dumps(self.latest, separators=(",", ":"))
        with contextlib.suppress(OSError):  # a full disk is for those to report who lose something by it
            write_atomically(self._folder / STATUS_FILE, lambda path: path.write_text(content))
        now = time.monotonic()
        self._next = now + max(WRITE_SECONDS, (now - started) / WRITE_SHARE)

    def _content(self, progress: Progress, finished: bool) -> dict[str, Any]:
        spec, ended = progress.study.spec, progress.study.num_finished
        if self._told is None or self._told[0] != ended or finished:  # going through all trials takes its time
            records = progress.study.trials()
            self._told = ended, state_counts(records), failures(records)
        done, planned = progress.updates_done(), max(1, progress.updates_planned())
        backlog = self._backlog()
        return {
            "name": spec.name,
            "time": time.time(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": self._began,
            "finished": finished,
            "num_trials": spec.num_trials,
            "ended": ended,
            "counts": self._told[1],
            "share_done": min(1.0, done / planned),
            "seconds_left": 0.0 if finished else progress.seconds_left(),
            "building": progress.stage,
            **progress.activity.to_json(),
            "failures": self._told[2],
            "tracking": asdict(backlog),
            "nodes": [asdict(node) for node in self._nodes()],
            "dashboard": self._dashboard,
        }


def note_backlog(folder: Path, backlog: Backlog) -> None:
    """Say what is left to be sent, where a driver has come to its end and its tracker has done what it could."""
    status = _read(folder / STATUS_FILE)
    if status is not None:
        content = json.dumps({**status, "tracking": asdict(backlog)}, separators=(",", ":"))
        with contextlib.suppress(OSError):
            write_atomically(folder / STATUS_FILE, lambda path: path.write_text(content))


def read_status(folder: Path) -> dict[str, Any]:
    """How the study of a folder stands, as plain values; times in seconds, moments since 1970.

    `state` is running, confirming, finished, stopped, or `last driven by ...` where another machine's driver has been
    silent for a minute. What it leaves unsaid, such as throughput, is None in a study from before it was written.
    """
    status = _read(folder / STATUS_FILE)
    confirm = _read(folder / CONFIRM_FOLDER / STATUS_FILE)
    if status is None:
        return _from_journal(folder)
    ended = status["ended"] >= status["num_trials"]
    latest = status if confirm is None else max(status, confirm, key=lambda s: float(s["time"]))
    if ended and latest["finished"] and not _confirm_left(folder, confirm):
        state = "finished"
    else:
        state = driver_state(folder)
        if state.startswith("last driven") and time.time() - latest["time"] < FRESH_SECONDS:
            state = "running"
        if state == "running" and ended and confirm is not None:
            state = "confirming"
    if state not in ("running", "confirming"):  # nothing is under way, whatever was when it stopped
        for one in (status, confirm):
            if one is not None:
                one |= {"updates_per_second": 0.0, "steps_per_second": 0.0, "building": None}
    return {"state": state, **status, "confirm": confirm}


def _confirm_left(folder: Path, confirm: dict[str, Any] | None) -> bool:
    if (folder / CONFIRM_FOLDER / SPEC_FILE).exists():
        return confirm is None or not confirm["finished"]
    return False


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return found


def _from_journal(folder: Path) -> dict[str, Any]:
    study = Study.open(folder, read_only=True)
    records = study.trials()
    ended = sum(record.finished is not None for record in records)
    unknown = dict.fromkeys((
        "time", "host", "process", "began", "share_done", "seconds_left", "building", "packs", "updates_per_second",
        "steps_per_second", "restarts", "failed_packs", "events", "tracking", "nodes", "dashboard", "confirm",
    ))  # fmt: skip
    finished = ended >= study.spec.num_trials
    return {
        "state": "finished" if finished else driver_state(folder),
        "name": study.spec.name,
        "finished": finished,
        "num_trials": study.spec.num_trials,
        "ended": ended,
        "counts": state_counts(records),
        "failures": failures(records),
        **unknown,
    }


def show_status(
    workdir: Path, console: Console, name: str | None = None, as_json: bool = False, prometheus: bool = False
) -> None:
    """Print how one study stands, or all of a work folder.

    Args:
        name: of the study; None: all.
        as_json: for machines: one object, or a list of them.
        prometheus: in Prometheus' text format.

    Raises:
        UserError: there is no such study.
    """
    root = workdir.absolute() / "studies"
    known = sorted(path.parent.name for path in root.glob(f"*/{SPEC_FILE}"))
    if name is not None and name not in known:
        raise UserError(f"there is no study {name!r} in {root}; it holds: {', '.join(known) or 'none'}")
    found = [read_status(root / one) for one in ([name] if name is not None else known)]
    if prometheus:
        from orchestrator.prometheus import text_of

        console.file.write(text_of(found))
    elif as_json:
        console.file.write(json.dumps(found[0] if name is not None else found, indent=1) + "\n")
    elif name is not None:
        print_status(console, found[0])
    elif not found:
        console.print(f"there is no study in {root}", highlight=False, soft_wrap=True)
    else:
        console.print(_overview(found))


def watch_status(workdir: Path, console: Console, name: str | None, seconds: float) -> None:
    """Print it anew every so many seconds, until it is interrupted."""
    while True:
        if console.is_terminal:
            console.clear()
        show_status(workdir, console, name)
        console.print(time.strftime("%H:%M:%S"), highlight=False)
        time.sleep(seconds)


def _overview(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    words, numbers = ("study", "state"), ("trials", "done", "left", "packs", "updates/s", "steps/s", "restarts")
    for column in (*words, *numbers, "to MLflow"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for status in found:
        active = _active(status)
        table.add_row(
            status["name"], status["state"], f"{status['ended']}/{status['num_trials']}",
            "" if active["share_done"] is None else f"{active['share_done']:.0%}", _left(status),
            str(len(active["packs"])) if _under_way(status) and active["packs"] is not None else "",
            _rate(status, "updates_per_second"), _rate(status, "steps_per_second"),
            "" if active["restarts"] is None else str(active["restarts"]), _waiting(active),
        )  # fmt: skip
    return table


def print_status(console: Console, status: dict[str, Any]) -> None:
    """One study: state, throughput, packs, failures, tracking."""
    active, running = _active(status), _under_way(status)
    counts = ", ".join(f"{count} {state}" for state, count in status["counts"].items())
    where = f" (process {active['process']} on {active['host']})" if running and active["host"] else ""
    _say(console, "study", f"{status['name']}: {status['state']}{where}")
    _say(console, "trials", f"{status['ended']} of {status['num_trials']} ended{f' ({counts})' if counts else ''}")
    if active["share_done"] is not None:
        left = f", {_left(status)} left" if running else ""
        _say(console, "updates", f"{active['share_done']:.0%} of all that are planned{left}")
    if active["time"] is not None:
        _say(console, "as of", f"{duration(time.time() - active['time'])} ago")
    if active["building"]:
        _say(console, "building", str(active["building"]))
    if running and active["packs"] is not None:
        _say(
            console, "throughput",
            f"{_rate(status, 'updates_per_second')} updates/s and {_rate(status, 'steps_per_second')} steps/s in "
            f"{len(active['packs'])} packs",
        )  # fmt: skip
        if active["packs"]:
            console.print(_packs(active["packs"][:_SHOWN_PACKS]))
        if len(active["packs"]) > _SHOWN_PACKS:
            console.print(f"and {len(active['packs']) - _SHOWN_PACKS} more; --json has all", highlight=False)
    _print_troubles(console, status, active)
    if active["tracking"] is not None:
        _say(console, "to MLflow", _waiting(active))
        for node in active["nodes"]:
            error = f"; {node['last_error']}" if node["last_error"] else ""
            _say(console, "", f"{node['place']}: {node['bytes']:,} bytes of {node['runs']} runs wait{error}")
    if running and active["dashboard"]:
        _say(console, "dashboard", active["dashboard"])


def _packs(packs: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("pack", "node", "runs", "updates", "updates/s", "steps/s", "restarts", "for"):
        table.add_column(column, justify="left" if column in ("pack", "node") else "right")
    for pack in packs:
        table.add_row(
            pack["pack"], pack["node"] or "begins", str(pack["runs"]), f"{pack['updates']:,}/{pack['planned']:,}",
            f"{pack['updates_per_second']:,.0f}", f"{pack['steps_per_second']:,.0f}", str(pack["restarts"]),
            duration(time.time() - pack["since"]),
        )  # fmt: skip
    return table


def _print_troubles(console: Console, status: dict[str, Any], active: dict[str, Any]) -> None:
    if active["events"]:
        _say(console, "restarts", f"{active['restarts']} of packs, {active['failed_packs']} packs failed")
        for event in active["events"][-5:]:
            node = f" on {event['node']}" if event["node"] else ""
            ago = duration(time.time() - event["time"])
            _say(console, "", f"{ago} ago, {event['kind']} of {event['pack']}{node}: {event['reason']}")
    for reason, numbers in list(status["failures"].items())[:5]:
        _say(console, "failed", f"{len(numbers)} trials, such as {numbers[0]}: {reason}")


def _active(status: dict[str, Any]) -> dict[str, Any]:
    """What is under way: the confirm stage once it has begun."""
    return status["confirm"] or status


def _under_way(status: dict[str, Any]) -> bool:
    return status["state"] in ("running", "confirming")


def _left(status: dict[str, Any]) -> str:
    if not _under_way(status):
        return ""
    seconds = _active(status)["seconds_left"]
    return "?" if seconds is None else duration(seconds)


def _rate(status: dict[str, Any], name: str) -> str:
    value = _active(status)[name]
    return "" if value is None or not _under_way(status) else f"{value:,.0f}"


def _waiting(active: dict[str, Any]) -> str:
    if active["tracking"] is None:
        return ""
    waiting = [active["tracking"], *active["nodes"]]
    total, runs = sum(one["bytes"] for one in waiting), sum(one["runs"] for one in waiting)
    error = next((one["last_error"] for one in waiting if one["last_error"]), None)
    if not runs:
        return "all sent" if error is None else f"all sent; {error}"
    return f"{total:,} bytes of {runs} runs wait{f': {error[:200]}' if error else ''}"


def _say(console: Console, label: str, text: str) -> None:
    console.print(f"{f'{label}:' if label else '':<12}{text}", highlight=False, markup=False, soft_wrap=True)
