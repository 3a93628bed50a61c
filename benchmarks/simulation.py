"""A cluster that trains nothing, in virtual time, for the real driver, study, journal and spool; no benchmark itself.

`simulate` runs a study to its end with `orchestrator.driver.Driver` as `offsweep sweep` does, on `SimulatedSlots`: what
a learner would have taken is added to a virtual clock, and its reports come from a formula. Nodes fail and come back,
and the driver itself may be killed and resumed. What is measured is the processor time of this process outside the
slots: that is the driver's.
"""

from __future__ import annotations

import heapq
import io
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ray.exceptions import RayActorError
from rich.console import Console

from agents.method import load_method
from benchmarks.common import ROOT
from envs.dataset import Dataset
from envs.errors import UserError
from envs.registry import load_dataset
from orchestrator.artifacts import ArtifactStore, Built, stage_key
from orchestrator.config import Config, load_config
from orchestrator.display import Display
from orchestrator.driver import Driver
from orchestrator.learner import Evaluation, PackCost, PackReport, PackSpec, flatten
from orchestrator.packing import Curve, Packing
from orchestrator.spool import RunInfo, RunSpool
from sweeps.study import Study

DATASET = "embedded/pendulum-medium-v0"
HOUR = 3600.0
SPACE = {
    "method.eta": {"type": "float", "low": 0.01, "high": 100.0, "log": True},
    "method.actor_lr": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True},
    "method.rollout_length": {"type": "categorical", "choices": [1, 5, 10]},
}
PACK_COST = Curve(((1, 1.0), (16, 4.0)))


@dataclass(frozen=True)
class Scenario:
    """A study and the cluster that it runs on."""

    trials: int
    nodes: int
    seeds: int = 5  # runs of a trial
    runs_per_pack: int = 5
    slots_per_node: int = 1
    sampler: str = "random"
    pruner: str = "median"
    evaluations: int = 10  # of a run
    median_hours: float = 2.0  # of a pack, alone on its slot; lognormal
    sigma: float = 0.5
    pack_cost: Curve = PACK_COST  # relative time by the number of runs that still train
    checkpoint_minutes: float = 5.0
    failures_per_node_hour: float = 0.0
    away_minutes: float = 10.0  # mean time until a node that failed is back or replaced; exponential
    driver_kills: int = 0  # at random moments of the first `kills_within_hours`
    kills_within_hours: float = 10.0
    driver_down_minutes: float = 5.0
    diverging: float = 0.01  # share of runs
    decision_seconds: float = 0.0  # virtual time that the driver is busy with a result; 0: none
    seed: int = 0
    displays: bool = True  # the driver prints its lines as in a log file


class VirtualClock:
    """Seconds since the simulation began; they pass where somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class DriverKilled(BaseException):
    """The driver's process is gone."""


class Nodes:
    """When nodes fail, and when they are back: a Poisson process each, drawn from (seed, node) alone.

    Args:
        rate: failures per hour of a node that is up.
        away: mean hours until it is back.
    """

    def __init__(self, count: int, rate: float, away: float, seed: int) -> None:
        self._rate, self._away = rate, away
        self._random = [random.Random(f"{seed}/node/{i}") for i in range(count)]
        self.up_since = [0.0] * count
        self.fails_at = [self._draw(i, 0.0) for i in range(count)]
        self.failures = 0

    def _draw(self, node: int, now: float) -> float:
        return now + self._random[node].expovariate(self._rate) * HOUR if self._rate else math.inf

    def pass_to(self, node: int, now: float) -> None:
        """Let a node's failures until `now` happen; `up_since` is then when it is (back) up."""
        while self.fails_at[node] <= now:
            self.failures += 1
            back = self.fails_at[node] + self._random[node].expovariate(1 / self._away) * HOUR
            self.up_since[node], self.fails_at[node] = back, self._draw(node, back)


