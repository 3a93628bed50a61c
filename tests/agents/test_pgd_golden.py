"""Guided sampling held against numbers of the release of policy-guided diffusion.

`golden/pgd_guidance.npz` holds what EmptyJackson/policy-guided-diffusion at commit 9da606c, `sample_trajectory` of
diffusion/edm.py, computes (jax 0.10.2, CPU) for the inputs that `Inputs` draws with `numpy.random.RandomState`, whose
streams are fixed for good. To repeat it, for every trajectory: a denoiser state whose `apply_fn` is `Inputs.network`,
policies tanh(relu(s W + b) W' + b')
of `Inputs.policy` (deterministic, or the mean of a Normal with `Inputs.log_std`), 8 `diffusion_timesteps`, the other
settings as released, `jax.random.normal` replaced by the draws in the order of the calls (one at the start and one in
every step, also where it is not used), `construct_rollout` by the identity, `lax.scan` by a loop.

Kept are the standardised trajectory at the end, and what the network was given in the first step, after guidance and
noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.actors import GaussianActor, TanhActor
from agents.edm_sampler import SamplerConfig, Schedule, sample
from agents.guidance import GuidanceConfig, PolicyScore, StepGuidance, step_coefficients
from agents.networks import StackedMLP
from agents.trajectories import TrajectoryScaling
from tests.agents.golden_values import parameter_blocks

GOLDEN = Path(__file__).parent / "golden" / "pgd_guidance.npz"
STEPS, BATCH, LENGTH, OBS, ACT = 8, 3, 5, 3, 2
CHANNELS = OBS + ACT + 2
CASES = {  # policy, normalised, at the denoised point, lambda, delay
    "unguided": (None, False, False, 0.0, 0),
    "tanh_raw_noisy": ("tanh", False, False, 20.0, 0),
    "tanh_raw_denoised": ("tanh", False, True, 20.0, 0),
    "tanh_unit_noisy": ("tanh", True, False, 4.0, 0),
    "tanh_unit_denoised": ("tanh", True, True, 1.0, 0),
    "gaussian_raw_noisy": ("gaussian", False, False, 20.0, 0),
    "gaussian_raw_denoised": ("gaussian", False, True, 20.0, 0),
    "gaussian_unit_noisy": ("gaussian", True, False, 4.0, 0),
    "gaussian_unit_denoised": ("gaussian", True, True, 1.0, 0),
    "tanh_unit_denoised_delayed": ("tanh", True, True, 4.0, 2),
}


@dataclass
class Inputs:
    """A network F, a policy, statistics and draws."""

    def __post_init__(self) -> None:
        rng = np.random.RandomState(7)

        def uniform(*shape: int) -> Tensor:
            return torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32))

        self.w1, self.b1, self.t1 = uniform(CHANNELS, 16), uniform(16), uniform(16)
        self.w2, self.mix = 0.2 * uniform(16, CHANNELS), 0.4 * uniform(LENGTH, LENGTH)
        self.policy = uniform(OBS, 6), uniform(6), uniform(6, ACT), 0.3 * uniform(ACT)  # weight, bias, ...
        self.log_std = torch.tensor([-0.5, 0.3])
        observation_mean, observation_std = uniform(OBS), 0.5 + uniform(OBS).abs()
        # so small that no action is saturated at the first noise level: there a slope is what rounding leaves of it
        action_mean, action_std = 0.3 * uniform(ACT), 0.03 * (0.5 + uniform(ACT).abs())
        one = torch.ones(())
        self.scaling = TrajectoryScaling(
            observation_mean, observation_std, action_mean, action_std, 0 * one, one, 0 * one, one
        )
        noise = rng.standard_normal((STEPS + 1, BATCH, LENGTH, CHANNELS))
        self.noise = torch.from_numpy(noise.astype(np.float32))
        self.given: list[Tensor] = []

    def network(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.given.append(x)
        return self.mix @ (torch.tanh(x @ self.w1 + self.b1 + c_noise * self.t1) @ self.w2)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = sigma**2 + 1
        return x / total + sigma / total.sqrt() * self.network(x / total.sqrt(), sigma.log() / 4)

    def actor(self, kind: str) -> TanhActor | GaussianActor:
        network = StackedMLP((1,), (OBS, 6, ACT))
        for block, values in zip(parameter_blocks(network), self.policy, strict=True):
            block.copy_(values)
        return TanhActor(network) if kind == "tanh" else GaussianActor(network, log_std=self.log_std.view(1, 1, ACT))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.mark.parametrize("name", CASES)
def test_guided_sampling_is_the_releases(name, golden):
    kind, normalise, denoised, coef, delay = CASES[name]
    inputs = Inputs()
    sampler = SamplerConfig(num_steps=STEPS, predictor="release")
    steering = None
    if kind is not None:
        config = GuidanceConfig(
            coef=coef, normalise=normalise, denoised=denoised, reuse=False, delay=delay, coef_steps=None
        )
        steering = StepGuidance(
            PolicyScore(inputs.actor(kind), inputs.scaling), torch.full((BATCH,), coef), slice(OBS, OBS + ACT), config,
            step_coefficients(config, sampler),
        )  # fmt: skip
    schedule = Schedule.of(sampler)
    used = [0] + [i + 1 for i, hat in enumerate(schedule.churned) if hat > schedule.levels[i]]
    draws = iter(inputs.noise[used])
    x = sample(inputs.denoise, lambda: next(draws), sampler, steering)
    first = inputs.given[1 if denoised and not delay else 0]  # behind the look at the denoised point
    assert float((first - torch.from_numpy(golden[f"{name}_first"])).abs().max()) < 1e-5
    expected = torch.from_numpy(golden[name])
    assert float((x - expected).abs().max() / expected.abs().max()) < 1e-5
    if kind is not None:  # and so is what guidance alone has changed
        change = expected - torch.from_numpy(golden["unguided"])
        error = x - expected
        assert float(error.abs().max() / change.abs().max()) < 1e-4
