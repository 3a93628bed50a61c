"""Soft actor-critic on minibatches of two domains, for a pack of M runs at once: what cross-domain methods share.

A minibatch holds the rows of the source domain, then those of the target domain; every row b has a weight w_b in the
critics' loss, by which methods filter or re-weight the source's:

    a~'     = tanh(u'), u' = mu(s') + sigma(s') eps'
    y       = r + gamma (1 - d) [ min_k Qbar_k(s', a~') - alpha log pi(a~'|s') ]
    J(Q)    = sum_b w_b sum_k (Q_k(s, a) - y)^2,    plus a `CriticPenalty`
    J(pi)   = c mean_b [ alpha log pi(a~|s) - min_k Q_k(s, a~) ],    c = 1, or with an `ActorPenalty` its own, plus that
    J(pi^E) = mean_b [ alpha log pi^E(a~|s) - max_k Q_k(s, a~) ]
    Qbar    <- (1 - tau) Qbar + tau Q

pi^E is the optimistic policy that collects in the source domain (Xu et al. 2023, arXiv 2305.17625, section 5.1);
nothing is bootstrapped from it. The order is critics, policies (every `actor_every`-th update, the first included),
temperature, targets, as in the released VGDF. Gradients are written out (see `agents.networks`), and the norms of those
of critics, policy and source policy are each bounded, member by member.

Shapes: M member, N critic, K noise, B batch, S observation, A action, X further rows, W = 2 S + A + 2 columns of a row,
O = 2 A outputs of a policy's network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from agents.checks import check_choice, check_not_negative, check_positive
from agents.config import ScheduleConfig
from agents.critics import bellman_target, extreme_gradient, extreme_value
from agents.method import per_member
from agents.networks import INITIALISATIONS, StackedMLP
from agents.optim import Adam
from agents.soft_actor_critic import LearningRates, SoftActorCritic
from agents.squashed import PolicySample, policy_gradient, sample_of_outputs, squashed_sample
from envs.errors import UserError


@dataclass(frozen=True)
class DomainSACSettings:
    """What shapes the computation, equal for all members of a pack."""

    hidden: tuple[int, ...] = (256, 256)  # of actors and critics
    num_critics: int = 2
    gamma: float = 0.99
    tau: float = 0.005
    auto_alpha: bool = False
    target_entropy: float | None = None  # None: -dim(A)
    entropy_in_target: bool = True
    actor_every: int = 1  # updates per update of the policies and the temperature
    max_grad_norm: float | None = None  # of critics, policy and source policy each; None: as they are
    log_std_min: float = -10.0
    log_std_max: float = 2.0
    initialisation: str = "torch"  # see `agents.networks.initialise`
    optimistic: bool = False  # whether there is a source policy of its own


@dataclass(frozen=True)
class DomainSACHyperparameters(LearningRates):
    """What one member may have to itself; both policies have its `actor_lr`."""

    alpha: float = 0.2  # initial (auto_alpha) or fixed temperature


@dataclass
class DomainSACConfig(ScheduleConfig):
    """Settings of a method's `DomainSAC`. Fields marked per member may differ inside a pack."""

    num_critics: int = 2  # N; targets and policy use the minimum over all
    initialisation: str = "vgdf"  # vgdf (as released) | torch | edac | edac-fan-in | orthogonal | lecun
    actor_lr: float = per_member(3e-4)
    critic_lr: float = per_member(3e-4)
    alpha_lr: float = per_member(3e-4)
    auto_alpha: bool = False
    alpha: float = per_member(0.2)  # initial temperature, or the fixed one
    target_entropy: float | None = None  # None: -dim(A)
    entropy_in_target: bool = True
    actor_every: int = 1  # updates per update of the policies and the temperature
    max_grad_norm: float | None = None  # of critics and policies, each; null: as they are
    log_std_min: float = -10.0
    log_std_max: float = 2.0

    @property
    def initial_settings(self) -> tuple[str, ...]:
        """What counts at the beginning only (see `agents.method.changeable_settings`)."""
        return ("alpha",) if self.auto_alpha else ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_critics", "actor_lr", "critic_lr", "alpha_lr", "actor_every")
        if self.auto_alpha:
            check_positive(self, "alpha")
        check_not_negative(self, "alpha")
        check_choice(self, "initialisation", INITIALISATIONS)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"method.max_grad_norm={self.max_grad_norm} must be greater than 0, or null")
        if not -math.inf < self.log_std_min < self.log_std_max < math.inf:
            raise UserError(
                f"method.log_std_min={self.log_std_min} must be less than method.log_std_max={self.log_std_max}, both "
                "finite"
            )


