from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from envs.errors import UserError
from sweeps.table_statistics import (
    iqm,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_std,
    score_matrix,
    select,
    stratified_bootstrap,
    verdict,
)

# two runs (rows) of three tasks
SCORES = np.array([[0.0, 0.5, 2.0], [0.2, 0.7, 4.0]])


def test_aggregates_by_hand():
    assert mean(SCORES) == pytest.approx(7.4 / 6)
    assert median(SCORES) == pytest.approx(0.6)  # of the tasks' means 0.1, 0.6, 3
    assert iqm(SCORES) == pytest.approx((0.2 + 0.5 + 0.7 + 2.0) / 4)  # one of six left out at either end
    assert optimality_gap(SCORES) == pytest.approx((1 + 0.8 + 0.5 + 0.3) / 6)
    assert optimality_gap(SCORES, target=4.0) == pytest.approx(4 - 7.4 / 6)
    assert performance_profile(SCORES, [-1.0, 0.5, 3.0, 4.0]) == pytest.approx([1, 3 / 6, 1 / 6, 0])


def test_the_interquartile_mean_is_scipys_trimmed_mean():
    for runs, tasks in ((5, 12), (3, 3), (1, 1), (4, 7)):
        scores = np.random.default_rng(runs).normal(size=(runs, tasks))
        assert iqm(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None), abs=1e-12)


def test_the_probability_of_improvement_counts_pairs_within_a_task_and_ties_by_half():
    x, y = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0], [3.0, 6.0], [0.0, 4.0]])
    # first task: 1 > 0; 3 > 2, 3 = 3, 3 > 0: 3.5 of 6. Second: 5 = 5, 5 < 6, 5 > 4, twice: 3 of 6
    assert probability_of_improvement(x, y) == pytest.approx((3.5 / 6 + 3 / 6) / 2)
    by_scipy = [stats.mannwhitneyu(x[:, t], y[:, t]).statistic / 6 for t in range(2)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(by_scipy))
    assert probability_of_improvement(y, x) == pytest.approx(1 - probability_of_improvement(x, y))
    with pytest.raises(UserError, match="same tasks"):
        probability_of_improvement(x, y[:, :1])


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_and_not_sorted_among_the_others(lost):
    scores = np.array([[1.0, 2.0], [lost, 4.0], [3.0, 5.0]])
    statistics = (mean, median, iqm, optimality_gap, lambda s: performance_profile(s, [0.0]),
                  lambda s: probability_of_improvement(s, SCORES[:, :2]),
                  lambda s: probability_of_improvement(SCORES[:, :2], s))  # fmt: skip
    for statistic in statistics:
        with pytest.raises(UserError, match="1 of 6 scores are no finite numbers"):
            statistic(scores)


def test_leading_axes_are_kept():
    several = np.stack([SCORES, SCORES + 1])
    for statistic in (mean, median, iqm, optimality_gap):
        assert statistic(several).tolist() == pytest.approx([float(statistic(s)) for s in several])
    assert performance_profile(several, [0.5, 1.0]).shape == (2, 2)


def test_the_bootstrap_draws_runs_within_a_task():
    # two runs per task, and tasks far apart: a resampled mean is 0, 0.5 or 1 above the lowest in each task by itself
    scores = np.array([[0.0, 100.0], [1.0, 101.0]])
    found = stratified_bootstrap(mean, scores, resamples=4000)
    assert found.value == pytest.approx(50.5)
    # the least is drawn in 1 of 16 resamples, more than 2.5 %; across tasks it would be 0
    assert (found.low, found.high) == (pytest.approx(50.0), pytest.approx(51.0))
    narrower = stratified_bootstrap(mean, scores, resamples=4000, confidence=0.5)
    assert found.low < narrower.low < narrower.high < found.high
    again = stratified_bootstrap(mean, scores, resamples=4000)
    assert (again.low, again.high) == (found.low, found.high)


def test_the_bootstraps_interval_holds_what_it_promises():
    draw = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        found = stratified_bootstrap(mean, draw.normal(size=(20, 3)), resamples=400, seed=seed)
        inside += bool(found.low < 0 < found.high)
    assert inside / 200 == pytest.approx(0.94, abs=0.05)


def test_the_bootstrap_takes_two_samples_and_statistics_with_an_axis():
    x = np.random.default_rng(1).normal(size=(6, 4))
    found = stratified_bootstrap(probability_of_improvement, x + 10, x, resamples=200)
    assert (found.low, found.value, found.high) == (1, 1, 1)
    profile = stratified_bootstrap(lambda s: performance_profile(s, [-9.0, 0.0, 9.0]), x, resamples=200)
    assert profile.low.shape == (3,)
    assert (profile.low[0], profile.high[2]) == (1, 0)
    with pytest.raises(UserError, match="confidence"):
        stratified_bootstrap(mean, x, confidence=95)


