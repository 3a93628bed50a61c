"""BC-SAC: soft actor-critic on recorded source rows and the target's replay, with cloning of the source's actions.

Every row counts alike, whatever its domain; only the policy is held near the recorded actions:

    J(Q)  = mean_{b of both} sum_k (Q_k(s, a) - y)^2
    J(pi) = c mean_{b of both} [ alpha log pi(a~|s) - min_k Q_k(s, a~) ] + mean_{b of the source} (pi(s) - a)^2
    c     = bc_coef / mean |min_k Q_k(s, a~)|

(`agents.behaviour_cloning`; the scaling is that of TD3+BC, arXiv 2106.06860.) It is BCSAC of ODRL (Lyu et al., NeurIPS
2024, arXiv 2410.20750; OffDynamicsRL/off-dynamics-rl 34bba73, algo/offline_online/bc_sac.py), and what CompositeFlow
(arXiv 2505.23062) found ahead of VGDF with cloning: VGDF+BC without its filter.

Shapes: M member, K noise, B batch row, A action, W column of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.behaviour_cloning import CLONED_ACTIONS, BehaviourCloning
from agents.checks import check_choice, check_positive
from agents.cross_domain import CrossDomain, CrossDomainConfig
from agents.domain_sac import DomainBatch, DomainSAC, DomainSACConfig, make_domain_sac
from agents.method import per_member


@dataclass
class BCSACConfig(CrossDomainConfig, DomainSACConfig):
    """BC-SAC's hyperparameters; values with sources in agents/bc_sac.yaml. Fields marked per member may differ inside a
    pack."""

    recorded_source_only: ClassVar[bool] = True

    bc_coef: float = per_member(2.5)  # weight of the reinforcement learning term: the larger, the less cloning
    cloned_action: str = "sample"  # sample | mean: what of the policy is drawn to the data

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "bc_coef")
        check_choice(self, "cloned_action", CLONED_ACTIONS)


class BCSAC(CrossDomain):
    """A pack of BC-SAC runs."""

    Config = BCSACConfig
    configs: list[BCSACConfig]
    shared: BCSACConfig

    def bind(self) -> None:
        coefs = [c.bc_coef for c in self.configs]
        self._cloning = BehaviourCloning(coefs, action=self.shared.cloned_action, device=self.device)

    def make_updater(self) -> DomainSAC:
        return make_domain_sac(self.configs, self.seeds, self.observation_dim, self.action_dim, self.device)

    @property
    def num_noises(self) -> int:
        return self.updater.num_noises + self._cloning.num_noises

    def update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        rows, turn = torch.cat((source_MBW, target_MBW), 1), self.updates_done % self.updater.period
        weight = rows.new_full(rows.shape[:2], 1.0 / rows.shape[1])
        batch = DomainBatch(rows, source_MBW.shape[1], weight)
        return self.updater.update(batch, noise_KMBA, turn, with_metrics, actor_penalty=self._cloning)


METHOD = BCSAC
