"""Edge-of-reach diagnostics against loops and hand computations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agents.diagnostics import (
    Standardiser,
    _distances,
    auroc,
    collapse,
    ensemble_values,
    expert_value,
    growth_metrics,
    log10_slope,
    measure,
    nearest_distances,
    shown_steps,
    spearman,
    value_metrics,
)
from agents.method import TrainingData
from agents.networks import StackedMLP
from agents.ravl import RAVL, RAVLConfig
from agents.replay import Replay, transition_rows
from agents.squashed import LOG_STD_MAX, LOG_STD_MIN
from envs.dataset import Scaling
from envs.reach import exact_edge_test


def test_distances_are_those_of_a_loop_that_leaves_out_the_own_side():
    g = torch.Generator().manual_seed(0)
    queries, inputs = torch.randn(600, 3, generator=g), torch.randn(700, 3, generator=g)
    signs, input_signs = (torch.randint(-1, 2, (n,), generator=g) for n in (600, 700))
    queries[:50] = inputs[:50]  # 0 apart from what they may be compared with, and else not
    found = nearest_distances(queries, signs.to(torch.int16), inputs, input_signs.to(torch.int16))
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


TAGS = torch.tensor([0, 1, -1, 2, -2, 2, -2], dtype=torch.int16)
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


# ---- of whole packs ---------------------------------------------------------------------------------------------

K = 2  # steps of the rollouts below; one starts somewhere in the square, goes along x and to its end


def rollout_rows(starts: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of two steps of every rollout and their tags; rollouts at odd places have negative ones."""
    action, zero = torch.zeros(len(starts), 1), torch.zeros(len(starts))
    half = torch.where(torch.arange(len(starts)) % 2 == 1, -1, 1)
    rows = [transition_rows(s, action, zero, zero, t) for s, t in ((starts, first), (first, last))]
    return torch.cat(rows), torch.cat((half, 2 * half)).to(torch.int16)


def replay_of(num_members: int, rows: Tensor, tags: Tensor) -> Replay:
    g = torch.Generator().manual_seed(1)
    states = torch.rand(500, 2, generator=g) * 4 - 2
    zero = torch.zeros(500)
    replay = Replay(transition_rows(states, zero.unsqueeze(1), zero, zero, states), num_members, len(rows))
    for m in range(num_members):
        replay.add(m, rows, tags)
    return replay


def networks(num_members: int) -> tuple[StackedMLP, StackedMLP]:
    actor, critics = StackedMLP((num_members,), (2, 8, 2)), StackedMLP((num_members, 3), (3, 8, 1))
    for network in (actor, critics):
        network.flat.normal_(generator=torch.Generator().manual_seed(2))
    return actor, critics


def measured(
    rows: Tensor, tags: Tensor, real_ratio: float = 0.0, seeds: tuple[int, ...] = (0,)
) -> list[dict[str, float]]:
    replay = replay_of(len(seeds), rows, tags)
    standardiser = Standardiser(replay.gather(torch.arange(500))[:, :2])
    test = exact_edge_test("offsweep/EdgeOfReach-v0")
    return measure(*networks(len(seeds)), replay, seeds, 3, real_ratio, K, standardiser, test)


def test_rollouts_that_leave_the_square_end_beyond_what_is_updated():
    g = torch.Generator().manual_seed(0)
    starts = torch.rand(400, 2, generator=g) * 4 - 2
    to_the_edge = starts.clone()
    to_the_edge[:, 0] = 3.5  # of reach in two steps, and no input
    (found,) = measured(*rollout_rows(starts, starts, to_the_edge))
    assert found["reach/share"] == 1.0
    assert found["reach/share_control"] < 0.05  # 0.01 by the threshold's making
    assert found["reach/edge_share"] == pytest.approx(0.5, abs=0.05)
    assert found["reach/q_step_02_edge"] == found["reach/q_edge"]
    assert "reach/q_step_02_within" not in found
    (mixed,) = measured(*rollout_rows(starts, starts, to_the_edge), real_ratio=0.5)
    assert mixed["reach/edge_share"] == pytest.approx(0.25, abs=0.04)
    (inside,) = measured(*rollout_rows(starts, starts, starts))
    assert inside["reach/share"] < 0.05
    assert inside["reach/edge_share"] == 0.0
    assert "reach/auroc" not in inside


def test_the_inputs_of_the_own_half_do_not_count():
    """Fifty rollouts of one half lead to the same place, far from all else, and go on from there."""
    g = torch.Generator().manual_seed(0)
    starts = torch.rand(400, 2, generator=g) * 4 - 2
    far = starts.clone()
    far[0:100:2] = torch.tensor([50.0, 0.0])
    replay = replay_of(1, *rollout_rows(starts, far, far))
    standardiser = Standardiser(replay.gather(torch.arange(500))[:, :2])
    queries = standardiser(torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 0.0]]))
    tags = torch.tensor([1, -1, 1], dtype=torch.int16)
    distances, threshold = _distances(replay, 0, queries, tags, standardiser, torch.Generator().manual_seed(0))
    assert distances[0] > 30
    assert distances[1:].max() < 0.3
    assert 0 < threshold < 50


