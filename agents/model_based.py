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
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.actors import SquashedGaussianActor
from agents.chunk import ChunkRunner
from agents.config import SACConfig, actor_lr_scale, check_positive, make_sac
from agents.diagnostics import EdgeTest, Standardiser, measure
from agents.dynamics import (
    DynamicsConfig,
    Ensemble,
    EpochReport,
    together_settings,
    train_ensemble,
    train_ensembles,
    training_settings,
)
from agents.dynamics_reward import NOT_DISTILLED, too_many
from agents.dynamics_reward_training import DynamicsRewardConfig, reward_stage
from agents.graphs import default_capture
from agents.method import BuildTogether, Measures, RolloutJob, RolloutResult, Stage, TrainingData
from agents.model_error import ModelError, simulator
from agents.model_quality import check_quality, dynamics_of_quality
from agents.policies import squashed_arrays
from agents.randomness import generator
from agents.replay import Replay, transition_rows
from agents.rollout import MAX_LENGTH, Dynamics, Penalty, shard_size
from agents.sac import TargetHook
from agents.transition_filter import FilterConfig, FilteredDynamics, filtering_reward
from envs.errors import UserError
from envs.reach import exact_edge_test
from envs.termination import termination_rule

ROLLOUT_STARTS = ("all", "initial")
# starts of a shard of filtered rollouts on a CPU, which take so long that the usual 2,000 are to be shared
FILTERED_SHARD_ROWS = 500
SURVIVAL = (10, 50, 90)  # percentiles of the rollouts' lengths


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
        if self.rollout_starts not in ROLLOUT_STARTS:
            raise UserError(f"method.rollout_starts={self.rollout_starts!r} must be one of {', '.join(ROLLOUT_STARTS)}")
        if not 0 <= self.real_ratio <= 1:
            raise UserError(f"method.real_ratio={self.real_ratio} must lie between 0 and 1")
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


def ensemble_stage(config: DynamicsConfig) -> Stage:
    """The dynamics ensemble as a stage; ensembles that differ in `agents.dynamics.TOGETHER` only train in one batch."""

    def build(data: TrainingData, report: Callable[[int, Mapping[str, float]], None]) -> dict[str, Any]:
        def on_epoch(epoch: EpochReport) -> None:
            report(epoch.epoch, _epoch_metrics(epoch))

        return train_ensemble(*_columns(data), config, on_epoch).state_dict()

    def build_together(
        settings: Sequence[Mapping[str, Any]],
        data: TrainingData,
        report: Callable[[int, int, Mapping[str, float]], None],
    ) -> list[dict[str, Any] | UserError]:
        def on_epoch(which: int, epoch: EpochReport) -> None:
            report(which, epoch.epoch, _epoch_metrics(epoch))

        trained = train_ensembles(*_columns(data), [DynamicsConfig(**one) for one in settings], on_epoch)
        return [one if isinstance(one, UserError) else one.state_dict() for one in trained]

    together = BuildTogether(together_settings(config), build_together)
    return Stage("dynamics_ensemble", training_settings(config), build, together)


