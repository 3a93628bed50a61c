"""Errors of models that are known by hand: of one with a constant bias, of the simulator itself, of a filtered one."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.diagnostics import Standardiser
from agents.dynamics import Ensemble
from agents.dynamics_reward import DynamicsReward
from agents.method import Measures, TrainingData
from agents.model_error import LOG_ERRORS, REWARDS, ModelError, simulator, steps_told
from agents.mopo import MOPO, MOPOConfig
from agents.networks import StackedMLP
from agents.rollout import Dynamics, Penalty, Step
from agents.transition_filter import FilterConfig, FilteredDynamics
from agents.true_dynamics import SimulatedDynamics
from tests.agents.filters import linear_reward
from tests.agents.test_model_based import assert_equal, train
from tests.agents.test_model_quality import SETTINGS, learner, plane
from tests.agents.test_true_dynamics import make_data

PLANE = "offsweep/EdgeOfReach-v0"


class Biased:
    """EdgeOfReach with a constant bias in the observation, a standard deviation, and holes: not a number wherever
    x > `hole`."""

    num_noises, choices, floats_per_row, observation_dim = 2, (0,), 1, 2

    def __init__(self, bias: tuple[float, float], hole: float = math.inf, noise: float = 0.0) -> None:
        self.bias, self.hole, self.noise = torch.tensor(bias), hole, noise

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> None:
        return None

    def step(
        self, carried_MBX: Tensor | None, state_action_MBY: Tensor, noise_MBZ: Tensor, choice_MB: Tensor,
        penalty: Penalty | None, next_obs_MBS: Tensor,
    ) -> Step:  # fmt: skip
        obs, action = state_action_MBY.split(2, -1)
        next_obs_MBS.copy_(obs + action + self.bias + self.noise * noise_MBZ)
        reward = torch.where(next_obs_MBS[..., 0] > self.hole, math.nan, 0.0)
        return Step(reward, None, None)


def make_actor(members: int = 1, state_dim: int = 2, action_dim: int = 2) -> StackedMLP:
    actor = StackedMLP((members,), (state_dim, 8, 2 * action_dim))
    actor.flat.normal_(generator=torch.Generator().manual_seed(0))
    return actor


def measured(
    dynamics: Dynamics, data: TrainingData | None = None, length: int = 5, seeds: Sequence[int] = (7,),
    actor: StackedMLP | None = None, rows: Tensor | None = None,
) -> list[Measures]:  # fmt: skip
    data = data or plane()
    true = simulator(data)
    assert true is not None
    actor = actor or make_actor(len(seeds), data.observation_dim, data.action_dim)
    return ModelError(data, true)(actor, dynamics, rows, seeds, 3, length)


def test_a_constant_bias_adds_up_in_the_open_loop_and_not_in_single_steps():
    bias = torch.tensor([0.1, -0.3])
    (found,) = measured(Biased((0.1, -0.3)), length=10)
    std = Standardiser(plane().observations).std
    of_a_step = float((bias / std).square().mean().sqrt())
    for step in (1, 5, 10):
        assert found[f"model/rmse_step_{step}"] == pytest.approx(step * of_a_step, rel=1e-4)
        assert found[f"model/one_step_error_step_{step}"] == pytest.approx(of_a_step, rel=1e-4)
        assert found[f"model/alive_share_step_{step}"] == 1.0
    assert found["model/one_step_error"] == pytest.approx(of_a_step, rel=1e-4)
    assert not [name for name in found if "filtered" in name or "survivor" in name or "reward" in name]


def test_errors_of_a_spread_are_root_mean_squares():
    (found,) = measured(Biased((0.0, 0.0), noise=0.2), length=5)
    std = Standardiser(plane().observations).std
    of_a_step = float((0.2 / std).square().mean().sqrt())
    assert found["model/rmse_step_1"] == pytest.approx(of_a_step, rel=0.15)
    assert found["model/rmse_step_5"] == pytest.approx(math.sqrt(5) * of_a_step, rel=0.15)
    assert found["model/one_step_error"] == pytest.approx(of_a_step, rel=0.15)


def test_steps_are_told_up_to_the_last():
    assert steps_told(1) == [1]
    assert steps_told(5) == [1, 5]
    assert steps_told(30) == [1, 5, 10, 20, 30]
    assert steps_told(127) == [1, 5, 10, 20, 50, 100, 127]


def test_a_prediction_that_is_not_finite_leaves_the_sums_before_it():
    (found,) = measured(Biased((1.0, 0.0), hole=-math.inf), length=5)
    assert found == {"model/alive_share_step_1": 0.0, "model/alive_share_step_5": 0.0}
    (found,) = measured(Biased((0.0, 0.0), hole=0.5), length=5)
    assert 0.1 < found["model/alive_share_step_5"] < found["model/alive_share_step_1"] < 0.9  # type: ignore[operator]
    assert found["model/rmse_step_5"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("env_id", ["Hopper-v4", PLANE])
def test_the_simulator_has_no_error(env_id: str):
    """With standardised observations, other rewards and bounds of the actions, from known states."""
    data = make_data(env_id)
    (found,) = measured(SimulatedDynamics(data), data, length=20)
    # a robot's velocities are shown clipped, so that the state that an observation shows may be another one
    for name, value in found.items():
        assert "error" not in name or value == pytest.approx(0.0, abs=1e-4), name
        assert "rmse" not in name or value == pytest.approx(0.0, abs=1e-4), name
    assert "model/rmse_step_1" in found


class Lifted:
    """A simulator, but that it shows the first column so much higher."""

    def __init__(self, true: SimulatedDynamics, height: float) -> None:
        self.true, self.height = true, height
        self.num_noises, self.choices, self.observation_dim = 0, (0,), true.observation_dim
        self.floats_per_row = 1

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> Tensor:
        return self.true.begin(obs_MBS, states_MBX)

    def step(self, *args: Any) -> Step:
        step = self.true.step(*args)
        args[-1][..., 0] += self.height
        return step


def test_a_rollout_that_the_rule_has_ended_leaves_the_sums_behind_its_last_step():
    data = make_data("Hopper-v4")
    down = Lifted(SimulatedDynamics(data), -100.0)  # lies on the ground after its first step
    (found,) = measured(down, data, length=5)
    assert found["model/alive_share_step_1"] == 1.0
    assert found["model/alive_share_step_5"] == 0.0
    assert "model/rmse_step_5" not in found
    # the simulator has fallen, the model has not noticed
    fallen = dataclasses.replace(data, states=None)
    assert data.observation_mean is not None
    assert data.observation_std is not None
    fallen.observations[:, 1] = (0.5 - data.observation_mean[1]) / data.observation_std[1]
    up = Lifted(SimulatedDynamics(fallen), 0.0)
    up.step = lambda *args: (Lifted.step(up, *args), args[-1].zero_())[0]  # type: ignore[method-assign]
    (found,) = measured(up, fallen, length=5)
    assert found["model/alive_share_step_1"] == 1.0
    assert found["model/alive_share_step_5"] == 0.0


def test_starts_may_be_restricted():
    """To rows above the hole, of which every rollout is lost at once."""
    rows = (plane().observations[:, 0] > 1.9).nonzero().squeeze(1)
    (found,) = measured(Biased((0.0, 0.0), hole=0.8), rows=rows)
    assert found["model/alive_share_step_1"] == 0.0


def test_a_member_is_measured_the_same_alone_and_in_a_pack_and_every_time():
    actor, before = make_actor(2), torch.get_rng_state()
    kept = actor.flat.clone()
    pack = measured(Biased((0.1, 0.0), 1.5, 0.1), seeds=(5, 6), actor=actor)
    assert measured(Biased((0.1, 0.0), 1.5, 0.1), seeds=(5, 6), actor=actor) == pack
    for m in range(2):
        (alone,) = measured(Biased((0.1, 0.0), 1.5, 0.1), seeds=(5 + m,), actor=actor.select([m]))
        assert alone == pytest.approx(pack[m], rel=1e-5)
    assert pack[0] != pack[1]
    assert torch.equal(actor.flat, kept)
    assert torch.equal(before, torch.get_rng_state())


# ---- filtered --------------------------------------------------------------------------------------------------

BIAS = 0.5


def half_right(**settings: Any) -> FilteredDynamics:
    """Of EdgeOfReach: two elites, one of which is off by `BIAS` in x, and a discriminator that sees that."""
    change = torch.zeros(2, 4, 6)
    change[:, 2:, :2] = torch.eye(2)  # s' - s = a
    offset = torch.zeros(2, 1, 6)
    offset[1, 0, 0] = BIAS
    tensors = {
        "W0": change, "b0": offset, "max_logvar": torch.full((3,), -18.0), "min_logvar": torch.full((3,), -20.0),
        "mean": torch.zeros(4), "std": torch.ones(4),
    }  # fmt: skip
    off_in_x = [4.0, 0.0, 4.0, 0.0, -4.0, 0.0]  # 4 (s + a - s') in x
    reward = linear_reward([off_in_x], 2, 2, learner=[-2.0], expert=[0.0])
    settings = {"draws": 1, "selection": "argmax", "num_discriminators": 1, **settings}
    return FilteredDynamics(
        Ensemble(tensors, [0, 1], 2), DynamicsReward.from_state_dict(reward), FilterConfig(**settings)
    )


def of_a_step() -> float:
    """The error of a wrong step."""
    return float((BIAS / Standardiser(plane().observations).std[0]).square().div(2).sqrt())


def test_what_a_filter_selects_is_held_beside_the_plain_model_from_the_same_starts():
    (found,) = measured(half_right(), length=10)
    for step in (1, 5, 10):
        assert found[f"model/rmse_filtered_step_{step}"] == pytest.approx(0.0, abs=1e-3)
        assert found[f"model/one_step_error_filtered_step_{step}"] == pytest.approx(0.0, abs=1e-3)
        assert found[f"model/survivor_share_step_{step}"] == 1.0
        # every wrong step of the plain model, half of all, adds the bias
        expected = of_a_step() * math.sqrt(step / 4 + step**2 / 4)
        assert found[f"model/rmse_step_{step}"] == pytest.approx(expected, rel=0.2)
        assert found[f"model/rmse_survivors_unfiltered_step_{step}"] == found[f"model/rmse_step_{step}"]
    assert found["model/one_step_error"] == pytest.approx(of_a_step() / math.sqrt(2), rel=0.1)
    assert found["model/one_step_error_filtered"] == pytest.approx(0.0, abs=1e-3)
    (plain,) = measured(half_right().ensemble, length=10)
    assert {name: found[name] for name in plain} == plain


def test_survivors_are_told_apart_from_what_was_only_selected():
    """With a choice that is as good as random, those survive that had luck; the plain model had none from their
    starts."""
    (found,) = measured(half_right(selection="softmax", temperature=1e6), length=5)
    for step in (1, 5):
        assert found[f"model/rmse_filtered_step_{step}"] > 0.4 * of_a_step()  # type: ignore[operator]
        assert found[f"model/survivor_share_step_{step}"] == pytest.approx(0.5**step, abs=0.1)
    assert found["model/rmse_survivors_step_1"] == pytest.approx(0.0, abs=1e-3)
    assert found["model/rmse_survivors_unfiltered_step_1"] == pytest.approx(of_a_step() / math.sqrt(2), rel=0.3)
    (whole,) = measured(half_right(selection="softmax", temperature=1e6, threshold=0.0), length=5)
    assert whole["model/survivor_share_step_5"] == 1.0
    assert whole["model/rmse_survivors_step_5"] == whole["model/rmse_filtered_step_5"]
    assert whole["model/rmse_filtered_step_5"] == found["model/rmse_filtered_step_5"]


def test_a_reward_that_sees_the_error_falls_with_it():
    (found,) = measured(half_right(draws=3))
    assert found["model/reward_error_correlation"] < -0.8  # type: ignore[operator]
    assert found["model/reward_error_correlation_within"] < -0.8  # type: ignore[operator]
    rewards, errors = found[REWARDS], found[LOG_ERRORS]
    assert isinstance(rewards, list)
    assert isinstance(errors, list)
    assert len(rewards) == len(errors) == 2 * 20 * 6  # at two steps
    wrong = torch.tensor(errors) > -1
    lowest = -math.log(1 - 1 / (1 + math.e))
    assert torch.tensor(rewards)[wrong].tolist() == pytest.approx([lowest] * int(wrong.sum()), abs=1e-3)
    assert torch.tensor(errors)[wrong].mean() == pytest.approx(math.log10(of_a_step()), abs=1e-3)
    assert int(wrong.sum()) == len(errors) / 2


def test_a_filtered_member_is_measured_the_same_alone_and_in_a_pack():
    actor = make_actor(2)
    pack = measured(half_right(selection="softmax"), seeds=(5, 6), actor=actor)
    assert measured(half_right(selection="softmax"), seeds=(5, 6), actor=actor) == pack
    (alone,) = measured(half_right(selection="softmax"), seeds=(6,), actor=actor.select([1]))
    for name, value in alone.items():
        assert value == pytest.approx(pack[1][name], rel=1e-5)


# ---- where there is no simulator -------------------------------------------------------------------------------


def test_an_environment_without_true_dynamics_has_no_simulator():
    for env_id in ("Pendulum-v1", "d4rl/Ant-v4", "unknown/Thing-v0"):
        assert simulator(dataclasses.replace(make_data("Hopper-v4"), env_id=env_id)) is None


def test_data_with_other_columns_than_the_environment_has_none():
    assert simulator(dataclasses.replace(plane(), env_id="Hopper-v4")) is None


def test_mujoco_is_not_loaded_to_find_out_that_there_is_none():
    code = """
