"""Configuration: dataclasses, a method's settings, YAML files and `key=value` overrides, in this order of precedence.

`method=ravl` and `dataset=...` are taken out first, since the schema of `method.*` and the settings for the dataset
follow from them. What comes out is a tree of plain dataclasses: nothing reads a configuration node inside a loop.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from agents.cross_domain import CrossDomainConfig
from agents.dynamics import DynamicsConfig
from agents.dynamics_stage import ensemble_stage
from agents.method import Stage, common_settings, effective_settings, load_method, method_settings
from envs.errors import UserError
from envs.transforms import base_name
from orchestrator.hashing import digest
from orchestrator.tracking import check_no_password
from sweeps.confirm import ConfirmSpec
from sweeps.divergence import DivergenceSpec
from sweeps.objectives import SCORE, ObjectiveSpec
from sweeps.pbt import PBTSpec
from sweeps.racing import RacingSpec
from sweeps.spec import PrunerSpec, SamplerSpec, StudySpec
from sweeps.warm_start import WarmStartSpec


@dataclass
class StudyConfig:
    """What is searched for, and how (see `sweeps`)."""

    name: str = ""  # the study's folder and MLflow experiment; empty: method, dataset and time
    num_trials: int = 1
    space: dict[str, Any] = field(default_factory=dict)  # config key -> {type, low, high, log, choices, when}
    trials: list[dict[str, Any]] = field(default_factory=list)  # instead of a space: {config key: value} of each trial
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    pruner: PrunerSpec = field(default_factory=PrunerSpec)
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    enqueue: list[dict[str, Any]] = field(default_factory=list)  # trials to begin with: {config key: value}
    storage: str | None = None  # URL that several drivers share, without a password; None: the study's folder
    takeover_minutes: float = 30.0  # of silence, after which another driver does a driver's running trials anew
    objective_evaluations: int = 1  # a run's value is its mean score over this many last evaluations
    warm_start: WarmStartSpec = field(default_factory=WarmStartSpec)  # trials that come before these
    divergence: DivergenceSpec = field(default_factory=DivergenceSpec)
    racing: RacingSpec = field(default_factory=RacingSpec)  # only of studies that search
    confirm: ConfirmSpec = field(default_factory=ConfirmSpec)  # only of studies that search
    pbt: PBTSpec | None = None  # population-based training, the trials being the population


@dataclass
class EvaluationConfig:
    """Episodes in the real environment."""

    every_epochs: int = 10  # one epoch is method.updates_per_epoch updates; the last epoch is always evaluated
    # deterministic policy; episode i is reset with seed first_seed + i every time. 0: none, where
    # study.objective.kind is offline or hybrid
    episodes: int = 10
    first_seed: int = 10_000
    env_id: str | None = None  # None: method.target of cross-domain methods, else the dataset's
    diagnostics: bool = True  # metrics `reach/*` and `model/*` of model-based runs; results are the same without


@dataclass
class ComputeConfig:
    """Processes. Results are the same for any numbers, up to the rounding of packs of another size; 0 means in the
    parent process."""

    num_learners: int | None = None  # packs trained at once; None: one per GPU, else per core; 0: in the driver
    num_rollout_workers: int = 0  # per learner on a CPU; a learner on a GPU makes its rollouts there
    num_evaluators: int = 0  # per learner; they run episodes while it trains on. 0: it stops to run them itself
    runs_per_pack: int | None = None  # at most; None: chosen from what packs cost here (see `offsweep plan`)
    threads: int = 1  # of torch, per process; so many CPUs are reserved for each
    # of a learner, such as 0.25 where four share one; None: all GPUs, shared evenly. More than 1 is of no use
    gpus_per_learner: float | None = None
    device: str = "auto"  # auto | cpu | cuda
    address: str | None = None  # of a running Ray cluster; None: $RAY_ADDRESS, else one of our own on this machine
    # folder on each machine's own disk where runs are logged, to be sent by a tracker of that machine; None: in the
    # study's folder, which every machine sees and the driver's tracker reads
    spool_folder: str | None = None
    checkpoint_minutes: float = 5.0  # 0: every epoch; always when a run ends
    # folder or URL (s3://bucket/folder) where packs' checkpoints lie, too, for machines that do not see the work folder
    # or where it may be lost; None: in the study's folder alone
    checkpoints: str | None = None
    patience_minutes: float = 60.0  # how long a study whose learners' machines have all died waits for others
    profile: bool = False  # trace one epoch of every pack and say where its time goes, in packs/<pack>/profile/
    price_per_gpu_hour: float | None = None  # any currency; for `offsweep plan`
    price_per_cpu_hour: float | None = None  # of one core

    @property
    def num_workers(self) -> int:
        """Processes beside a learner."""
        return self.num_rollout_workers + self.num_evaluators

    @property
    def cpus_per_learner(self) -> int:
        """For a learner and its workers."""
        return self.threads * (1 + self.num_workers)


@dataclass
class Config:
    """Everything that decides a study; with one trial and no search space, a training."""

    dataset: str = MISSING
    method: Any = MISSING  # the method's own dataclass
    seed: int = 0
    num_seeds: int = 1  # runs per trial: seeds seed, seed + 1, ...
    study: StudyConfig = field(default_factory=StudyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    # settings that change while a run trains: [{updates: 5000, method.actor_lr: 1.0e-4}, ...], from so many updates on
    schedule: list[dict[str, Any]] = field(default_factory=list)
    workdir: str = "offsweep-work"  # datasets, artifacts, studies and the default MLflow store
    tracking_uri: str | None = None  # None: MLFLOW_TRACKING_URI, else SQLite under workdir
    method_name: str = ""  # taken from method=...

    def __post_init__(self) -> None:
        for name, least in (("num_seeds", 1), ("seed", 0)):
            _at_least(name, getattr(self, name), least)
        for name, least in (("every_epochs", 1), ("episodes", 0), ("first_seed", 0)):
            _at_least(f"evaluation.{name}", getattr(self.evaluation, name), least)
        for name, least in (
            ("num_rollout_workers", 0),
            ("num_evaluators", 0),
            ("threads", 1),
            ("checkpoint_minutes", 0),
            ("patience_minutes", 0),
        ):
            _at_least(f"compute.{name}", getattr(self.compute, name), least)
        for name, least in (
            ("num_learners", 0), ("runs_per_pack", 1), ("price_per_gpu_hour", 0), ("price_per_cpu_hour", 0),
        ):  # fmt: skip
            if getattr(self.compute, name) is not None:
                _at_least(f"compute.{name}", getattr(self.compute, name), least)
        share = self.compute.gpus_per_learner
        if share is not None and not 0 < share <= 1:
            raise UserError(
                f"compute.gpus_per_learner={share:g} must be above 0 and at most 1: a learner computes on one GPU"
            )
        if self.tracking_uri is not None:
            check_no_password(self.tracking_uri)
        _at_least("study.objective_evaluations", self.study.objective_evaluations, 1)
        if self.compute.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"compute.device={self.compute.device!r} must be auto, cpu or cuda")
        interacts = isinstance(self.method, CrossDomainConfig)  # environments are on the CPU in any case
        if self.compute.device == "cuda" and self.compute.num_rollout_workers and not interacts:
            raise UserError(
                f"compute.num_rollout_workers={self.compute.num_rollout_workers} must be 0 with compute.device=cuda: "
                "the rollouts of a learner on a GPU are made there"
            )
        self._check_objective()
        if self.study.trials and self.study.num_trials == 1:
            self.study.num_trials = len(self.study.trials)
        # no more seldom than once, at the end
        self.evaluation.every_epochs = min(self.evaluation.every_epochs, self.method.num_epochs)

    def _check_objective(self) -> None:
        objective = self.study.objective
        objective.validate()
        if objective.metric == SCORE:
            if not self.evaluation.episodes:
                raise UserError(
                    "evaluation.episodes=0 must be at least 1 where trials are judged by their scores; raise it, or "
                    "search by an offline metric, such as study.objective={kind: offline, metric: fqe}"
                )
            return
        where, method = f"study.objective.metric={objective.metric}", load_method(self.method_name)
        if isinstance(self.method, CrossDomainConfig):
            raise UserError(
                f"{where} judges by the rows of the dataset, which for method={self.method_name} are of another domain "
                "than the one that policies are for; set study.objective.kind=online"
            )
        if objective.metric == "initial_value" and not getattr(method, "has_critics", False):
            raise UserError(
                f"{where} is what a method's critics say, and method={self.method_name} has none; set "
                "study.objective.metric=fqe, which learns them"
            )
        if objective.metric == "model_return" and not isinstance(
            getattr(self.method, "dynamics", None), DynamicsConfig
        ):
            raise UserError(f"{where} needs an ensemble, and method={self.method_name} has no settings of one")
        if objective.metric != "model_return" and "method.gamma" in self.study.space:
            raise UserError(
                f"{where} is a discounted value, so trials with other values of method.gamma cannot be compared by it; "
                "leave method.gamma out of study.space, or set study.objective.metric=model_return"
            )

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.num_seeds)]

    @property
    def runs_per_pack(self) -> int | None:
        """The size of the packs, where that is settled: as configured, or a population."""
        return self.compute.runs_per_pack if self.study.pbt is None else self.study.num_trials

    def study_spec(self) -> StudySpec:
        """The study as `sweeps` takes it; steps are updates."""
        s = self.study
        spec = StudySpec(
            s.name, s.space, s.sampler, s.pruner, s.num_trials, self.num_seeds, total_steps=self.method.num_updates,
            trials=s.trials, objective=s.objective, warm_start=s.warm_start, divergence=s.divergence, racing=s.racing,
            confirm=s.confirm, storage=s.storage, takeover_minutes=s.takeover_minutes, pbt=s.pbt,
        )  # fmt: skip
        spec.validate()
        return spec


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{name}={value} must be at least {least}")


def load_config(files: Sequence[Path | Mapping[str, Any]], overrides: Sequence[str]) -> Config:
    """Resolve a configuration.

    Args:
        files: YAML files or mappings, later ones over earlier ones.
        overrides: `key=value` words of a command line, over everything.

    Raises:
        UserError: an unknown key (with the nearest valid one), a value of the wrong type or outside its range; a word
            that changes nothing.
    """
    given = OmegaConf.create()
    for file in files:
        given = _merge(given, _normal_method(_read(file)))
    given = _merge(given, _parse_overrides(overrides))
    try:
        config = _resolve(given)
        check_effect(config, [word.partition("=")[0] for word in overrides])
        return config
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{where}{str(error).splitlines()[0]}") from None


def check_effect(config: Config, keys: Iterable[str]) -> None:
    """Refuse keys of the method's settings that change nothing."""
    idle_setting = getattr(config.method, "idle_setting", lambda key: None)
    judged_in_model = config.study.objective.metric == "model_return"
    for key in keys:
        if judged_in_model and key.startswith("method.dynamics."):
            continue
        if key.startswith("method.") and (why := idle_setting(key.removeprefix("method."))) is not None:
            raise UserError(f"{why}; leave it out, or change what it depends on")


