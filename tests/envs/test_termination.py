import pickle

import numpy as np
import pytest
import torch

from envs.collect import collect, uniform_policy
from envs.errors import UserError
from envs.termination import termination_rule


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5"])
def test_rule_agrees_with_the_simulator(env_id):
    data = collect(env_id, [(uniform_policy(env_id), 1.0)], 1500, seed=0)
    done = termination_rule(env_id)(torch.from_numpy(data.next_observations))
    assert done.dtype == torch.bool
    assert data.terminals.sum() > 20
    np.testing.assert_array_equal(done.numpy(), data.terminals)


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
        ("Pendulum-v1", {2: 8.0}, False),
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
    with pytest.raises(UserError, match=r"no termination rule for environment 'Ant-v5'.*Hopper-v2.*Pendulum-v1"):
        termination_rule("Ant-v5")
    with pytest.raises(UserError, match="nearest: Hopper-v5"):
        termination_rule("Hopper-v6")


def test_rules_can_be_sent_to_workers():
    rule = termination_rule("Hopper-v4")
    assert pickle.loads(pickle.dumps(rule)) is rule
