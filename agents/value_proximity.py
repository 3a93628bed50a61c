"""Which source transitions lead to states that are worth what the target domain's would be: the fictitious value
proximity (FVP) of VGDF (Xu et al., NeurIPS 2023, arXiv 2305.17625, section 4.2 and equations 5-6) and its gate.

An ensemble of the target domain's dynamics says where (s, a) would lead there. Its members' *fictitious values* F_i
make a normal distribution, and the density of the source transition's own value v under it is its proximity:

    Lambda = N( v; mean_i F_i, std_i F_i + 1e-8 ),    the standard deviation with divisor E - 1

    form   F_i                                                    v
    paper  alive(s^_i) Q(s^_i, a^_i),                             (1 - d) Q(s', a')
           s^_i ~ N(s + mu_i, sigma_i^2), a^_i ~ pi(.|s^_i)
    code   r^_i + gamma alive(s^_i) Q(s^_i, tanh m(s^_i)),        r + gamma (1 - d) Q(s', a')
           (r^_i, s^_i - s) = mu_i + sigma_i^2

with Q = min_k Qbar_k, a' ~ pi(.|s') the action of the critics' target, m the policy's mean before the tanh, and alive
the environment's termination rule (a terminal state is worth nothing; the paper's equations leave that unsaid). `code`
is what the released code (Kavka1/VGDF 9f65d60, agent/vgdf.py) computes: it adds the variance to the mean, draws
nothing, and takes a mean action on one side and a drawn one on the other.

The rows of greatest Lambda pass (`agents.source_filters`).

Shapes: M member, E ensemble member, N critic, B source row, S observation, A action, K noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agents.critics import bellman_target
from agents.domain_sac import DomainBatch, DomainSAC, Targets
from agents.source_filters import Accepted, accept, filtered

FORMS = ("code", "paper")
Prediction = Callable[[Tensor], tuple[Tensor, Tensor]]
_STD_OFFSET = 1e-8
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Proximity(NamedTuple):
    """How near source rows' values are to the fictitious ones, each `(M, B)`."""

    log_density: Tensor  # log Lambda
    mean: Tensor  # of F_i
    std: Tensor  # of F_i
    value: Tensor  # v


