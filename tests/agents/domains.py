"""Small cross-domain packs: Pendulum, and Pendulum with half the gravity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agents.cross_domain import CrossDomain, CrossDomainConfig
from agents.domain_sac import DomainSAC, DomainSACConfig, make_domain_sac
from agents.method import TrainingData
from agents.online_sac import OnlineSAC, OnlineSACConfig
from envs.online_sets import read_online

SOURCE, TARGET = "Pendulum-v1", "offsweep/Pendulum-gravity-0.5-v1"
BOUND = np.array([2.0], np.float32)


@dataclass
class BothConfig(CrossDomainConfig, DomainSACConfig):
    """Soft actor-critic on the rows of both domains."""


class Both(CrossDomain):
    """The smallest cross-domain method."""

    Config = BothConfig

    def make_updater(self) -> DomainSAC:
        return make_domain_sac(self.configs, self.seeds, self.observation_dim, self.action_dim, self.device, True)


SMALL: dict[str, Any] = {
    "target": TARGET, "hidden": [8], "batch_size": 8, "updates_per_epoch": 100, "num_updates": 400,
    "initialisation": "torch",
}  # fmt: skip


def online_data() -> TrainingData:
    return TrainingData.from_dataset(read_online(f"online/{SOURCE}"), -BOUND, BOUND)


def both(
    seeds: Sequence[int] = (0,), data: TrainingData | None = None, cls: type[Both] = Both, **settings: Any
) -> Both:
    config = BothConfig(**{**SMALL, **settings})
    return cls([config] * len(seeds), seeds, online_data() if data is None else data, {})


def sac(seeds: Sequence[int] = (0,), data: TrainingData | None = None, **settings: Any) -> OnlineSAC:
    config = OnlineSACConfig(**{**SMALL, **settings})
    return OnlineSAC([config] * len(seeds), seeds, online_data() if data is None else data, {})


def train(method: CrossDomain, epochs: int, first: int = 0) -> list[list[dict[str, float]]]:
    return [method.train_epoch(epoch) for epoch in range(first, first + epochs)]


def weights(method: CrossDomain, member: int = 0) -> torch.Tensor:
    """Everything that the networks of a member hold."""
    updater = method.updater.select([member])
    stacks = [updater.actor.flat, updater.critic.flat, updater.target.flat]
    if updater.source_actor is not None:
        stacks.append(updater.source_actor.flat)
    return torch.cat(stacks)
