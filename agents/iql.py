"""IQL: implicit Q-learning (Kostrikov, Nair and Levine, ICLR 2022, arXiv 2110.06169).

No action outside the dataset is ever valued. V is an upper expectile of Q over the dataset's actions, and the policy is
drawn to those actions in proportion to the exponential of their advantage:

    J(V)   = mean |kappa - 1(u < 0)| u^2,    u = min_i Qbar_i(s, a) - V(s)                           (equation 5)
    J(Q)   = sum_i mean (Q_i(s, a) - r - gamma (1 - d) V(s'))^2                                      (equation 6)
    J(pi)  = -mean min(exp(beta (min_i Qbar_i(s, a) - V(s))), 100) log pi(a|s)                       (equation 7)

with kappa the `expectile`. pi is a Gaussian of mean tanh(network) and a log standard deviation that does not depend on
the state, clipped to [-5, 2]; samples are clipped to the bounds, not squashed.

The order is that of the authors' code (ikostrikov/implicit_q_learning, `learner._update_jit`): V; policy, with the new
V; critics, with the new V(s'); targets Qbar by Polyak. Also from there: orthogonal initialisation and a cosine of the
policy's learning rate to 0 over all updates. Dropout in the policy, which it has for Kitchen and Adroit only, is left
out.

The code of policy-guided diffusion (Jackson et al., RLC 2024, arXiv 2404.06356) takes V(s) and V(s') from before V's
step (`update_order: simultaneous`), averages the critics' errors (`critic_loss: mean`), which Adam notices by its
epsilon only, and lets the log standard deviation fall to -20 (`log_std_min`). It averages the targets at the start of
the next update; the first time it copies them, which they are already.

For the locomotion sets the authors' code multiplies rewards by 1000 / (best - worst return of the dataset);
`reward_scale: return-range` does so here, as `dataset=NAME,reward_scale=return-range` does for any method (both at once
is the same as one). CORL's variant also standardises observations; `normalize_observations` does that as in
`agents.td3_bc`.

Shapes: M member, G = 2M critics, B batch, S observation, A action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from agents.checks import check_choice, check_not_negative, check_positive, check_share
from agents.critics import bellman_target, regress_twins
from agents.method import TrainingData, per_member
from agents.model_free import (
    ModelFree,
    ModelFreeConfig,
    NetworkUpdater,
    member_values,
    scaled,
    split_rows,
)
from agents.networks import StackedVector
from agents.optim import Adam
from agents.policies import tanh_arrays
from agents.sac import CRITIC_LOSSES
from envs.errors import UserError

LOG_STD_MAX = 2.0
MAX_WEIGHT = 100.0


@dataclass
class IQLConfig(ModelFreeConfig):
    """IQL's hyperparameters; defaults as released for locomotion. Fields marked per member may differ inside a pack."""

    expectile: float = per_member(0.7)  # kappa; 0.5 is the mean, 1 the maximum
    beta: float = per_member(3.0)  # inverse temperature; 0 is behaviour cloning
    actor_lr: float = per_member(3e-4)
    critic_lr: float = per_member(3e-4)
    value_lr: float = per_member(3e-4)
    actor_lr_schedule: str = "cosine"  # constant | cosine (to 0 over all updates)
    deterministic: bool = False  # True: squared distance to the actions instead of the Gaussian's log density
    log_std_min: float = -5.0
    # sequential: V, then policy and critics with the new V | simultaneous: all three with V from before its step
    update_order: str = "sequential"
    critic_loss: str = "sum"  # sum | mean: of the critics' squared errors
    adam_eps: float = 1e-8
    initialisation: str = "orthogonal"  # orthogonal | torch | lecun
    normalize_observations: bool = False  # nothing is done to a dataset that is standardised already
    reward_scale: str = "none"  # none | return-range: 1000 / (best - worst return)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "actor_lr", "critic_lr", "value_lr", "adam_eps")
        check_not_negative(self, "beta")
        check_share(self, "expectile")
        check_choice(self, "actor_lr_schedule", ("constant", "cosine"))
        check_choice(self, "update_order", ("sequential", "simultaneous"))
        check_choice(self, "critic_loss", CRITIC_LOSSES)
        check_choice(self, "initialisation", ("orthogonal", "torch", "lecun"))
        if not -math.inf < self.log_std_min < LOG_STD_MAX:
            raise UserError(f"method.log_std_min={self.log_std_min} must be finite and less than {LOG_STD_MAX}")
        check_choice(self, "reward_scale", ("none", "return-range"))