def test_scores_of_unlike_numbers_of_runs_are_refused():
    assert score_matrix([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).tolist() == [[1, 3, 5], [2, 4, 6]]
    with pytest.raises(UserError, match="1 to 2"):
        score_matrix([[1.0, 2.0], [3.0]])
    with pytest.raises(UserError, match="1 of 2 scores"):
        score_matrix([[1.0], [math.nan]])
    with pytest.raises(UserError, match="at least one run"):
        score_matrix([])


def test_last_average_and_best_are_kept_apart():
    course = [9.0, *range(1, 12)]
    assert select(course, "last") == 11
    assert select(course, "average") == pytest.approx(6.5)  # 2 ... 11
    assert select([30.0, *course], "best") == 30
    with pytest.raises(UserError, match="last 10 evaluations"):
        select(course[:9], "average")
    with pytest.raises(UserError, match="did you mean 'last'"):
        select(course, "lst")
    with pytest.raises(UserError, match="without evaluations"):
        select([], "last")


def test_published_spreads_become_deviations_of_a_sample():
    values = [1.0, 2.0, 4.0, 9.0]
    expected = pytest.approx(np.std(values, ddof=1))
    assert sample_std(float(np.std(values, ddof=1)), "std", 4) == expected
    assert sample_std(float(np.std(values)), "population-std", 4) == expected
    assert sample_std(float(stats.sem(values)), "standard-error", 4) == expected
    with pytest.raises(UserError, match="at least 2 seeds"):
        sample_std(1.0, "std", 1)
    with pytest.raises(UserError, match="known"):
        sample_std(1.0, "iqr", 4)


def test_a_verdict_is_welchs_test():
    ours, theirs = [10.0, 12.0, 14.0], [3.0, 5.0, 4.0, 8.0]
    found = verdict(ours, float(np.mean(theirs)), float(np.std(theirs, ddof=1)), 4)
    by_scipy = stats.ttest_ind(ours, theirs, equal_var=False)
    assert found.name == "better"
    assert found.p_value == pytest.approx(by_scipy.pvalue)
    interval = by_scipy.confidence_interval()
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.difference == pytest.approx(7.0)
    assert verdict(ours, 5.0, 2.16, 4, higher_is_better=False).name == "worse"
    assert verdict(theirs, 12.0, 2.0, 3).name == "worse"
    assert verdict(ours, 11.0, 2.0, 4).name == "reproduced"


def test_the_smallest_difference_is_seen_as_often_as_it_says():
    ours, draw = [0.0, 1.0, -1.0, 2.0, -2.0], np.random.default_rng(3)
    smallest = verdict(ours, 0.0, float(np.std(ours, ddof=1)), 5).smallest_difference
    seen = [
        verdict(draw.normal(smallest, 1.5811, 5), draw.normal(0, 1.5811 / 5**0.5), 1.5811, 5).name == "better"
        for _ in range(400)
    ]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.08)
    more = verdict([*ours, *ours, *ours], 0.0, 1.5811, 15).smallest_difference
    assert more < smallest


@pytest.mark.parametrize(
    ("values", "reference", "name", "why"),
    [
        ([], (1.0, 1.0, 5), "not run", "no run"),
        ([1.0, math.nan], (1.0, 1.0, 5), "not comparable", "1 of 2 runs diverged"),
        ([1.0, 2.0], (None, None, None), "not comparable", "could not be read"),
        ([1.0, 2.0], (1.0, None, 5), "not comparable", "no spread"),
        ([1.0, 2.0], (1.0, 1.0, None), "not comparable", "seeds is not known"),
        ([1.0, 2.0], (1.0, 1.0, 1), "not comparable", "one seed"),
        ([1.0], (1.0, 1.0, 5), "not comparable", "one run"),
        ([1.0, 1.0], (2.0, 0.0, 5), "not comparable", "neither"),
    ],
)
def test_what_cannot_be_compared_says_why(values, reference, name, why):
    found = verdict(values, *reference)
    assert found.name == name
    assert why in found.why
    assert found.p_value is None


def test_a_stated_reason_goes_over_the_test():
    found = verdict([10.0, 11.0], 1.0, 0.1, 5, not_comparable="reduced to 0.05")
    assert (found.name, found.why) == ("not comparable", "reduced to 0.05")
    assert found.difference == pytest.approx(9.5)
