"""What is measured of models of the refrigerator, by models and a dynamics reward that are known to the last digit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.dynamics import Ensemble
from agents.dynamics_reward import DynamicsReward, input_bounds
from agents.method import TrainingData
from agents.refrigerator import (
    CONTROLLERS,
    DRAW,
    FAR,
    FILTERED,
    MEAN,
    NEAREST,
    SURVIVORS,
    Controller,
    Course,
    Model,
    controlled,
    grid,
    measure,
    one_step_errors,
    reward_curves,
    rollout_errors,
    support,
)
from agents.transition_filter import FilterConfig
from agents.true_dynamics import SimulatedDynamics
from envs.collect import collect
from envs.dataset import Dataset
from envs.toys import ProportionalController

BIAS, STD = 0.5, 0.4  # of the model's elites, °C


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return collect("offsweep/Refrigerator-v0", [(ProportionalController(), 1.0)], 2000, seed=0)


@pytest.fixture(scope="module")
def data(dataset: Dataset) -> TrainingData:
    return TrainingData.from_dataset(dataset, np.zeros(1, np.float32), np.full(1, 10.0, np.float32))


def linear_ensemble(biases: tuple[float, ...], std: float) -> Ensemble:
    """Models without hidden layers that know the dynamics, T' - T = -0.02 T - 0.98 u + 0.3, but for a bias."""
    weight, bias = torch.zeros(len(biases), 2, 4), torch.zeros(len(biases), 1, 4)
    weight[:, 0, 0], weight[:, 1, 0] = -0.02 * 100.0, -0.98 * 5.0  # inputs are divided by 100 and 1; u = 5 + 5 a
    bias[:, 0, 0] = 0.3 - 0.98 * 5.0 + torch.tensor(biases)
    bias[:, 0, 2:] = 2 * math.log(std)
    tensors = {
        "W0": weight, "b0": bias, "max_logvar": torch.full((2,), 50.0), "min_logvar": torch.full((2,), -50.0),
        "mean": torch.zeros(2), "std": torch.tensor([100.0, 1.0]),
    }  # fmt: skip
    return Ensemble(tensors, list(range(len(biases))), 1)


def knowing_reward(data: TrainingData) -> DynamicsReward:
    """One discriminator whose logit is -|T' - the true T'|, known from 0 down to -2 °C."""
    bounds = input_bounds(data.observations, data.actions)
    scales, centers = [], []
    for name, target in (("observation", 0.8), ("action", 1.0), ("observation", 0.8)):
        low, high = float(bounds[f"{name}_low"]), float(bounds[f"{name}_high"])
        scales.append((high - low) / 2 / target)
        centers.append((high + low) / 2)
    # T' - 0.98 T + 0.98 (5 + 5 a) - 0.3 in unscaled inputs
    slopes, offset = [-0.98, 0.98 * 5.0, 1.0], 0.98 * 5.0 - 0.3
    first = torch.tensor([slope * scale for slope, scale in zip(slopes, scales, strict=True)])
    constant = offset + sum(slope * center for slope, center in zip(slopes, centers, strict=True))
    tensors = {
        "W0": torch.stack((first, -first), 1).unsqueeze(0), "b0": torch.tensor([[[constant, -constant]]]),
        "W1": -torch.ones(1, 2, 1), "b1": torch.zeros(1, 1, 1), "expert_logit": torch.zeros(1),
        "learner_logit": torch.full((1,), -2.0), **bounds,
    }  # fmt: skip
    state = {
        "tensors": tensors, "delta_input": False, "observation_dim": 1, "snapshot_updates": [1], "distilled": None,
    }  # fmt: skip
    return DynamicsReward.from_state_dict(state)


def test_controllers_by_hand() -> None:
    pid = Controller("pid", 0.1, 0.005, 0.4, set_point=0.0)
    errors = [10.0, 9.0, -1.0]
    powers, total, last = [], 0.0, 0.0
    for error in errors:
        total += error
        powers.append(float(pid.powers(*(torch.tensor([x]) for x in (error, total, last)))))
        last = error
    assert powers == pytest.approx([1.0 + 0.05 + 4.0, 0.9 + 0.095 - 0.4, 0.0])  # the last would heat
    strong = CONTROLLERS[1].powers(*(torch.tensor([x]) for x in (13.75, 13.75, 0.0)))
    assert float(strong) == 10.0


def test_the_simulator_under_the_behaviours_controller_is_a_line_by_hand(data: TrainingData) -> None:
    course = controlled(Model(SimulatedDynamics(data), data), CONTROLLERS[0], seed=0, num=2, length=5)
    temperature = 10.0
    for step in range(5):
        power = 0.2 * (temperature + 3.75)
        np.testing.assert_allclose(course.powers_TB[step], [power] * 2, rtol=1e-5)
        temperature = 0.98 * (temperature - power) + 0.3
        np.testing.assert_allclose(course.temperatures_TB[step + 1], [temperature] * 2, rtol=1e-5)
    assert course.alive_TB.all()