def _columns(data: TrainingData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return data.observations, data.actions, data.rewards, data.next_observations


def _epoch_metrics(epoch: EpochReport) -> dict[str, float]:
    errors = epoch.holdout_mse
    return {
        "train_loss": epoch.train_loss, "holdout_mse_best": min(errors), "holdout_mse_mean": sum(errors) / len(errors),
        "learning_rate": epoch.learning_rate,
    }  # fmt: skip


def _percentiles(num_rollouts: int, survivors: Sequence[int]) -> list[int]:
    """The smallest lengths that so many percent of rollouts do not exceed as `SURVIVAL` says. A length is the number of
    a rollout's transitions, 0 where the first was not kept.

    Args:
        survivors: transitions of each step.
    """
    longer = [*survivors, 0]  # than 0 steps, than 1 step, ...
    return [
        next(n for n, count in enumerate(longer) if 100 * (num_rollouts - count) >= percent * num_rollouts)
        for percent in SURVIVAL
    ]


class ModelBasedSAC:
    """A pack of M runs. Methods give it a penalty (or none) and their settings."""

    penalty: Penalty | None = None  # on the ensemble's standard deviations (E, B, D)

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
        self.ensemble = None if stage is None else Ensemble.from_state_dict(stage).to(self.device)
        self.dynamics = self._make_dynamics(artifacts)
        self.num_real = int(shared.real_ratio * shared.batch_size)
        hook = self.target_hook(artifacts)
        self.sac = make_sac(configs, self.seeds, data.observation_dim, data.action_dim, device, hook)
        self.num_starts = shared.rollout_batch
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

    # ---- rollouts ---------------------------------------------------------------------------------------------

    def penalty_coef(self, config: Any) -> float:
        """What the penalty is multiplied with for a member."""
        return 0.0

    def rollout_jobs(self, epoch: int) -> list[RolloutJob]:
        if not self.replay.capacity:
            return []
        length, actor = self.shared.rollout_length, SquashedGaussianActor(self.sac.actor)
        size, rows = shard_size(self.device, actor, self.dynamics, length)
        if self.shared.filtered and self.device.type == "cpu":
            rows = min(rows, FILTERED_SHARD_ROWS)
        termination, jobs = self.data.termination, []
        for members in (range(m, min(m + size, self.num_members)) for m in range(0, self.num_members, size)):
            seeds = tuple(self.seeds[m] for m in members)
            coef = torch.tensor([self.penalty_coef(self.configs[m]) for m in members], device=self.device)
            policies = actor.select(members)
            starts_MB = torch.stack([self._draw_starts(seed, epoch) for seed in seeds])
            for shard, index_MB in enumerate(starts_MB.split(rows, dim=1)):
                jobs.append(RolloutJob(
                    tuple(members), seeds, epoch, shard, termination, policies,
                    self.data.observations[index_MB], length, type(self).penalty, coef, self._states(index_MB),
                    self.shared.filter.cut,
                ))  # fmt: skip
        return jobs

    def _states(self, index_MB: Tensor) -> Tensor | None:
        """The simulator's states `(M, B, X)` of rows of the dataset, if rollouts step through it and it is known."""
        states = self.data.states if self.shared.model_quality > 0 else None
        return None if states is None else states[index_MB.to(states.device)]

    def _draw_starts(self, seed: int, epoch: int) -> Tensor:
        """Row numbers `(num_starts,)` of the dataset, without replacement where it has enough of them."""
        source, rows = generator(seed, "starts", epoch, device=self.device), None
        if self.shared.rollout_starts == "initial":
            rows = self.data.episode_starts
            if rows is None:
                raise ValueError("the data does not say where its episodes start")
        n = len(self.data.observations if rows is None else rows)
        if n >= self.num_starts:
            drawn = torch.randperm(n, generator=source, device=self.device)[: self.num_starts]
        else:
            drawn = torch.randint(n, (self.num_starts,), generator=source, device=self.device)
        return drawn if rows is None else rows[drawn]

    def add_rollouts(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        if not results:
            return [{} for _ in range(self.num_members)]
        per_member: list[dict[str, float]] = []
        for m in range(self.num_members):
            mine = [(r, r.members.index(m)) for r in results if m in r.members]
            if not mine:
                raise ValueError(f"no rollouts for member {m} of {self.num_members}")
            total = reduce(operator.add, (result.statistics[place] for result, place in mine))
            for result, place in mine:
                self.replay.add(m, result.rows[place], result.tags[place])
            count = max(total.transitions, 1)
            metrics = {
                "rollout/transitions": float(total.transitions),
                "rollout/mean_length": total.transitions / self.num_starts,
                "rollout/terminal_share": total.terminals / count,
                # not a number where nothing could be kept and there is nothing to learn from
                "rollout/reward_mean": total.reward_sum / count if self.replay.sizes[m] else math.nan,
                "rollout/dropped": float(total.dropped),
                "rollout/epochs_held": self.replay.sizes[m] / count,
            }
            if type(self).penalty is not None:
                metrics["rollout/penalty_mean"] = total.penalty_sum / count
            if self.shared.filtered:
                steps = total.transitions + (total.cut if self.shared.filter.cut == "drop" else 0)
                metrics["rollout/cut_share"] = total.cut / self.num_starts
                metrics["rollout/dynamics_reward_mean"] = total.dynamics_reward_sum / max(steps, 1)
            lengths = _percentiles(self.num_starts, total.survivors)
            metrics.update({f"rollout/length_p{p}": float(n) for p, n in zip(SURVIVAL, lengths, strict=True)})
            per_member.append(metrics)
        return per_member

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

    def select(self, members: Sequence[int]) -> ModelBasedSAC:
        other = copy.copy(self)
        other.configs, other.seeds = [self.configs[m] for m in members], [self.seeds[m] for m in members]
        other.sac, other.replay = self.sac.select(members), self.replay.select(members)
        other._runner = other._make_runner()
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"sac": self.sac.state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sac.load_state_dict(state["sac"])
        self.replay.load_state_dict(state["replay"])
