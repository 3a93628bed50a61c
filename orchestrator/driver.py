"""The driver: asks the study for trials, packs their runs, keeps the learners busy and tells the study what came of it.

It holds nothing that a kill could lose: trials are in the study's journal, packs in `packs/<id>/pack.json` and their
checkpoints, metrics in the spool. `Driver.run` on a resumed study takes up the running trials where they were.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from agents.method import Stage
from envs.dataset import Dataset
from envs.errors import UserError
from envs.files import NO_ROOM, DiskFullError
from envs.scores import reference_scores
from orchestrator.absence import (
    FIRST_SECONDS,
    MOVE_SECONDS,
    Absence,
    Deaths,
    begun_from,
    cannot_start,
    died,
    nowhere_to_run,
)
from orchestrator.activity import Activity
from orchestrator.artifacts import ArtifactStore, stage_key, stage_keys
from orchestrator.cluster import Slots
from orchestrator.config import Config, load_config, pack_key, run_config, stages_of, to_dict
from orchestrator.hashing import digest
from orchestrator.learner import PACK_FILE, Evaluation, PackReport, PackSpec, RunSpec, evaluation_env
from orchestrator.memory import is_out_of_memory
from orchestrator.node_tracking import keep_unsent
from orchestrator.packing import COSTS_FILE, PackCosts, Packing, balanced, trials_at_once
from orchestrator.population import TOO_LARGE, keep_schedule, population_settings
from orchestrator.spool import RunSpool, RunStatus, last_record
from orchestrator.workers import WorkersAway
from sweeps.confirm import FINAL_VALUES
from sweeps.objectives import SCORE
from sweeps.racing import is_contender
from sweeps.study import VOID, Proposal, Study, TrialRecord, TrialTakenOver, TrialTicket
from sweeps.summary import COLLAPSING

MAX_DEATHS = 10  # of learners' processes that a pack survives while it makes no progress; one more and it fails
FAILURES_IN_A_ROW = 3  # of packs, after which it is not the packs: the study stops
POLL_SECONDS = 2.0  # between looks at what other drivers of the study are doing
MAX_TOGETHER = 16  # stages built in one go, whose memory adds up


class Clock(Protocol):
    """What the driver waits by; the module `time` is one."""

    def monotonic(self) -> float:
        """Seconds from some moment on."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""


@dataclass(frozen=True)
class MissingStage:
    """A stage that has to be built before a pack can start."""

    name: str  # in the method
    key: str
    stage: Stage
    config: dict[str, Any]  # of a run that needs it


@dataclass
class TrialProgress:
    """What the driver knows of a trial under way."""

    number: int
    active: dict[str, Any]
    seeds: list[int]
    run_keys: list[str]  # of these seeds
    metric: str = SCORE  # of the study's objective
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    diverged: dict[str, int] = field(default_factory=dict)
    collapsing: dict[str, dict[int, float]] = field(default_factory=dict)  # as a `PackReport` has it
    updates: dict[str, int] = field(default_factory=dict)  # run key -> done, as reported last
    finished: set[str] = field(default_factory=set)  # runs whose pack has ended
    judged: int = -1  # step up to which the pruner has been asked
    started: float = field(default_factory=time.monotonic)

    def common_steps(self) -> list[int]:
        """Steps at which every run has been evaluated."""
        steps = [{e.updates for e in self.evaluations.get(key, [])} for key in self.run_keys]
        return sorted(set.intersection(*steps)) if steps else []

    def value_at(self, step: int) -> float:
        """Mean over runs of the value at a step."""
        values = [e.objective(self.metric) for key in self.run_keys for e in self.evaluations[key] if e.updates == step]
        return sum(values) / len(values)

    def final_value(self, last: int) -> float:
        """Mean over runs of each run's mean over its last evaluations."""
        finals = [[e.objective(self.metric) for e in self.evaluations[key]][-last:] for key in self.run_keys]
        return sum(sum(f) / len(f) for f in finals) / len(finals)


@dataclass
class Progress:
    """What a display shows; the driver's own state, read only."""

    config: Config
    study: Study
    running: dict[int, TrialProgress]
    started: float
    stage: str | None = None
    done_at_start: float = 0.0  # of a resumed study
    activity: Activity = field(default_factory=Activity)

    def updates_done(self) -> float:
        """Run-updates done or no longer needed."""
        total = self.config.method.num_updates * self.config.num_seeds
        ended = self.study.num_finished * total
        return ended + sum(sum(trial.updates.values()) for trial in self.running.values())

    def updates_planned(self) -> float:
        return self.study.spec.num_trials * self.config.method.num_updates * self.config.num_seeds

    def seconds_left(self) -> float | None:
        """Until the end, as fast as it has gone since this driver's start; None: not known yet."""
        done = self.updates_done() - self.done_at_start
        if done <= 0:
            return None
        elapsed = time.monotonic() - self.started
        return elapsed / done * (self.updates_planned() - self.updates_done())


