"""Adaptive seeds: the test that ends a trial, against hand computations."""

import math

import pytest

from sweeps.errors import StudyError
from sweeps.racing import RacingSpec, is_contender, pooled_variance


def test_the_variance_is_pooled_over_trials_with_two_runs_or_more():
    # deviations -1, 1 | -2, 0, 2 | none: (2 + 8) / (1 + 2)
    assert pooled_variance([[4.0, 6.0], [8.0, 10.0, 12.0], [3.0]]) == (pytest.approx(10 / 3), 3)
    variance, degrees = pooled_variance([[1.0], [2.0]])
    assert math.isnan(variance)
    assert degrees == 0


def test_the_test_rejects_where_students_t_does():
    others = [[10.0, 12.0], [0.0, 2.0]]  # s^2 = 2 with 2 degrees; best mean 11 of 2 runs
    # t = (11 - x) / sqrt(2 (1 + 1/2)); the upper 10 % of Student's t with 2 degrees begin at 1.885618
    edge = 11.0 - 1.885618 * math.sqrt(3.0)
    assert is_contender([edge + 0.001], others, 0.1)
    assert not is_contender([edge - 0.001], others, 0.1)
    assert is_contender([edge - 0.001], others, 0.05)
    # its own runs count in the variance and as n
    assert is_contender([5.0, 11.0], others, 0.1)
    assert not is_contender([7.9, 8.1], [[10.0, 12.0], [0.0, 0.1]], 0.1)


def test_nothing_is_rejected_before_a_variance_is_known_and_the_best_never_is():
    assert is_contender([-100.0], [], 0.1)
    assert is_contender([-100.0], [[0.0], [50.0]], 0.1)
    assert is_contender([13.0], [[10.0, 12.0]], 0.99)
    assert not is_contender([9.0], [[10.0, 10.0]], 0.1)  # runs that never differ


def test_a_smaller_value_is_better_where_the_study_minimises():
    others = [[1.0, 1.2]]
    assert is_contender([0.5], others, 0.1, "minimize")
    assert not is_contender([9.0], others, 0.1, "minimize")


@pytest.mark.parametrize(
    ("spec", "words"),
    [(RacingSpec(0), "at least 1"), (RacingSpec(3), "raise num_seeds"), (RacingSpec(1, 1.0), "between 0 and 1")],
)
def test_settings_that_make_no_sense_are_refused(spec, words):
    with pytest.raises(StudyError, match=words):
        spec.validate(3)
