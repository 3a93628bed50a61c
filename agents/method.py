"""What a method is to the rest of the system, and how one is found by name.

A method is one module of this package, `agents/<name>.py`, beside `agents/<name>.yaml` with its papers' settings. The
module defines `METHOD`, a class with the interface of `Method`. Nothing else has to be edited to add one:
docs/adding_a_method.md goes through one.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import fnmatch
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor

import agents
from agents.actors import Actor
from agents.rollout import Dynamics, Penalty, Rollout, RolloutStatistics, draw
from envs.dataset import Dataset
from envs.errors import UserError
from envs.termination import termination_rule
from envs.transforms import STD_OFFSET

Measures = dict[str, float | list[float]]
"""Metrics, and lists of numbers for figures."""


def per_member(default: Any, *, off_at_zero: bool = False) -> Any:
    """A config field that only enters arithmetic: runs that differ in it can share a pack.

    Args:
        off_at_zero: a weight that leaves something out of the computation where it is 0; runs with and without it do
            not share a pack.
    """
    return dataclasses.field(default=default, metadata={"per_member": True, "off_at_zero": off_at_zero})


def common_settings(config: Any) -> dict[str, Any]:
    """What runs of a pack agree in: the config without its fields per member, those of its parts included, but with
    whether those that can be off are; and without parts that nothing depends on (see `effective_settings`)."""
    plain = effective_settings(config)
    for item in dataclasses.fields(config):
        if item.metadata.get("off_at_zero"):
            plain[item.name] = plain[item.name] != 0
        elif item.metadata.get("per_member"):
            del plain[item.name]
        elif item.name in plain and dataclasses.is_dataclass(part := getattr(config, item.name)):
            plain[item.name] = common_settings(part)
    return plain


def changeable_settings(config: Any) -> list[str]:
    """The fields per member, those of its parts in use included (`guidance.coef`), that count as long as a run trains
    and can therefore change meanwhile: without those that it says are part of what is learned (`initial_settings`)."""
    kept, names = effective_settings(config), []
    for item in dataclasses.fields(config):
        if item.metadata.get("per_member") and item.name not in getattr(config, "initial_settings", ()):
            names.append(item.name)
        elif item.name in kept and dataclasses.is_dataclass(part := getattr(config, item.name)):
            names += [f"{item.name}.{name}" for name in changeable_settings(part)]
    return names


def effective_settings(config: Any) -> dict[str, Any]:
    """The config as plain values, without the parts that it says are idle (`idle_parts`): those of a source of data
    that it does not use."""
    plain = dataclasses.asdict(config)
    for name in getattr(config, "idle_parts", ()):
        del plain[name]
    return plain


@dataclass(frozen=True)
class TrainingData:
    """A dataset on the learner's device, actions mapped from the environment's bounds to [-1, 1].

    Shapes: `(N, S)`, `(N, A)`, `(N,)`, `(N, S)`, `(N,)`; mean and standard deviation `(S,)` where the dataset's
    observations are standardised. `return_range` is the best less the worst return of the complete episodes, in the
    units of `rewards` but without a shift; None where no two episodes differ. `rewards` are reward_scale times the
    environment's plus reward_shift. `action_low` and `action_high`, `(A,)` on the CPU, are the environment's bounds;
    None: -1 and 1. `states` `(N, X)`, float64, are the dataset's, where it has any: in memory that may be mapped from a
    file and must not be written to, whatever the device, since the simulator that takes them runs on the CPU.
    `episode_starts`, `(E,)` int64, are the numbers of the rows that episodes begin with.
    """

    env_id: str
    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    observation_mean: Tensor | None = None
    observation_std: Tensor | None = None
    return_range: float | None = None
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    action_low: Tensor | None = None
    action_high: Tensor | None = None
    states: Tensor | None = None
    episode_starts: Tensor | None = None

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, action_low: np.ndarray, action_high: np.ndarray, device: torch.device | str = "cpu"
    ) -> TrainingData:
        """Copy a dataset to a device; `action_low` and `action_high` are the environment's bounds, `(A,)`."""
        center, scale = (action_high + action_low) / 2, (action_high - action_low) / 2
        actions = ((dataset.actions - center) / scale).astype(np.float32)
        arrays = (dataset.observations, actions, dataset.rewards, dataset.next_observations, dataset.terminals)
        obs, action, reward, next_obs, done = (torch.tensor(a, dtype=torch.float32, device=device) for a in arrays)
        scaling, returns = dataset.scaling, dataset.episode_returns()
        mean, std = (
            None if a is None else torch.tensor(a) for a in (scaling.observation_mean, scaling.observation_std)
        )
        return_range: float | None = None
        if len(returns) > 1 and returns.max() > returns.min():
            return_range = float(returns.max() - returns.min()) * abs(scaling.reward_scale)
        return cls(
            dataset.env_id, obs, action, reward, next_obs, done, mean, std, return_range, scaling.reward_scale,
            scaling.reward_shift, torch.tensor(action_low), torch.tensor(action_high), _shared(dataset.states),
            torch.tensor(dataset.episodes.starts, device=device),
        )  # fmt: skip

    def standardised(self) -> TrainingData:
        """The same data with observations of zero mean and unit standard deviation, (s - mean) / (std + 1e-3) with the
        statistics of the observations column, as the dataset option `normalize=observations` makes them; itself where
        they are standardised already."""
        if self.observation_mean is not None:
            return self
        mean = self.observations.mean(0, dtype=torch.float64)
        std = self.observations.double().std(0, correction=0) + STD_OFFSET
        observations, next_observations = (
            ((x - mean) / std).float() for x in (self.observations, self.next_observations)
        )
        return dataclasses.replace(
            self, observations=observations, next_observations=next_observations,
            observation_mean=mean.float().cpu(), observation_std=std.float().cpu(),
        )  # fmt: skip

    def with_return_range(self, target: float) -> TrainingData:
        """The same data with rewards multiplied by target / (best - worst return).

        Raises:
            UserError: no two complete episodes have different returns.
        """
        if self.return_range is None:
            raise UserError(
                "method.reward_scale=return-range needs a dataset with two complete episodes of different returns; "
                "set method.reward_scale=none, and a number as reward_scale in the dataset's name if one is wanted"
            )
        factor = target / self.return_range
        return dataclasses.replace(
            self, rewards=self.rewards * factor, return_range=target, reward_scale=self.reward_scale * factor,
            reward_shift=self.reward_shift * factor,
        )  # fmt: skip

    @property
    def termination(self) -> Termination:
        """When a rollout in these observations, on their device, ends."""
        device = self.observations.device
        moments = (None if x is None else x.to(device) for x in (self.observation_mean, self.observation_std))
        return Termination(self.env_id, *moments)

    @property
    def observation_dim(self) -> int:
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        return self.actions.shape[1]


