"""Guidance of sampled trajectories towards policies (policy-guided diffusion, Jackson et al., RLC 2024, 2404.06356).

A denoiser of sub-trajectories samples p_b, what the behaviour policy b does. Guidance bends that towards
p_lambda ~ p_b(tau) prod_t pi(a_t | s_t)^lambda. What it needs of a policy pi is the *score* g: the gradient of
sum_t log pi(tanh(std a_t + mean) | s_t) with respect to the actions as the sampler has them, before the tanh and
standardised; through tanh and affine map by the chain rule, without a log-determinant, states un-standardised. States
get no slope of their own: they follow their actions as the data have it. Deterministic policies count as N(pi(s), 1);
a standard deviation d instead would be lambda / d^2.

`rule="code"` is what the authors' release does (EmptyJackson/policy-guided-diffusion 9da606c, diffusion/edm.py, lines
149-214). Before step i of n

    a <- a + lambda_i g(y),  lambda_i = lambda (1 - i/n + cosine_coef sin(pi (i + 1) / n)),  none before the last step,

where y is D(x; sigma_i) (`denoised`) or x itself, and g is divided by its norm over all H x A numbers of a trajectory
(`normalise`). lambda is a dial then, and not the exponent above:

- A step moves an action by about lambda_i / sqrt(H A) standard deviations, so the same lambda is stronger where H x A
  is smaller (the toy of benchmarks/pgd_toy.py: 1.58 with 192 numbers, 0.80 with 768). Steps much longer than one
  standard deviation overshoot.
- There are n steps, so it is stronger with more of them: 0.31 with 32, 1.58 with 256. `coef_steps` undoes that: lambda
  is multiplied by what it takes for all steps together to move a mean as far as they do when there are `coef_steps`
  of them, to first order and for Gaussian data, for which that is known (`response`): by 5.3 with 32 steps for 256. In
  the toy the mean is then the same within 2 % from 16 steps on.
- g as it is (`normalise=false`) collapses onto the mode of pi for any lambda that does much, since it is added n times
  at a length that no noise level scales.
- g / (norm + 1e-8) here is g / norm + 1e-8 in the release: not a number where the norm is 0, else different by 1e-8.

`reuse` takes for D(x; sigma_i) what the denoiser has made of Heun's point at this level in the step before, so that
guidance costs one call of the denoiser in all. In the toy means are the same within 1 % with 32 steps.

`rule="score"` samples p_lambda itself. Behind a point x lies a posterior of noiseless trajectories, whose mean is
D(x; sigma); with exp(w a) as a factor its mean is D(x + sigma^2 w; sigma), whatever the data's distribution (the square
is completed). So the guided denoiser is

    D'(x; sigma) = D(x + sigma^2 w; sigma),  w = lambda g(D) / (1 + lambda V h(D)),

w added to actions, at twice the calls of the denoiser. To first order that is D + sigma^2 J^T w with the Jacobian J of
D (which is symmetric where D is exact), and needs no pass back through the network. With h = 0 (`smoothing=false`) w
is the slope of log pi^lambda at the posterior's mean. With `smoothing` h is its curvature -dg/da, by a difference of g
along the actions, and V the posterior's variance: that is exact for Gaussians. V is taken to be that of data of unit
variance, which standardised channels have, sigma^2 / (1 + sigma^2). Without smoothing, policies that are sharper than
the posterior make samples diverge. lambda is the exponent of the target, whatever the steps, H and A.

Shapes: M member, B trajectory of a member, N = M x B, H row of a trajectory, C channel, S observation, A action.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agents.actors import Actor
from agents.checks import check_choice, check_not_negative
from agents.edm import Denoise
from agents.edm_sampler import SamplerConfig, Schedule
from agents.method import per_member
from agents.trajectories import TrajectoryScaling
from envs.errors import UserError

RULES = ("code", "score")
NORM_EPS = 1e-8
MIN_GUIDED_STEPS = 16  # with fewer the sampler itself is off by more than guidance is worth (benchmarks/pgd_toy.py)
COLLAPSE = 0.1  # lambda of raw gradients, with 256 steps, from which samples collapse (the same)
_DIFFERENCE = 0.01  # of standardised actions, for the curvature

Score = Callable[[Tensor], Tensor]  # x (N, H, C) -> g (N, H, A)


@dataclass
class GuidanceConfig:
    """Towards which target, and how, trajectories are guided (`method.guidance.*`)."""

    rule: str = "code"  # code: as released | score: D' of the target p_b pi^lambda
    coef: float = per_member(1.0, off_at_zero=True)  # lambda; 0: unguided
    # rule=code
    cosine_coef: float = 0.3
    delay: int = 0  # steps that pass before the first guided one
    normalise: bool = True  # over the H x A numbers of a trajectory; released default: false, which collapses
    denoised: bool = True  # direction at D(x; sigma), not at x; released default: false
    reuse: bool = True  # the D of Heun's last step for it: no further call of the denoiser; released: false
    coef_steps: int | None = 256  # sampling steps with which coef means what it says; null: with any, as released
    allow_collapse: bool = False  # raw gradients of a strength that is known to collapse
    # rule=score
    smoothing: bool = True  # of the policy's likelihood over the denoiser's posterior

    def __post_init__(self) -> None:
        check_choice(self, "rule", RULES, "method.guidance")
        check_not_negative(self, "coef", "cosine_coef", "delay", part="method.guidance")
        if self.coef_steps is not None and self.coef_steps < 3:
            raise UserError(f"method.guidance.coef_steps={self.coef_steps} must be at least 3, or null")


def check_guidance(guidance: GuidanceConfig, sampler: SamplerConfig) -> None:
    """What a configuration of both has to agree in.

    Raises:
        UserError: it does not, or is known to collapse.
    """
    if guidance.coef == 0:
        return
    if sampler.num_steps < MIN_GUIDED_STEPS:
        raise UserError(
            f"method.sampler.num_steps={sampler.num_steps} is too few for guidance: take {MIN_GUIDED_STEPS} or more, "
            "or method.guidance.coef=0"
        )
    if guidance.rule == "score":
        return
    if guidance.delay >= sampler.num_steps - 1:
        raise UserError(
            f"method.guidance.delay={guidance.delay} leaves no guided step of method.sampler.num_steps="
            f"{sampler.num_steps}, whose last is never guided"
        )
    if guidance.normalise or guidance.allow_collapse:
        return
    # in terms of 256 steps, with which it was measured
    strength = guidance.coef * _scale(guidance, sampler, guidance.coef_steps) / _scale(guidance, sampler, 256)
    if strength > 0.999 * COLLAPSE:  # equal but for rounding
        raise UserError(
            f"method.guidance.coef={guidance.coef} with normalise=false: raw gradients of that size collapse onto the "
            "policy's mode; set method.guidance.normalise=true or rule=score, or allow_collapse=true to see it"
        )


def step_coefficient(step: int, num_steps: int, cosine_coef: float, delay: int = 0) -> float:
    """lambda_i / lambda of `rule="code"` before step i of n; 0 before the last."""
    if not delay <= step < num_steps - 1:
        return 0.0
    return 1.0 - step / num_steps + cosine_coef * math.sin(math.pi * (step + 1) / num_steps)


def response(schedule: Schedule, order: int, coefficients: Sequence[float]) -> float:
    """How far guidance moves the mean of a sampling, per unit of its direction.

    Exact for data N(0, 1) and their denoiser D(x; sigma) = x / (1 + sigma^2), for which a step multiplies the mean by a
    number.

    Args:
        order: 2 with Heun's steps, 1 without.
        coefficients: what is added before each step.
    """
    mean = 0.0
    for coefficient, hat, following in zip(coefficients, schedule.churned, schedule.levels[1:], strict=True):
        mean += coefficient
        slope = mean * hat / (1.0 + hat**2)
        after = mean + (following - hat) * slope
        if order == 2 and following > 0:
            after = mean + 0.5 * (following - hat) * (slope + after * following / (1.0 + following**2))
        mean = after
    return mean


def _response(guidance: GuidanceConfig, sampler: SamplerConfig, num_steps: int) -> float:
    """Of `rule="code"` with the sampler's settings but for the number of steps; a delay left out."""
    schedule = Schedule.of(replace(sampler, num_steps=num_steps))
    coefficients = [step_coefficient(i, num_steps, guidance.cosine_coef) for i in range(num_steps)]
    return response(schedule, sampler.order, coefficients)


