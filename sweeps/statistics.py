"""Statistics of few repetitions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """Mean ratio of paired positive numbers, with two intervals of 95 %; not a number where one pair is all there is.

    With a handful of pairs the bootstrap's interval is too narrow (its resamples know no other values than those few);
    Student's t is not, as far as the logarithms are about normal.
    """

    mean: float  # geometric
    bootstrap: tuple[float, float]  # percentiles over resampled pairs
    student: tuple[float, float]

    @property
    def below_one(self) -> bool:
        """Whether the wider of the two, Student's, leaves 1 out."""
        return self.student[1] < 1


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Ratio:
    """The ratio of what was measured in pairs, such as by seed.

    Args:
        numerators, denominators: above 0, in the same order.
        seed: of the resamples.
    """
    logs = np.log(np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64))
    mean, bootstrap, student = _intervals(logs, seed)
    return Ratio(math.exp(mean), _exp(bootstrap), _exp(student))


@dataclass(frozen=True)
class Difference:
    """Mean difference of paired numbers, with the same intervals as a `Ratio`."""

    mean: float
    bootstrap: tuple[float, float]
    student: tuple[float, float]

    @property
    def above_zero(self) -> bool:
        """Whether the wider interval, Student's, lies above 0."""
        return self.student[0] > 0


def paired_difference(values: Sequence[float], references: Sequence[float], seed: int = 0) -> Difference:
    """How much greater the values are than what was measured in pairs with them, such as by seed.

    Args:
        values, references: in the same order.
        seed: of the resamples.
    """
    return Difference(*_intervals(np.asarray(values, np.float64) - np.asarray(references, np.float64), seed))


Interval = tuple[float, float]


@dataclass(frozen=True)
class MeanDifference:
    """Of two groups of runs, with an interval of 95 %; not a number where a group has one run."""

    mean: float
    interval: Interval
    paired: bool  # the groups have the same seeds, and the interval is of the pairs' differences; else Welch's


def mean_difference(values: Mapping[int, float], references: Mapping[int, float]) -> MeanDifference:
    """How much greater the mean of the values is than that of the references.

    Args:
        values, references: by seed.
    """
    if values.keys() == references.keys():
        found = paired_difference([values[seed] for seed in values], [references[seed] for seed in values])
        return MeanDifference(found.mean, found.student, True)
    ours, theirs = list(values.values()), list(references.values())
    mean = float(np.mean(ours) - np.mean(theirs))
    if min(len(ours), len(theirs)) < 2:
        return MeanDifference(mean, (math.nan, math.nan), False)
    from scipy.stats import ttest_ind  # takes half a second to load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of values that are all the same
        low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return MeanDifference(mean, (float(low), float(high)), False)


def student_interval(values: Sequence[float]) -> Interval:
    """95 % for the mean of at least 2 values, by Student's t."""
    half = t_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - half, mean + half


def t_quantile(share: float, freedom: float) -> float:
    """Of Student's t. `scipy.stats` has the same, and takes a second to load."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


def _intervals(values: NDArray[np.float64], seed: int) -> tuple[float, Interval, Interval]:
    """The mean, and of 95 % the bootstrap's interval and Student's."""
    n, mean = len(values), float(values.mean())
    if n == 1:
        return mean, (math.nan, math.nan), (math.nan, math.nan)
    drawn = values[np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    half = t_quantile(0.975, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, (float(low), float(high)), (mean - half, mean + half)


def _exp(interval: Interval) -> Interval:
    return math.exp(interval[0]), math.exp(interval[1])
