"""Trajectory models whose denoiser is known: Gaussian data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.actors import GaussianActor, SquashedGaussianActor, TanhActor
from agents.networks import StackedMLP, initialise
from agents.randomness import generator
from agents.trajectories import TrajectoryScaling

OBS, ACT = 3, 2


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of independent standard normal numbers."""
    return x / (1.0 + sigma.square())


@dataclass
class GaussianModel:
    """What `TrajectoryModel` has, with a denoiser of one's own."""

    denoiser: object = exact
    length: int = 5
    observation_dim: int = OBS
    action_dim: int = ACT
    terminal_mean: float = 0.5
    terminal_std: float = 0.5
    device: str = "cpu"

    @property
    def scaling(self) -> TrajectoryScaling:
        scaling = TrajectoryScaling(
            torch.linspace(-1.0, 1.0, self.observation_dim), torch.linspace(0.5, 1.5, self.observation_dim),
            torch.linspace(-0.2, 0.3, self.action_dim), torch.linspace(0.6, 0.9, self.action_dim),
            torch.tensor(1.0), torch.tensor(2.0), torch.tensor(self.terminal_mean), torch.tensor(self.terminal_std),
        )  # fmt: skip
        return scaling.to(self.device)


def drawn_actor(kind: str, members: int = 1, seed: int = 0) -> TanhActor | GaussianActor | SquashedGaussianActor:
    """Policies with random networks: "tanh", "gaussian" or "squashed"."""
    network = StackedMLP((members,), (OBS, 16, 2 * ACT if kind == "squashed" else ACT))
    initialise(network, [generator(seed + m, "actor") for m in range(members)], scheme="torch", last_bound=0.0)
    network.weights[-1].mul_(3.0)
    if kind == "tanh":
        return TanhActor(network)
    if kind == "squashed":
        return SquashedGaussianActor(network)
    log_std = torch.linspace(-1.0, 0.2, members * ACT).view(members, 1, ACT)
    return GaussianActor(network, log_std=log_std)
