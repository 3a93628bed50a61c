"""Adaptive seeds: a trial gets further runs only while it may still be the best.

After its first runs a trial is compared with the best one by a one-sided t-test, whose variance is pooled over all
trials with two runs or more: with a handful of runs each, a trial's own variance says next to nothing. Only trials
whose mean is not clearly below the best one's are worth another run. It is a racing rule of the kind of F-Race
(Birattari, Stützle, Paquete and Varrentrapp, GECCO 2002), with a t-test in place of Friedman's and trials that come one
by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sweeps.errors import StudyError


@dataclass
class RacingSpec:
    """How many runs a trial gets."""

    first_seeds: int | None = None  # to begin with, of num_seeds; None: all of them at once
    alpha: float = 0.1  # level of the test that ends a trial, between 0 and 1; a lower one spends more runs

    def validate(self, num_seeds: int) -> None:
        """Raises:
        StudyError: a number that makes no sense.
        """
        first = self.first_seeds
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
            raise StudyError(f"study.racing.first_seeds must be a whole number of at least 1, not {first!r}.")
        if first is not None and first >= num_seeds:
            raise StudyError(
                f"study.racing.first_seeds is {first}, but a trial has {num_seeds} seeds in all; raise num_seeds, the "
                "most that a trial can get, or leave study.racing out."
            )
        if not 0 < self.alpha < 1:
            raise StudyError(f"study.racing.alpha is a level between 0 and 1, not {self.alpha!r}.")


def pooled_variance(trials: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The variance of runs within trials, and its degrees of freedom.

    Args:
        trials: values of the runs of each; those with a single run count for nothing.

    Returns:
        (sum of squared deviations from each trial's mean / degrees, degrees); not a number with 0 degrees.
    """
    squares, degrees = 0.0, 0
    for values in trials:
        if len(values) > 1:
            mean = sum(values) / len(values)
            squares += sum((value - mean) ** 2 for value in values)
            degrees += len(values) - 1
    return (squares / degrees if degrees else math.nan), degrees


def is_contender(
    values: Sequence[float], others: Sequence[Sequence[float]], alpha: float, direction: str = "maximize"
) -> bool:
    """Whether a trial's mean may be at least as good as the best other trial's.

    One-sided test of that hypothesis with t = (best - mean) / sqrt(s^2 (1 / n + 1 / n_best)) and the pooled variance
    s^2 of all trials, this one included. Until two runs of any one trial are known there is no s^2, and every
    trial is a contender.

    Args:
        values: of the trial's runs so far, at least one.
        others: values of the runs of the other trials that have a result.
        alpha: level at which the hypothesis is rejected.
        direction: maximize or minimize.
    """
    if not others:
        return True
    variance, degrees = pooled_variance([values, *others])
    if not degrees:
        return True
    sign = 1.0 if direction == "maximize" else -1.0
    means = [(sign * sum(other) / len(other), len(other)) for other in others]
    best, size = max(means)
    behind = best - sign * sum(values) / len(values)
    if behind <= 0:
        return True
    if variance == 0:
        return False
    from scipy.stats import t  # takes half a second to load

    statistic = behind / math.sqrt(variance * (1 / len(values) + 1 / size))
    return float(t.sf(statistic, degrees)) > alpha
