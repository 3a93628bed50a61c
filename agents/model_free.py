"""What the model-free methods share: a pack that learns from the rows of its dataset alone.

An epoch is `updates_per_epoch` gradient updates. There are no stages and no rollouts.

Shapes: M member, N critic, G = M*N, K noises, B batch, S observation, A action, W columns of a row, X any width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.chunk import ChunkRunner, Updater
from agents.config import ScheduleConfig
from agents.graphs import default_capture
from agents.method import RolloutJob, RolloutResult, Stage, TrainingData
from agents.networks import StackedMLP
from agents.policies import with_standardisation
from agents.replay import Replay, transition_rows
from agents.rollout import Dynamics


class PackUpdater(Updater, Protocol):
    """An updater whose members can be dropped and whose state can be kept."""

    def select(self, members: Sequence[int]) -> PackUpdater: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load in place."""


class ModelFree(ABC):
    """A pack of M runs; see `agents.method.Method`. Methods give it their updater and policy.

    Args:
        configs: one per member; what is not per member is equal in all of them.
        artifacts: none.
    """

    def __init__(
        self,
        configs: Sequence[ScheduleConfig],
        seeds: Sequence[int],
        data: TrainingData,
        artifacts: Mapping[str, dict[str, Any]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.configs, self.seeds = configs, list(seeds)
        self.shared = configs[0]
        self.device = torch.device(device)
        self.data = self.prepare(data)
        # the policy file has to standardise if the method does so and not the dataset
        self._standardises = data.observation_mean is None and self.data.observation_mean is not None
        d = self.data
        rows = transition_rows(d.observations, d.actions, d.rewards, d.terminals, d.next_observations)
        self.replay = Replay(rows, len(self.seeds), 0, device)
        self.updater = self.make_updater()
        self._runner = self._make_runner()

    def prepare(self, data: TrainingData) -> TrainingData:
        """The data that the runs learn from."""
        return data

    @abstractmethod
    def make_updater(self) -> PackUpdater: ...

    @abstractmethod
    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        """A member's policy for observations as `self.data` has them (see `agents.policies`)."""

    @staticmethod
    def stages(config: Any) -> dict[str, Stage]:
        return {}

    @staticmethod
    def check_environment(config: Any, env_id: str) -> None:
        return None

    @property
    def num_members(self) -> int:
        return len(self.seeds)

    @property
    def dynamics(self) -> Dynamics:
        raise ValueError("a model-free method has no dynamics")

    def rollout_jobs(self, epoch: int) -> list[RolloutJob]:
        return []

    def add_rollouts(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        return [{} for _ in self.seeds]

    # ---- updates ----------------------------------------------------------------------------------------------

    def _make_runner(self) -> ChunkRunner:
        return ChunkRunner(self.updater, self.replay, self.shared.precision, default_capture(self.device))

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        cfg = self.shared
        return self._runner.run_epoch(self.seeds, epoch, cfg.updates_per_epoch, cfg.batch_size, 0, self.data.action_dim)

    # ---- members and checkpoints --------------------------------------------------------------------------------

    def diagnostics(self, epoch: int) -> list[dict[str, float]]:
        return [{} for _ in range(self.num_members)]

    def policy(self, member: int) -> dict[str, np.ndarray]:
        arrays = self.actor_arrays(member)
        mean, std = self.data.observation_mean, self.data.observation_std
        if self._standardises and mean is not None and std is not None:
            arrays = with_standardisation(arrays, mean.numpy(), std.numpy())
        return arrays

    def select(self, members: Sequence[int]) -> ModelFree:
        other = copy.copy(self)
        other.configs, other.seeds = [self.configs[m] for m in members], [self.seeds[m] for m in members]
        other.updater, other.replay = self.updater.select(members), self.replay.select(members)
        other._runner = other._make_runner()
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"updater": self.updater.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updater.load_state_dict(state["updater"])


# ---- what updaters are made of --------------------------------------------------------------------------------------


def split_rows(rows_MBW: Tensor, observation_dim: int, action_dim: int) -> tuple[Tensor, ...]:
    """Views s `(M, B, S)`, a `(M, B, A)`, [s, a], r `(M, B)`, d `(M, B)` and s' of a minibatch."""
    s, a = observation_dim, action_dim
    obs, action, state_action = rows_MBW[..., :s], rows_MBW[..., s : s + a], rows_MBW[..., : s + a]
    return obs, action, state_action, rows_MBW[..., s + a], rows_MBW[..., s + a + 1], rows_MBW[..., s + a + 2 :]


def bellman_target(reward_MB: Tensor, done_MB: Tensor, value_MB: Tensor, gamma: float) -> Tensor:
    """r + gamma (1 - d) V, `(M, B)`."""
    return torch.add(reward_MB, torch.addcmul(value_MB, done_MB, value_MB, value=-1.0), alpha=gamma)


def regress_twins(critic: StackedMLP, x_MBX: Tensor, target_MB: Tensor) -> Tensor:
    """Write the gradient of sum_i mean_b (Q_i - y)^2; the critics' values `(M, 2, B)` before any step."""
    m, batch = target_MB.shape
    x_GBX = critic.spread(x_MBX)
    y_GB1 = target_MB.unsqueeze(1).expand(m, 2, batch).reshape(2 * m, batch, 1)
    values = []
    for place, part in critic.parts(batch):
        q, inputs = part.forward(x_GBX[place])
        values.append(q)
        c = (q - y_GB1[place]).mul_(2.0 / batch)
        part.write_gradients(inputs, part.hidden_gradients(inputs, c), c)
    q_GB1 = torch.cat(values) if len(values) > 1 else values[0]
    return q_GB1.view(m, 2, batch)


def member_values(values: Sequence[float], device: torch.device | str) -> Tensor:
    """One hyperparameter of every member, `(M, 1, 1)`."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def load_networks(updater: Any, state: Mapping[str, Any], stacks: Sequence[str], optims: Sequence[str]) -> None:
    """Copy a `state_dict` into an updater's stacks and optimisers, in place."""
    for name in stacks:
        getattr(updater, name).flat.copy_(state[name])
    for name in optims:
        getattr(updater, name).load_state_dict(state[name])