@dataclass
class _Training:
    """A pack as its checkpoint and its learner have it."""

    seconds_per_epoch: float  # with all runs
    epoch: int = 0  # the learner's
    saved: int = 0  # the checkpoint's
    unsaved_seconds: float = 0.0  # of work since the checkpoint
    restarted: bool = False
    work: float = 0.0  # seconds that led to what there is


@dataclass(frozen=True)
class _Call:
    """What a slot does."""

    slot: int
    method: str
    pack: PackSpec | None
    alive: tuple[str, ...]
    start: float  # later than the call where the node is away
    end: float
    per_epoch: float
    to_epoch: int
    result: Any = None  # of calls that take no time


class SimulatedSlots:
    """Slots of a cluster in virtual time, with the answers that `RaySlots` gives, one at a time.

    A node that fails ends the calls of its slots with `RayActorError`; the next call begins when it is back, from the
    pack's checkpoint, as with a Ray actor that waits for a place.
    """

    on_gpu = False

    def __init__(self, scenario: Scenario, config: Config, dataset: Dataset, clock: VirtualClock) -> None:
        self.scenario, self.config, self.dataset, self.clock = scenario, config, dataset, clock
        self.size = scenario.nodes * scenario.slots_per_node
        away = scenario.away_minutes / 60
        self.nodes = Nodes(scenario.nodes, scenario.failures_per_node_hour, away, scenario.seed)
        self._events: list[tuple[float, int, _Call]] = []
        self._number = 0
        self._trainings: dict[str, _Training] = {}
        self._known: dict[str, PackReport] = {}  # of packs under way
        self._free_since = [0.0] * self.size
        self.kill_at: list[float] = []
        self.cpu_seconds = 0.0  # of this process, in here
        self.results = 0
        self.useful = self.lost = self.away = self.waiting = 0.0  # slot-seconds
        self.ended: dict[str, int] = {}  # run key -> how often its pack was reported to have finished with it
        self.packs_finished = 0
        self.on_result: Callable[[], None] = lambda: None

    def submit(self, slot: int, method: str, *args: Any) -> None:
        began = time.process_time()
        if method == "ready":
            call = self._ask(slot)
        else:
            call = self._begin(slot, args[0], args[1]) if method == "advance" else self._build(slot, *args)
        self._number += 1
        heapq.heappush(self._events, (call.end, self._number, call))
        self.cpu_seconds += time.process_time() - began

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        began = time.process_time()
        try:
            if self.kill_at and self._next_moment() >= self.kill_at[0]:
                self._stop(self.kill_at.pop(0))
                raise DriverKilled
            if not self._events or self._events[0][0] > self.clock.now + timeout:
                self.clock.now += timeout
                return []
            _, _, call = heapq.heappop(self._events)
            self.clock.now = max(self.clock.now, call.end)
            self.results += 1
            result = self._end(call)
            self._free_since[call.slot] = self.clock.now
            self.clock.now += self.scenario.decision_seconds
            self.on_result()
            return [(call.slot, result)]
        finally:
            self.cpu_seconds += time.process_time() - began

    def _next_moment(self) -> float:
        return self._events[0][0] if self._events else self.clock.now

    # ---- learners ---------------------------------------------------------------------------------------------------

    def _begin(self, slot: int, pack: PackSpec, dropped: Sequence[str]) -> _Call:
        now, node = self.clock.now, slot // self.scenario.slots_per_node
        self.waiting += now - self._free_since[slot]
        self.nodes.pass_to(node, now)
        start = max(now, self.nodes.up_since[node])
        self.away += start - now
        report = self._known.get(pack.pack_id)
        if report is None:
            report = PackReport(pack.pack_id, 0, False, {run.run_key: [] for run in pack.runs})
            self._known[pack.pack_id] = report
            self._trainings[pack.pack_id] = self._training(pack)
            self._announce(pack)
        training, method = self._trainings[pack.pack_id], self.config.method
        gone = {*dropped, *report.diverged}
        alive = tuple(run.run_key for run in pack.runs if run.run_key not in gone)
        every = self.config.evaluation.every_epochs
        to_epoch = min(method.num_epochs, (training.epoch // every + 1) * every) if alive else training.epoch
        cost = self.scenario.pack_cost
        per_epoch = training.seconds_per_epoch * cost(max(1, len(alive))) / cost(len(pack.runs))
        end = start + (to_epoch - training.epoch) * per_epoch
        if self.nodes.fails_at[node] < end:
            return _Call(slot, "fail", pack, alive, start, self.nodes.fails_at[node], per_epoch, to_epoch)
        return _Call(slot, "advance", pack, alive, start, end, per_epoch, to_epoch)

    def _ask(self, slot: int) -> _Call:
        """Somebody answers when the node is back."""
        now, node = self.clock.now, slot // self.scenario.slots_per_node
        self.waiting += now - self._free_since[slot]
        self.nodes.pass_to(node, now)
        start = max(now, self.nodes.up_since[node])
        self.away += start - now
        return _Call(slot, "ready", None, (), start, start, 0.0, 0)

    def _training(self, pack: PackSpec) -> _Training:
        draw = random.Random(f"{self.scenario.seed}/pack/{pack.pack_id}")
        seconds = self.scenario.median_hours * HOUR * math.exp(draw.gauss(0.0, self.scenario.sigma))
        return _Training(seconds / self.config.method.num_epochs)

    def _end(self, call: _Call) -> Any:
        if call.pack is None:
            return call.result
        if call.method == "fail":
            self._interrupt(call, call.end)
            return RayActorError()
        return self._reported(call)

    def _reported(self, call: _Call) -> PackReport:
        assert call.pack is not None
        pack, training, report = call.pack, self._trainings[call.pack.pack_id], self._known[call.pack.pack_id]
        took = call.end - call.start
        self._work(training, call, call.to_epoch - training.epoch, took)
        training.epoch = call.to_epoch
        updates = training.epoch * self.config.method.updates_per_epoch
        evaluations, diverged = dict(report.evaluations), dict(report.diverged)
        for run in pack.runs:
            known = evaluations[run.run_key]
            if run.run_key not in call.alive or (known and known[-1].updates >= updates):
                continue
            value = self._value(run.config, run.trial, run.seed, updates)
            with RunSpool(Path(pack.study_folder) / "spool", run.run_key) as spool:
                if value is None:
                    diverged[run.run_key] = updates
                    spool.set_tags({"outcome": "diverged"})
                    spool.end("FAILED")
                    continue
                spool.metrics(updates, {"eval/score": value, "eval/return_mean": value})
                evaluations[run.run_key] = [*known, Evaluation(updates, value, [value])]
        finished = not call.alive or training.epoch == self.config.method.num_epochs
        cost = PackCost(training.work, training.work, 0) if finished and not training.restarted else None
        made = PackReport(pack.pack_id, updates, finished, evaluations, diverged, cost)
        self._known[pack.pack_id] = made
        if finished:
            self._finish(call, made)
        return made

    def _finish(self, call: _Call, report: PackReport) -> None:
        assert call.pack is not None
        self.useful += self._trainings.pop(call.pack.pack_id).work
        del self._known[call.pack.pack_id]
        self.packs_finished += 1
        for run in call.pack.runs:
            self.ended[run.run_key] = self.ended.get(run.run_key, 0) + 1
            if run.run_key in report.diverged:
                continue
            with RunSpool(Path(call.pack.study_folder) / "spool", run.run_key) as spool:
                whole = run.run_key in call.alive
                spool.set_tags({"outcome": "finished" if whole else "pruned"})
                spool.end("FINISHED" if whole else "KILLED")

    def _work(self, training: _Training, call: _Call, epochs: int, seconds: float) -> None:
        """Some seconds of work that end with so many whole epochs more, with checkpoints on the way."""
        training.work += seconds
        interval = max(1, math.ceil(self.scenario.checkpoint_minutes * 60 / max(call.per_epoch, 1e-9)))
        unsaved = training.epoch + epochs - training.saved
        if training.epoch + epochs == self.config.method.num_epochs:
            training.saved, training.unsaved_seconds = training.epoch + epochs, 0.0
        elif unsaved >= interval:
            training.saved += unsaved // interval * interval
            training.unsaved_seconds = seconds - epochs * call.per_epoch + unsaved % interval * call.per_epoch
        else:
            training.unsaved_seconds += seconds

    def _interrupt(self, call: _Call, now: float) -> None:
        """The learner's process is gone: what it did since its checkpoint will be done again."""
        if call.pack is None or now <= call.start:
            return
        training, report = self._trainings[call.pack.pack_id], self._known[call.pack.pack_id]
        epochs = int((now - call.start) / call.per_epoch) if call.per_epoch else 0
        self._work(training, call, min(epochs, call.to_epoch - training.epoch), now - call.start)
        self.lost += training.unsaved_seconds
        training.work -= training.unsaved_seconds
        training.epoch, training.unsaved_seconds, training.restarted = training.saved, 0.0, True
        updates = training.saved * self.config.method.updates_per_epoch
        self._known[call.pack.pack_id] = replace(
            report,
            updates=updates,
            evaluations={key: [e for e in known if e.updates <= updates] for key, known in report.evaluations.items()},
            diverged={key: at for key, at in report.diverged.items() if at <= updates},
        )
        self._announce(call.pack)

    def _stop(self, now: float) -> None:
        """The driver's process is gone, and with it all learners."""
        self.clock.now = max(self.clock.now, now)
        for end, _, call in self._events:
            self._interrupt(call, min(now, end))
            if call.pack is not None:  # a slot that waits for its node does not wait for its call any more
                self.away -= max(0.0, call.start - now)
        self._events.clear()
        self.clock.now += self.scenario.driver_down_minutes * 60
        self._free_since = [self.clock.now] * self.size

    def _announce(self, pack: PackSpec) -> None:
        """As every learner does when it begins or goes on."""
        params = flatten(pack.runs[0].config)
        for run in pack.runs:
            with RunSpool(Path(pack.study_folder) / "spool", run.run_key) as spool:
                spool.start(RunInfo(run.run_key, params, {**run.tags, "seed": str(run.seed)}))

    def _value(self, config: Mapping[str, Any], trial: int, seed: int, updates: int) -> float | None:
        """A learning curve whose height depends on the parameters; None from where the run has diverged."""
        draw = random.Random(f"{self.scenario.seed}/run/{trial}/{seed}")
        share = updates / self.config.method.num_updates
        if draw.random() < self.scenario.diverging and share >= draw.random():
            return None
        method = config["method"]
        height = 80 - 8 * (math.log10(method["eta"]) - 0.5) ** 2 - 15 * (math.log10(method["actor_lr"]) + 4) ** 2
        return height * (1 - math.exp(-4 * share)) + draw.gauss(0.0, 5.0)

    # ---- stages -----------------------------------------------------------------------------------------------------

    def _build(self, slot: int, configs: Sequence[dict[str, Any]], name: str) -> _Call:
        """Stages are there at once, and empty."""
        store = ArtifactStore(Path(self.config.workdir) / "artifacts")
        failures: list[UserError | None] = []
        for content in configs:
            config = load_config([content], [])
            stage = load_method(config.method_name).stages(config.method)[name]
            store.build_missing(
                {stage_key(stage, self.dataset.content_hash): stage}, lambda missing: [Built({}, {}) for _ in missing]
            )
            failures.append(None)
        return _Call(slot, "build_stages", None, (), self.clock.now, self.clock.now, 0.0, 0, failures)


@dataclass(frozen=True)
class Mark:
    """How it stood when so many runs had ended."""

    runs: int
    cpu_seconds: float  # of the driver so far
    ask_seconds: float  # of these, in `Study.ask`
    results: int
    hours: float  # virtual
    resident_bytes: int  # of this process, the simulated cluster included
    open_files: int


@dataclass
class Outcome:
    """What a simulation found."""

    scenario: Scenario
    hours: float = 0.0  # virtual, until the last trial had ended
    cpu_seconds: float = 0.0  # of the driver
    ask_seconds: float = 0.0
    resume_seconds: list[float] = field(default_factory=list)  # processor time until a resumed driver went on
    results: int = 0  # that the driver handled: reports of packs, failures
    node_failures: int = 0
    journal_writes: int = 0  # each waits for the disk
    marks: list[Mark] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)  # run key -> packs in which it ended; 1 for each
    states: dict[str, int] = field(default_factory=dict)  # of trials
    values: dict[int, tuple[str, float | None]] = field(default_factory=dict)  # trial -> state, value
    slot_seconds: dict[str, float] = field(default_factory=dict)  # useful, lost, away, waiting, down, tail
    bytes: dict[str, int] = field(default_factory=dict)  # of files, by kind
    files: dict[str, int] = field(default_factory=dict)


def configuration(scenario: Scenario, workdir: Path) -> Config:
    """Of the simulated study, as a YAML file would give it."""
    content = {
        "method": {"name": "ravl", "num_updates": 1_000_000, "updates_per_epoch": 1_000},
        "dataset": DATASET, "num_seeds": scenario.seeds, "workdir": str(workdir),
        "evaluation": {"every_epochs": 1_000 // scenario.evaluations},
        "compute": {
            "device": "cpu", "runs_per_pack": scenario.runs_per_pack, "checkpoint_minutes": scenario.checkpoint_minutes,
        },
        "study": {
            "name": "simulated", "num_trials": scenario.trials, "space": SPACE, "sampler": {"name": scenario.sampler},
            "pruner": {"name": scenario.pruner}, "confirm": {"top": 0},
        },
    }  # fmt: skip
    return load_config([content], [])


def simulate(
    scenario: Scenario, workdir: Path, marks: Sequence[int] = (), resume: bool = False, profile: Sampled | None = None
) -> Outcome:
    """Run a study to its end.

    Args:
        scenario: what is simulated.
        workdir: of the study; on a disk, since its files are the real ones.
        marks: numbers of ended runs at which to note how it stands.
        resume: the study is there and goes on, to the number of trials in `scenario`.
        profile: takes samples of the driver.
    """
    config = configuration(scenario, workdir)
    dataset = load_dataset(config.dataset, workdir)
    clock = VirtualClock()
    slots = SimulatedSlots(scenario, config, dataset, clock)
    draw = random.Random(f"{scenario.seed}/driver")
    slots.kill_at = sorted(draw.uniform(0, scenario.kills_within_hours) * HOUR for _ in range(scenario.driver_kills))
    outcome = Outcome(scenario)
    left = sorted(marks)
    began = time.process_time()
    in_marks = 0.0

    def noted() -> None:
        nonlocal in_marks
        if left and len(slots.ended) >= left[0]:
            started = time.process_time()
            spent = started - began - slots.cpu_seconds - in_marks
            outcome.marks.append(Mark(
                left.pop(0), spent, outcome.ask_seconds, slots.results, clock.now / HOUR, resident_bytes(),
                len(os.listdir("/proc/self/fd")),
            ))  # fmt: skip
            in_marks += time.process_time() - started

    folder, down = workdir / "studies" / config.study.name, 0.0
    while True:
        opened = time.process_time() - slots.cpu_seconds
        slots.on_result = noted
        study = Study.open(folder) if resume else Study.create(folder, config.study_spec())
        with study, RunSpool(folder / "spool", "study") as spool:
            if study.spec.num_trials != scenario.trials:
                study.extend(scenario.trials)
            _watch(study, outcome)
            display = Display(Console(file=io.StringIO(), width=120), "score")
            driver = Driver(
                config, study, dataset, slots, {}, spool, display if scenario.displays else lambda progress: None,
                Packing(folder / "packing.json", scenario.runs_per_pack), clock=clock,
            )  # fmt: skip
            if resume:
                _time_beginning(outcome, opened, slots)
            with profile or nullcontext():
                try:
                    driver.run()
                except DriverKilled:
                    down += scenario.driver_down_minutes * 60 * slots.size
                    resume = True
                    continue
            records = study.trials()
        break
    outcome.cpu_seconds = time.process_time() - began - slots.cpu_seconds - in_marks
    outcome.hours, outcome.results, outcome.ended = clock.now / HOUR, slots.results, slots.ended
    outcome.node_failures = slots.nodes.failures
    outcome.values = {r.number: ("diverged" if r.diverged else r.state, r.value) for r in records}
    for state, _ in outcome.values.values():
        outcome.states[state] = outcome.states.get(state, 0) + 1
    known = {
        "useful": slots.useful, "lost": slots.lost, "away": slots.away, "waiting": slots.waiting, "down": down,
    }  # fmt: skip
    outcome.slot_seconds = {**known, "tail": clock.now * slots.size - sum(known.values())}
    for kind, pattern in (
        ("journal", "journal.log"), ("spool", "spool/t*.jsonl"), ("study_spool", "spool/study.jsonl"),
        ("packs", "packs/*/pack.json"), ("costs", "plan.json*"),
    ):  # fmt: skip
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        outcome.bytes[kind], outcome.files[kind] = sum(sizes), len(sizes)
    return outcome


def _watch(study: Study, outcome: Outcome) -> None:
    """Count what the driver spends in the study's `ask`, and how often it writes to the journal."""
    ask, write = study.ask, study._journal._write

    def timed(*args: Any) -> Any:
        started = time.process_time()
        try:
            return ask(*args)
        finally:
            outcome.ask_seconds += time.process_time() - started

    def counted(*args: Any) -> None:
        outcome.journal_writes += 1
        write(*args)

    vars(study)["ask"], vars(study._journal)["_write"] = timed, counted


def _time_beginning(outcome: Outcome, opened: float, slots: SimulatedSlots) -> None:
    """Note what a resumed driver takes from the opening of its study to the first result of a slot, without what it
    asks the study for."""
    wait, asked = slots.on_result, outcome.ask_seconds

    def first() -> None:
        asking = outcome.ask_seconds - asked
        outcome.resume_seconds.append(time.process_time() - slots.cpu_seconds - opened - asking)
        slots.on_result = wait
        wait()

    slots.on_result = first


class Sampled:
    """Where a process spends its time: looked at every few milliseconds of processor time.

    Attributes:
        samples: taken while nobody was left out.
        self_counts: innermost function of this project -> samples.
        counts: function of this project, callers included -> samples.
    """

    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds = seconds
        self.samples = 0
        self.self_counts: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Sampled:
        self._before = signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, self.seconds, self.seconds)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, self._before)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            path = frame.f_code.co_filename
            if path == __file__ and frame.f_code.co_name in ("submit", "wait"):  # of the simulated slots
                return
            if path.startswith(str(ROOT)) and not path.startswith(str(ROOT / "benchmarks")):
                names.append(f"{Path(path).relative_to(ROOT)}:{frame.f_code.co_qualname}")
            frame = frame.f_back
        self.samples += 1
        if names:
            self.self_counts[names[0]] += 1
            self.counts.update(set(names))


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ideal_hours(outcome: Outcome) -> float:
    """The least that the useful work takes on so many slots that never stop."""
    return outcome.slot_seconds["useful"] / HOUR / (outcome.scenario.nodes * outcome.scenario.slots_per_node)
