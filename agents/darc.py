"""DARC: domain adaptation with rewards from classifiers (Eysenbach et al., ICLR 2021, arXiv 2006.13916).

Soft actor-critic on transitions of the source domain alone, with rewards that say where the target could not follow:

    r~  = reward_scale (r + delta_r_scale Delta r),    Delta r = log P_target(s'|s,a) - log P_source(s'|s,a)
    y   = r~ + gamma (1 - d) [ min_k Qbar_k(s', a~') - alpha log pi(a~'|s') ]

Delta r comes from two domain classifiers (`agents.domain_classifiers`), which are what the few transitions of the
target are for. The first `warm_up` updates have no correction: classifiers that have seen little say anything.

Shapes: M member, K noise, B batch row, A action, W column of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.checks import check_not_negative, check_positive
from agents.classified import Classified, ClassifiedConfig
from agents.cross_domain import joined
from agents.domain_sac import DomainSAC, make_domain_sac
from agents.method import per_member
from agents.model_free import member_values


@dataclass
class DARCConfig(ClassifiedConfig):
    """DARC's hyperparameters; values with sources in agents/darc.yaml. Fields marked per member may differ inside a
    pack."""

    warm_up: int = 100_000  # updates without a correction
    delta_r_scale: float = per_member(1.0)
    reward_scale: float = per_member(1.0)  # of r + delta_r_scale Delta r

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "warm_up", "delta_r_scale")
        check_positive(self, "reward_scale")


class DARC(Classified):
    """A pack of DARC runs."""

    Config = DARCConfig
    configs: list[DARCConfig]
    shared: DARCConfig

    def make_updater(self) -> DomainSAC:
        return make_domain_sac(self.configs, self.seeds, self.observation_dim, self.action_dim, self.device)

    def bind(self) -> None:
        super().bind()
        scales = [c.delta_r_scale for c in self.configs], [c.reward_scale for c in self.configs]
        self._delta_r_M1, self._reward_M1 = (member_values(of, self.device).squeeze(-1) for of in scales)

    @torch.inference_mode()
    def corrected(self, t: int, source_MBW: Tensor) -> tuple[Tensor, Tensor]:
        """Source rows with the rewards of update t, and Delta r `(M, B)` of the rows as they were."""
        delta_r, column = self.classifiers.log_ratio(source_MBW), self.observation_dim + self.action_dim
        reward = source_MBW[..., column]
        if t >= self.shared.warm_up:
            reward = torch.addcmul(reward, self._delta_r_M1, delta_r)
        rows = source_MBW.clone()
        rows[..., column] = reward * self._reward_M1
        return rows, delta_r

    def update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        rows, delta_r = self.corrected(t, source_MBW)
        size, turn = rows.shape[1], self.updates_done % self.updater.period
        metrics = self.updater.update(joined(rows, target_MBW[:, :0]), noise_KMBA[:, :, :size], turn, with_metrics)
        return self.with_classifiers(metrics, delta_r=delta_r.mean(1))


METHOD = DARC
