"""Filters of source transitions: the rows of a minibatch's source that score highest are learned from (Xu et al. 2023,
arXiv 2305.17625, sections 4.2 and 6.3). What they are scored by:

    fictitious value proximity   `agents.value_proximity`: VGDF's own
    domain ratio                 Delta r = log P_target(s'|s,a) - log P_source(s'|s,a) of `agents.domain_classifiers`:
                                 how near the dynamics are (figure 15)
    value                        min_k Q_k(s, a): how much a row promises, wherever it leads (figure 14; which of the
                                 critics' values the paper takes it does not say)

`keep_fraction` of the source rows pass, by one of two gates:

    topk      the rows of highest score, exactly so many of them
    quantile  the rows whose density exp(score) is above its quantile, as the released code has it: in float32 it is 0
              more than some 14 standard deviations away, and where most rows are, fewer pass or none

and count by one of two weights:

    batch     1 / B (the paper's equation 7 and the released code)
    accepted  1 over the number of rows that are to pass (the paper's Algorithm 1)

Shapes: M member, B row of a minibatch, R row that passes or is of the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.domain_sac import DomainBatch, DomainSAC

GATES = ("topk", "quantile")
LOSS_WEIGHTS = ("batch", "accepted")
_SMALLEST = torch.finfo(torch.float32).tiny


class Accepted(NamedTuple):
    """What a gate lets through of B source rows."""

    passes_MB: Tensor  # 1 or 0
    threshold_M: Tensor  # score from which on rows do
    num_wanted: int  # that are to pass
    index_MR: Tensor | None  # numbers of the rows, where it is known how many they are


def accept(score_MB: Tensor, keep_fraction: float, gate: str = "topk") -> Accepted:
    """Which rows pass; see the module."""
    count = max(1, round(keep_fraction * score_MB.shape[1]))
    if gate == "topk":
        best, index = score_MB.topk(count, dim=1)
        return Accepted(torch.zeros_like(score_MB).scatter_(1, index, 1.0), best[:, -1], count, index)
    density = score_MB.exp()
    threshold = torch.quantile(density, 1.0 - keep_fraction, dim=1, keepdim=True)
    return Accepted((density > threshold).float(), threshold.squeeze(1).clamp(min=_SMALLEST).log(), count, None)


def filtered(batch: DomainBatch, accepted: Accepted, loss_weight: str) -> DomainBatch:
    """A minibatch with its source rows filtered.

    Args:
        batch: of both domains; each row's weight is 1 over the number of its domain's.
        loss_weight: one of LOSS_WEIGHTS.
    """
    num_source, (members, size, _) = batch.num_source, batch.rows_MBW.shape
    weight_MB = batch.weight_MB.clone()
    if loss_weight == "accepted":
        weight_MB[:, :num_source] = accepted.passes_MB / accepted.num_wanted
    else:
        weight_MB[:, :num_source] *= accepted.passes_MB
    learned = None
    if accepted.index_MR is not None:
        of_target = torch.arange(num_source, size, device=weight_MB.device)
        learned = torch.cat((accepted.index_MR, of_target.expand(members, -1)), 1)
    return batch._replace(weight_MB=weight_MB, learned_MR=learned)


@torch.inference_mode()
def value_score(sac: DomainSAC, source_MBW: Tensor) -> Tensor:
    """min_k Q_k(s, a) of rows, `(M, B)`."""
    return sac.critic.values(source_MBW[..., : sac.observation_dim + sac.action_dim]).amin(1)
