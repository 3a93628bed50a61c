"""MOPO: Model-based Offline Policy Optimization (Yu et al., NeurIPS 2020, arXiv 2005.13239).

Soft actor-critic on model rollouts whose reward is lowered by the ensemble's aleatoric uncertainty,

    r~(s, a) = r(s, a) - penalty_coef * max_e || sigma_e(s, a) ||_2

with the maximum over all ensemble members, not only the elites, and the norm over state change and reward (official
`fake_env.py`; OfflineRL-Kit `np.amax(np.linalg.norm(std, axis=2), axis=0)`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.method import per_member
from agents.model_based import ModelBasedConfig, ModelBasedSAC
from envs.errors import UserError


@dataclass
class MOPOConfig(ModelBasedConfig):
    """MOPO's hyperparameters; per-dataset values in agents/mopo.yaml."""

    penalty_coef: float = per_member(1.0)  # lambda

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.penalty_coef >= 0:
            raise UserError(f"method.penalty_coef={self.penalty_coef} must be 0 or greater")


def max_aleatoric(std_EBD: Tensor) -> Tensor:
    """max over members of the Euclidean norm of the standard deviations: (E, B, D) -> (B,)."""
    return torch.linalg.vector_norm(std_EBD, dim=-1).amax(0)


class MOPO(ModelBasedSAC):
    """A pack of MOPO runs."""

    Config = MOPOConfig
    penalty = staticmethod(max_aleatoric)

    def penalty_coef(self, config: MOPOConfig) -> float:
        return config.penalty_coef


METHOD = MOPO