def test_errors_count_survivors_or_all() -> None:
    temperatures = torch.tensor([[0.0, 0.0], [1.0, 3.0], [1.0, 5.0], [2.0, 5.0]])
    alive = torch.tensor([[True, True], [True, False], [False, False]])
    course = Course(temperatures, torch.zeros(3, 2), alive)
    truth = torch.tensor([0.0, 1.0, 1.0, 1.0])
    everyone, left = (rollout_errors(course, truth, survivors) for survivors in (False, True))
    assert everyone.rmse_T.tolist() == pytest.approx([math.sqrt(2), math.sqrt(8), math.sqrt(17 / 2)])
    assert everyone.rmse == pytest.approx(math.sqrt((0 + 4 + 0 + 16 + 1 + 16) / 6))
    assert left.share_T.tolist() == [1.0, 0.5, 0.0]
    assert left.rmse_T[:2].tolist() == pytest.approx([math.sqrt(2), 0.0])
    assert math.isnan(left.rmse_T[2])
    assert left.rmse == pytest.approx(math.sqrt((0 + 4 + 0) / 3))


def test_one_step_errors_are_those_of_the_model_everywhere(data: TrainingData) -> None:
    truth = Model(SimulatedDynamics(data), data)
    mean = Model(linear_ensemble((BIAS, -BIAS), STD), data, noisy=False)
    np.testing.assert_allclose(one_step_errors(mean, truth, seed=0), torch.full((36, 26), BIAS), atol=1e-4)
    noisy = one_step_errors(Model(linear_ensemble((0.0,), STD), data), truth, seed=0)
    assert float(noisy.mean()) == pytest.approx(STD * math.sqrt(2 / math.pi), rel=0.05)


def test_the_support_counts_the_rows_at_the_nearest_points(data: TrainingData) -> None:
    counts = support(Model(linear_ensemble((0.0,), STD), data), data)
    temperatures, powers = grid()
    assert int(counts.sum()) == len(data.observations)
    where = counts.nonzero()
    # the controller's line, give or take its noise and half the distance of two points
    line = 0.2 * (temperatures[where[:, 0]] + 3.75)
    assert (powers[where[:, 1]] - line).abs().max() < 0.5 + 0.2 + 0.1
    assert temperatures[where[:, 0]].max() == 10.0


def test_a_reward_that_knows_peaks_at_the_truth_however_far_the_data(data: TrainingData) -> None:
    truth = Model(SimulatedDynamics(data), data)
    for curve in reward_curves(knowing_reward(data), truth, FAR):
        assert curve.peak == pytest.approx(0.0, abs=1e-5)
        away = curve.rewards_C[(curve.offsets_C.abs() - 1.0).abs() < 1e-3]
        # half way from the best logit to the worst known: l' = 0, p = 1/2
        assert away.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-3)


def test_the_filter_mends_what_its_reward_knows_and_survivors_are_told_apart(data: TrainingData) -> None:
    ensemble = linear_ensemble((BIAS, -BIAS, 3 * BIAS), STD)
    config = FilterConfig(selection="argmax", num_discriminators=1, threshold=1.05)
    measured = measure(ensemble, knowing_reward(data), config, data, seed=0, num_rollouts=60, length=20)
    for controller in CONTROLLERS:
        by_way = {way: measured.errors[controller.name, way] for way in (DRAW, MEAN, FILTERED, SURVIVORS)}
        assert by_way[FILTERED].rmse < 0.7 * by_way[MEAN].rmse < by_way[DRAW].rmse
        share = by_way[SURVIVORS].share_T
        assert 0 < share[-1] < 1
        assert (share.diff() <= 0).all()
        assert by_way[SURVIVORS].rmse < by_way[FILTERED].rmse
        nearest = measured.errors[controller.name, NEAREST]
        assert nearest.rmse == pytest.approx(by_way[FILTERED].rmse, rel=0.05)  # both know
        assert by_way[FILTERED].share_T.tolist() == [1.0] * 20
    for supported in (True, False):
        assert measured.map_error(FILTERED, supported) < 0.5 * measured.map_error(DRAW, supported)
    assert float(measured.rewards.of_truth.min()) > 1.31  # the highest there is
    assert float(measured.rewards.of_model.max()) < 1.2


def test_all_is_repeated_by_its_seed(data: TrainingData) -> None:
    ensemble, config = linear_ensemble((BIAS, -BIAS), STD), FilterConfig(num_discriminators=1)

    def errors(seed: int) -> list[Tensor]:
        measured = measure(ensemble, knowing_reward(data), config, data, seed, num_rollouts=5, length=4)
        return [e.rmse_T for e in measured.errors.values() if torch.isfinite(e.rmse_T).all()]

    first, again, other = errors(0), errors(0), errors(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_temperatures_that_are_no_temperatures_are_refused(data: TrainingData) -> None:
    with pytest.raises(ValueError, match="in °C"):
        Model(linear_ensemble((0.0,), STD), data.standardised())
