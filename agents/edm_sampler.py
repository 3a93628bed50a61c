"""Sampling from a denoiser: the stochastic sampler of EDM (Karras, Aittala, Aila and Laine, NeurIPS 2022, algorithm 2).

From x at noise level sigma_i to sigma_{i+1}, with gamma_i = min(churn / n, sqrt(2) - 1) where sigma_i is between s_tmin
and s_tmax, else 0:

    sigma^ = (1 + gamma_i) sigma_i,  x^ = x + sqrt(sigma^^2 - sigma_i^2) s_noise eps             (noise)
    d = (x^ - D(x^; sigma^)) / sigma^,  x' = x^ + (sigma_{i+1} - sigma^) d                       (Euler's step)
    d' = (x' - D(x'; sigma_{i+1})) / sigma_{i+1},  x' = x^ + (sigma_{i+1} - sigma^) (d + d') / 2    (Heun's)

Heun's is left out where sigma_{i+1} = 0, so n steps take 2n - 1 calls of the denoiser. The released code of
policy-guided diffusion (EmptyJackson/policy-guided-diffusion 9da606c, diffusion/edm.py) lets Euler's step begin at x
instead of x^, `predictor="release"`: with Heun's step that hardly matters, without it the samples collapse.

Noise levels are numbers of the host, so nothing here waits for a device. What is random is drawn by one generator per
member, step after step: a member gets the same numbers alone as in any pack.

Shapes: M member, B trajectory of a member, N = M x B, H row of a trajectory, C channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agents.checks import check_choice, check_not_negative, check_positive
from agents.chunk import PRECISIONS
from agents.edm import Denoise, noise_levels
from agents.randomness import generator
from envs.errors import UserError

PREDICTORS = ("edm", "release")
TERMINALS = ("generated", "rule", "none")
MAX_GAMMA = math.sqrt(2) - 1


@dataclass
class SamplerConfig:
    """How trajectories are drawn from a denoiser (`method.sampler.*`). Defaults are the release's but for the steps."""

    num_steps: int = 64  # n; the release takes 256
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 80.0  # S_churn; 0: deterministic but for the first draw
    s_tmin: float = 0.05
    s_tmax: float = 50.0
    s_noise: float = 1.003
    order: int = 2  # 2: Heun | 1: Euler, half the calls
    predictor: str = "edm"  # edm: Euler's step begins at the churned point | release: at the point before
    terminals: str = "generated"  # generated: the done channel | rule: the environment's, of s' | none, as the release
    precision: str = "float32"  # of matrix products: float32 | mixed (bfloat16 on a CPU, TF32 on CUDA)

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise UserError(f"method.sampler.num_steps={self.num_steps} must be at least 2")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(
                f"method.sampler.sigma_min={self.sigma_min} must lie between 0 and sigma_max={self.sigma_max}"
            )
        check_positive(self, "rho", part="method.sampler")
        check_not_negative(self, "churn", "s_tmin", "s_tmax", "s_noise", part="method.sampler")
        if self.order not in (1, 2):
            raise UserError(f"method.sampler.order={self.order} must be 1 (Euler) or 2 (Heun)")
        for name, choices in (("predictor", PREDICTORS), ("terminals", TERMINALS), ("precision", PRECISIONS)):
            check_choice(self, name, choices, "method.sampler")
        if self.order == 1 and self.predictor == "release":
            raise UserError(
                "method.sampler.order=1 with method.sampler.predictor=release samples a single point instead of a "
                "distribution; take predictor=edm or order=2"
            )


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a sampling, on the host.

    Args:
        levels: sigma_0 .. sigma_n, the last 0; n + 1 of them.
        churned: sigma^ of every step, n of them; equal to sigma_i where nothing is added.
    """

    levels: tuple[float, ...]
    churned: tuple[float, ...]

    @classmethod
    def of(cls, config: SamplerConfig) -> Schedule:
        levels = noise_levels(config.num_steps, config.sigma_min, config.sigma_max, config.rho).tolist()
        gamma = min(config.churn / config.num_steps, MAX_GAMMA)
        churned = (s * (1 + gamma) if config.s_tmin <= s <= config.s_tmax else s for s in levels[:-1])
        return cls(tuple(levels), tuple(churned))

    @property
    def num_calls(self) -> int:
        """Calls of the denoiser that a sampling of second order takes."""
        return 2 * len(self.churned) - 1


class MemberNoise:
    """Standard normal draws for M members, one generator each.

    Args:
        seeds: of the members' runs.
        counters: epoch, shard: distinct counters give independent streams.
        shape: (B, H, C) of a member's trajectories.
    """

    def __init__(
        self, seeds: Sequence[int], counters: tuple[int, ...], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self._sources = [generator(seed, "trajectories", *counters, device=device) for seed in seeds]
        self._noise = torch.empty((len(seeds), *shape), device=device)

    def __call__(self) -> Tensor:
        """(N, H, C), members one after the other; overwritten by the next call."""
        for member, source in zip(self._noise, self._sources, strict=True):
            member.normal_(generator=source)
        return self._noise.flatten(0, 1)


class Steering(Protocol):
    """Moves samples before a step's noise is added (see `agents.guidance.StepGuidance`)."""

    def acts(self, step: int) -> bool:
        """Whether this step, counted from 0, is one before which samples are moved."""

    def point(self, x_NHC: Tensor, last_NHC: Tensor | None, denoise: Callable[[Tensor], Tensor]) -> Tensor:
        """Where to look for the direction, `(N, H, C)`.

        Args:
            last_NHC: what the denoiser made of Heun's point of this noise level in the last step, if there was one.
            denoise: D(.; sigma_i).
        """

    def move(self, x_NHC: Tensor, point_NHC: Tensor, step: int) -> None:
        """Move x in place."""


@torch.inference_mode()
def sample(
    denoise: Denoise,
    draw: Callable[[], Tensor],
    config: SamplerConfig,
    steering: Steering | None = None,
) -> Tensor:
    """Draw trajectories.

    Args:
        denoise: D(x; sigma), of standardised trajectories; sigma is a tensor () on their device.
        draw: standard normal numbers (N, H, C): called once for the start and once for every step that adds noise; they
            are not changed, and need not outlive the next call.
        steering: moves the samples before every step.

    Returns:
        (N, H, C), standardised.
    """
    schedule = Schedule.of(config)
    noise = draw()
    levels, churned = (torch.tensor(x, device=noise.device) for x in (schedule.levels, schedule.churned))
    x = noise * schedule.levels[0]
    last: Tensor | None = None
    for i, hat in enumerate(schedule.churned):
        sigma, following = schedule.levels[i : i + 2]
        if steering is not None and steering.acts(i):
            at = levels[i]
            steering.move(x, steering.point(x, last, lambda y, at=at: denoise(y, at)), i)  # type: ignore[misc]
        x_hat = x
        if hat > sigma:
            x_hat = torch.add(x, draw(), alpha=config.s_noise * math.sqrt(hat**2 - sigma**2))
        slope = (x_hat - denoise(x_hat, churned[i])) / hat
        start = x if config.predictor == "release" else x_hat
        x = torch.add(start, slope, alpha=following - hat)
        last = None
        if config.order == 2 and following > 0:
            last = denoise(x, levels[i + 1])
            slope += (x - last) / following
            x = torch.add(x_hat, slope, alpha=0.5 * (following - hat))
    return x
