from __future__ import annotations

import math

import numpy as np
import pytest

from sweeps.statistics import paired_difference, paired_ratio


def test_a_ratio_is_that_of_the_pairs_and_its_intervals_surround_it():
    ratio = paired_ratio([1.0, 2.0, 4.0], [2.0, 8.0, 32.0])  # 1/2, 1/4, 1/8
    assert ratio.mean == pytest.approx(1 / 4)
    # logarithms -1, -2, -3 to base 2: standard deviation 1, t(0.975, 2) = 4.3027
    half = 4.30265273 / math.sqrt(3)
    assert ratio.student == pytest.approx((2 ** (-2 - half), 2 ** (-2 + half)))
    # of 27 resamples one each is all 1/2 and all 1/8, more than 2.5 %
    assert ratio.bootstrap == pytest.approx((1 / 8, 1 / 2))
    assert not ratio.below_one


def test_students_interval_holds_what_it_promises_with_five_pairs_and_the_bootstraps_less():
    draw = np.random.default_rng(1)
    found = [paired_ratio(np.exp(draw.normal(size=5)), np.ones(5), seed) for seed in range(400)]
    student = np.mean([r.student[0] < 1 < r.student[1] for r in found])
    bootstrap = np.mean([r.bootstrap[0] < 1 < r.bootstrap[1] for r in found])
    assert student == pytest.approx(0.95, abs=0.03)
    assert bootstrap < 0.9


def test_one_pair_has_no_interval():
    ratio = paired_ratio([3.0], [2.0])
    assert ratio.mean == pytest.approx(1.5)
    assert math.isnan(ratio.student[0])
    assert not ratio.below_one


def test_a_difference_is_that_of_the_pairs():
    difference = paired_difference([1.0, -2.0, 7.0], [0.0, -4.0, 4.0])  # 1, 2, 3
    assert difference.mean == pytest.approx(2.0)
    half = 4.30265273 / math.sqrt(3)
    assert difference.student == pytest.approx((2 - half, 2 + half))
    assert difference.bootstrap == pytest.approx((1.0, 3.0))
    assert not difference.above_zero
    assert paired_difference([1.1, 1.0, 1.2], [0.0, 0.0, 0.0]).above_zero