def _scale(guidance: GuidanceConfig, sampler: SamplerConfig, num_steps: int | None) -> float:
    """What lambda is multiplied by for the sampler's steps to move a mean as far as another number of them."""
    if num_steps is None or num_steps == sampler.num_steps:
        return 1.0
    return _response(guidance, sampler, num_steps) / _response(guidance, sampler, sampler.num_steps)


def step_coefficients(guidance: GuidanceConfig, sampler: SamplerConfig) -> tuple[float, ...]:
    """What `rule="code"` multiplies lambda by before each step, `coef_steps` included."""
    n, scale = sampler.num_steps, _scale(guidance, sampler, guidance.coef_steps)
    return tuple(scale * step_coefficient(i, n, guidance.cosine_coef, guidance.delay) for i in range(n))


@dataclass(frozen=True)
class PolicyScore:
    """The score g of policies.

    Args:
        actor: lead (M,), taking observations as the model's data have them.
        scaling: of the trajectories.
    """

    actor: Actor
    scaling: TrajectoryScaling

    def __call__(self, x_NHC: Tensor) -> Tensor:
        """(N, H, C) -> (N, H, A); N trajectories are M members' one after the other."""
        obs_NHS = self.scaling.observations(x_NHC)
        action_NHA = self.scaling.pre_tanh_actions(x_NHC).tanh()
        members = self.actor.num_members
        gradient = self.actor.log_prob_gradient(
            obs_NHS.reshape(members, -1, obs_NHS.shape[-1]),
            action_NHA.view(members, -1, action_NHA.shape[-1]),
        )
        return gradient.view_as(action_NHA) * (1.0 - action_NHA.square()) * self.scaling.action_std


