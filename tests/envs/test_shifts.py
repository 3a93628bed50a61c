import gymnasium
import numpy as np
import pytest
import torch

from envs import shifts
from envs.environments import specification
from envs.episodes import EpisodeError, make_env
from envs.names import env_id_of
from envs.termination import termination_rule


@pytest.mark.parametrize("factor", ["0.5", "2", "0.125"])
def test_a_pendulum_falls_with_the_gravity_of_its_id(factor):
    env_id = f"offsweep/Pendulum-gravity-{factor}-v1"
    gymnasium.registry.pop(env_id, None)
    env = make_env(env_id)
    env.reset(seed=0)
    env.unwrapped.state = np.array([0.3, -0.2])  # type: ignore[attr-defined]
    after = env.step(np.array([0.7]))[0]
    # theta'' = 3 g / (2 l) sin(theta) + 3 u / (m l^2), by steps of 0.05
    velocity = -0.2 + (3 * 10 * float(factor) / 2 * np.sin(0.3) + 3 * 0.7) * 0.05
    angle = 0.3 + 0.05 * velocity
    np.testing.assert_allclose(after, [np.cos(angle), np.sin(angle), velocity], rtol=1e-6)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 200


def test_a_shifted_pendulum_has_the_names_and_the_rule_of_its_source():
    env_id = "offsweep/Pendulum-gravity-0.5-v1"
    assert shifts.source_id(env_id) == "Pendulum-v1"
    assert env_id_of(env_id) == env_id
    spec = specification(env_id)
    assert spec is not None
    assert spec.kwargs == {"g": 5.0}
    assert termination_rule(env_id)(torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, torch.nan]])).tolist() == [False, True]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "offsweep/Pendulum-gravity-0-v1", "offsweep/Pendulum-gravity--1-v1"])
def test_other_ids_are_no_shifts(env_id):
    assert shifts.source_id(env_id) is None


def test_an_unknown_shift_is_refused_with_the_nearest():
    make_env("offsweep/Pendulum-gravity-0.5-v1")
    with pytest.raises(EpisodeError, match=r"nearest: .*offsweep/Pendulum-gravity"):
        make_env("offsweep/Pendulum-gravty-0.5-v1")
