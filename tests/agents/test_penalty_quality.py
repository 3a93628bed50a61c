"""What penalties are worth, where it is known: statistics against scipy and by hand, rollouts in ensembles known by
hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from agents.dynamics import Ensemble
from agents.method import TrainingData
from agents.model_error import simulator
from agents.penalties import PENALTIES, EnsemblePenalty
from agents.penalty_quality import NOMINAL, Judged, ause, imagine, pearson, transfer
from agents.rollout import Predictions
from envs.policies import UniformPolicy
from tests.agents.test_model_quality import plane

STD = 0.25


def ensemble(biases: list[tuple[float, float]], slope: float = 0.0) -> Ensemble:
    """Of EdgeOfReach, s' = s + a: member e adds its bias times exp(slope x), and has the deviation STD."""
    size = len(biases)
    weight, bias = torch.zeros(size, 4, 6), torch.zeros(size, 1, 6)
    weight[:, 2, 0] = weight[:, 3, 1] = 1.0
    bias[:, 0, :2] = torch.tensor(biases)
    bias[:, 0, 3:] = 2 * math.log(STD)
    weight[:, 0, 3:] = 2 * slope
    tensors = {
        "W0": weight, "b0": bias, "max_logvar": torch.full((3,), 60.0), "min_logvar": torch.full((3,), -200.0),
        "mean": torch.zeros(4), "std": torch.ones(4),
    }  # fmt: skip
    return Ensemble(tensors, list(range(size)), 2)


class Still(UniformPolicy):
    """Uniform actions, or none at all."""

    def __init__(self, reach: float = 1.0) -> None:
        super().__init__([-reach] * 2, [reach] * 2)


def judged(model: Ensemble, length: int = 4, num_starts: int = 400, data: TrainingData | None = None) -> Judged:
    data = data or plane()
    true = simulator(data)
    assert true is not None
    return imagine(Still(), model, data, true, num_starts, length, 3)


def test_ause_by_hand() -> None:
    """Errors 4, 1, 3 in the order of falling penalties: what is left has the means 8/3, 2, 3 and at best 8/3, 2, 1."""
    error = torch.tensor([4.0, 1.0, 3.0])
    assert ause(error, torch.tensor([3.0, 2.0, 1.0])) == pytest.approx((2.0 / 3) / (8 / 3))
    assert ause(error, error) == 0.0
    # all equal: what is left has the mean of all, whatever is taken away
    assert ause(error, torch.ones(3)) == pytest.approx((8 / 3 - (8 / 3 + 2 + 1) / 3) / (8 / 3))


def naive_ause(error: NDArray[Any], penalty: NDArray[Any]) -> float:
    gaps = []
    for removed in range(len(error)):
        left = len(error) - removed
        gaps.append(error[np.argsort(penalty)[:left]].mean() - error[np.argsort(error)[:left]].mean())
    return float(np.mean(gaps) / error.mean())


def test_statistics_are_scipys() -> None:
    rng = np.random.default_rng(0)
    error, noise = rng.exponential(size=300), rng.exponential(size=300)
    penalty = error + 2 * noise
    other = rng.exponential(size=300)
    one = Judged(
        torch.tensor(error)[None], torch.tensor(other)[None], {"loo_kl": torch.tensor(penalty)[None]}, {}
    ).quality("loo_kl")
    assert one.spearman == pytest.approx(stats.spearmanr(penalty, error).statistic)
    assert one.spearman_mean == pytest.approx(stats.spearmanr(penalty, other).statistic)
    assert one.pearson == pytest.approx(stats.pearsonr(penalty, error).statistic)
    assert pearson(torch.tensor(penalty), torch.tensor(error)) == one.pearson
    assert one.ause == pytest.approx(naive_ause(error, penalty))
    top = error > np.quantile(error, 0.9)
    assert top.sum() == 30
    assert one.auroc == pytest.approx(stats.mannwhitneyu(penalty[top], penalty[~top]).statistic / (30 * 270))
    assert math.isnan(one.inside_1)


