"""A dataset's transitions as what learns a dynamics reward takes them: every column has mean 0, standard deviation 1.

Discriminators are stored for inputs in the release's scaling (`agents.dynamics_reward.scaled_inputs`), shares of the
dataset's range, in which a step's change is nearly nothing. Both are affine, so what standardises inputs can become
part of a network's first layer.

A column that (nearly) never changes is 0 throughout: by it alone a learner's draws could be told from the real.

Shapes: B batch, N transitions, S observation, A action, Y = S + A, X = 2S + A inputs of a discriminator, W = 3S + A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.dynamics_reward import input_bounds, scaled_inputs
from agents.method import TrainingData
from agents.networks import StackedMLP

NEARLY_CONSTANT = 1e-6  # standard deviation of a scaled column that tells nothing


class TransitionInputs:
    """The standardised transitions of a dataset.

    Attributes:
        bounds: what scales inputs (`agents.dynamics_reward.input_bounds`).
        table: `(N, W)`, columns `[s, a, s' - s, s']`.

    Args:
        delta_input: whether discriminators take s' - s instead of s'.
    """

    def __init__(self, data: TrainingData, delta_input: bool) -> None:
        self.delta_input = delta_input
        self.observation_dim, self.action_dim = s, a = data.observation_dim, data.action_dim
        self.bounds = input_bounds(data.observations, data.actions)
        columns = (data.observations, data.actions, data.next_observations)
        moved, after = (scaled_inputs(*columns, self.bounds, delta) for delta in (True, False))
        table = torch.cat((moved, after[:, s + a :]), 1).double()
        mean, std = table.mean(0), table.std(0, correction=0)
        scale = torch.where(std > NEARLY_CONSTANT, 1 / std, 0.0)
        self._mean, self._std, self._scale = mean.float(), std.float(), scale.float()
        self.table = ((table - mean) * scale).float()
        change = (data.next_observations - data.observations).double()
        self._change_mean = change.mean(0).float()
        varies = scale[s + a : s + a + s] > 0
        self._change_std = torch.where(varies, change.std(0, correction=0), 0.0).float()

    def parts(self, rows_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[s, a]` `(B, Y)`, the change `(B, S)` and a discriminator's inputs `(B, X)`, of transitions by number."""
        s = self.observation_dim
        context, change, after = self.table[rows_B].split((s + self.action_dim, s, s), 1)
        return context, change, torch.cat((context, change if self.delta_input else after), 1)

    def inputs(self, context_BY: Tensor, change: Tensor) -> Tensor:
        """A discriminator's inputs `(..., B, X)` for changes `(..., B, S)`."""
        s, y = self.observation_dim, self.observation_dim + self.action_dim
        last = change
        if not self.delta_input:
            moved, after = slice(y, y + s), slice(y + s, None)
            place_BS = context_BY[:, :s] * self._std[:s] + self._mean[:s]
            scaled = place_BS + self._mean[moved] + change * self._std[moved]
            last = (scaled - self._mean[after]) * self._scale[after]
        return torch.cat((context_BY.expand(*change.shape[:-1], -1), last), -1)

    def changed(self, obs_BS: Tensor, change: Tensor) -> Tensor:
        """Next observations `(..., B, S)`, in the data's units, that changes make of observations in those units."""
        return obs_BS + self._change_mean + self._change_std * change

    def layers(self, network: StackedMLP) -> dict[str, Tensor]:
        """Weights `W<i>` and biases `b<i>` of networks of standardised inputs, made into those of scaled ones."""
        s, y = self.observation_dim, self.observation_dim + self.action_dim
        columns = torch.arange(y + s, device=self.table.device)
        if not self.delta_input:
            columns[y:] += s
        scale, mean = self._scale[columns].double(), self._mean[columns].double()
        first = network.weights[0].double() * scale.view(1, -1, 1)
        bias = network.biases[0].double() - mean.view(1, 1, -1) @ first
        layers = {"W0": first.float(), "b0": bias.float()}
        for i in range(1, len(network.weights)):
            layers |= {f"W{i}": network.weights[i], f"b{i}": network.biases[i]}
        return layers
