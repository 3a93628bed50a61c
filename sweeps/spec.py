"""What a study is, as plain dataclasses: the `study` block of a configuration, and its own `study.yaml`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sweeps.confirm import ConfirmSpec
from sweeps.divergence import DivergenceSpec
from sweeps.errors import StudyError, suggestion
from sweeps.objectives import ObjectiveSpec
from sweeps.pbt import PBTSpec
from sweeps.racing import RacingSpec
from sweeps.space import SearchSpace
from sweeps.warm_start import WarmStartSpec

DIRECTIONS = ("maximize", "minimize")


@dataclass
class SamplerSpec:
    """How the next trial is chosen."""

    name: str = "tpe"  # tpe, gp-mixed, gp, qmc or random
    seed: int = 0  # >= 0; the same seed and the same results give the same trials


@dataclass
class PrunerSpec:
    """When a trial is stopped early."""

    name: str = "median"  # median, percentile, asha, hyperband or none
    # Share of total_steps before which no trial is pruned. Offline model-based training often peaks early and
    # then exploits its model, so early scores mislead.
    warmup_fraction: float = 1 / 3  # 0 to 1
    startup_trials: int = 4  # trials that must have finished before any is pruned; of median and percentile
    percentile: float = 25.0  # of percentile: the share, in per cent, of trials that go on at a step
    reduction_factor: int = 3  # of asha and hyperband: one in so many trials goes on at a rung


@dataclass
class StudySpec:
    """A study: what is varied, how, and for how long."""

    name: str
    space: dict[str, Any] = field(default_factory=dict)  # see sweeps.space; empty: one trial as configured
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    pruner: PrunerSpec = field(default_factory=PrunerSpec)
    num_trials: int = 1
    seeds_per_trial: int = 1  # runs per trial
    direction: str = "maximize"  # of the trial's value: maximize or minimize
    total_steps: int = 1  # the largest step that is reported, in the unit of the reports (such as updates)
    # instead of a space: every trial's settings, {configuration key: value}, in the order of the trials' numbers. All
    # of them run to their end, whatever the pruner
    trials: list[dict[str, Any]] = field(default_factory=list)
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)  # what a trial's value is
    warm_start: WarmStartSpec = field(default_factory=WarmStartSpec)
    divergence: DivergenceSpec = field(default_factory=DivergenceSpec)
    racing: RacingSpec = field(default_factory=RacingSpec)
    confirm: ConfirmSpec = field(default_factory=ConfirmSpec)
    storage: str | None = None  # URL of a database or gRPC server that several drivers share; None: the study's folder
    takeover_minutes: float = 30.0  # of silence, after which another driver does a driver's running trials anew
    pbt: PBTSpec | None = None  # the trials are a population that is trained together

    @property
    def searches(self) -> bool:
        """Whether it looks for good settings: its trials are not listed, and there is more than one."""
        return bool(self.space) and not self.trials and self.num_trials > 1

    def validate(self) -> SearchSpace:
        """Check every field; returns the search space that was read on the way.

        Raises:
            StudyError, SpaceError: naming the first field that makes no sense.
        """
        from sweeps.pruners import check_pruner
        from sweeps.samplers import check_sampler
        from sweeps.storage import check_url

        if not self.name:
            raise StudyError("The study needs a name; set study.name.")
        for label, number, least in (
            ("num_trials", self.num_trials, 1),
            ("seeds_per_trial", self.seeds_per_trial, 1),
            ("total_steps", self.total_steps, 1),
            ("sampler.seed", self.sampler.seed, 0),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise StudyError(f"study.{label} must be a whole number of at least {least}, not {number!r}.")
        if self.direction not in DIRECTIONS:
            raise StudyError(f"Unknown study.direction '{self.direction}'; {suggestion(self.direction, DIRECTIONS)}.")
        check_sampler(self.sampler.name)
        check_pruner(self.pruner)
        self.objective.validate()
        self.warm_start.validate()
        self.divergence.validate()
        self.racing.validate(self.seeds_per_trial)
        self.confirm.validate()
        if not 0 < self.takeover_minutes < float("inf"):
            raise StudyError(f"study.takeover_minutes must be above 0, not {self.takeover_minutes!r}.")
        if self.storage is not None:
            check_url(self.storage)
            if self.objective.kind == "hybrid":
                raise StudyError(
                    "study.objective.kind=hybrid needs the policies of all trials in one place, which drivers that "
                    "share study.storage do not have; leave out study.storage, or set study.objective.kind=offline."
                )
        space = SearchSpace.from_config(self.space)
        if self.trials:
            self._check_trials()
        elif not space.parameters and self.num_trials > 1:
            raise StudyError(
                f"study.num_trials is {self.num_trials}, but study.space varies nothing, so all trials "
                "would be the same; add parameters to study.space, or raise study.seeds_per_trial instead."
            )
        if self.pbt is not None:
            self.pbt.validate(space, self.num_trials, self.seeds_per_trial)
            if self.storage is not None:
                raise StudyError("A population is trained by one driver; leave out study.storage or study.pbt.")
            if self.pruner.name != "none" and self.pruner != PrunerSpec():
                raise StudyError(
                    "Nothing is pruned in a population, whose worst members are replaced; leave out study.pruner."
                )
        return space

    def _check_trials(self) -> None:
        if self.space:
            raise StudyError("study.trials lists every trial, so there is nothing to search; leave out study.space.")
        if self.num_trials != len(self.trials):
            raise StudyError(
                f"study.num_trials is {self.num_trials}, but study.trials lists {len(self.trials)}; leave out "
                "study.num_trials."
            )
        for number, params in enumerate(self.trials):
            if not isinstance(params, Mapping):
                raise StudyError(f"study.trials must list blocks of settings, but trial {number} is {params!r}.")
            if params in self.trials[:number]:
                first = self.trials.index(params)
                raise StudyError(f"study.trials: trials {first} and {number} are the same; leave one of them out.")

    def to_config(self) -> dict[str, Any]:
        """As plain dictionaries, lists and scalars."""
        config: dict[str, Any] = _plain(asdict(self))
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StudySpec:
        """The inverse of `to_config`; missing fields take their defaults.

        Raises:
            StudyError: an unknown field, or no name.
        """
        known = dict(_known(cls, config, "study"))
        if "name" not in known:
            raise StudyError("The study needs a name; set study.name.")
        if "sampler" in known:
            known["sampler"] = SamplerSpec(**_known(SamplerSpec, known["sampler"], "study.sampler"))
        if "pruner" in known:
            known["pruner"] = PrunerSpec(**_known(PrunerSpec, known["pruner"], "study.pruner"))
        for name, block in (
            ("objective", ObjectiveSpec), ("warm_start", WarmStartSpec), ("divergence", DivergenceSpec),
            ("racing", RacingSpec), ("confirm", ConfirmSpec), ("pbt", PBTSpec),
        ):  # fmt: skip
            if known.get(name) is not None:
                known[name] = block(**_known(block, known[name], f"study.{name}"))
        return cls(**known)

    def save(self, path: Path) -> None:
        """Write as YAML, atomically."""
        text = yaml.safe_dump(self.to_config(), sort_keys=False, allow_unicode=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> StudySpec:
        """Read what `save` wrote.

        Raises:
            StudyError: the file cannot be read as a study.
        """
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise StudyError(f"Cannot read the study in {path}: {' '.join(str(error).split())}.") from error
        if not isinstance(config, Mapping):
            raise StudyError(f"{path} does not describe a study; restore the file or start a new study.")
        return cls.from_config(config)


def _known(cls: type, config: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(config, Mapping):
        raise StudyError(f"{where} must be a block of settings, not {config!r}.")
    names = [item.name for item in fields(cls)]
    for name in config:
        if name not in names:
            raise StudyError(f"Unknown setting {where}.{name}; {suggestion(str(name), names)}.")
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
