"""What a study is, as plain dataclasses: the `study` block of a configuration, and its own `study.yaml`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sweeps.errors import StudyError, suggestion
from sweeps.space import SearchSpace

DIRECTIONS = ("maximize", "minimize")


@dataclass
class SamplerSpec:
    """How the next trial is chosen."""

    name: str = "tpe"  # tpe, gp-mixed, gp, qmc or random
    seed: int = 0  # >= 0; the same seed and the same results give the same trials


@dataclass
class PrunerSpec:
    """When a trial is stopped early."""

    name: str = "median"  # median or none
    # Share of total_steps before which no trial is pruned. Offline model-based training often peaks early and
    # then exploits its model, so early scores mislead.
    warmup_fraction: float = 1 / 3  # 0 to 1
    startup_trials: int = 4  # trials that must have finished before any is pruned


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

    def validate(self) -> SearchSpace:
        """Check every field; returns the search space that was read on the way.

        Raises:
            StudyError, SpaceError: naming the first field that makes no sense.
        """
        from sweeps.pruners import PRUNERS
        from sweeps.samplers import check_sampler

        if not self.name:
            raise StudyError("The study needs a name; set study.name.")
        for label, number, least in (
            ("num_trials", self.num_trials, 1),
            ("seeds_per_trial", self.seeds_per_trial, 1),
            ("total_steps", self.total_steps, 1),
            ("sampler.seed", self.sampler.seed, 0),
            ("pruner.startup_trials", self.pruner.startup_trials, 0),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise StudyError(f"study.{label} must be a whole number of at least {least}, not {number!r}.")
        if self.direction not in DIRECTIONS:
            raise StudyError(f"Unknown study.direction '{self.direction}'; {suggestion(self.direction, DIRECTIONS)}.")
        check_sampler(self.sampler.name)
        if self.pruner.name not in PRUNERS:
            raise StudyError(f"Unknown pruner '{self.pruner.name}'; {suggestion(self.pruner.name, PRUNERS)}.")
        if not 0 <= self.pruner.warmup_fraction <= 1:
            raise StudyError(
                f"study.pruner.warmup_fraction is a share from 0 to 1, not {self.pruner.warmup_fraction!r}."
            )
        space = SearchSpace.from_config(self.space)
        if self.trials:
            self._check_trials()
        elif not space.parameters and self.num_trials > 1:
            raise StudyError(
                f"study.num_trials is {self.num_trials}, but study.space varies nothing, so all trials "
                "would be the same; add parameters to study.space, or raise study.seeds_per_trial instead."
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
