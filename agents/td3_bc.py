"""TD3+BC (Fujimoto and Gu, NeurIPS 2021, arXiv 2106.06860).

Twin delayed DDPG (Fujimoto et al. 2018) whose policy is also drawn to the dataset's actions:

    a~'    = clip(pibar(s') + clip(sigma eps, -c, c), -1, 1)
    y      = r + gamma (1 - d) min_i Qbar_i(s', a~')
    J(Q)   = sum_i mean (Q_i(s, a) - y)^2
    J(pi)  = -lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2,    lambda = alpha / mean |Q_1(s, pi(s))|

pi(s) is a tanh of a network's output, the mean of the squared distance is over rows and action dimensions, and lambda
passes no gradient. Every update moves the critics; every `policy_freq`-th also the policy and then,
by Polyak, the targets Qbar and pibar. The order is that of the released code, sfujim/TD3_BC.

The code of policy-guided diffusion (Jackson et al., RLC 2024, arXiv 2404.06356) does otherwise: every update moves the
policy first, with the critics as they are, then the critics twice on the same minibatch, each time toward targets with
noise of their own, then the targets. `update_order: actor-first`, `policy_freq: 1` and `critic_updates: 2` do so. That
code averages the targets at the start of the next update; the first time it copies them, which they are already.

The paper standardises observations, (s - mean) / (std + 1e-3) over the dataset's states. `normalize_observations` does
so here, and the policy that leaves a run takes the environment's observations. A dataset that is standardised already
(`dataset=NAME,normalize=observations`) is taken as it is.

Shapes: M member, G = 2M critics, B batch, S observation, A action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.checks import check_choice, check_not_negative, check_positive
from agents.critics import bellman_target, regress_twins
from agents.method import TrainingData, per_member
from agents.model_free import (
    ModelFree,
    ModelFreeConfig,
    NetworkUpdater,
    member_values,
    split_rows,
)
from agents.optim import Adam
from agents.policies import tanh_arrays
from agents.sac import UPDATE_ORDERS


@dataclass
class TD3BCConfig(ModelFreeConfig):
    """TD3+BC's hyperparameters, as released. Fields marked per member may differ inside a pack."""

    alpha: float = per_member(2.5)  # weight of the value against the distance to the data
    policy_noise: float = per_member(0.2)  # sigma, of actions in [-1, 1]
    noise_clip: float = per_member(0.5)  # c
    policy_freq: int = 2  # updates per update of the policy and the targets
    critic_updates: int = 1  # steps of the critics per update, on one minibatch, each with noise of its own in y
    # critics-first: critics, policy, targets (TD3) | actor-first: policy, critics, targets (policy-guided diffusion)
    update_order: str = "critics-first"
    lambda_eps: float = 0.0  # added to mean |Q_1| in lambda
    adam_eps: float = 1e-8
    initialisation: str = "torch"  # torch | lecun
    actor_lr: float = per_member(3e-4)
    critic_lr: float = per_member(3e-4)
    normalize_observations: bool = True  # nothing is done to a dataset that is standardised already

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "policy_freq", "critic_updates", "actor_lr", "critic_lr", "adam_eps")
        check_not_negative(self, "alpha", "policy_noise", "noise_clip", "lambda_eps")
        check_choice(self, "update_order", UPDATE_ORDERS)
        check_choice(self, "initialisation", ("torch", "lecun"))


