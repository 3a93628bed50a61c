"""How long, how large, how dear: what runs will take, from measurements of packs on the machine at hand.

`Estimator` knows the cost of packs of any configuration, measured, or scaled from the nearest that was.
`choose_packing` decides the pack size with which a study starts, and `make_plan` is what `offsweep plan` prints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.method import Stage
from envs.dataset import Dataset
from envs.errors import UserError
from orchestrator.artifacts import DESCRIPTION, ArtifactStore, stage_key
from orchestrator.calibration import (
    Calibration,
    Calibrations,
    episode_facts,
    gigabytes,
    median_of,
    pack_model,
    too_large,
    update_work,
    work_key,
)
from orchestrator.cluster import Slots
from orchestrator.config import Config, apply_params, pack_key, stages_of, to_dict
from orchestrator.confirm import confirm_config, stage_seeds
from orchestrator.packing import (
    MAX_SIZE,
    PACKING_FILE,
    Curve,
    Packing,
    PackModel,
    choose_runs_per_pack,
    pack_runs,
    schedule,
    study_packs,
)
from sweeps.preview import ADAPTIVE_SAMPLERS, stand_in_trials
from sweeps.spec import StudySpec

PLAN_SECONDS = 40.0  # of measuring, for a plan
STUDY_SHARE, STUDY_SECONDS = 0.05, 60.0  # of measuring before a study: at most this share of it and this long
LOOK_SECONDS = 0.8  # of a first look at packs of one
SHORT_STUDY = 60.0  # seconds; what is shorter is not worth measuring for
MIN_ROUNDS = 5  # of trials in a study whose sampler learns from results
SIZES = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, MAX_SIZE)}  # measured, as far as they are of use
EPOCHS_PER_PATIENCE = 6  # of a stage nothing is known of; embedded/hopper-medium-v0 took 28 epochs with a patience of 5


# ---- what packs cost ------------------------------------------------------------------------------------------------


class Estimator:
    """The cost of packs of any configuration on one dataset, from the calibrations of a work folder.

    Args:
        dataset: what the runs learn from.
        calibrations: of the kind of machine that the runs are for.
        memory_limit: bytes that a slot's process may grow by.
    """

    def __init__(self, dataset: Dataset, calibrations: Calibrations, memory_limit: float) -> None:
        self.dataset, self.calibrations, self.memory_limit = dataset, calibrations, memory_limit
        self.known: dict[str, Calibration] = {}
        self._models: dict[str, PackModel | None] = {}

    @classmethod
    def of_slots(cls, slots: Slots, config: Config, dataset: Dataset) -> Estimator:
        """For the machine that the slots are on, asked of the first."""
        [(kind, memory_limit)] = _answers(slots, [("machine", (slots.size,))])
        return cls(dataset, Calibrations(Path(config.workdir), kind), memory_limit)

    @property
    def device(self) -> str:
        return str(self.calibrations.kind["device"])

    def look_up(self, config: Config) -> Calibration | None:
        """What was measured for the work of a configuration, now or earlier."""
        key = work_key(config, self.dataset)
        if key not in self.known:
            found = self.calibrations.get(key)
            if found is None:
                return None
            self.known[key] = found
            self._models.clear()
        return self.known[key]

    def add(self, calibration: Calibration) -> None:
        self.known[calibration.key] = self.calibrations.add(calibration)
        self._models.clear()

    def model(self, config: Config) -> PackModel | None:
        """Costs of a configuration's packs; None if nothing was measured of its method."""
        # not the configuration's own key: episodes and epochs count, too
        key = pack_key(config)
        if key not in self._models:
            self._models[key] = self._estimate(config)
        return self._models[key]

    def _estimate(self, config: Config) -> PackModel | None:
        facts, own = episode_facts(config, self.dataset), self.look_up(config)
        others = [c for c in self.known.values() if c.method == config.method_name and c is not own]
        work = update_work(config, self.dataset)

        def distance(other: Calibration) -> float:
            return abs(math.log(work / other.work))

        if own is None:
            if not others:
                return None
            near = min(others, key=lambda c: (distance(c), -len(c.packs)))
            by_work: dict[float, list[float]] = {}
            for other in others:
                by_work.setdefault(other.work, []).append(other.packs[0].update_seconds)
            curve = Curve(tuple((w, sum(times) / len(times)) for w, times in sorted(by_work.items())))
            return pack_model(config, self.dataset, near, facts, curve(work) / curve(near.work))
        broader = [c for c in others if c.packs[-1].size > own.packs[-1].size]
        if broader:
            own = _extended(own, min(broader, key=distance))
        return pack_model(config, self.dataset, own, facts)


