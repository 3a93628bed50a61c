import numpy as np
import pytest

from envs.collect import collect, uniform_policy
from envs.errors import UserError
from envs.simulate import Simulator, versions


def uniform(env_id: str, rows: int = 150):
    return collect(env_id, [(uniform_policy(env_id), 1.0)], rows, seed=0)


@pytest.mark.parametrize(
    ("env_id", "reward_error"),
    [
        ("Hopper-v4", 1e-5),
        ("Hopper-v5", 1e-5),
        ("HalfCheetah-v5", 1e-5),
        ("Walker2d-v5", 1e-5),
        ("Ant-v4", 0.1),
        ("Ant-v5", 0.1),
        ("Swimmer-v5", 1e-5),
        ("InvertedPendulum-v5", 1e-5),
        ("d4rl/Ant-v4", 0.1),
        ("neorl/Walker2d-v4", 1e-5),
        ("Pendulum-v1", 1e-5),
        ("MountainCarContinuous-v0", 1e-5),
        ("offsweep/EdgeOfReach-v0", 1e-5),
    ],
)
def test_a_recorded_step_is_repeated_from_its_observation(env_id, reward_error):
    data = uniform(env_id)
    simulator = Simulator(env_id)
    known = simulator.restorable(data.observations)
    steps = simulator.steps(data.observations[known], data.actions[known])
    assert simulator.state_dim <= data.observation_dim
    assert known.sum() > 20
    np.testing.assert_allclose(steps.next_observations, data.next_observations[known], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(steps.rewards, data.rewards[known], atol=reward_error)
    np.testing.assert_array_equal(steps.terminals, data.terminals[known])


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Swimmer-v5"])
def test_a_step_depends_on_nothing_before_it_and_time_does_not_run_out(env_id):
    data = uniform(env_id, 40)
    simulator = Simulator(env_id)
    once = simulator.steps(data.observations, data.actions)
    for _ in range(30):  # 1200 steps, the time limit is 1000
        again = simulator.steps(data.observations[::-1], data.actions[::-1])
    np.testing.assert_array_equal(once.next_observations, again.next_observations[::-1])
    np.testing.assert_array_equal(once.rewards, again.rewards[::-1])


def test_clipped_velocities_are_recognised_where_an_environment_clips():
    for env_id, hidden in (("Walker2d-v5", True), ("neorl/Hopper-v4", True), ("HalfCheetah-v5", False)):
        simulator = Simulator(env_id)
        observations = np.zeros((3, simulator.state_dim))
        observations[1, -1], observations[2, -2] = 10.0, -10.0
        assert simulator.restorable(observations).tolist() == [True, not hidden, not hidden]
    simulator = Simulator("neorl/Hopper-v4")
    position = np.zeros((1, simulator.state_dim))
    position[0, 0] = 50.0  # the x position is not clipped
    assert simulator.restorable(position).all()


def test_the_control_is_clipped_and_the_control_cost_is_not():
    simulator = Simulator("Hopper-v5")
    start = np.zeros(11)
    start[0] = 1.25
    actions = np.array([[3.0, -2.0, 0.5], [1.0, -1.0, 0.5]])
    steps = simulator.steps(np.tile(start, (2, 1)), actions)
    np.testing.assert_array_equal(*steps.next_observations)
    np.testing.assert_allclose(steps.rewards[1] - steps.rewards[0], 1e-3 * (13.25 - 2.25))


def test_impossible_states_leave_no_log_file_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    simulator = Simulator("Walker2d-v4")
    steps = simulator.steps(np.full((5, 17), 1e9), np.ones((5, 6)))
    assert np.isfinite(steps.next_observations).all()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("env_id", ["Reacher-v5", "InvertedDoublePendulum-v5", "offsweep/Refrigerator-v0"])
def test_observations_that_do_not_hold_the_state_are_refused(env_id):
    with pytest.raises(UserError, match=f"'{env_id}' cannot be set from its observations"):
        Simulator(env_id)


def test_versions_of_an_environment():
    assert versions("Walker2d-v5")[-2:] == ["Walker2d-v4", "Walker2d-v5"]
    assert versions("Pendulum-v1") == ["Pendulum-v1"]