def _shared(values: np.ndarray | None) -> Tensor | None:
    """A tensor of an array's own memory: who does not use it does not pay for it."""
    if values is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about arrays that are read-only, as mapped ones are
        return torch.from_numpy(values)


@dataclass(frozen=True)
class BuildTogether:
    """How stages of one kind whose `key` is the same are built in one go, each as it would be alone."""

    key: Mapping[str, Any]
    build: Callable[
        [Sequence[Mapping[str, Any]], TrainingData, Callable[[int, int, Mapping[str, float]], None]],
        list[dict[str, Any] | UserError],
    ]
    # settings of each stage, data, report(which of them, step, metrics) -> what is stored, or why one cannot be built


@dataclass(frozen=True)
class Stage:
    """A step that produces a reusable artifact, built once per content key and shared by every run that needs it.

    The key is made of `kind`, `settings` and the dataset's hash: `settings` must name everything else the result
    depends on.
    """

    kind: str
    settings: Mapping[str, Any]
    build: Callable[[TrainingData, Callable[[int, Mapping[str, float]], None]], dict[str, Any]]
    # data, report(step, metrics) -> what is stored (tensors and plain values)
    together: BuildTogether | None = None
    # where that is settled beforehand: how often it reports, and how many updates it makes before each report. Its
    # metrics then hold `seconds_per_update`. Else an epoch, which a report follows, takes the longer the more rows are
    epochs: int | None = None
    epoch_updates: int | None = None

    def can_be_built_with(self, other: Stage) -> bool:
        """Whether both can be built in one go."""
        if self.together is None or other.together is None:
            return False
        return (self.kind, self.together.key) == (other.kind, other.together.key)