def num_fictitious_noises(
    form: str, ensemble_size: int, num_source: int, batch: int, obs_dim: int, action_dim: int
) -> int:
    """Standard normal draws `(M, batch, A)` that hold what fictitious values of `num_source` rows take."""
    if form == "code":
        return 0
    return -(-ensemble_size * num_source * (obs_dim + action_dim) // (batch * action_dim))


def fictitious_values(
    sac: DomainSAC,
    obs_MBS: Tensor,
    prediction: tuple[Tensor, Tensor],
    terminated: Callable[[Tensor], Tensor],
    form: str,
    noise_KMBA: Tensor,
) -> Tensor:
    """F_i, `(M, E, B)`.

    Args:
        sac: whose policy and target critics value the states.
        obs_MBS: s.
        prediction: mean and variance `(M, E, B, 1 + S)` of [r, s' - s] in the target domain.
        terminated: of states `(..., S)`, whether they end the episode, `(...)`.
        form: one of FORMS.
        noise_KMBA: draws, at least `num_fictitious_noises` of them.
    """
    mean_MEBX, variance_MEBX = prediction
    m, e, b, _ = mean_MEBX.shape
    if form == "code":
        predicted = mean_MEBX + variance_MEBX
        next_obs = (predicted[..., 1:] + obs_MBS.unsqueeze(1)).view(m, e * b, -1)
        action = sac.sample_actions(next_obs, None)
    else:
        s, a = sac.observation_dim, sac.action_dim
        numbers = noise_KMBA.transpose(0, 1).reshape(m, -1)[:, : e * b * (s + a)]
        of_state, of_action = numbers.split((e * b * s, e * b * a), dim=1)
        drawn = torch.addcmul(mean_MEBX[..., 1:], variance_MEBX[..., 1:].sqrt(), of_state.reshape(m, e, b, s))
        next_obs = drawn.add_(obs_MBS.unsqueeze(1)).view(m, e * b, s)
        action = sac.sample_actions(next_obs, of_action.reshape(m, e * b, a))
    value = sac.target_values(next_obs, action).amin(1)
    value = value.masked_fill_(terminated(next_obs), 0.0).view(m, e, b)
    return value if form == "paper" else torch.add(predicted[..., 0], value, alpha=sac.settings.gamma)


def proximity(value_MB: Tensor, fictitious_MEB: Tensor) -> Proximity:
    """log Lambda of source values v. A row whose value or fictitious values are not numbers is infinitely far."""
    std_MB, mean_MB = torch.std_mean(fictitious_MEB, dim=1)
    scale = std_MB + _STD_OFFSET
    z = (value_MB - mean_MB) / scale
    log_density = z.square().mul_(-0.5).sub_(scale.log()).sub_(_HALF_LOG_2PI)
    return Proximity(log_density.nan_to_num_(nan=-math.inf), mean_MB, std_MB, value_MB)


def gate_metrics(near: Proximity, accepted: Accepted) -> dict[str, Tensor]:
    """What the gate does, each `(M,)`: finite as long as values are."""
    passes_MB = accepted.passes_MB
    quarter = max(1, near.std.shape[1] // 4)
    smallest = torch.zeros_like(passes_MB).scatter_(1, near.std.topk(quarter, dim=1, largest=False).indices, 1.0)
    return {
        "gate/accepted": passes_MB.mean(1),
        "gate/log_density": near.log_density.mean(1),
        "gate/threshold": accepted.threshold_M,
        "gate/fictitious_std": near.std.mean(1),
        "gate/value_gap": (near.value - near.mean).abs().mean(1),
        # the density is the greater the smaller the spread: what share of those that pass is of the smallest quarter
        "gate/small_spread_share": (passes_MB * smallest).sum(1) / passes_MB.sum(1).clamp(min=1.0),
    }


@dataclass(frozen=True)
class ValueGate:
    """Which source rows the critics learn from, and how much.

    Args:
        form: of the values compared, one of FORMS.
        gate, keep_fraction, loss_weight: see `agents.source_filters`.
        termination: the target's rule, of states `(..., S)`.
    """

    form: str
    gate: str
    keep_fraction: float
    loss_weight: str
    termination: Callable[[Tensor], Tensor]

    def __call__(
        self, sac: DomainSAC, predict: Prediction, batch: DomainBatch, targets: Targets,
        noise_KMBA: Tensor, with_metrics: bool,
    ) -> tuple[DomainBatch, dict[str, Tensor]]:  # fmt: skip
        """The minibatch with its source rows filtered, and metrics `(M,)`.

        Args:
            predict: the target's dynamics of `[s, a]` (see `agents.target_dynamics`).
            batch: of both domains; each row's weight is 1 over the number of its domain's.
            targets: of all of them.
            noise_KMBA: draws, at least `num_fictitious_noises`.
        """
        s, a, num_source = sac.observation_dim, sac.action_dim, batch.num_source
        source = batch.rows_MBW[:, :num_source]
        fictitious = fictitious_values(
            sac, source[..., :s], predict(source[..., : s + a]), self.termination, self.form, noise_KMBA
        )
        value, done = targets.value_MB[:, :num_source], source[..., s + a + 1]
        if self.form == "code":
            value = bellman_target(source[..., s + a], done, value, sac.settings.gamma)
        else:
            value = torch.addcmul(value, done, value, value=-1.0)
        near = proximity(value, fictitious)
        accepted = accept(near.log_density, self.keep_fraction, self.gate)
        batch = filtered(batch, accepted, self.loss_weight)
        return batch, gate_metrics(near, accepted) if with_metrics else {}
