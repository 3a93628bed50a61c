"""The learner: trains one pack, epoch by epoch, and can be killed at any moment.

Everything it knows is in its checkpoint, written atomically at epoch boundaries. All randomness follows from seeds and
epoch numbers, so a learner that continues from a checkpoint repeats the epochs after it bit for bit, and what it logs
again is recognised by its step.

Where there are evaluators, training goes on while they run episodes. When an evaluation is taken in depends on nothing
but its number (`MAX_PENDING`), so that what follows from it, such as a run that is pruned and leaves its pack, happens
at the same update every time. Likewise for what a method has generated ahead (`agents.method.JobsAhead`), where there
are rollout workers: it is taken in at the epoch that the method says, whenever it is ready.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from agents.cpu import configure_cpu
from agents.cross_domain import CrossDomain, CrossDomainConfig
from agents.diagnostics import collapse, expert_value, growth_metrics
from agents.method import Method, RolloutResult, Stage, TrainingData, effective_settings, load_method
from agents.policies import in_environment
from envs.dataset import Dataset
from envs.episodes import make_env
from envs.errors import UserError
from envs.files import write_atomically
from envs.scores import normalized_score, reference_scores
from orchestrator import memory
from orchestrator.absence import note_begun
from orchestrator.artifacts import (
    ArtifactStore,
    Built,
    save_json,
    save_tensors,
    stage_key,
    write_arrays,
    write_text,
)
from orchestrator.checkpoints import Checkpoints, storage_of
from orchestrator.config import (
    ComputeConfig,
    Config,
    apply_params,
    identity,
    load_config,
    settings_hash,
    stages_of,
    to_dict,
    to_yaml,
)
from orchestrator.hashing import digest
from orchestrator.node_tracking import place_of, unsent_lines
from orchestrator.offline_metrics import OfflineMetric, offline_metric
from orchestrator.population import HISTORY_FILE, SCHEDULE_FILE, Population, write_schedule
from orchestrator.profiling import TABLE, EpochProfile
from orchestrator.run_log import ARTIFACT_FOLDER, RunLogs
from orchestrator.schedule import scheduled_keys, settings_at, settings_of
from orchestrator.spool import DatasetRecord, RunInfo, RunSpool, RunStatus, SpoolError, spool_folder
from orchestrator.workers import Workers
from sweeps import plots
from sweeps.objectives import SCORE

CHECKPOINT_VERSION = 4
MAX_PENDING = 2  # evaluations of a pack under way in evaluators while it trains
PACK_FILE = "pack.json"
EVALUATIONS_FILE = "evaluations.json"  # of a run's folder: every evaluation so far, with the return of every episode


@dataclass(frozen=True)
class RunSpec:
    """One run of a pack."""

    run_key: str
    trial: int
    seed: int
    config: dict[str, Any]  # the run's resolved configuration, as `orchestrator.config.to_dict` gives it
    tags: dict[str, str]


@dataclass(frozen=True)
class PackSpec:
    """Everything a learner needs to train a pack, plain enough for JSON."""

    pack_id: str
    study_folder: str
    runs: tuple[RunSpec, ...]
    key: str = ""  # the runs' pack key
    parent: str | None = None  # id of a pack that held these runs, too: training goes on from its checkpoint
    children: tuple[str, ...] = ()  # ids of the packs that took this one's place
    q_bound: float | None = None  # a run with a mean Q above so many times `value_bound` has diverged; None: none has
    population: dict[str, Any] | None = None  # of runs that learn from each other (see `orchestrator.population`)

    @property
    def folder(self) -> Path:
        return Path(self.study_folder) / "packs" / self.pack_id

    def checkpoints(self, storage: str | None = None) -> Checkpoints:
        """Its checkpoints.

        Args:
            storage: `compute.checkpoints`.
        """
        return Checkpoints(self.folder, storage_of(storage, self.study_folder, self.pack_id))

    def to_json(self) -> dict[str, Any]:
        # not `asdict`, which copies the configuration of every run
        return {**vars(self), "runs": [vars(run) for run in self.runs]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PackSpec:
        runs = tuple(RunSpec(**run) for run in content["runs"])
        return cls(**{**content, "runs": runs, "children": tuple(content.get("children", ()))})

    @classmethod
    def load(cls, study_folder: str | Path, pack_id: str) -> PackSpec:
        """As it was written down by `save`."""
        return cls.from_json(json.loads((Path(study_folder) / "packs" / pack_id / PACK_FILE).read_text()))

    def save(self) -> None:
        # on one line: with line breaks it would take ten times as long, and a study has thousands
        write_text(self.folder / PACK_FILE, json.dumps(self.to_json(), default=str) + "\n")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one run."""

    updates: int
    value: float | None  # score, or mean return where no reference pair is known; None without episodes
    returns: list[float]  # of every episode
    offline: dict[str, float] = field(default_factory=dict)  # metrics of the data alone, by name

    def objective(self, metric: str) -> float:
        """What the study is told.

        Args:
            metric: of its objective: "score", or the name of an offline one.
        """
        value = self.value if metric == SCORE else self.offline[metric]
        assert value is not None  # the configuration has been checked
        return value


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of one run at one evaluation."""

    updates: int
    metrics: dict[str, float]  # reach/* and model/*
    samples: dict[str, list[float]] = field(default_factory=dict)  # for a figure, of the run's last diagnosis only


@dataclass(frozen=True)
class PackReport:
    """How a pack stands after `Learner.advance`.

    With evaluators the last `MAX_PENDING` evaluations may be missing until the pack has finished.
    """

    pack_id: str
    updates: int
    finished: bool
    evaluations: dict[str, list[Evaluation]]  # run key -> all that have been taken in, in the order of updates
    diverged: dict[str, int] = field(default_factory=dict)  # run key -> updates
    cost: PackCost | None = None  # if this process has trained all of it so far
    # run key -> updates -> mean Q over an expert's value, of the evaluations at which the run was collapsing
    collapsing: dict[str, dict[int, float]] = field(default_factory=dict)
    node: str = ""  # host that it is trained on
    updates_per_second: float = 0.0  # of all its runs, since the report before
    steps_per_second: float = 0.0  # transitions that rollouts, pools and environments gave for learning, likewise
    # of a finished pack with a spool folder on the machine's own disk: which, and by run key what is not sent yet
    unsent_from: str = ""
    unsent: dict[str, str] = field(default_factory=dict)
    trouble: str = ""  # why a checkpoint is not where `compute.checkpoints` wants it, since the report before


@dataclass(frozen=True)
class PackCost:
    """What a pack took from its beginning, in one process."""

    seconds: float  # of wall clock, at work
    cpu_seconds: float  # of the processor, all threads of the process
    memory: int  # bytes, the most by which the process grew


@dataclass(frozen=True)
class PendingEvaluation:
    """An evaluation whose returns have not been taken in yet."""

    updates: int  # at which the policies were taken
    policies: dict[str, dict[str, np.ndarray]]  # run key -> arrays of a policy file
    collect: Callable[[], list[np.ndarray]]  # waits for the returns of every policy
    offline: dict[str, dict[str, float]] = field(default_factory=dict)  # run key -> metrics of the data alone


@dataclass(frozen=True)
class PendingRollouts:
    """Jobs ahead that rollout workers are at."""

    runs: tuple[str, ...]  # run keys of the members that the jobs name
    collect: Callable[[], list[RolloutResult]]  # waits for the results

    def results_of(self, alive: Sequence[str]) -> list[RolloutResult]:
        """The results, of the runs that are still there, as members of their pack."""
        place = {self.runs.index(key): m for m, key in enumerate(alive)}
        return [part for result in self.collect() if (part := result.renumbered(place)).members]


def target_of(config: Config) -> str | None:
    """The Gymnasium id of the target domain, of cross-domain methods."""
    return config.method.target if isinstance(config.method, CrossDomainConfig) else None


def evaluation_env(config: Config, dataset: Dataset) -> str:
    """The Gymnasium id of the environment that policies are evaluated in."""
    return config.evaluation.env_id or target_of(config) or dataset.env_id


def action_bounds(env_id: str) -> tuple[np.ndarray, np.ndarray]:
    """The environment's action bounds, `(A,)` each."""
    env = make_env(env_id)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    env.close()
    return low, high


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device=cuda, but torch sees no GPU here; use compute.device=auto")
    return torch.device(device)


