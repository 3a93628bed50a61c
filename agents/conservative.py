"""CQL's conservative term (Kumar et al., NeurIPS 2020, arXiv 2006.04779, equation 4), of one domain's rows or of all.

    sum_b weight_b [ tau log sum_k exp((Q_i(s_b, a_k) - log p_k) / tau) - Q_i(s_b, a_b) ]    for each critic i

The a_k are `num_actions` each from the uniform distribution, from pi(.|s) and from pi(.|s'), all valued at s, and p_k
their densities. Without importance sampling log p_k is left out and the row's own action is one of the a_k. Its
gradient is a softmax: weight_b softmax_k((Q - log p) / tau) for every a_k, and -weight_b for the row's own action.

Shapes: M member, N critic, G critics in a row, B batch row, n drawn actions of a kind, K = 1 + 3 n actions of a state,
S observation, A action, X further rows, Z numbers of an update's noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from agents.domain_sac import DomainBatch, DomainSAC
from agents.squashed import squashed_log_density


class Conservative(NamedTuple):
    """The term of a batch of states."""

    gap_GB: Tensor  # what is in brackets, within its bounds
    gradient_GKB: Tensor  # with respect to the values


def conservative_term(
    q_GKB: Tensor, log_density_GnB: Tensor | None, temperature_G11: Tensor, weight_GB: Tensor,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Conservative:  # fmt: skip
    """The term and its gradient.

    Args:
        q_GKB: values of the row's own action, then of the drawn ones.
        log_density_GnB: log p_k of the drawn actions `(G, K - 1, B)`; None: no importance sampling.
        temperature_G11: tau.
        weight_GB: of each row in the sum; broadcasts.
        bounds: a row's gap counts as at least and at most these; one beyond them passes no gradient.
    """
    q, sampled = q_GKB[:, 0], log_density_GnB is not None
    scores = (q_GKB[:, 1:] - log_density_GnB if log_density_GnB is not None else q_GKB) / temperature_G11
    gap = torch.logsumexp(scores, dim=1) * temperature_G11.squeeze(1) - q
    low, high = bounds
    bounded = gap if low is None and high is None else gap.clamp(low, high)
    pull = weight_GB * (bounded == gap)
    gradient = torch.zeros_like(q_GKB)
    pushed = gradient[:, 1:] if sampled else gradient
    torch.mul(scores.softmax(dim=1), pull.unsqueeze(1), out=pushed)
    gradient[:, 0].sub_(pull)
    return Conservative(bounded, gradient)


def uniform_actions(noise: Tensor) -> Tensor:
    """Actions uniform in (-1, 1) from standard normal numbers."""
    return torch.erf(noise * math.sqrt(0.5))


def uniform_log_density(action_dim: int) -> float:
    """That of actions uniform in [-1, 1]^A."""
    return -action_dim * math.log(2.0)


class SourcePenalty:
    """CQL's term on the source rows of a minibatch, for one update (an `agents.domain_sac.CriticPenalty`).

    Args:
        weight_MB: of each source row.
        temperature_M11: tau of each member.
        noise_MZ: `noise_size` standard normal numbers of each member.
        num_actions: n.
        importance_sampling: whether log p_k counts.
        bounds: of a row's gap.
    """

    def __init__(
        self, weight_MB: Tensor, temperature_M11: Tensor, noise_MZ: Tensor, num_actions: int,
        importance_sampling: bool = True, bounds: tuple[float | None, float | None] = (None, None),
    ) -> None:  # fmt: skip
        self.weight_MB, self.temperature_M11, self.noise_MZ = weight_MB, temperature_M11, noise_MZ
        self.num_actions, self.importance_sampling, self.bounds = num_actions, importance_sampling, bounds
        self._log_density_MnB = torch.empty(0)

    @staticmethod
    def noise_size(num_actions: int, num_source: int, action_dim: int) -> int:
        """Z, numbers of an update of a member."""
        return 3 * num_actions * num_source * action_dim

    def rows(self, sac: DomainSAC, batch: DomainBatch, noise_KMBA: Tensor) -> Tensor:
        """The drawn actions beside their states: `(M, 3 n B, S + A)`, uniform ones, those of pi(.|s), of pi(.|s')."""
        n, b, s, a, settings = self.num_actions, batch.num_source, sac.observation_dim, sac.action_dim, sac.settings
        rows = batch.rows_MBW[:, :b]
        m, obs, next_obs = len(rows), rows[..., :s], rows[..., s + a + 2 :]
        uniform, *draws = self.noise_MZ.view(m, 3, n, b, a).unbind(1)
        out_MRO, _ = sac.actor.forward(torch.cat((obs, next_obs), 1))
        actions = [uniform_actions(uniform)]
        densities = [uniform.new_full((m, n, b), uniform_log_density(a))]
        for out_MBO, z in zip(out_MRO.split(b, dim=1), draws, strict=True):
            mean, log_std = out_MBO.unsqueeze(1).split(a, dim=-1)
            log_std = log_std.clamp(settings.log_std_min, settings.log_std_max)
            u = torch.addcmul(mean, log_std.exp(), z)
            actions.append(u.tanh())
            densities.append(squashed_log_density(z, log_std, u))
        self._log_density_MnB = torch.cat(densities, 1)
        states = obs.unsqueeze(1).expand(m, 3 * n, b, s)
        return torch.cat((states, torch.cat(actions, 1)), -1).view(m, 3 * n * b, s + a)

    def gradient(self, q_MNB: Tensor, q_MNX: Tensor) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        m, critics, size = q_MNB.shape
        b = self.weight_MB.shape[1]
        own, drawn = q_MNB[..., :b].unsqueeze(2), q_MNX.view(m, critics, -1, b)
        q_GKB = torch.cat((own, drawn), 2).view(m * critics, -1, b)
        density = self._log_density_MnB if self.importance_sampling else None
        of_members = (density, self.temperature_M11, self.weight_MB)
        log_p, temperature, weight = (None if t is None else t.repeat_interleave(critics, dim=0) for t in of_members)
        assert temperature is not None
        assert weight is not None
        gap, grad = conservative_term(q_GKB, log_p, temperature, weight, self.bounds)
        grad_MNKB = grad.view(m, critics, -1, b)
        of_batch = q_MNB.new_zeros(m, critics, size)
        of_batch[..., :b] = grad_MNKB[:, :, 0]
        metrics = {
            "conservative_gap": gap.view(m, -1).mean(1),
            "q_random": drawn[:, :, : self.num_actions].flatten(1).mean(1),
        }
        return of_batch, grad_MNKB[:, :, 1:].flatten(2), metrics
