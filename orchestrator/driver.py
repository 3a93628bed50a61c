"""The driver: asks the study for trials, packs their runs, keeps the learners busy and tells the study what came of it.

It holds nothing that a kill could lose: trials are in the study's journal, packs in `packs/<id>/pack.json` and their
checkpoints, metrics in the spool. `Driver.run` on a resumed study takes up the running trials where they were.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.method import Stage, load_method
from envs.dataset import Dataset
from envs.errors import UserError
from envs.scores import reference_scores
from orchestrator.artifacts import ArtifactStore, save_json, stage_key
from orchestrator.cluster import Slots
from orchestrator.config import Config, digest, load_config, pack_key, run_config, to_dict
from orchestrator.learner import Evaluation, PackReport, PackSpec, RunSpec, evaluation_env
from orchestrator.spool import RunSpool, read_records
from sweeps.study import Study, TrialRecord, TrialTicket

MAX_DEATHS = 10  # of a learner's process while the same pack makes no progress
MAX_TOGETHER = 16  # stages built in one go, whose memory adds up


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
    run_keys: list[str]
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    diverged: dict[str, int] = field(default_factory=dict)
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
        values = [e.value for key in self.run_keys for e in self.evaluations[key] if e.updates == step]
        return sum(values) / len(values)

    def final_value(self, last: int) -> float:
        """Mean over runs of each run's mean over its last evaluations."""
        finals = [[e.value for e in self.evaluations[key]][-last:] for key in self.run_keys]
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

    def updates_done(self) -> float:
        """Run-updates done or no longer needed."""
        total = self.config.method.num_updates * self.config.num_seeds
        ended = self.study.num_finished * total
        return ended + sum(sum(trial.updates.values()) for trial in self.running.values())

    def updates_planned(self) -> float:
        return self.study.spec.num_trials * self.config.method.num_updates * self.config.num_seeds


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
    ) -> None:
        self.config, self.study, self.dataset, self.slots = config, study, dataset, slots
        self.tags, self.on_change = tags, on_change
        self.spool = spool
        self.progress = Progress(config, study, {}, time.monotonic())
        self._queue: deque[PackSpec] = deque()
        self._busy: dict[int, PackSpec | tuple[str, ...]] = {}  # slot -> pack, or keys of the stages being built
        self._dropped: set[str] = set()  # runs that are no longer wanted
        self._deaths: dict[str, int] = {}
        self._store = ArtifactStore(Path(config.workdir) / "artifacts")
        stages = load_method(config.method_name).stages(config.method)
        self._base_keys = {name: stage_key(stage, dataset.content_hash) for name, stage in stages.items()}
        self._ready_stages: set[str] = set()  # whose building is recorded, too
        self._recorded = 0  # ended trials whose value is in the spool
        self._waiting: dict[str, list[PackSpec]] = {}  # stage key -> packs that need it
        self._failures_in_a_row = 0

    def run(self) -> None:
        """Until every trial has ended."""
        self._resume()
        self.progress.done_at_start = self.progress.updates_done()
        self._fill()
        while self._busy:
            self.on_change(self.progress)
            for slot, result in self.slots.wait(timeout=1.0):
                self._handle(slot, result)
                self._fill()
        self.on_change(self.progress)

    # ---- what to run ----------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Queue the packs of trials that a dead driver left running."""
        tickets = {ticket.number: ticket for ticket in self.study.unfinished()}
        for params in self.config.study.enqueue:
            self.study.enqueue(params)
        # the dead driver may have told the study how a trial ended, and nobody else
        for record in self.study.trials():
            if record.finished is not None:
                self._close_runs(record)
        self._record_ended()
        packs: dict[str, PackSpec] = {}
        fresh: list[TrialTicket] = []
        for ticket in tickets.values():
            paths = [self._pack_file(pack_id) for pack_id in ticket.attrs.get("packs", [])]
            if not paths or not all(path.exists() for path in paths):
                fresh.append(ticket)
                continue
            self._track(ticket)
            for path in paths:
                pack = PackSpec.from_json(json.loads(path.read_text()))
                packs[pack.pack_id] = pack
        for pack in packs.values():
            self._dropped |= {run.run_key for run in pack.runs if run.trial not in tickets}
            self._queue.append(pack)
        if fresh:
            self._queue.extend(self._make_packs(fresh))

    def _fill(self) -> None:
        """Give every idle slot something to do."""
        for slot in range(self.slots.size):
            while slot not in self._busy and self._next(slot):
                pass

    def _next(self, slot: int) -> bool:
        """Start one thing in a slot, or move a pack to those that wait; whether anything was there."""
        if not self._queue:
            if self._waiting:  # for a stage that another slot builds; further trials would be asked for blindly
                return False
            tickets = self._ask()
            if not tickets:
                return False
            self._queue.extend(self._make_packs(tickets))
        if not self._queue:
            return True  # all of them were refused: ask again
        pack = self._queue.popleft()
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

    def _ask(self) -> list[TrialTicket]:
        """As many trials as fill a pack."""
        per_pack = self.config.compute.runs_per_pack or self.config.num_seeds
        tickets = []
        for _ in range(max(1, per_pack // self.config.num_seeds)):
            ticket = self.study.ask()
            if ticket is None:
                break
            tickets.append(ticket)
        return tickets

    def _make_packs(self, tickets: Sequence[TrialTicket]) -> list[PackSpec]:
        """Group the runs of some trials by pack key, and write the packs down before anything is trained."""
        groups: dict[str, list[RunSpec]] = {}
        for ticket in tickets:
            try:
                runs = [run_config(self.config, ticket.active, seed) for seed in self.config.seeds]
            except UserError as error:
                # a combination that the method refuses says something about its parameters
                self.study.set_attr(ticket.number, "failure", str(error))
                self.study.tell_diverged(ticket.number, self._bad_value())
                self._record_ended()
                continue
            for run in runs:
                key = run_key(ticket.number, run.seed)
                tags = {**self.tags, "study": self.study.spec.name}
                groups.setdefault(pack_key(run), []).append(RunSpec(key, ticket.number, run.seed, to_dict(run), tags))
        limit = self.config.compute.runs_per_pack or max(self.config.num_seeds, 1)
        packs = []
        for runs_of_group in groups.values():
            for i in range(0, len(runs_of_group), limit):
                chunk = tuple(runs_of_group[i : i + limit])
                pack_id = f"{chunk[0].run_key}-x{len(chunk)}-{digest([r.run_key for r in chunk])[:6]}"
                packs.append(PackSpec(pack_id, str(self.study.folder), chunk))
        for pack in packs:
            save_json(self._pack_file(pack.pack_id), pack.to_json())
        for ticket in tickets:
            mine = [p.pack_id for p in packs if any(run.trial == ticket.number for run in p.runs)]
            if mine:
                self.study.set_attr(ticket.number, "packs", mine)
                self._track(ticket)
        return packs

    def _pack_file(self, pack_id: str) -> Path:
        return self.study.folder / "packs" / pack_id / "pack.json"

    def _track(self, ticket: TrialTicket) -> None:
        keys = [run_key(ticket.number, seed) for seed in self.config.seeds]
        # a driver may have died between the last report and the pruner's answer: that step is judged again
        judged = max(sorted(self.study.trials()[ticket.number].intermediate)[:-1], default=-1)
        self.progress.running[ticket.number] = TrialProgress(ticket.number, dict(ticket.active), keys, judged=judged)

    def _missing_stage(self, pack: PackSpec) -> MissingStage | None:
        """The first stage that has to be built before the pack can start."""
        config = pack.runs[0].config
        run = load_config([config], [])
        for name, stage in load_method(run.method_name).stages(run.method).items():
            key = stage_key(stage, self.dataset.content_hash)
            if key in self._ready_stages:
                continue
            if not self._store.exists(stage.kind, key):
                return MissingStage(name, key, stage, config)
            self._ready_stages.add(key)
            history = self._store.description(stage.kind, key).get("history", [])
            label = name if key == self._base_keys.get(name) else f"{name}-{key[:6]}"
            for step, metrics in history:
                self.spool.metrics(step, {f"{label}/{k}": v for k, v in metrics.items()})
        return None

    def _advance(self, slot: int, pack: PackSpec) -> None:
        self._busy[slot] = pack
        dropped = [run.run_key for run in pack.runs if run.run_key in self._dropped]
        self.slots.submit(slot, "advance", pack, dropped)

    # ---- what came of it ------------------------------------------------------------------------------------------

    def _handle(self, slot: int, result: Any) -> None:
        job = self._busy.pop(slot)
        if isinstance(job, tuple):
            self._stages_ended(job, result)
        elif isinstance(result, PackReport):
            self._failures_in_a_row = 0
            self._deaths.pop(job.pack_id, None)
            self._take(result)
            if not result.finished:
                self._advance(slot, job)
        elif _process_died(result) and self._deaths.get(job.pack_id, 0) < MAX_DEATHS:
            # the actor comes back and takes the pack up from its checkpoint
            self._deaths[job.pack_id] = self._deaths.get(job.pack_id, 0) + 1
            time.sleep(0.5)
            self._advance(slot, job)
        else:
            self._pack_failed(job, result)

    def _stages_ended(self, keys: tuple[str, ...], result: Any) -> None:
        """Queue the packs that waited for stages, or end their trials.

        Args:
            result: for each stage why it could not be built, or None; or what the whole call raised.
        """
        if not any(isinstance(job, tuple) for job in self._busy.values()):
            self.progress.stage = None
        failures: Sequence[UserError | None] = [None] * len(keys)
        if _process_died(result) and self._deaths.get(keys[0], 0) < MAX_DEATHS:
            self._deaths[keys[0]] = self._deaths.get(keys[0], 0) + 1
        elif isinstance(result, UserError):
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

    def _take(self, report: PackReport) -> None:
        """Tell the study what a pack reported; decide what goes on."""
        for key, evaluations in report.evaluations.items():
            trial = self._trial_of(key)
            if trial is not None:
                trial.evaluations[key] = evaluations
                trial.updates[key] = report.updates
        for key, updates in report.diverged.items():
            trial = self._trial_of(key)
            if trial is not None:
                trial.diverged[key] = updates
        for key in report.evaluations if report.finished else ():
            trial = self._trial_of(key)
            if trial is not None:
                trial.finished.add(key)
        for trial in list(self.progress.running.values()):
            self._judge(trial)

    def _judge(self, trial: TrialProgress) -> None:
        number = trial.number
        for step in trial.common_steps():
            if step <= trial.judged:
                continue
            trial.judged = step
            self.study.report(number, step, trial.value_at(step))
            if step < self.config.method.num_updates and self.study.should_prune(number):
                # what evaluators have found out beyond this step would not be known without them
                self._keep(trial, until=step)
                self.study.tell_pruned(number)
                self._end(trial)
                return
        # every common step comes before a run diverged, so it is judged first, however late its evaluation came in
        if trial.diverged:
            self._keep(trial)
            self.study.tell_diverged(number, self._bad_value())
            self._end(trial)
            return
        if trial.finished == set(trial.run_keys):
            self._keep(trial)
            self.study.tell(number, trial.final_value(self.config.study.objective_evaluations))
            self._end(trial)

    def _keep(self, trial: TrialProgress, until: float = math.inf) -> None:
        """Each run's last evaluation, at no more than so many updates, kept with the trial."""
        known = {key: [e for e in evals if e.updates <= until] for key, evals in trial.evaluations.items()}
        last = {key: evals[-1] for key, evals in known.items() if evals}
        self.study.set_attr(trial.number, "run_values", {key: e.value for key, e in last.items()})
        self.study.set_attr(
            trial.number, "run_returns", {key: sum(e.returns) / len(e.returns) for key, e in last.items()}
        )

    def _end(self, trial: TrialProgress) -> None:
        self._dropped |= set(trial.run_keys)
        del self.progress.running[trial.number]
        self._record_ended()

    def _record_ended(self) -> None:
        """Log the values of the trials that have ended, in the order in which they did: a metric's steps must ascend.

        A resumed driver logs them all again, and the tracker leaves out what it has.
        """
        ended = [record for record in self.study.trials() if record.finished is not None]
        ended.sort(key=lambda record: (record.finished, record.number))
        for i in range(self._recorded, len(ended)):
            values = {"trial/number": float(ended[i].number)}
            told = ended[i].value
            if told is not None:
                values["trial/value"] = told
            good = [r.value for r in ended[: i + 1] if r.state == "complete" and not r.diverged and r.value is not None]
            if good:
                values["trial/best_value"] = max(good)
            self.spool.metrics(i, values)
        self._recorded = len(ended)

    def _close_runs(self, record: TrialRecord) -> None:
        """End the runs of an ended trial whose learner could not."""
        failed = record.state == "failed"
        for seed in self.config.seeds:
            path = self.spool.path.with_name(f"{run_key(record.number, seed)}.jsonl")
            if not path.exists() or [r for r, _ in read_records(path) if r][-1]["type"] == "end":
                continue
            with RunSpool(path.parent, path.stem) as run:
                run.set_tags({"outcome": "failed" if failed else "pruned"})
                run.end("FAILED" if failed else "KILLED")

    def _pack_failed(self, pack: PackSpec, error: Any) -> None:
        """The pack's trials fail; the study goes on, unless nothing works at all."""
        self._failures_in_a_row += 1
        if isinstance(error, UserError):
            raise error
        if self._failures_in_a_row >= 3 or not self.study.num_finished:
            raise RuntimeError(f"pack {pack.pack_id} failed: {error!r}") from error
        for number in {run.trial for run in pack.runs}:
            trial = self.progress.running.get(number)
            if trial is not None:
                self.study.tell_failed(number, repr(error))
                self._close_runs(self.study.trials()[number])
                self._end(trial)

    def _trial_of(self, key: str) -> TrialProgress | None:
        return self.progress.running.get(int(key[1:].partition("-")[0]))

    def _bad_value(self) -> float:
        """A finite value that keeps the sampler away from trials that diverged: no better than the worst one told,
        a random policy (score 0) or the worst episode of the data (where no score is known)."""
        told = [r.value for r in self.study.trials() if r.value is not None and math.isfinite(r.value)]
        floor = 0.0
        if reference_scores(evaluation_env(self.config, self.dataset)) is None:
            floor = float(self.dataset.episode_returns().min())
        return min([floor, *told])


def run_key(trial: int, seed: int) -> str:
    """The identity of a run in its study; `Driver._trial_of` reads the trial back."""
    return f"t{trial:04d}-s{seed}"


def _process_died(result: Any) -> bool:
    if not isinstance(result, BaseException):
        return False
    from ray.exceptions import RayActorError

    return isinstance(result, RayActorError)