def _resolve(given: DictConfig) -> Config:
    """The configuration that the keys given by files and overrides make, over the method's settings."""
    block = given.get("method")
    if not isinstance(block, DictConfig) or block.get("name") is None:
        raise UserError("no method given; say for example method=ravl")
    dataset = given.get("dataset")
    if dataset is None:
        raise UserError("no dataset given; say for example dataset=embedded/pendulum-medium-v0")
    if isinstance(dataset, DictConfig | ListConfig):
        raise UserError(f"dataset must be one name, not {dataset}")
    trials = OmegaConf.select(given, "study.trials")
    if trials is not None and not isinstance(trials, ListConfig):
        raise UserError(
            f"study.trials={trials} must list the settings of every trial, such as [{{method.num_critics: 2}}]; the "
            "number of trials is study.num_trials"
        )
    if "method_name" in given:
        raise UserError("unknown key method_name; did you mean method?")
    name = str(block.name)
    del block["name"]
    method = load_method(name)
    wanted = block.get("variant")  # a year is read as a number
    variant, settings = method_settings(name, base_name(str(dataset)), None if wanted is None else str(wanted))
    schema = OmegaConf.structured(Config)
    schema.method = OmegaConf.structured(method.Config)
    schema.method_name = name
    resolved = _merge(schema, {"method": {**settings, "variant": variant}})
    resolved = _merge(resolved, given)
    try:
        config = OmegaConf.to_object(resolved)
    except MissingMandatoryValue as error:
        raise UserError(f"a value is missing: {error.full_key}") from None
    assert isinstance(config, Config)
    return config


