"""Other ways to choose source transitions than VGDF's fictitious value proximity: the ablations of its paper (Xu et al.
2023, arXiv 2305.17625, figures 14 and 15). A score ranks the source rows of a minibatch; the highest are kept.

    domain ratio   Delta r = log P_target(s'|s,a) - log P_source(s'|s,a) of domain classifiers: how near the dynamics
    value          min_k Q_k(s, a): how much a row promises, wherever it comes from

Shapes: M member, B source row of a minibatch, W = 2 S + A + 2 columns of a row.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from agents.domain_classifiers import DomainClassifiers
from agents.domain_sac import DomainSAC


class SourceScore(Protocol):
    """How much each source row is wanted; the higher, the sooner it is kept."""

    def __call__(self, source_MBW: Tensor) -> Tensor:
        """`(M, B)` of rows `(M, B, W)`, in any unit: only their order counts."""


class DomainRatioScore:
    """Rows that the target's dynamics would make, too (the paper's DGDF).

    Args:
        classifiers: trained beside the method.
    """

    def __init__(self, classifiers: DomainClassifiers) -> None:
        self.classifiers = classifiers

    def __call__(self, source_MBW: Tensor) -> Tensor:
        return self.classifiers.log_ratio(source_MBW)


class ValueScore:
    """Rows of the highest value.

    Args:
        sac: whose critics say so.
    """

    def __init__(self, sac: DomainSAC) -> None:
        self.sac = sac

    @torch.inference_mode()
    def __call__(self, source_MBW: Tensor) -> Tensor:
        width = self.sac.observation_dim + self.sac.action_dim
        return self.sac.critic.values(source_MBW[..., :width]).amin(1)
