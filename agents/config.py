"""Hyperparameters that several methods share. A method's own config derives from one of these dataclasses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from agents.checks import check_choice, check_positive, check_share, check_widths
from agents.chunk import PRECISIONS
from agents.method import per_member
from agents.networks import INITIALISATIONS
from agents.optim import half_cosine
from agents.sac import ACTOR_CRITICS, CRITIC_LOSSES, SAC, UPDATE_ORDERS, SACHyperparameters, SACSettings, TargetHook
from envs.errors import UserError


@dataclass
class ScheduleConfig:
    """What every method has: how long it trains, on batches of which size, toward which targets."""

    variant: str = ""  # which block of the settings file was taken (filled in)
    hidden: list[int] = field(default_factory=lambda: [256, 256])  # hidden widths of every network that acts or values
    gamma: float = 0.99
    tau: float = 0.005  # polyak
    batch_size: int = 256
    num_updates: int = 1_000_000
    updates_per_epoch: int = 1_000
    precision: str = "float32"  # of the updates' matrix products: float32 | mixed (bfloat16 on a CPU, TF32 on CUDA)

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "num_updates", "updates_per_epoch")
        check_choice(self, "precision", PRECISIONS)
        check_share(self, "gamma")
        check_share(self, "tau", interval="(0, 1]")
        if self.num_updates % self.updates_per_epoch:
            raise UserError(
                f"method.num_updates={self.num_updates} must be a multiple of "
                f"method.updates_per_epoch={self.updates_per_epoch}"
            )
        check_widths(self, "hidden")

    def own_noises(self, observation_dim: int, action_dim: int) -> int:
        """Standard normal numbers that an update of a member takes beside its K draws (`agents.chunk`)."""
        return 0

    @property
    def num_epochs(self) -> int:
        return self.num_updates // self.updates_per_epoch

    @property
    def num_rollout_phases(self) -> int:
        """Epochs of a run that begin with what is generated."""
        return self.num_epochs


@dataclass
class SACConfig(ScheduleConfig):
    """Soft actor-critic (see `agents.sac`). Fields marked per member may differ inside a pack."""

    num_critics: int = 2  # N; targets and policy use the minimum over all
    initialisation: str = "torch"  # torch | edac | edac-fan-in | orthogonal
    eta: float = per_member(0.0, off_at_zero=True)  # weight of the diversity term
    actor_lr: float = per_member(3e-4)
    critic_lr: float = per_member(3e-4)
    alpha_lr: float = per_member(3e-4)
    actor_lr_schedule: str = "constant"  # constant | cosine (to 0 over all epochs)
    auto_alpha: bool = True
    alpha: float = 1.0  # initial temperature, or the fixed one
    max_alpha: float | None = None  # upper bound of the temperature
    target_entropy: float | None = None  # None: -dim(A)
    entropy_in_target: bool = True  # false: a "deterministic backup", whose actions are sampled all the same
    target_floor: float | None = None  # targets are at least this; wrong where returns can be lower
    # actor-first: temperature, actor, critics (RAVL, EDAC) | critics-first: critics, actor, temperature (OfflineRL-Kit)
    update_order: str = "actor-first"
    critic_loss: str = "sum"  # sum | mean: of the critics' squared errors
    actor_critics: str = "online"  # online | target: the critics that the actor is trained against
    num_updates: int = 3_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_critics", "actor_lr", "critic_lr", "alpha_lr", "alpha")
        if self.max_alpha is not None and not self.max_alpha > 0:
            raise UserError(f"method.max_alpha={self.max_alpha} must be greater than 0, or null")
        if not self.eta >= 0 or (self.eta > 0 and self.num_critics < 2):
            raise UserError(f"method.eta={self.eta} must be 0, or greater with method.num_critics of at least 2")
        check_choice(self, "initialisation", INITIALISATIONS)
        check_choice(self, "update_order", UPDATE_ORDERS)
        check_choice(self, "critic_loss", CRITIC_LOSSES)
        check_choice(self, "actor_critics", ACTOR_CRITICS)
        if self.target_floor is not None and not math.isfinite(self.target_floor):
            raise UserError(f"method.target_floor={self.target_floor} must be a finite number, or null")
        check_choice(self, "actor_lr_schedule", ("constant", "cosine"))


def make_sac(
    configs: Sequence[SACConfig],
    seeds: Sequence[int],
    observation_dim: int,
    action_dim: int,
    device: torch.device | str = "cpu",
    hook: TargetHook | None = None,
) -> SAC:
    """The soft actor-critic that the configs of a pack describe."""
    shared = configs[0]  # what is not per member is equal in a pack
    hyperparameters = [SACHyperparameters(c.actor_lr, c.critic_lr, c.alpha_lr, c.eta) for c in configs]
    settings = SACSettings(
        num_critics=shared.num_critics, actor_hidden=tuple(shared.hidden), critic_hidden=tuple(shared.hidden),
        gamma=shared.gamma, tau=shared.tau, target_entropy=shared.target_entropy, auto_alpha=shared.auto_alpha,
        alpha=shared.alpha, max_alpha=shared.max_alpha, entropy_in_target=shared.entropy_in_target,
        initialisation=shared.initialisation, target_floor=shared.target_floor, update_order=shared.update_order,
        critic_loss=shared.critic_loss, actor_critics=shared.actor_critics,
    )  # fmt: skip
    return SAC(seeds, hyperparameters, settings, observation_dim, action_dim, device, hook)


def actor_lr_scale(config: SACConfig, epoch: int) -> float:
    """What the actor's learning rate is multiplied with in an epoch."""
    return half_cosine(epoch / config.num_epochs) if config.actor_lr_schedule == "cosine" else 1.0
