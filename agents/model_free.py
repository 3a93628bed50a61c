"""What the model-free methods share: a pack that learns from the rows of its dataset, and beside them from synthetic
ones if there is a source of those (`agents.synthetic`).

An epoch is `updates_per_epoch` gradient updates. Without a source there are no stages and no rollouts.

Shapes: M member, N critic, G = M*N, K noises, B batch, S observation, A action, W columns of a row, X any width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from agents.actors import Actor, actor_from_arrays
from agents.chunk import ChunkRunner, Updater
from agents.config import ScheduleConfig
from agents.critics import initial_values
from agents.dynamics import DynamicsConfig
from agents.dynamics_stage import ensemble_of, ensemble_stage
from agents.edm_sampler import SamplerConfig
from agents.graphs import default_capture
from agents.guidance import GuidanceConfig, check_guidance
from agents.method import Job, JobsAhead, Measures, RolloutResult, Stage, TrainingData
from agents.networks import StackedMLP
from agents.pack_networks import PackNetworks
from agents.policies import with_standardisation
from agents.replay import Replay, transition_rows
from agents.rollout import MAX_LENGTH
from agents.synthetic import DiffusionSource, EnsembleSource, Pools, PoolSource, SyntheticConfig, mapped_rows
from agents.trajectory_diffusion import DiffusionConfig, TrajectoryModel, diffusion_stage
from agents.trajectory_metrics import PoolDiagnostics
from envs.errors import UserError
from envs.termination import termination_rule

SOURCE_PARTS = {"none": (), "diffusion": ("diffusion", "sampler", "guidance"), "ensemble": ("dynamics",)}
"""The parts of a configuration that each source of synthetic rows needs."""

REWARD_RANGE = 1000.0
"""Best less worst return with reward_scale: return-range."""

ConfigT = TypeVar("ConfigT", bound="ModelFreeConfig")


@dataclass
class ModelFreeConfig(ScheduleConfig):
    """What every model-free method has: a schedule, and where synthetic rows come from, if any do."""

    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    # of synthetic.source=diffusion
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    # of synthetic.source=ensemble
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one = self.synthetic
        if one.source == "none":
            return
        if one.refresh_every % self.updates_per_epoch:
            raise UserError(
                f"method.synthetic.refresh_every={one.refresh_every} must be a multiple of "
                f"method.updates_per_epoch={self.updates_per_epoch}"
            )
        if one.source == "diffusion":
            check_guidance(self.guidance, self.sampler)
            if self.diffusion.windows == "padded" and self.sampler.terminals != "generated":
                raise UserError(
                    f"method.sampler.terminals={self.sampler.terminals} would take the rows behind a terminal for "
                    "transitions, which method.diffusion.windows=padded generates; set terminals=generated, or "
                    "windows=whole"
                )
            if one.length not in (None, self.diffusion.length - 1):
                raise UserError(
                    f"method.synthetic.length={one.length} must be one less than method.diffusion.length="
                    f"{self.diffusion.length}, or null: the model generates trajectories of its own length"
                )
        if self.synthetic_length > MAX_LENGTH:
            raise UserError(
                f"method.diffusion.length={self.diffusion.length} must be at most {MAX_LENGTH + 1} for synthetic rows"
            )
        if one.source == "ensemble" and self.dynamics.filter != "none":
            raise UserError(
                f"method.dynamics.filter={self.dynamics.filter} needs a model-based method; a model-free one rolls out "
                "in the plain ensemble"
            )

    @property
    def num_real(self) -> int:
        """Rows of a batch that are of the dataset."""
        one = self.synthetic
        return self.batch_size if one.source == "none" else int(one.real_ratio * self.batch_size)

    @property
    def synthetic_length(self) -> int:
        """Transitions of a synthetic trajectory."""
        return self.synthetic.length or self.diffusion.length - 1

    @property
    def ring_rows(self) -> int:
        """Synthetic rows of a member, all at once."""
        one = self.synthetic
        return 0 if one.source == "none" else one.num_trajectories * self.synthetic_length * one.pools_retained

    @property
    def num_rollout_phases(self) -> int:
        one = self.synthetic
        return 0 if one.source == "none" else -(-self.num_updates // one.refresh_every)

    @property
    def idle_parts(self) -> tuple[str, ...]:
        """Parts that nothing depends on (see `agents.method.effective_settings`)."""
        used = SOURCE_PARTS[self.synthetic.source]
        idle = {name for names in SOURCE_PARTS.values() for name in names} - set(used)
        return (*sorted(idle), *(() if used else ("synthetic",)))

    def idle_setting(self, key: str) -> str | None:
        """Why a setting changes nothing, if so.

        Args:
            key: inside `method`, such as `guidance.coef`.
        """
        if key.partition(".")[0] not in self.idle_parts or key == "synthetic.source":
            return None
        return f"method.{key} has no effect with method.synthetic.source={self.synthetic.source}"


class PackUpdater(Updater, Protocol):
    """An updater whose members can be dropped and whose state can be kept."""

    def select(self, members: Sequence[int]) -> PackUpdater: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load in place."""


