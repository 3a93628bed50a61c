"""What the model-based methods share: soft actor-critic on a mix of real rows and model rollouts (MBPO, Janner et al.
2019).

Rollouts step through a learned ensemble, through dynamics that are better or worse (`agents.model_quality`), or through
an ensemble whose predictions are filtered (`agents.transition_filter`).

An epoch is one rollout phase followed by `updates_per_epoch` gradient updates. Each batch holds int(real_ratio *
batch_size) rows of the dataset, the rest come from the member's own ring of model rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.actors import SquashedGaussianActor
from agents.checks import check_choice, check_positive, check_share
from agents.chunk import ChunkRunner
from agents.config import SACConfig, actor_lr_scale, make_sac
from agents.critics import initial_values
from agents.diagnostics import EdgeTest, Standardiser, measure
from agents.dynamics import DynamicsConfig
from agents.dynamics_reward import NOT_DISTILLED, too_many
from agents.dynamics_reward_training import DynamicsRewardConfig, reward_stage
from agents.dynamics_stage import ensemble_of, ensemble_stage
from agents.graphs import default_capture
from agents.method import Measures, RolloutJob, RolloutResult, Stage, TrainingData
from agents.model_error import ModelError, simulator
from agents.model_quality import check_quality, dynamics_of_quality
from agents.penalties import PenaltyWeights
from agents.policies import squashed_arrays
from agents.replay import Replay, transition_rows
from agents.rollout import MAX_LENGTH, SHARD_ROWS, Dynamics, Penalty
from agents.sac import TargetHook
from agents.synthetic import ModelRollouts, by_member, generation_metrics
from agents.transition_filter import FilterConfig, FilteredDynamics, filtering_reward
from envs.errors import UserError
from envs.reach import exact_edge_test
from envs.termination import termination_rule

ROLLOUT_STARTS = ("all", "initial")
# starts of a shard of filtered rollouts on a CPU, which take so long that the usual 2,000 are to be shared
FILTERED_SHARD_ROWS = 500


@dataclass
class ModelBasedConfig(SACConfig):
    """Hyperparameters of a model-based soft actor-critic. Fields marked per member may differ inside a pack."""

    rollout_length: int = 5  # k, steps
    rollout_batch: int = 50_000  # starts per epoch
    # where rollouts start: "all" states of the dataset, or the "initial" ones of its episodes (start distribution nu_0
    # of the edge-of-reach definition = that of the environment)
    rollout_starts: str = "all"
    rollout_epochs_retained: int = 5  # ring capacity in epochs of full-length rollouts
    real_ratio: float = 0.05  # fraction of the batch, truncated to rows
    # of the rollouts' dynamics: -1 an untrained ensemble, 0 the learned one, 1 the environment's own; between them
    # next observations and rewards are interpolated (RAVL, Figure 1)
    model_quality: float = 0.0
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    # with dynamics.filter=morec
    filter: FilterConfig = field(default_factory=FilterConfig)
    dynamics_reward: DynamicsRewardConfig = field(default_factory=DynamicsRewardConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rollout_length", "rollout_batch", "rollout_epochs_retained")
        if self.rollout_length > MAX_LENGTH:
            raise UserError(f"method.rollout_length={self.rollout_length} must be at most {MAX_LENGTH}")
        check_choice(self, "rollout_starts", ROLLOUT_STARTS)
        check_share(self, "real_ratio", interval="[0, 1]")
        if not -1 <= self.model_quality <= 1:
            raise UserError(
                f"method.model_quality={self.model_quality} must lie between -1 (an untrained model) and 1 (the true "
                "dynamics); 0 is the learned model"
            )
        if self.filtered:
            self._check_filter()

    def _check_filter(self) -> None:
        if self.model_quality != 0:
            raise UserError(
                f"method.dynamics.filter={self.dynamics.filter} needs method.model_quality=0, not "
                f"{self.model_quality}: what is filtered are the predictions of the learned ensemble"
            )
        wanted, known = self.filter.num_discriminators, self.dynamics_reward.num_snapshots
        if self.filter.scorer == "discriminators" and wanted > known:
            raise UserError(too_many(wanted, known))
        if self.filter.scorer == "distilled" and not self.dynamics_reward.distil_epochs:
            raise UserError(NOT_DISTILLED)

    @property
    def filtered(self) -> bool:
        """Whether rollouts step through filtered predictions."""
        return self.dynamics.filter != "none"


class ModelBasedSAC:
    """A pack of M runs. Methods give it a penalty with its weights (or none) and their settings."""

    has_critics = True

    def __init__(
        self,
        configs: Sequence[ModelBasedConfig],
        seeds: Sequence[int],
        data: TrainingData,
        artifacts: Mapping[str, dict[str, Any]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.configs, self.seeds, self.data = list(configs), list(seeds), data
        self.shared = shared = configs[0]  # what is not per member is equal in a pack
        self.device = torch.device(device)
        stage = artifacts.get("dynamics")
        # as it predicts, whatever is done with its predictions in `dynamics`
        self.ensemble = None if stage is None else ensemble_of(stage, shared.dynamics).to(self.device)
        self.dynamics = self._make_dynamics(artifacts)
        self.num_real = int(shared.real_ratio * shared.batch_size)
        hook = self.target_hook(artifacts)
        self.sac = make_sac(configs, self.seeds, data.observation_dim, data.action_dim, device, hook)
        self.num_starts = shared.rollout_batch
        self.penalty, self.penalty_weights = self.make_penalty(), self.make_penalty_weights()
        self.rollouts = ModelRollouts(
            self.dynamics, data, self.device, self.num_starts, shared.rollout_length,
            initial_only=shared.rollout_starts == "initial", penalty=self.penalty, cut=shared.filter.cut,
            with_states=shared.model_quality > 0, shard_rows=FILTERED_SHARD_ROWS if shared.filtered else SHARD_ROWS,
        )  # fmt: skip
        capacity = self.num_starts * shared.rollout_length * shared.rollout_epochs_retained
        real = transition_rows(data.observations, data.actions, data.rewards, data.terminals, data.next_observations)
        needs_model = self.num_real < shared.batch_size
        self.replay = Replay(real, len(self.seeds), capacity if needs_model else 0, device)
        self._runner = self._make_runner()
        self._standardiser: Standardiser | None = None
        self._model_error: ModelError | None = None
        self._has_model_error = bool(self.replay.capacity) and shared.model_quality < 1  # else nothing is to be known

    def _make_dynamics(self, artifacts: Mapping[str, dict[str, Any]]) -> Dynamics:
        """What rollouts step through."""
        shared = self.shared
        if not shared.filtered:
            of_ensemble = shared.dynamics
            return dynamics_of_quality(
                shared.model_quality, self.ensemble, of_ensemble.seed, self.data, of_ensemble.initial_cut
            )
        if self.ensemble is None:
            raise ValueError("there is no learned ensemble")
        reward = filtering_reward(artifacts["dynamics_reward"], shared.filter)
        return FilteredDynamics(self.ensemble, reward.to(self.device), shared.filter)

    @staticmethod
    def stages(config: ModelBasedConfig) -> dict[str, Stage]:
        stages = {} if config.model_quality == 1 else {"dynamics": ensemble_stage(config.dynamics)}
        if config.filtered:
            stages["dynamics_reward"] = reward_stage(config.dynamics_reward)
        return stages

    @staticmethod
    def check_environment(config: ModelBasedConfig, env_id: str) -> None:
        termination_rule(env_id)
        check_quality(config.model_quality, env_id)

    def target_hook(self, artifacts: Mapping[str, dict[str, Any]]) -> TargetHook | None:
        """What is changed in the critics' targets."""
        return None

    @property
    def num_members(self) -> int:
        return len(self.seeds)

    @property
    def rollout_model(self) -> Dynamics:
        return self.dynamics

    # ---- rollouts ---------------------------------------------------------------------------------------------

    def make_penalty(self) -> Penalty | None:
        """What the rollouts' rewards are lowered by; None: nothing."""
        return None

    def make_penalty_weights(self) -> PenaltyWeights:
        """What the penalty is multiplied with, of every member."""
        none = [0.0] * self.num_members
        return PenaltyWeights(none, [None] * self.num_members, none)

    def rollout_jobs(self, epoch: int) -> list[RolloutJob]:
        if not self.replay.capacity:
            return []
        actor = SquashedGaussianActor(self.sac.actor)
        return self.rollouts.jobs(actor, self.seeds, epoch, self.penalty_weights.values)

    def add_rollouts(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        if not results:
            return [{} for _ in range(self.num_members)]
        per_member: list[dict[str, float]] = []
        coefs, penalty_means = self.penalty_weights.values, []
        for m, generated in enumerate(by_member(results, self.num_members)):
            for rows, tags in generated.parts:
                self.replay.add(m, rows, tags)
            total = generated.statistics
            count = max(total.transitions, 1)
            metrics = generation_metrics(total, self.num_starts, bool(self.replay.sizes[m]))
            metrics["epochs_held"] = self.replay.sizes[m] / count
            penalty_means.append(total.penalty_sum / total.transitions if total.transitions else math.nan)
            if self.penalty is not None:
                metrics["penalty_mean"], metrics["penalty_coef"] = total.penalty_sum / count, coefs[m]
            if self.shared.filtered:
                steps = total.transitions + (total.cut if self.shared.filter.cut == "drop" else 0)
                metrics["cut_share"] = total.cut / self.num_starts
                metrics["dynamics_reward_mean"] = total.dynamics_reward_sum / max(steps, 1)
            per_member.append({f"rollout/{name}": value for name, value in metrics.items()})
        self.penalty_weights.step(penalty_means)
        return per_member

    def ask_ahead(self, epoch: int) -> None:
        """Rollouts start from the policies of their epoch: nothing is asked for ahead."""

    jobs_ahead = None

    # ---- updates ----------------------------------------------------------------------------------------------

    def _make_runner(self) -> ChunkRunner:
        return ChunkRunner(self.sac, self.replay, self.shared.precision, default_capture(self.device))

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        cfg = self.shared
        self.sac.actor_optim.scale_rates(actor_lr_scale(cfg, epoch))
        num_model = cfg.batch_size - self.num_real
        return self._runner.run_epoch(
            self.seeds, epoch, cfg.updates_per_epoch, self.num_real, num_model, self.data.action_dim
        )

    # ---- diagnostics ------------------------------------------------------------------------------------------

    def diagnostics(self, epoch: int) -> list[Measures]:
        """Edge-of-reach metrics `reach/*` (see `agents.diagnostics`) and errors of the model `model/*` (see
        `agents.model_error`) of every member; nothing changes by them.

        Args:
            epoch: number of epochs done; counts the draws.

        Returns:
            Finite values; what is not defined is left out, everything where there are no model rows.
        """
        if self._standardiser is None:  # made once, of the whole dataset
            self._standardiser = Standardiser(self.data.observations)
        reach = measure(
            self.sac.actor, self.sac.target, self.replay, self.seeds, epoch, self.num_real / self.shared.batch_size,
            self.shared.rollout_length, self._standardiser, self.edge_test(),
        )  # fmt: skip
        return [{**one, **two} for one, two in zip(reach, self._model_errors(epoch), strict=True)]

    def _model_errors(self, epoch: int) -> list[Measures]:
        if self._has_model_error and self._model_error is None:
            true = simulator(self.data)
            self._has_model_error = true is not None
            self._model_error = None if true is None else ModelError(self.data, true)
        if self._model_error is None:
            return [{} for _ in self.seeds]
        rows = self.data.episode_starts if self.shared.rollout_starts == "initial" else None
        return self._model_error(self.sac.actor, self.dynamics, rows, self.seeds, epoch, self.shared.rollout_length)

    def edge_test(self) -> EdgeTest | None:
        """The environment's exact test, for observations as the rows have them; None where there is none. It is one for
        true dynamics and rollouts from initial states."""
        test, in_environment = exact_edge_test(self.data.env_id), self.in_environment()
        if test is None or self.shared.model_quality != 1 or self.shared.rollout_starts != "initial":
            return None
        return lambda obs, length: test(in_environment(obs), length)

    def in_environment(self) -> Callable[[Tensor], Tensor]:
        """From observations `(..., S)` as the rows have them to the environment's units."""
        mean, std = self.data.observation_mean, self.data.observation_std
        if mean is None or std is None:
            return lambda obs: obs
        mean, std = mean.to(self.device), std.to(self.device)
        return lambda obs: obs * std + mean

    # ---- members and checkpoints --------------------------------------------------------------------------------

    def policy(self, member: int) -> dict[str, np.ndarray]:
        return squashed_arrays(self.sac.actor, member)

    def initial_values(self) -> Tensor:
        """What the critics make of the policies (see `agents.critics.initial_values`), `(M,)`."""
        return initial_values(self.sac.critic, SquashedGaussianActor(self.sac.actor), self.data, self.shared.gamma)

    def select(self, members: Sequence[int]) -> ModelBasedSAC:
        other = copy.copy(self)
        other.configs, other.seeds = [self.configs[m] for m in members], [self.seeds[m] for m in members]
        other.sac, other.replay = self.sac.select(members), self.replay.select(members)
        other.penalty_weights = self.penalty_weights.select(members)
        other._runner = other._make_runner()
        return other

    def state_dict(self) -> dict[str, Any]:
        state = {"sac": self.sac.state_dict(), "replay": self.replay.state_dict()}
        weights = self.penalty_weights.state_dict()
        return {**state, "penalty_weights": weights} if weights else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sac.load_state_dict(state["sac"])
        self.replay.load_state_dict(state["replay"])
        self.penalty_weights.load_state_dict(state.get("penalty_weights", {}))
