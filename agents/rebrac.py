"""ReBRAC (Tarasov, Kurenkov, Nikulin and Kolesnikov, NeurIPS 2023, arXiv 2305.09836).

TD3+BC (`agents.td3_bc`) revisited: policy and critics are drawn to the dataset's actions, each with a weight of its
own, the critics' layers are normalised, networks are deeper and minibatches larger:

    a~'    = clip(pibar(s') + clip(sigma eps, -c, c), -1, 1)
    y      = r + gamma (1 - d) [ min_i Qbar_i(s', a~') - beta_2 |a~' - a'|^2 ]
    J(Q)   = sum_i mean (Q_i(s, a) - y)^2
    J(pi)  = mean [ beta_1 |pi(s) - a|^2 - lambda min_i Q_i(s, pi(s)) ],    lambda = 1 / mean |min_i Q_i(s, pi(s))|

a' is the dataset's action after a, and squared distances are sums over action dimensions. lambda passes no gradient.
Every update moves the critics; the first of every `policy_freq` also the policy and the targets. As in the released
code (tinkoff-ai/CORL, algorithms/offline/rebrac.py), pibar goes towards the policy as it was before its step, Qbar
towards the critics after theirs.

A row that ends an episode without a terminal has no action after it and is left out; the released code takes the one
that the time limit cuts.

Shapes: M member, G = 2M critics, B batch, S observation, A action, N rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from agents.checks import check_not_negative, check_positive
from agents.critics import bellman_target, min_value_and_gradient, regress_twins
from agents.method import TrainingData, per_member
from agents.model_free import (
    ModelFree,
    ModelFreeConfig,
    NetworkUpdater,
    member_values,
)
from agents.networks import StackedLayerNormMLP, StackedMLP
from agents.optim import Adam
from agents.policies import tanh_arrays
from agents.replay import transition_rows
from envs.errors import UserError


@dataclass
class ReBRACConfig(ModelFreeConfig):
    """ReBRAC's hyperparameters; per-dataset values in agents/rebrac.yaml. Fields marked per member may differ inside a
    pack."""

    actor_bc_coef: float = per_member(0.01)  # beta_1
    critic_bc_coef: float = per_member(0.01)  # beta_2
    policy_noise: float = per_member(0.2)  # sigma, of actions in [-1, 1]
    noise_clip: float = per_member(0.5)  # c
    policy_freq: int = 2  # updates per update of the policy and the targets
    actor_lr: float = per_member(1e-3)
    critic_lr: float = per_member(1e-3)
    critic_layer_norm: bool = True
    normalize_observations: bool = False  # nothing is done to a dataset that is standardised already
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    batch_size: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "policy_freq", "actor_lr", "critic_lr")
        check_not_negative(self, "actor_bc_coef", "critic_bc_coef", "policy_noise", "noise_clip")
        if self.synthetic.source != "none":
            raise UserError(
                f"method.synthetic.source={self.synthetic.source} cannot be with method=rebrac, whose critics need the "
                "action that follows a transition; take method.synthetic.source=none or another method"
            )


def rows_with_next_actions(data: TrainingData) -> Tensor:
    """Rows `(N, 2 S + 2 A + 2)`, columns `[s, a, r, d, s', a']`, of the transitions that an action follows, and of
    terminals, whose a' is 0.

    Raises:
        UserError: the data do not say where episodes begin.
    """
    if data.episode_starts is None:
        raise UserError("method rebrac needs a dataset that says where its episodes begin, for the actions that follow")
    last = torch.zeros(len(data.rewards), dtype=torch.bool, device=data.rewards.device)
    last[data.episode_starts - 1] = True  # of the episode before; of the last episode: row -1
    ends = last | (data.terminals > 0)
    next_action = data.actions.roll(-1, 0).masked_fill(ends.unsqueeze(1), 0.0)
    d = data
    rows = transition_rows(d.observations, d.actions, d.rewards, d.terminals, d.next_observations)
    return torch.cat((rows, next_action), dim=1)[~last | (data.terminals > 0)]


class ReBRACUpdater(NetworkUpdater[ReBRACConfig]):
    """Policies, critics and targets of a pack, and their update."""

    num_noises = 1
    stacks = ("actor", "critic", "target_actor", "target_critic")
    optimisers = ("actor_optim", "critic_optim")

    def build(self, seeds: Sequence[int], device: torch.device | str) -> None:
        cfg, s, a = self.shared, self.observation_dim, self.action_dim
        self.period = cfg.policy_freq
        self.gamma, self.tau = cfg.gamma, cfg.tau
        scheme = "edac-fan-in"
        self.actor = self.network("actor", seeds, (s, *cfg.hidden, a), device, scheme=scheme, last_bound=1e-3)
        self.critic = self.network(
            "critic", seeds, (s + a, *cfg.hidden, 1), device, each=2, scheme=scheme, last_bound=3e-3,
            kind=StackedLayerNormMLP if cfg.critic_layer_norm else StackedMLP,
        )  # fmt: skip
        self.target_actor, self.target_critic = self.actor.clone(), self.critic.clone()
        self.actor_optim = Adam(self.actor, self.of_each("actor_lr"))
        self.critic_optim = Adam(self.critic, self.of_each("critic_lr"))

    def bind(self) -> None:
        """Constants of the update that follow from the configs."""
        device = self.actor.flat.device
        self._actor_coef_M11 = member_values([c.actor_bc_coef for c in self.configs], device)
        self._critic_coef_M1 = member_values([c.critic_bc_coef for c in self.configs], device).squeeze(-1)
        self._sigma_M11 = member_values([c.policy_noise for c in self.configs], device)
        self._clip_M11 = member_values([c.noise_clip for c in self.configs], device)
        self._minus_clip_M11 = -self._clip_M11

    @torch.inference_mode()
    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False
    ) -> dict[str, Tensor] | None:
        """One gradient step of every member (see `agents.chunk.Updater`); the policies' and the targets' at the first
        turn. Rows are those of `rows_with_next_actions`."""
        s, a = self.observation_dim, self.action_dim
        obs, action, state_action = rows_MBW[..., :s], rows_MBW[..., s : s + a], rows_MBW[..., : s + a]
        target, penalty = self._target(rows_MBW, noise_KMBA[0])
        q_M2B = regress_twins(self.critic, state_action, target)
        self.critic_optim.step()
        metrics: dict[str, Tensor] | None = None
        if turn == 0 or with_metrics:
            out, pi_inputs = self.actor.forward(obs)
            pi = out.tanh_()
            q_MB, dq_da = min_value_and_gradient(self.critic, torch.cat((obs, pi), dim=-1), a)
            scale_M1 = q_MB.abs().mean(1, keepdim=True).reciprocal_()  # lambda
            if with_metrics:
                squares = (pi - action).square_()
                distance = self._actor_coef_M11 * squares.sum(-1, keepdim=True)
                metrics = {
                    "q_mean": q_M2B.mean((1, 2)),
                    "q_policy": q_MB.mean(1),
                    "target_q": target.mean(1),
                    "critic_loss": (q_M2B - target.unsqueeze(1)).square_().mean(2).sum(1),
                    "critic_penalty": (self._critic_coef_M1 * penalty).mean(1),
                    "bc_distance": squares.mean((1, 2)),
                    "actor_loss": (distance.squeeze(-1) - scale_M1 * q_MB).mean(1),
                }
            if turn == 0:
                grad_pi = self._actor_coef_M11 * 2.0 * (pi - action) - scale_M1.unsqueeze(-1) * dq_da
                grad_pi.mul_(1.0 / obs.shape[1])
                grad_out = torch.addcmul(grad_pi, grad_pi * pi, pi, value=-1.0)  # through tanh: times 1 - pi^2
                self.actor.write_gradients(pi_inputs, self.actor.hidden_gradients(pi_inputs, grad_out), grad_out)
                self.target_actor.flat.lerp_(self.actor.flat, self.tau)  # before the policy's step
                self.actor_optim.step()
                self.target_critic.flat.lerp_(self.critic.flat, self.tau)
        return metrics

    def _target(self, rows_MBW: Tensor, noise_MBA: Tensor) -> tuple[Tensor, Tensor]:
        """y and |a~' - a'|^2, `(M, B)`."""
        s, a = self.observation_dim, self.action_dim
        reward, done = rows_MBW[..., s + a], rows_MBW[..., s + a + 1]
        next_obs, data_action = rows_MBW[..., s + a + 2 : 2 * s + a + 2], rows_MBW[..., 2 * s + a + 2 :]
        smoothing = (noise_MBA * self._sigma_M11).clamp_(self._minus_clip_M11, self._clip_M11)
        next_action = self.target_actor.forward(next_obs)[0].tanh_().add_(smoothing).clamp_(-1.0, 1.0)
        value = self.target_critic.values(torch.cat((next_obs, next_action), dim=-1)).amin(1)
        penalty = (next_action - data_action).square_().sum(-1)
        value = torch.addcmul(value, self._critic_coef_M1, penalty, value=-1.0)
        return bellman_target(reward, done, value, self.gamma), penalty


class ReBRAC(ModelFree):
    """A pack of ReBRAC runs."""

    Config, Updater = ReBRACConfig, ReBRACUpdater
    configs: Sequence[ReBRACConfig]
    shared: ReBRACConfig
    updater: ReBRACUpdater

    def real_rows(self) -> Tensor:
        return rows_with_next_actions(self.data)

    def prepare(self, data: TrainingData) -> TrainingData:
        return data.standardised() if self.shared.normalize_observations else data

    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        return tanh_arrays(self.updater.actor, member)


METHOD = ReBRAC
