"""Measures of synthetic rows that are known by hand: of rows with a constant bias, of true ones, of sets of points."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.actors import TanhActor
from agents.diagnostics import Standardiser
from agents.method import TrainingData
from agents.model_error import simulator
from agents.networks import StackedMLP
from agents.replay import transition_rows
from agents.trajectory_metrics import (
    DynamicsError,
    PoolDiagnostics,
    log_likelihood,
    own_log_likelihood,
    support_overlap,
    terminal_measures,
)
from envs.collect import collect, uniform_policy
from envs.episodes import make_env
from envs.toys import EdgeOfReach
from envs.transforms import STD_OFFSET
from tests.agents.test_model_quality import plane


def make_actor(members: int = 1, state_dim: int = 2, action_dim: int = 2) -> TanhActor:
    network = StackedMLP((members,), (state_dim, 8, action_dim))
    network.flat.normal_(generator=torch.Generator().manual_seed(0))
    return TanhActor(network)


def plane_rows(bias: tuple[float, float] = (0.0, 0.0), reward_bias: float = 0.0, count: int = 200) -> Tensor:
    """What EdgeOfReach does, and something more."""
    g = torch.Generator().manual_seed(1)
    obs, action = 4 * torch.rand(count, 2, generator=g) - 2, 2 * torch.rand(count, 2, generator=g) - 1
    reward = torch.tensor(EdgeOfReach.reward(obs.numpy())).float() + reward_bias
    return transition_rows(obs, action, reward, torch.zeros(count), obs + action + torch.tensor(bias))


def plane_error(data: TrainingData) -> DynamicsError:
    true = simulator(data)
    assert true is not None
    return DynamicsError(data, true)


def robot_data(env_id: str = "Hopper-v5", rows: int = 300) -> TrainingData:
    """Random actions in a robot."""
    dataset = collect(env_id, [(uniform_policy(env_id), 1.0)], rows, seed=0)
    space = make_env(env_id).action_space
    return TrainingData.from_dataset(dataset, space.low, space.high)  # type: ignore[attr-defined]


def rows_of(data: TrainingData) -> Tensor:
    return transition_rows(data.observations, data.actions, data.rewards, data.terminals, data.next_observations)


def test_a_bias_is_the_error_whatever_the_units():
    data, bias = plane(), torch.tensor([0.1, -0.3])
    errors = plane_error(data)(plane_rows((0.1, -0.3), reward_bias=0.5))
    std = Standardiser(data.observations).std
    expected = float((bias / std).square().mean())
    torch.testing.assert_close(errors.standardised_R, torch.full((200,), expected).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(errors.raw_R, torch.full((200,), 0.05).double(), rtol=1e-4, atol=0)
    of_reward = (0.5 / (float(data.rewards.double().std(correction=0)) + STD_OFFSET)) ** 2
    torch.testing.assert_close(errors.reward_R, torch.full((200,), of_reward).double(), rtol=1e-4, atol=0)
    # the same rows as a method sees them whose dataset standardises observations and scales rewards
    scaled = dataclasses.replace(data.standardised(), rewards=data.rewards * 2 - 1, reward_scale=2.0, reward_shift=-1.0)
    mean, spread = scaled.observation_mean, scaled.observation_std
    rows = plane_rows((0.1, -0.3), reward_bias=0.5)
    rows = torch.cat(((rows[:, :2] - mean) / spread, rows[:, 2:4], rows[:, 4:5] * 2 - 1, rows[:, 5:6],
                      (rows[:, 6:] - mean) / spread), 1)  # fmt: skip
    again = plane_error(scaled)(rows)
    torch.testing.assert_close(again.raw_R, errors.raw_R, rtol=1e-4, atol=0)
    torch.testing.assert_close(again.standardised_R, errors.standardised_R, rtol=5e-3, atol=0)
    torch.testing.assert_close(again.reward_R, errors.reward_R, rtol=5e-3, atol=0)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5"])
def test_recorded_transitions_have_no_error(env_id: str):
    data = robot_data(env_id)
    errors = plane_error(data)(rows_of(data))
    kept = ~errors.clipped_R & ~errors.unhealthy_R
    assert kept.double().mean() > 0.8
    assert float(errors.standardised_R[kept].median()) < 1e-9
    assert float(errors.standardised_R[kept].max()) < 1e-4
    assert float(errors.reward_R[kept].max()) < 1e-4


def test_states_that_the_simulator_cannot_be_put_into_are_left_out_and_counted():
    data = robot_data()
    rows = rows_of(data)[:4].clone()
    assert not plane_error(data)(rows).clipped_R.any()
    rows[0, 6] = -10.0  # a velocity at the limit
    rows[1, 7] = 11.0  # beyond it
    rows[2, 0] = 0.5  # fallen
    errors = plane_error(data)(rows)
    assert errors.clipped_R.tolist() == [True, True, False, False]
    assert errors.unhealthy_R.tolist() == [False, False, True, False]
    assert errors.standardised_R.isnan().tolist() == [True, True, True, False]
    # a limit that standardising has rounded is one all the same
    scaled = data.standardised()
    at_limit = torch.cat(((rows[:1, :11] - scaled.observation_mean) / scaled.observation_std, rows[:1, 11:]), 1)
    assert plane_error(scaled)(at_limit).clipped_R.tolist() == [True]


def test_open_loop_errors_gather_and_one_step_errors_do_not():
    """Trajectories of EdgeOfReach with a constant bias: after t steps it is t times the bias."""
    data, bias, count, length = plane(), torch.tensor([0.02, -0.05]), 20, 6
    g = torch.Generator().manual_seed(2)
    action = 2 * torch.rand(count, length, 2, generator=g) - 1
    start = torch.rand(count, 1, 2, generator=g)
    after = start + (action + bias).cumsum(1)
    before = torch.cat((start, after[:, :-1]), 1)
    zeros = torch.zeros(count, length)
    rows = transition_rows(before, action, zeros, zeros, after).flatten(0, 1)
    trajectory = torch.arange(count).repeat_interleave(length)
    step = torch.arange(1, length + 1).repeat(count)
    of_step = (bias / Standardiser(data.observations).std).square().mean().double()
    # in any order, and without the last row of one of them
    order = torch.randperm(len(rows), generator=g)
    order = order[(trajectory[order] != 3) | (step[order] < length)]
    found = plane_error(data).open_loop(rows[order], step[order], trajectory[order])
    torch.testing.assert_close(found, step[order].double().square() * of_step, rtol=1e-3, atol=0)
    errors = plane_error(data)(rows[order])
    torch.testing.assert_close(errors.standardised_R, of_step.expand(len(order)), rtol=1e-3, atol=0)


def test_open_loop_ends_where_an_episode_does_and_begins_in_known_states():
    data = robot_data()
    rows = rows_of(data)
    assert data.episode_starts is not None
    ends = torch.diff(data.episode_starts, append=torch.tensor([len(rows)]))
    steps = torch.cat([torch.arange(1, int(n) + 1) for n in ends])
    trajectory = torch.arange(len(ends)).repeat_interleave(ends)
    measure = plane_error(data)
    found = measure.open_loop(rows, steps, trajectory)
    # recorded episodes are repeated as long as no state is hidden by the limit of velocities
    assert float(found[steps <= 3].max()) < 1e-4
    assert found.isfinite().double().mean() > 0.9
    changed = rows.clone()
    changed[0, 7] = 10.0  # not known
    longer = steps[trajectory == 1]
    at = torch.where(trajectory == 1)[0][0]
    changed[at, -11:] = 0.3  # fallen
    found = measure.open_loop(changed, steps, trajectory)
    assert found[trajectory == 0].isnan().all()
    assert found[trajectory == 1].isnan().tolist() == [False] + [True] * (len(longer) - 1)


def test_likelihood_of_a_deterministic_policy_is_that_of_a_normal_around_it():
    actor, rows = make_actor(), plane_rows()
    chosen = actor.sample(rows[:, :2].unsqueeze(0), torch.zeros(1, 200, 2))[0]
    expected = -0.5 * (rows[:, 2:4] - chosen).square().sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(log_likelihood(actor, rows), expected)
    own = own_log_likelihood(actor, rows, torch.Generator().manual_seed(0))
    torch.testing.assert_close(own, torch.full((200,), -math.log(2 * math.pi)))


def test_supports_of_points_by_hand():
    """k = 1 on a line: balls of the reference have radii 1, 1, 2; those of the model 3, 3."""
    real, made = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.5], [-1.5]])
    assert support_overlap(real, made, k=1) == {"precision": 0.5, "recall": 1.0, "coverage": pytest.approx(2 / 3)}
    # far apart points of the model have large balls: recall is fooled, coverage is not
    assert support_overlap(real, torch.tensor([[-9.0], [12.0]]), k=1) == {
        "precision": 0.0, "recall": 1.0, "coverage": 0.0
    }  # fmt: skip


def test_terminals_by_hand():
    done, ended = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([1, 0, 1, 1, 0]).bool()
    assert terminal_measures(done, ended) == {
        "rate": 0.4, "rule_rate": pytest.approx(0.6), "precision": 0.5, "recall": pytest.approx(1 / 3)
    }  # fmt: skip
    none = torch.zeros(5, dtype=torch.bool)
    assert math.isnan(terminal_measures(none, ended)["precision"])


def test_pools_are_told_apart_by_step_and_member():
    data, actor = plane(), make_actor(2)
    measure = PoolDiagnostics(data)
    right, wrong = plane_rows(), plane_rows((0.2, 0.0))
    rows = torch.cat((right, wrong))
    # the second step's rows have the bias; negative tags are of odd starts
    tags = torch.cat((torch.full((200,), 1), torch.full((200,), -2))).to(torch.int16)
    one, two = measure(actor, [rows, right], [tags, tags[:200]], [3, 4], 0, 2)
    bias = float((torch.tensor([0.2, 0.0]) / Standardiser(data.observations).std).square().mean())
    assert one["synthetic/dynamics_error_step_2"] == pytest.approx(bias, rel=1e-4)
    assert one["synthetic/dynamics_error_median_step_1"] == pytest.approx(0.0, abs=1e-10)
    assert one["synthetic/dynamics_error"] == pytest.approx(bias / 2, rel=1e-4)
    assert "synthetic/dynamics_error_step_2" not in two
    assert two["synthetic/dynamics_error"] == pytest.approx(0.0, abs=1e-10)
    # the data of `plane` have noise of 0.01
    assert one["synthetic/dynamics_error_raw_dataset"] == pytest.approx(1e-4, rel=0.2)
    assert one["synthetic/terminal_rate"] == 0.0
    assert "synthetic/terminal_precision" not in one
    for m, found in enumerate((one, two)):
        mine = log_likelihood(actor.select([m]), [rows, right][m]).double().mean()
        assert found["synthetic/log_likelihood"] == pytest.approx(float(mine), rel=1e-5)
        assert found["synthetic/log_likelihood_policy"] == pytest.approx(-math.log(2 * math.pi), rel=1e-5)
    # a member in a pack as alone, and the same every time
    assert measure(actor.select([1]), [right], [tags[:200]], [4], 0, 2) == [two]
    assert measure(actor, [rows, right[:0]], [tags, tags[:0]], [3, 4], 0, 2) == [one, {}]


def test_rows_of_the_dataset_cover_it_and_others_do_not():
    data = plane()
    measure = PoolDiagnostics(data)
    like = measure.support(rows_of(data)[torch.randperm(len(data.rewards))])
    far = plane_rows()
    far[:, :2] += 50.0
    assert min(like.values()) > 0.9
    assert measure.support(far)["precision"] == 0.0
    assert measure.support(far)["coverage"] == 0.0
    assert np.isfinite(list(measure.support(far).values())).all()