def test_a_member_is_measured_the_same_alone_and_in_a_pack_and_every_time():
    g = torch.Generator().manual_seed(0)
    starts = torch.rand(300, 2, generator=g) * 4 - 2
    rows, tags = rollout_rows(starts, starts * 1.2, starts * 1.6)
    pack = measured(rows, tags, 0.1, seeds=(5, 6))
    assert measured(rows, tags, 0.1, seeds=(5, 6)) == pack
    replay = replay_of(2, rows, tags)
    standardiser = Standardiser(replay.gather(torch.arange(500))[:, :2])
    actor, critics = networks(2)
    before = [x.clone() for x in (actor.flat, critics.flat, replay.member_rows(0))]
    for m in range(2):
        (alone,) = measure(
            actor.select([m]), critics.select([m]), replay.select([m]), [5 + m], 3, 0.1, K, standardiser,
            exact_edge_test("offsweep/EdgeOfReach-v0"),
        )  # fmt: skip
        assert alone == pytest.approx(pack[m], rel=1e-5)
    assert pack[0] != pack[1]
    assert all(map(torch.equal, before, (actor.flat, critics.flat, replay.member_rows(0))))


def test_nothing_is_measured_without_model_rows():
    replay = Replay(torch.zeros(10, 7), 2, 0)
    actor, critics = networks(2)
    assert measure(actor, critics, replay, (0, 1), 0, 1.0, K, Standardiser(torch.zeros(10, 2)), None) == [{}, {}]


def test_a_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch):
    """On a device whose tensors have no values, so that nothing can be asked before the end."""
    reads: list[tuple[int, ...]] = []

    def read(table_MX: Tensor) -> list[list[float]]:
        reads.append(tuple(table_MX.shape))
        return [[math.nan] * table_MX.shape[1]] * table_MX.shape[0]

    monkeypatch.setattr("agents.diagnostics._read", read)
    # there is no generator for this device
    monkeypatch.setattr("agents.diagnostics.generator", lambda *_, device: None)
    monkeypatch.setattr(
        Replay,
        "draw_indices",
        lambda self, m, u, real, model, _: torch.empty(u, real + model, dtype=torch.int64, device="meta"),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        replay = Replay(torch.empty(500, 7, device="meta"), 2, 300, "meta")
        replay.sizes = [300, 300]
        actor, critics = StackedMLP((2,), (2, 8, 2), "meta"), StackedMLP((2, 3), (3, 8, 1), "meta")
        standardiser = Standardiser(torch.empty(500, 2, device="meta"))
        test = exact_edge_test("offsweep/EdgeOfReach-v0")
        assert measure(actor, critics, replay, (0, 1), 3, 0.1, K, standardiser, test) == [{}, {}]
    assert len(reads) == 1
    assert reads[0][0] == 2


def test_standardised_observations_are_tested_in_the_environments_units():
    g = torch.Generator().manual_seed(0)
    obs = torch.rand(200, 2, generator=g) * 4 - 2
    zero = torch.zeros(200)
    data = TrainingData("offsweep/EdgeOfReach-v0", obs, torch.zeros(200, 2), zero, obs, zero)
    plane = torch.tensor([[11.5, 0.0], [10.9, -3.0], [0.0, -12.0], [12.1, 0.0]])
    config = RAVLConfig(hidden=[8], rollout_batch=10, model_quality=1.0, rollout_starts="initial")
    for given in (data, data.standardised()):
        method = RAVL([config], [0], given, {})
        mean, std = given.observation_mean, given.observation_std
        test = method.edge_test()
        assert test is not None
        shown = plane if mean is None or std is None else (plane - mean) / std
        assert test(shown, 10).tolist() == [True, False, True, False]
    from_anywhere = dataclasses.replace(config, rollout_starts="all")
    assert RAVL([from_anywhere], [0], data, {}).edge_test() is None  # rollouts can pass through what ends others


def test_the_growth_of_mean_q_by_hand():
    history = [(1000 * i, 10.0**i) for i in range(8)]
    found = growth_metrics(history, 1e5)
    assert found == pytest.approx({"reach/log10_q": 7, "reach/q_over_qstar": 100, "reach/log10_q_slope": 1})
    # of the last five only
    flat = [*history[:3], *((1000 * i, 1.0) for i in range(3, 8))]
    assert growth_metrics(flat, None) == pytest.approx({"reach/log10_q": 0, "reach/log10_q_slope": 0})
    assert growth_metrics([(1000, -2.0)], 4.0) == {"reach/q_over_qstar": -0.5}


@pytest.mark.parametrize(
    ("ratio", "slope", "collapsing"), [(3.1, 0.01, True), (3.0, 0.01, False), (9.0, 0.0, False), (9.0, None, False)]
)
def test_a_run_collapses_beyond_three_experts_values_and_rising(ratio: float, slope: float | None, collapsing: bool):
    metrics = {"reach/q_over_qstar": ratio} | ({} if slope is None else {"reach/log10_q_slope": slope})
    assert collapse(metrics) == (ratio if collapsing else None)
    assert collapse({"reach/log10_q_slope": 1.0}) is None


def test_the_rank_correlation_by_hand():
    x, y = torch.tensor([0.1, 5.0, 5.0, 6.0]), torch.tensor([10.0, 30.0, 20.0, 20.0])
    ranks = np.array([1.0, 2.5, 2.5, 4.0]), np.array([1.0, 4.0, 2.5, 2.5])  # equal values share theirs
    assert float(spearman(x, y)) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    grows = torch.stack((x.exp(), -x))
    assert spearman(x.expand(2, 4), grows).tolist() == pytest.approx([1.0, -1.0])
    assert spearman(torch.ones(3), torch.arange(3.0)).isnan()
