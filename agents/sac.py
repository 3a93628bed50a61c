"""Soft actor-critic with N critics and EDAC's diversity term, for a pack of M runs at once.

The update of one member (symbols as in Haarnoja et al. 2018 and An et al. 2021):

    a~ = tanh(u), u = mu(s) + sigma(s) * eps
    J(alpha)  = -log_alpha * (log pi(a~|s) + target_entropy)
    J(pi)     = mean_b [ alpha log pi(a~|s) - min_i Q_i(s, a~) ]
    y         = r + gamma (1 - d) [ min_i Qbar_i(s', a~') - alpha log pi(a~'|s') ]
    J(Q)      = sum_i mean_b (Q_i(s, a) - y)^2 + eta * ES,    or mean_i in place of sum_i
    ES        = mean_b 1/(N-1) sum_{i != j} <g_i, g_j>,    g_i = grad_a Q_i(s, a) / (||grad_a Q_i(s, a)|| + 1e-10)
    Qbar     <- (1 - tau) Qbar + tau Q

in one of two orders: temperature, actor, critics, targets, as the released code of RAVL and EDAC has it, or critics,
actor, temperature, targets, as OfflineRL-Kit, MOBILE and MOREC have it. What methods change in y is a `TargetHook`.

Gradients are written out (see `agents.networks`). With v_i = d ES / d grad_a Q_i held fixed, the gradient of ES is that
of sum_i <v_i, grad_a Q_i>, a directional derivative of Q_i: one forward pass of the tangent v_i through the masked
layers (t_l), whose products with the back-propagated unit gradients delta_l = d Q_i / d z_l give the weight gradients.
The squared error uses the same delta_l scaled per row by c = d J / d Q_i, so both terms share one matrix product per
layer:

    d J(Q) / d W_l = (c * h_{l-1} + eta * t_{l-1})^T delta_l

Shapes: M member, N critic, G = M*N, B batch, S observation, A action.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from agents.networks import StackedMLP, StackedScalar, initialise, relu_gradient_
from agents.optim import Adam
from agents.randomness import generator

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
UPDATE_ORDERS = ("actor-first", "critics-first")
CRITIC_LOSSES = ("sum", "mean")
ACTOR_CRITICS = ("online", "target")
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def rows_pay(num_critics: int, hidden: Sequence[int]) -> bool:
    """Whether, on a CPU, `SAC._min_gradient_of_rows` saves more arithmetic than its calls cost (measured)."""
    return (num_critics - 1) * sum(n_in * n_out for n_in, n_out in pairwise(hidden)) > 200_000


@dataclass(frozen=True)
class SACHyperparameters:
    """What one member may have to itself; the rest is common to a pack."""

    eta: float = 0.0
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 3e-4


@dataclass(frozen=True)
class SACSettings:
    """What shapes the computation, equal for all members of a pack."""

    num_critics: int = 2
    actor_hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256)
    gamma: float = 0.99
    tau: float = 0.005
    target_entropy: float | None = None  # None: -dim(A)
    auto_alpha: bool = True
    alpha: float = 1.0  # initial (auto_alpha) or fixed temperature
    max_alpha: float | None = None
    entropy_in_target: bool = True  # False: a~' is drawn all the same, but alpha log pi left out of y
    target_floor: float | None = None  # y is at least this
    update_order: str = "actor-first"  # one of UPDATE_ORDERS
    critic_loss: str = "sum"  # of the critics' squared errors, or their mean
    actor_critics: str = "online"  # what the actor is trained against: Q or Qbar
    initialisation: str = "edac"  # see agents.networks.initialise


class TargetTerms(NamedTuple):
    """What the targets y = r + gamma (1 - d) [value - alpha log pi] of a minibatch are made of."""

    state_action_MBX: Tensor  # columns [s, a]
    reward_MB: Tensor
    next_obs_MBS: Tensor
    next_action_MBA: Tensor  # a~'
    values_MNB: Tensor  # of every target critic
    value_MB: Tensor  # their minimum


class TargetHook(Protocol):
    """Other rewards or values in the targets of a minibatch: a penalty, a patch."""

    num_noises: int = 0  # standard normal draws (M, B, A) that it takes of an update
    num_own_noises: int = 0  # further standard normal numbers that it takes of an update of a member

    def __call__(
        self, sac: SAC, terms: TargetTerms, noise_KMBA: Tensor, own_noise_MZ: Tensor | None
    ) -> tuple[TargetTerms, Mapping[str, Tensor]]:
        """The terms with what it changes in them, and statistics `(M, any)`, whose means of each member are metrics.

        Args:
            sac: whose targets they are.
            noise_KMBA, own_noise_MZ: its draws; None where it takes none of its own.
        """

    def select(self, members: Sequence[int]) -> TargetHook:
        """The hook for some of the members only."""
        return self


class SAC:
    """Actors, critics, targets and temperatures of a pack, and their update (an `agents.chunk.Updater`).

    Args:
        seeds: one per member; M is their number.
        hyperparameters: one per member.
        settings: common to the pack.
        observation_dim, action_dim: S and A; actions lie in [-1, 1].
        device: where everything lives.
        hook: what is changed in the targets, if anything.
    """

    period = 1

    def __init__(
        self,
        seeds: Sequence[int],
        hyperparameters: Sequence[SACHyperparameters],
        settings: SACSettings,
        observation_dim: int,
        action_dim: int,
        device: torch.device | str = "cpu",
        hook: TargetHook | None = None,
    ) -> None:
        self.seeds = tuple(seeds)
        self.hook = hook
        self.hyperparameters = tuple(hyperparameters)
        self.settings = settings
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.device = torch.device(device)
        m, n = len(self.seeds), settings.num_critics
        self.num_members, self.num_critics = m, n
        s, a = observation_dim, action_dim
        self.actor = StackedMLP((m,), (s, *settings.actor_hidden, 2 * a), device)
        self.critic = StackedMLP((m, n), (s + a, *settings.critic_hidden, 1), device)
        scheme = settings.initialisation
        # the released actors are made of torch.nn.Linear: only the critics have the other bound
        actor_scheme = "edac-fan-in" if scheme == "edac" else scheme
        initialise(self.actor, [generator(x, "init actor") for x in seeds], scheme=actor_scheme, last_bound=1e-3)
        initialise(self.critic, [generator(x, "init critic") for x in seeds], scheme=scheme, last_bound=3e-3)
        self.target = self.critic.clone()
        self.log_alpha = StackedScalar(m, math.log(settings.alpha), device)
        self._bind()
        self.actor_optim = Adam(self.actor, [h.actor_lr for h in hyperparameters])
        self.critic_optim = Adam(self.critic, [h.critic_lr for h in hyperparameters])
        self.alpha_optim = Adam(self.log_alpha, [h.alpha_lr for h in hyperparameters])

    def _bind(self) -> None:
        """Constants of the update that follow from settings, hyperparameters and parameters."""
        settings = self.settings
        self.target_entropy = -float(self.action_dim) if settings.target_entropy is None else settings.target_entropy
        # as tensors: torch converts a Python number anew in every call
        self._scalars = PolicyScalars.make(self.action_dim, self.device)
        self._entropy_goal = torch.tensor(self.target_entropy, device=self.device)
        self._loss_divisor = self.num_critics if settings.critic_loss == "mean" else 1
        self._eta_G11: Tensor | None = None
        if any(h.eta != 0 for h in self.hyperparameters):
            if self.num_critics < 2:
                raise ValueError("eta > 0 needs num_critics >= 2: the diversity term compares pairs of critics")
            eta = torch.tensor([h.eta for h in self.hyperparameters], device=self.device)
            self._eta_G11 = eta.repeat_interleave(self.num_critics).view(-1, 1, 1)
        self._by_rows = self.device.type == "cpu" and rows_pay(self.num_critics, settings.critic_hidden)
        self._first_critic_M1 = torch.arange(self.num_members, device=self.device).unsqueeze(1) * self.num_critics
        self._alpha = torch.empty_like(self.log_alpha.flat)
        self.alpha_M1 = self._alpha.unsqueeze(1)
        self._read_alpha()

    def _read_alpha(self) -> None:
        torch.exp(self.log_alpha.flat, out=self._alpha)
        if self.settings.max_alpha is not None:
            self._alpha.clamp_(max=self.settings.max_alpha)

    @property
    def num_noises(self) -> int:
        """Draws for a~, for a~' and for the hook."""
        return 2 + (0 if self.hook is None else self.hook.num_noises)

    @property
    def num_own_noises(self) -> int:
        """Further numbers for the hook."""
        return 0 if self.hook is None else self.hook.num_own_noises

    # ---- policy ---------------------------------------------------------------------------------------------

    def sample_actions(self, obs_MBS: Tensor, noise_MBA: Tensor) -> Tensor:
        """Actions `(M, B, A)` in (-1, 1) drawn from the policies of all members."""
        out, _ = self.actor.forward(obs_MBS)
        return squashed_sample(out, noise_MBA)

    def _policy(self, obs_MBS: Tensor, noise_MBA: Tensor) -> PolicySample:
        return policy_sample(self.actor, obs_MBS, noise_MBA, self._scalars)

    def _min_q(self, critic: StackedMLP, sa_MBX: Tensor) -> tuple[Tensor, Tensor, list[list[Tensor]], Tensor]:
        return extreme_value(critic, sa_MBX)

    # ---- update ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False,
        own_noise_MZ: Tensor | None = None,
    ) -> dict[str, Tensor] | None:  # fmt: skip
        """One gradient step of every member, in place; see `agents.chunk.Updater`. The draws are for a~, a~' and the
        hook."""
        if self.settings.update_order == "critics-first":
            of_critics = self._learn_values(rows_MBW, noise_KMBA[1:], own_noise_MZ, with_metrics)
            of_actor = self._learn_policy(rows_MBW, noise_KMBA[0], with_metrics)
        else:
            of_actor = self._learn_policy(rows_MBW, noise_KMBA[0], with_metrics)
            of_critics = self._learn_values(rows_MBW, noise_KMBA[1:], own_noise_MZ, with_metrics)
        self.target.flat.lerp_(self.critic.flat, self.settings.tau)
        return {**of_critics, **of_actor} if with_metrics else None

    def _learn_policy(self, rows_MBW: Tensor, noise_MBA: Tensor, with_metrics: bool) -> dict[str, Tensor]:
        """Step of actor and temperature; metrics."""
        obs = rows_MBW[..., : self.observation_dim]
        sample = self._policy(obs, noise_MBA)
        alpha_last = self.settings.update_order == "critics-first"
        if self.settings.auto_alpha and not alpha_last:
            self._update_alpha(sample.log_prob)
        q_pi = self._update_actor(obs, sample, rows_MBW.shape[1])
        metrics = {}
        if with_metrics:
            metrics = {
                "q_policy": q_pi.mean(1),
                "entropy": -sample.log_prob.mean(1),
                "actor_loss": (self.alpha_M1 * sample.log_prob - q_pi).mean(1),
            }
        if self.settings.auto_alpha and alpha_last:
            self._update_alpha(sample.log_prob)
        if with_metrics:
            metrics["alpha"] = self.alpha_M1.view(-1).clone()
        return metrics

    def _learn_values(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, own_noise_MZ: Tensor | None, with_metrics: bool
    ) -> dict[str, Tensor]:
        """Step of the critics; metrics."""
        m, n, batch = self.num_members, self.num_critics, rows_MBW.shape[1]
        target, shown = self._critic_target(rows_MBW, noise_KMBA, own_noise_MZ)
        state_action = rows_MBW[..., : self.observation_dim + self.action_dim]
        q, diversity = self._update_critic(state_action, target, batch, with_metrics)
        if not with_metrics:
            return {}
        metrics = {
            "q_mean": q.view(m, -1).mean(1),
            "q_std": q.view(m, n, -1).std(1, correction=0).mean(1),
            "target_q": target.mean(1),
            "critic_loss": (q.view(m, -1, batch) - target.unsqueeze(1)).square().mean(2).sum(1) / self._loss_divisor,
        }
        if diversity is not None:
            metrics["critic_diversity"] = diversity
        return metrics | {name: values.float().mean(1) for name, values in shown.items()}

    def _update_alpha(self, log_prob_MB: Tensor) -> None:
        torch.mean(log_prob_MB, dim=1, out=self.log_alpha.grad).add_(self._entropy_goal).neg_()
        self.alpha_optim.step()
        self._read_alpha()

    def _update_actor(self, obs_MBS: Tensor, sample: PolicySample, batch: int) -> Tensor:
        action = sample.action
        critic = self.target if self.settings.actor_critics == "target" else self.critic
        q_MB, index, inputs, _ = self._min_q(critic, torch.cat((obs_MBS, action), dim=-1))
        dq_da = (self._min_gradient_of_rows if self._by_rows else self._min_gradient)(critic, index, inputs)
        grad_out = policy_gradient(sample, dq_da, self.alpha_M1, self._scalars).mul_(self._scalars.one / batch)
        self.actor.write_gradients(sample.inputs, self.actor.hidden_gradients(sample.inputs, grad_out), grad_out)
        self.actor_optim.step()
        return q_MB

    def _min_gradient(self, critic: StackedMLP, index_M1B: Tensor, inputs: list[list[Tensor]]) -> Tensor:
        return extreme_gradient(critic, index_M1B, inputs, self.action_dim)

    def _min_gradient_of_rows(self, critic: StackedMLP, index_M1B: Tensor, inputs: list[list[Tensor]]) -> Tensor:
        """The same from the rows of each critic that chose it: an N-th of the products, but their shapes depend on the
        values."""
        m, n, batch = self.num_members, self.num_critics, index_M1B.shape[-1]
        s, a = self.observation_dim, self.action_dim
        critic_MB = index_M1B.squeeze(1) + self._first_critic_M1
        counts = torch.bincount(critic_MB.view(-1), minlength=m * n).tolist()
        order = critic_MB.view(-1).argsort(stable=True)  # (member, row) pairs, by the critic they chose
        dq_da = torch.empty((m * batch, a))
        start = 0
        for (place, part), layer_inputs in zip(critic.parts(batch), inputs, strict=True):
            for g, count in enumerate(counts[place]):
                if count:
                    pairs = order[start : start + count]
                    dq_da[pairs] = part.row_gradient(g, [h[g] for h in layer_inputs], pairs % batch, s, s + a)
                    start += count
        return dq_da.view(m, batch, a)

    def _critic_target(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, own_noise_MZ: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Targets y, `(M, B)`, and the hook's statistics."""
        s, a = self.observation_dim, self.action_dim
        done, next_obs, noise = rows_MBW[..., s + a + 1], rows_MBW[..., s + a + 2 :], noise_KMBA[0]
        if self.settings.entropy_in_target:
            sample = self._policy(next_obs, noise)
            action = sample.action
        else:
            action = self.sample_actions(next_obs, noise)
        value, _, _, values = self._min_q(self.target, torch.cat((next_obs, action), dim=-1))
        reward = rows_MBW[..., s + a]
        shown: Mapping[str, Tensor] = {}
        if self.hook is not None:
            terms = TargetTerms(rows_MBW[..., : s + a], reward, next_obs, action, values, value)
            terms, shown = self.hook(self, terms, noise_KMBA[1:], own_noise_MZ)
            reward, value = terms.reward_MB, terms.value_MB
        if self.settings.entropy_in_target:
            value = torch.addcmul(value, self.alpha_M1, sample.log_prob, value=-1.0)
        continued = torch.addcmul(value, done, value, value=-1.0)  # (1 - d) * value
        target = torch.add(reward, continued, alpha=self.settings.gamma)
        return target if self.settings.target_floor is None else target.clamp_(min=self.settings.target_floor), shown

    def _update_critic(
        self, sa_MBX: Tensor, target_MB: Tensor, batch: int, with_metrics: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient step of all critics; their values before it, `(G, B, 1)`, and their diversity ES, `(M,)`."""
        m, n = self.num_members, self.num_critics
        x_GBX, scale = self.critic.spread(sa_MBX), 2.0 / (batch * self._loss_divisor)
        y_GB1 = target_MB.unsqueeze(1).expand(m, n, batch).reshape(m * n, batch, 1)
        values, traces = [], []
        for place, part in self.critic.parts(batch):
            q, inputs = part.forward(x_GBX[place])
            values.append(q)
            if self._eta_G11 is None:
                c = (q - y_GB1[place]).mul_(scale)
                part.write_gradients(inputs, part.hidden_gradients(inputs, c), c)
            else:
                traces.append((inputs, part.hidden_gradients(inputs, torch.ones_like(q))))
        q_GB1 = torch.cat(values) if len(values) > 1 else values[0]
        diversity = None
        if self._eta_G11 is not None:
            diversity = self._write_diverse_gradients(traces, (q_GB1 - y_GB1).mul_(scale), with_metrics)
        self.critic_optim.step()
        return q_GB1, diversity

    def _write_diverse_gradients(
        self, traces: list[tuple[list[Tensor], list[Tensor]]], c_GB1: Tensor, with_metrics: bool
    ) -> Tensor | None:
        """Critic gradients of squared error plus eta * ES (module docstring, last equation)."""
        assert self._eta_G11 is not None
        m, n, s, a = self.num_members, self.num_critics, self.observation_dim, self.action_dim
        batch = c_GB1.shape[1]
        parts = self.critic.parts(batch)
        gradients = [part.input_gradient(t[1][0], s, s + a) for (_, part), t in zip(parts, traces, strict=True)]
        dq_da = torch.cat(gradients)  # (G, B, A)
        norm = dq_da.norm(dim=-1, keepdim=True)
        unit = dq_da / (norm + 1e-10)
        unit_MNBA = unit.view(m, n, batch, a)
        others = (unit_MNBA.sum(1, keepdim=True) - unit_MNBA).view(m * n, batch, a)  # sum over j != i
        # d ES / d g_i = 2/(N-1) sum_{j != i} g_j, through g_i = x / (||x|| + 1e-10); eta and the batch mean included
        scaled = others * (self._eta_G11 * (2.0 / ((n - 1) * batch)))
        along = (scaled * unit).sum(-1, keepdim=True)
        v_GBA = (scaled - dq_da * (along / norm.clamp_min(1e-30))) / (norm + 1e-10)
        for (place, part), (inputs, deltas) in zip(parts, traces, strict=True):
            self._write_combined(part, inputs, deltas, c_GB1[place], v_GBA[place])
        if not with_metrics:
            return None
        return (unit_MNBA * others.view_as(unit_MNBA)).sum((1, 3)).mean(1) / (n - 1)

    def _write_combined(
        self, critic: StackedMLP, inputs: list[Tensor], deltas: list[Tensor], c_GB1: Tensor, v_GBA: Tensor
    ) -> None:
        """Gradients (c * h + t)^T delta of every layer, t the tangent that starts as v in the action columns."""
        s, last = self.observation_dim, len(deltas)
        combined = inputs[0] * c_GB1
        combined[..., s:] += v_GBA
        tangent = torch.bmm(v_GBA, critic.input_weights(s, s + self.action_dim))
        for layer, delta in enumerate(deltas):
            torch.bmm(combined.mT, delta, out=critic.weight_grads[layer])
            torch.bmm(c_GB1.mT, delta, out=critic.bias_grads[layer])
            h = inputs[layer + 1]
            relu_gradient_(tangent, h)
            combined = torch.addcmul(tangent, h, c_GB1)
            if layer + 1 < last:
                tangent = torch.bmm(tangent, critic.weights[layer + 1])
        torch.sum(combined, dim=1, out=critic.weight_grads[-1].squeeze(-1))
        torch.sum(c_GB1, dim=1, keepdim=True, out=critic.bias_grads[-1])

    # ---- members and checkpoints ----------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> SAC:
        """The same learner with some of its members only."""
        other = copy.copy(self)
        other.seeds = tuple(self.seeds[m] for m in members)
        other.hyperparameters = tuple(self.hyperparameters[m] for m in members)
        other.num_members = len(members)
        other.hook = None if self.hook is None else self.hook.select(members)
        other.actor, other.critic = self.actor.select(members), self.critic.select(members)
        other.target, other.log_alpha = self.target.select(members), self.log_alpha.select(members)
        other._bind()
        other.actor_optim = self.actor_optim.select(other.actor, members)
        other.critic_optim = self.critic_optim.select(other.critic, members)
        other.alpha_optim = self.alpha_optim.select(other.log_alpha, members)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while learning."""
        stacks = {name: getattr(self, name).flat for name in ("actor", "critic", "target", "log_alpha")}
        optims = {name: getattr(self, name).state_dict() for name in ("actor_optim", "critic_optim", "alpha_optim")}
        return {**stacks, **optims}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("actor", "critic", "target", "log_alpha"):
            getattr(self, name).flat.copy_(state[name])
        for name in ("actor_optim", "critic_optim", "alpha_optim"):
            getattr(self, name).load_state_dict(state[name])
        self._read_alpha()


# ---- squashed Gaussian policies and the critics' extreme, as every soft actor-critic here has them -----------------


class PolicyScalars(NamedTuple):
    """Numbers as tensors: torch converts a Python number anew in every call."""

    one: Tensor
    two: Tensor
    tiny: Tensor
    log_norm: Tensor

    @classmethod
    def make(cls, action_dim: int, device: torch.device | str) -> PolicyScalars:
        return cls(*(torch.tensor(c, device=device) for c in (1.0, 2.0, 1e-6, action_dim * _HALF_LOG_2PI)))


@dataclass(frozen=True)
class PolicySample:
    """An action drawn from the policy and what its gradient needs; axes (M, B, ...)."""

    action: Tensor
    log_prob: Tensor
    one_minus_sq: Tensor
    shifted: Tensor  # 1 - a^2 + 1e-6
    scaled_noise: Tensor
    clamped: Tensor  # where log_std is at a bound, so passes no gradient
    inputs: list[Tensor]


def policy_sample(
    actor: StackedMLP, obs_MBS: Tensor, noise_MBA: Tensor, scalars: PolicyScalars, log_std_min: float = LOG_STD_MIN,
    log_std_max: float = LOG_STD_MAX,
) -> PolicySample:  # fmt: skip
    """Actions of tanh-Gaussian policies and their log densities, whose 1 - a^2 is 1e-6 larger, as is usual."""
    out, inputs = actor.forward(obs_MBS)
    return sample_of_outputs(out, inputs, noise_MBA, scalars, log_std_min, log_std_max)


def sample_of_outputs(
    out_MBO: Tensor, inputs: list[Tensor], noise_MBA: Tensor, scalars: PolicyScalars, log_std_min: float,
    log_std_max: float,
) -> PolicySample:  # fmt: skip
    """`policy_sample` from the network's outputs [mean, log std] and its layers' inputs."""
    mean, raw_log_std = out_MBO.split(noise_MBA.shape[-1], dim=-1)
    log_std = raw_log_std.clamp(log_std_min, log_std_max)
    scaled_noise = log_std.exp().mul_(noise_MBA)
    action = (mean + scaled_noise).tanh_()
    one_minus_sq = torch.addcmul(scalars.one, action, action, value=-1.0)  # 1 - a^2
    shifted = one_minus_sq + scalars.tiny
    # log N(u) - log(1 - a^2 + 1e-6), summed over action dimensions
    terms = torch.addcmul(log_std, noise_MBA, noise_MBA, value=0.5).add_(shifted.log())
    log_prob = terms.sum(-1).add_(scalars.log_norm).neg_()
    return PolicySample(action, log_prob, one_minus_sq, shifted, scaled_noise, raw_log_std != log_std, inputs)


def policy_gradient(sample: PolicySample, dq_da_MBA: Tensor, alpha_M1: Tensor, scalars: PolicyScalars) -> Tensor:
    """Gradient of alpha log pi(a|s) - Q(s, a) of every row with respect to the actor's outputs, `(M, B, 2 A)`."""
    # d/da of alpha * log pi is 2 alpha a / (1 - a^2 + 1e-6); then through a = tanh(u)
    alpha = alpha_M1.unsqueeze(-1)
    grad_u = (sample.action / sample.shifted).mul_(alpha * scalars.two).sub_(dq_da_MBA).mul_(sample.one_minus_sq)
    grad_log_std = torch.addcmul(-alpha, grad_u, sample.scaled_noise)
    grad_log_std.masked_fill_(sample.clamped, 0.0)
    return torch.cat((grad_u, grad_log_std), dim=-1)


def extreme_value(
    critic: StackedMLP, sa_MBX: Tensor, largest: bool = False
) -> tuple[Tensor, Tensor, list[list[Tensor]], Tensor]:
    """min (or max) over critics `(M, B)`, its index `(M, 1, B)`, the layers' inputs of every part, every critic's value
    `(M, N, B)`."""
    x_GBX, outputs, inputs = critic.spread(sa_MBX), [], []
    for place, part in critic.parts(sa_MBX.shape[1]):
        q, layer_inputs = part.forward(x_GBX[place])
        outputs.append(q)
        inputs.append(layer_inputs)
    q_GB1 = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    q_MNB = q_GB1.view(sa_MBX.shape[0], -1, sa_MBX.shape[1])
    q_MB, index = (q_MNB.max if largest else q_MNB.min)(dim=1, keepdim=True)
    return q_MB.squeeze(1), index, inputs, q_MNB


def extreme_gradient(critic: StackedMLP, index_M1B: Tensor, inputs: list[list[Tensor]], action_dim: int) -> Tensor:
    """d Q_i / da of the critic i that `extreme_value` chose for a row, `(M, B, A)`."""
    m, _, batch = index_M1B.shape
    width, gradients = critic.sizes[0], []
    chosen_MNB = torch.zeros((m, critic.num_stacked // m, batch), device=index_M1B.device)
    chosen_GB1 = chosen_MNB.scatter_(1, index_M1B, 1.0).view(-1, batch, 1)
    for (place, part), layer_inputs in zip(critic.parts(batch), inputs, strict=True):
        deltas = part.hidden_gradients(layer_inputs, chosen_GB1[place])
        gradients.append(part.input_gradient(deltas[0], width - action_dim, width))
    return torch.cat(gradients).view(m, -1, batch, action_dim).sum(1)


def squashed_sample(
    out: Tensor, noise: Tensor | None, log_std_min: float = LOG_STD_MIN, log_std_max: float = LOG_STD_MAX
) -> Tensor:
    """Actions from the actor's outputs `(..., 2A)`: tanh(mu + sigma * noise), or tanh(mu) where noise is None."""
    mean, log_std = out.chunk(2, dim=-1)
    if noise is None:
        return mean.tanh()
    return torch.addcmul(mean, log_std.clamp(log_std_min, log_std_max).exp_(), noise).tanh_()