@dataclass(frozen=True)
class Termination:
    """An environment's termination rule for observations as the learner has them.

    Args:
        env_id: Gymnasium id.
        mean, std: `(S,)` on the observations' device if these are standardised, else None.
    """

    env_id: str
    mean: Tensor | None = None
    std: Tensor | None = None

    def __call__(self, next_obs: Tensor) -> Tensor:
        """Done flags `(...)` of next observations `(..., S)`."""
        if self.mean is not None and self.std is not None:
            next_obs = next_obs * self.std + self.mean
        return termination_rule(self.env_id)(next_obs)


class Job(Protocol):
    """A shard of what generates transitions: a pure function of its fields and of a model, so that it may run anywhere,
    in any order."""

    @property
    def members(self) -> tuple[int, ...]:
        """Which of the pack it is for, M of them."""

    @property
    def device(self) -> torch.device:
        """Where it lies and is computed."""

    @property
    def num_starts(self) -> int:
        """Trajectories, of all its members."""

    def run(self, model: Any) -> RolloutResult: ...


@dataclass(frozen=True)
class RolloutJob:
    """One shard of the model rollouts of one or several members: a pure function of its fields and the dynamics.

    Everything lies on one device, and there the shard is computed.
    """

    members: tuple[int, ...]  # M of a pack
    seeds: tuple[int, ...]  # (M,)
    epoch: int
    shard: int
    termination: Termination
    actor: Actor  # of M members
    starts: Tensor  # (M, B, S)
    length: int  # steps
    penalty: Penalty | None
    penalty_coef: Tensor  # (M,)
    start_states: Tensor | None = None  # (M, B, X) float64, of the simulator, where they are known and wanted
    cut: str = "terminal"  # one of `agents.rollout.CUTS`

    @property
    def device(self) -> torch.device:
        return self.starts.device

    @property
    def num_starts(self) -> int:
        return self.starts.shape[0] * self.starts.shape[1]

    def run(self, model: Dynamics) -> RolloutResult:
        draws = draw(
            self.seeds, self.epoch, self.shard, self.starts.shape[1], self.length, self.actor.action_dim, model,
            self.starts.device,
        )  # fmt: skip
        rollout = Rollout(self.actor, model, self.termination, self.penalty, self.penalty_coef, self.cut)
        rows, tags, statistics = zip(*rollout(self.starts, draws, self.start_states), strict=True)
        return RolloutResult(self.members, rows, tags, statistics)


@dataclass(frozen=True)
class RolloutResult:
    """What a job's members have gathered, in their order."""

    members: tuple[int, ...]
    rows: tuple[Tensor, ...]  # (n, W) of each member
    tags: tuple[Tensor, ...]  # (n,) int16 of each member: step and half of the starts (see `agents.rollout`)
    statistics: tuple[RolloutStatistics, ...]
    seconds: float = 0.0  # that the job took where it was computed; nothing depends on it

    def renumbered(self, numbers: Mapping[int, int]) -> RolloutResult:
        """The result of some members, which have other numbers now.

        Args:
            numbers: the new number of each member that is kept.
        """
        kept = [i for i, member in enumerate(self.members) if member in numbers]
        return RolloutResult(
            tuple(numbers[self.members[i]] for i in kept), tuple(self.rows[i] for i in kept),
            tuple(self.tags[i] for i in kept), tuple(self.statistics[i] for i in kept), self.seconds,
        )  # fmt: skip


@dataclass(frozen=True)
class JobsAhead:
    """Jobs that may run while training goes on: their results are taken in at the beginning of a certain epoch, however
    early they are there."""

    make: Callable[[], Sequence[Job]]  # the same ones every time
    due: int  # number of that epoch

    @property
    def jobs(self) -> Sequence[Job]:
        return self.make()


