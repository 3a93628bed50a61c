"""RAVL: Reach-Aware Value Learning (Sims, Lu, Foerster and Teh, NeurIPS 2024, arXiv 2402.12527).

Truncated model rollouts bootstrap from states that no rollout ever updates, the edge-of-reach states: errors there
compound into the value function, even with a perfect model. RAVL uses no penalty on the dynamics. It detects these
states by the disagreement of N critics and values them by the minimum:

    y    = r + gamma (1 - d) [ min_{i <= N} Qbar_i(s', a~') - alpha log pi(a~'|s') ]
    J(Q) = sum_i mean_b (Q_i - y)^2 + eta * ES          (ES: see agents.sac; critics as in EDAC, An et al. 2021)

Rollouts of k steps start at states of the dataset, sample the current policy, and at every step sample the Gaussian of
an elite drawn per transition. The base method of the paper is `num_critics=2 eta=0`; its Base-OraclePatch is that with
`patch=oracle`, which replaces min_i Qbar_i where s' is edge-of-reach (see `agents.patch`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agents.checks import check_choice
from agents.method import Stage, per_member
from agents.model_based import ModelBasedConfig, ModelBasedSAC
from agents.patch import PATCHES, EdgePatch, OptimalValue, oracle_stage
from agents.sac import TargetHook
from envs.errors import UserError
from envs.reach import exact_edge_test


@dataclass
class RAVLConfig(ModelBasedConfig):
    """RAVL's hyperparameters; the defaults are those of the released code (agents/ravl.yaml)."""

    num_critics: int = 10
    eta: float = per_member(1.0, off_at_zero=True)
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    initialisation: str = "edac"
    patch: str = "none"  # of the targets' values, where edge-of-reach states are known: see agents.patch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "patch", PATCHES)
        if self.patch == "none":
            return
        if self.model_quality != 1 or self.rollout_starts != "initial":
            raise UserError(
                f"method.patch={self.patch} needs method.model_quality=1 and method.rollout_starts=initial: only for "
                "rollouts with the true dynamics from the environment's start states is it known exactly which states "
                "are edge-of-reach"
            )


class RAVL(ModelBasedSAC):
    """A pack of RAVL runs: plain rollouts, N critics with the diversity term."""

    Config = RAVLConfig
    shared: RAVLConfig

    @staticmethod
    def stages(config: ModelBasedConfig) -> dict[str, Stage]:
        stages = ModelBasedSAC.stages(config)
        if isinstance(config, RAVLConfig) and config.patch != "none":
            stages["optimal_values"] = oracle_stage(config.gamma)
        return stages

    @staticmethod
    def check_environment(config: ModelBasedConfig, env_id: str) -> None:
        ModelBasedSAC.check_environment(config, env_id)
        if isinstance(config, RAVLConfig) and config.patch != "none" and exact_edge_test(env_id) is None:
            raise UserError(
                f"method.patch={config.patch} cannot be used in {env_id}, which has no exact test for edge-of-reach "
                "states; leave it at none, or take a dataset of offsweep/EdgeOfReach-v0"
            )

    def target_hook(self, artifacts: Mapping[str, dict[str, Any]]) -> TargetHook | None:
        if self.shared.patch == "none":
            return None
        test, length = self.edge_test(), self.shared.rollout_length
        if test is None:
            raise ValueError(f"no exact test for edge-of-reach states of {self.data.env_id}")
        values = artifacts["optimal_values"]["values"]
        optimal = OptimalValue(values, self.shared.gamma, self.data, self.device)
        return EdgePatch(self.shared.patch, lambda obs: test(obs, length), optimal, self.in_environment())


METHOD = RAVL
