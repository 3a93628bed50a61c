import pickle

import numpy as np
import pytest

from envs.episodes import make_env
from envs.errors import UserError
from envs.termination import terminated
from envs.toys import Refrigerator
from envs.true_dynamics import TrueDynamics, has_true_dynamics

ROBOTS = ["Hopper-v4", "Hopper-v5", "HalfCheetah-v4", "HalfCheetah-v5", "Walker2d-v4", "Walker2d-v5"]
SHIFTED = ["offsweep/Hopper-friction-0.3-v4", "offsweep/HalfCheetah-morphology-v5", "offsweep/Walker2d-kinematic-v5"]
REFRIGERATOR = "offsweep/Refrigerator-v0"
STEPS = 50


def state_of(env) -> np.ndarray:
    return np.concatenate([env.data.qpos, env.data.qvel])


def starts(env_id: str, count: int, seed: int = 0) -> np.ndarray:
    """States along an episode of random actions: standing, falling and fallen."""
    env = make_env(env_id)
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    states = []
    for _ in range(count):
        states.append(state_of(env.unwrapped))
        for _ in range(5):
            env.step(rng.uniform(-1.0, 1.0, env.action_space.shape))
    return np.array(states)


def actor(observation_dim: int, action_dim: int, seed: int):
    weights = np.random.default_rng(seed).normal(size=(observation_dim, action_dim)) / np.sqrt(observation_dim)
    return lambda observations: np.tanh(observations @ weights)


@pytest.mark.parametrize("policy", ["random", "actor"])
@pytest.mark.parametrize("env_id", [*ROBOTS, "neorl/Hopper-v4", "neorl/Walker2d-v4", *SHIFTED])
def test_rollouts_are_those_of_the_environment(env_id, policy):
    # Random actions: an environment whose solver starts afresh in every step. Actor: an undisturbed one, for as long as
    # what its solver remembers does not grow into another path; HalfCheetah's do so fastest.
    steps = 10 if policy == "actor" and "HalfCheetah" in env_id else STEPS
    tolerance = 1e-11 if policy == "random" else 1e-9
    dynamics, env = TrueDynamics(env_id), make_env(env_id).unwrapped
    act = actor(dynamics.observation_dim, dynamics.action_dim, seed=1)
    episodes = 4
    # Beyond the bounds now and then: the control is clipped, its cost is not.
    drawn = np.random.default_rng(2).uniform(-1.3, 1.3, (steps, episodes, dynamics.action_dim))

    columns = {"states": dynamics.state_dim, "observations": dynamics.observation_dim, "rewards": 1, "terminals": 1}
    seen = {column: np.empty((steps, episodes, width)) for column, width in columns.items()}
    first = []
    for i in range(episodes):
        observation, _ = env.reset(seed=i)
        first.append(state_of(env))
        for t in range(steps):
            if policy == "random":
                env.data.qacc_warmstart[:] = 0.0
            observation, reward, flag, _, _ = env.step(drawn[t, i] if policy == "random" else act(observation))
            for column, value in zip(columns, (state_of(env), observation, reward, flag), strict=True):
                seen[column][t, i] = value

    states = np.array(first)
    observations = dynamics.observe(states)
    for t in range(steps):
        step = dynamics.step(states, drawn[t] if policy == "random" else act(observations))
        states, observations = step.states, step.observations
        for column, width in columns.items():
            got = getattr(step, column).reshape(episodes, width)
            np.testing.assert_allclose(got, seen[column][t], tolerance, tolerance, err_msg=f"{column}, step {t}")
        np.testing.assert_array_equal(terminated(env_id, step.observations), step.terminals)
    if "HalfCheetah" not in env_id:
        assert 0.1 < seen["terminals"].mean() < 0.95


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v4", "Walker2d-v4"])
def test_a_step_depends_on_its_state_and_action_alone(env_id):
    whole, threaded = TrueDynamics(env_id), TrueDynamics(env_id, num_threads=3)
    states = starts(env_id, 60)
    actions = np.random.default_rng(1).uniform(-1.0, 1.0, (60, whole.action_dim))
    expected = whole.step(states, actions)
    for got, rows in (
        (threaded.step(states, actions), slice(None)),
        (threaded.step(states[::-1], actions[::-1]), slice(None, None, -1)),
        (whole.step(states[7:20], actions[7:20]), slice(7, 20)),
        (pickle.loads(pickle.dumps(threaded)).step(states[-1:], actions[-1:]), slice(-1, None)),
    ):
        for key in ("states", "observations", "rewards", "terminals"):
            np.testing.assert_array_equal(getattr(got, key), getattr(expected, key)[rows])


def test_the_reward_of_a_fall_is_that_of_the_version():
    tilted = np.zeros((2, 12))
    tilted[:, 1], tilted[:, 2] = 1.25, (0.0, 0.5)
    action = np.zeros((2, 3))
    rewards = {v: TrueDynamics(f"Hopper-{v}").step(tilted, action).rewards for v in ("v4", "v5")}
    np.testing.assert_allclose(rewards["v4"] - rewards["v5"], [0.0, 1.0])