class TD3BCUpdater(NetworkUpdater[TD3BCConfig]):
    """Policies, critics and targets of a pack, and their update."""

    stacks = ("actor", "critic", "target_actor", "target_critic")
    optimisers = ("actor_optim", "critic_optim")

    def build(self, seeds: Sequence[int], device: torch.device | str) -> None:
        cfg, s, a = self.shared, self.observation_dim, self.action_dim
        self.period, self.num_noises = cfg.policy_freq, cfg.critic_updates
        self.gamma, self.tau = cfg.gamma, cfg.tau
        scheme = cfg.initialisation
        self.actor = self.network("actor", seeds, (s, *cfg.hidden, a), device, scheme=scheme)
        self.critic = self.network("critic", seeds, (s + a, *cfg.hidden, 1), device, each=2, scheme=scheme)
        self.target_actor, self.target_critic = self.actor.clone(), self.critic.clone()
        self.actor_optim = Adam(self.actor, self.of_each("actor_lr"), cfg.adam_eps)
        self.critic_optim = Adam(self.critic, self.of_each("critic_lr"), cfg.adam_eps)

    def bind(self) -> None:
        """Constants of the update that follow from the configs, and views."""
        device = self.actor.flat.device
        self._alpha_M11 = member_values([c.alpha for c in self.configs], device)
        self._sigma_M11 = member_values([c.policy_noise for c in self.configs], device)
        self._clip_M11 = member_values([c.noise_clip for c in self.configs], device)
        self._minus_clip_M11 = -self._clip_M11
        self._first_critic = self.critic.of_each_member(0)

    @torch.inference_mode()
    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False
    ) -> dict[str, Tensor] | None:
        """One update of every member (see `agents.chunk.Updater`); the policies' and the targets' at the last turn."""
        moves, shared = turn == self.period - 1, self.shared
        metrics: dict[str, Tensor] = {}
        if shared.update_order == "actor-first":
            metrics = self._learn_policy(rows_MBW, moves, with_metrics)
        for noise_MBA in noise_KMBA:
            q_M2B, target = self._learn_values(rows_MBW, noise_MBA)
        if shared.update_order == "critics-first":
            metrics = self._learn_policy(rows_MBW, moves, with_metrics)
        if moves:
            self.target_critic.flat.lerp_(self.critic.flat, self.tau)
            self.target_actor.flat.lerp_(self.actor.flat, self.tau)
        if not with_metrics:
            return None
        return metrics | {
            "q_mean": q_M2B.mean((1, 2)),
            "target_q": target.mean(1),
            "critic_loss": (q_M2B - target.unsqueeze(1)).square_().mean(2).sum(1),
        }

    def _learn_values(self, rows_MBW: Tensor, noise_MBA: Tensor) -> tuple[Tensor, Tensor]:
        """Step of the critics; their values before it, `(M, 2, B)`, and their targets `(M, B)`."""
        _, _, state_action, reward, done, next_obs = split_rows(rows_MBW, self.observation_dim, self.action_dim)
        target = self._target(reward, done, next_obs, noise_MBA)
        q_M2B = regress_twins(self.critic, state_action, target)
        self.critic_optim.step()
        return q_M2B, target

    def _learn_policy(self, rows_MBW: Tensor, moves: bool, with_metrics: bool) -> dict[str, Tensor]:
        """Step of the policies if it is their turn; metrics."""
        if not (moves or with_metrics):
            return {}
        obs, action, *_ = split_rows(rows_MBW, self.observation_dim, self.action_dim)
        pi, pi_inputs, q_pi, critic_inputs = self._policy_value(obs)
        size_M11 = q_pi.abs().mean(1, keepdim=True)
        if self.shared.lambda_eps:
            size_M11.add_(self.shared.lambda_eps)
        scale_M11 = self._alpha_M11 / size_M11  # lambda
        metrics: dict[str, Tensor] = {}
        if with_metrics:
            value, distance = q_pi.mean((1, 2)), (pi - action).square_().mean((1, 2))
            loss = distance - scale_M11.view(-1) * value
            metrics = {"q_policy": value, "bc_distance": distance, "actor_loss": loss}
        if moves:
            self._write_actor_gradient(pi, pi_inputs, critic_inputs, action, scale_M11)
            self.actor_optim.step()
        return metrics

    def _target(self, reward: Tensor, done: Tensor, next_obs: Tensor, noise_MBA: Tensor) -> Tensor:
        """y, `(M, B)`."""
        smoothing = (noise_MBA * self._sigma_M11).clamp_(self._minus_clip_M11, self._clip_M11)
        next_action = self.target_actor.forward(next_obs)[0].tanh_().add_(smoothing).clamp_(-1.0, 1.0)
        value = self.target_critic.values(torch.cat((next_obs, next_action), dim=-1)).amin(1)
        return bellman_target(reward, done, value, self.gamma)

    def _policy_value(self, obs: Tensor) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """pi(s) `(M, B, A)` and Q_1(s, pi(s)) `(M, B, 1)`, each with the inputs of its network's layers."""
        out, pi_inputs = self.actor.forward(obs)
        pi = out.tanh_()
        q_pi, critic_inputs = self._first_critic.forward(torch.cat((obs, pi), dim=-1))
        return pi, pi_inputs, q_pi, critic_inputs

    def _write_actor_gradient(
        self, pi: Tensor, pi_inputs: list[Tensor], critic_inputs: list[Tensor], action: Tensor, scale_M11: Tensor
    ) -> None:
        s, a = self.observation_dim, self.action_dim
        m, batch, _ = pi.shape
        of_value = (scale_M11 * (-1.0 / batch)).expand(m, batch, 1)
        first_delta = self._first_critic.hidden_gradients(critic_inputs, of_value)[0]
        grad_pi = self._first_critic.input_gradient(first_delta, s, s + a)
        grad_pi.add_(pi - action, alpha=2.0 / (batch * a))
        grad_out = torch.addcmul(grad_pi, grad_pi * pi, pi, value=-1.0)  # through tanh: times 1 - pi^2
        self.actor.write_gradients(pi_inputs, self.actor.hidden_gradients(pi_inputs, grad_out), grad_out)


class TD3BC(ModelFree):
    """A pack of TD3+BC runs."""

    Config, Updater = TD3BCConfig, TD3BCUpdater
    configs: Sequence[TD3BCConfig]
    shared: TD3BCConfig
    updater: TD3BCUpdater

    def prepare(self, data: TrainingData) -> TrainingData:
        return data.standardised() if self.shared.normalize_observations else data

    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        return tanh_arrays(self.updater.actor, member)


METHOD = TD3BC
