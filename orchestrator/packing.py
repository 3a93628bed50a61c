"""Which runs share a pack: pack sizes that end soonest on the slots at hand and never need more memory than one has.

The choice is a pure function of costs by pack size, which `orchestrator.calibration` measures; `Packing` keeps what was
chosen for a study, so that it is the same after a resume.
"""

from __future__ import annotations

import heapq
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.artifacts import save_json
from orchestrator.config import Config
from orchestrator.learner import PackCost, PackSpec

PACKING_FILE = "packing.json"  # of a study's folder: how its packs were chosen
COSTS_FILE = "plan.jsonl"  # what they were predicted to take, and took: a line each

MAX_SIZE = 256  # members; beyond it a larger pack was nowhere measured to pay
SAME = 0.03  # relative difference of times that is not worth a larger pack: measurements are no better


@dataclass(frozen=True)
class Curve:
    """A cost by pack size, or by work: straight lines between what was measured, beyond it the slope of the fit
    fixed + per_member * M, below it proportional.

    Args:
        points: (size, cost), at least one, by size.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.points or list(self.points) != sorted(self.points):
            raise ValueError(f"a curve needs points in the order of their sizes, not {self.points}")

    def fit(self) -> tuple[float, float]:
        """(fixed, per_member) by least squares, neither below 0; a single point counts as all per member."""
        n = len(self.points)
        if n == 1:
            return 0.0, self.points[0][1] / self.points[0][0]
        mean_x, mean_y = (sum(p[i] for p in self.points) / n for i in (0, 1))
        variance = sum((x - mean_x) ** 2 for x, _ in self.points)
        slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in self.points) / variance)
        fixed = mean_y - slope * mean_x
        if fixed < 0:  # through the origin instead
            return 0.0, sum(x * y for x, y in self.points) / sum(x * x for x, _ in self.points)
        return fixed, slope

    def __call__(self, size: float) -> float:
        _, per_member = self.fit()
        (first, first_cost), (last, last_cost) = self.points[0], self.points[-1]
        if size >= last:
            return last_cost + per_member * (size - last)
        if size <= first:
            return first_cost * size / first
        for (x0, y0), (x1, y1) in zip(self.points, self.points[1:], strict=False):
            if size <= x1:
                return y0 + (y1 - y0) * (size - x0) / (x1 - x0)
        raise AssertionError(size)


@dataclass(frozen=True)
class PackModel:
    """What packs of one key cost.

    Attributes:
        seconds: of a whole pack, from its start to its end.
        memory: bytes at its peak.
        measured: largest size that was measured; 0: estimated from another key's.
    """

    seconds: Curve
    memory: Curve
    measured: int = 0

    def largest(self, memory_limit: float) -> int:
        """The largest pack that fits; 0: not even a run alone."""
        low, high = 0, MAX_SIZE
        while low < high:  # memory grows with the size
            middle = (low + high + 1) // 2
            if self.memory(middle) <= memory_limit:
                low = middle
            else:
                high = middle - 1
        return low


def balanced(count: int, limit: int) -> list[int]:
    """Sizes of as few packs of at most `limit` as hold `count` runs, as even as they can be, larger ones first."""
    packs = -(-count // limit)
    return [count // packs + (i < count % packs) for i in range(packs)]


def schedule(seconds: Sequence[float], slots: int) -> float:
    """When the last pack ends, if each goes to the slot that is free first, in the order given."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heappushpop(ends, ends[0] + duration)
    return max(ends)


