import pickle

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
        ("Ant-v4", True),
        ("neorl/Hopper-v4", True),
        ("neorl/Walker2d-v4", True),
        ("d4rl/Ant-v4", True),
        ("neorl/HalfCheetah-v4", False),
        ("offsweep/EdgeOfReach-v0", False),
        ("offsweep/Refrigerator-v0", False),
        ("Pendulum-v1", False),
    ],
)
def test_rule_agrees_with_the_simulator(env_id, ends):
    register()
    data = collect(env_id, [(uniform_policy(env_id), 1.0)], 1200, seed=0)
    assert (data.terminals.sum() > 2) == ends
    np.testing.assert_array_equal(terminated(env_id, data.next_observations), data.terminals)


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