@dataclass(frozen=True)
class StepGuidance:
    """`rule="code"`, as the sampler's steering.

    Args:
        score: see `PolicyScore`.
        coef_N: lambda of every trajectory.
        actions: columns of the actions in x.
        coefficients: of `step_coefficients`.
    """

    score: Score
    coef_N: Tensor
    actions: slice
    config: GuidanceConfig
    coefficients: Sequence[float]

    def acts(self, step: int) -> bool:
        return self.coefficients[step] != 0

    def point(self, x_NHC: Tensor, last_NHC: Tensor | None, denoise: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.config.denoised:
            return x_NHC
        return last_NHC if self.config.reuse and last_NHC is not None else denoise(x_NHC)

    def move(self, x_NHC: Tensor, point_NHC: Tensor, step: int) -> None:
        gradient = self.score(point_NHC)
        if self.config.normalise:
            gradient = gradient / (torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True) + NORM_EPS)
        coef = self.coef_N.view(-1, 1, 1)
        action = x_NHC[..., self.actions]
        moved = torch.addcmul(action, coef, gradient, value=self.coefficients[step])
        x_NHC[..., self.actions] = torch.where(coef != 0, moved, action)


@dataclass(frozen=True)
class ScoreGuidedDenoiser:
    """`rule="score"`: the denoiser D' of the guided trajectories.

    Args:
        denoise: D.
        score: see `PolicyScore`.
        coef_N: lambda of every trajectory.
        actions: columns of the actions in x.
    """

    denoise: Denoise
    score: Score
    coef_N: Tensor
    actions: slice
    config: GuidanceConfig

    def __call__(self, x_NHC: Tensor, sigma: Tensor) -> Tensor:
        pull = self._pull(self.denoise(x_NHC, sigma), sigma)
        shifted = x_NHC.clone()
        shifted[..., self.actions] += sigma.square() * pull
        return self.denoise(shifted, sigma)

    def _pull(self, denoised_NHC: Tensor, sigma: Tensor) -> Tensor:
        """w; 0 where lambda is."""
        coef = self.coef_N.view(-1, 1, 1)
        slope = coef * self.score(denoised_NHC)
        if self.config.smoothing:
            shifted = denoised_NHC.clone()
            shifted[..., self.actions] += _DIFFERENCE
            curvature = ((slope - coef * self.score(shifted)) / _DIFFERENCE).clamp_min(0.0)
            slope = slope / (1.0 + sigma.square() / (1.0 + sigma.square()) * curvature)
        return torch.where(coef != 0, slope, 0.0)
