"""Statistics of few repetitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    from scipy.stats import t  # takes half a second to load

    logs = np.log(np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64))
    n, mean = len(logs), float(logs.mean())
    if n == 1:
        return Ratio(math.exp(mean), (math.nan, math.nan), (math.nan, math.nan))
    drawn = logs[np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))].mean(1)
    low, high = np.exp(np.quantile(drawn, (0.025, 0.975)))
    half = float(t.ppf(0.975, n - 1)) * float(logs.std(ddof=1)) / math.sqrt(n)
    return Ratio(math.exp(mean), (float(low), float(high)), (math.exp(mean - half), math.exp(mean + half)))