def _extended(own: Calibration, other: Calibration) -> Calibration:
    """`own` with the larger sizes of `other`, as much dearer than a pack of one as they are there."""
    packs, first, theirs = list(own.packs), own.packs[0], other.packs[0]
    for pack in other.packs:
        if pack.size > packs[-1].size:
            names = ("setup_seconds", "rollout_seconds", "update_seconds")
            ratios = {n: getattr(pack, n) / max(getattr(theirs, n), 1e-9) for n in names}
            packs.append(dataclasses.replace(
                pack, **{n: getattr(first, n) * ratio for n, ratio in ratios.items()},
                memory=int(first.memory * pack.memory / theirs.memory),
            ))  # fmt: skip
    return dataclasses.replace(own, packs=tuple(packs))


def _answers(slots: Slots, calls: Sequence[tuple[str, tuple[Any, ...]]], deadline: float = math.inf) -> list[Any]:
    """Results of calls of `LearnerProcess`, in their order, each slot taking the next; calls that have not begun by the
    deadline (`time.monotonic`) are left out.

    Raises:
        UserError, and whatever else a call raises.
    """
    results: dict[int, Any] = {}
    under_way: dict[int, int] = {}
    left = list(enumerate(calls))
    failed: BaseException | None = None
    while left or under_way:
        for slot in range(slots.size):
            if left and slot not in under_way and failed is None and time.monotonic() < deadline:
                number, (method, args) = left.pop(0)
                under_way[slot] = number
                slots.submit(slot, method, *args)
        if not under_way:
            break
        for slot, result in slots.wait(timeout=1.0):
            number = under_way.pop(slot)
            if isinstance(result, BaseException):
                failed = failed or result
            results[number] = result
    if failed is not None:
        raise failed
    return [results[number] for number in sorted(results)]


def look(slots: Slots, estimator: Estimator, configs: Sequence[Config], seconds: float) -> None:
    """Measure packs of one for configurations whose work is not known, in their order, as far as the time goes."""
    unknown = [config for config in configs if estimator.look_up(config) is None]
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("calibrate", (to_dict(config), (1,), LOOK_SECONDS, estimator.memory_limit)) for config in unknown
    ]
    if len(calls) == 1:
        calls *= slots.size  # so that all slots are at work, as they will be
    answers = _answers(slots, calls, time.monotonic() + seconds)
    found = [Calibration.from_json(answer) for answer in answers]
    for calibration in [median_of(found)] if len(unknown) == 1 else found:
        estimator.add(calibration)


def measure_sizes(slots: Slots, estimator: Estimator, config: Config, most: int, seconds: float) -> None:
    """Measure packs of up to `most` runs, in all slots at once."""
    known = estimator.look_up(config)
    sizes = tuple(size for size in SIZES[estimator.device] if size <= max(1, most))
    if known is not None and known.asked >= sizes[-1]:
        return
    call = ("calibrate", (to_dict(config), sizes, seconds, estimator.memory_limit))
    estimator.add(median_of([Calibration.from_json(answer) for answer in _answers(slots, [call] * slots.size)]))


# ---- what is to be run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """The trials of a study before it has begun.

    Attributes:
        trials: pack key of every run, by trial; without those that the method refuses.
        configs: of one run, by pack key.
        refused: number of trials that the method refuses.
    """

    trials: list[list[str]]
    configs: dict[str, Config]
    refused: int

    def counts(self) -> Counter[str]:
        """Runs by pack key."""
        return Counter(key for trial in self.trials for key in trial)


def outlook(config: Config, spec: StudySpec) -> Outlook:
    """Draw stand-ins for a study's trials."""
    members = {f"method.{item.name}" for item in dataclasses.fields(config.method) if item.metadata.get("per_member")}
    found: dict[str, Config | None] = {}
    trials: list[list[str]] = []
    configs: dict[str, Config] = {}
    refused = 0
    for params in stand_in_trials(spec, config.study.enqueue):
        # what enters arithmetic only changes no pack key, but whether it is 0
        shape = json.dumps({k: bool(v) if k in members else v for k, v in params.items()}, sort_keys=True)
        if shape not in found:
            try:
                found[shape] = apply_params(config, params)
            except UserError:
                found[shape] = None
        run = found[shape]
        if run is None:
            refused += 1
            continue
        key = pack_key(run)
        configs.setdefault(key, run)
        trials.append([key] * config.num_seeds)
    if not trials:
        raise UserError("every trial that was of the study is refused by the method; see study.space or study.trials")
    return Outlook(trials, configs, refused)


