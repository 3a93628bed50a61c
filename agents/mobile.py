"""MOBILE: Model-Bellman Inconsistency Penalized Offline RL (Sun, Zhang, Jia, Lin, Ye and Yu, ICML 2023).

Soft actor-critic on model rollouts whose penalty is not on what the models say of the next state but on what their
next states are worth: the elites' estimates of the Bellman backup at (s, a) disagree where it cannot be trusted.

    y       = max( 0,  r - beta U(s, a) + gamma (1 - d) [ min_j Qbar_j(s', a~') - alpha log pi(a~'|s') ] )
    U(s, a) = std_k ( 1/D sum_d min_j Qbar_j(s'_kd, a~'_kd) ),    s'_kd ~ N(mu_k(s, a), sigma_k(s, a)^2)

The unbiased standard deviation is over the K elites, the mean over D draws of each, and a~' is drawn from the policy.
U is 0 on the rows of the dataset. It is made anew for every update: the rollouts' rewards stay as they are. U always
takes the plain elites' draws, whatever filters the rollouts' transitions. As released (yihaosun1124/mobile and
OfflineRL-Kit `policy/model_based/mobile.py`): the floor at 0, which is wrong for tasks whose returns can be negative
(`target_floor`); alpha log pi left out of y on D4RL's sets (`entropy_in_target=false`); one critic loss, the mean over
both critics; critics, actor, temperature, targets in this order.

Departure: U is not computed for real rows, where the released code computes it and writes 0 over it.

Shapes: M member, N critic, B model row, K elite, D draw, P = K * D predictions of a row, S observation, A action,
X = S + A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.checks import check_not_negative, check_positive
from agents.dynamics import Ensemble
from agents.method import per_member
from agents.model_based import ModelBasedConfig, ModelBasedSAC
from agents.sac import SAC, TargetHook, TargetTerms
from agents.squashed import squashed_sample
from envs.errors import UserError

_CPU_BYTES = 1 << 20  # of one layer's activations at once, which then stay in a core's cache
_DEVICE_BYTES = 256 << 20  # the same elsewhere


@dataclass
class MOBILEConfig(ModelBasedConfig):
    """MOBILE's hyperparameters; per-dataset values in agents/mobile.yaml."""

    penalty_coef: float = per_member(1.0)  # beta
    penalty_draws: int = 10  # D, next states of every elite
    target_floor: float | None = 0.0
    entropy_in_target: bool = False
    update_order: str = "critics-first"
    critic_loss: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "penalty_coef")
        check_positive(self, "penalty_draws")
        if self.dynamics.elites_used < 2:
            name = "num_elites" if self.dynamics.num_elites < 2 else "use_members"
            raise UserError(
                f"method.dynamics.{name}={getattr(self.dynamics, name)} must be at least 2: MOBILE's penalty is the "
                "standard deviation over the elites"
            )
        if self.model_quality != 0:
            raise UserError(
                f"method.model_quality={self.model_quality} must be 0: MOBILE's penalty is of the learned ensemble "
                "that the rollouts step through"
            )

    def own_noises(self, observation_dim: int, action_dim: int) -> int:
        num_model = self.batch_size - int(self.real_ratio * self.batch_size)
        return self.dynamics.elites_used * self.penalty_draws * num_model * (observation_dim + action_dim)


