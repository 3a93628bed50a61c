"""IW-Clip: importance weighting of the source domain's transitions, clipped.

Soft actor-critic on transitions of the source domain alone, whose squared errors count as the target's would:

    J(Q) = mean_{b of the source} w_b sum_k (Q_k(s, a) - y)^2,    w = clip( P_target(s'|s,a) / P_source(s'|s,a) )

The ratio is exp(Delta r) of DARC's domain classifiers (`agents.domain_classifiers`). VGDF (Xu et al. 2023, arXiv
2305.17625, section 6) has it as a baseline, clipped to [1e-4, 1]; the first `warm_up` updates count every row fully.

Shapes: M member, K noise, B batch row, A action, W column of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.checks import check_not_negative
from agents.classified import Classified, ClassifiedConfig
from agents.domain_sac import DomainBatch, DomainSAC, make_domain_sac
from envs.errors import UserError


def check_ratio_bounds(low: float, high: float) -> None:
    """Raise a UserError if a ratio cannot be clipped to them."""
    if not 0 < low < high:
        raise UserError(
            f"method.min_weight={low} must be greater than 0 and less than method.max_weight={high}, such as 1e-4 and 1"
        )


@dataclass
class IWClipConfig(ClassifiedConfig):
    """IW-Clip's hyperparameters; values with sources in agents/iw_clip.yaml."""

    warm_up: int = 100_000  # updates with a weight of 1
    min_weight: float = 1e-4
    max_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "warm_up")
        check_ratio_bounds(self.min_weight, self.max_weight)


class IWClip(Classified):
    """A pack of IW-Clip runs."""

    Config = IWClipConfig
    configs: list[IWClipConfig]
    shared: IWClipConfig

    def make_updater(self) -> DomainSAC:
        return make_domain_sac(self.configs, self.seeds, self.observation_dim, self.action_dim, self.device)

    def weights(self, t: int, source_MBW: Tensor) -> Tensor:
        """w `(M, B)` of source rows in update t."""
        if t < self.shared.warm_up:
            return source_MBW.new_ones(source_MBW.shape[:2])
        return self.classifiers.ratio(source_MBW, self.shared.min_weight, self.shared.max_weight)

    def update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        weight, size = self.weights(t, source_MBW), source_MBW.shape[1]
        batch, turn = DomainBatch(source_MBW, size, weight / size), self.updates_done % self.updater.period
        metrics = self.updater.update(batch, noise_KMBA[:, :, :size], turn, with_metrics)
        return self.with_classifiers(metrics, source_weight=weight.mean(1))


METHOD = IWClip
