"""Symmetric sampling: recorded source rows with CQL's loss, the target's replay with that of soft actor-critic.

Half of every minibatch is of each domain (Ball et al. 2023, arXiv 2302.02948, section 4.1, with the domains in the
places of data and replay), and the critics are conservative about the source's actions alone:

    J(Q) = mean_{b of both} sum_k (Q_k(s, a) - y)^2, a mean for each domain,
           + cql_alpha mean_{b of the source} sum_k [ tau log sum_j exp((Q_k(s, a_j) - log p_j) / tau) - Q_k(s, a) ]

(the second term: `agents.conservative`). VGDF (Xu et al. 2023, arXiv 2305.17625, section 6.3) has it as a baseline for
recorded sources.

Shapes: M member, K noise, B batch row, A action, W column of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.checks import check_not_negative, check_positive
from agents.conservative import SourcePenalty
from agents.cross_domain import CrossDomain, CrossDomainConfig
from agents.domain_sac import DomainBatch, DomainSAC, DomainSACConfig, make_domain_sac
from agents.draws import Draws
from agents.method import per_member
from agents.model_free import member_values


@dataclass
class SymmetricSamplingConfig(CrossDomainConfig, DomainSACConfig):
    """Hyperparameters; values with sources in agents/symmetric_sampling.yaml. Fields marked per member may differ
    inside a pack."""

    recorded_source_only: ClassVar[bool] = True

    cql_alpha: float = per_member(10.0)  # weight of the conservative term
    num_actions: int = 10  # of each of the three kinds
    cql_temperature: float = per_member(1.0)  # tau of the log-sum-exp
    importance_sampling: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_actions", "cql_temperature")
        check_not_negative(self, "cql_alpha")


class SymmetricSampling(CrossDomain):
    """A pack of runs."""

    Config = SymmetricSamplingConfig
    configs: list[Any]
    shared: Any

    def bind(self) -> None:
        super().bind()
        size = SourcePenalty.noise_size(self.shared.num_actions, self.shared.batch_size, self.action_dim)
        self._draws = Draws(self.seeds, "conservative actions", (size,), self.device)
        self._cql_alpha_M1 = member_values([c.cql_alpha for c in self.configs], self.device).squeeze(-1)
        self._temperature_M11 = member_values([c.cql_temperature for c in self.configs], self.device)

    def make_updater(self) -> DomainSAC:
        return make_domain_sac(self.configs, self.seeds, self.observation_dim, self.action_dim, self.device)

    def source_weights(self, source_MBW: Tensor) -> tuple[Tensor, Tensor]:
        """How much each source row counts in the squared errors and in the conservative term, `(M, B)` each."""
        ones = source_MBW.new_ones(source_MBW.shape[:2])
        return ones, ones

    def update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        return self.weighted_update(
            t, source_MBW, target_MBW, self.source_weights(source_MBW), noise_KMBA, with_metrics
        )

    def weighted_update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, weights: tuple[Tensor, Tensor], noise_KMBA: Tensor,
        with_metrics: bool,
    ) -> dict[str, Tensor] | None:  # fmt: skip
        """`update` with the weights that `source_weights` gives."""
        shared, size = self.shared, source_MBW.shape[1]
        of_errors, of_term = weights
        of_target = target_MBW.new_full(target_MBW.shape[:2], 1.0 / target_MBW.shape[1])
        rows, weight = torch.cat((source_MBW, target_MBW), 1), torch.cat((of_errors / size, of_target), 1)
        penalty = SourcePenalty(
            of_term * (self._cql_alpha_M1 / size), self._temperature_M11, self._draws(t), shared.num_actions,
            shared.importance_sampling,
        )  # fmt: skip
        turn = self.updates_done % self.updater.period
        return self.updater.update(DomainBatch(rows, size, weight), noise_KMBA, turn, with_metrics, penalty)


METHOD = SymmetricSampling
