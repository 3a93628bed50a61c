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

import numpy as np

from agents.config import SACConfig, actor_lr_scale, make_sac
from agents.model_free import ModelFree, ModelFreeConfig
from agents.policies import squashed_arrays
from agents.sac import SAC


@dataclass
class SACNConfig(SACConfig, ModelFreeConfig):
    """SAC-N's hyperparameters; per-dataset values in agents/sac_n.yaml."""

    num_critics: int = 10
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    initialisation: str = "edac"


class SACN(ModelFree):
    """A pack of SAC-N runs."""

    Config: type[SACNConfig] = SACNConfig
    configs: Sequence[SACNConfig]
    shared: SACNConfig
    updater: SAC

    def make_updater(self) -> SAC:
        return make_sac(self.configs, self.seeds, self.data.observation_dim, self.data.action_dim, self.device)

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        self.updater.actor_optim.scale_rates(actor_lr_scale(self.shared, epoch))
        return super().train_epoch(epoch)

    def actor_arrays(self, member: int) -> dict[str, np.ndarray]:
        return squashed_arrays(self.updater.actor, member)


METHOD = SACN
