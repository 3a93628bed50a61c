"""SAC-N: soft actor-critic with N critics (An, Moon, Kim and Song, NeurIPS 2021, arXiv 2110.01548).

Soft actor-critic on the rows of the dataset alone. The minimum over N critics instead of two is a lower confidence
bound of the value, which is the lower the less the data say of an action:

    y    = r + gamma (1 - d) [ min_{i <= N} Qbar_i(s', a~') - alpha log pi(a~'|s') ]
    J(Q) = sum_i mean_b (Q_i - y)^2

The update is that of `agents.sac`, with `eta = 0`; EDAC (`agents.edac`) adds its diversity term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from agents.config import SACConfig, actor_lr_scale, make_sac
from agents.model_free import ModelFree
from agents.policies import squashed_arrays
from agents.sac import SAC, Noise


@dataclass
class SACNConfig(SACConfig):
    """SAC-N's hyperparameters; per-dataset values in agents/sac_n.yaml."""

    num_critics: int = 10
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    initialisation: str = "edac"


class SACUpdater:
    """`agents.sac.SAC` as an `agents.model_free.Updater`."""

    num_noises = 2
    period = 1

    def __init__(self, sac: SAC) -> None:
        self.sac = sac

    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False
    ) -> dict[str, Tensor] | None:
        return self.sac.update(rows_MBW, Noise(noise_KMBA[0], noise_KMBA[1]), with_metrics)

    def select(self, members: Sequence[int]) -> SACUpdater:
        return SACUpdater(self.sac.select(members))

    def state_dict(self) -> dict[str, Any]:
        return self.sac.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sac.load_state_dict(state)


class SACN(ModelFree):
    """A pack of SAC-N runs."""

    Config: type[SACConfig] = SACNConfig
    configs: Sequence[SACConfig]
    shared: SACConfig
    updater: SACUpdater

    def make_updater(self) -> SACUpdater:
        widths = (self.data.observation_dim, self.data.action_dim)
        return SACUpdater(make_sac(self.configs, self.seeds, *widths, self.device))

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        self.updater.sac.actor_optim.scale = actor_lr_scale(self.shared, epoch)
        return super().train_epoch(epoch)

    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        return squashed_arrays(self.updater.sac.actor, member)


METHOD = SACN
