"""Guidance: its directions, its strength, and what it makes samplers sample."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from agents.edm_sampler import SamplerConfig, sample
from agents.guidance import (
    GuidanceConfig,
    PolicyScore,
    ScoreGuidedDenoiser,
    StepGuidance,
    check_guidance,
    step_coefficient,
    step_coefficients,
)
from agents.randomness import generator
from benchmarks import pgd_toy
from envs.errors import UserError
from tests.agents.trajectory_models import ACT, OBS, GaussianModel, drawn_actor, exact

ACTIONS = slice(OBS, OBS + ACT)
MODEL = GaussianModel()
CHANNELS = OBS + ACT + 2


def drawn(count: int, seed: int = 0, length: int = 5) -> Tensor:
    return torch.randn((count, length, CHANNELS), generator=generator(seed, "points"))


def draw(count: int, seed: int = 0, length: int = 5):
    noise, source = torch.empty(count, length, CHANNELS), generator(seed, "noise")
    return lambda: noise.normal_(generator=source)


# ---- the direction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "gaussian", "squashed"])
def test_the_score_is_the_slope_of_the_log_density_in_the_samplers_space(kind):
    """By finite differences in double precision; every number of the block, two members."""
    actor, scaling = drawn_actor(kind, members=2), MODEL.scaling
    x = drawn(4)

    def log_density(x: Tensor) -> Tensor:
        obs, action = scaling.observations(x), scaling.pre_tanh_actions(x).tanh()
        flat = (t.reshape(2, -1, t.shape[-1]) for t in (obs, action))
        return actor.log_prob(*flat).view(4, -1).sum(1).double()

    score = PolicyScore(actor, scaling)(x)
    assert score.shape == (4, 5, ACT)
    for h in range(5):
        for d in range(ACT):
            up, down = x.clone(), x.clone()
            up[:, h, OBS + d] += 5e-3
            down[:, h, OBS + d] -= 5e-3
            slope = (log_density(up) - log_density(down)) / 1e-2
            torch.testing.assert_close(score[:, h, d].double(), slope, rtol=2e-2, atol=5e-3)


def test_a_deterministic_policy_counts_as_a_gaussian_of_unit_deviation():
    actor, scaling = drawn_actor("tanh"), MODEL.scaling
    x = drawn(3)
    action = scaling.pre_tanh_actions(x).tanh()
    best = actor.sample(scaling.observations(x).view(1, -1, OBS), torch.zeros(1, 15, ACT)).view_as(action)
    expected = (best - action) * (1 - action**2) * scaling.action_std
    torch.testing.assert_close(PolicyScore(actor, scaling)(x), expected)


@pytest.mark.parametrize("kind", ["tanh", "gaussian", "squashed"])
def test_the_score_is_finite_at_the_first_noise_level(kind):
    score = PolicyScore(drawn_actor(kind), MODEL.scaling)(80 * drawn(50))
    assert score.isfinite().all()


# ---- the released rule ----------------------------------------------------------------------------------------------


def test_the_released_schedule():
    """Values of 256 steps and their sum."""
    at = {i: step_coefficient(i, 256, 0.3) for i in range(256)}
    assert [round(at[i], 3) for i in (0, 128, 254, 255)] == [1.004, 0.8, 0.011, 0.0]
    assert sum(at.values()) == pytest.approx(177.0, abs=0.5)
    assert [step_coefficient(i, 8, 0.3, delay=3) > 0 for i in range(8)] == [False] * 3 + [True] * 4 + [False]


def unit_score(x: Tensor) -> Tensor:
    return torch.ones_like(x[..., ACTIONS])


def guidance(coef_N: Tensor, score=unit_score, **settings) -> StepGuidance:
    return StepGuidance(score, coef_N, ACTIONS, GuidanceConfig(**settings), [0.5])


def test_a_step_moves_actions_alone_by_the_normalised_gradient():
    x = drawn(2)
    moved = x.clone()
    guidance(torch.tensor([2.0, 3.0])).move(moved, x, 0)
    expected = x.clone()
    expected[0, :, ACTIONS] += 0.5 * 2 / math.sqrt(5 * ACT)
    expected[1, :, ACTIONS] += 0.5 * 3 / math.sqrt(5 * ACT)
    torch.testing.assert_close(moved, expected)
    raw = x.clone()
    guidance(torch.tensor([2.0, 3.0]), normalise=False).move(raw, x, 0)
    torch.testing.assert_close(raw[:, :, ACTIONS], x[:, :, ACTIONS] + torch.tensor([1.0, 1.5]).view(2, 1, 1))


def test_a_gradient_of_0_moves_nothing():
    x = drawn(2)
    moved = x.clone()
    guidance(torch.ones(2), lambda x: torch.zeros_like(x[..., ACTIONS])).move(moved, x, 0)
    assert torch.equal(moved, x)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"denoised": False}, 31), ({"reuse": False}, 31 + 15), ({}, 32), ({"rule": "score"}, 2 * 31),
    ],
)  # fmt: skip
def test_calls_of_the_denoiser(settings, calls):
    counted = 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal counted
        counted += 1
        return exact(x, sigma)

    config, sampler = GuidanceConfig(**settings), SamplerConfig(num_steps=16)
    guided, steering = denoise, None
    if config.rule == "score":
        guided = ScoreGuidedDenoiser(denoise, unit_score, torch.ones(3), ACTIONS, config)
    else:
        steering = StepGuidance(unit_score, torch.ones(3), ACTIONS, config, step_coefficients(config, sampler))
    sample(guided, draw(3), sampler, steering)
    assert counted == calls


def test_coefficients_are_the_releases_with_any_steps_if_asked_for_and_always_with_256():
    plain = [step_coefficient(i, 32, 0.3) for i in range(32)]
    assert list(step_coefficients(GuidanceConfig(coef_steps=None), SamplerConfig(num_steps=32))) == plain
    assert step_coefficients(GuidanceConfig(), SamplerConfig(num_steps=256))[100] == step_coefficient(100, 256, 0.3)
    whole, late = (step_coefficients(GuidanceConfig(delay=d), SamplerConfig(num_steps=32)) for d in (0, 10))
    assert late == (0.0,) * 10 + whole[10:]  # a delay leaves out and changes nothing else


@pytest.mark.parametrize("settings", [{}, {"churn": 0.0}, {"order": 1}])
def test_a_weak_guidance_moves_the_mean_as_far_in_few_steps_as_in_256(settings):
    def moved(num_steps: int) -> float:
        sampler = SamplerConfig(num_steps=num_steps, **settings)
        coefficients = step_coefficients(GuidanceConfig(), sampler)
        steering = guidance(torch.tensor([1e-3]), normalise=False)
        steering = dataclasses.replace(steering, coefficients=coefficients)
        zero = torch.zeros(1, 5, CHANNELS)
        return float(sample(exact, lambda: zero, sampler, steering)[..., ACTIONS].mean())

    assert moved(24) == pytest.approx(moved(256), rel=1e-3)


# ---- the score rule -------------------------------------------------------------------------------------------------


class Peaks:
    """The denoiser of numbers from two peaks of deviation 0.3 at -1 and 1, both as high."""

    centres, std = torch.tensor([-1.0, 1.0]), 0.3

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = self.std**2 + sigma**2
        share = torch.softmax(-0.5 * (x.unsqueeze(-1) - self.centres) ** 2 / total, -1)
        return (share * (x.unsqueeze(-1) * self.std**2 + self.centres * sigma**2) / total).sum(-1)


def test_the_score_rule_is_exact_for_log_densities_that_are_linear_whatever_the_data():
    """With exp(k a) as a factor the peaks move by k 0.3^2, and the odds of the upper one become exp(2 k)."""
    slope = 0.6
    config = GuidanceConfig(rule="score", coef=0.5)

    def score(x: Tensor) -> Tensor:
        return torch.full_like(x, 2 * slope)

    guided = ScoreGuidedDenoiser(Peaks(), score, torch.full((6000,), 0.5), slice(0, 1), config)
    noise, source = torch.empty(6000, 1, 1), generator(0, "peaks")
    x = sample(guided, lambda: noise.normal_(generator=source), SamplerConfig(num_steps=128)).flatten()
    assert float((x > 0).float().mean()) == pytest.approx(1 / (1 + math.exp(-2 * slope)), abs=0.02)
    assert float(x[x > 0].mean()) == pytest.approx(1 + slope * 0.09, abs=0.02)
    assert float(x[x < 0].mean()) == pytest.approx(-1 + slope * 0.09, abs=0.02)


def test_a_smoothed_gradient_is_that_of_the_likelihood_behind_the_posterior():
    """log of the mean of N(a; 2, 0.5^2)^lambda over a ~ N(D, V) has slope (2 - D) / (0.25 / lambda + V)."""
    x, sigma, coef = drawn(3), torch.tensor(1.5), 0.7

    def score(x: Tensor) -> Tensor:
        return (2.0 - x[..., ACTIONS]) / 0.25

    config = GuidanceConfig(rule="score", coef=coef)
    guided = ScoreGuidedDenoiser(exact, score, torch.full((3,), coef), ACTIONS, config)(x, sigma)
    plain, variance = exact(x, sigma), 2.25 / 3.25
    expected = plain.clone()
    expected[..., ACTIONS] += variance * (2.0 - plain[..., ACTIONS]) / (0.25 / coef + variance)
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("coef", [0.3, 1.0, 3.0])
def test_the_score_rule_samples_the_product_of_both_densities(coef):
    guidance = {"rule": "score", "coef": coef}
    x = pgd_toy.Case("", None, sampler={"num_steps": 64}, guidance=guidance).samples(20_000)
    assert float(x.mean()) == pytest.approx(2 * coef / (1 + coef), rel=0.1)
    assert float(x.std()) == pytest.approx((1 + coef) ** -0.5, rel=0.1)


def test_states_follow_guided_actions_as_the_data_have_it():
    mean, std = pgd_toy.product(0.8, 0.2, 1.0)
    guidance = {"rule": "score", "coef": 1.0}
    case = pgd_toy.Case("", None, "", {"num_steps": 128}, guidance, correlation=0.8, policy_std=0.2)
    action, state = case.samples(10_000)
    assert float(action.mean()) == pytest.approx(float(mean[1]), rel=0.05)
    assert float(state.mean()) == pytest.approx(float(mean[0]), rel=0.05)
    assert float(action.std()) == pytest.approx(float(std[1]), rel=0.1)
    assert float(state.std()) == pytest.approx(float(std[0]), rel=0.1)


# ---- what both rules share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"reuse": False}, {"rule": "score"}, {"denoised": False}])
def test_a_coefficient_of_0_is_the_unguided_sampler_bit_for_bit_also_beside_others(settings):
    config, sampler = GuidanceConfig(**settings), SamplerConfig(num_steps=16)
    coef_N, score = torch.tensor([0.0, 0.0, 1.0, 0.3]), PolicyScore(drawn_actor("tanh", 2), MODEL.scaling)
    plain = sample(exact, draw(4), sampler)
    if config.rule == "score":
        guided = sample(ScoreGuidedDenoiser(exact, score, coef_N, ACTIONS, config), draw(4), sampler)
    else:
        steering = StepGuidance(score, coef_N, ACTIONS, config, step_coefficients(config, sampler))
        guided = sample(exact, draw(4), sampler, steering)
    assert torch.equal(guided[:2], plain[:2])
    assert not (guided[2:, :, ACTIONS] == plain[2:, :, ACTIONS]).any()


def test_a_coefficient_of_0_is_not_touched_by_a_gradient_that_is_not_finite():
    x = drawn(2)
    moved = x.clone()
    guidance(torch.tensor([0.0, 1.0]), lambda x: torch.full_like(x[..., ACTIONS], math.nan)).move(moved, x, 0)
    assert torch.equal(moved[0], x[0])
    assert moved[1, :, ACTIONS].isnan().all()


TABLE = [case for case in pgd_toy.CASES if case.reference_is == pgd_toy.OTHER]


@pytest.mark.parametrize("case", TABLE, ids=[case.name for case in TABLE])
def test_the_toy_samples_what_another_implementation_does(case):
    """Figures of another implementation, see benchmarks/pgd_toy.py; 6,000 samples have a deviation of 0.013 std."""
    assert len(TABLE) == 17
    x = case.samples(6_000)
    mean, std = case.reference
    assert float(x.mean()) == pytest.approx(mean, abs=0.01 + 0.04 * std)
    assert float(x.std()) == pytest.approx(std, abs=0.002 + 0.04 * std)


@pytest.mark.parametrize("steps", [16, 32, 64])
def test_lambda_means_the_same_with_any_number_of_steps(steps):
    x = pgd_toy.Case("", None, sampler={"num_steps": steps}, guidance={"coef": 1.0}, dimensions=192).samples(6_000)
    assert float(x.mean()) == pytest.approx(1.588, rel=0.03)  # with 256


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rule": "paper"}, "rule='paper' must be code or score"),
        ({"coef": -0.1}, "coef=-0.1 must be 0 or greater"),
        ({"coef": math.inf}, "coef=inf"),
        ({"cosine_coef": -1.0}, "cosine_coef=-1.0"),
        ({"delay": -1}, "delay=-1"),
        ({"coef_steps": 1}, "coef_steps=1 must be at least 3"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        GuidanceConfig(**settings)


@pytest.mark.parametrize(
    ("guidance", "sampler", "says"),
    [
        ({"normalise": False, "coef": 0.1}, {"num_steps": 256}, "collapse onto the policy's mode"),
        ({"normalise": False, "coef": 0.1}, {"num_steps": 32}, "collapse onto the policy's mode"),
        ({}, {"num_steps": 8}, "too few for guidance"),
        ({"delay": 31}, {"num_steps": 32}, "leaves no guided step"),
    ],
)
def test_what_does_not_go_together_is_refused(guidance, sampler, says):
    with pytest.raises(UserError, match=says):
        check_guidance(GuidanceConfig(**guidance), SamplerConfig(**sampler))
    check_guidance(GuidanceConfig(**{**guidance, "coef": 0.0}), SamplerConfig(**sampler))


@pytest.mark.parametrize(
    ("guidance", "sampler"),
    [
        ({}, {}), ({"normalise": False, "coef": 0.05}, {}), ({"rule": "score", "normalise": False}, {}),
        ({"normalise": False, "coef": 1.0, "allow_collapse": True}, {}),
        ({"normalise": False, "coef": 0.1, "coef_steps": None}, {"num_steps": 32}),  # a fifth of 0.1 in 256 steps
    ],
)  # fmt: skip
def test_what_is_meant_is_not_refused(guidance, sampler):
    check_guidance(GuidanceConfig(**guidance), SamplerConfig(**sampler))
