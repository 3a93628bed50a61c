"""Slots whose learner is gone: when to ask whether it is back, where its pack goes meanwhile, and when to give up.

While Ray looks for a machine for an actor whose process or node died, every call to it fails after a second or two,
with the same error as a call whose process dies under it. So a slot is first asked whether anybody is there, again and
again with longer pauses, and gets a pack only then: what fails after that is a death of a process that had the pack.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import UserError
from orchestrator.artifacts import write_text
from orchestrator.config import ComputeConfig
from orchestrator.workers import WorkersAway

if TYPE_CHECKING:
    from orchestrator.learner import PackSpec

FIRST_SECONDS = 0.5  # until a slot is asked for the first time; doubled every time
LONGEST_SECONDS = 30.0
# After which another slot may take the pack. Until then a process that is only cut off may still train it: Ray takes a
# node for dead after 25 s at most (health_check_period_ms x health_check_failure_threshold, and the time of a check),
# and what runs on a node that is cut off ends likewise.
MOVE_SECONDS = 60.0
BEGUN_FILE = "begun.json"


@dataclass
class Absence:
    """A slot that does not answer."""

    since: float  # of the driver's clock, as are all moments here
    next_at: float  # when to ask again
    pack: PackSpec | None = None  # goes on here, unless that takes too long
    asking: bool = False
    asked: int = 0

    def failed(self, now: float) -> None:
        """Nobody has answered."""
        self.asking, self.asked = False, self.asked + 1
        self.next_at = now + min(FIRST_SECONDS * 2**self.asked, LONGEST_SECONDS)


@dataclass
class Deaths:
    """Of processes that had a pack, while it made no progress."""

    count: int = 0
    epoch: int | None = None  # from which the process that died last had gone on

    def add(self, epoch: int | None) -> None:
        """One more; only this one counts if a checkpoint was written since the one before."""
        self.count = self.count + 1 if epoch == self.epoch else 1
        self.epoch = epoch


def note_begun(folder: Path, epoch: int) -> None:
    """Keep, in a pack's folder, from which epoch a process goes on with the pack."""
    write_text(folder / BEGUN_FILE, json.dumps({"epoch": epoch}))


def begun_from(folder: Path) -> int | None:
    """The epoch from which the latest process went on; None: none has come as far as that."""
    try:
        return int(json.loads((folder / BEGUN_FILE).read_text())["epoch"])
    except FileNotFoundError:
        return None


def nowhere_to_run(compute: ComputeConfig, learners: int, study: str) -> UserError:
    """Why a study stops whose learners have had no machine for too long."""
    each = 1 + compute.num_rollout_workers + compute.num_evaluators
    return UserError(
        f"none of the {learners} learners has answered for {compute.patience_minutes:g} minutes; each needs {each} "
        f"CPUs{' and its share of a GPU' if compute.device != 'cpu' else ''}, and the Ray cluster has {_offered()}. "
        f"Nothing is lost: bring machines back and continue with `offsweep resume {study}` (compute.patience_minutes "
        "says how long to wait for them)"
    )


def _offered() -> str:
    import ray

    if not ray.is_initialized():
        return "ended"
    there, free = ray.cluster_resources(), ray.available_resources()
    return " and ".join(f"{there.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))


def died(result: Any) -> bool:
    """Whether a call ended because its process did, or was not there."""
    if not isinstance(result, BaseException):
        return False
    from ray.exceptions import RayActorError

    return isinstance(result, RayActorError | WorkersAway)


def cannot_start(result: Any) -> bool:
    """Whether an actor failed in its constructor: Ray does not try that again."""
    return bool(getattr(result, "actor_init_failed", False))
