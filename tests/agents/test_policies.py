"""Learned networks as policy files act as the networks do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.networks import StackedMLP
from agents.policies import in_environment, squashed_arrays, tanh_arrays, with_standardisation
from agents.squashed import squashed_sample
from envs.policies import NetworkPolicy


def random_actor() -> StackedMLP:
    actor = StackedMLP((2,), (3, 8, 8, 4))
    actor.flat.normal_(generator=torch.Generator().manual_seed(0))
    actor.weights[-1][..., :2] *= 0.02  # far from tanh's flat ends
    return actor


@pytest.mark.parametrize("member", [0, 1])
def test_the_arrays_of_an_actor_act_as_it_does(member: int) -> None:
    actor, low, high = random_actor(), np.array([-2.0, 0.0]), np.array([2.0, 10.0])
    policy = NetworkPolicy(in_environment(squashed_arrays(actor, member), low, high), "actor", "")
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    out = actor.select([member]).forward(torch.tensor(obs).unsqueeze(0))[0][0]
    scale, center = (high - low) / 2, (high + low) / 2

    np.testing.assert_allclose(policy.act(obs, None), center + scale * squashed_sample(out, None).numpy(), atol=1e-4)
    noise = np.random.default_rng(1).standard_normal((50, 2), dtype=np.float32)
    expected = center + scale * squashed_sample(out, torch.tensor(noise)).numpy()
    np.testing.assert_allclose(policy.act(obs, np.random.default_rng(1)), expected, atol=1e-4)
    log_std = out[:, 2:]
    assert (log_std < -5).any()  # both clamps are tried
    assert (log_std > 2).any()


def test_an_actor_of_standardised_observations_acts_on_the_environments() -> None:
    actor, low, high = random_actor(), -np.ones(2), np.ones(2)
    mean, std = np.array([1.0, -2.0, 0.5], np.float32), np.array([0.5, 2.0, 3.0], np.float32)
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    plain = NetworkPolicy(in_environment(squashed_arrays(actor, 0), low, high), "actor", "")
    scaled = NetworkPolicy(in_environment(squashed_arrays(actor, 0), low, high, mean, std), "actor", "")
    np.testing.assert_allclose(scaled.act(obs * std + mean, None), plain.act(obs, None), atol=1e-5)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_arrays_of_a_tanh_actor_act_as_it_does(noisy: bool) -> None:
    actor, low, high = StackedMLP((2,), (3, 8, 8, 2)), np.array([-2.0, 0.0]), np.array([2.0, 10.0])
    actor.flat.normal_(generator=torch.Generator().manual_seed(0))
    actor.weights[-1].mul_(0.1)
    log_std = torch.tensor([-1.0, 0.5]) if noisy else None
    mean, std = np.array([1.0, -2.0, 0.5], np.float32), np.array([0.5, 2.0, 3.0], np.float32)
    arrays = with_standardisation(tanh_arrays(actor, 1, log_std), mean, std)
    policy = NetworkPolicy(in_environment(arrays, low, high), "actor", "")
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    of_mean = actor.select([1]).forward(torch.tensor(x).unsqueeze(0))[0][0].tanh().numpy()
    np.testing.assert_allclose(policy.act(x * std + mean, None), (of_mean + 1) * (high - low) / 2 + low, atol=1e-4)

    sampled = of_mean
    if log_std is not None:
        noise = np.random.default_rng(1).standard_normal((50, 2), dtype=np.float32)
        sampled = np.clip(of_mean + noise * np.exp(log_std.numpy()), -1, 1)
        assert (np.abs(sampled) == 1).any()
    expected = (sampled + 1) * (high - low) / 2 + low
    np.testing.assert_allclose(policy.act(x * std + mean, np.random.default_rng(1)), expected, atol=1e-4)
