"""What the model-based methods share: soft actor-critic on a mix of real rows and model rollouts (MBPO, Janner et al.
2019).

An epoch is one rollout phase followed by `updates_per_epoch` gradient updates. Each batch holds int(real_ratio *
batch_size) rows of the dataset, the rest come from the member's own ring of model rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from agents.dynamics import DynamicsConfig, Ensemble, EpochReport, train_ensemble
from agents.method import RolloutJob, RolloutResult, Stage, TrainingData, per_member
from agents.networks import INITIALISATIONS, StackedMLP
from agents.randomness import generator
from agents.replay import Replay, transition_rows
from agents.rollout import SHARD_ROWS, Penalty
from agents.sac import SAC, Noise, SACHyperparameters, SACSettings
from envs.errors import UserError

METRICS_EVERY = 100  # updates between two looks at the statistics


@dataclass
class ModelBasedConfig:
    """Hyperparameters of a model-based soft actor-critic. Fields marked per member may differ inside a pack."""

    variant: str = ""  # which block of the settings file was taken (filled in)
    # critics and policy
    num_critics: int = 2  # N; targets and policy use the minimum over all
    hidden: list[int] = field(default_factory=lambda: [256, 256])  # actor's and critics' hidden widths
    initialisation: str = "torch"  # torch | edac | edac-fan-in
    eta: float = per_member(0.0)  # weight of the diversity term; 0 leaves it out
    actor_lr: float = per_member(3e-4)
    critic_lr: float = per_member(3e-4)
    alpha_lr: float = per_member(3e-4)
    actor_lr_schedule: str = "constant"  # constant | cosine (to 0 over all epochs)
    gamma: float = 0.99
    tau: float = 0.005  # polyak
    auto_alpha: bool = True
    alpha: float = 1.0  # initial temperature, or the fixed one
    max_alpha: float | None = None  # upper bound of the temperature
    target_entropy: float | None = None  # None: -dim(A)
    entropy_in_target: bool = True
    # model rollouts
    rollout_length: int = 5  # k, steps
    rollout_batch: int = 50_000  # starts per epoch
    rollout_epochs_retained: int = 5  # ring capacity in epochs of full-length rollouts
    real_ratio: float = 0.05  # fraction of the batch, truncated to rows
    # length
    batch_size: int = 256
    num_updates: int = 3_000_000
    updates_per_epoch: int = 1_000
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)

    def __post_init__(self) -> None:
        positive = ("num_critics", "batch_size", "num_updates", "updates_per_epoch", "rollout_length", "rollout_batch",
                    "rollout_epochs_retained", "actor_lr", "critic_lr", "alpha_lr", "alpha")  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"method.{name}={getattr(self, name)} must be greater than 0 and finite")
        if not 0 <= self.real_ratio <= 1:
            raise UserError(f"method.real_ratio={self.real_ratio} must lie between 0 and 1")
        if not 0 < self.gamma < 1:
            raise UserError(f"method.gamma={self.gamma} must lie between 0 and 1")
        if not 0 < self.tau <= 1:
            raise UserError(f"method.tau={self.tau} must lie in (0, 1]")
        if self.max_alpha is not None and not self.max_alpha > 0:
            raise UserError(f"method.max_alpha={self.max_alpha} must be greater than 0, or null")
        if not self.eta >= 0 or (self.eta > 0 and self.num_critics < 2):
            raise UserError(f"method.eta={self.eta} must be 0, or greater with method.num_critics of at least 2")
        if self.initialisation not in INITIALISATIONS:
            raise UserError(
                f"method.initialisation={self.initialisation!r} must be one of {', '.join(INITIALISATIONS)}"
            )
        if self.actor_lr_schedule not in ("constant", "cosine"):
            raise UserError(f"method.actor_lr_schedule={self.actor_lr_schedule!r} must be constant or cosine")
        if self.num_updates % self.updates_per_epoch:
            raise UserError(
                f"method.num_updates={self.num_updates} must be a multiple of "
                f"method.updates_per_epoch={self.updates_per_epoch}"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise UserError(f"method.hidden={self.hidden} needs one or more widths of at least 1, such as [256,256]")

    @property
    def num_epochs(self) -> int:
        return self.num_updates // self.updates_per_epoch


def ensemble_stage(config: DynamicsConfig) -> Stage:
    """The dynamics ensemble as a stage."""

    def build(data: TrainingData, report: Callable[[int, Mapping[str, float]], None]) -> dict[str, Any]:
        def on_epoch(epoch: EpochReport) -> None:
            errors = epoch.holdout_mse
            report(epoch.epoch, {
                "train_loss": epoch.train_loss, "holdout_mse_best": min(errors),
                "holdout_mse_mean": sum(errors) / len(errors), "learning_rate": epoch.learning_rate,
            })  # fmt: skip

        columns = (data.observations, data.actions, data.rewards, data.next_observations)
        return train_ensemble(*columns, config, on_epoch).state_dict()

    return Stage("dynamics_ensemble", asdict(config), build)


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
        self.ensemble: Ensemble = Ensemble.from_state_dict(artifacts["dynamics"]).to(self.device)
        hyper = [SACHyperparameters(c.eta, c.actor_lr, c.critic_lr, c.alpha_lr) for c in configs]
        settings = SACSettings(
            num_critics=shared.num_critics, actor_hidden=tuple(shared.hidden), critic_hidden=tuple(shared.hidden),
            gamma=shared.gamma, tau=shared.tau, target_entropy=shared.target_entropy, auto_alpha=shared.auto_alpha,
            alpha=shared.alpha, max_alpha=shared.max_alpha, entropy_in_target=shared.entropy_in_target,
            initialisation=shared.initialisation,
        )  # fmt: skip
        self.sac = SAC(self.seeds, hyper, settings, data.observation_dim, data.action_dim, device)
        self.num_real = int(shared.real_ratio * shared.batch_size)
        self.num_starts = shared.rollout_batch
        capacity = self.num_starts * shared.rollout_length * shared.rollout_epochs_retained
        real = transition_rows(data.observations, data.actions, data.rewards, data.terminals, data.next_observations)
        needs_model = self.num_real < shared.batch_size
        self.replay = Replay(real, len(self.seeds), capacity if needs_model else 0, device)

    @staticmethod
    def stages(config: ModelBasedConfig) -> dict[str, Stage]:
        return {"dynamics": ensemble_stage(config.dynamics)}

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
        jobs = []
        for m, (config, seed) in enumerate(zip(self.configs, self.seeds, strict=True)):
            actor = self.actor(m)
            starts = self._draw_starts(generator(seed, "starts", epoch))
            for shard, rows in enumerate(starts.split(SHARD_ROWS)):
                jobs.append(RolloutJob(
                    m, seed, epoch, shard, self.data.termination, actor, rows.clone(), config.rollout_length,
                    type(self).penalty, self.penalty_coef(config),
                ))  # fmt: skip
        return jobs

    def _draw_starts(self, draw: torch.Generator) -> Tensor:
        """States of the dataset, without replacement where it has enough of them."""
        n = len(self.data.observations)
        if n >= self.num_starts:
            index = torch.randperm(n, generator=draw)[: self.num_starts]
        else:
            index = torch.randint(n, (self.num_starts,), generator=draw)
        return self.data.observations[index.to(self.device)]

    def add_rollouts(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        if not results:
            return [{} for _ in range(self.num_members)]
        per_member: list[dict[str, float]] = []
        for m in range(self.num_members):
            mine = [r for r in results if r.member == m]
            if not mine:
                raise ValueError(f"no rollouts for member {m} of {self.num_members}")
            total = mine[0].statistics
            for result in mine[1:]:
                total = total + result.statistics
            for result in mine:
                self.replay.add(m, result.rows)
            count = max(total.transitions, 1)
            metrics = {
                "rollout/transitions": float(total.transitions),
                "rollout/mean_length": total.transitions / self.num_starts,
                "rollout/terminal_share": total.terminals / count,
                # not a number where nothing could be kept and there is nothing to learn from
                "rollout/reward_mean": total.reward_sum / count if self.replay.sizes[m] else math.nan,
                "rollout/dropped": float(total.dropped),
            }
            if type(self).penalty is not None:
                metrics["rollout/penalty_mean"] = total.penalty_sum / count
            per_member.append(metrics)
        return per_member

    # ---- updates ----------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        cfg, updates = self.shared, self.shared.updates_per_epoch
        if cfg.actor_lr_schedule == "cosine":
            self.sac.actor_optim.scale = 0.5 * (1.0 + math.cos(math.pi * epoch / cfg.num_epochs))
        indices, noise = self._draw_chunk(epoch)
        sums: dict[str, Tensor] = {}
        looks = 0
        for i in range(updates):
            look = (i + 1) % METRICS_EVERY == 0 or i + 1 == updates
            metrics = self.sac.update(self.replay.gather(indices[i]), Noise(noise[i, 0], noise[i, 1]), look)
            if metrics is not None:
                looks += 1
                sums = {k: v + sums[k] if sums else v for k, v in metrics.items()}
        table = {k: (v / looks).tolist() for k, v in sums.items()}  # one transfer per chunk
        return [{f"train/{k}": v[m] for k, v in table.items()} for m in range(self.num_members)]

    @record_function("batch drawing")
    def _draw_chunk(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Row numbers `(U, M, B)` and noise `(U, 2, M, B, A)` of an epoch, one generator per member."""
        cfg = self.shared
        indices, noise = [], []
        for m, seed in enumerate(self.seeds):
            draw = generator(seed, "updates", epoch)
            num_model = cfg.batch_size - self.num_real
            indices.append(self.replay.draw_indices(m, cfg.updates_per_epoch, self.num_real, num_model, draw))
            shape = (cfg.updates_per_epoch, 2, cfg.batch_size, self.data.action_dim)
            noise.append(torch.randn(shape, generator=draw))
        return torch.stack(indices, 1).to(self.device), torch.stack(noise, 2).to(self.device)

    # ---- members and checkpoints --------------------------------------------------------------------------------

    def actor(self, member: int) -> StackedMLP:
        return self.sac.actor.select([member])

    def select(self, members: Sequence[int]) -> ModelBasedSAC:
        other = copy.copy(self)
        other.configs, other.seeds = [self.configs[m] for m in members], [self.seeds[m] for m in members]
        other.sac, other.replay = self.sac.select(members), self.replay.select(members)
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"sac": self.sac.state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sac.load_state_dict(state["sac"])
        self.replay.load_state_dict(state["replay"])