def apply_params(config: Config, params: Mapping[str, Any]) -> Config:
    """The configuration of a trial: `config` with some keys set.

    Raises:
        UserError: as `load_config`.
    """
    if all(key.startswith("method.") and key not in ("method.name", "method.variant") for key in params):
        try:
            return _with_settings(config, params)
        except Exception:  # whatever is wrong is found again below, and said with its full key
            pass
    return load_config([to_dict(config), nested(params)], [])


def _with_settings(config: Config, params: Mapping[str, Any]) -> Config:
    """What `load_config` would give, without resolving anew all that does not change: a driver does this for every
    trial, and to resolve everything takes a hundred times as long."""
    blocks = ("method", "study", "evaluation", "compute", "schedule")
    kept = copy.deepcopy({name: getattr(config, name) for name in blocks})
    changes = nested(params).get("method", {})
    return dataclasses.replace(config, **{**kept, "method": _changed(kept["method"], changes)})


def _changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    """A block of settings with others in it, as OmegaConf converts and checks them.

    Raises:
        Exception: anything that OmegaConf, or the block, has against them.
    """
    values: dict[str, Any] = {}
    block: Any = type(settings)
    for name, value in changes.items():
        part = getattr(settings, name)
        if dataclasses.is_dataclass(part):
            values[name] = _changed(part, value)
        else:
            merged = OmegaConf.merge(_setting(block, name), {name: value})
            values[name] = getattr(OmegaConf.to_object(merged), name)
    return dataclasses.replace(settings, **values)