class IQLUpdater(NetworkUpdater[IQLConfig]):
    """Policies, values, critics and targets of a pack, and their update."""

    stacks = ("actor", "log_std", "value", "critic", "target_critic")
    optimisers = ("actor_optim", "log_std_optim", "value_optim", "critic_optim")

    def build(self, seeds: Sequence[int], device: torch.device | str) -> None:
        cfg, s, a = self.shared, self.observation_dim, self.action_dim
        self.gamma, self.tau = cfg.gamma, cfg.tau
        scheme = cfg.initialisation
        self.actor = self.network("actor", seeds, (s, *cfg.hidden, a), device, scheme=scheme)
        self.value = self.network("value", seeds, (s, *cfg.hidden, 1), device, scheme=scheme)
        self.critic = self.network("critic", seeds, (s + a, *cfg.hidden, 1), device, each=2, scheme=scheme)
        self.log_std = StackedVector(self.num_members, a, 0.0, device)
        self.target_critic = self.critic.clone()
        self.actor_optim = Adam(self.actor, self.of_each("actor_lr"), cfg.adam_eps)
        self.log_std_optim = Adam(self.log_std, self.of_each("actor_lr"), cfg.adam_eps)
        self.value_optim = Adam(self.value, self.of_each("value_lr"), cfg.adam_eps)
        self.critic_optim = Adam(self.critic, self.of_each("critic_lr"), cfg.adam_eps)
        self._done_updates = torch.zeros((), device=device)

    def bind(self) -> None:
        """Constants of the update that follow from the configs, and views."""
        device, shared = self.actor.flat.device, self.shared
        self._beta_M1 = member_values([c.beta for c in self.configs], device).squeeze(-1)
        self._kappa_M1 = member_values([c.expectile for c in self.configs], device).squeeze(-1)
        self._one_minus_kappa_M1 = 1.0 - self._kappa_M1
        self._log_std_M1A = self.log_std.flat.view(-1, 1, self.action_dim)
        self._log_std_grad_MA = self.log_std.grad.view(-1, self.action_dim)
        self._loss_divisor = 2 if shared.critic_loss == "mean" else 1
        self._cosine = shared.actor_lr_schedule == "cosine"
        if self._cosine:
            self._lr_scale = torch.ones((), device=device)
            self.actor_optim.follow(self._lr_scale)
            self.log_std_optim.follow(self._lr_scale)

    @torch.inference_mode()
    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False
    ) -> dict[str, Tensor] | None:
        """One gradient step of every member (see `agents.chunk.Updater`)."""
        obs, action, state_action, reward, done, next_obs = split_rows(rows_MBW, self.observation_dim, self.action_dim)
        batch = rows_MBW.shape[1]
        q_MB = self.target_critic.values(state_action).amin(1)
        both = torch.cat((obs, next_obs), dim=1)
        if self.shared.update_order == "sequential":
            value_loss = self._update_value(obs, q_MB)
            values = self.value.forward(both)[0].squeeze(-1)
        else:
            values = self.value.forward(both)[0].squeeze(-1)
            value_loss = self._update_value(obs, q_MB)
        advantage = q_MB - values[:, :batch]
        weight = (advantage * self._beta_M1).exp_().clamp_(max=MAX_WEIGHT)
        mean = self._update_actor(obs, action, weight)
        target = bellman_target(reward, done, values[:, batch:], self.gamma)
        q_M2B = regress_twins(self.critic, state_action, target)
        if self._loss_divisor != 1:
            self.critic.grad.div_(self._loss_divisor)
        self.critic_optim.step()
        self.target_critic.flat.lerp_(self.critic.flat, self.tau)
        if not with_metrics:
            return None
        return {
            "q_mean": q_M2B.mean((1, 2)),
            "v_mean": values[:, :batch].mean(1),
            "target_q": target.mean(1),
            "advantage": advantage.mean(1),
            "weight": weight.mean(1),
            "weight_at_bound": (weight == MAX_WEIGHT).float().mean(1),
            "value_loss": value_loss.mean(1),
            "critic_loss": (q_M2B - target.unsqueeze(1)).square_().mean(2).sum(1) / self._loss_divisor,
            "bc_distance": (mean - action).square_().mean((1, 2)),
            "log_std": self._log_std_M1A.mean((1, 2)),
        }

    def _update_value(self, obs: Tensor, q_MB: Tensor) -> Tensor:
        """Expectile regression of V(s) toward q; the rows' losses `(M, B)` before the step."""
        v_MB1, inputs = self.value.forward(obs)
        u = q_MB - v_MB1.squeeze(-1)
        weighted = torch.where(u > 0, self._kappa_M1, self._one_minus_kappa_M1).mul_(u)
        c_MB1 = (weighted * (-2.0 / u.shape[1])).unsqueeze(-1)
        self.value.write_gradients(inputs, self.value.hidden_gradients(inputs, c_MB1), c_MB1)
        self.value_optim.step()
        return weighted.mul_(u)

    def _update_actor(self, obs: Tensor, action: Tensor, weight_MB: Tensor) -> Tensor:
        """Weighted regression to the dataset's actions; the policies' means `(M, B, A)` before the step."""
        out, inputs = self.actor.forward(obs)
        mean = out.tanh_()
        distance, weight = mean - action, (weight_MB * (1.0 / mean.shape[1])).unsqueeze(-1)
        if self._cosine:
            total = self.shared.num_updates
            self._lr_scale.copy_(self._done_updates).mul_(math.pi / total).cos_().add_(1.0).mul_(0.5)
            self._done_updates.add_(1.0)
        if self.shared.deterministic:
            grad_mean = distance * (2.0 * weight)
        else:
            clipped = self._log_std_M1A.clamp(self.shared.log_std_min, LOG_STD_MAX)
            inverse_var = (clipped * -2.0).exp_()
            grad_mean = distance * weight * inverse_var
            # d/d log_std of -w log N(a) is w (1 - z^2); beyond its bounds the log standard deviation stays
            total_weight = weight.sum(1)
            torch.sub(total_weight, (grad_mean * distance).sum(1), out=self._log_std_grad_MA)
            self._log_std_grad_MA.mul_((clipped == self._log_std_M1A).squeeze(1))
            self.log_std_optim.step()
        grad_out = torch.addcmul(grad_mean, grad_mean * mean, mean, value=-1.0)  # through tanh: times 1 - mean^2
        self.actor.write_gradients(inputs, self.actor.hidden_gradients(inputs, grad_out), grad_out)
        self.actor_optim.step()
        return mean

    # ---- members and checkpoints ----------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> Self:
        other = super().select(members)
        other._done_updates = self._done_updates.clone()
        return other

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "done_updates": self._done_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._done_updates.copy_(state["done_updates"])


class IQL(ModelFree):
    """A pack of IQL runs."""

    Config, Updater = IQLConfig, IQLUpdater
    configs: Sequence[IQLConfig]
    shared: IQLConfig
    updater: IQLUpdater

    def prepare(self, data: TrainingData) -> TrainingData:
        return scaled(data, self.shared.normalize_observations, self.shared.reward_scale)

    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        one = self.updater
        if self.shared.deterministic:
            return tanh_arrays(one.actor, member)
        log_std_A = one.log_std.flat.view(-1, one.action_dim)[member].clamp(self.shared.log_std_min, LOG_STD_MAX)
        return tanh_arrays(one.actor, member, log_std_A)


METHOD = IQL