def test_states_and_observations_say_the_same_where_nothing_is_hidden():
    dynamics = TrueDynamics("Walker2d-v5")
    states = starts("Walker2d-v5", 30)
    states[:, 0] = 0.0
    states[:, 9:] /= 1.5
    states[3, -1], states[4, 9] = 12.5, -31.0
    shown = dynamics.observe(states)
    back = dynamics.states_of(shown)
    known = (np.abs(states[:, 9:]) < 10).all(axis=1)
    assert not known[3:5].any()
    assert known.sum() > 15
    np.testing.assert_array_equal(dynamics.layout.complete(shown), known)
    np.testing.assert_array_equal(back[known], states[known])
    assert back[3, -1] == 10.0
    assert back[4, 9] == -10.0
    np.testing.assert_array_equal(dynamics.observe(back), shown)

    keeps_x = TrueDynamics("neorl/Walker2d-v4")
    states[:, 0] = 3.0
    np.testing.assert_array_equal(keeps_x.states_of(keeps_x.observe(states))[:, 0], 3.0)


def test_edge_of_reach_steps_as_its_environment():
    env_id = "offsweep/EdgeOfReach-v0"
    dynamics, env = TrueDynamics(env_id), make_env(env_id).unwrapped
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=3)
    state = env._state[None]
    np.testing.assert_array_equal(dynamics.observe(state)[0], observation)
    for _ in range(20):
        action = rng.uniform(-1.5, 1.5, 2).astype(np.float32)
        observation, reward, _, _, _ = env.step(action)
        step = dynamics.step(state, action[None])
        state = step.states
        np.testing.assert_array_equal(state[0], env._state)
        np.testing.assert_array_equal(step.observations[0], observation)
        assert step.rewards[0] == reward
        assert not step.terminals[0]
    assert (dynamics.state_dim, dynamics.observation_dim, dynamics.action_dim) == (2, 2, 2)


def test_the_refrigerator_steps_as_its_environment_with_the_door_shut_and_no_noise(monkeypatch):
    monkeypatch.setattr(Refrigerator, "NOISE", 0.0)
    monkeypatch.setattr(Refrigerator, "OPEN_PROBABILITY", 0.0)
    dynamics, env = TrueDynamics(REFRIGERATOR), make_env(REFRIGERATOR).unwrapped
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=3)
    state = np.array([[info["temperature"]]])
    np.testing.assert_array_equal(dynamics.observe(state)[0], observation)
    for _ in range(300):  # beyond the interval after which the door might open
        action = rng.uniform(-1.0, 3.0, 1).astype(np.float32)
        observation, reward, _, _, info = env.step(action)
        step = dynamics.step(state, action[None])
        state = step.states
        assert state[0, 0] == pytest.approx(info["temperature"], rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(step.observations[0], observation, rtol=1e-6)
        assert step.rewards[0] == pytest.approx(reward, rel=1e-6, abs=1e-6)
        assert not step.terminals[0]
    (by_hand,) = dynamics.step(np.array([[10.0]]), np.array([[2.0]])).states[:, 0]
    assert by_hand == pytest.approx(8.0 + 7.0 * 0.02)
    (coldest,) = dynamics.step(np.array([[10.0]]), np.array([[12.0]])).states[:, 0]
    assert coldest == pytest.approx(0.3)  # power ends at 10
    assert (dynamics.state_dim, dynamics.observation_dim, dynamics.action_dim) == (1, 1, 1)
    assert not dynamics.repeats_episodes


@pytest.mark.parametrize("env_id", ["Hopper-v5", "offsweep/EdgeOfReach-v0", REFRIGERATOR])
def test_no_rows_are_no_rows(env_id):
    dynamics = TrueDynamics(env_id)
    step = dynamics.step(np.empty((0, dynamics.state_dim)), np.empty((0, dynamics.action_dim)))
    assert step.states.shape == (0, dynamics.state_dim)
    assert step.observations.shape == (0, dynamics.observation_dim)
    assert step.rewards.shape == step.terminals.shape == (0,)


def test_an_impossible_state_touches_no_other_and_leaves_no_log_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    dynamics = TrueDynamics("Walker2d-v4", num_threads=2)
    states = starts("Walker2d-v4", 20)
    actions = np.zeros((20, 6))
    expected = dynamics.step(states, actions)
    broken = states.copy()
    broken[4], broken[11] = 1e12, np.nan
    got = dynamics.step(broken, actions)
    others = np.delete(np.arange(20), [4, 11])
    np.testing.assert_array_equal(got.states[others], expected.states[others])
    assert np.isfinite(got.states).all()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("env_id", ["Ant-v4", "d4rl/Ant-v4", "Pendulum-v1", "offsweep/Ant-kinematic-v4"])
def test_an_environment_without_true_dynamics_is_refused(env_id):
    assert not has_true_dynamics(env_id)
    with pytest.raises(UserError, match=f"no true dynamics for environment '{env_id}': they can be had for Hopper"):
        TrueDynamics(env_id)


def test_what_has_true_dynamics():
    assert all(map(has_true_dynamics, [*ROBOTS, "neorl/HalfCheetah-v4", "offsweep/EdgeOfReach-v0", REFRIGERATOR]))
    assert not has_true_dynamics("Hoper-v4")
    with pytest.raises(UserError, match="no Gymnasium environment 'Hoper-v4'"):
        TrueDynamics("Hoper-v4")