@functools.cache
def _setting(block: type, name: str) -> DictConfig:
    """One field of a block, without a value."""
    alone = dataclasses.make_dataclass("Setting", [(name, typing.get_type_hints(block)[name], MISSING)])
    schema = OmegaConf.structured(alone)
    assert isinstance(schema, DictConfig)
    return schema


def check_space(config: Config) -> StudySpec:
    """The study, if every key of its search space exists and takes the values it may be given."""
    spec = config.study_spec()
    space = spec.validate()
    for key in config.study.space:
        if not key.startswith("method."):
            raise UserError(f"study.space: {key!r} cannot be searched; only keys that begin with method. can")
    check_effect(config, map(str, config.study.space))
    for key in {key for params in config.study.trials for key in params}:
        if not str(key).startswith("method.") and key != "schedule":
            raise UserError(f"study.trials: {key!r} cannot differ; only schedule and keys that begin with method. can")
    warm = config.study.warm_start
    if (warm.settings or warm.variants or warm.studies) and not config.study.space:
        raise UserError("study.warm_start names points of a search, but study.space varies nothing; leave it out")
    if config.study.racing.first_seeds is not None and not spec.searches:
        raise UserError(
            "study.racing compares the trials of a search, but this study has a single trial or lists its trials; "
            "leave it out"
        )
    if config.study.trials and config.study.enqueue:
        raise UserError("study.trials lists every trial, so none can be enqueued; leave out study.enqueue")
    for params in config.study.enqueue:
        space.check(params)
    for _ in corner_configs(config):
        pass
    return spec


def corner_configs(config: Config) -> Iterator[Config]:
    """The configuration, and what trials can make of it: one for every end and choice of the search space, which is a
    trial's but for the other keys, and one for every enqueued or listed trial."""
    yield config
    for key, entry in config.study.space.items():
        if isinstance(entry, Mapping):
            for value in [entry.get("low"), entry.get("high"), *(entry.get("choices") or [])]:
                if value is not None:
                    yield apply_params(config, {key: value})
    for params in (*config.study.enqueue, *config.study.trials):
        yield apply_params(config, params)


