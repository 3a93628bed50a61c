"""Squashed Gaussian policies: actions, log densities and the gradients that train them, from the networks' outputs.

A policy's network gives [mu(s), log sigma(s)], and a = tanh(u) with u = mu + sigma eps. Its density is

    log pi = sum [ -eps^2 / 2 - log sigma - log(2 pi) / 2 - log(1 - a^2) ],
    log(1 - a^2) = 2 (log 2 - u - softplus(-2 u)),

of which `policy_sample`, as released soft actor-critics do, takes 1 - a^2 + 1e-6, and `squashed_log_density` the exact
one.

Shapes: M member, B batch, S observation, A action, O = 2 A outputs of a policy's network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from agents.networks import StackedMLP

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
LARGEST_ACTION = 1.0 - 1e-6  # the density is infinite, or 0, at the bounds
_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class PolicyScalars(NamedTuple):
    """Numbers as tensors: torch converts a Python number anew in every call."""

    one: Tensor
    two: Tensor
    tiny: Tensor
    log_norm: Tensor

    @classmethod
    def make(cls, action_dim: int, device: torch.device | str) -> PolicyScalars:
        return cls(*(torch.tensor(c, device=device) for c in (1.0, 2.0, 1e-6, action_dim * _HALF_LOG_2PI)))


@dataclass(frozen=True)
class PolicySample:
    """An action drawn from the policy and what its gradient needs; axes (M, B, ...)."""

    action: Tensor
    log_prob: Tensor
    one_minus_sq: Tensor
    shifted: Tensor  # 1 - a^2 + 1e-6
    scaled_noise: Tensor
    clamped: Tensor  # where log_std is at a bound, so passes no gradient
    inputs: list[Tensor]


def policy_sample(
    actor: StackedMLP, obs_MBS: Tensor, noise_MBA: Tensor, scalars: PolicyScalars, log_std_min: float = LOG_STD_MIN,
    log_std_max: float = LOG_STD_MAX,
) -> PolicySample:  # fmt: skip
    """Actions of tanh-Gaussian policies and their log densities, whose 1 - a^2 is 1e-6 larger, as is usual."""
    out, inputs = actor.forward(obs_MBS)
    return sample_of_outputs(out, inputs, noise_MBA, scalars, log_std_min, log_std_max)


def sample_of_outputs(
    out_MBO: Tensor, inputs: list[Tensor], noise_MBA: Tensor, scalars: PolicyScalars, log_std_min: float,
    log_std_max: float,
) -> PolicySample:  # fmt: skip
    """`policy_sample` from the network's outputs [mean, log std] and its layers' inputs."""
    mean, raw_log_std = out_MBO.split(noise_MBA.shape[-1], dim=-1)
    log_std = raw_log_std.clamp(log_std_min, log_std_max)
    scaled_noise = log_std.exp().mul_(noise_MBA)
    action = (mean + scaled_noise).tanh_()
    one_minus_sq = torch.addcmul(scalars.one, action, action, value=-1.0)  # 1 - a^2
    shifted = one_minus_sq + scalars.tiny
    # log N(u) - log(1 - a^2 + 1e-6), summed over action dimensions
    terms = torch.addcmul(log_std, noise_MBA, noise_MBA, value=0.5).add_(shifted.log())
    log_prob = terms.sum(-1).add_(scalars.log_norm).neg_()
    return PolicySample(action, log_prob, one_minus_sq, shifted, scaled_noise, raw_log_std != log_std, inputs)


def policy_gradient(sample: PolicySample, dq_da_MBA: Tensor, alpha_M1: Tensor, scalars: PolicyScalars) -> Tensor:
    """Gradient of alpha log pi(a|s) - Q(s, a) of every row with respect to the actor's outputs, `(M, B, 2 A)`."""
    # d/da of alpha * log pi is 2 alpha a / (1 - a^2 + 1e-6); then through a = tanh(u)
    alpha = alpha_M1.unsqueeze(-1)
    grad_u = (sample.action / sample.shifted).mul_(alpha * scalars.two).sub_(dq_da_MBA).mul_(sample.one_minus_sq)
    grad_log_std = torch.addcmul(-alpha, grad_u, sample.scaled_noise)
    grad_log_std.masked_fill_(sample.clamped, 0.0)
    return torch.cat((grad_u, grad_log_std), dim=-1)


def squashed_log_density(z: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
    """log pi of a = tanh(u) with u = mu + sigma z, summed over action dimensions, `(..., A)` to `(...)`."""
    terms = torch.addcmul(log_std, z, z, value=0.5).add_((_LOG_2 - u - softplus(-2.0 * u)).mul_(2.0))
    return terms.add_(_HALF_LOG_2PI).sum(-1).neg_()


def squashed_sample(
    out: Tensor, noise: Tensor | None, log_std_min: float = LOG_STD_MIN, log_std_max: float = LOG_STD_MAX
) -> Tensor:
    """Actions from the actor's outputs `(..., 2A)`: tanh(mu + sigma * noise), or tanh(mu) where noise is None."""
    mean, log_std = out.chunk(2, dim=-1)
    if noise is None:
        return mean.tanh()
    return torch.addcmul(mean, log_std.clamp(log_std_min, log_std_max).exp_(), noise).tanh_()
