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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from agents.critics import bellman_target, extreme_gradient, extreme_value
from agents.networks import StackedMLP, relu_gradient_
from agents.soft_actor_critic import LearningRates, SoftActorCritic
from agents.squashed import PolicySample, policy_gradient, policy_sample, squashed_sample

UPDATE_ORDERS = ("actor-first", "critics-first")
CRITIC_LOSSES = ("sum", "mean")
ACTOR_CRITICS = ("online", "target")


def rows_pay(num_critics: int, hidden: Sequence[int]) -> bool:
    """Whether, on a CPU, `SAC._min_gradient_of_rows` saves more arithmetic than its calls cost (measured)."""
    return (num_critics - 1) * sum(n_in * n_out for n_in, n_out in pairwise(hidden)) > 200_000


@dataclass(frozen=True)
class SACHyperparameters(LearningRates):
    """What one member may have to itself; the rest is common to a pack."""

    eta: float = 0.0


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


class SAC(SoftActorCritic[SACHyperparameters, SACSettings]):
    """Actors, critics, targets and temperatures of a pack, and their update (an `agents.chunk.Updater`).

    Args:
        seeds, hyperparameters, settings, observation_dim, action_dim, device: see `SoftActorCritic`.
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
        self.hook = hook
        super().__init__(seeds, hyperparameters, settings, observation_dim, action_dim, device)

    def build(self) -> None:
        s, a, one = self.observation_dim, self.action_dim, self.settings
        # the released actors are made of torch.nn.Linear: only the critics have the other bound
        scheme = "edac-fan-in" if one.initialisation == "edac" else one.initialisation
        actor_sizes, critic_sizes = (s, *one.actor_hidden, 2 * a), (s + a, *one.critic_hidden, 1)
        self.actor = self.network("actor", self.seeds, actor_sizes, self.device, scheme=scheme, last_bound=1e-3)
        self.critic = self.network(
            "critic", self.seeds, critic_sizes, self.device, each=one.num_critics, scheme=one.initialisation,
            last_bound=3e-3,
        )  # fmt: skip

    def initial_alpha(self) -> Tensor:
        return torch.full((self.num_members,), self.settings.alpha)

    @property
    def num_critics(self) -> int:
        return self.settings.num_critics

    def bind(self) -> None:
        super().bind()
        settings = self.settings
        self._loss_divisor = self.num_critics if settings.critic_loss == "mean" else 1
        self._eta_G11: Tensor | None = None
        if any(h.eta != 0 for h in self.hyperparameters):
            if self.num_critics < 2:
                raise ValueError("eta > 0 needs num_critics >= 2: the diversity term compares pairs of critics")
            eta = torch.tensor([h.eta for h in self.hyperparameters], device=self.device)
            self._eta_G11 = eta.repeat_interleave(self.num_critics).view(-1, 1, 1)
        self._by_rows = self.device.type == "cpu" and rows_pay(self.num_critics, settings.critic_hidden)
        self._first_critic_M1 = torch.arange(self.num_members, device=self.device).unsqueeze(1) * self.num_critics

    def read_alpha(self) -> None:
        super().read_alpha()
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
            self.step_alpha(sample.log_prob)
        q_pi = self._update_actor(obs, sample, rows_MBW.shape[1])
        metrics = {}
        if with_metrics:
            metrics = {
                "q_policy": q_pi.mean(1),
                "entropy": -sample.log_prob.mean(1),
                "actor_loss": (self.alpha_M1 * sample.log_prob - q_pi).mean(1),
            }
        if self.settings.auto_alpha and alpha_last:
            self.step_alpha(sample.log_prob)
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

    def _update_actor(self, obs_MBS: Tensor, sample: PolicySample, batch: int) -> Tensor:
        action = sample.action
        critic = self.target if self.settings.actor_critics == "target" else self.critic
        q_MB, index, inputs, _ = extreme_value(critic, torch.cat((obs_MBS, action), dim=-1))
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
        value, _, _, values = extreme_value(self.target, torch.cat((next_obs, action), dim=-1))
        reward = rows_MBW[..., s + a]
        shown: Mapping[str, Tensor] = {}
        if self.hook is not None:
            terms = TargetTerms(rows_MBW[..., : s + a], reward, next_obs, action, values, value)
            terms, shown = self.hook(self, terms, noise_KMBA[1:], own_noise_MZ)
            reward, value = terms.reward_MB, terms.value_MB
        if self.settings.entropy_in_target:
            value = torch.addcmul(value, self.alpha_M1, sample.log_prob, value=-1.0)
        target = bellman_target(reward, done, value, self.settings.gamma)
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

    # ---- members --------------------------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> Self:
        """The same learner with some of its members only."""
        other = super().select(members)
        other.hook = None if self.hook is None else self.hook.select(members)
        return other