def confirm_outlook(config: Config, spec: StudySpec) -> tuple[Config, Outlook] | None:
    """The confirm stage of a study, with the first of its stand-ins for the best of its trials; None without one."""
    if not spec.searches or not spec.confirm.top:
        return None
    ignored = stage_seeds(config.method) if spec.confirm.fresh_stages else []
    trials: list[dict[str, Any]] = []
    most = spec.confirm.top + min(spec.confirm.enqueued, len(config.study.enqueue))
    for params in stand_in_trials(spec, config.study.enqueue):
        kept = {key: value for key, value in params.items() if key not in ignored}
        if len(trials) == most or kept in trials:
            continue
        try:
            apply_params(config, kept)
        except UserError:
            continue
        trials.append(kept)
    if not trials:
        return None
    fresh = confirm_config(config, trials)
    return fresh, outlook(fresh, fresh.study_spec())


def _by_importance(ahead: Outlook, dataset: Dataset) -> list[Config]:
    """One configuration for each kind of work: most work in the study first."""
    weights: dict[str, float] = {}
    examples: dict[str, Config] = {}
    for key, count in ahead.counts().items():
        config = ahead.configs[key]
        work = work_key(config, dataset)
        examples.setdefault(work, config)
        weights[work] = weights.get(work, 0.0) + count * update_work(config, dataset) * config.method.num_updates
    return [examples[key] for key in sorted(weights, key=lambda k: (-weights[k], k))]


def min_rounds(config: Config) -> int:
    """In how many rounds a study's trials must be asked for at least."""
    study = config.study
    adaptive = study.sampler.name in ADAPTIVE_SAMPLERS and study.num_trials > 1 and not study.trials
    return MIN_ROUNDS if adaptive else 1


