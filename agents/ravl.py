"""RAVL: Reach-Aware Value Learning (Sims, Lu, Foerster and Teh, NeurIPS 2024, arXiv 2402.12527).

Truncated model rollouts bootstrap from states that no rollout ever updates, the edge-of-reach states: errors there
compound into the value function, even with a perfect model. RAVL uses no penalty on the dynamics. It detects these
states by the disagreement of N critics and values them by the minimum:

    y    = r + gamma (1 - d) [ min_{i <= N} Qbar_i(s', a~') - alpha log pi(a~'|s') ]
    J(Q) = sum_i mean_b (Q_i - y)^2 + eta * ES          (ES: see agents.sac; critics as in EDAC, An et al. 2021)

Rollouts of k steps start at states of the dataset, sample the current policy, and at every step sample the Gaussian of
an elite drawn per transition. The base method of the paper is `num_critics=2 eta=0`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agents.method import per_member
from agents.model_based import ModelBasedConfig, ModelBasedSAC


@dataclass
class RAVLConfig(ModelBasedConfig):
    """RAVL's hyperparameters; the defaults are those of the released code (agents/ravl.yaml)."""

    num_critics: int = 10
    eta: float = per_member(1.0, off_at_zero=True)
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    initialisation: str = "edac"


class RAVL(ModelBasedSAC):
    """A pack of RAVL runs: plain rollouts, N critics with the diversity term."""

    Config = RAVLConfig
    penalty = None


METHOD = RAVL
