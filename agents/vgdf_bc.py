"""VGDF+BC: VGDF with behaviour cloning, for a recorded source domain (Xu et al., NeurIPS 2023, arXiv 2305.17625).

Section 5.2 and algorithm 2 of the paper: critics and filter are those of `agents.vgdf`, there is no source policy, and
the policy is also drawn to the source's actions:

    J(pi) = c mean_{both domains} [ alpha log pi(a~|s) - min_k Q_k(s, a~) ] + mean_{source} (pi(s) - a)^2

with c = coef / mean |min_k Q_k|, the scaling of TD3+BC (variant `paper`), or c = coef (variant `code`: the release
scales only if `--use_q_decay` is passed). The release clones with an action drawn from the policy, the paper writes
pi(s): here the policy's mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from agents.behaviour_cloning import CLONED_ACTIONS, SCALES, BehaviourCloning
from agents.checks import check_choice, check_not_negative
from agents.domain_sac import ActorPenalty
from agents.method import per_member
from agents.vgdf import VGDF, VGDFConfig


@dataclass
class VGDFBCConfig(VGDFConfig):
    """Hyperparameters; per-dataset values in agents/vgdf_bc.yaml. Fields marked per member may differ in a pack."""

    recorded_source_only: ClassVar[bool] = True

    coef: float = per_member(5.0)  # weight of the value against the distance to the data
    scale: str = "value"  # value: coef / mean |Q| | none: coef as it is
    cloned_action: str = "mean"  # mean | sample: what of the policy is drawn to the data

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "coef")
        check_choice(self, "scale", SCALES)
        check_choice(self, "cloned_action", CLONED_ACTIONS)


class VGDFBC(VGDF):
    """A pack of runs."""

    Config = VGDFBCConfig
    shared: VGDFBCConfig

    def bind(self) -> None:
        super().bind()
        coefs = [c.coef for c in self.configs]
        self._cloning = BehaviourCloning(coefs, self.shared.scale, self.shared.cloned_action, self.device)

    def actor_penalty(self) -> ActorPenalty:
        return self._cloning


METHOD = VGDFBC
