"""BC: behaviour cloning, of all episodes or of the best ones.

    J(pi) = mean (pi(s) - a)^2,    pi(s) = tanh(network(s))

The mean is over rows and action dimensions. With `top_fraction` below 1 only the episodes of the highest returns are
learned from, at least one: 0.1 is what tables call 10 % BC (as in Chen et al., NeurIPS 2021, arXiv 2106.01345). Returns
are the environment's, sum_t `return_discount`^t r_t; an episode that the data's end or a time limit cuts counts as it
stands. Observations are standardised over the rows that are learned from, (s - mean) / (std + 1e-3).

Shapes: M member, B batch, S observation, A action, N rows, E episodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.checks import check_positive, check_share
from agents.method import TrainingData, per_member
from agents.model_free import ModelFree, ModelFreeConfig, NetworkUpdater, split_rows
from agents.optim import Adam
from agents.policies import tanh_arrays
from envs.errors import UserError


@dataclass
class BCConfig(ModelFreeConfig):
    """BC's hyperparameters. Fields marked per member may differ inside a pack."""

    actor_lr: float = per_member(3e-4)
    top_fraction: float = 1.0  # of the episodes, those with the highest returns
    return_discount: float = 1.0  # of the returns that episodes are compared by
    normalize_observations: bool = True  # nothing is done to a dataset that is standardised already

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "actor_lr")
        check_share(self, "top_fraction", "return_discount", interval="(0, 1]")


def best_episodes(data: TrainingData, fraction: float, discount: float) -> TrainingData:
    """The rows of the share of episodes with the highest returns, in their order.

    Raises:
        UserError: the data do not say where episodes begin.
    """
    if data.episode_starts is None:
        raise UserError(f"method.top_fraction={fraction} needs a dataset that says where its episodes begin")
    starts, num_rows = data.episode_starts, len(data.rewards)
    rows = torch.arange(num_rows, device=starts.device)
    episode_N = torch.searchsorted(starts, rows, right=True) - 1
    rewards = (data.rewards.double() - data.reward_shift) / data.reward_scale
    weighted = rewards * discount ** (rows - starts[episode_N]).double()
    returns_E = torch.zeros(len(starts), dtype=torch.float64, device=starts.device).index_add_(0, episode_N, weighted)
    best = returns_E.argsort(descending=True, stable=True)[: max(1, int(fraction * len(starts)))].sort().values
    kept_E = torch.zeros(len(starts), dtype=torch.bool, device=starts.device).index_fill_(0, best, True)
    kept_N = kept_E[episode_N]
    lengths_E = torch.diff(starts, append=starts.new_tensor([num_rows]))[best]
    columns = ("observations", "actions", "rewards", "next_observations", "terminals")
    return dataclasses.replace(
        data, **{name: getattr(data, name)[kept_N] for name in columns}, return_range=None,
        states=None if data.states is None else data.states[kept_N.cpu()],
        episode_starts=lengths_E.cumsum(0) - lengths_E,
    )  # fmt: skip


class BCUpdater(NetworkUpdater[BCConfig]):
    """The policies of a pack and their update."""

    stacks = ("actor",)
    optimisers = ("actor_optim",)

    def build(self, seeds: Sequence[int], device: torch.device | str) -> None:
        sizes = (self.observation_dim, *self.shared.hidden, self.action_dim)
        self.actor = self.network("actor", seeds, sizes, device)
        self.actor_optim = Adam(self.actor, self.of_each("actor_lr"))

    @torch.inference_mode()
    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False
    ) -> dict[str, Tensor] | None:
        """One gradient step of every member (see `agents.chunk.Updater`)."""
        obs, action, *_ = split_rows(rows_MBW, self.observation_dim, self.action_dim)
        out, inputs = self.actor.forward(obs)
        pi = out.tanh_()
        error = pi - action
        grad_pi = error * (2.0 / (action.shape[1] * self.action_dim))
        grad_out = torch.addcmul(grad_pi, grad_pi * pi, pi, value=-1.0)  # through tanh: times 1 - pi^2
        self.actor.write_gradients(inputs, self.actor.hidden_gradients(inputs, grad_out), grad_out)
        self.actor_optim.step()
        return {"actor_loss": error.square_().mean((1, 2))} if with_metrics else None


class BC(ModelFree):
    """A pack of BC runs."""

    Config, Updater = BCConfig, BCUpdater
    has_critics = False
    configs: Sequence[BCConfig]
    shared: BCConfig
    updater: BCUpdater

    def prepare(self, data: TrainingData) -> TrainingData:
        if self.shared.top_fraction < 1:
            data = best_episodes(data, self.shared.top_fraction, self.shared.return_discount)
        return data.standardised() if self.shared.normalize_observations else data

    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        return tanh_arrays(self.updater.actor, member)


METHOD = BC