class BellmanInconsistency(TargetHook):
    """The penalty beta * U on the rewards of a minibatch's model rows, which are its last.

    Args:
        ensemble: its elites make the next states.
        coefs: beta, one per member.
        num_draws: D.
        num_model: B, model rows of a minibatch.
        action_dim: A.
    """

    def __init__(
        self, ensemble: Ensemble, coefs: Sequence[float], num_draws: int, num_model: int, action_dim: int
    ) -> None:
        self.ensemble, self.coefs, self.num_draws, self.num_model = ensemble, tuple(coefs), num_draws, num_model
        self._num_next = len(ensemble.elites) * num_draws * num_model  # next states of a member
        self.action_dim = action_dim
        self.num_own_noises = self._num_next * (ensemble.observation_dim + action_dim)
        self._minus_coef_M1 = -torch.tensor(self.coefs, device=ensemble.device).unsqueeze(1)

    def __call__(
        self, sac: SAC, terms: TargetTerms, noise_KMBA: Tensor, own_noise_MZ: Tensor | None
    ) -> tuple[TargetTerms, Mapping[str, Tensor]]:
        if own_noise_MZ is None:  # a minibatch of real rows
            return terms, {}
        num_real = terms.reward_MB.shape[1] - self.num_model
        penalty_MB = self.inconsistency(sac, terms.state_action_MBX[:, num_real:], own_noise_MZ)
        reward_MB = terms.reward_MB.clone()
        reward_MB[:, num_real:].addcmul_(self._minus_coef_M1, penalty_MB)
        return terms._replace(reward_MB=reward_MB), {"penalty_mean": penalty_MB}

    def inconsistency(self, sac: SAC, state_action_MBX: Tensor, own_noise_MZ: Tensor) -> Tensor:
        """U, `(M, B)`; the noise `(M, P * B * (S + A))` is that of the next states, then of their actions."""
        m, b, x = state_action_MBX.shape
        s, k, d = self.ensemble.observation_dim, len(self.ensemble.elites), self.num_draws
        state_noise, action_noise = own_noise_MZ.split((self._num_next * s, self._num_next * self.action_dim), dim=1)
        mean, std = (
            part[..., :s].reshape(k, m, b, s).transpose(0, 1).unsqueeze(2)
            for part in self.ensemble.predict_elites(state_action_MBX.reshape(m * b, x))
        )
        mean = mean + state_action_MBX[..., :s].view(m, 1, 1, b, s)
        next_MPBS = torch.addcmul(mean, std, state_noise.view(m, k, d, b, s)).reshape(m, k * d, b, s)
        noise_MPBA = action_noise.view(m, k * d, b, self.action_dim)
        values = []
        size = self._predictions_at_once(sac, b)
        for next_obs, noise in zip(next_MPBS.split(size, 1), noise_MPBA.split(size, 1), strict=True):
            rows_MRS = next_obs.reshape(m, -1, s)
            action = squashed_sample(sac.actor.forward(rows_MRS)[0], noise.reshape(m, -1, self.action_dim))
            values.append(sac.target.values(torch.cat((rows_MRS, action), dim=-1)).amin(1))
        return torch.cat(values, dim=1).view(m, k, d, b).mean(2).std(1)

    def _predictions_at_once(self, sac: SAC, num_rows: int) -> int:
        """Of the P of every row, so many that a layer's activations are not more than is good for the device."""
        widest = max(*sac.actor.sizes, *sac.target.sizes)
        if self.ensemble.device.type == "cpu":
            return max(1, _CPU_BYTES // (4 * num_rows * widest))
        return max(1, _DEVICE_BYTES // (4 * sac.target.num_stacked * num_rows * widest))

    def select(self, members: Sequence[int]) -> BellmanInconsistency:
        coefs = [self.coefs[m] for m in members]
        return BellmanInconsistency(self.ensemble, coefs, self.num_draws, self.num_model, self.action_dim)


class MOBILE(ModelBasedSAC):
    """A pack of MOBILE runs."""

    Config = MOBILEConfig
    shared: MOBILEConfig
    configs: list[MOBILEConfig]  # type: ignore[assignment]

    def target_hook(self, artifacts: Mapping[str, dict[str, Any]]) -> TargetHook:
        assert self.ensemble is not None
        num_model = self.shared.batch_size - self.num_real
        coefs = [config.penalty_coef for config in self.configs]
        return BellmanInconsistency(self.ensemble, coefs, self.shared.penalty_draws, num_model, self.data.action_dim)


METHOD = MOBILE
