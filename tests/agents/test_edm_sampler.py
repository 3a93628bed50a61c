"""The sampler in Gaussian data, whose denoiser is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from agents.edm_sampler import MemberNoise, SamplerConfig, Schedule, sample
from agents.guidance import GuidanceConfig, ScoreGuidedDenoiser, StepGuidance
from agents.randomness import generator
from envs.errors import UserError
from tests.agents.devices import OnlyOnMeta
from tests.agents.trajectory_models import exact


class Draw:
    """Standard normal draws that are counted."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.noise, self.source, self.calls = torch.empty(shape), generator(seed, "test"), 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.noise.normal_(generator=self.source)


class Counted:
    def __init__(self) -> None:
        self.sigmas: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.sigmas.append(float(sigma))
        return exact(x, sigma)


def test_noise_is_added_in_the_steps_between_the_bounds_and_levels_end_with_0():
    schedule = Schedule.of(SamplerConfig(num_steps=256))
    churned = [i for i, (hat, sigma) in enumerate(zip(schedule.churned, schedule.levels, strict=False)) if hat > sigma]
    assert churned == list(range(22, 213))  # the 191 steps of the released settings
    assert schedule.churned[30] == pytest.approx(1.3125 * schedule.levels[30])
    assert schedule.levels[0] == pytest.approx(80.0)
    assert schedule.levels[255] == pytest.approx(0.002, rel=1e-5)
    assert schedule.levels[256] == 0
    few = Schedule.of(SamplerConfig(num_steps=32))
    assert few.churned[10] == pytest.approx(2**0.5 * few.levels[10])  # churn / n would be 2.5


@pytest.mark.parametrize(("order", "calls"), [(2, 2 * 32 - 1), (1, 32)])
def test_no_call_of_the_denoiser_is_wasted_and_none_is_at_0(order, calls):
    denoise, draw = Counted(), Draw(4, 3, 2)
    config = SamplerConfig(num_steps=32, order=order)
    sample(denoise, draw, config)
    assert len(denoise.sigmas) == calls
    assert min(denoise.sigmas) == pytest.approx(0.002, rel=1e-5)
    schedule = Schedule.of(config)
    assert draw.calls == 1 + sum(hat > s for hat, s in zip(schedule.churned, schedule.levels, strict=False))


@pytest.mark.parametrize("steps", [2, 5, 31])
def test_a_deterministic_sampling_is_heuns_integral(steps):
    """dx / dsigma = x / sigma * sigma^2 / (1 + sigma^2), step by step in plain numbers."""
    config = SamplerConfig(num_steps=steps, churn=0.0)
    draw = Draw(1, 1, 1)
    x = float(sample(exact, draw, config))
    expected = float(Draw(1, 1, 1)()) * 80.0
    levels = Schedule.of(config).levels
    for here, there in pairwise(levels):
        slope = expected * here / (1 + here**2)
        euler = expected + (there - here) * slope
        expected += (there - here) * ((slope + euler * there / (1 + there**2)) / 2 if there else slope)
    assert x == pytest.approx(expected, rel=1e-5)


def test_an_euler_step_begins_at_the_churned_point_unless_the_releases_is_asked_for():
    # two steps, so that the second ends at 0: from 80 to 5 without noise, then from 5, churned, to 0
    settings = {"num_steps": 2, "sigma_min": 5.0, "s_tmin": 0.0, "s_tmax": 10.0}
    draw = Draw(1, 1, 1)
    first, noise = float(draw()), float(draw())
    x = first * 80.0
    slope = x * 80 / (1 + 80**2)
    euler = x - 75 * slope
    x -= 75 * (slope + euler * 5 / (1 + 5**2)) / 2
    hat = 5 * 2**0.5
    x_hat = x + 1.003 * 5 * noise
    step = -hat * x_hat * hat / (1 + hat**2)
    for predictor, start in (("edm", x_hat), ("release", x)):
        config = SamplerConfig(**settings, predictor=predictor)
        assert float(sample(exact, Draw(1, 1, 1), config)) == pytest.approx(start + step, rel=1e-4)


@pytest.mark.parametrize(("settings", "std"), [({}, 1.024), ({"order": 1}, 0.88), ({"churn": 0.0}, 1.008)])
def test_the_datas_distribution_comes_out(settings, std):
    x = sample(exact, Draw(4000, 2, 3), SamplerConfig(num_steps=64, **settings))
    assert float(x.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(x.std()) == pytest.approx(std, rel=0.03)


def test_a_member_draws_the_same_alone_as_in_any_group():
    shape, device = (3, 4, 2), torch.device("cpu")
    group = MemberNoise((5, 9, 7), (2, 1), shape, device)
    alone = MemberNoise((9,), (2, 1), shape, device)
    for _ in range(3):
        assert torch.equal(group().view(3, *shape)[1], alone().view(shape))
    assert not torch.equal(MemberNoise((9,), (2, 2), shape, device)(), MemberNoise((9,), (2, 1), shape, device)())


@pytest.mark.parametrize("settings", [None, {}, {"reuse": False}, {"rule": "score"}])
def test_nothing_waits_for_a_device(settings, monkeypatch):
    """On device "meta", which has no values, and takes none from the host."""
    config, device = SamplerConfig(num_steps=16), "meta"
    schedule = Schedule.of(config)
    monkeypatch.setattr(Schedule, "of", lambda config: schedule)  # the levels themselves are the host's
    noise, coef_N = torch.empty(6, 5, 4, device=device), torch.empty(6, device=device)
    denoise, steering = exact, None
    with OnlyOnMeta():
        if settings is not None:
            guidance, actions = GuidanceConfig(**settings), slice(1, 3)
            if guidance.rule == "score":
                denoise = ScoreGuidedDenoiser(exact, lambda x: x[..., actions], coef_N, actions, guidance)
            else:
                steering = StepGuidance(lambda x: x[..., actions], coef_N, actions, guidance, [1.0] * 16)
        assert sample(denoise, lambda: noise, config, steering).shape == (6, 5, 4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_steps": 1}, "num_steps=1 must be at least 2"),
        ({"sigma_min": 0.0}, "sigma_min=0.0 must lie between"),
        ({"churn": -1.0}, "churn=-1.0 must be 0 or greater"),
        ({"s_noise": float("nan")}, "s_noise=nan"),
        ({"rho": 0.0}, "rho=0.0"),
        ({"order": 3}, "order=3 must be 1"),
        ({"terminals": "all"}, "terminals='all' must be one of generated, rule, none"),
        ({"precision": "half"}, "precision='half' must be float32 or mixed"),
        ({"predictor": "euler"}, "predictor='euler' must be edm or release"),
        ({"order": 1, "predictor": "release"}, "samples a single point"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        SamplerConfig(**settings)
