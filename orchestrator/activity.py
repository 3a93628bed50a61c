"""What a driver's packs are doing: where, how fast, and how often they had to be taken up again."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.learner import PackReport, PackSpec

EVENTS = 20  # of the latest restarts and failures that are kept


@dataclass
class PackActivity:
    """A pack under way."""

    pack: str
    runs: int
    trials: list[int]
    planned: int  # updates of each run
    since: float = field(default_factory=time.time)  # seconds since 1970
    node: str = ""  # host; empty until it has reported
    updates: int = 0  # of each run, as reported last
    updates_per_second: float = 0.0  # of all its runs, over the last report's stretch
    steps_per_second: float = 0.0  # transitions that rollouts, pools and environments gave, likewise
    restarts: int = 0


@dataclass
class Activity:
    """The packs under way, and what went wrong."""

    packs: dict[str, PackActivity] = field(default_factory=dict)
    restarts: int = 0  # of packs, after a process or a machine died
    failed: int = 0  # packs
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=EVENTS))

    def began(self, pack: PackSpec, planned: int) -> None:
        """A slot has been given the pack, to begin it or to go on with it."""
        trials = sorted({run.trial for run in pack.runs})
        self.packs.setdefault(pack.pack_id, PackActivity(pack.pack_id, len(pack.runs), trials, planned))

    def reported(self, report: PackReport) -> None:
        if report.trouble:
            self._note("checkpoint", report.pack_id, report.trouble)
        known = self.packs.get(report.pack_id)
        if known is None:
            return
        if report.finished:
            del self.packs[report.pack_id]
            return
        known.node, known.updates = report.node, report.updates
        known.updates_per_second, known.steps_per_second = report.updates_per_second, report.steps_per_second

    def restarted(self, pack_id: str, reason: object) -> None:
        """The pack is taken up again from its checkpoint."""
        self.restarts += 1
        if pack_id in self.packs:
            self.packs[pack_id].restarts += 1
        self._note("restart", pack_id, reason)

    def gave_up(self, pack_id: str, reason: object) -> None:
        self.failed += 1
        self._note("failure", pack_id, reason)
        self.packs.pop(pack_id, None)

    def divided(self, pack_id: str) -> None:
        """Smaller packs have taken the pack's place."""
        self.packs.pop(pack_id, None)

    def _note(self, kind: str, pack_id: str, reason: object) -> None:
        node = self.packs[pack_id].node if pack_id in self.packs else ""
        text = next((line.strip() for line in str(reason).splitlines() if line.strip()), type(reason).__name__)
        self.events.append({"time": time.time(), "kind": kind, "pack": pack_id, "node": node, "reason": text[:300]})

    def to_json(self) -> dict[str, Any]:
        packs = sorted(self.packs.values(), key=lambda pack: pack.pack)
        return {
            "packs": [asdict(pack) for pack in packs],
            "updates_per_second": sum(pack.updates_per_second for pack in packs),
            "steps_per_second": sum(pack.steps_per_second for pack in packs),
            "restarts": self.restarts,
            "failed_packs": self.failed,
            "events": list(self.events),
        }
