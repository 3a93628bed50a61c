"""CQL: conservative Q-learning (Kumar, Zhou, Tucker and Levine, NeurIPS 2020, arXiv 2006.04779).

Soft actor-critic on the rows of the dataset alone, whose critics are pushed down where a soft maximum over actions lies
and up at the dataset's actions (CQL(H), equation 4):

    y      = r + gamma (1 - d) min_i Qbar_i(s', a~'),    with entropy_in_target less alpha log pi(a~'|s')
    J(Q_i) = mean (Q_i(s, a) - y)^2 + w mean [ tau log sum_k exp((Q_i(s, a_k) - log p_k) / tau) - Q_i(s, a) ]
    J(pi)  = mean [ alpha log pi(a~|s) - min_i Q_i(s, a~) ]
    J(alpha) = -log_alpha mean (log pi(a~|s) + target_entropy)

The a_k are `num_actions` each from the uniform distribution, from pi(.|s) and from pi(.|s'), all valued at s, and p_k
their densities: importance samples of the integral. Without `importance_sampling` log p_k is left out and a is one of
the a_k. w is `cql_alpha`; with `lagrange` it is multiplied by alpha', which rises while the gap between the two terms
is larger than `target_action_gap`:

    J(alpha') = -1/2 sum_i alpha' w (gap_i - target_action_gap),    alpha' = exp(log_alpha')

The first `cloning_updates` train the policy towards the data instead:

    J(pi)  = mean [ alpha log pi(a~|s) - log pi(a|s) ]

As in the code whose settings stand in agents/cql.yaml (tinkoff-ai/CORL, algorithms/offline/cql.py), every loss is that
of the networks before the update, and only then they all take their steps; the log standard deviation of pi is the
network's output times a learned number that starts at 1, plus a learned one that starts at -1, clipped to [-20, 2].
Departures from it: cloning takes the density of the dataset's actions, where that code takes that of new samples, and
both critics are as deep as `hidden` says, where its second one always has three hidden layers.

Gradients are written out (see `agents.networks`). With a = tanh(u) and u = mu + sigma eps the density is

    log pi = sum [ -eps^2 / 2 - log sigma - log(2 pi) / 2 - 2 (log 2 - u - softplus(-2 u)) ],    d log pi / du = 2 a

Shapes: M member, G = 2M critics, B batch, n drawn actions, K = 1 + 3n actions valued at a state, S observation,
A action, Z numbers of an update's own noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.checks import check_choice, check_not_negative, check_positive
from agents.conservative import conservative_term, uniform_actions, uniform_log_density
from agents.critics import bellman_target, min_value_and_gradient
from agents.method import TrainingData, per_member
from agents.model_free import (
    ModelFree,
    ModelFreeConfig,
    NetworkUpdater,
    member_values,
    scaled,
    split_rows,
)
from agents.networks import StackedMLP, StackedScalar
from agents.optim import Adam
from agents.policies import squashed_arrays
from agents.squashed import LARGEST_ACTION, squashed_log_density
from envs.errors import UserError

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LOG_STD_OFFSET = -1.0  # what is added to the network's output at the start
MAX_ALPHA_PRIME = 1e6
_LAST_GAIN = 1e-2  # of every network's last layer


@dataclass
class CQLConfig(ModelFreeConfig):
    """CQL's hyperparameters; per-dataset values in agents/cql.yaml. Fields marked per member may differ inside a
    pack."""

    cql_alpha: float = per_member(10.0)  # w, weight of the conservative term
    num_actions: int = 10  # n, of each of the three kinds
    cql_temperature: float = per_member(1.0)  # tau of the log-sum-exp
    importance_sampling: bool = True
    lagrange: bool = False
    target_action_gap: float = per_member(-1.0)  # with lagrange
    min_gap: float | None = None  # the gap of a row counts as at least this
    max_gap: float | None = None  # and at most this
    max_target_backup: bool = False  # y from the best of n draws of a~'
    entropy_in_target: bool = False
    cloning_updates: int = 0  # updates at the start whose policy is drawn to the data, a multiple of updates_per_epoch
    actor_lr: float = per_member(3e-5)
    critic_lr: float = per_member(3e-4)  # of alpha', too
    alpha_lr: float = per_member(3e-5)
    auto_alpha: bool = True
    alpha: float = 1.0  # initial temperature, or the fixed one
    target_entropy: float | None = None  # None: -dim(A)
    initialisation: str = "orthogonal"  # of the critics' hidden layers: orthogonal | torch
    normalize_observations: bool = True  # nothing is done to a dataset that is standardised already
    reward_scale: str = "none"  # none | return-range: 1000 / (best - worst return)
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_actions", "cql_temperature", "actor_lr", "critic_lr", "alpha_lr", "alpha")
        check_not_negative(self, "cql_alpha", "cloning_updates")
        check_choice(self, "initialisation", ("orthogonal", "torch"))
        check_choice(self, "reward_scale", ("none", "return-range"))
        if not math.isfinite(self.target_action_gap):
            raise UserError(f"method.target_action_gap={self.target_action_gap} must be a finite number")
        low, high = self.min_gap, self.max_gap
        if low is not None and high is not None and not low < high:
            raise UserError(f"method.min_gap={low} must be less than method.max_gap={high}, or one of them null")
        if self.cloning_updates % self.updates_per_epoch:
            raise UserError(
                f"method.cloning_updates={self.cloning_updates} must be a multiple of "
                f"method.updates_per_epoch={self.updates_per_epoch}"
            )

    def own_noises(self, observation_dim: int, action_dim: int) -> int:
        return (3 + self.max_target_backup) * self.num_actions * self.batch_size * action_dim


class _Policy(NamedTuple):
    """What the actors make of states."""

    mean_MBA: Tensor
    raw_MBA: Tensor  # the network's output for the log standard deviation
    log_std_MBA: Tensor
    clipped_MBA: Tensor  # where log_std is at a bound, so passes no gradient
    inputs: list[Tensor]


class _Sample(NamedTuple):
    """Actions drawn from a `_Policy`; axes (M, B, A), or (M, n, B, A)."""

    action: Tensor
    log_prob: Tensor
    scaled_noise: Tensor


class CQLUpdater(NetworkUpdater[CQLConfig]):
    """Policies, critics, targets and temperatures of a pack, and their update.

    Attributes:
        cloning: whether updates train the policies towards the data. Not to be changed under a captured graph.
    """

    stacks = ("actor", "log_std_scale", "log_std_offset", "critic", "target_critic", "log_alpha", "log_alpha_prime")
    optimisers = tuple(f"{name}_optim" for name in stacks if name != "target_critic")

    def build(self, seeds: Sequence[int], device: torch.device | str) -> None:
        cfg, m, s, a = self.shared, self.num_members, self.observation_dim, self.action_dim
        self.num_own_noises = cfg.own_noises(s, a)
        self.num_noises = 1 if cfg.max_target_backup else 2
        self.cloning = False
        self.actor = self.network("actor", seeds, (s, *cfg.hidden, 2 * a), device)
        sizes = (s + a, *cfg.hidden, 1)
        self.critic = self.network("critic", seeds, sizes, device, each=2, scheme=cfg.initialisation)
        _shrink_last_layer(self.actor, "torch")
        _shrink_last_layer(self.critic, cfg.initialisation)
        self.target_critic = self.critic.clone()
        self.log_std_scale = StackedScalar(m, 1.0, device)
        self.log_std_offset = StackedScalar(m, LOG_STD_OFFSET, device)
        self.log_alpha = StackedScalar(m, math.log(cfg.alpha), device)
        self.log_alpha_prime = StackedScalar(m, 1.0, device)
        actor_lrs, critic_lrs = self.of_each("actor_lr"), self.of_each("critic_lr")
        self.actor_optim, self.critic_optim = Adam(self.actor, actor_lrs), Adam(self.critic, critic_lrs)
        self.log_std_scale_optim = Adam(self.log_std_scale, actor_lrs)
        self.log_std_offset_optim = Adam(self.log_std_offset, actor_lrs)
        self.log_alpha_optim = Adam(self.log_alpha, self.of_each("alpha_lr"))
        self.log_alpha_prime_optim = Adam(self.log_alpha_prime, critic_lrs)

    def bind(self) -> None:
        """Constants of the update that follow from the configs, and views."""
        device, shared = self.actor.flat.device, self.shared
        self._weight_M1 = member_values([c.cql_alpha for c in self.configs], device).squeeze(-1)
        self._temperature_M11 = member_values([c.cql_temperature for c in self.configs], device)
        self._gap_goal_M = member_values([c.target_action_gap for c in self.configs], device).view(-1)
        self._entropy_goal = -float(self.action_dim) if shared.target_entropy is None else shared.target_entropy
        self._scale_M11, self._offset_M11 = (
            stack.flat.view(-1, 1, 1) for stack in (self.log_std_scale, self.log_std_offset)
        )

    # ---- policy ---------------------------------------------------------------------------------------------

    def _policy(self, obs_MBS: Tensor) -> _Policy:
        out, inputs = self.actor.forward(obs_MBS)
        mean, raw = out.split(self.action_dim, dim=-1)
        log_std = torch.addcmul(self._offset_M11, raw, self._scale_M11)
        bounded = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        return _Policy(mean, raw, bounded, bounded != log_std, inputs)

    def folded_actor(self) -> StackedMLP:
        """The actors with the learned scale and offset of the log standard deviation inside their last layers."""
        other, a = self.actor.clone(), self.action_dim
        other.weights[-1][..., a:].mul_(self._scale_M11)
        other.biases[-1][..., a:].mul_(self._scale_M11).add_(self._offset_M11)
        return other

    # ---- update ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False,
        own_noise_MZ: Tensor | None = None,
    ) -> dict[str, Tensor] | None:  # fmt: skip
        """One gradient step of every member (see `agents.chunk.Updater`). The draws are for a~ and a~', its own for the
        uniform actions, those of pi(.|s), those of pi(.|s') and, with `max_target_backup`, a~'."""
        assert own_noise_MZ is not None
        obs, action, _, reward, done, next_obs = split_rows(rows_MBW, self.observation_dim, self.action_dim)
        (m, batch, a), n, shared = action.shape, self.shared.num_actions, self.shared
        own_KMnBA = own_noise_MZ.view(m, -1, n, batch, a).transpose(0, 1)
        policy, next_policy = self._policy(obs), self._policy(next_obs)
        alpha_M1 = self.log_alpha.flat.exp().unsqueeze(1)

        sample = _sample(policy, noise_KMBA[0])
        metrics = self._write_actor_gradient(policy, sample, obs, action, alpha_M1)
        torch.mean(sample.log_prob, dim=1, out=self.log_alpha.grad).add_(self._entropy_goal).neg_()

        with_entropy = alpha_M1 if shared.entropy_in_target else None
        draws = own_KMnBA[3] if shared.max_target_backup else noise_KMBA[1].unsqueeze(1)
        value = self._next_value(next_obs, _sample(next_policy, draws), with_entropy)
        target = bellman_target(reward, done, value, shared.gamma)
        uniform = uniform_actions(own_KMnBA[0])
        others = (_sample(policy, own_KMnBA[1]), _sample(next_policy, own_KMnBA[2]))
        metrics |= self._write_critic_gradient(obs, action, target, uniform, others)

        if shared.auto_alpha:
            self.log_alpha_optim.step()
        for optim in (self.actor_optim, self.log_std_scale_optim, self.log_std_offset_optim, self.critic_optim):
            optim.step()
        if shared.lagrange:
            self.log_alpha_prime_optim.step()
        self.target_critic.flat.lerp_(self.critic.flat, shared.tau)
        if not with_metrics:
            return None
        return {name: value.mean(1) for name, value in metrics.items()} | {"alpha": alpha_M1.view(-1)}

    def _write_actor_gradient(
        self, policy: _Policy, sample: _Sample, obs: Tensor, action: Tensor, alpha_M1: Tensor
    ) -> dict[str, Tensor]:
        """Gradients of the actors and of their scales and offsets; statistics `(M, B)`."""
        alpha, own = alpha_M1.unsqueeze(-1), sample.action
        if self.cloning:
            u = action.clamp(-LARGEST_ACTION, LARGEST_ACTION).atanh_()
            inverse_std = policy.log_std_MBA.neg().exp_()
            z = (u - policy.mean_MBA).mul_(inverse_std)
            value, log_prob = -squashed_log_density(z, policy.log_std_MBA, u), sample.log_prob
            grad_u = own * alpha * 2.0
            grad_log_std = torch.addcmul(-alpha, grad_u, sample.scaled_noise) + (1.0 - z * z)
            grad_mean = grad_u - z * inverse_std
            loss = alpha_M1 * log_prob + value
        else:
            q_MB, dq_da = min_value_and_gradient(self.critic, torch.cat((obs, own), dim=-1), self.action_dim)
            grad_mean = own * alpha * 2.0 - dq_da * torch.addcmul(torch.ones_like(own), own, own, value=-1.0)
            grad_log_std = torch.addcmul(-alpha, grad_mean, sample.scaled_noise)
            loss = alpha_M1 * sample.log_prob - q_MB
        grad_log_std = grad_log_std.masked_fill_(policy.clipped_MBA, 0.0)
        grad_out = torch.cat((grad_mean, grad_log_std * self._scale_M11), dim=-1).mul_(1.0 / obs.shape[1])
        grad_log_std.mul_(1.0 / obs.shape[1])
        torch.sum(grad_log_std * policy.raw_MBA, dim=(1, 2), out=self.log_std_scale.grad)
        torch.sum(grad_log_std, dim=(1, 2), out=self.log_std_offset.grad)
        self.actor.write_gradients(policy.inputs, self.actor.hidden_gradients(policy.inputs, grad_out), grad_out)
        return {"actor_loss": loss, "entropy": -sample.log_prob}

    def _next_value(self, next_obs: Tensor, draws: _Sample, alpha_M1: Tensor | None) -> Tensor:
        """The value of s', `(M, B)`: that of the best of the drawn actions `(M, n, B, A)`."""
        m, n, batch, _ = draws.action.shape
        states = next_obs.unsqueeze(1).expand(m, n, batch, self.observation_dim)
        x_MRX = torch.cat((states, draws.action), dim=-1).view(m, n * batch, -1)
        value, best = self.target_critic.values(x_MRX).amin(1).view(m, n, batch).max(1, keepdim=True)
        if alpha_M1 is None:
            return value.squeeze(1)
        return value.squeeze(1) - alpha_M1 * draws.log_prob.gather(1, best).squeeze(1)

    def _write_critic_gradient(
        self, obs: Tensor, action: Tensor, target: Tensor, uniform: Tensor, drawn: tuple[_Sample, _Sample]
    ) -> dict[str, Tensor]:
        """Gradients of the critics and of log alpha'; statistics `(M, any)`."""
        shared = self.shared
        m, n, batch, a = uniform.shape
        actions = torch.cat((action.unsqueeze(1), uniform, *(x.action for x in drawn)), dim=1)  # (M, K, B, A)
        states = obs.unsqueeze(1).expand(m, 1 + 3 * n, batch, self.observation_dim)
        x_GRX = self.critic.spread(torch.cat((states, actions), dim=-1).view(m, (1 + 3 * n) * batch, -1))
        log_density = torch.cat(
            (uniform.new_full((m, n, batch), uniform_log_density(a)), *(x.log_prob for x in drawn)), dim=1
        )
        weight_M1 = self._weight_M1
        if shared.lagrange:
            alpha_prime_M1 = self.log_alpha_prime.flat.exp().clamp_(max=MAX_ALPHA_PRIME).unsqueeze(1)
            weight_M1 = weight_M1 * alpha_prime_M1
        of_members = (log_density, self._temperature_M11, weight_M1, target)
        of_critics = [t.repeat_interleave(2, dim=0) for t in of_members]  # (G, ...)
        values, gaps = [], []
        bounds = shared.min_gap, shared.max_gap
        for place, part in self.critic.parts(x_GRX.shape[1]):
            log_p, temperature, weight, y = (t[place] for t in of_critics)
            out, inputs = part.forward(x_GRX[place])
            q_GKB = out.view(-1, 1 + 3 * n, batch)
            density = log_p if shared.importance_sampling else None
            gap, c_GKB = conservative_term(q_GKB, density, temperature, weight / batch, bounds)
            c_GKB[:, 0].add_(q_GKB[:, 0] - y, alpha=2.0 / batch)
            c = c_GKB.view_as(out)
            part.write_gradients(inputs, part.hidden_gradients(inputs, c), c)
            values.append(q_GKB)
            gaps.append(gap)
        q_MCKB, gap_M2B = torch.cat(values).view(m, 2, -1, batch), torch.cat(gaps).view(m, 2, batch)
        metrics = {
            "q_mean": q_MCKB[:, :, 0].flatten(1),
            "q_random": q_MCKB[:, :, 1 : 1 + n].flatten(1),
            "target_q": target,
            "critic_loss": (q_MCKB[:, :, 0] - target.unsqueeze(1)).square_().sum(1),
            "conservative_gap": gap_M2B.flatten(1),
        }
        if shared.lagrange:
            excess_M = gap_M2B.mean(2).sum(1) - 2.0 * self._gap_goal_M
            inside = self.log_alpha_prime.flat < math.log(MAX_ALPHA_PRIME)
            torch.mul(excess_M, (weight_M1.squeeze(1) * -0.5) * inside, out=self.log_alpha_prime.grad)
            metrics["alpha_prime"] = alpha_prime_M1
        return metrics


def _shrink_last_layer(network: StackedMLP, scheme: str) -> None:
    """Make a last layer that `initialise` has drawn one with a gain of 0.01 and without biases: orthogonal, or else
    uniform with the variance of Glorot and Bengio (2010)."""
    _, n_in, n_out = network.weights[-1].shape
    of_uniform = math.sqrt(6.0 * n_in / (n_in + n_out))
    network.weights[-1].mul_(_LAST_GAIN * (math.sqrt(0.5) if scheme == "orthogonal" else of_uniform))
    network.biases[-1].zero_()


def _sample(policy: _Policy, noise: Tensor) -> _Sample:
    """Actions for standard normal draws `(M, B, A)`, or `(M, n, B, A)`."""
    mean, log_std = policy.mean_MBA, policy.log_std_MBA
    if noise.ndim == 4:
        mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)
    scaled = log_std.exp() * noise
    u = mean + scaled
    return _Sample(u.tanh(), squashed_log_density(noise, log_std, u), scaled)


class CQL(ModelFree):
    """A pack of CQL runs."""

    Config, Updater = CQLConfig, CQLUpdater
    configs: Sequence[CQLConfig]
    shared: CQLConfig
    updater: CQLUpdater

    def prepare(self, data: TrainingData) -> TrainingData:
        return scaled(data, self.shared.normalize_observations, self.shared.reward_scale)

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        cloning = epoch * self.shared.updates_per_epoch < self.shared.cloning_updates
        if cloning != self.updater.cloning:
            self.updater.cloning = cloning
            self._runner = self._make_runner()  # graphs that it has captured are of the other loss
        return super().train_epoch(epoch)

    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        return squashed_arrays(self.updater.folded_actor(), member, LOG_STD_MIN, LOG_STD_MAX)


METHOD = CQL