def most_runs_per_pack(config: Config, slots: int) -> int:
    """The largest pack that is of use to a study: beyond it slots stay idle."""
    seeds, trials = config.num_seeds, config.study.num_trials
    if trials == 1:
        return max(1, math.ceil(seeds / slots))
    return seeds * max(1, trials // (slots * min_rounds(config)))


def default_runs_per_pack(config: Config, slots: int) -> int:
    """The seeds of a trial, or fewer if slots would stay idle."""
    return min(config.num_seeds, max(1, math.ceil(config.num_seeds * config.study.num_trials / slots)))


def _models(estimator: Estimator, ahead: Outlook) -> dict[str, PackModel]:
    models = {}
    for key, config in ahead.configs.items():
        model = estimator.model(config)
        assert model is not None  # something of the method is measured
        if model.largest(estimator.memory_limit) < 1:
            raise UserError(too_large(config, model.memory(1), estimator.memory_limit))
        models[key] = model
    return models


def _packs(
    ahead: Outlook, models: Mapping[str, PackModel], runs_per_pack: int, memory_limit: float
) -> list[tuple[str, int]]:
    limits = {key: model.largest(memory_limit) for key, model in models.items()}
    return study_packs(ahead.trials, runs_per_pack, limits)


def choose(config: Config, ahead: Outlook, models: Mapping[str, PackModel], slots: int, memory_limit: float) -> int:
    """Runs per pack with which a study ends soonest."""
    if len(ahead.trials) == 1:
        return max(len(pack) for pack in pack_runs(ahead.trials[0], models, slots, memory_limit))
    return choose_runs_per_pack(ahead.trials, models, slots, memory_limit, min_rounds(config))


def choose_packing(config: Config, spec: StudySpec, dataset: Dataset, slots: Slots, folder: Path) -> Packing:
    """The pack sizes for a study: those it began with, those configured, or those that end it soonest.

    A study of less than a minute is not measured further than a first look. The choice is kept in the study's folder.

    Raises:
        UserError: a run does not fit the memory.
    """
    path = folder / PACKING_FILE
    estimator = Estimator.of_slots(slots, config, dataset)
    given = config.runs_per_pack
    if path.exists():
        packing = Packing.load(path, estimator.model, estimator.memory_limit)
        if given is not None:
            packing.runs_per_pack = given
        return packing
    ahead = outlook(config, spec)
    [first, *_] = _by_importance(ahead, dataset)
    look(slots, estimator, [first], math.inf)
    size = given or default_runs_per_pack(config, slots.size)
    reason = "as configured" if config.study.pbt is None else "the population"
    stages = _stages(estimator, ahead, ArtifactStore(Path(config.workdir) / "artifacts"))
    models = _models(estimator, ahead)
    predicted = _seconds(_packs(ahead, models, size, estimator.memory_limit), models, slots.size)
    if given is None:
        reason = "the seeds of a trial: a short study"
        most = most_runs_per_pack(config, slots.size)
        if predicted > SHORT_STUDY:
            seconds = min(STUDY_SECONDS, STUDY_SHARE * predicted)
            look(slots, estimator, _by_importance(ahead, dataset), seconds / 3)
            measure_sizes(slots, estimator, first, most, 2 * seconds / 3)
            models = _models(estimator, ahead)
            size = choose(config, ahead, models, slots.size, estimator.memory_limit)
            reason = "ends soonest, from measurements of packs"
            predicted = _seconds(_packs(ahead, models, size, estimator.memory_limit), models, slots.size)
    predicted += schedule([stage.seconds for stage in stages], slots.size)
    packing = Packing(
        path, size, reason, predicted, model_of=estimator.model, memory_limit=estimator.memory_limit
    )  # fmt: skip
    packing.save()
    return packing


def _seconds(packs: Sequence[tuple[str, int]], models: Mapping[str, PackModel], slots: int) -> float:
    return schedule([models[key].seconds(size) for key, size in packs], slots)


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedPacks:
    """Packs of one key and size."""

    key: str
    method: str
    dataset: str
    size: int
    packs: int
    seconds: float  # of one pack
    memory: float  # bytes of one pack
    measured: bool  # at this size and shape; else estimated from others
    confirm: bool = False  # of the confirm stage

    @property
    def runs(self) -> int:
        return self.size * self.packs


@dataclass(frozen=True)
class PlannedStage:
    """A stage that has to be built."""

    name: str
    key: str
    seconds: float
    epochs: int
    epochs_are: str  # where their number comes from


@dataclass(frozen=True)
class Plan:
    """What a study will take.

    Attributes:
        slots: packs trained at once.
        memory_limit: bytes that a slot may use.
        wall_seconds: from the first stage to the last pack, nothing pruned.
        device_hours: the slots' devices times the wall clock.
        money: None without a price.
        calibration_seconds: spent on measuring for this plan.
    """

    packs: list[PlannedPacks]
    stages: list[PlannedStage]
    runs_per_pack: int
    slots: int
    device: str
    gpus: int
    cpus: int
    memory_limit: float
    wall_seconds: float
    device_hours: float
    money: float | None
    calibration_seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _stages(estimator: Estimator, ahead: Outlook, store: ArtifactStore) -> list[PlannedStage]:
    """The stages that are not there yet."""
    planned: dict[str, PlannedStage] = {}
    for config in ahead.configs.values():
        for name, stage in stages_of(config).items():
            key = stage_key(stage, estimator.dataset.content_hash)
            if key in planned or store.exists(stage.kind, key):
                continue
            epochs, epochs_are = expected_epochs(stage, store, estimator.dataset.content_hash)
            # measured for this configuration, or for another one's stage of that name
            known = [c.stages[name] for c in (estimator.look_up(config), *estimator.known.values())
                     if c is not None and name in c.stages]  # fmt: skip
            seconds = known[0].epoch_seconds * epochs if known else 0.0
            planned[key] = PlannedStage(name, key, seconds, epochs, epochs_are if known else "no epoch was measured")
    return list(planned.values())


def expected_epochs(stage: Stage, store: ArtifactStore, dataset_hash: str) -> tuple[int, str]:
    """How many epochs a stage is taken to need, and why: as many as one that was built with the same settings, or a
    number that follows from its settings."""

    if stage.epochs is not None:
        return stage.epochs, "settled by its updates"

    def without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key != "seed"}

    built: dict[bool, list[int]] = {}
    for path in sorted(store.root.glob(f"{stage.kind}/*/{DESCRIPTION}")):
        description = json.loads(path.read_text())
        if without_seed(description["settings"]) == without_seed(stage.settings) and description.get("history"):
            same = description.get("dataset_hash") == dataset_hash
            built.setdefault(same, []).append(len(description["history"]))
    for same, words in ((True, "with another seed"), (False, "on another dataset")):
        if same in built:
            return round(sum(built[same]) / len(built[same])), f"as one built {words}"
    most = int(stage.settings.get("max_epochs", 10**9))
    if "patience" not in stage.settings:
        return most, "all of max_epochs"
    patience = int(stage.settings["patience"])
    least = int(stage.settings.get("min_epochs", 0))
    epochs = min(most, max(least + patience, EPOCHS_PER_PATIENCE * patience))
    return epochs, "assumed from patience, min_epochs and max_epochs"


