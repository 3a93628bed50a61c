"""Edge-of-reach diagnostics against loops and hand computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agents.diagnostics import (
    Standardiser,
    auroc,
    ensemble_values,
    expert_value,
    log10_slope,
    nearest_distances,
    shown_steps,
    value_metrics,
)
from agents.networks import StackedMLP
from agents.sac import LOG_STD_MAX, LOG_STD_MIN
from envs.dataset import Scaling


def test_distances_are_those_of_a_loop_that_leaves_out_the_own_side():
    g = torch.Generator().manual_seed(0)
    queries, inputs = torch.randn(600, 3, generator=g), torch.randn(700, 3, generator=g)
    signs, input_signs = (torch.randint(-1, 2, (n,), generator=g) for n in (600, 700))
    queries[:50] = inputs[:50]  # 0 apart from what they may be compared with, and else not
    found = nearest_distances(queries, signs.to(torch.int8), inputs, input_signs.to(torch.int8))
    for q in (*range(20), *range(510, 530)):
        allowed = [(queries[q] - inputs[r]).norm() for r in range(700) if not signs[q] * input_signs[r] > 0]
        assert float(found[q]) == pytest.approx(float(min(allowed)), abs=3e-3)
    own = signs[:50] * input_signs[:50] > 0
    assert own.any()
    assert (found[:50][own] > 0.01).all()
    assert (found[:50][~own] < 3e-3).all()


def test_a_query_that_is_comparable_with_nothing_is_far_from_everything():
    far = nearest_distances(torch.zeros(1, 2), torch.ones(1), torch.zeros(4, 2), torch.ones(4))
    assert float(far) > 1e6


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0], [1.0, 2.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0, 1.0], 0.5),
        # pairs: 1 against 0, 1, 2: 1, 1/2, 0; 3 against 0, 1, 2: all; 1.5 + 3 of 6
        ([1.0, 3.0], [0.0, 1.0, 2.0], 4.5 / 6),
    ],
)
def test_auroc_counts_pairs_and_halves_ties(positive: list[float], negative: list[float], expected: float):
    ignored = [9.0, -9.0]
    scores = torch.tensor([*positive, *negative, *ignored])
    kind = torch.tensor([1] * len(positive) + [0] * len(negative) + [2] * len(ignored))
    assert float(auroc(scores, kind == 1, kind == 0)) == pytest.approx(expected)


def test_auroc_is_undefined_without_two_classes_or_with_scores_that_are_not_finite():
    scores, yes, no = torch.ones(3), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    assert math.isnan(float(auroc(scores, yes, no)))
    assert math.isnan(float(auroc(scores, no, yes)))
    mixed = torch.tensor([True, False, False])
    assert math.isnan(float(auroc(torch.tensor([1.0, math.inf, 0.0]), mixed, ~mixed)))


def linear(lead: tuple[int, ...], sizes: tuple[int, ...], weights: Tensor) -> StackedMLP:
    """Networks that pass their first input on through a hidden unit, and multiply it: x -> weight * relu(x_0)."""
    network = StackedMLP(lead, sizes)
    network.weights[0][:, 0, 0] = 1.0
    network.weights[1][:, 0, 0] = weights
    return network


def test_values_of_an_ensemble_by_hand():
    # two members, S = A = 1; actors: mean = weight * relu(s), standard deviation exp(0) = 1
    actor = linear((2,), (1, 4, 2), torch.tensor([0.5, -0.5]))
    critic = StackedMLP((2, 2), (2, 4, 1))
    critic.weights[0][:, 1, 0] = 1.0  # of the action only
    critic.biases[0][:, 0, 0] = 2.0  # so that the unit is always active
    critic.weights[1][:, 0, 0] = torch.tensor([1.0, 3.0, -1.0, 0.5])
    g = torch.Generator().manual_seed(0)
    obs, noise = torch.rand(2, 300, 1, generator=g), torch.randn(2, 300, 1, generator=g)
    assert LOG_STD_MIN < 0 < LOG_STD_MAX
    found = ensemble_values(actor, critic, obs, noise)
    assert found.shape == (2, 2, 300)
    for m, mean in enumerate((0.5, -0.5)):
        hidden = 2.0 + torch.tanh(mean * obs[m, :, 0] + noise[m, :, 0])
        for n in range(2):
            torch.testing.assert_close(found[m, n], [[1.0, 3.0], [-1.0, 0.5]][m][n] * hidden)


def plain(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name.removeprefix("reach/"): float(x) for name, x in metrics.items() if math.isfinite(float(x))}


TAGS = torch.tensor([0, 1, -1, 2, -2, 2, -2], dtype=torch.int8)
DONE = torch.tensor([0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
BEYOND = torch.tensor([1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
VALUES = torch.tensor([[1.0, 2, 3, 9, 5, 4, 99], [0.0, 2, 5, 7, 6, 8, 77]])  # two critics


def test_metrics_of_targets_by_hand_with_the_proxy():
    found = plain(value_metrics(VALUES, TAGS, DONE, BEYOND, None, 2))
    # minima 0 2 3 7 5 4; penalties 1/2 0 1 1 1/2 2; the only edge state is the fourth
    assert found == pytest.approx({
        "share": 1 / 3, "share_control": 1 / 2, "q_mean": 21 / 6, "q_edge": 7, "q_within": 14 / 5,
        "penalty_edge": 1, "penalty_within": 4 / 5, "variance_edge": 1,
        "variance_within": (0.25 + 0 + 1 + 0.25 + 4) / 5, "auroc": 3.5 / 5, "auroc_variance": 3.5 / 5,
        "q_step_01": 2.5, "q_step_02": 16 / 3, "q_step_02_edge": 7, "q_step_02_within": 4.5,
    })  # fmt: skip


def test_exact_labels_take_the_place_of_the_proxy():
    edge = torch.tensor([0, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    found = plain(value_metrics(VALUES, TAGS, DONE, BEYOND, edge, 2))
    assert found["share"] == pytest.approx(1 / 3)
    assert found["edge_share"] == pytest.approx(2 / 7)  # of all targets; a terminal one is none
    assert (found["q_edge"], found["q_within"]) == pytest.approx((3.5, 14 / 4))
    assert found["q_step_01_edge"] == 3
    # penalties 1 and 2 against 1/2, 0, 1, 1/2
    assert found["auroc"] == pytest.approx(7.5 / 8)


def test_what_is_not_defined_is_not_a_number():
    found = plain(value_metrics(VALUES[:, :1], TAGS[:1], DONE[:1], BEYOND[:1], None, 2))
    assert set(found) == {"q_mean", "q_within", "penalty_within", "variance_within"}


def test_at_most_twenty_steps_are_told_apart():
    assert shown_steps(3) == [1, 2, 3]
    steps = shown_steps(50)
    assert (len(steps), steps[0], steps[-1]) == (20, 1, 50)
    assert steps == sorted(set(steps))


def test_the_slope_of_the_logarithm_by_hand():
    updates = [1000, 2000, 4000]
    assert log10_slope(updates, [10.0, 100.0, 10_000.0]) == pytest.approx(1.0)
    # 0, 1, 1 at 1, 2, 3: slope 1/2; a mean that is not positive has no logarithm
    assert log10_slope([1000, 1500, 2000, 3000], [1.0, -3.0, 10.0, 10.0]) == pytest.approx(0.5)
    assert log10_slope([1000], [5.0]) is None
    assert log10_slope([1000, 2000, 3000], [5.0, 6.0, -1.0]) is None


@pytest.mark.parametrize(
    ("env_id", "value"), [("HalfCheetah-v4", 1213.4), ("Hopper-v4", 323.4), ("Walker2d-v4", 459.2)]
)
def test_the_value_of_an_expert(env_id: str, value: float):
    """The derived values of a score of 100 over 1,000 steps with gamma = 0.99."""
    assert expert_value(env_id, 0.99) == pytest.approx(value, abs=0.05)
    scaled = expert_value(env_id, 0.99, Scaling(reward_scale=2.0, reward_shift=-1.0))
    assert scaled == pytest.approx(2 * value - 100, abs=0.2)


def test_an_expert_without_a_positive_value_or_a_reference_has_none():
    assert expert_value("offsweep/EdgeOfReach-v0", 0.99) is None
    assert expert_value("Pendulum-v1", 0.99) is None
    # -147.62 / 200 + 1 a step
    factor = (1 - 0.99**200) / 0.01
    assert expert_value("Pendulum-v1", 0.99, Scaling(reward_shift=1.0)) == pytest.approx((1 - 0.7381) * factor)


def test_a_column_that_hardly_moves_does_not_decide_distances():
    observations = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    shown = Standardiser(observations)(torch.tensor([[2.0, 5.001], [1e30, 5.0]]))
    torch.testing.assert_close(shown[0], torch.tensor([1.0, 1.0]), rtol=2e-3, atol=1e-3)
    assert float(shown[1, 0]) == 1e6
