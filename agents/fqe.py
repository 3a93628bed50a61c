"""Fitted Q evaluation (Le et al. 2019, arXiv 1903.08738): what a policy is worth, from logged transitions only.

For every policy pi of a pack a network Q learns, from scratch, the fixed point of

    Q(s, a) = r + gamma (1 - d) Q(s', pi(s')),

over the dataset's rows; the policy's value is the mean of Q(s0, pi(s0)) over the first states s0 of its episodes, as
Paine et al. (2020, arXiv 2007.09055) rank policies. A terminal has no successor; at a time limit the stored successor
goes on. pi acts without noise, as it is evaluated.

With gamma = 0.99 a value spreads over hundreds of steps, but a target network forgets where it began only at the rate
tau (1 - gamma) per update. So Q is written as `offset` + `unit` f(s, a), with a network f whose outputs are of order 1:

    offset = mean(r) / (1 - gamma (1 - mean(d)))        what rewards add up to, whatever the state and action
    unit   = std(r) / sqrt(1 - gamma^2)                 how far sums of independent rewards spread

and f's targets are kept within what rewards of the data can add up to, which no value leaves.

Shapes: M member, B batch, U update, N rows of the data, S observation, A action, I first states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.actors import Actor
from agents.method import TrainingData
from agents.networks import StackedMLP, initialise
from agents.optim import Adam
from agents.randomness import generator

_CHUNK = 500  # updates whose rows are drawn at once
STARTS = 2_000  # first states at most, evenly spread over the dataset's episodes


@dataclass(frozen=True)
class FQESettings:
    """How Q is fitted."""

    gamma: float
    num_updates: int = 5_000
    batch_size: int = 256
    hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 1e-3
    tau: float = 0.05  # polyak


def mean_action(actor: Actor, obs_MBS: Tensor) -> Tensor:
    """What the policies do without noise, `(M, B, A)` in [-1, 1]."""
    m, batch, _ = obs_MBS.shape
    return actor.sample(obs_MBS, obs_MBS.new_zeros((m, batch, actor.action_dim)))


def start_rows(data: TrainingData, most: int) -> Tensor:
    """Numbers of the rows that episodes begin with, `(I,)`: all, or so many of them, evenly spread."""
    if data.episode_starts is None or not len(data.episode_starts):
        raise ValueError("the data has no episodes")
    starts = data.episode_starts
    if len(starts) <= most:
        return starts
    return starts[torch.linspace(0, len(starts) - 1, most, device=starts.device).round().long()]


class FittedQ:
    """The networks of M policies and their regression.

    Args:
        actor: the policies, for observations as `data` has them.
        data: the rows; rewards are counted as the environment gives them, whatever their scale there.
        seeds: one per member: its first weights and minibatches follow from it and nothing else, so two policies that
            are evaluated with one seed differ in nothing but the policy.
    """

    def __init__(self, actor: Actor, data: TrainingData, seeds: Sequence[int], settings: FQESettings) -> None:
        self.actor, self.data, self.seeds, self.settings = actor, data, list(seeds), settings
        self.device = data.observations.device
        # the network's inputs are of order 1 even where the data's columns are not
        inputs = data.observations
        self._mean_S, self._std_S = inputs.mean(0), inputs.std(0).clamp_(min=1e-3)
        self._reward_N = ((data.rewards.double() - data.reward_shift) / data.reward_scale).float()
        self._set_units()
        m, a = len(self.seeds), data.action_dim
        self.network = StackedMLP((m,), (data.observation_dim + a, *settings.hidden, 1), self.device)
        draws = [generator(seed, "fqe init") for seed in self.seeds]
        initialise(self.network, draws, scheme="torch", last_bound=0.0)
        self.target = self.network.clone()
        self.optim = Adam(self.network, [settings.learning_rate] * m)

    def _set_units(self) -> None:
        gamma, reward, done = self.settings.gamma, self._reward_N.double(), self.data.terminals.double()
        self.offset = float(reward.mean() / (1.0 - gamma * (1.0 - done.mean())))
        self.unit = max(float(reward.std(correction=0)) / math.sqrt(1.0 - gamma**2), 1e-6)
        low, high = min(float(reward.min()), 0.0), max(float(reward.max()), 0.0)
        if not bool(done.any()):  # then no sum of rewards ends early
            low, high = float(reward.min()), float(reward.max())
        self._lowest, self._highest = ((x / (1.0 - gamma) - self.offset) / self.unit for x in (low, high))

    def _inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.cat(((obs - self._mean_S) / self._std_S, action), dim=-1)

    def targets(self, rows_MB: Tensor) -> Tensor:
        """What f is to be at rows of the data, `(M, B)`."""
        next_obs, gamma = self.data.next_observations[rows_MB], self.settings.gamma
        f_MB = self.target.values(self._inputs(next_obs, mean_action(self.actor, next_obs))).squeeze(1)
        value = (1.0 - self.data.terminals[rows_MB]) * (self.offset + self.unit * f_MB)
        q_MB = self._reward_N[rows_MB] + gamma * value
        return ((q_MB - self.offset) / self.unit).clamp_(self._lowest, self._highest)

    def update(self, rows_MB: Tensor) -> None:
        """One step on the mean over rows of (f - target)^2, then the target network's."""
        target_MB = self.targets(rows_MB)
        x_MBX = self._inputs(self.data.observations[rows_MB], self.data.actions[rows_MB])
        network, batch = self.network, rows_MB.shape[1]
        f_MB1, inputs = network.forward(x_MBX)
        gradient_MB1 = (f_MB1 - target_MB.unsqueeze(-1)).mul_(2.0 / batch)
        network.write_gradients(inputs, network.hidden_gradients(inputs, gradient_MB1), gradient_MB1)
        self.optim.step()
        self.target.flat.lerp_(network.flat, self.settings.tau)

    def fit(self) -> None:
        """All updates."""
        for first in range(0, self.settings.num_updates, _CHUNK):
            for rows_MB in self._rows(first):
                self.update(rows_MB)

    def _rows(self, first: int) -> Tensor:
        """Row numbers `(U, M, B)` of the updates from number `first` on, drawn uniformly."""
        shape = (min(_CHUNK, self.settings.num_updates - first), self.settings.batch_size)
        drawn = []
        for seed in self.seeds:
            source = generator(seed, "fqe rows", first, device=self.device)
            drawn.append(torch.randint(len(self._reward_N), shape, generator=source, device=self.device))
        return torch.stack(drawn, 1)

    def value(self) -> Tensor:
        """Mean of Q(s0, pi(s0)) over first states, `(M,)`: discounted, in the environment's rewards."""
        obs_IS = self.data.observations[start_rows(self.data, STARTS)]
        obs_MIS = obs_IS.expand(len(self.seeds), *obs_IS.shape)
        f_MI = self.target.values(self._inputs(obs_MIS, mean_action(self.actor, obs_MIS))).squeeze(1)
        return self.offset + self.unit * f_MI.mean(1)


@torch.inference_mode()
def fitted_q_evaluation(actor: Actor, data: TrainingData, seeds: Sequence[int], settings: FQESettings) -> Tensor:
    """The value of M policies, `(M,)`: a function of the policies, the data and the seeds only (see `FittedQ`)."""
    fitted = FittedQ(actor, data, seeds, settings)
    fitted.fit()
    return fitted.value()