def to_dict(config: Config) -> dict[str, Any]:
    """As plain values, in the form that a YAML file has (`method: {name: ..., ...}`)."""
    plain = dataclasses.asdict(config)
    name = plain.pop("method_name")
    plain["method"] = {"name": name, **plain["method"]}
    return plain


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def run_config(config: Config, params: Mapping[str, Any], seed: int) -> Config:
    """The configuration of one run of a trial, which trains that run alone when given to `offsweep train --config`."""
    run = apply_params(config, params)
    run.seed, run.num_seeds = seed, 1
    run.study = StudyConfig(objective=config.study.objective)  # what its evaluations measure
    return run


OBJECTIVE_STAGE = "objective_dynamics"
"""The name of the ensemble that only the study's objective needs."""


def stages_of(config: Config) -> dict[str, Stage]:
    """What has to exist before a run can start: the method's stages, and the ensemble that `model_return` rolls out in,
    if it is none of them."""
    stages = load_method(config.method_name).stages(config.method)
    if config.study.objective.metric == "model_return" and "dynamics" not in stages:
        stages = {**stages, OBJECTIVE_STAGE: ensemble_stage(config.method.dynamics)}
    return stages


def identity(config: Config, dataset_hash: str) -> dict[str, Any]:
    """What the result of a run depends on: not where or how it is computed."""
    plain = to_dict(config)
    plain["method"] = {"name": config.method_name, **effective_settings(config.method)}
    del plain["evaluation"]["diagnostics"]
    parts = ("method", "seed", "evaluation", *(["schedule"] if config.schedule else []))
    return {k: plain[k] for k in parts} | {"dataset": dataset_hash}


def settings_hash(config: Config) -> str:
    """The same for runs of the same settings and seed, whatever data they learn from: by it runs are found where the
    data are not at hand."""
    return digest(identity(config, ""))


def pack_key(config: Config) -> str:
    """Runs with equal keys can be trained by one learner: they differ only in seed and per-member hyperparameters."""
    common, objective = common_settings(config.method), config.study.objective
    parts = [config.method_name, config.dataset, common, dataclasses.asdict(config.evaluation)]
    if objective.metric != SCORE:
        parts.append(dataclasses.asdict(objective))
    if objective.metric == "model_return":  # in an ensemble that the method itself may have no use for
        parts.append(dataclasses.asdict(config.method.dynamics))
    return digest(parts)


def _read(file: Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(file, Mapping):
        return dict(file)
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a mapping of configuration keys")
    return content


def _normal_method(content: dict[str, Any]) -> dict[str, Any]:
    """`method: ravl` means `method: {name: ravl}`."""
    if isinstance(content.get("method"), str):
        return {**content, "method": {"name": content["method"]}}
    return content


def _parse_overrides(words: Sequence[str]) -> DictConfig:
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not of the form key=value")
    words = [f"method.name={w.partition('=')[2]}" if w.startswith("method=") else w for w in words]
    try:
        return OmegaConf.from_dotlist(list(words))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"cannot read the overrides: {str(error).splitlines()[0]}") from None


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots as the blocks of a YAML file."""
    tree: dict[str, Any] = {}
    for key, value in params.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _merge(base: DictConfig, other: DictConfig | Mapping[str, Any]) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, other)
    except ConfigKeyError as error:
        raise UserError(_unknown_key(base, str(error.full_key))) from None
    except TypeError as error:  # OmegaConf's for a list where a mapping stands, or the other way round
        raise UserError(f"a list and a block of settings stand at the same key: {error}") from None
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{where}{str(error).splitlines()[0]}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _unknown_key(schema: DictConfig, full_key: str) -> str:
    *parents, leaf = full_key.split(".")
    node: Any = schema
    for parent in parents:
        node = node[parent] if isinstance(node, DictConfig) and parent in node else {}
    near = difflib.get_close_matches(leaf, [str(k) for k in node], n=1, cutoff=0.0)
    prefix = ".".join([*parents, ""])
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"unknown key {full_key}{hint}"
