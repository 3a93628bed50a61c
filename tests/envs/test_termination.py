import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from envs.collect import collect, uniform_policy
from envs.environments import register
from envs.errors import UserError
from envs.termination import terminated, termination_rule


@pytest.mark.parametrize(
    ("env_id", "ends"),
    [
        ("Hopper-v5", True),
        ("Walker2d-v5", True),
        ("HalfCheetah-v5", False),
        ("Ant-v4", True),
        ("neorl/Hopper-v4", True),
        ("neorl/Walker2d-v4", True),
        ("d4rl/Ant-v4", True),
        ("neorl/HalfCheetah-v4", False),
        ("offsweep/EdgeOfReach-v0", False),
        ("offsweep/Refrigerator-v0", False),
        ("offsweep/RefrigeratorShut-v0", False),
        ("Pendulum-v1", False),
        ("offsweep/Hopper-morphology-v4", True),
        ("offsweep/Walker2d-gravity-0.3-v5", True),
        ("offsweep/HalfCheetah-friction-2-v5", False),
        ("offsweep/Ant-gravity-0.3-v5", True),
        ("offsweep/Pendulum-gravity-0.5-v1", False),
    ],
)
def test_rule_agrees_with_the_simulator(env_id, ends):
    register()
    data = collect(env_id, [(uniform_policy(env_id), 1.0)], 1200, seed=0)
    assert (data.terminals.sum() > 2) == ends
    np.testing.assert_array_equal(terminated(env_id, data.next_observations), data.terminals)


# (entry of the observation, limit): entry 0 is the height, 1 the angle of the torso
LIMITS = {"Hopper": [(0, 0.7), (1, -0.2), (1, 0.2)], "Walker2d": [(0, 0.8), (0, 2.0), (1, -1.0), (1, 1.0)]}


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("robot", LIMITS)
def test_rule_agrees_with_the_simulator_next_to_its_limits(robot: str, version: int):
    """States put into the simulator a millionth to a tenth beside each limit, joints and velocities at random, some
    beyond the 10 at which observations clip."""
    rng = np.random.default_rng(0)
    env: Any = gymnasium.make(f"{robot}-v{version}").unwrapped
    observations, healthy = [], []
    for _ in range(100):
        for entry, limit in LIMITS[robot]:
            for side in (-1, 1):
                qpos, qvel = rng.normal(0.0, 0.5, env.model.nq), rng.normal(0.0, 8.0, env.model.nv)
                qpos[1:3] = 1.2, 0.0
                qpos[1 + entry] = limit + side * 10.0 ** rng.uniform(-6, -1)
                env.set_state(qpos, qvel)
                observations.append(env._get_obs())
                healthy.append(env.is_healthy)
    seen = np.array(observations)
    assert (np.abs(seen) == 10).any()
    assert 0.3 < np.mean(healthy) < 0.7
    for dtype in (np.float64, np.float32):
        np.testing.assert_array_equal(terminated(env.spec.id, seen.astype(dtype)), ~np.array(healthy))


def test_hoppers_bound_of_its_state_holds_for_what_an_observation_shows():
    """Hopper also ends where an entry of its state reaches 100. A joint that far shows; a velocity does not, since
    observations clip it at 10: no rule of the observation can tell."""
    env: Any = gymnasium.make("Hopper-v5").unwrapped
    for entry, value, shown in (
        (3, 99.0, True),
        (3, 101.0, True),
        (4, -101.0, True),
        (8, 99.0, True),
        (8, 101.0, False),
    ):
        state = np.zeros(12)
        state[1], state[entry] = 1.2, value
        env.set_state(state[:6], state[6:])
        assert env.is_healthy == (abs(value) < 100)
        assert bool(terminated("Hopper-v5", env._get_obs())) == (shown and abs(value) > 100)


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("version", [4, 5])
def test_halfcheetah_goes_on_from_any_state(version: int):
    env = gymnasium.make(f"HalfCheetah-v{version}")
    env.reset(seed=0)
    robot: Any = env.unwrapped
    rng = np.random.default_rng(0)
    for _ in range(50):
        robot.set_state(rng.normal(0.0, 3.0, robot.model.nq), rng.normal(0.0, 30.0, robot.model.nv))
        next_obs, _, ended, _, _ = env.step(rng.uniform(-1, 1, 6))
        assert not ended
        assert not terminated(f"HalfCheetah-v{version}", next_obs)