class Method(Protocol):
    """A pack of runs of one method. Epochs are counted from 0; all randomness follows from the seeds and the epoch."""

    Config: ClassVar[type]

    @staticmethod
    def stages(config: Any) -> dict[str, Stage]:
        """What has to exist before a run can start, by the name under which `__init__` receives it."""

    @staticmethod
    def check_environment(config: Any, env_id: str) -> None:
        """Called before any compute is spent.

        Raises:
            UserError: runs of this configuration need something that is not known of the environment.
        """

    def __init__(
        self,
        configs: Sequence[Any],
        seeds: Sequence[int],
        data: TrainingData,
        artifacts: Mapping[str, dict[str, Any]],
        device: torch.device | str,
    ) -> None: ...

    @property
    def num_members(self) -> int: ...

    @property
    def rollout_model(self) -> Any:
        """What the jobs are to be run in, such as `Dynamics`; asked for only where there are jobs."""

    def rollout_jobs(self, epoch: int) -> Sequence[Job]:
        """What is to be generated before this epoch's updates, by the policies as they are."""

    def add_rollouts(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        """Take in, in the order of the jobs, what `rollout_jobs` asked for and what of `jobs_ahead` is due; statistics
        per member."""

    def ask_ahead(self, epoch: int) -> None:
        """Called behind `add_rollouts`: note the policies with which `jobs_ahead` generate."""

    @property
    def jobs_ahead(self) -> JobsAhead | None:
        """What is being generated, or still to be, while training goes on: the same after a resume."""

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        """One epoch of gradient updates; metrics per member."""

    def diagnostics(self, epoch: int) -> Sequence[Mapping[str, float | list[float]]]:
        """What is measured at an evaluation after so many epochs, per member: finite values, nothing where there is
        nothing to measure; lists of them are not logged but kept for a figure. It changes nothing."""

    def policy(self, member: int) -> dict[str, np.ndarray]:
        """A member's policy as the arrays of a policy file (`envs.policies`): actions in [-1, 1] for observations as
        the `TrainingData` given to `__init__` has them."""

    def select(self, members: Sequence[int]) -> Method:
        """The same pack with some of its members only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _settings_files() -> dict[str, Path]:
    """Every method's settings by its name."""
    return {path.stem: path for folder in agents.__path__ for path in sorted(Path(folder).glob("*.yaml"))}


def method_names() -> list[str]:
    """Every method of this package."""
    return sorted(_settings_files())


def load_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UserError: there is none of that name.
    """
    if name not in method_names():
        near = difflib.get_close_matches(name.lower(), method_names(), n=1, cutoff=0.0)
        raise UserError(f"unknown method {name!r}; did you mean {near[0]!r}? (known: {', '.join(method_names())})")
    return importlib.import_module(f"agents.{name}").METHOD


@cache
def settings_file(name: str) -> dict[str, Any]:
    """The content of `agents/<name>.yaml`."""
    return yaml.safe_load(_settings_files()[name].read_text())


def method_settings(name: str, dataset: str, variant: str | None) -> tuple[str, dict[str, Any]]:
    """The settings a method's YAML holds for a dataset.

    Args:
        variant: which source to follow; None takes the file's `default_variant`.

    Returns:
        The variant and its settings: the blocks whose pattern matches the dataset, later ones over earlier ones.

    Raises:
        UserError: the method has no such variant, or see `variant_blocks`.
    """
    content = settings_file(name)
    variant = content["default_variant"] if variant is None else variant
    if variant not in content["variants"]:
        known = ", ".join(content["variants"])
        raise UserError(f"method {name} has no variant {variant!r}; choose one of: {known}")
    merged: dict[str, Any] = {}
    for pattern, block in variant_blocks(name, variant).items():
        if fnmatch.fnmatchcase(dataset, pattern):
            merged = _over(merged, block)
    return variant, copy.deepcopy(merged)  # the file's content is kept for other callers


def variant_blocks(name: str, variant: str) -> dict[str, dict[str, Any]]:
    """The blocks of a variant by the pattern of their datasets, in the order in which they apply.

    With `extends: other` they are those of the other variant: a block with the same pattern goes over the other's, in
    its place, and further ones come after all of them.

    Raises:
        UserError: `extends` names no variant, or leads back to where it came from.
    """
    variants, chain = settings_file(name)["variants"], [variant]
    while (parent := variants[chain[-1]].get("extends")) is not None:
        if parent not in variants:
            raise UserError(
                f"agents/{name}.yaml: {chain[-1]} extends {parent!r}, which is none of {', '.join(variants)}"
            )
        if parent in chain:
            raise UserError(f"agents/{name}.yaml: {' extends '.join([*chain, parent])}: a variant cannot extend itself")
        chain.append(parent)
    blocks: dict[str, dict[str, Any]] = {}
    for link in reversed(chain):
        for pattern, block in variants[link].items():
            if pattern != "extends":
                blocks[pattern] = _over(blocks.get(pattern, {}), block)
    return blocks


def _over(block: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """A block with another's values over its own, key by key, inside `dynamics` and the like too."""
    merged = dict(block)
    for key, value in upper.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged
