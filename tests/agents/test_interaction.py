"""Jobs of steps in environments: what they give follows from their fields, wherever they are run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from agents.actors import SquashedGaussianActor
from agents.interaction import TRUNCATED, Environments, Episode, InteractionJob
from agents.networks import StackedMLP
from agents.randomness import derived_seed
from envs.episodes import make_env
from tests.agents.domains import SOURCE, TARGET


def actor(members: int = 2) -> SquashedGaussianActor:
    network = StackedMLP((members,), (3, 8, 2))
    network.flat.copy_(torch.randn(network.flat.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    return SquashedGaussianActor(network)


def job(steps: int, episodes: list[Episode], first: int = 0, **changes: Any) -> InteractionJob:
    noise = torch.randn((400, 2, 1), generator=torch.Generator().manual_seed(1))[first : first + steps]
    fields: dict[str, Any] = {"noise_TMA": noise, "num_random": 0, "domain": "target", **changes}
    return InteractionJob(
        members=(0, 1), places=(0, 1), seeds=(3, 4), episodes=tuple(episodes), actor=actor(), **fields
    )


def fresh(count: int = 2) -> list[Episode]:
    return [Episode(0, np.empty((0, 1), np.float32))] * count


def test_rows_are_those_of_the_environment_stepped_by_hand():
    result = job(230, fresh()).run(Environments(SOURCE, TARGET))
    env = make_env(TARGET)
    for m, seed in enumerate((3, 4)):
        obs, _ = env.reset(seed=derived_seed(seed, "target episode", 0) % 2**31)
        total = 0.0
        for t, row in enumerate(result.rows_MTW[m]):
            np.testing.assert_array_equal(row[:3], obs)
            noise = job(230, fresh()).noise_TMA[t, m].view(1, 1, 1)
            expected = actor().select([m]).sample(torch.from_numpy(obs).view(1, 1, 3), noise)
            np.testing.assert_allclose(row[3], expected.item(), rtol=1e-5)
            obs, reward, terminated, truncated, _ = env.step(2.0 * row[3:4])
            np.testing.assert_allclose(row[4:6], [reward, float(terminated)], rtol=1e-6)
            np.testing.assert_array_equal(row[6:], obs)
            assert result.ends_MT[m, t] == (TRUNCATED if truncated else 0)
            if t < 200:
                total += reward
            if truncated:
                assert t == 199
                obs, _ = env.reset(seed=derived_seed(seed, "target episode", 1) % 2**31)
        np.testing.assert_allclose(result.returns[m], [total])


def test_an_environment_made_anew_goes_on_as_the_one_that_was_alive():
    alive = Environments(SOURCE, TARGET)
    before = job(230, fresh()).run(alive)
    episodes = [Episode(1, before.rows_MTW[m, 200:, 3:4]) for m in range(2)]
    after = job(50, episodes, 230)
    elsewhere = pickle.loads(pickle.dumps(alive))
    for other in (elsewhere, alive, alive):  # the last one has been taken further and goes back
        result = after.run(other)
        np.testing.assert_array_equal(result.rows_MTW, after.run(Environments(SOURCE, TARGET)).rows_MTW)
    whole = job(280, fresh()).run(Environments(SOURCE, TARGET))
    np.testing.assert_array_equal(result.rows_MTW, whole.rows_MTW[:, 230:])


def test_a_member_goes_on_when_the_other_has_left():
    environments, before = Environments(SOURCE, TARGET), job(10, fresh())
    rows = before.run(environments).rows_MTW
    both = job(5, [Episode(0, rows[m, :, 3:4]) for m in range(2)], 10)
    alone = replace(
        both, members=(0,), places=(1,), seeds=(4,), episodes=both.episodes[1:], actor=both.actor.select([1]),
        noise_TMA=both.noise_TMA[:, 1:],
    )  # fmt: skip
    expected = both.run(Environments(SOURCE, TARGET)).rows_MTW[1]
    np.testing.assert_allclose(alone.run(environments).rows_MTW[0], expected, rtol=1e-5, atol=1e-6)
    assert set(environments._live["target"]) == {1}


def test_first_steps_are_random_and_a_policy_that_is_not_a_number_breaks_nothing():
    broken = actor()
    broken.network.flat.fill_(torch.nan)
    uniform = torch.rand((6, 2, 1), generator=torch.Generator().manual_seed(2)) * 2 - 1
    one = replace(job(6, fresh(), noise_TMA=uniform, num_random=4), actor=broken)
    rows = one.run(Environments(SOURCE, TARGET)).rows_MTW
    np.testing.assert_array_equal(rows[:, :4, 3], uniform[:4, :, 0].T)
    assert np.isfinite(rows).all()
    assert (rows[:, 4:, 3] == 0).all()


def test_observations_and_rewards_are_in_the_units_of_the_data():
    mean, std = np.float32([0.1, -0.2, 1.0]), np.float32([2.0, 0.5, 3.0])
    plain = job(4, fresh(), num_random=4).run(Environments(SOURCE, TARGET)).rows_MTW
    scaled = job(4, fresh(), num_random=4).run(Environments(SOURCE, TARGET, mean, std, 0.1, 1.0)).rows_MTW
    np.testing.assert_allclose(scaled[..., :3], (plain[..., :3] - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled[..., 6:], (plain[..., 6:] - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled[..., 4], 0.1 * plain[..., 4] + 1.0, rtol=1e-5)