def pack_runs(
    keys: Sequence[str], models: Mapping[str, PackModel], slots: int, memory_limit: float
) -> list[tuple[int, ...]]:
    """Group runs that are all known beforehand into packs, so that the last one ends as early as possible.

    For each key the sizes are tried that divide its runs evenly, one key at a time until no change helps; of sizes that
    end at the same time (within 3 %) the smallest are taken.

    Args:
        keys: pack key of every run.
        models: by pack key.
        slots: packs trained at once.
        memory_limit: bytes of one slot.

    Returns:
        Packs as positions in `keys`, in the order in which to start them: longest first.

    Raises:
        ValueError: a run does not fit alone.
    """
    groups: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    limits = {key: min(models[key].largest(memory_limit), len(members)) for key, members in groups.items()}
    for key, limit in limits.items():
        if limit < 1:
            raise ValueError(f"a run of pack key {key} needs more than {memory_limit:.3g} bytes")

    def end(sizes: Mapping[str, int]) -> float:
        durations = [models[k].seconds(n) for k, limit in sizes.items() for n in balanced(len(groups[k]), limit)]
        return schedule(sorted(durations, reverse=True), slots)

    chosen = dict.fromkeys(groups, 1)
    best = end(chosen)
    changed = True
    while changed:
        changed = False
        for key in groups:
            for size in candidate_sizes(len(groups[key]), limits[key]):
                time = end({**chosen, key: size})
                if time < best * (1 - SAME):
                    best, chosen[key], changed = time, size, True
    packs: list[tuple[float, tuple[int, ...]]] = []
    for key, members in groups.items():
        start = 0
        for size in balanced(len(members), chosen[key]):
            packs.append((models[key].seconds(size), tuple(members[start : start + size])))
            start += size
    return [members for _, members in sorted(packs, key=lambda pack: (-pack[0], pack[1]))]


def candidate_sizes(count: int, limit: int) -> list[int]:
    """Largest sizes of the even divisions of `count` runs into packs of at most `limit`."""
    return sorted({balanced(count, size)[0] for size in range(1, max(1, min(count, limit)) + 1)})


def study_packs(
    trials: Sequence[Sequence[str]], runs_per_pack: int, limits: Mapping[str, int]
) -> list[tuple[str, int]]:
    """The packs that a study's driver makes: (pack key, size) in the order in which they start.

    Args:
        trials: pack key of every run, by trial, in the order in which they are asked for.
        runs_per_pack: as many trials are asked for at once as fill a pack; those of their runs that have one key share
            packs.
        limits: largest size by key, where memory allows no more.
    """
    packs: list[tuple[str, int]] = []
    at_once = trials_at_once(runs_per_pack, len(trials[0]) if trials else 1)
    for start in range(0, len(trials), at_once):
        counts: dict[str, int] = {}
        for trial in trials[start : start + at_once]:
            for key in trial:
                counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            packs += [(key, size) for size in balanced(count, min(runs_per_pack, limits.get(key, runs_per_pack)))]
    return packs


def trials_at_once(runs_per_pack: int, num_seeds: int) -> int:
    """How many trials fill a pack."""
    return max(1, runs_per_pack // num_seeds)


def choose_runs_per_pack(
    trials: Sequence[Sequence[str]],
    models: Mapping[str, PackModel],
    slots: int,
    memory_limit: float,
    min_rounds: int = 1,
) -> int:
    """The pack size with which a study ends soonest; of sizes that are equal within 3 % the smallest.

    Args:
        trials: pack key of every run, by trial; every trial has as many.
        models: by pack key.
        slots: packs trained at once.
        memory_limit: bytes of one slot.
        min_rounds: the trials are asked for in at least so many rounds, since a sampler learns from one round for the
            next.

    Raises:
        ValueError: a run does not fit alone.
    """
    num_seeds = len(trials[0])
    limits = {key: model.largest(memory_limit) for key, model in models.items()}
    for key, limit in limits.items():
        if limit < 1:
            raise ValueError(f"a run of pack key {key} needs more than {memory_limit:.3g} bytes")
    most_trials = max(1, len(trials) // (slots * min_rounds))
    sizes = {*candidate_sizes(num_seeds, num_seeds), *(n * num_seeds for n in range(2, most_trials + 1))}
    chosen, best = 1, float("inf")
    for size in sorted(s for s in sizes if s <= max(limits.values())):
        packs = study_packs(trials, size, limits)
        time = schedule([models[key].seconds(members) for key, members in packs], slots)
        if time < best * (1 - SAME):
            chosen, best = size, time
    return chosen


# ---- what was chosen for a study ------------------------------------------------------------------------------------

ModelOf = Callable[[Config], PackModel | None]


class Packing:
    """The pack sizes of a study, kept in a file of its folder.

    Args:
        path: the file; None keeps nothing.
        runs_per_pack: the size chosen.
        reason: for it, in words.
        predicted_seconds: of the whole study, if it was predicted.
        limits: largest size by pack key: what memory allows, as predicted or after it ran out.
        model_of: costs of a configuration's packs, None where nothing is known of it.
        memory_limit: bytes of a slot.
    """

    def __init__(
        self,
        path: Path | None,
        runs_per_pack: int,
        reason: str = "as configured",
        predicted_seconds: float | None = None,
        limits: Mapping[str, int] | None = None,
        model_of: ModelOf = lambda config: None,
        memory_limit: float = math.inf,
    ) -> None:
        self.path, self.runs_per_pack, self.reason = path, runs_per_pack, reason
        self.predicted_seconds = predicted_seconds
        self._limits = dict(limits or {})
        self._model_of, self._memory_limit = model_of, memory_limit

    @classmethod
    def load(cls, path: Path, model_of: ModelOf, memory_limit: float) -> Packing:
        """What was chosen when the study began."""
        content = json.loads(path.read_text())
        return cls(path, **content, model_of=model_of, memory_limit=memory_limit)

    def save(self) -> None:
        if self.path is not None:
            content: dict[str, Any] = {
                "runs_per_pack": self.runs_per_pack, "reason": self.reason,
                "predicted_seconds": self.predicted_seconds, "limits": self._limits,
            }  # fmt: skip
            save_json(self.path, content)

    def limit(self, key: str, config: Config) -> int:
        """The largest pack of a key; `config` is of one of its runs."""
        if key not in self._limits:
            model = self._model_of(config)
            if model is not None and math.isfinite(self._memory_limit):
                # a run that is predicted not to fit even alone is tried alone
                self._limits[key] = max(1, min(self.runs_per_pack, model.largest(self._memory_limit)))
                self.save()
        return min(self.runs_per_pack, self._limits.get(key, self.runs_per_pack))

    def exceeds(self, key: str, size: int) -> bool:
        """Whether memory is known not to hold a pack of this size."""
        return size > self._limits.get(key, size)

    def lower(self, key: str, size: int) -> None:
        """From now on no pack of this key is larger: memory ran out."""
        self._limits[key] = min(size, self._limits.get(key, size))
        self.save()

    def predict(self, config: Config, size: int) -> tuple[float, float] | None:
        """Seconds and bytes of a pack."""
        model = self._model_of(config)
        return None if model is None else (model.seconds(size), model.memory(size))


class PackCosts:
    """Predicted beside actual, of the packs that one process trained from beginning to end with all their runs.

    Args:
        path: the file they are kept in; only ever appended to, so that a study's packs cost the same first and last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, pack: PackSpec, cost: PackCost, predicted: tuple[float, float] | None) -> None:
        """Keep what a pack took."""
        seconds, memory = predicted or (None, None)
        line = json.dumps({
            "pack": pack.pack_id, "key": pack.key, "runs": len(pack.runs), "predicted_seconds": seconds,
            "actual_seconds": cost.seconds, "actual_cpu_seconds": cost.cpu_seconds,
            "predicted_bytes": memory, "actual_bytes": cost.memory,
        })  # fmt: skip
        with self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"", b"\n")  # by a driver that was killed
            file.write(b"\n" * torn + line.encode() + b"\n")


def pack_costs(path: Path) -> list[dict[str, Any]]:
    """What `PackCosts` has kept in a file, each pack once, as it was said last."""
    costs: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            cost = json.loads(line)
        except ValueError:  # torn
            continue
        costs[cost["pack"]] = cost
    return list(costs.values())