@pytest.mark.parametrize(
    ("env_id", "change", "done"),
    [
        ("Hopper-v2", {}, False),
        ("Hopper-v2", {0: 0.69}, True),
        ("Hopper-v2", {1: 0.21}, True),
        ("Hopper-v2", {1: -0.21}, True),
        ("Hopper-v2", {5: 101.0}, True),
        ("Hopper-v2", {5: float("nan")}, True),
        ("Hopper-v2", {0: float("inf")}, True),
        ("Walker2d-v4", {}, False),
        ("Walker2d-v4", {0: 2.1}, True),
        ("Walker2d-v4", {0: 0.79}, True),
        ("Walker2d-v4", {1: -1.1}, True),
        ("Walker2d-v4", {5: 101.0}, False),
        ("Walker2d-v4", {5: float("nan")}, True),
        ("HalfCheetah-v4", {0: -50.0}, False),
        ("HalfCheetah-v4", {3: float("inf")}, True),
        ("Ant-v5", {0: 1.0}, False),
        ("Ant-v5", {0: 1.01}, True),
        ("Ant-v5", {0: 0.19}, True),
        ("d4rl/Ant-v4", {0: 0.5, 5: float("inf")}, True),
        ("neorl/Hopper-v4", {0: -500.0, 1: 1.2}, False),
        ("neorl/Hopper-v4", {0: float("nan"), 1: 1.2}, True),
        ("neorl/Hopper-v4", {1: 0.69}, True),
        ("neorl/Hopper-v4", {1: 1.2, 2: -0.21}, True),
        ("neorl/Hopper-v4", {1: 1.2, 3: -101.0}, True),
        ("neorl/Walker2d-v4", {0: 500.0, 1: 1.2}, False),
        ("neorl/Walker2d-v4", {0: float("inf"), 1: 1.2}, True),
        ("neorl/Walker2d-v4", {1: 2.1}, True),
        ("neorl/Walker2d-v4", {1: 1.2, 2: 1.1}, True),
        ("neorl/Walker2d-v4", {1: 1.2, 3: -101.0}, True),
        ("neorl/HalfCheetah-v4", {0: 500.0}, False),
        ("Pendulum-v1", {2: 8.0}, False),
        ("offsweep/Refrigerator-v0", {0: -200.0}, False),
    ],
)
def test_rule_by_hand_on_any_leading_axes(env_id, change, done):
    state = torch.zeros(8)
    state[0] = 1.2
    for entry, value in change.items():
        state[entry] = value
    flags = termination_rule(env_id)(state.expand(2, 3, 8))
    assert flags.shape == (2, 3)
    assert flags.eq(done).all()


def test_unknown_environment_lists_the_known():
    with pytest.raises(UserError, match=r"no termination rule for environment 'Swimmer-v5'.*Hopper-v2.*Pendulum-v1"):
        termination_rule("Swimmer-v5")
    with pytest.raises(UserError, match="nearest: Hopper-v5"):
        termination_rule("Hopper-v6")
    with pytest.raises(UserError, match="nearest: neorl/Hopper-v4"):
        termination_rule("neorl/Hopper-v3")


def test_rules_can_be_sent_to_workers():
    for env_id in ("Hopper-v4", "neorl/Walker2d-v4", "d4rl/Ant-v4"):
        rule = termination_rule(env_id)
        assert pickle.loads(pickle.dumps(rule)) is rule