import sys, torch
from agents.method import TrainingData
from agents.model_error import simulator
x = torch.zeros(3, 3)
assert simulator(TrainingData("Pendulum-v1", x, x, x[0], x, x[0])) is None
sys.exit("mujoco" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- of a method ------------------------------------------------------------------------------------------------


def of_model(measures: Measures) -> set[str]:
    return {name for name in measures if name.startswith("model/")}


def test_a_method_measures_its_model_and_trains_as_without():
    config = MOPOConfig(**SETTINGS)
    measuring, plain = (learner(MOPO, config) for _ in range(2))
    for epoch in (0, 1):
        assert train(measuring, [epoch]) == train(plain, [epoch])
        found = measuring.diagnostics(epoch + 1)
        assert measuring.diagnostics(epoch + 1) == found
    assert_equal(measuring, plain)
    assert found[0] != found[1]
    for one in found:
        assert {"model/rmse_step_1", "model/rmse_step_3", "model/one_step_error"} <= of_model(one)
        assert "reach/q_mean" in one
    (alone,) = measuring.select([1]).diagnostics(2)
    assert alone == pytest.approx(found[1], rel=1e-4)


def test_a_worse_model_has_larger_errors():
    errors = []
    for quality in (-1.0, 0.0, 0.5):
        method = learner(MOPO, MOPOConfig(model_quality=quality, **SETTINGS))
        train(method, [0])
        errors.append(method.diagnostics(1)[0]["model/one_step_error"])
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(errors[1] / 2, rel=0.1)


@pytest.mark.parametrize("changes", [{"model_quality": 1.0}, {"real_ratio": 1.0}])
def test_of_true_dynamics_and_without_rollouts_nothing_is_measured(changes: dict[str, Any]):
    method = learner(MOPO, MOPOConfig(**{**SETTINGS, **changes}))
    train(method, [0])
    assert not any(map(of_model, method.diagnostics(1)))
