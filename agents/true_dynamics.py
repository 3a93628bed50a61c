"""The environment's simulator as the dynamics of rollouts: no model error at all.

Shapes: M member, B start, S observation, A action, Y = S + A, X simulator state, N = M * B.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.method import TrainingData
from agents.rollout import Penalty, Step
from envs.true_dynamics import TrueDynamics


class SimulatedDynamics:
    """A `Dynamics` (see `agents.rollout`) that steps the environment itself.

    Each rollout carries the simulator's exact state: only the first may have to be read from an observation, which
    need not show all of it. A step has no randomness and its penalty is 0: there is nothing to be unsure of.

    The simulator is on the host. States are carried there; of a learner on a GPU, every step copies the actions there
    and the next observations and rewards back, and waits for both.

    A row whose state or action is not finite has a reward that is not a number, which ends its rollout.

    Args:
        data: what the rollouts belong to; it says how its observations, actions and rewards differ from the
            environment's.

    Raises:
        UserError: there are no true dynamics for the environment.
    """

    num_noises = 0
    choices = (0,)

    def __init__(self, data: TrainingData) -> None:
        # results do not depend on the number of threads
        self._true = TrueDynamics(data.env_id, torch.get_num_threads())
        self.observation_dim = data.observation_dim
        ones = torch.ones(data.action_dim)
        low, high = (
            (one if bound is None else bound).double().numpy()
            for one, bound in ((-ones, data.action_low), (ones, data.action_high))
        )
        self._action_center, self._action_scale = (high + low) / 2, (high - low) / 2
        # cast to float64: as exact as the columns, which were standardised with these numbers
        mean, std = data.observation_mean, data.observation_std
        self._mean = np.zeros(self.observation_dim) if mean is None else mean.cpu().double().numpy()
        self._std = np.ones(self.observation_dim) if std is None else std.cpu().double().numpy()
        self._reward_scale, self._reward_shift = data.reward_scale, data.reward_shift

    @property
    def floats_per_row(self) -> int:
        return 2 * (self.observation_dim + len(self._action_scale))

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> Tensor:
        """The given states, or those that the observations show, `(M, B, X)` float64 on the CPU."""
        if states_MBX is not None:
            return states_MBX.to("cpu", torch.float64)
        obs_NS = _on_host(obs_MBS) * self._std + self._mean
        return torch.from_numpy(self._true.states_of(obs_NS)).view(*obs_MBS.shape[:-1], self._true.state_dim)

    def step(
        self, carried_MBX: Tensor | None, state_action_MBY: Tensor, noise_MBZ: Tensor, choice_MB: Tensor,
        penalty: Penalty | None, next_obs_MBS: Tensor,
    ) -> Step:  # fmt: skip
        assert carried_MBX is not None
        states_NX = _on_host(carried_MBX)
        action_NA = _on_host(state_action_MBY[..., self.observation_dim :])
        finite_N = np.isfinite(states_NX).all(axis=1) & np.isfinite(action_NA).all(axis=1)
        # else MuJoCo goes on from its initial state, as if nothing had happened
        states_NX, action_NA = (np.where(np.expand_dims(finite_N, 1), x, 0.0) for x in (states_NX, action_NA))
        after = self._true.step(states_NX, self._action_center + self._action_scale * action_NA)
        reward_N = self._reward_scale * after.rewards + self._reward_shift
        reward_N[~finite_N] = np.nan
        obs_NS = (after.observations - self._mean) / self._std
        next_obs_MBS.copy_(torch.from_numpy(obs_NS).view(next_obs_MBS.shape))
        reward_MB = torch.from_numpy(reward_N).view(choice_MB.shape).to(next_obs_MBS)
        none_MB = None if penalty is None else torch.zeros_like(reward_MB)
        return Step(reward_MB, none_MB, torch.from_numpy(after.states).view(carried_MBX.shape))


def _on_host(x: Tensor) -> NDArray[np.float64]:
    """Rows `(N, ...)` of a tensor `(M, B, ...)`, float64."""
    rows: NDArray[np.float64] = x.to("cpu", torch.float64).flatten(0, 1).numpy()
    return rows