def make_plan(
    config: Config,
    spec: StudySpec,
    dataset: Dataset,
    slots: Slots,
    gpus: int | None = None,
    cpus: int | None = None,
    seconds: float = PLAN_SECONDS,
) -> Plan:
    """Plan a study, measuring what is not known.

    Args:
        config: as for the study itself.
        slots: where to measure.
        gpus, cpus: of a cluster of such machines to plan for; None: the slots at hand.
        seconds: of measuring, at most about.

    Raises:
        UserError: a run does not fit the memory, or there are GPUs to plan for and none to measure.
    """
    started = time.monotonic()
    estimator = Estimator.of_slots(slots, config, dataset)
    if gpus and estimator.device != "cuda":
        raise UserError("--gpus can only be planned on a machine with a GPU: nothing can be measured here")
    per_learner = config.compute.cpus_per_learner
    num_slots = slots.size
    if gpus is not None or cpus is not None:
        on_gpus = int(gpus / (config.compute.gpus_per_learner or 1.0) + 1e-9) if gpus else 0
        num_slots = max(1, on_gpus or (cpus or 1) // per_learner)
    ahead = outlook(config, spec)
    configs = _by_importance(ahead, dataset)
    known_before = sum(estimator.look_up(c) is not None for c in configs)
    look(slots, estimator, configs[:1], math.inf)
    look(slots, estimator, configs, seconds / 2)
    given = config.runs_per_pack
    most = given or most_runs_per_pack(config, num_slots)
    measure_sizes(slots, estimator, configs[0], most, max(1.0, min(seconds / 2, 10.0 * math.log2(2 * most))))
    spent = time.monotonic() - started
    models = _models(estimator, ahead)
    size = given or choose(config, ahead, models, num_slots, estimator.memory_limit)
    packs = _packs(ahead, models, size, estimator.memory_limit)
    stages = _stages(estimator, ahead, ArtifactStore(Path(config.workdir) / "artifacts"))
    wall = schedule([stage.seconds for stage in stages], num_slots) + _seconds(packs, models, num_slots)
    rows = _rows(config, packs, models)
    repeated = confirm_outlook(config, spec)
    if repeated is not None:  # begins when the search has ended
        fresh, ahead_of_fresh = repeated
        fresh_models = _models(estimator, ahead_of_fresh)
        fresh_size = given or choose(fresh, ahead_of_fresh, fresh_models, num_slots, estimator.memory_limit)
        fresh_packs = _packs(ahead_of_fresh, fresh_models, fresh_size, estimator.memory_limit)
        known = {stage.key for stage in stages}
        fresh_stages = [
            stage for stage in _stages(estimator, ahead_of_fresh, ArtifactStore(Path(config.workdir) / "artifacts"))
            if stage.key not in known
        ]  # fmt: skip
        wall += schedule([stage.seconds for stage in fresh_stages], num_slots)
        wall += _seconds(fresh_packs, fresh_models, num_slots)
        stages += fresh_stages
        rows += _rows(fresh, fresh_packs, fresh_models, confirm=True)
    on_gpu = estimator.device == "cuda"
    used_gpus = math.ceil(num_slots * (config.compute.gpus_per_learner or 1.0) - 1e-9) if on_gpu else 0
    used_cpus = num_slots * per_learner
    device_hours = (used_gpus if on_gpu else used_cpus) * wall / 3600
    return Plan(
        rows, stages, size, num_slots, estimator.device, used_gpus, used_cpus, estimator.memory_limit, wall,
        device_hours, _money(config, wall / 3600, used_gpus, used_cpus), spent,
        _notes(config, ahead, estimator, rows, len(configs), known_before),
    )  # fmt: skip


def _rows(
    config: Config, packs: Sequence[tuple[str, int]], models: Mapping[str, PackModel], confirm: bool = False
) -> list[PlannedPacks]:
    return [
        PlannedPacks(
            key, config.method_name, config.dataset, members, count, models[key].seconds(members),
            models[key].memory(members), models[key].measured >= members, confirm,
        )
        for (key, members), count in Counter(packs).items()
    ]  # fmt: skip


def _money(config: Config, hours: float, gpus: int, cpus: int) -> float | None:
    prices = (config.compute.price_per_gpu_hour, gpus), (config.compute.price_per_cpu_hour, cpus)
    known = [price * number * hours for price, number in prices if price is not None]
    return sum(known) if known else None


def _notes(
    config: Config, ahead: Outlook, estimator: Estimator, rows: Sequence[PlannedPacks], kinds: int, known_before: int
) -> list[str]:
    facts = episode_facts(config, estimator.dataset)
    notes = [f"episodes are taken to last {facts.episode_length:.0f} steps ({facts.episode_length_is})"]
    if config.study.space:
        notes.append(
            f"the trials were drawn at random (seed {config.study.sampler.seed}) in place of the sampler "
            f"{config.study.sampler.name}; pruning is not planned: with it less is trained"
        )
        if config.study.racing.first_seeds is not None:
            notes.append("every trial is planned with all its seeds; with racing fewer are trained")
    if any(row.confirm for row in rows):
        notes.append(
            "confirm: the best settings with fresh seeds, for which trials drawn at random stand; fewer if fewer "
            "different settings are trained to their end"
        )
    if ahead.refused:
        notes.append(f"{ahead.refused} of the trials drawn are refused by the method and cost nothing")
    if any(not row.measured for row in rows):
        notes.append("~: estimated from packs of other shapes or sizes that were measured")
    if known_before:
        notes.append(
            f"{known_before} of {kinds} kinds of work were measured before, in {estimator.calibrations.folder}"
        )
    return notes


def print_plan(console: Console, plan: Plan, config: Config) -> None:
    """The plan as a table, and its totals."""
    table = Table(title=f"plan: {config.method_name} on {config.dataset}")
    for column in ("pack key", "runs", "per pack", "packs", "time per run", "time per pack", "memory per pack"):
        table.add_column(column, justify="left" if column == "pack key" else "right")
    for row in plan.packs:
        about = "" if row.measured else "~"
        table.add_row(
            row.key[:8] + " confirm" * row.confirm, str(row.runs), str(row.size), str(row.packs),
            about + duration(row.seconds / row.size), about + duration(row.seconds), about + gigabytes(row.memory),
        )  # fmt: skip
    console.print(table)
    for stage in plan.stages:
        console.print(
            f"stage:        {stage.name} {stage.key[:8]} is to be built: {duration(stage.seconds)}, {stage.epochs} "
            f"epochs ({stage.epochs_are})", highlight=False,
        )  # fmt: skip
    devices = f"{plan.gpus} GPUs" if plan.gpus else f"{plan.cpus} cores"
    wall = duration(plan.wall_seconds)
    lines = [
        ("packs", f"at most {plan.runs_per_pack} runs each, {plan.slots} at once on {devices}"),
        ("wall clock", wall),
        ("device-hours", f"{plan.device_hours:.2f} ({devices} x {wall})"),
        ("memory", f"{gigabytes(max(row.memory for row in plan.packs))} of {gigabytes(plan.memory_limit)} for a pack"),
        ("money", "no price given: compute.price_per_gpu_hour=... or compute.price_per_cpu_hour=..."
         if plan.money is None else f"{plan.money:.2f}"),
        ("measured for", f"{plan.calibration_seconds:.0f} s"),
    ]  # fmt: skip
    for label, text in lines:
        console.print(f"{label + ':':<14}{text}", highlight=False)
    for note in plan.notes:
        console.print(f"- {note}", highlight=False)


def duration(seconds: float) -> str:
    """Such as 12.3 s, 4.5 min, 6.7 h."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