class Driver:
    """Runs a study to its end.

    Args:
        config: the base configuration; trials change some of its keys.
        study: open for writing.
        dataset: what the runs learn from.
        slots: where learners run.
        tags: of every MLflow run.
        spool: of the study's own run.
        on_change: called with the progress whenever something happened, and every second or so.
        packing: sizes of the packs; None: as configured, else the seeds of a trial.
        confirms: of a confirm stage: the search's trial that each of the study's trials repeats, by number.
        clock: what it waits by.
    """

    def __init__(
        self,
        config: Config,
        study: Study,
        dataset: Dataset,
        slots: Slots,
        tags: dict[str, str],
        spool: RunSpool,
        on_change: Callable[[Progress], None] = lambda progress: None,
        packing: Packing | None = None,
        confirms: Sequence[int] = (),
        clock: Clock = time,
    ) -> None:
        self.config, self.study, self.dataset, self.slots = config, study, dataset, slots
        self.tags, self.on_change = tags, on_change
        self.spool, self.confirms, self._clock = spool, confirms, clock
        first = config.study.racing.first_seeds if study.spec.searches else None
        self._first_seeds = config.seeds if first is None else config.seeds[:first]
        divergence = config.study.divergence
        self._q_bound = divergence.q_bound if study.spec.searches or divergence.always else None
        self.packing = packing or Packing(None, config.runs_per_pack or config.num_seeds)
        self.costs = PackCosts(study.folder / COSTS_FILE)
        self.progress = Progress(config, study, {}, clock.monotonic())
        self._queue: deque[PackSpec] = deque()
        self._busy: dict[int, PackSpec | tuple[str, ...]] = {}  # slot -> pack, or keys of the stages being built
        self._configs: dict[str, Config] = {}  # pack id -> of one of its runs, while the pack is under way
        self._dropped: set[str] = set()  # runs that are no longer wanted
        self._absent: dict[int, Absence] = {}  # slots, none of them busy
        self._deaths: dict[str, Deaths] = {}  # by pack or stage
        self._store = ArtifactStore(Path(config.workdir) / "artifacts")
        self._base_keys = stage_keys(stages_of(config), dataset.content_hash)
        self._ready_stages: set[str] = set()  # whose building is recorded, too
        self._recorded = 0  # ended trials whose value is in the spool
        self._best: float | None = None  # of their values
        self._waiting: dict[str, list[PackSpec]] = {}  # stage key -> packs that need it
        self._failed: list[tuple[PackSpec, Exception, BaseException | None]] = []  # since a pack has reported something
        self._begun: list[TrialTicket] = []  # trials asked for that do not fill a pack yet
        self._sampler = ThreadPoolExecutor(1, "sampler")
        self._choice: Future[Proposal] | None = None  # of the coming trial, under way or made

    def run(self) -> None:
        """Until every trial has ended."""
        with self._sampler:
            self._resume()
            self.progress.done_at_start = self.progress.updates_done()
            self._fill()
            while not self._is_idle() or self._gives_up_failed() or self.study.others_running():
                self.on_change(self.progress)
                if self._is_idle():  # the trials of a driver that dies now are done here
                    self._clock.sleep(POLL_SECONDS)
                    self._fill()
                    continue
                for slot, result in self._wait():
                    self._handle(slot, result)
                    self._fill()
                if self._choice is not None and self._choice.done():
                    self._fill()
                if self._absent:
                    self._look_for_absent()
            self.on_change(self.progress)

    def _is_idle(self) -> bool:
        """Whether nothing is under way, nor waits for a slot to come back."""
        if self._busy or self._choice is not None:
            return False
        if len(self._absent) == self.slots.size:
            return self.study.num_finished >= self.study.spec.num_trials
        return all(absence.pack is None for absence in self._absent.values())

    def _wait(self) -> list[tuple[int, Any]]:
        """What slots have ended; returns early, or with nothing, where the sampler has made its choice or an absent
        slot is to be asked."""
        timeout = 1.0 if self._choice is None else 0.05
        resting = [absence.next_at for absence in self._absent.values() if not absence.asking]
        if resting:
            timeout = min(timeout, max(0.01, min(resting) - self._clock.monotonic()))
        if self._busy or len(resting) < len(self._absent):
            return self.slots.wait(timeout)
        if self._choice is not None:
            wait([self._choice], timeout=1.0 if not resting else timeout)
        else:
            self._clock.sleep(timeout)
        return []

    # ---- what to run ----------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Queue the packs of trials that a dead driver left running."""
        tickets = {ticket.number: ticket for ticket in self.study.unfinished()}
        for params in self.config.study.enqueue:
            self.study.enqueue(params)
        # the dead driver may have told the study how a trial ended, and nobody else
        for record in (*self.study.trials(), *self.study.discarded()):
            if record.finished is not None:
                self._close_runs(record)
        self._record_ended_before()
        made: dict[int, list[PackSpec]] = {}  # by trial
        for ticket in tickets.values():
            ids = ticket.attrs.get("packs", [])
            if ids and all((self.study.folder / "packs" / pack_id / PACK_FILE).exists() for pack_id in ids):
                made[ticket.number] = [PackSpec.load(self.study.folder, pack_id) for pack_id in ids]
        # the dead driver was making the packs of these trials and of those that share one with them
        fresh = set(tickets) - set(made)
        fresh |= {n for n, packs in made.items() if any(run.trial in fresh for pack in packs for run in pack.runs)}
        packs: dict[str, PackSpec] = {}
        for number in sorted(set(made) - fresh):
            packs |= {pack.pack_id: pack for pack in made[number]}
        # of further seeds that a trial was given with other trials' the dead driver may not have told it
        seeds: dict[int, list[int]] = {}
        for pack in packs.values():
            for run in pack.runs:
                seeds.setdefault(run.trial, []).append(run.seed)
        for number in sorted(set(made) - fresh):
            self._track(tickets[number], sorted(seeds[number]))
        for pack in packs.values():
            for part in self._parts(pack):
                self._dropped |= {run.run_key for run in part.runs if run.trial not in tickets}
                self._queue.append(part)
        newest = max((r.number for r in self._records() if r.state != "waiting"), default=-1)
        batches: dict[int, list[TrialTicket]] = {}
        for number in sorted(fresh):
            batches.setdefault(tickets[number].place // self._at_once, []).append(tickets[number])
        for batch in batches.values():
            if batch[-1].number == newest:  # this one may have been asked for in part only
                self._begun = batch
                while (asked := self._ask()) is None:  # the other slots wait, too: they know the batch that was begun
                    wait([self._choice] if self._choice is not None else [])
                batch = asked
            self._queue.extend(self._make_packs(batch))

    def _records(self) -> list[TrialRecord]:
        """The study's trials that this driver has asked for, which are all where it is the only one."""
        return [record for record in self.study.trials() if record.attrs.get("driver") == self.study.driver]

    def _parts(self, pack: PackSpec) -> list[PackSpec]:
        """A pack, or those that took its place."""
        if not pack.children:
            return [pack]
        children = [PackSpec.load(self.study.folder, pack_id) for pack_id in pack.children]
        return [part for child in children for part in self._parts(child)]

    def _fill(self) -> None:
        """Give every idle slot something to do."""
        if len(self._busy) + len(self._absent) == self.slots.size:
            return
        for slot in range(self.slots.size):
            while slot not in self._busy and slot not in self._absent:
                if not self._next(slot):  # nor is there anything for the other slots
                    return

    def _next(self, slot: int) -> bool:
        """Start one thing in a slot, or move a pack to those that wait; whether anything was there."""
        if not self._queue:
            if self._waiting:  # for a stage that another slot builds; further trials would be asked for blindly
                return False
            tickets = self._ask()
            if not tickets:  # the sampler thinks, or there are no more
                return False
            self._queue.extend(self._make_packs(tickets))
        if not self._queue:
            return True  # all of them were refused: ask again
        pack = self._queue.popleft()
        if self.packing.exceeds(pack.key, len(self._alive(pack))):  # made before memory ran out
            self._queue.extendleft(reversed(self._divide(pack)))
            return True
        missing = self._missing_stage(pack)
        if missing is None:
            self._advance(slot, pack)
            return True
        self._waiting.setdefault(missing.key, []).append(pack)
        if not self._is_being_built(missing.key):
            together = {missing.key: missing, **self._to_build_with(missing)}
            self._busy[slot] = tuple(together)
            self.progress.stage = missing.name
            self.slots.submit(slot, "build_stages", [one.config for one in together.values()], missing.name)
        return True

    def _is_being_built(self, key: str) -> bool:
        return any(isinstance(job, tuple) and key in job for job in self._busy.values())

    def _to_build_with(self, first: MissingStage) -> dict[str, MissingStage]:
        """Stages that queued packs miss and that can be built in one go with another, by key; the packs then wait.

        On a GPU only, which a single stage leaves mostly idle; on CPUs every slot builds its own.
        """
        together: dict[str, MissingStage] = {}
        if not self.slots.on_gpu:
            return together
        queue, self._queue = self._queue, deque()
        for pack in queue:
            missing = self._missing_stage(pack)
            fits = (
                missing is not None
                and missing.name == first.name
                and missing.stage.can_be_built_with(first.stage)
                and not self._is_being_built(missing.key)
                and (missing.key in (first.key, *together) or len(together) + 1 < MAX_TOGETHER)
            )
            if missing is None or not fits:
                self._queue.append(pack)
                continue
            self._waiting.setdefault(missing.key, []).append(pack)
            if missing.key != first.key:
                together[missing.key] = missing
        return together

    @property
    def _at_once(self) -> int:
        # as if all seeds were to be trained: with fewer to begin with a sampler is not asked in fewer rounds
        return trials_at_once(self.packing.runs_per_pack, self.config.num_seeds)

    def _ask(self) -> list[TrialTicket] | None:
        """As many trials as fill a pack; their places begin at a multiple of that many, so that a batch that a dead
        driver has begun to ask for is completed to what it would have been. None while a sampler that takes its time
        chooses one of them, in a thread of its own."""
        while not self._begun or (self._begun[-1].place + 1) % self._at_once:
            if self._choice is None and (choose := self.study.propose()) is not None:
                self._choice = self._sampler.submit(choose)
            proposal = None
            if self._choice is not None:
                if not self._choice.done():
                    return None
                proposal, self._choice = self._choice.result(), None
            ticket = self.study.ask(proposal)
            if ticket is None:
                break
            self._begun.append(ticket)
        tickets, self._begun = self._begun, []
        return tickets

    def _make_packs(self, tickets: Sequence[TrialTicket]) -> list[PackSpec]:
        """Group the first runs of some trials by pack key, and write the packs down before anything is trained."""
        groups: dict[str, list[tuple[RunSpec, Config]]] = {}
        for ticket in tickets:
            try:
                run = run_config(self.config, ticket.active, self._first_seeds[0])
            except UserError as error:
                # a combination that the method refuses says something about its parameters
                self.study.set_attr(ticket.number, "failure", str(error))
                self.study.tell_diverged(ticket.number, self._bad_value())
                self._record_ended(self.study.trial(ticket.number))
                continue
            self._add_runs(ticket.number, run, self._first_seeds, groups)
        packs = self._write_packs(groups)
        for ticket in tickets:
            mine = [p.pack_id for p in packs if any(run.trial == ticket.number for run in p.runs)]
            if mine:
                self.study.set_attr(ticket.number, "packs", mine)
                self._track(ticket, self._first_seeds)
        return packs

    def _further_packs(self, seeds: Mapping[int, Sequence[int]]) -> list[PackSpec]:
        """Packs of the further seeds that some running trials have been given, by number."""
        groups: dict[str, list[tuple[RunSpec, Config]]] = {}
        for number, further in seeds.items():
            run = run_config(self.config, self.progress.running[number].active, further[0])
            self._add_runs(number, run, further, groups)
        packs = self._write_packs(groups)
        for number, further in seeds.items():
            mine = [p.pack_id for p in packs if any(run.trial == number for run in p.runs)]
            self.study.set_attr(number, "packs", [*self.study.attrs(number)["packs"], *mine])
            trial = self.progress.running[number]
            trial.seeds += further
            trial.run_keys += [self._run_key(number, seed) for seed in further]
        return packs

    def _add_runs(
        self, number: int, run: Config, seeds: Sequence[int], groups: dict[str, list[tuple[RunSpec, Config]]]
    ) -> None:
        """Add the runs of a trial with these seeds, of which `run` is one, to those of their pack key."""
        tags = {**self.tags, "study": self.study.spec.name}
        if self.confirms:
            tags["trial"] = str(self.confirms[number])
        group, settings = groups.setdefault(pack_key(run), []), to_dict(run)
        for seed in seeds:
            spec = RunSpec(self._run_key(number, seed), number, seed, {**settings, "seed": seed}, tags)
            group.append((spec, run))

    def _write_packs(self, groups: Mapping[str, Sequence[tuple[RunSpec, Config]]]) -> list[PackSpec]:
        packs: list[PackSpec] = []
        for key, runs in groups.items():
            limit = self.packing.limit(key, runs[0][1])
            if self.study.spec.pbt and limit < len(runs):
                raise UserError(TOO_LARGE)
            start = 0
            for size in balanced(len(runs), limit):
                pack = self._pack(key, [run for run, _ in runs[start : start + size]])
                self._configs[pack.pack_id] = runs[start][1]
                packs.append(pack)
                start += size
        for pack in packs:
            pack.save()
        return packs

    def _pack(self, key: str, runs: Sequence[RunSpec], parent: str | None = None) -> PackSpec:
        pack_id = f"{runs[0].run_key}-x{len(runs)}-{digest([run.run_key for run in runs])[:6]}"
        return PackSpec(
            pack_id, str(self.study.folder), tuple(runs), key, parent, q_bound=self._q_bound,
            population=population_settings(self.study),
        )  # fmt: skip

    def _run_key(self, number: int, seed: int) -> str:
        return run_key(self.confirms[number], seed, "c") if self.confirms else run_key(number, seed)

    def _alive(self, pack: PackSpec) -> list[RunSpec]:
        """Its runs that still train, as far as is known here."""
        return [
            run for run in pack.runs
            if run.run_key not in self._dropped and run.run_key not in self._diverged_of(run.trial)
        ]  # fmt: skip

    def _diverged_of(self, number: int) -> Mapping[str, int]:
        trial = self.progress.running.get(number)
        return {} if trial is None else trial.diverged

    def _config_of(self, pack: PackSpec) -> Config:
        """The configuration of a pack's first run, or of another seed of its trial."""
        if pack.pack_id not in self._configs:
            run, config = pack.runs[0], None
            if (trial := self.progress.running.get(run.trial)) is not None:
                config = run_config(self.config, trial.active, run.seed)
            if config is None or to_dict(config)["method"] != run.config["method"]:  # of other code, perhaps
                config = load_config([run.config], [])
            self._configs[pack.pack_id] = config
        return self._configs[pack.pack_id]

    def _divide(self, pack: PackSpec) -> list[PackSpec]:
        """Two packs in place of one, that go on from its checkpoint. The last file to be written is the pack's own,
        which names them: a kill in between leaves the pack as it was.

        Raises:
            UserError: the pack is a population.
        """
        if pack.population is not None:
            raise UserError(TOO_LARGE)
        alive = self._alive(pack)
        later = {run.run_key for run in alive[(len(alive) + 1) // 2 :]}
        halves = [[run for run in pack.runs if (run.run_key in later) is second] for second in (False, True)]
        parent = pack.pack_id if pack.checkpoints(self.config.compute.checkpoints).exist() else pack.parent
        children = [self._pack(pack.key, runs, parent) for runs in halves if runs]
        for child in children:
            child.save()
        replace(pack, children=tuple(child.pack_id for child in children)).save()
        return children

    def _track(self, ticket: TrialTicket, seeds: Sequence[int]) -> None:
        keys = [self._run_key(ticket.number, seed) for seed in seeds]
        # a driver may have died between the last report and the pruner's answer: that step is judged again
        judged = max(sorted(self.study.trial(ticket.number).intermediate)[:-1], default=-1)
        self.progress.running[ticket.number] = TrialProgress(
            ticket.number, dict(ticket.active), list(seeds), keys, self.config.study.objective.metric, judged=judged
        )

    def _missing_stage(self, pack: PackSpec) -> MissingStage | None:
        """The first stage that has to be built before the pack can start."""
        for name, stage in stages_of(self._config_of(pack)).items():
            key = stage_key(stage, self.dataset.content_hash)
            if key in self._ready_stages:
                continue
            if not self._store.exists(stage.kind, key):
                return MissingStage(name, key, stage, pack.runs[0].config)
            self._ready_stages.add(key)
            history = self._store.description(stage.kind, key).get("history", [])
            label = name if key == self._base_keys.get(name) else f"{name}-{key[:6]}"
            for step, metrics in history:
                self.spool.metrics(step, {f"{label}/{k}": v for k, v in metrics.items()})
        return None

    def _advance(self, slot: int, pack: PackSpec) -> None:
        self._busy[slot] = pack
        self.progress.activity.began(pack, self.config.method.num_updates)
        dropped = [run.run_key for run in pack.runs if run.run_key in self._dropped]
        self.slots.submit(slot, "advance", pack, dropped)

    # ---- what came of it ------------------------------------------------------------------------------------------

    def _handle(self, slot: int, result: Any) -> None:
        if slot in self._absent:
            self._answered(slot, result)
            return
        job = self._busy.pop(slot)
        gone = died(result)
        if gone and cannot_start(result):
            raise UserError(f"a learner's process cannot start ({_first_line(result)}); see Ray's logs on its machine")
        if isinstance(job, tuple):
            if gone:
                self._leave(slot)
            self._stages_ended(job, result)
        elif isinstance(result, PackReport):
            self._deaths.pop(job.pack_id, None)
            self._give_up_failed()
            self.progress.activity.reported(result)
            keep_unsent(self.study.folder, result.unsent_from, result.unsent)
            self._take(job, result)
            if not result.finished:
                self._advance(slot, job)
                return
            if result.cost is not None and whole(job, result):
                self.costs.add(job, result.cost, self.packing.predict(self._config_of(job), len(job.runs)))
            self._configs.pop(job.pack_id, None)
        elif is_out_of_memory(result):
            self.progress.activity.divided(job.pack_id)
            self._does_not_fit(job, result)
        elif gone and (
            isinstance(result, WorkersAway) or not self._too_many_deaths(job.pack_id, begun_from(job.folder))
        ):
            # taken up from its checkpoint when the slot's process is back, or in another slot
            self.progress.activity.restarted(job.pack_id, result)
            self._leave(slot, job)
        else:
            self.progress.activity.gave_up(job.pack_id, result)
            if gone:
                self._leave(slot)
            self._pack_failed(job, result)

    def _too_many_deaths(self, key: str, epoch: int | None = None) -> bool:
        """Count the death of a process that had a pack, or built a stage."""
        deaths = self._deaths.setdefault(key, Deaths())
        deaths.add(epoch)
        return deaths.count > MAX_DEATHS

    # ---- slots that are away --------------------------------------------------------------------------------------

    def _leave(self, slot: int, pack: PackSpec | None = None) -> None:
        """The slot's process is gone; it is asked in a moment whether there is another one."""
        now = self._clock.monotonic()
        self._absent[slot] = Absence(now, now + FIRST_SECONDS, pack)

    def _look_for_absent(self) -> None:
        """Ask absent slots whether they are back; after a while others get their packs.

        Raises:
            UserError: no slot has been there for too long.
        """
        now, moved = self._clock.monotonic(), False
        for slot, absence in self._absent.items():
            if not absence.asking and now >= absence.next_at:
                absence.asking = True
                self.slots.submit(slot, "ready")
            if absence.pack is not None and now - absence.since > MOVE_SECONDS:
                self._queue.appendleft(absence.pack)
                absence.pack = None
                moved = True
        patience = 60 * self.config.compute.patience_minutes
        latest = max(absence.since for absence in self._absent.values())
        if len(self._absent) == self.slots.size and now - latest > patience:
            raise nowhere_to_run(self.config.compute, self.slots.size, self.study.spec.name)
        if moved:
            self._fill()

    def _answered(self, slot: int, result: Any) -> None:
        """What came of asking an absent slot."""
        if cannot_start(result):
            raise UserError(f"a learner's process cannot start ({_first_line(result)}); see Ray's logs on its machine")
        if died(result):
            self._absent[slot].failed(self._clock.monotonic())
        elif isinstance(result, BaseException):
            raise result
        elif (pack := self._absent.pop(slot).pack) is not None:
            self._advance(slot, pack)

    def _stages_ended(self, keys: tuple[str, ...], result: Any) -> None:
        """Queue the packs that waited for stages, or end their trials.

        Args:
            result: for each stage why it could not be built, or None; or what the whole call raised.
        """
        if not any(isinstance(job, tuple) for job in self._busy.values()):
            self.progress.stage = None
        failures: Sequence[UserError | None] = [None] * len(keys)
        if died(result):
            if self._too_many_deaths(keys[0]):
                raise RuntimeError(f"a stage killed the process that built it {MAX_DEATHS + 1} times") from result
        elif isinstance(result, UserError) and not isinstance(result, DiskFullError):
            failures = [result] * len(keys)
        elif isinstance(result, BaseException):
            raise result
        else:
            failures = result
        for key, failure in reversed(list(zip(keys, failures, strict=True))):
            packs = self._waiting.pop(key, [])
            if failure is None:
                self._queue.extendleft(reversed(packs))
            elif key in self._base_keys.values():
                raise failure
            else:  # with the settings of some trials only: as if their runs had diverged
                for number in {run.trial for pack in packs for run in pack.runs} & set(self.progress.running):
                    self.study.set_attr(number, "failure", str(failure))
                    self.study.tell_diverged(number, self._bad_value())
                    self._end(self.progress.running[number])

    def _take(self, pack: PackSpec, report: PackReport) -> None:
        """Tell the study what a pack reported; decide what goes on."""
        trials = {run.run_key: self.progress.running.get(run.trial) for run in pack.runs}
        trial_of = {key: trial for key, trial in trials.items() if trial is not None and key in trial.run_keys}
        for key, trial in trial_of.items():
            if key in report.evaluations:
                trial.evaluations[key] = report.evaluations[key]
                trial.updates[key] = report.updates
                if report.finished:
                    trial.finished.add(key)
            if key in report.diverged:
                trial.diverged[key] = report.diverged[key]
            if key in report.collapsing:
                trial.collapsing[key] = report.collapsing[key]
        touched = list({trial.number: trial for trial in trial_of.values()}.values())
        for trial in touched:
            with self._unless_taken_over(trial):
                self._judge(trial)
        self._race([t for t in touched if t.number in self.progress.running and t.finished == set(t.run_keys)])

    @contextmanager
    def _unless_taken_over(self, trial: TrialProgress) -> Iterator[None]:
        """Give a trial up if another driver took this one for dead and does the trial."""
        try:
            yield
        except TrialTakenOver:
            self._end(trial)

    def _judge(self, trial: TrialProgress) -> None:
        number = trial.number
        for step in trial.common_steps():
            if step <= trial.judged:
                continue
            trial.judged = step
            self.study.report(number, step, trial.value_at(step))
            if step < self.config.method.num_updates and self.study.should_prune(number):
                with self.study.together():
                    # what evaluators have found out beyond this step would not be known without them
                    self._keep(trial, until=step)
                    self._account(trial)
                    self.study.tell_pruned(number)
                self._end(trial)
                return
        # every common step comes before a run diverged, so it is judged first, however late its evaluation came in
        if trial.diverged:
            with self.study.together():
                self._keep(trial)
                self._account(trial)
                self.study.tell_diverged(number, self._bad_value())
            self._end(trial)
            return
        if trial.finished == set(trial.run_keys) and len(trial.seeds) == self.config.num_seeds:
            self._complete(trial)

    def _complete(self, trial: TrialProgress) -> None:
        with self.study.together():
            self._keep(trial)
            self._account(trial)
            keep_schedule(self.study, trial.number, trial.run_keys[0])
            self.study.set_attr(trial.number, FINAL_VALUES, self._final_values(trial))
            self.study.tell(trial.number, trial.final_value(self.config.study.objective_evaluations))
        self._end(trial)

    def _race(self, trials: Sequence[TrialProgress]) -> None:
        """Give trials whose runs have all ended one more seed each, or tell the study of them.

        What is decided follows from the study's journal and these trials alone, and is written down before anything is
        trained, so that a resumed driver goes on likewise.
        """
        if not trials:
            return
        complete = [record for record in self.study.trials() if record.state == "complete" and not record.diverged]
        told = {record.number: record.attrs.get(FINAL_VALUES, {}) for record in complete}
        known = told | {trial.number: self._final_values(trial) for trial in trials}
        values = {number: list(by_run.values()) for number, by_run in known.items() if by_run}
        further: dict[int, list[int]] = {}
        for trial in trials:
            given = self.study.attrs(trial.number).get("seeds", trial.seeds)
            if given == trial.seeds:
                others = [other for number, other in values.items() if number != trial.number]
                racing, direction = self.config.study.racing, self.study.spec.direction
                if is_contender(values[trial.number], others, racing.alpha, direction):
                    given = self.config.seeds[: len(trial.seeds) + 1]
            if given != trial.seeds:
                further[trial.number] = given[len(trial.seeds) :]
        for trial in trials:
            with self._unless_taken_over(trial):
                if trial.number in further:
                    self.study.set_attr(trial.number, "seeds", [*trial.seeds, *further[trial.number]])
                else:
                    self._complete(trial)
        still_mine = {number: seeds for number, seeds in further.items() if number in self.progress.running}
        self._queue.extendleft(reversed(self._further_packs(still_mine)))

    def _final_values(self, trial: TrialProgress) -> dict[str, float]:
        """Every run's own value by its key: the trial's is their mean."""
        last = self.config.study.objective_evaluations
        return {key: replace(trial, run_keys=[key]).final_value(last) for key in trial.run_keys}

    def _account(self, trial: TrialProgress) -> None:
        """Keep with a trial what it took."""
        self.study.set_attr(trial.number, "seeds", trial.seeds)
        updates = sum(trial.diverged.get(key, trial.updates.get(key, 0)) for key in trial.run_keys)
        self.study.set_attr(trial.number, "updates", updates)

    def _keep(self, trial: TrialProgress, until: float = math.inf) -> None:
        """Each run's last evaluation, at no more than so many updates, and which runs were collapsing at it, kept with
        the trial; and how many episodes its runs have played by then."""
        known = {key: [e for e in evals if e.updates <= until] for key, evals in trial.evaluations.items()}
        last = {key: evals[-1] for key, evals in known.items() if evals}
        self.study.set_attr(trial.number, "run_values", {key: e.objective(trial.metric) for key, e in last.items()})
        self.study.set_attr(
            trial.number, "run_returns",
            {key: sum(e.returns) / len(e.returns) for key, e in last.items() if e.returns},
        )  # fmt: skip
        episodes = sum(len(e.returns) for evals in known.values() for e in evals)
        self.study.set_attr(trial.number, "online_episodes", episodes)
        ratios = {key: trial.collapsing.get(key, {}).get(e.updates) for key, e in last.items()}
        collapsing = {key: ratio for key, ratio in ratios.items() if ratio is not None}
        if collapsing:
            self.study.set_attr(trial.number, COLLAPSING, collapsing)

    def _end(self, trial: TrialProgress) -> None:
        self._dropped |= set(trial.run_keys)
        del self.progress.running[trial.number]
        record = self.study.trial(trial.number)
        if VOID not in record.attrs:
            self._record_ended(record)

    def _record_ended_before(self) -> None:
        """Log the values of the trials that had ended when this driver began, in the order in which they did: a
        metric's steps must ascend. It logs them all again, and the tracker leaves out what it has."""
        ended = [record for record in self._records() if record.finished is not None]
        for record in sorted(ended, key=lambda record: (record.finished, record.number)):
            self._record_ended(record)

    def _record_ended(self, record: TrialRecord) -> None:
        """Log the value of a trial that has ended, behind those that ended before it."""
        told = record.value
        if told is not None and record.state == "complete" and not record.diverged:
            self._best = told if self._best is None else max(self._best, told)
        number = self.confirms[record.number] if self.confirms else record.number
        known = {"trial/number": float(number), "trial/value": told, "trial/best_value": self._best}
        self.spool.metrics(self._recorded, {name: value for name, value in known.items() if value is not None})
        self._recorded += 1

    def _close_runs(self, record: TrialRecord) -> None:
        """End the runs of an ended trial whose learner could not."""
        failed = record.state == "failed"
        status: RunStatus = "FAILED" if failed else "KILLED"
        tags = {"outcome": "failed" if failed else "pruned"}
        elsewhere = self.config.compute.spool_folder is not None
        for seed in self.config.seeds:
            path = self.spool.path.with_name(f"{self._run_key(record.number, seed)}.jsonl")
            if path.exists():
                if (last := last_record(path)) is None or last["type"] in ("end", "close"):
                    continue
                with RunSpool(path.parent, path.stem) as run:
                    run.set_tags(tags)
                    run.end(status)
            elif elsewhere and record.state != "complete":
                with RunSpool(path.parent, path.stem) as run:
                    run.close_run(status, tags)

    def _pack_failed(self, pack: PackSpec, error: Any) -> None:
        """The pack's trials fail; the study goes on, unless nothing works at all."""
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise DiskFullError(f"{error}. Nothing is lost: make room and continue with `offsweep resume`") from error
        if isinstance(error, UserError):
            raise error
        if died(error):
            text = f"pack {pack.pack_id} killed its process {MAX_DEATHS + 1} times at the same place"
            self._fail(pack, RuntimeError(f"{text}: {error!r}"), RuntimeError(f"{text}: {_first_line(error)}"))
            return
        self._fail(pack, RuntimeError(f"pack {pack.pack_id} failed: {error!r}"), error)

    def _fail(self, pack: PackSpec, error: Exception, cause: BaseException | None = None) -> None:
        """The pack's trials fail as soon as another pack has reported something. If several in a row do not, it is not
        theirs: the study stops, and its trials can be gone on with when what ails them is mended."""
        self._failed.append((pack, error, cause))
        if self.study.spec.num_trials == 1 or (isinstance(error, UserError) and not self.study.num_finished):
            raise error from cause
        if len(self._failed) >= FAILURES_IN_A_ROW:
            self._stop(f"{len(self._failed)} packs in a row failed, and none has reported anything in between")

    def _stop(self, why: str) -> None:
        """Nothing works."""
        _, error, cause = self._failed[-1]
        text = f"{why}; the study stops and can be resumed. The last one: {error}"
        raise (UserError(text) if isinstance(error, UserError) else RuntimeError(text)) from cause

    def _gives_up_failed(self) -> bool:
        """When nothing is left to do: whether packs had failed and their trials are failed now; others may follow."""
        if not self._failed:
            return False
        if not self.study.num_finished:
            self._stop("every pack failed")
        self._give_up_failed()
        self._fill()
        return True

    def _give_up_failed(self) -> None:
        """Fail the trials of packs that have failed, since others do not."""
        failed, self._failed = self._failed, []
        for pack, error, cause in failed:
            for number in {run.trial for run in pack.runs}:
                trial = self.progress.running.get(number)
                if trial is None:
                    continue
                with self._unless_taken_over(trial):
                    self._keep(trial)
                    self.study.tell_failed(number, str(error) if cause is None else repr(cause))
                    self._close_runs(self.study.trial(number))
                    self._end(trial)

    def _does_not_fit(self, pack: PackSpec, error: Any) -> None:
        """Memory ran out: two smaller packs go on; a run that is alone already fails."""
        alive = self._alive(pack)
        if len(alive) > 1:
            self.packing.lower(pack.key, (len(alive) + 1) // 2)
            self._queue.extendleft(reversed(self._divide(pack)))
            return
        names = " ".join(run.run_key for run in alive or pack.runs)
        self._fail(pack, UserError(
            f"run {names} does not fit the memory even alone ({str(error).splitlines()[0]}); lower "
            "method.batch_size, method.hidden, method.rollout_batch (its model rows) or compute.num_learners"
        ))  # fmt: skip

    def _bad_value(self) -> float:
        """A finite value that keeps the sampler away from trials that diverged: no better than the worst one told,
        a random policy (score 0) or the worst episode of the data (where no score is known)."""
        told = [r.value for r in self.study.trials() if r.value is not None and math.isfinite(r.value)]
        if self.config.study.objective.metric != SCORE:
            return self._bad_metric(told)
        floor = 0.0
        if reference_scores(evaluation_env(self.config, self.dataset)) is None:
            floor = float(self.dataset.episode_returns().min(initial=math.inf))
            floor = floor if math.isfinite(floor) else 0.0  # of an online dataset nothing is known
        return min([floor, *told])

    def _bad_metric(self, told: Sequence[float]) -> float:
        """The same in the unit of an offline metric: the worst value told, or the least that rewards of the data add up
        to."""
        rewards = self.dataset.scaling.rewards(self.dataset.rewards)
        lowest, objective = min(float(rewards.min()), 0.0), self.config.study.objective
        steps = objective.horizon if objective.metric == "model_return" else 1 / (1 - self.config.method.gamma)
        return min([*told, lowest * steps])


def whole(pack: PackSpec, report: PackReport) -> bool:
    """Whether every run of a pack was trained to its end."""
    ends = [done[-1].updates if done else 0 for done in report.evaluations.values()]
    return not report.diverged and ends == [report.updates] * len(pack.runs)


def run_key(trial: int, seed: int, kind: str = "t") -> str:
    """The identity of a run in its study; `kind` is c in a confirm stage, where `trial` is the search's."""
    return f"{kind}{trial:04d}-s{seed}"


def _first_line(error: Any) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
