"""H2O: hybrid offline-and-online reinforcement learning (Niu et al., NeurIPS 2022, arXiv 2206.13464).

The original learns from recorded rows of the real domain and from a simulator that is sampled. Here, as in VGDF's
experiments (Xu et al. 2023, arXiv 2305.17625, section 6.3) and in ODRL, the recorded rows are of the source and the
target is sampled, so it is the source's rows that count by how likely the target would be to make them:

    w    = clip( P_target(s'|s,a) / P_source(s'|s,a) ),    of the domain classifiers (`agents.domain_classifiers`)
    J(Q) = mean_{b of the target} sum_k (Q_k(s, a) - y)^2 + mean_{b of the source} w_b sum_k (Q_k(s, a) - y)^2
           + cql_alpha mean_{b of the source} w_b sum_k [ tau log sum_j exp((Q_k(s, a_j) - log p_j) / tau) - Q_k(s, a) ]

In ODRL's code the gaps `(B,)` of the last term are multiplied with weights `(B, 1)`, so that it is the mean weight
times the mean gap: `penalty_weighting` rows (as written above) or mean (as that code).

Shapes: M member, B batch row, W column of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.checks import check_choice
from agents.classified import Classified, ClassifiedConfig
from agents.iw_clip import check_ratio_bounds
from agents.symmetric_sampling import SymmetricSampling, SymmetricSamplingConfig

PENALTY_WEIGHTINGS = ("rows", "mean")


@dataclass
class H2OConfig(ClassifiedConfig, SymmetricSamplingConfig):
    """H2O's hyperparameters; values with sources in agents/h2o.yaml."""

    min_weight: float = 1e-4
    max_weight: float = 10.0
    penalty_weighting: str = "rows"  # rows | mean

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "penalty_weighting", PENALTY_WEIGHTINGS)
        check_ratio_bounds(self.min_weight, self.max_weight)


class H2O(Classified, SymmetricSampling):
    """A pack of H2O runs: symmetric sampling whose source rows are weighted."""

    Config = H2OConfig

    def source_weights(self, source_MBW: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.classifiers.ratio(source_MBW, self.shared.min_weight, self.shared.max_weight)
        if self.shared.penalty_weighting == "rows":
            return weight, weight
        return weight, weight.mean(1, keepdim=True).expand_as(weight)

    def update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        weights = self.source_weights(source_MBW)
        metrics = self.weighted_update(t, source_MBW, target_MBW, weights, noise_KMBA, with_metrics)
        return self.with_classifiers(metrics, source_weight=weights[0].mean(1))


METHOD = H2O