def value_bound(data: TrainingData, gamma: float) -> float | None:
    """max |r| / (1 - gamma): no policy's value is beyond it with rewards like those of the data; None without rows, or
    where nothing is discounted."""
    if not len(data.rewards) or gamma >= 1:
        return None
    return float(data.rewards.abs().max()) / (1.0 - gamma) or None


def training_data(dataset: Dataset, device: torch.device) -> TrainingData:
    return TrainingData.from_dataset(dataset, *action_bounds(dataset.env_id), device)


class Learner:
    """Trains the runs of a pack that are still alive.

    Args:
        pack: what to train; if it has a checkpoint, training goes on from there.
        compute: threads, device, checkpoint interval and whether an epoch is profiled.
        workers: where rollouts and evaluations are computed.
        dataset: what the runs learn from.
    """

    def __init__(self, pack: PackSpec, compute: ComputeConfig, workers: Workers, dataset: Dataset) -> None:
        self.pack, self.compute, self.workers, self.dataset = pack, compute, workers, dataset
        self.device = resolve_device(compute.device)
        self.configs = [load_config([run.config], []) for run in pack.runs]
        config = self.configs[0]
        self.env_id = evaluation_env(config, self.dataset)
        self.reference = reference_scores(self.env_id)
        data = training_data(self.dataset, self.device)
        self._action_low, self._action_high = action_bounds(self.env_id)
        self.method = self._make_method(self.configs, pack.runs, data, self.device)
        self._highest_q = math.inf
        # what a method has made of the data: it may scale rewards itself. In two domains rewards are of neither alone
        learned_from, gamma = getattr(self.method, "data", data), getattr(config.method, "gamma", 1.0)
        if pack.q_bound is not None and not isinstance(self.method, CrossDomain):
            self._highest_q = pack.q_bound * (value_bound(learned_from, gamma) or math.inf)
        self._offline: OfflineMetric | None = offline_metric(config, data, self.dataset.content_hash)
        self.alive = [run.run_key for run in pack.runs]
        self.epoch = 0
        self.evaluations: dict[str, list[Evaluation]] = {run.run_key: [] for run in pack.runs}
        self.diverged: dict[str, int] = {}
        self.diagnoses: dict[str, list[Diagnosis]] = {run.run_key: [] for run in pack.runs}
        self.expert_value = expert_value(self.dataset.env_id, config.method.gamma, self.dataset.scaling)
        self.num_epochs = config.method.num_epochs
        # of every run, what can change while it trains: as it begins, and as it is
        self._initial = {
            run.run_key: settings_of(c, scheduled_keys(c) if pack.population is None else pack.population["space"])
            for run, c in zip(pack.runs, self.configs, strict=True)
        }
        self._in_force = dict(self._initial)
        self.population = None if pack.population is None else Population(pack.population, self._initial)
        self.lost: dict[str, int] = {}  # runs of a population that have diverged and wait to be replaced -> updates
        self._pending: list[PendingEvaluation] = []
        self._rollouts_ahead: PendingRollouts | None = None
        self.checkpoints = pack.checkpoints(compute.checkpoints)
        self._trouble = ""  # with their storage
        self._saved_at = time.monotonic()
        self._seconds_waited = self._seconds_saving = 0.0  # since they were logged last
        self.run_updates = self.steps = 0.0  # of all runs, in this process; steps: transitions given for learning
        self._domain_steps: dict[str, float] = {}  # run key -> as last logged
        folder = spool_folder(pack.study_folder, compute.spool_folder)
        self._spools = {run.run_key: RunSpool(folder, run.run_key) for run in pack.runs}
        self.logs = logs_of(pack)
        self._restore()
        self._first_epoch = self.epoch
        self._profiles = compute.profile and not (self.profile_folder / TABLE).exists()
        self.logs.say(
            f"{f'goes on at update {self.updates}' if self.epoch else 'begins'}, of pack {pack.pack_id} on "
            f"{socket.gethostname()}, process {os.getpid()}, {self.device}, {compute.threads} threads, torch "
            f"{torch.__version__}", self.alive,
        )  # fmt: skip
        for run, run_config in zip(pack.runs, self.configs, strict=True):
            if run.run_key in self.alive:
                self._announce(run, run_config)

    @property
    def updates(self) -> int:
        return self.epoch * self.configs[0].method.updates_per_epoch

    def _make_method(
        self, configs: Sequence[Config], runs: Sequence[RunSpec], data: TrainingData, device: torch.device
    ) -> Method:
        config = configs[0]
        store = ArtifactStore(Path(config.workdir) / "artifacts")
        cls = load_method(config.method_name)
        artifacts = {
            name: store.load(stage.kind, stage_key(stage, self.dataset.content_hash))
            for name, stage in cls.stages(config.method).items()
        }
        method = cls([c.method for c in configs], [run.seed for run in runs], data, artifacts, device)
        if isinstance(method, CrossDomain):
            method.start_jobs = self.workers.start_interaction
        return method

    def config_of(self, run_key: str) -> Config:
        """The configuration that a run begins with."""
        return self.configs[[run.run_key for run in self.pack.runs].index(run_key)]

    @property
    def profile_folder(self) -> Path:
        return self.pack.folder / "profile"

    def run_folder(self, run_key: str) -> Path:
        return Path(self.pack.study_folder) / "runs" / run_key

    # ---- training -----------------------------------------------------------------------------------------------

    def advance(self, dropped: Sequence[str] = ()) -> PackReport:
        """Train until the next evaluation or the end.

        Without evaluators the report includes that evaluation. With them it includes those up to the one
        `MAX_PENDING` before it, for which the learner waits here if it must; the last report is complete.

        Args:
            dropped: keys of runs that are no longer wanted (all so far; those already gone are ignored). Their pending
                evaluations are not taken in.
        """
        self._drop([key for key in (*self.alive, *self.lost) if key in dropped], "KILLED", "pruned")
        every = self.configs[0].evaluation.every_epochs
        while self.alive and self.epoch < self.num_epochs:
            last = self.epoch + 1 == self.num_epochs
            due = last or (self.epoch + 1) % every == 0
            with self._profiled(due) as profiled:
                self._change_settings()
                self._train_epoch()
                if due and self.alive:
                    # a population's next turn needs all of them
                    ahead = self.workers.evaluates_elsewhere and self.population is None
                    self._evaluate(MAX_PENDING if ahead else 0)
                # a checkpoint belongs to what a profile shows
                self._save(force=last or profiled)
            if due and not last:
                self._log_waiting()
                break
        finished = not self.alive or self.epoch == self.num_epochs
        if finished:
            self._take_evaluations(0)
            lost, self.lost = self.lost, {}  # nobody comes to replace them
            self.diverged |= lost
            self._drop(list(lost), "FAILED", "diverged")
        if finished and self.alive:
            self._log_waiting()
            self._finish()
        collapsing = {
            key: {d.updates: ratio for d in known if (ratio := collapse(d.metrics)) is not None}
            for key, known in self.diagnoses.items()
        }
        trouble, self._trouble = self._trouble, ""
        return PackReport(
            self.pack.pack_id, self.updates, finished, dict(self.evaluations), dict(self.diverged), None, collapsing,
            trouble=trouble,
        )  # fmt: skip

    # ---- settings that change -----------------------------------------------------------------------------------

    def _change_settings(self) -> None:
        """Give the runs the settings that are due before the next epoch, and those that a population replaces the state
        of their parents."""
        unchanged = {key: key for key in self.alive}
        parents = self._turn() or unchanged
        due = {key: self._settings_due(key) for key in parents}
        self._log_settings(due)
        if parents == unchanged and all(due[key] == self._in_force[key] for key in parents):
            return
        # a new pack goes on from the old one's state: all that follows from settings is made anew
        state = self.method.select([self.alive.index(parent) for parent in parents.values()]).state_dict()
        del self.method
        members = [i for i, run in enumerate(self.pack.runs) if run.run_key in parents]
        runs = [self.pack.runs[i] for i in members]
        configs = [apply_params(self.configs[i], due[self.pack.runs[i].run_key]) for i in members]
        self.method = self._make_method(configs, runs, training_data(self.dataset, self.device), self.device)
        self.method.load_state_dict(state)
        self.alive = [run.run_key for run in runs]
        self._in_force |= due
        self._rollouts_ahead = None  # what was asked for of those before
        self._start_ahead()

    def _settings_due(self, key: str) -> dict[str, Any]:
        """What a run is trained with from now on, of what can change."""
        if self.population is not None:
            return self.population.settings[key]
        return self._initial[key] | settings_at(self.config_of(key).schedule, self.updates)

    def _turn(self) -> dict[str, str]:
        """Where a turn of the population is due: of every run, in the pack's order, the one whose state it goes on
        from."""
        if self.population is None or not self.population.is_due(self.epoch, self.configs[0].evaluation.every_epochs):
            return {}
        metric = self.configs[0].study.objective.metric
        values: dict[str, float | None] = {key: self.evaluations[key][-1].objective(metric) for key in self.alive}
        parents = self.population.turn(self.updates, {**values, **dict.fromkeys(self.lost)})
        self.lost = {}
        for key, parent in parents.items():
            if key != parent:
                self._spools[key].set_tags({"parent": self._name(parent)})
        return parents

    def _log_settings(self, due: Mapping[str, Mapping[str, Any]]) -> None:
        """Log the settings that begin to hold now."""
        kind = "schedule" if self.population is None else "pbt"
        for key, settings in due.items():
            begin = [0, *(e["updates"] for e in self.config_of(key).schedule)]
            if self.population is not None:
                begin = [step["updates"] for step in self.population.histories[key]]
            if settings and self.updates in begin:
                values = {f"{kind}/{name.removeprefix('method.')}": float(value) for name, value in settings.items()}
                self._spools[key].metrics(self.updates, values)

    def _train_epoch(self) -> None:
        started = time.perf_counter()
        with record_function("rollouts"):
            results = self._rollouts_due()
            computing = sum(result.seconds for result in results)
            metrics = dict(zip(self.alive, self.method.add_rollouts(results), strict=True))
            del results
        rolled_out = time.perf_counter()
        # where no model row could be kept there is nothing to learn from
        self._log_and_diverge(metrics, only_diverged=True)
        if not self.alive:
            return
        with record_function("rollouts"):
            self.method.ask_ahead(self.epoch)
            self._start_ahead()
        updating = time.perf_counter()
        with record_function("updates"):
            trained = dict(zip(self.alive, self.method.train_epoch(self.epoch), strict=True))
        seconds = time.perf_counter() - updating
        self.epoch += 1
        self._count(metrics, trained)
        timing = {
            "time/updates_per_second": self.configs[0].method.updates_per_epoch / seconds,
            "time/update_seconds": seconds,
            "time/rollout_seconds": rolled_out - started,  # that learning waited
            "time/rollout_computing_seconds": computing,  # of all processes, before or after that
            "time/checkpoint_seconds": self._seconds_saving,  # of the epochs before
        }
        self._seconds_saving = 0.0
        self._log_and_diverge({key: {**metrics[key], **values, **timing} for key, values in trained.items()})

    def _count(self, rolled: Mapping[str, Mapping[str, float]], trained: Mapping[str, Mapping[str, float]]) -> None:
        """Add an epoch's updates, and the transitions that were given for it."""
        self.run_updates += len(trained) * self.configs[0].method.updates_per_epoch
        for values in rolled.values():
            self.steps += values.get("rollout/transitions", 0.0) + values.get("synthetic/transitions", 0.0)
        for key, values in trained.items():
            taken = values.get("domain/source_steps", 0.0) + values.get("domain/target_steps", 0.0)
            self.steps += max(0.0, taken - self._domain_steps.get(key, taken))
            self._domain_steps[key] = taken

    def unsent(self) -> dict[str, str]:
        """What is logged on this machine's own disk and not sent yet, by run key; nothing in the study's folder."""
        return {} if self.compute.spool_folder is None else unsent_lines(self._spools)

    def _rollouts_due(self) -> list[RolloutResult]:
        """What this epoch's updates need: waits for it."""
        jobs, results = self.method.rollout_jobs(self.epoch), []
        if jobs:
            results = self.workers.rollouts(jobs, self.method.rollout_model)
        ahead = self.method.jobs_ahead
        if ahead is None or ahead.due != self.epoch:
            return results
        if self._rollouts_ahead is None:  # nobody was there to make them in the meantime
            return results + self.workers.rollouts(ahead.jobs, self.method.rollout_model)
        pending, self._rollouts_ahead = self._rollouts_ahead, None
        return results + pending.results_of(self.alive)

    def _start_ahead(self) -> None:
        """Hand what the method generates ahead to the rollout workers, if there are any and they do not have it."""
        ahead = self.method.jobs_ahead
        if ahead is None or self._rollouts_ahead is not None or not self.workers.rolls_out_elsewhere(self.device):
            return
        collect = self.workers.start_rollouts(ahead.jobs, self.method.rollout_model)
        self._rollouts_ahead = PendingRollouts(tuple(self.alive), collect)

    def _log_and_diverge(self, metrics: Mapping[str, Mapping[str, float]], only_diverged: bool = False) -> None:
        """Log each run's metrics at the current number of updates; stop the runs with one that is not finite, or with
        values beyond all bounds."""
        diverged = [
            key for key, values in metrics.items()
            if not all(map(math.isfinite, values.values())) or values.get("train/q_mean", 0.0) > self._highest_q
        ]  # fmt: skip
        with record_function("logging"):
            for key in diverged if only_diverged else metrics:
                self._spools[key].metrics(self.updates, metrics[key])
        for key in diverged:
            bad = {name: value for name, value in metrics[key].items() if not math.isfinite(value)}
            bad = bad or {"train/q_mean": metrics[key]["train/q_mean"]}
            why = ", ".join(f"{name}={value:g}" for name, value in bad.items())
            self.logs.say(f"diverges at update {self.updates}: {why}", [key])
        self._diverge_now(diverged)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _evaluate(self, left: int) -> None:
        """Begin to evaluate the policies as they are; take evaluations in until no more than `left` are pending."""
        with record_function("evaluation"):
            policies = {key: self._policy(m) for m, key in enumerate(self.alive)}
        # the last update of an epoch can spoil a policy behind the last look at its statistics
        self._diverge_now([key for key, policy in policies.items() if not _finite(policy)])
        with record_function("evaluation"):
            policies = {key: policies[key] for key in self.alive}
            offline = self._offline_metrics() if self.alive else {}
            self._start_evaluation(self.updates, policies, offline)
        if self.alive and self.configs[0].evaluation.diagnostics:
            with record_function("diagnostics"):
                self._diagnose()
        self._take_evaluations(left)

    def _diagnose(self) -> None:
        """Measure the runs as they are."""
        started = time.perf_counter()
        measured = self.method.diagnostics(self.epoch)
        seconds = time.perf_counter() - started
        for key, measures in zip(self.alive, measured, strict=True):
            if not measures:
                continue
            metrics = {name: value for name, value in measures.items() if not isinstance(value, list)}
            samples = {name: value for name, value in measures.items() if isinstance(value, list)}
            known = self.diagnoses[key]
            known[-1:] = [replace(d, samples={}) for d in known[-1:]]
            if "reach/q_mean" in metrics:
                means = [(d.updates, d.metrics["reach/q_mean"]) for d in known if "reach/q_mean" in d.metrics]
                now = (self.updates, metrics["reach/q_mean"])
                metrics = {**metrics, **growth_metrics([*means, now], self.expert_value)}
            known.append(Diagnosis(self.updates, metrics, samples))
            self._spools[key].metrics(self.updates, {**metrics, "time/diagnostics_seconds": seconds})

    def _offline_metrics(self) -> dict[str, dict[str, float]]:
        """What the study's objective measures of the policies as they are without episodes, by run."""
        if self._offline is None:
            return {}
        started = time.perf_counter()
        runs = {run.run_key: run.seed for run in self.pack.runs}
        values = self._offline(self.method, [runs[key] for key in self.alive]).tolist()
        seconds, name = time.perf_counter() - started, self.configs[0].study.objective.metric
        for key, value in zip(self.alive, values, strict=True):
            self._spools[key].metrics(self.updates, {f"offline/{name}": value, "time/offline_metric_seconds": seconds})
        return {key: {name: value} for key, value in zip(self.alive, values, strict=True)}

    def _start_evaluation(
        self, updates: int, policies: dict[str, dict[str, np.ndarray]], offline: dict[str, dict[str, float]]
    ) -> None:
        evaluation = self.configs[0].evaluation
        seeds = range(evaluation.first_seed, evaluation.first_seed + evaluation.episodes)
        if not policies:
            return
        collect: Callable[[], list[np.ndarray]] = partial(_no_returns, len(policies))
        if seeds:
            collect = self.workers.start_evaluation(list(policies.values()), self.env_id, seeds)
        self._pending.append(PendingEvaluation(updates, policies, collect, offline))

    def _take_evaluations(self, left: int) -> None:
        """Take pending evaluations in, oldest first, waiting for them if need be, until no more than `left` are."""
        while len(self._pending) > left:
            pending = self._pending[0]
            if any(key in self.alive for key in pending.policies):
                started = time.perf_counter()
                with record_function("evaluation"):
                    returns_of_all = pending.collect()
                self._seconds_waited += time.perf_counter() - started
                self._take(pending.updates, dict(zip(pending.policies, returns_of_all, strict=True)), pending.offline)
            self._pending.pop(0)

    def _take(
        self, updates: int, returns_of_all: Mapping[str, np.ndarray], offline: Mapping[str, dict[str, float]]
    ) -> None:
        diverged = []
        for key, returns in returns_of_all.items():
            if key not in self.alive:  # dropped since
                continue
            value: float | None = None
            if len(returns):
                mean = value = float(returns.mean())
                metrics = {"eval/return_mean": mean, "eval/return_std": float(returns.std())}
                if self.reference is not None:
                    value = metrics["eval/score"] = float(normalized_score(mean, self.reference))
                with record_function("logging"):
                    self._spools[key].metrics(updates, metrics)
            measured = offline.get(key, {})
            if all(map(math.isfinite, [*measured.values(), *([] if value is None else [value])])):
                self.evaluations[key].append(Evaluation(updates, value, returns.tolist(), measured))
                found = {**({} if value is None else {"value": value}), **measured}
                self.logs.say(f"update {updates}: {', '.join(f'{k} {v:.6g}' for k, v in found.items())}", [key])
                # at once: a run that is stopped has played its episodes, too
                save_json(self.run_folder(key) / EVALUATIONS_FILE, [asdict(e) for e in self.evaluations[key]])
            else:
                diverged.append(key)
        self._diverge(diverged, updates)

    def _log_waiting(self) -> None:
        """How long evaluations have kept the learner since the evaluation before."""
        for key in self.alive:
            self._spools[key].metrics(self.updates, {"time/evaluation_wait_seconds": self._seconds_waited})
        self._seconds_waited = 0.0

    def _policy(self, member: int) -> dict[str, np.ndarray]:
        scaling = self.dataset.scaling
        return in_environment(
            self.method.policy(member), self._action_low, self._action_high,
            scaling.observation_mean, scaling.observation_std,
        )  # fmt: skip

    def _diverge_now(self, keys: Sequence[str]) -> None:
        """Stop runs that have diverged at the current number of updates, unless an earlier evaluation shows it."""
        if keys:
            self._take_evaluations(0)
            self._diverge([key for key in keys if key in self.alive], self.updates)

    def _diverge(self, keys: Sequence[str], updates: int) -> None:
        if self.population is None:
            self.diverged |= dict.fromkeys(keys, updates)
            self._drop(keys, "FAILED", "diverged")
        else:  # until they are replaced, or nobody is there to replace them
            self.lost |= dict.fromkeys(keys, updates)
            self._leave(keys)

    def _drop(self, keys: Sequence[str], status: RunStatus, reason: str) -> None:
        if not keys:
            return
        for key in keys:
            self._end(key, status, reason)
            self.lost.pop(key, None)
        self._leave(keys)

    def _leave(self, keys: Sequence[str]) -> None:
        """Go on without some runs."""
        kept = [m for m, key in enumerate(self.alive) if key not in keys]
        left = len(kept) < len(self.alive)
        self.alive = [self.alive[m] for m in kept]
        if kept and left:
            self.method = self.method.select(kept)

    # ---- what is left behind --------------------------------------------------------------------------------------

    def _announce(self, run: RunSpec, config: Config) -> None:
        path = self.run_folder(run.run_key) / "config.yaml"
        write_text(path, to_yaml(config))
        plain = to_dict(config)
        params = {
            **flatten({"method": {"name": config.method_name, **effective_settings(config.method)}}),
            **flatten({"evaluation": plain["evaluation"]}),
            "dataset": config.dataset,
            "seed": str(run.seed),
        }
        tags = {
            "trial": str(run.trial), **run.tags, "seed": str(run.seed), "method": config.method_name,
            "dataset": config.dataset, "pack": self.pack.pack_id, "environment": self.env_id, "device":
            str(self.device), "config_hash": digest(identity(config, self.dataset.content_hash)),
            "settings_hash": settings_hash(config),
            "score_reference": self.reference.label if self.reference else "none: values are raw returns",
            **({"source": config.dataset, "target": target} if (target := target_of(config)) else {}),
        }  # fmt: skip
        info = RunInfo(self._name(run.run_key), params, tags, [dataset_record(self.dataset)])
        self._spools[run.run_key].start(info)
        self._spools[run.run_key].artifact(path)
        self._spools[run.run_key].artifact(self.logs.path(run.run_key), ARTIFACT_FOLDER)

    def _name(self, run_key: str) -> str:
        """What a run is called in MLflow's table."""
        run = next(run for run in self.pack.runs if run.run_key == run_key)
        kind, number = run_key[0], int(run_key[1:].partition("-")[0])
        return f"{kind}{number:03d}-s{run.seed}" if "study" in run.tags else run_key

    def _finish(self) -> None:
        if self.population is not None:
            save_json(self.pack.folder / HISTORY_FILE, self.population.state_dict())
        for m, key in enumerate(self.alive):
            folder, spool = self.run_folder(key), self._spools[key]
            write_arrays(folder / "policy.npz", self._policy(m))
            state = self.method.select([m]).state_dict()
            state.pop("replay", None)
            save_tensors(folder / "checkpoint.pt", state)
            names = ["policy.npz", "checkpoint.pt"]
            if self.population is not None:
                write_schedule(folder / SCHEDULE_FILE, self.config_of(key), self.population.schedule(key))
                names.append(SCHEDULE_FILE)
            for name in names:
                spool.artifact(folder / name)
            self._end(key, "FINISHED", "finished")

    def _end(self, key: str, status: RunStatus, outcome: str) -> None:
        """Draw what was measured of a run, say how it ended and close its spool."""
        spool, known, tags = self._spools[key], self.diagnoses[key], {"outcome": outcome}
        if self.evaluations[key]:
            spool.artifact(self.run_folder(key) / EVALUATIONS_FILE)
        if known:
            course = plots.RunCourse(
                self._name(key), [d.updates for d in known], [d.metrics for d in known],
                [(e.updates, e.value) for e in self.evaluations[key] if e.value is not None], self.expert_value,
                "mean return" if self.reference is None else "score", known[-1].samples,
            )  # fmt: skip
            figure, path = plots.diagnostics_figure(course), self.run_folder(key) / "diagnostics.png"
            write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=100))
            spool.artifact(path)
            if collapse(known[-1].metrics) is not None:
                tags["collapsing"] = "true"
        self.logs.say(f"ends at update {self.updates}: {outcome}", [key])
        spool.artifact(self.logs.path(key), ARTIFACT_FOLDER)
        spool.set_tags(tags)
        spool.end(status)

    def _save(self, force: bool = False) -> None:
        if not force and time.monotonic() - self._saved_at < 60 * self.compute.checkpoint_minutes:
            return
        started = time.perf_counter()
        pending = [
            [
                p.updates,
                {key: _as_tensors(policy) for key, policy in p.policies.items() if key in self.alive},
                p.offline,
            ]
            for p in self._pending
        ]
        with record_function("checkpoint"):
            trouble = self.checkpoints.save(self.epoch, {
                "version": CHECKPOINT_VERSION, "runs": [run.run_key for run in self.pack.runs], "alive": self.alive,
                "epoch": self.epoch, "diverged": self.diverged, "method": self.method.state_dict(),
                "evaluations": {key: [asdict(e) for e in done] for key, done in self.evaluations.items()},
                "diagnoses": {key: [asdict(d) for d in known] for key, known in self.diagnoses.items()},
                "pending": pending, "lost": self.lost, "unsent": self.unsent(),
                "population": None if self.population is None else self.population.state_dict(),
            })  # fmt: skip
        if trouble is not None:
            self._trouble = trouble
            self.logs.say(trouble)
        self._saved_at = time.monotonic()
        self._seconds_saving += time.perf_counter() - started

    def _restore(self) -> None:
        with self.logs.listening():
            source, state = self.pack, self.checkpoints.load(self.device)
            if state is None and self.pack.parent is not None:
                source = PackSpec.load(self.pack.study_folder, self.pack.parent)
                state = source.checkpoints(self.compute.checkpoints).load()
        if state is None:
            return
        keys = [run.run_key for run in self.pack.runs]
        if state["version"] != CHECKPOINT_VERSION or state["runs"] != [run.run_key for run in source.runs]:
            raise UserError(f"{source.folder} has a checkpoint of another version or pack; move it away to start anew")
        for key, lines in state.get("unsent", {}).items():
            if key in self._spools:
                self._spools[key].take_in(lines)
        kept = [m for m, key in enumerate(keys) if key in state["alive"]]
        if kept and len(kept) < len(keys):
            self.method = self.method.select(kept)
        if kept:
            self.method.load_state_dict(state["method"] if source is self.pack else self._part_of(source, state))
        self.alive, self.epoch = [keys[m] for m in kept], state["epoch"]
        self.diverged = {key: updates for key, updates in state["diverged"].items() if key in keys}
        self.evaluations = {key: [Evaluation(**e) for e in state["evaluations"][key]] for key in keys}
        self.diagnoses = {key: [Diagnosis(**d) for d in state["diagnoses"][key]] for key in keys}
        if self.population is not None:
            self.population.load_state_dict(state["population"])
            self.lost = state["lost"]
        for updates, policies, *offline in state["pending"]:  # checkpoints of before there were any have no metrics
            mine = {key: _as_arrays(policy) for key, policy in policies.items() if key in self.alive}
            self._start_evaluation(updates, mine, dict(*offline))
        if self.alive:
            self._start_ahead()

    def _part_of(self, source: PackSpec, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of this pack's members from that of a larger pack.

        They are taken out in the machine's memory: the device's did not hold the larger pack.
        """
        runs = [run for run in source.runs if run.run_key in state["alive"]]
        cpu = torch.device("cpu")
        configs = [load_config([run.config], []) for run in runs]
        whole = self._make_method(configs, runs, training_data(self.dataset, cpu), cpu)
        whole.load_state_dict(state["method"])
        mine = {run.run_key for run in self.pack.runs}
        return whole.select([m for m, run in enumerate(runs) if run.run_key in mine]).state_dict()

    # ---- profile ------------------------------------------------------------------------------------------------

    @contextmanager
    def _profiled(self, evaluates: bool) -> Iterator[bool]:
        """Profile the epoch that is run inside, if it is the one to be: whether it is.

        It is the first epoch that ends with an evaluation, so that every phase is seen, but not the first epoch of
        this process, which warms up, unless there is no other.
        """
        warm = self.epoch > self._first_epoch or self.epoch + 1 == self.num_epochs
        if not (self._profiles and evaluates and warm):
            yield False
            return
        self._profiles = False
        epoch, runs = self.epoch + 1, len(self.alive)
        with EpochProfile(self.device) as profile:
            yield True
        every, minutes = self.configs[0].evaluation.every_epochs, self.compute.checkpoint_minutes
        paths = profile.write(self.profile_folder, [
            f"Epoch {epoch} of {self.num_epochs} of pack {self.pack.pack_id}: {runs} runs, "
            f"{self.configs[0].method.updates_per_epoch} updates, on {self.device}.",
            "The profiler slows operators down, small ones most: MLflow's time/* say how long other epochs take.",
            f"This epoch has an evaluation and a checkpoint; else they are made every {every} epochs and every "
            f"{minutes:g} minutes.",
        ])  # fmt: skip
        for path in paths if self.alive else []:
            self._spools[self.alive[0]].artifact(path, "profile")


def logs_of(pack: PackSpec) -> RunLogs:
    """The logs of a pack's runs."""
    return RunLogs({run.run_key: Path(pack.study_folder) / "runs" / run.run_key for run in pack.runs})


def _no_returns(num_policies: int) -> list[np.ndarray]:
    """What an evaluation without episodes collects."""
    return [np.empty(0) for _ in range(num_policies)]


def _finite(arrays: Mapping[str, np.ndarray]) -> bool:
    return all(np.isfinite(a).all() for a in arrays.values() if a.dtype.kind == "f")


def _as_tensors(policy: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor | str]:
    """A policy file's arrays as a checkpoint can hold them."""
    return {k: str(a) if a.dtype.kind == "U" else torch.from_numpy(np.array(a)) for k, a in policy.items()}


def _as_arrays(policy: Mapping[str, torch.Tensor | str]) -> dict[str, np.ndarray]:
    """The inverse of `_as_tensors`."""
    return {k: np.array(a) if isinstance(a, str) else a.cpu().numpy() for k, a in policy.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotlist keys and text values, as MLflow shows parameters."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def dataset_record(dataset: Dataset) -> DatasetRecord:
    """How MLflow is told of a dataset."""
    columns = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    arrays = {name: getattr(dataset, name) for name in columns}
    return DatasetRecord(
        name=dataset.name, digest=dataset.content_hash[:16],
        source=str(dataset.provenance.get("source", dataset.provenance.get("path", dataset.name))),
        context="training",
        schema={k: {"dtype": str(a.dtype), "shape": [-1, *a.shape[1:]]} for k, a in arrays.items()},
        profile={k: v for k, v in dataset.summary().items() if k != "provenance"},
    )  # fmt: skip


class LearnerProcess:
    """A slot for learners: an object in the driver's process, or a Ray actor that Ray restarts when it dies.

    Every call carries its pack and the dataset, so a restarted actor takes the pack up again from the checkpoint by
    itself. The dataset's columns lie in the machine's object store, where all actors of the machine map them.
    """

    def __init__(self, compute: ComputeConfig) -> None:
        configure_cpu(compute.threads)
        self.compute = compute
        self.workers = Workers(compute.num_rollout_workers, compute.num_evaluators, compute.threads)
        self._learner: Learner | None = None
        self._base: int | None = None  # bytes that the process held before its first pack
        self._cost: PackCost | None = None  # of the learner's pack; None: an earlier process has trained a part of it

    def pids(self) -> dict[str, list[int]]:
        return {"learner": [os.getpid()], **self.workers.pids()}

    def ready(self, dataset: Dataset) -> None:
        """Answer, if the workers do.

        Raises:
            WorkersAway: they do not.
        """
        self.workers.check_there()

    def advance(self, pack: PackSpec, dropped: Sequence[str], dataset: Dataset) -> PackReport:
        """`Learner.advance` for a pack.

        Raises:
            OutOfMemory: the pack does not fit. Its memory is free again.
        """
        device = resolve_device(self.compute.device)
        if self._base is None:  # loading the libraries is no part of a pack's cost
            self._baseline(load_config([pack.runs[0].config], []), dataset, device)
        started, begun = time.perf_counter(), time.process_time()
        learner: Learner | None = None
        try:
            if self._learner is None or self._learner.pack.pack_id != pack.pack_id:
                self._learner = None
                memory.reset_peak(device)
                self._learner = Learner(pack, self.compute, self.workers, dataset)
                note_begun(pack.folder, self._learner.epoch)
                self._cost = PackCost(0.0, 0.0, 0) if self._learner.epoch == 0 else None
            learner, self._learner = self._learner, None  # one that fails in mid-epoch is not to be gone on with
            report = self._advance(learner, dropped, started)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                self._log_failure(pack, error)
                raise
            reason = str(error)
        else:
            if self._cost is not None:
                grown = memory.peak(device) - (self._base or 0)
                wall, cpu = time.perf_counter() - started, time.process_time() - begun
                self._cost = PackCost(self._cost.seconds + wall, self._cost.cpu_seconds + cpu, grown)
            if not report.finished:
                self._learner = learner
            else:
                del learner
                memory.release(device)
            return replace(report, cost=self._cost)
        # not from within the except block: the error's traceback holds the learner's tensors
        del learner
        memory.release(device)
        raise memory.OutOfMemory(reason)

    def _advance(self, learner: Learner, dropped: Sequence[str], started: float) -> PackReport:
        """`Learner.advance`, and how fast it was."""
        updates, steps = learner.run_updates, learner.steps
        with learner.logs.listening():
            report = learner.advance(dropped)
        seconds = time.perf_counter() - started
        if report.finished and self.compute.spool_folder is not None:
            folder = spool_folder(learner.pack.study_folder, self.compute.spool_folder)
            report = replace(report, unsent_from=place_of(folder), unsent=learner.unsent())
        return replace(
            report, node=socket.gethostname(), updates_per_second=(learner.run_updates - updates) / seconds,
            steps_per_second=(learner.steps - steps) / seconds,
        )  # fmt: skip

    def _log_failure(self, pack: PackSpec, error: Exception) -> None:
        """Leave the traceback in the runs' logs, and those in MLflow."""
        logs = logs_of(pack)
        logs.failure(error)
        for run in pack.runs:
            with (
                contextlib.suppress(SpoolError),
                RunSpool(spool_folder(pack.study_folder, self.compute.spool_folder), run.run_key) as spool,
            ):
                spool.artifact(logs.path(run.run_key), ARTIFACT_FOLDER)

    def _baseline(self, config: Config, dataset: Dataset, device: torch.device) -> int:
        """Bytes held without a pack; the libraries that every pack needs are loaded by then."""
        if self._base is None:
            action_bounds(evaluation_env(config, dataset))
            generates = hasattr(config.method, "rollout_length") or getattr(config.method, "ring_rows", 0) > 0
            if config.evaluation.diagnostics and generates:
                plots.load()  # runs with model rollouts or pools end with a figure
            memory.release(device)
            self._base = memory.in_use(device)
        return self._base

    def machine(self, busy: int, dataset: Dataset) -> tuple[dict[str, Any], float]:
        """What this slot runs on, with `busy` slots at work: its kind (see `calibration.machine_kind`), and the bytes
        by which its process may grow."""
        from orchestrator.calibration import machine_kind

        device = resolve_device(self.compute.device)
        sharing = busy
        if device.type == "cuda":
            sharing = max(1, busy // max(1, torch.cuda.device_count()))
        else:
            processes = 1 + self.compute.num_rollout_workers + self.compute.num_evaluators
            sharing = min(busy, max(1, len(os.sched_getaffinity(0)) // processes))
        return machine_kind(self.compute, busy), memory.SHARE * memory.free(device) / sharing

    def calibrate(
        self, config: dict[str, Any], sizes: Sequence[int], seconds: float, memory_limit: float, dataset: Dataset
    ) -> dict[str, Any]:
        """`calibration.measure` here; the result is plain enough for JSON."""
        from orchestrator.calibration import measure

        resolved = load_config([config], [])
        base = self._baseline(resolved, dataset, resolve_device(self.compute.device))
        return measure(resolved, dataset, self.compute, self.workers, sizes, seconds, memory_limit, base).to_json()

    def build_stages(self, configs: Sequence[dict[str, Any]], name: str, dataset: Dataset) -> list[UserError | None]:
        """Build a stage of some runs' methods where it is missing.

        Args:
            configs: of the runs; several are built in one go, so their stages must allow it.
            name: of the stage in each run's method.

        Returns:
            For each config why its stage could not be built, or None.
        """
        resolved = [load_config([config], []) for config in configs]
        stages = [stages_of(config)[name] for config in resolved]
        keys = [stage_key(stage, dataset.content_hash) for stage in stages]

        def build(missing: list[Stage]) -> list[Built | UserError]:
            histories: list[list[tuple[int, dict[str, float]]]] = [[] for _ in missing]

            def report(which: int, step: int, metrics: Mapping[str, float]) -> None:
                histories[which].append((step, dict(metrics)))

            data, started = training_data(dataset, resolve_device(self.compute.device)), time.perf_counter()
            results = _build(missing, data, report)
            seconds = time.perf_counter() - started  # of all that were built in one go
            # the history is kept with the stage: whoever uses it can show it
            about = {"dataset": dataset.name, "dataset_hash": dataset.content_hash, "seconds": seconds}
            return [
                result if isinstance(result, UserError) else Built(result, {**about, "history": history})
                for result, history in zip(results, histories, strict=True)
            ]

        store = ArtifactStore(Path(resolved[0].workdir) / "artifacts")
        failures = store.build_missing(dict(zip(keys, stages, strict=True)), build)
        return [failures.get(key) for key in keys]


def _build(
    stages: Sequence[Stage], data: TrainingData, report: Callable[[int, int, Mapping[str, float]], None]
) -> list[dict[str, Any] | UserError]:
    """What comes of each stage; several are built in one go."""
    first = stages[0]
    if len(stages) > 1:
        if first.together is None or not all(first.can_be_built_with(stage) for stage in stages):
            raise ValueError(f"these stages of kind {first.kind} cannot be built in one go")
        return first.together.build([stage.settings for stage in stages], data, report)
    try:
        return [first.build(data, partial(report, 0))]
    except UserError as error:
        return [error]