class ModelFree(ABC):
    """A pack of M runs; see `agents.method.Method`. Methods give it their updater and policy.

    Args:
        configs: one per member; what is not per member is equal in all of them.
        artifacts: of the source of synthetic rows, if there is one.
    """

    # makes the pack's networks from configs, seeds, observation_dim, action_dim and device
    Updater: ClassVar[Callable[..., PackUpdater]]
    has_critics: ClassVar[bool] = True  # named `critic` in the updater, of columns [s, a] in the units of `self.data`

    def __init__(
        self,
        configs: Sequence[ModelFreeConfig],
        seeds: Sequence[int],
        data: TrainingData,
        artifacts: Mapping[str, dict[str, Any]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.configs, self.seeds = configs, list(seeds)
        self.shared = configs[0]
        self.device = torch.device(device)
        self.data = self.prepare(data)
        # the policy file has to standardise if the method does so and not the dataset
        self._standardises = data.observation_mean is None and self.data.observation_mean is not None
        self.replay = Replay(self.real_rows(), len(self.seeds), self.shared.ring_rows, device)
        self.updater = self.make_updater()
        source = self._make_source(data, artifacts)
        self.pools: Pools | None = None
        if source is not None:
            schedule = self.shared.updates_per_epoch, self.shared.num_epochs
            as_learned = mapped_rows(data, self.data)
            self.pools = Pools(self.shared.synthetic, source, self.seeds, self.replay, as_learned, *schedule)
        self._runner = self._make_runner()
        self._pool_diagnostics: PoolDiagnostics | None = None

    def prepare(self, data: TrainingData) -> TrainingData:
        """The data that the runs learn from."""
        return data

    def real_rows(self) -> Tensor:
        """The rows of `self.data` that minibatches are made of."""
        d = self.data
        return transition_rows(d.observations, d.actions, d.rewards, d.terminals, d.next_observations)

    def make_updater(self) -> PackUpdater:
        return type(self).Updater(
            self.configs, self.seeds, self.data.observation_dim, self.data.action_dim, self.device
        )

    @abstractmethod
    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        """A member's policy for observations as `self.data` has them (see `agents.policies`)."""

    @staticmethod
    def stages(config: ModelFreeConfig) -> dict[str, Stage]:
        if config.synthetic.source == "ensemble":
            return {"dynamics": ensemble_stage(config.dynamics)}
        return {"trajectories": diffusion_stage(config.diffusion)} if config.synthetic.source == "diffusion" else {}

    @staticmethod
    def check_environment(config: ModelFreeConfig, env_id: str) -> None:
        by_rule = {"ensemble": True, "diffusion": config.sampler.terminals == "rule", "none": False}
        if by_rule[config.synthetic.source]:
            termination_rule(env_id)

    @property
    def num_members(self) -> int:
        return len(self.seeds)

    # ---- synthetic rows -----------------------------------------------------------------------------------------

    def _make_source(self, data: TrainingData, artifacts: Mapping[str, dict[str, Any]]) -> PoolSource | None:
        """Where synthetic rows come from.

        Args:
            data: in the units in which the stages have seen it.
        """
        one = self.shared
        if one.synthetic.source == "ensemble":
            ensemble = ensemble_of(artifacts["dynamics"], one.dynamics).to(self.device)
            return EnsembleSource(ensemble, data, self.device, one.synthetic, one.synthetic_length)
        if one.synthetic.source == "diffusion":
            model = TrajectoryModel.from_state_dict(artifacts["trajectories"])
            coefs = [config.guidance.coef for config in self.configs]
            return DiffusionSource(
                model.to(self.device), data, self.device, one.synthetic, one.sampler, one.guidance, coefs
            )
        return None

    def actor(self) -> Actor:
        """The policies as they are, copied, for observations as the data given to `__init__` has them."""
        return actor_from_arrays([self.policy(m) for m in range(self.num_members)], device=self.device)

    @property
    def rollout_model(self) -> Any:
        if self.pools is None:
            raise ValueError("nothing is generated here")
        return self.pools.source.model

    def rollout_jobs(self, epoch: int) -> Sequence[Job]:
        return [] if self.pools is None else self.pools.jobs(epoch, self.actor)

    def add_rollouts(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        if self.pools is None or not results:
            return [{} for _ in self.seeds]
        return self.pools.add(results)

    def ask_ahead(self, epoch: int) -> None:
        if self.pools is not None:
            self.pools.ask_ahead(epoch, self.actor)

    @property
    def jobs_ahead(self) -> JobsAhead | None:
        return None if self.pools is None else self.pools.ahead

    # ---- updates ----------------------------------------------------------------------------------------------

    def _make_runner(self) -> ChunkRunner:
        return ChunkRunner(self.updater, self.replay, self.shared.precision, default_capture(self.device))

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        cfg, num_real = self.shared, self.shared.num_real
        metrics = self._runner.run_epoch(
            self.seeds, epoch, cfg.updates_per_epoch, num_real, cfg.batch_size - num_real, self.data.action_dim
        )
        if self.pools is None:
            return metrics
        return [{**row, **self.pools.staleness(epoch + 1)} for row in metrics]

    # ---- members and checkpoints --------------------------------------------------------------------------------

    def diagnostics(self, epoch: int) -> list[Measures]:
        """Metrics `synthetic/*` of what the pools hold (see `agents.trajectory_metrics`)."""
        if self.pools is None:
            return [{} for _ in range(self.num_members)]
        if self._pool_diagnostics is None:  # made once, of the whole dataset
            self._pool_diagnostics = PoolDiagnostics(self.data)
        members = range(self.num_members)
        # pools and policies as the runs learn them
        actor = actor_from_arrays([self.actor_arrays(m) for m in members], device=self.device)
        rows, tags = ([of(m) for m in members] for of in (self.replay.member_rows, self.replay.member_tags))
        return self._pool_diagnostics(actor, rows, tags, self.seeds, epoch, self.shared.synthetic_length)

    def policy(self, member: int) -> dict[str, np.ndarray]:
        arrays = self.actor_arrays(member)
        mean, std = self.data.observation_mean, self.data.observation_std
        if self._standardises and mean is not None and std is not None:
            arrays = with_standardisation(arrays, mean.numpy(), std.numpy())
        return arrays

    def initial_values(self) -> Tensor:
        """What the critics make of the policies (see `agents.critics.initial_values`), `(M,)`."""
        critic: StackedMLP = self.updater.critic  # type: ignore[attr-defined]
        actor = actor_from_arrays([self.actor_arrays(m) for m in range(self.num_members)], device=self.device)
        return initial_values(critic, actor, self.data, self.shared.gamma)

    def select(self, members: Sequence[int]) -> ModelFree:
        other = copy.copy(self)
        other.configs, other.seeds = [self.configs[m] for m in members], [self.seeds[m] for m in members]
        other.updater, other.replay = self.updater.select(members), self.replay.select(members)
        other.pools = None if self.pools is None else self.pools.select(members, other.replay)
        other._runner = other._make_runner()
        return other

    def state_dict(self) -> dict[str, Any]:
        state = {"updater": self.updater.state_dict()}
        if self.pools is not None:
            state |= {"replay": self.replay.state_dict(), "pools": self.pools.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updater.load_state_dict(state["updater"])
        if self.pools is not None:
            self.replay.load_state_dict(state["replay"])
            self.pools.load_state_dict(state["pools"], self.actor)


# ---- what updaters are made of --------------------------------------------------------------------------------------


class NetworkUpdater(PackNetworks, Generic[ConfigT]):
    """Networks of a pack and their optimisers. A method's own has `build` and `update` (see `agents.chunk.Updater`).

    Args:
        configs: one per member; M is their number.
        seeds: one per member, of the networks' initial weights.
        observation_dim, action_dim: S and A; actions lie in [-1, 1].
        device: where everything lives.
    """

    per_member = ("configs",)
    num_noises: int = 0  # an update takes no random numbers
    period: int = 1  # every update is the same computation

    def __init__(
        self, configs: Sequence[ConfigT], seeds: Sequence[int], observation_dim: int, action_dim: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.configs = list(configs)
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.build(seeds, device)
        self.bind()

    @property
    def shared(self) -> ConfigT:
        """The settings that all members have in common."""
        return self.configs[0]

    def of_each(self, name: str) -> list[Any]:
        """One setting of every member."""
        return [getattr(config, name) for config in self.configs]

    def build(self, seeds: Sequence[int], device: torch.device | str) -> None:
        """Make the networks, with the initial weights of the members' seeds, and their optimisers."""
        raise NotImplementedError


def scaled(data: TrainingData, normalize_observations: bool, reward_scale: str) -> TrainingData:
    """Data whose observations are standardised and whose rewards are scaled, if the settings of these names say so."""
    if normalize_observations:
        data = data.standardised()
    return data if reward_scale == "none" else data.with_return_range(REWARD_RANGE)


def split_rows(rows_MBW: Tensor, observation_dim: int, action_dim: int) -> tuple[Tensor, ...]:
    """Views s `(M, B, S)`, a `(M, B, A)`, [s, a], r `(M, B)`, d `(M, B)` and s' of a minibatch."""
    s, a = observation_dim, action_dim
    obs, action, state_action = rows_MBW[..., :s], rows_MBW[..., s : s + a], rows_MBW[..., : s + a]
    return obs, action, state_action, rows_MBW[..., s + a], rows_MBW[..., s + a + 1], rows_MBW[..., s + a + 2 :]


def member_values(values: Sequence[float], device: torch.device | str) -> Tensor:
    """One hyperparameter of every member, `(M, 1, 1)`."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
