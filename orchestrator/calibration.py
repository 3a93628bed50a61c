"""What packs cost on the machine at hand: short measurements of the real method with the real data.

`measure` runs in the process of a slot: it builds packs of growing size, fills their rings, and times some updates, a
shard of rollouts, an episode, a checkpoint, and an epoch of every stage. `Calibrations` keeps what was measured in the
work folder, under the kind of machine and all that changes the work of an update, so that it is measured once.

Sizes are in bytes. Times are measured with as many slots at work as a study uses: on a CPU, with one thread a process,
as processor time, which other programs disturb least; elsewhere by the wall clock.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.chunk import own_noise_updates
from agents.cpu import cpu_name
from agents.cross_domain import CrossDomain, CrossDomainConfig
from agents.method import Method, RolloutJob, RolloutResult, Stage, TrainingData, common_settings, load_method
from agents.policies import in_environment
from agents.replay import Replay
from agents.synthetic import SyntheticConfig
from envs.dataset import Dataset
from envs.episodes import make_env, run_episodes
from envs.errors import UserError
from envs.policies import NetworkPolicy
from orchestrator import memory
from orchestrator.artifacts import ArtifactStore, save_json, stage_key
from orchestrator.checkpoints import Checkpoints
from orchestrator.config import ComputeConfig, Config
from orchestrator.hashing import digest
from orchestrator.learner import action_bounds, evaluation_env, resolve_device, training_data
from orchestrator.packing import SAME, Curve, PackModel
from orchestrator.workers import Workers

VERSION = 1
SCHEDULE_FIELDS = ("num_updates", "updates_per_epoch")  # of a method: how often, not how much
STAND_IN_ROWS = 5_000  # of the dataset, for an epoch of a stage that is not there yet
STAND_IN_UPDATES = 20  # of a stage that is counted in updates
RING_FILL_BYTES = 256 << 20  # of model rows written while measuring; what a ring takes beyond is added
UPDATES_AT_ONCE = 100  # of a measurement, at most: the metrics' rhythm
NOISES = 2  # standard normal draws (M, B, A) that an update is taken to need, in the estimate of a chunk's memory


@dataclass(frozen=True)
class PackMeasurement:
    """A pack of one size."""

    size: int
    setup_seconds: float  # until the first epoch
    rollout_seconds: float  # of an epoch that begins with rollouts, all members
    update_seconds: float  # one update of all members, with the drawing of its random numbers
    memory: int  # peak growth of the process, rings full


@dataclass(frozen=True)
class StageMeasurement:
    """A stage that runs need."""

    epoch_seconds: float  # with all rows; of one update, where it is these that the stage's settings count


@dataclass(frozen=True)
class Calibration:
    """What was measured for runs with one kind of work."""

    key: str
    method: str
    work: float  # as `update_work` counts it
    ring: int  # as `ring_bytes` counts it
    packs: tuple[PackMeasurement, ...]
    step_seconds: float  # of a step of one episode in the environment, the policy included
    save_seconds: float  # of a checkpoint, per member, rings full
    stages: Mapping[str, StageMeasurement] = field(default_factory=dict)
    spent: float = 0.0
    asked: int = 1  # the largest size that was to be measured; what is missing did not fit, or did not pay

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Calibration:
        packs = tuple(PackMeasurement(**pack) for pack in content["packs"])
        stages = {name: StageMeasurement(**stage) for name, stage in content["stages"].items()}
        return cls(**{**content, "packs": packs, "stages": stages})

    def merged(self, other: Calibration) -> Calibration:
        """Both; where both measured the same the times of `other`, and the larger memory."""
        packs = {pack.size: pack for pack in self.packs}
        for pack in other.packs:
            before = packs.get(pack.size, pack).memory
            packs[pack.size] = dataclasses.replace(pack, memory=max(before, pack.memory))
        stages = {**self.stages, **other.stages}
        ordered = tuple(packs[size] for size in sorted(packs))
        asked, spent = max(self.asked, other.asked), self.spent + other.spent
        return dataclasses.replace(other, packs=ordered, stages=stages, spent=spent, asked=asked)


def median_of(calibrations: Sequence[Calibration]) -> Calibration:
    """The same measured in several slots at once."""
    sizes = set.intersection(*({pack.size for pack in c.packs} for c in calibrations))
    packs = []
    for size in sorted(sizes):
        same = [next(pack for pack in c.packs if pack.size == size) for c in calibrations]
        values = {
            name: statistics.median(getattr(pack, name) for pack in same)
            for name in ("setup_seconds", "rollout_seconds", "update_seconds")
        }
        packs.append(PackMeasurement(size=size, memory=max(pack.memory for pack in same), **values))
    first = calibrations[0]
    stages = {
        name: StageMeasurement(statistics.median(c.stages[name].epoch_seconds for c in calibrations))
        for name in first.stages
    }
    return dataclasses.replace(
        first, packs=tuple(packs), stages=stages,
        step_seconds=statistics.median(c.step_seconds for c in calibrations),
        save_seconds=statistics.median(c.save_seconds for c in calibrations),
        spent=max(c.spent for c in calibrations),
    )  # fmt: skip


# ---- what is measured under one key ---------------------------------------------------------------------------------


def work_key(config: Config, dataset: Dataset) -> str:
    """Runs with equal keys have equal work per update, rollout phase, step and stage epoch."""
    schedule = () if isinstance(config.method, CrossDomainConfig) else SCHEDULE_FIELDS  # its rings depend on them
    common = {name: value for name, value in common_settings(config.method).items() if name not in schedule}
    shape = [dataset.num_transitions, dataset.observation_dim, dataset.action_dim]
    workers = [config.compute.num_rollout_workers, config.compute.num_evaluators]
    return digest([VERSION, config.method_name, common, shape, evaluation_env(config, dataset), workers])


def machine_kind(compute: ComputeConfig, busy: int) -> dict[str, Any]:
    """What the times of this process depend on; `busy` slots are at work at once."""
    device = resolve_device(compute.device)
    kind = {
        "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "device": device.type, "busy": busy,
        "torch": torch.__version__, "threads": compute.threads,
    }  # fmt: skip
    if device.type == "cuda":
        kind["gpu"] = torch.cuda.get_device_name(device)
    return kind


def update_work(config: Config, dataset: Dataset) -> float:
    """Multiply-adds of the networks in an update, up to a factor that methods of one name share: what times of shapes
    that were not measured are scaled by."""
    method = config.method
    hidden = list(getattr(method, "hidden", [256, 256]))
    s, a = dataset.observation_dim, dataset.action_dim

    def size(widths: Sequence[int]) -> int:
        return sum(n_in * n_out for n_in, n_out in pairwise(widths))

    networks = getattr(method, "num_critics", 2) * size([s + a, *hidden, 1]) + size([s, *hidden, 2 * a])
    rows = getattr(method, "batch_rows", getattr(method, "batch_size", 256))
    # a row of which the networks' values are only looked at costs a third of one that they learn from
    looked_at = method.own_noises(s, a) / (s + a) / 3
    return float((rows + looked_at) * networks)


def ring_bytes(config: Config, dataset: Dataset) -> int:
    """Of a member's model rows, once the ring is full."""
    names = ("rollout_batch", "rollout_length", "rollout_epochs_retained")
    if isinstance(config.method, CrossDomainConfig):
        rows = config.method.domain_rows(dataset.num_transitions == 0)
    else:
        rows = math.prod(getattr(config.method, name, 0) for name in names) + getattr(config.method, "ring_rows", 0)
    return rows * (4 * (2 * dataset.observation_dim + dataset.action_dim + 2) + 2)


# ---- measuring ------------------------------------------------------------------------------------------------------


Now = Callable[[], float]


def stopwatch(device: torch.device, threads: int) -> Now:
    """The clock that work of this process is measured with."""
    return time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter


class Clock:
    """A share of time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._started = seconds, time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._started

    @property
    def over(self) -> bool:
        return self.spent > self.seconds


def measure(
    config: Config,
    dataset: Dataset,
    compute: ComputeConfig,
    workers: Workers,
    sizes: Sequence[int],
    seconds: float,
    memory_limit: float,
    base: int,
) -> Calibration:
    """Measure packs of runs of one configuration in this process.

    Args:
        config: of a run; its seed and its hyperparameters are those of every member.
        sizes: of packs, ascending; those that would not fit the memory or the time are left out, the first excepted.
        seconds: about how long this may take; setting up a pack is not interrupted.
        memory_limit: bytes by which this process may grow over `base`.
        base: bytes that it holds without a pack.

    Raises:
        UserError: not even the first size fits the memory.
    """
    clock = Clock(seconds)
    device = resolve_device(compute.device)
    needed = ring_bytes(config, dataset) * sizes[0]
    if needed > memory_limit:
        raise UserError(too_large(config, needed, memory_limit))
    now = stopwatch(device, compute.threads)
    begun = now()
    data = training_data(dataset, device)
    data_seconds = now() - begun
    artifacts, stages = _artifacts(config, dataset, data, now)
    bench = _Bench(config, dataset, data, artifacts, device, workers, now, stands_in=bool(stages))
    packs: list[PackMeasurement] = []
    try:
        for i, size in enumerate(sizes):
            if packs:
                known = Curve(tuple((pack.size, float(pack.memory)) for pack in packs))
                # two sizes at least, whatever the time: of one alone nothing is known of packs
                if known(size) > memory_limit or (i > 1 and clock.over) or _pays_no_more(packs):
                    break
            share = max(0.2, (seconds - clock.spent) / (len(sizes) - i))
            measured = bench.cross_domain_pack if isinstance(config.method, CrossDomainConfig) else bench.pack
            packs.append(measured(size, share, base, data_seconds, packs[-1] if packs else None))
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        if not packs:
            raise UserError(too_large(config, max(needed, memory.peak(device) - base), memory_limit)) from None
    if packs[0].memory > memory_limit:
        raise UserError(too_large(config, packs[0].memory, memory_limit))
    result = Calibration(
        work_key(config, dataset), config.method_name, update_work(config, dataset), ring_bytes(config, dataset),
        tuple(packs), bench.step_seconds, bench.save_seconds, stages, clock.spent,
        sizes[-1],
    )  # fmt: skip
    del bench, data, artifacts
    memory.release(device)
    return result


def _pays_no_more(packs: Sequence[PackMeasurement]) -> bool:
    """Whether the last two sizes took no less time per run than the one before them."""
    per_run = [pack.update_seconds / pack.size for pack in packs[-3:]]
    return len(per_run) == 3 and min(per_run[1:]) > per_run[0] * (1 - SAME)


def too_large(config: Config, needed: float, limit: float) -> str:
    """The sentence for a run that does not fit."""
    ring = "method.rollout_batch or method.rollout_epochs_retained (its model rows), "
    knobs = f"{ring if hasattr(config.method, 'rollout_batch') else ''}method.batch_size or method.hidden"
    return (
        f"a single run of {config.method_name} on {config.dataset} needs about {gigabytes(needed)} of memory and a "
        f"learner may take {gigabytes(limit)}; lower {knobs}, or compute.num_learners"
    )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _artifacts(
    config: Config, dataset: Dataset, data: TrainingData, now: Now
) -> tuple[dict[str, dict[str, Any]], dict[str, StageMeasurement]]:
    """What the method's stages give, or a stand-in of the same shapes for what is not there yet, and the times of
    their epochs."""
    store = ArtifactStore(Path(config.workdir) / "artifacts")
    method = load_method(config.method_name)
    artifacts, measured = {}, {}
    quick = method.stages(_shortened(config.method))
    rows = min(STAND_IN_ROWS, len(data.observations))
    few = {item.name: getattr(data, item.name) for item in dataclasses.fields(data)}
    few = {name: v[:rows] if name in _ROW_COLUMNS and v is not None else v for name, v in few.items()}
    if data.episode_starts is not None:
        few["episode_starts"] = data.episode_starts[data.episode_starts < rows]
    for name, stage in method.stages(config.method).items():
        key = stage_key(stage, dataset.content_hash)
        if store.exists(stage.kind, key):
            artifacts[name] = store.load(stage.kind, key)
            continue
        if stage.epoch_updates is None:
            artifacts[name], seconds = _stand_in(quick[name], TrainingData(**few), now)
            measured[name] = StageMeasurement(seconds * len(data.observations) / rows)
        else:
            told: dict[int, Mapping[str, float]] = {}
            artifacts[name] = quick[name].build(data, told.__setitem__)
            measured[name] = StageMeasurement(told[max(told)]["seconds_per_update"] * stage.epoch_updates)
    return artifacts, measured


_ROW_COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "states")


def _shortened(config: Any) -> Any:
    """A method's configuration whose stages take few epochs or updates."""
    changes = {}
    for item in dataclasses.fields(config):
        part = getattr(config, item.name)
        if not dataclasses.is_dataclass(part):
            continue
        for few in ({"max_epochs": 2, "min_epochs": 0}, {"num_updates": STAND_IN_UPDATES}):
            known = {name: value for name, value in few.items() if hasattr(part, name)}
            part = dataclasses.replace(part, **known)  # type: ignore[type-var]
        changes[item.name] = part
    return dataclasses.replace(config, **changes)


def _stand_in(stage: Stage, data: TrainingData, now: Now) -> tuple[dict[str, Any], float]:
    """Build a stage in a hurry; returns it and the seconds of an epoch (the second: the first also allocates, and what
    is told after the second may be of other work), or of an update where the stage tells it."""
    times, of_update = [now()], [0.0]

    def report(step: int, metrics: Mapping[str, float]) -> None:
        times.append(now())
        if "seconds_per_update" in metrics:
            of_update.append(metrics["seconds_per_update"])

    content = stage.build(data, report)
    if len(of_update) > 1:
        return content, of_update[-1]
    seconds = [end - start for start, end in pairwise(times)]
    return content, seconds[:2][-1] if seconds else 0.0


class _Bench:
    """Builds and times packs of one configuration."""

    def __init__(
        self, config: Config, dataset: Dataset, data: TrainingData, artifacts: Mapping[str, dict[str, Any]],
        device: torch.device, workers: Workers, now: Now, stands_in: bool,
    ) -> None:  # fmt: skip
        self.config, self.dataset, self.data, self.artifacts = config, dataset, data, artifacts
        self._stands_in = stands_in  # an artifact for one that is not there yet
        self.device, self.workers, self.now = device, workers, now
        self.step_seconds = self.save_seconds = 0.0
        self._shards = 1.0  # of an epoch's rollouts, per member

    def pack(
        self, size: int, seconds: float, base: int, data_seconds: float, smaller: PackMeasurement | None
    ) -> PackMeasurement:
        """Measure a pack of one size in about `seconds`."""
        memory.release(self.device)
        memory.reset_peak(self.device)
        if smaller is None:
            updates = 2  # how long an update takes is not known at all
            method = self._build(size, updates)
            results, _ = self._rollouts(method, 0.0)
            self._fill(method, results)
            begun = self.now()
            method.train_epoch(0)
            per_update = (self.now() - begun) / updates
            del method
        else:
            per_update = smaller.update_seconds * size / smaller.size
        updates = max(2, min(UPDATES_AT_ONCE, self.config.method.updates_per_epoch, int(seconds / 5 / per_update)))
        begun = self.now()
        method = self._build(size, updates)
        setup = self.now() - begun
        results, rollout_seconds = self._rollouts(method, seconds / 4)
        missing = self._fill(method, results)
        method.train_epoch(0)  # allocations and choices of the first call
        timing = Clock(seconds / 2)
        times: list[float] = []
        while len(times) < 2 or not timing.over:
            begun = self.now()
            method.train_epoch(1 + len(times))
            times.append((self.now() - begun) / updates)
        if smaller is None:
            self._evaluate(method)
        training = memory.peak(self.device) + self._epoch_bytes(results, size, updates)
        memory.reset_peak(self.device)
        self._checkpoint(method, size if smaller is None else None)
        # a checkpoint copies the rings; at the end one member is taken out, and its ring copied once more
        saving = memory.peak(self.device) + max(missing, 2 * missing // size)
        allocated = missing if self.device.type == "cpu" else 0  # what is not yet touched there takes no memory
        needed = max(training, saving) + allocated - base
        return PackMeasurement(size, data_seconds + setup, rollout_seconds, statistics.median(times), needed)

    def cross_domain_pack(
        self, size: int, seconds: float, base: int, data_seconds: float, smaller: PackMeasurement | None
    ) -> PackMeasurement:
        """`pack` for methods that sample environments: iterations in the middle of those that learn, rings filled as
        there, whole periods of what is done every so often, and those before, in which rows are only collected."""
        memory.release(self.device)
        memory.reset_peak(self.device)
        config = self.config.method
        begun = self.now()
        method = load_method(self.config.method_name)([config] * size, range(size), self.data, {}, self.device)
        assert isinstance(method, CrossDomain)
        method.start_jobs = self.workers.start_interaction
        setup = self.now() - begun
        # the time of this thread: others of the process may be loading MLflow, and there are few samples. What
        # workers do while this process waits is no time of its processor at all
        alone = self.now is time.process_time and not self.config.compute.num_rollout_workers
        now = time.thread_time if alone else time.perf_counter
        some = range(0, config.num_updates, max(1, config.num_updates // 1000))
        learning = [t for t in some if config.learns_at(t, len(self.data.observations))] or [some[-1]]
        share = len(learning) / len(some)
        every = config.collect_every
        method.iterate(0, every)  # makes the environments, allocates
        collecting = 0.0
        if share < 1.0:
            count = math.ceil(min(learning[0], UPDATES_AT_ONCE) / every) * every
            begun = now()
            method.iterate(0, count)
            collecting = (now() - begun) / count
        middle = first = learning[len(learning) // 2] // every * every
        missing = method.stand_in(first, RING_FILL_BYTES)
        method.iterate(first, every)
        period = config.work_period
        per_call = period * max(1, UPDATES_AT_ONCE // period)
        timing, times = Clock(seconds / 2), []
        while not times or not timing.over:
            begun = now()
            method.iterate(first, per_call)
            times.append((now() - begun) / per_call)
            first = first + per_call if first + 2 * per_call <= config.num_updates else middle
        update_seconds = share * statistics.median(times) + (1.0 - share) * collecting
        if smaller is None:
            self._evaluate(method)
        training = memory.peak(self.device)
        memory.reset_peak(self.device)
        self._checkpoint(method, size if smaller is None else None, missing)
        saving = memory.peak(self.device) + max(missing, 2 * missing // size)
        allocated = missing if self.device.type == "cpu" else 0
        needed = max(training, saving) + allocated - base
        return PackMeasurement(size, data_seconds + setup, 0.0, update_seconds, needed)

    def _build(self, size: int, updates: int) -> Method:
        schedule: dict[str, Any] = {"updates_per_epoch": updates, "num_updates": 1000 * updates}
        if isinstance(synthetic := getattr(self.config.method, "synthetic", None), SyntheticConfig):
            schedule["synthetic"] = dataclasses.replace(synthetic, refresh_every=updates, synchronous=True)
        config = dataclasses.replace(self.config.method, **schedule)
        cls = load_method(self.config.method_name)
        return cls([config] * size, range(size), self.data, self.artifacts, self.device)

    def _rollouts(self, method: Method, seconds: float) -> tuple[list[RolloutResult], float]:
        """One shard for every member, and the seconds of an epoch that begins with rollouts; by policies, which the
        first pool of a diffusion model does without."""
        begun = self.now()
        jobs = method.rollout_jobs(1)
        drawn = self.now() - begun
        if not jobs:
            return [], 0.0
        members = sorted({member for job in jobs for member in job.members})
        some = jobs[: max(1, self.config.compute.num_rollout_workers)]
        results = self.workers.rollouts(some, method.rollout_model)  # ships the dynamics to workers, allocates
        starts = sum(job.num_starts for job in jobs) / sum(job.num_starts for job in some)
        timing = Clock(seconds)
        times: list[float] = []
        # a worker's time does not pass in this process
        now = time.perf_counter if self.config.compute.num_rollout_workers else self.now
        while not times or not timing.over:
            begun = now()
            results = self.workers.rollouts(some, method.rollout_model)
            times.append(now() - begun)
        if self._stands_in:  # dynamics that have learned next to nothing end rollouts early: take them to last
            made = sum(one.transitions for result in results for one in result.statistics)
            whole = [job for job in some if isinstance(job, RolloutJob)]  # which alone can end early by their model
            starts *= sum(job.num_starts * job.length for job in whole) / max(1, made) if whole else 1.0
        # a shard of every member costs the same
        of_one = results[0].rows[:1], results[0].tags[:1], results[0].statistics[:1]
        results = [RolloutResult((member,), *of_one) for member in members]
        self._shards = sum(len(job.members) for job in jobs) / len(members)
        begun = self.now()
        method.add_rollouts(results)
        added = (self.now() - begun) * self._shards
        return results, drawn + statistics.median(times) * starts + added

    def _fill(self, method: Method, results: Sequence[RolloutResult]) -> int:
        """Fill the rings, as far as that is quick; returns the bytes of the rows that are missing."""
        replay = getattr(method, "replay", None)
        if not isinstance(replay, Replay) or not results or not len(results[0].rows[0]):
            return 0
        row = 4 * replay.width + 2  # and its tag
        most = min(replay.capacity, RING_FILL_BYTES // (row * method.num_members))
        before = -1
        while before < replay.sizes[0] <= most - len(results[0].rows[0]):  # pools that take an older one's place end it
            before = replay.sizes[0]
            method.add_rollouts(results)
        return sum(replay.capacity - size for size in replay.sizes) * row

    def _epoch_bytes(self, results: Sequence[RolloutResult], size: int, updates: int) -> int:
        """What the rollouts and the random numbers of a whole epoch take more than those of the measurement; they are
        not there at the same time."""
        config = self.config.method
        rollouts = sum(4 * rows.numel() for result in results for rows in result.rows) * (self._shards - 1)
        per_row = 8 + 4 * NOISES * self.dataset.action_dim
        # drawn by member, then joined: twice
        chunk = 2 * (config.updates_per_epoch - updates) * size * getattr(config, "batch_size", 256) * per_row
        own = config.own_noises(self.dataset.observation_dim, self.dataset.action_dim)
        if own:  # a piece of the epoch at a time
            whole, measured = (own_noise_updates(own, size, count) for count in (config.updates_per_epoch, updates))
            chunk += 4 * own * size * (whole - measured)
        return int(max(rollouts, chunk))

    def _evaluate(self, method: Method) -> None:
        """Time steps of episodes."""
        env_id = evaluation_env(self.config, self.dataset)
        low, high = action_bounds(env_id)
        scaling = self.dataset.scaling
        arrays = in_environment(method.policy(0), low, high, scaling.observation_mean, scaling.observation_std)
        network = NetworkPolicy(arrays, "calibration", "")
        evaluation = self.config.evaluation
        # one even where none is played: what a step takes is kept for other studies
        seeds = range(evaluation.first_seed, evaluation.first_seed + max(1, evaluation.episodes))
        timing, begun, steps = Clock(0.5), self.now(), 0

        def act(observations: np.ndarray) -> np.ndarray:
            nonlocal steps
            if timing.over:
                raise _Enough
            steps += len(observations)
            return network.act(observations, None)

        try:
            while True:
                run_episodes(env_id, act, seeds)
        except _Enough:
            self.step_seconds = (self.now() - begun) / max(1, steps)

    def _checkpoint(self, method: Method, timed: int | None, missing: int | None = None) -> None:
        """Write a checkpoint, and time it for a pack of `timed` members.

        Args:
            missing: bytes of the rings that are not filled, where that is known.
        """
        with tempfile.TemporaryDirectory() as folder:
            checkpoints, timing = Checkpoints(Path(folder)), Clock(0.0)  # the disk's time counts, too
            checkpoints.save(0, {"method": method.state_dict()})
            spent, written = timing.spent, checkpoints.newest.stat().st_size
        method.select([0]).state_dict()  # what a run leaves at its end
        if timed is not None:
            if missing is None:
                missing = max(0, ring_bytes(self.config, self.dataset) * timed - RING_FILL_BYTES)
            full = written + missing
            self.save_seconds = spent / timed * full / written


class _Enough(Exception):
    """Time is up."""


# ---- what is known --------------------------------------------------------------------------------------------------


class Calibrations:
    """Measurements of one kind of machine, kept in `<workdir>/calibrations/<kind>/<work key>.json`."""

    def __init__(self, workdir: Path, kind: Mapping[str, Any]) -> None:
        self.kind = dict(kind)
        self.folder = workdir / "calibrations" / digest([VERSION, self.kind])

    def get(self, key: str) -> Calibration | None:
        try:
            content = json.loads((self.folder / f"{key}.json").read_text())
        except FileNotFoundError:
            return None
        return Calibration.from_json(content["measured"])

    def add(self, calibration: Calibration) -> Calibration:
        """Keep a measurement, beside what is known of the same key."""
        known = self.get(calibration.key)
        merged = calibration if known is None else known.merged(calibration)
        save_json(self.folder / f"{calibration.key}.json", {"machine": self.kind, "measured": merged.to_json()})
        return merged


# ---- from measurements to packs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a run's time depends on besides the machine."""

    episode_length: float
    episode_length_is: str  # where it comes from


def episode_facts(config: Config, dataset: Dataset) -> Facts:
    """How long an evaluation's episodes are taken to be: as the dataset's complete ones, or up to the time limit."""
    env_id = evaluation_env(config, dataset)
    episodes = dataset.episodes
    if env_id == dataset.env_id and episodes.complete.any():
        return Facts(float(episodes.lengths[episodes.complete].mean()), "the dataset's mean")
    env = make_env(env_id)
    env.close()
    assert env.spec is not None
    assert env.spec.max_episode_steps is not None
    return Facts(float(env.spec.max_episode_steps), "the environment's time limit")


def pack_model(
    config: Config, dataset: Dataset, known: Calibration, facts: Facts, update_scale: float = 1.0
) -> PackModel:
    """The cost of packs of a configuration.

    Args:
        known: measured for the same work, or for similar work.
        update_scale: time of an update over that of `known`; 1 where the work is the same.
    """
    same = known.key == work_key(config, dataset)
    ring = ring_bytes(config, dataset)
    rollout_scale = 1.0 if same or not known.ring else ring / known.ring
    seconds, sizes = [], []
    for pack in known.packs:
        rollouts, update = pack.rollout_seconds * rollout_scale, pack.update_seconds * update_scale
        scaled = dataclasses.replace(pack, rollout_seconds=rollouts, update_seconds=update)
        seconds.append((pack.size, _pack_seconds(config, known, scaled, facts)))
        sizes.append((pack.size, pack.memory + (0.0 if same else pack.size * (ring - known.ring))))
    return PackModel(Curve(tuple(seconds)), Curve(tuple(sizes)), known.packs[-1].size if same else 0)


def _pack_seconds(config: Config, known: Calibration, pack: PackMeasurement, facts: Facts) -> float:
    method, evaluation, compute = config.method, config.evaluation, config.compute
    evaluations = math.ceil(method.num_epochs / evaluation.every_epochs)
    policies = math.ceil(pack.size / max(1, compute.num_evaluators))
    episodes = policies * evaluation.episodes * facts.episode_length * known.step_seconds
    epochs = method.num_rollout_phases * pack.rollout_seconds + method.num_updates * pack.update_seconds
    training = pack.setup_seconds + epochs + evaluations * episodes
    minutes = compute.checkpoint_minutes
    saves = 1 + (min(method.num_epochs, training / (60 * minutes)) if minutes else method.num_epochs)
    return training + saves * known.save_seconds * pack.size