def test_an_error_is_that_of_a_step_and_not_what_has_gathered() -> None:
    """A bias of (0.5, 0) without noise; the simulator starts anew in every imagined state."""
    model = ensemble([(0.5, 0.0)] * 2)
    model.tensors["b0"][:, 0, 3:] = -60.0
    found = judged(model, length=6)
    torch.testing.assert_close(found.error_HB, torch.full((6, 400), 0.25, dtype=torch.float64), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(found.mean_error_HB, found.error_HB, rtol=1e-4, atol=0.0)
    assert found.count() == 2400


def test_the_error_of_the_mean_has_no_draw() -> None:
    found = judged(ensemble([(0.5, 0.0), (-0.1, 0.0)]))
    torch.testing.assert_close(
        found.mean_error_HB, torch.full((4, 400), 0.04, dtype=torch.float64), rtol=1e-4, atol=0.0
    )
    assert float(found.error_HB.mean()) > 0.04 + STD**2


def test_columns_within_a_deviation_are_counted() -> None:
    """One of two columns is off by 1.5 deviations."""
    model = ensemble([(1.5 * STD, 0.0)] * 2)
    found = judged(model)
    for name in ("max_aleatoric", "ensemble_std"):  # members that agree are the mixture
        quality = found.quality(name)
        assert (quality.inside_1, quality.inside_2) == (pytest.approx(0.5), pytest.approx(1.0))
    apart = judged(ensemble([(6 * STD, 0.0), (-6 * STD, 0.0)]))
    assert apart.quality("max_aleatoric").inside_2 == pytest.approx(0.5)
    assert apart.quality("ensemble_std").inside_1 == pytest.approx(1.0)  # around the mean, which is right
    assert pytest.approx((0.6827, 0.9545), abs=1e-4) == NOMINAL


def test_a_penalty_that_knows_is_told_from_one_that_does_not() -> None:
    """Deviations grow with x, and the errors are draws of them; the members agree."""
    found = judged(ensemble([(0.0, 0.0)] * 3, slope=0.4), num_starts=1000)
    knowing = found.quality("max_aleatoric")
    assert knowing.spearman > 0.6
    assert knowing.auroc > 0.8
    assert knowing.ause < 0.5 * found.quality("max_pairwise").ause
    assert math.isnan(found.quality("max_pairwise").pearson)  # all 0
    by_step = [found.quality("max_aleatoric", [t]).spearman for t in (1, 4)]
    assert all(0.5 < value < 1.0 for value in by_step)


def test_penalties_are_those_of_rollouts() -> None:
    model = ensemble([(0.3, 0.0), (-0.1, 0.2), (0.0, -0.3)], slope=0.1)
    seen = []

    class Spy(Still):
        def act(self, observations: NDArray[Any], rng: Any) -> Any:
            action = super().act(observations, rng)
            seen.append((observations.copy(), action))
            return action

    data, true = plane(), simulator(plane())
    assert true is not None
    found = imagine(Spy(), model, data, true, 100, 2, 3)
    means, stds = model.predict_all(torch.from_numpy(np.concatenate(seen[1], axis=1)))
    # of members and draws nothing is known here but where the rollouts went
    made = Predictions(means, stds, torch.zeros(100).long(), means[0])
    for name in ("max_aleatoric", "max_pairwise", "ensemble_std", "ensemble_variance"):
        torch.testing.assert_close(found.penalty_HB[name][1].float(), EnsemblePenalty(name)(made))
    assert {name for name in PENALTIES if found.penalty_HB[name].isfinite().all()} == set(PENALTIES)
    again = imagine(Still(), model, data, true, 100, 2, 3)
    torch.testing.assert_close(again.error_HB, found.error_HB)


def test_rollouts_that_leave_the_numbers_leave_the_sums() -> None:
    model = ensemble([(0.0, 0.0)] * 2)
    model.tensors["W0"][:, 0, 0], model.input_clip = 1e30, math.inf
    found = judged(model, length=5)
    assert found.count([1]) == 400  # finite, though enormous
    assert found.count([5]) == 0
    assert math.isnan(found.quality("loo_kl", [5]).spearman)


def test_transfer_is_of_another_datasets_steps() -> None:
    """Whose next observations are off by (0, 1) in addition."""
    own = plane()
    other = TrainingData(
        own.env_id, own.observations, own.actions, own.rewards,
        own.observations + own.actions + torch.tensor([0.0, 1.0]), own.terminals,
    )  # fmt: skip
    model = ensemble([(0.5, 0.0)] * 2)
    model.tensors["b0"][:, 0, 3:] = -60.0
    found = transfer(model, other, 300, 0)
    torch.testing.assert_close(found.error_HB, torch.full((1, 300), 1.25, dtype=torch.float64), rtol=1e-4, atol=0.0)