class DomainBatch(NamedTuple):
    """A minibatch of both domains."""

    rows_MBW: Tensor  # source rows first, then target rows
    num_source: int  # of B
    weight_MB: Tensor  # w, of each row in the critics' loss
    # (M, R) row numbers: those of a member whose weight is not 0, or more. The critics look at no others; None: at all
    learned_MR: Tensor | None = None


class Targets(NamedTuple):
    """What the critics of a minibatch are drawn to, and what it is made of."""

    target_MB: Tensor  # y
    value_MB: Tensor  # min_k Qbar_k(s', a~')
    next_action_MBA: Tensor  # a~'


class CriticPenalty(Protocol):
    """Something else in the critics' loss, such as CQL's penalty; may ask for the critics' values of further rows."""

    def rows(self, sac: DomainSAC, batch: DomainBatch, noise_KMBA: Tensor) -> Tensor:
        """Further rows `[s, a]`, `(M, X, S + A)`; X is the same in every update.

        Args:
            noise_KMBA: the draws of the update that are left for it.
        """

    def gradient(self, q_MNB: Tensor, q_MNX: Tensor) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """What it adds to the loss, by its gradient.

        Args:
            q_MNB, q_MNX: the critics' values of the minibatch and of the further rows.

        Returns:
            The gradients with respect to both, and metrics `(M,)`.
        """


