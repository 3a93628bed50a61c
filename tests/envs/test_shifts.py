import gymnasium
import numpy as np
import pytest
import torch

from envs import shifts
from envs.environments import specification
from envs.episodes import EpisodeError, make_env
from envs.errors import UserError
from envs.names import env_id_of
from envs.simulate import versions
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


def test_every_id_is_known_and_has_a_source_and_a_rule():
    robots = {f"offsweep/{robot}-v{version}" for robot in shifts.ROBOTS for version in (4, 5)}
    for env_id in shifts.ids():
        assert specification(env_id) is not None
        termination_rule(env_id)
        assert env_id_of(env_id) == env_id
        assert shifts.source_id(env_id) in (robots | {"Pendulum-v1"} if env_id not in robots else {None})
    assert len(shifts.ids()) == 8 + 2 * 4 * (2 + 12 + 8) + 4


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("offsweep/Hopper-kinematc-v5", "offsweep/Hopper-kinematic-v5"),
        ("offsweep/Ant-kinematic-hip-easy-v5", "offsweep/Ant-kinematic-hips-easy-v5"),
        ("offsweep/Walker2d-gravity-0-v4", "offsweep/Walker2d-gravity-0.5-v4"),
        ("offsweep/Ant-friction--2-v5", "offsweep/Ant-friction-2-v5"),
    ],
)
def test_a_wrong_id_is_answered_with_the_nearest(wrong, near):
    assert shifts.parse(wrong) is None
    with pytest.raises(EpisodeError, match=f"no Gymnasium environment '{wrong}'; nearest: .*{near}"):
        make_env(wrong)
    with pytest.raises(UserError, match=f"no termination rule for environment '{wrong}'.*nearest: .*{near}"):
        termination_rule(wrong)


def test_the_other_version_of_a_factor_is_made_known_with_it():
    for version in (4, 5):
        gymnasium.registry.pop(f"offsweep/Ant-gravity-0.77-v{version}", None)
    specification("offsweep/Ant-gravity-0.77-v5")
    assert versions("offsweep/Ant-gravity-0.77-v5") == [f"offsweep/Ant-gravity-0.77-v{v}" for v in (4, 5)]
