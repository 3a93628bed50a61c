import gymnasium
import numpy as np
import pytest

from envs.environments import register
from envs.episodes import make_env


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def test_registering_twice_changes_nothing(recwarn):
    before = dict(gymnasium.registry)
    register()
    assert gymnasium.registry == before
    assert not recwarn.list


@pytest.mark.parametrize(
    ("env_id", "observation_dim", "action_dim", "dt"),
    [
        ("d4rl/Ant-v4", 111, 8, 0.05),
        ("neorl/Hopper-v4", 12, 3, 0.008),
        ("neorl/HalfCheetah-v4", 18, 6, 0.05),
        ("neorl/Walker2d-v4", 18, 6, 0.008),
    ],
)
def test_robots_have_the_shapes_and_the_limit_of_their_sets(env_id, observation_dim, action_dim, dt):
    env = make_env(env_id)
    assert env.observation_space.shape == (observation_dim,)
    assert env.action_space.shape == (action_dim,)
    assert env.spec is not None
    assert (env.spec.id, env.spec.max_episode_steps) == (env_id, 1000)
    assert env.unwrapped.dt == pytest.approx(dt)  # type: ignore[attr-defined]


@pytest.mark.parametrize("robot", ["Hopper", "HalfCheetah", "Walker2d"])
def test_neorl_s_robots_are_gymnasium_s_with_the_position_in_front(robot):
    ours, theirs = make_env(f"neorl/{robot}-v4"), make_env(f"{robot}-v4")
    obs, other = ours.reset(seed=3)[0], theirs.reset(seed=3)[0]
    np.testing.assert_array_equal(obs[1:], other)
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-1, 1, size=ours.action_space.shape)
        after, reward, *_ = ours.step(action)
        expected, expected_reward, *_ = theirs.step(action)
        np.testing.assert_array_equal(after[1:], expected)
        assert reward == expected_reward
        # NeoRL's reward pays for the position's change.
        velocity = (after[0] - obs[0]) / ours.unwrapped.dt  # type: ignore[attr-defined]
        assert reward == pytest.approx(velocity, abs=1.0 + 0.1 * 6)
        obs = after


def test_d4rl_s_ant_is_gymnasium_s_without_contact_forces():
    ours, theirs = make_env("d4rl/Ant-v4"), make_env("Ant-v4")
    obs, other = ours.reset(seed=3)[0], theirs.reset(seed=3)[0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        np.testing.assert_array_equal(obs[:27], other)
        assert not obs[27:].any()
        action = rng.uniform(-1, 1, size=8)
        obs, reward, *_ = ours.step(action)
        other, expected_reward, *_ = theirs.step(action)
        assert reward == expected_reward