class ActorPenalty(Protocol):
    """Something else in the policy's loss, such as behaviour cloning."""

    @property
    def num_noises(self) -> int:
        """Standard normal draws (M, B, A) that it takes of an update."""

    def __call__(
        self, sac: DomainSAC, batch: DomainBatch, out_MBO: Tensor, value_MB: Tensor, noise_KMBA: Tensor
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """What it makes of the policy's loss.

        Args:
            out_MBO: the outputs [mean, log standard deviation] of the policy's network for the rows' states.
            value_MB: min_k Q_k(s, a~).
            noise_KMBA: its draws.

        Returns:
            c, the weight `(M, 1, 1)` of the loss that soft actor-critic has; the gradient `(M, B, O)` of what is added
            to it; metrics `(M,)`.
        """


class DomainSAC(SoftActorCritic[DomainSACHyperparameters, DomainSACSettings]):
    """Policies, critics, targets and temperatures of a pack, and their update; see `SoftActorCritic`."""

    source_actor: StackedMLP | None = None
    source_actor_optim: Adam | None = None

    def build(self) -> None:
        s, a, one = self.observation_dim, self.action_dim, self.settings
        scheme, sizes = one.initialisation, (s, *one.hidden, 2 * a)
        self.actor = self.network("actor", self.seeds, sizes, self.device, scheme=scheme, last_bound=1e-3)
        self.critic = self.network(
            "critic", self.seeds, (s + a, *one.hidden, 1), self.device, each=one.num_critics, scheme=scheme,
            last_bound=3e-3,
        )  # fmt: skip
        if one.optimistic:
            self.source_actor = self.network(
                "source actor", self.seeds, sizes, self.device, scheme=scheme, last_bound=1e-3
            )
            self.source_actor_optim = Adam(self.source_actor, [h.actor_lr for h in self.hyperparameters])
            self.stacks = (*self.stacks, "source_actor")
            self.optimisers = (*self.optimisers, "source_actor_optim")

    def initial_alpha(self) -> Tensor:
        return torch.tensor([h.alpha for h in self.hyperparameters])

    @property
    def period(self) -> int:
        """After so many updates the computation repeats; the policies move in the first of them."""
        return self.settings.actor_every

    @property
    def num_noises(self) -> int:
        """Draws for a~', for a~ of the policy and for a~ of the source policy; penalties take further ones."""
        return 3 if self.settings.optimistic else 2

    # ---- policies and values --------------------------------------------------------------------------------------

    def sample_actions(self, obs_MBS: Tensor, noise_MBA: Tensor | None) -> Tensor:
        """Actions `(M, B, A)` in (-1, 1) of the policies, sampled, or tanh of the mean where there is no noise."""
        bounds = self.settings.log_std_min, self.settings.log_std_max
        return squashed_sample(self.actor.forward(obs_MBS)[0], noise_MBA, *bounds)

    def policy_sample(self, actor: StackedMLP, obs_MBS: Tensor, noise_MBA: Tensor) -> tuple[PolicySample, Tensor]:
        """Actions with their log densities, and the network's outputs `(M, B, O)`."""
        out, inputs = actor.forward(obs_MBS)
        bounds = self.settings.log_std_min, self.settings.log_std_max
        return sample_of_outputs(out, inputs, noise_MBA, self._scalars, *bounds), out

    def target_values(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        """Qbar_k(s, a), `(M, N, B)`."""
        return self.target.values(torch.cat((obs_MBS, action_MBA), -1))

    @torch.inference_mode()
    def targets(self, rows_MBW: Tensor, noise_MBA: Tensor) -> Targets:
        """What `update` draws the critics to."""
        s, a = self.observation_dim, self.action_dim
        next_obs = rows_MBW[..., s + a + 2 :]
        sample, _ = self.policy_sample(self.actor, next_obs, noise_MBA)
        value = self.target_values(next_obs, sample.action).amin(1)
        future = value
        if self.settings.entropy_in_target:
            future = torch.addcmul(value, self.alpha_M1, sample.log_prob, value=-1.0)
        target = bellman_target(rows_MBW[..., s + a], rows_MBW[..., s + a + 1], future, self.settings.gamma)
        return Targets(target, value, sample.action)

    # ---- update ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def update(
        self, batch: DomainBatch, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False,
        penalty: CriticPenalty | None = None, actor_penalty: ActorPenalty | None = None,
        targets: Targets | None = None,
    ) -> dict[str, Tensor] | None:  # fmt: skip
        """One gradient step of every member, in place.

        Args:
            batch: rows of both domains.
            noise_KMBA: `num_noises` standard normal draws, behind them those of `actor_penalty`, then of `penalty`.
            turn: number of the update modulo `period`.
            with_metrics: also return statistics, each `(M,)` on the device.
            targets: of this batch and `noise_KMBA[0]`, where they are known already.
        """
        if targets is None:
            targets = self.targets(batch.rows_MBW, noise_KMBA[0])
        own = noise_KMBA[self.num_noises :]
        num_actor = 0 if actor_penalty is None else actor_penalty.num_noises
        metrics = self._learn_values(batch, targets.target_MB, penalty, own[num_actor:], with_metrics)
        if turn == 0 or with_metrics:
            noise = noise_KMBA[1 : self.num_noises]
            metrics |= self._learn_policies(batch, noise, turn == 0, actor_penalty, own[:num_actor], with_metrics)
        self.target.flat.lerp_(self.critic.flat, self.settings.tau)
        return metrics if with_metrics else None

    def _learn_values(
        self, batch: DomainBatch, target_MB: Tensor, penalty: CriticPenalty | None, noise_KMBA: Tensor,
        with_metrics: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Step of the critics; metrics."""
        m, n, size = self.num_members, self.settings.num_critics, target_MB.shape[1]
        rows, weight_MB = batch.rows_MBW[..., : self.observation_dim + self.action_dim], batch.weight_MB
        learned = batch.learned_MR
        if learned is not None:
            size = learned.shape[1]
            rows = rows.gather(1, learned.unsqueeze(-1).expand(m, size, rows.shape[-1]))
            weight_MB, target_MB = weight_MB.gather(1, learned), target_MB.gather(1, learned)
        if penalty is not None:
            rows = torch.cat((rows, penalty.rows(self, batch, noise_KMBA)), 1)
        x_GBX, parts = self.critic.spread(rows), self.critic.parts(rows.shape[1])
        outputs, traces = [], []
        for place, part in parts:
            q, inputs = part.forward(x_GBX[place])
            outputs.append(q)
            traces.append(inputs)
        q_all = (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).view(m, n, -1)
        q_MNB = q_all[..., :size]
        error_MNB = q_MNB - target_MB.unsqueeze(1)
        grad, shown = (error_MNB * weight_MB.unsqueeze(1)).mul_(self._scalars.two), {}
        if penalty is not None:
            of_batch, of_rows, measured = penalty.gradient(q_MNB, q_all[..., size:])
            grad, shown = torch.cat((grad.add_(of_batch), of_rows), -1), dict(measured)
        grad_GB1 = grad.view(m * n, -1, 1)
        for (place, part), inputs in zip(parts, traces, strict=True):
            part.write_gradients(inputs, part.hidden_gradients(inputs, grad_GB1[place]), grad_GB1[place])
        norm = self._clip(self.critic)
        self.critic_optim.step()
        if not with_metrics:
            return {}
        if norm is not None:
            shown["critic_grad_norm"] = norm
        weighted_MB = error_MNB.square().mul_(weight_MB.unsqueeze(1)).sum(1)
        if learned is None:
            of_source = weighted_MB[:, : batch.num_source]
        else:
            of_source = weighted_MB.masked_fill(learned >= batch.num_source, 0.0)
        return shown | {
            "q_mean": q_MNB.mean((1, 2)), "target_q": target_MB.mean(1), "critic_loss": weighted_MB.sum(1),
            "critic_loss_source": of_source.sum(1),
        }  # fmt: skip

    def _learn_policies(
        self, batch: DomainBatch, noise_KMBA: Tensor, moves: bool, penalty: ActorPenalty | None,
        own_noise_KMBA: Tensor, with_metrics: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Step of both policies and the temperature if it is their turn; metrics."""
        obs = batch.rows_MBW[..., : self.observation_dim]
        sample, out = self.policy_sample(self.actor, obs, noise_KMBA[0])
        grad_out, q_MB = self._policy_loss(obs, sample, largest=False)
        shown: dict[str, Tensor] = {}
        if penalty is not None:
            weight_M11, added, measured = penalty(self, batch, out, q_MB, own_noise_KMBA)
            grad_out, shown = grad_out.mul_(weight_M11).add_(added), dict(measured)
        self._step_policy(self.actor, self.actor_optim, sample.inputs, grad_out, moves)
        metrics = {}
        if with_metrics:
            loss = (self.alpha_M1 * sample.log_prob - q_MB).mean(1)
            entropy = -sample.log_prob.mean(1)
            metrics = shown | {
                "q_policy": q_MB.mean(1), "entropy": entropy, "actor_loss": loss, "alpha": self._alpha.clone()
            }  # fmt: skip
        if self.source_actor is not None and self.source_actor_optim is not None:
            optimist, _ = self.policy_sample(self.source_actor, obs, noise_KMBA[1])
            grad_out, q_MB = self._policy_loss(obs, optimist, largest=True)
            self._step_policy(self.source_actor, self.source_actor_optim, optimist.inputs, grad_out, moves)
            if with_metrics:
                metrics |= {
                    "source_q_policy": q_MB.mean(1), "source_entropy": -optimist.log_prob.mean(1),
                    "source_actor_loss": (self.alpha_M1 * optimist.log_prob - q_MB).mean(1),
                }  # fmt: skip
        if self.settings.auto_alpha and moves:
            self.step_alpha(sample.log_prob)
        return metrics

    def _policy_loss(self, obs_MBS: Tensor, sample: PolicySample, largest: bool) -> tuple[Tensor, Tensor]:
        """Gradient of mean_b [alpha log pi - extreme_k Q_k] with respect to the network's outputs, and the extreme."""
        q_MB, index, inputs, _ = extreme_value(self.critic, torch.cat((obs_MBS, sample.action), -1), largest)
        dq_da = extreme_gradient(self.critic, index, inputs, self.action_dim)
        grad_out = policy_gradient(sample, dq_da, self.alpha_M1, self._scalars)
        return grad_out.mul_(self._scalars.one / obs_MBS.shape[1]), q_MB

    def _step_policy(self, actor: StackedMLP, optim: Adam, inputs: list[Tensor], grad_out: Tensor, moves: bool) -> None:
        if moves:
            actor.write_gradients(inputs, actor.hidden_gradients(inputs, grad_out), grad_out)
            self._clip(actor)
            optim.step()

    def _clip(self, network: StackedMLP) -> Tensor | None:
        """Bound the norm of each member's gradient; the norms `(M,)` before."""
        bound = self.settings.max_grad_norm
        if bound is None:
            return None
        if self.num_members == 1:
            norm = torch.linalg.vector_norm(network.grad).view(1)
            network.grad.mul_(_clip_factor(norm, bound))
            return norm
        blocks = [block.reshape(self.num_members, -1) for block in network.blocks(network.grad)]
        norm = torch.stack([torch.linalg.vector_norm(block, dim=1) for block in blocks]).square_().sum(0).sqrt_()
        factor = _clip_factor(norm, bound).unsqueeze(1)
        for block in blocks:  # views of the gradient
            block.mul_(factor)
        return norm


def _clip_factor(norm_M: Tensor, bound: float) -> Tensor:
    # as torch.nn.utils.clip_grad_norm_ has it
    return (bound / (norm_M + 1e-6)).clamp_(max=1.0)


def make_domain_sac(
    configs: Sequence[DomainSACConfig],
    seeds: Sequence[int],
    observation_dim: int,
    action_dim: int,
    device: torch.device | str = "cpu",
    optimistic: bool = False,
) -> DomainSAC:
    """The `DomainSAC` that the configs of a pack describe.

    Args:
        optimistic: whether a source policy of its own collects in the source domain.
    """
    shared = configs[0]  # what is not per member is equal in a pack
    hyperparameters = [DomainSACHyperparameters(c.actor_lr, c.critic_lr, c.alpha_lr, c.alpha) for c in configs]
    settings = DomainSACSettings(
        hidden=tuple(shared.hidden), num_critics=shared.num_critics, gamma=shared.gamma, tau=shared.tau,
        auto_alpha=shared.auto_alpha, target_entropy=shared.target_entropy,
        entropy_in_target=shared.entropy_in_target, actor_every=shared.actor_every,
        max_grad_norm=shared.max_grad_norm, log_std_min=shared.log_std_min, log_std_max=shared.log_std_max,
        initialisation=shared.initialisation, optimistic=optimistic,
    )  # fmt: skip
    return DomainSAC(seeds, hyperparameters, settings, observation_dim, action_dim, device)
