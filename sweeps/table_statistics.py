"""What a table's scores say: aggregates over runs and tasks, their intervals, and a cell held against its reference.

Aggregates are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS
2021, arXiv 2108.13264). They take scores of shape (..., R, T): R runs of each of T tasks, with any leading axes, which
the bootstrap uses for its resamples. Scores that are no finite numbers are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.errors import UserError
from sweeps.errors import suggestion
from sweeps.statistics import t_quantile

Array = NDArray[np.float64]

SELECTIONS = ("last", "average", "best")
VERDICTS = ("reproduced", "better", "worse", "not comparable", "not run")
# of a spread: how it becomes the standard deviation of a sample
SPREAD_KINDS = ("std", "population-std", "standard-error")
_CHUNK_NUMBERS = 4_000_000  # that one chunk of resamples holds at most


def score_matrix(runs: Sequence[Sequence[float]], name: str = "scores") -> Array:
    """Scores of shape (R, T) from one list of R runs' scores per task.

    Raises:
        UserError: no scores, tasks with different numbers of runs, or a score that is no finite number.
    """
    counts = sorted({len(task) for task in runs})
    if not counts or counts[0] == 0:
        raise UserError(f"{name}: every task needs at least one run")
    if len(counts) > 1:
        raise UserError(
            f"{name}: aggregates need as many runs of every task, but there are {counts[0]} to {counts[-1]}; train the "
            "missing runs or leave out tasks"
        )
    matrix = np.asarray(runs, np.float64).T
    lost = _count_not_finite(matrix)
    if lost:
        raise UserError(f"{name}: {lost} of {matrix.size} scores are no finite numbers")
    return matrix


def mean(scores: ArrayLike) -> Array:
    """Mean over runs and tasks; scores (..., R, T) give (...)."""
    return np.asarray(_scores(scores).mean((-2, -1)))


def median(scores: ArrayLike) -> Array:
    """Median over the tasks of each task's mean over its runs; scores (..., R, T) give (...)."""
    return np.asarray(np.median(_scores(scores).mean(-2), axis=-1))


def iqm(scores: ArrayLike) -> Array:
    """Interquartile mean: of all R x T scores together, the mean of the middle half.

    floor(R T / 4) scores are left out at either end, as `scipy.stats.trim_mean` does. Scores (..., R, T) give (...).
    Agarwal et al., section 4.3.
    """
    flat = _flat(scores)
    n = flat.shape[-1]
    cut = n // 4
    return np.asarray(np.sort(flat, axis=-1)[..., cut : n - cut].mean(-1))


def optimality_gap(scores: ArrayLike, target: float = 1.0) -> Array:
    """How far runs stay below a target on average: mean of max(target - score, 0), the smaller the better.

    Scores (..., R, T) give (...). Agarwal et al., section 4.3, where it is called gamma.

    Args:
        target: in the unit of the scores, such as 100 for D4RL-normalised scores; what is above it does not count.
    """
    return np.asarray(target - np.minimum(_flat(scores), target).mean(-1))


def probability_of_improvement(scores: ArrayLike, others: ArrayLike) -> Array:
    """P(X > Y): how probably a run of X is better than one of Y on a task drawn at random.

    The mean over the tasks of the Mann-Whitney statistic over its number of pairs, ties counting one half. Scores
    (..., R, T) and (..., Q, T) give (...). Agarwal et al., section 4.3.

    Raises:
        UserError: another number of tasks.
    """
    x_RT, y_QT = _scores(scores), _scores(others)
    if x_RT.shape[-1] != y_QT.shape[-1]:
        raise UserError(
            f"The probability of improvement needs the same tasks of both, not {x_RT.shape[-1]} and {y_QT.shape[-1]}."
        )
    difference = x_RT[..., :, None, :] - y_QT[..., None, :, :]
    return np.asarray(((difference > 0) + 0.5 * (difference == 0)).mean((-3, -2)).mean(-1))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Array:
    """Share of all R x T runs with a score above each of K thresholds: the run-score distribution.

    Scores (..., R, T) and thresholds (K,) give (..., K). Agarwal et al., section 4.2.
    """
    flat = _flat(scores)
    return np.stack([(flat > tau).mean(-1) for tau in np.atleast_1d(np.asarray(thresholds, np.float64))], axis=-1)


@dataclass(frozen=True)
class Estimate:
    """A statistic of what was measured, and the bounds of its interval; all of the statistic's shape."""

    value: Array
    low: Array
    high: Array


def stratified_bootstrap(
    statistic: Callable[..., Array],
    *samples: ArrayLike,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A percentile interval by drawing runs anew, with replacement, within each task by itself.

    Agarwal et al., section 4.1. With fewer than about 5 runs of a task intervals are too narrow: resamples know no
    values but those few.

    Args:
        statistic: of scores of shape (..., R, T), such as `iqm`, or of several, such as `probability_of_improvement`.
        samples: one array (R, T) for each argument of the statistic; each is drawn anew independently.
        resamples: at least 1.
        confidence: share between 0 and 1 that the interval holds.

    Raises:
        UserError: numbers outside their range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise UserError(f"A bootstrap needs resamples of at least 1 and a confidence between 0 and 1, not {resamples} "
                        f"and {confidence}.")  # fmt: skip
    arrays = [_scores(sample) for sample in samples]
    if any(array.ndim != 2 for array in arrays):
        raise UserError("A bootstrap needs scores of two axes: runs and tasks.")
    draw = np.random.default_rng(seed)
    pairs = arrays[0].size * (arrays[1].shape[0] if len(arrays) > 1 else 1)
    chunk = max(1, min(resamples, _CHUNK_NUMBERS // pairs))
    found = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = [
            np.take_along_axis(array[None], draw.integers(array.shape[0], size=(count, *array.shape)), axis=1)
            for array in arrays
        ]
        found.append(np.asarray(statistic(*drawn)))
    low, high = np.quantile(np.concatenate(found), ((1 - confidence) / 2, (1 + confidence) / 2), axis=0)
    return Estimate(np.asarray(statistic(*arrays)), np.asarray(low), np.asarray(high))


def select(course: Sequence[float], selection: str, count: int = 10) -> float:
    """The one number that a table takes of a run's evaluations.

    Args:
        course: the evaluations' scores, in the order of the updates.
        selection: last (the last policy's) | average (mean of the last `count`) | best (the largest: chosen by what it
            is then judged by, so it is too high, and never to be held against one of the other two).

    Raises:
        UserError: no evaluation, fewer than `count` to average, or an unknown selection.
    """
    if selection not in SELECTIONS:
        raise UserError(f"Unknown selection '{selection}'; {suggestion(selection, SELECTIONS)}.")
    if not course:
        raise UserError("A run without evaluations has no score.")
    if selection == "last":
        return float(course[-1])
    if selection == "best":
        return float(np.max(course))  # not a number where one evaluation is none
    if len(course) < count:
        raise UserError(f"The average of the last {count} evaluations needs as many, but the run has {len(course)}.")
    return float(np.mean(course[-count:]))


def sample_std(spread: float, kind: str, seeds: int) -> float:
    """The standard deviation of a sample of `seeds` runs (denominator seeds - 1) that a published spread means.

    Args:
        kind: std (taken as the sample's; papers seldom say) | population-std (denominator seeds) | standard-error.

    Raises:
        UserError: an unknown kind, or fewer than 2 seeds.
    """
    if kind not in SPREAD_KINDS:
        raise UserError(f"Unknown kind of spread '{kind}'; {suggestion(kind, SPREAD_KINDS)}.")
    if seeds < 2:
        raise UserError(f"A spread needs at least 2 seeds, not {seeds}.")
    factor = {"std": 1.0, "population-std": seeds / (seeds - 1), "standard-error": float(seeds)}[kind]
    return spread * math.sqrt(factor)


@dataclass(frozen=True)
class Verdict:
    """What a cell's runs say beside its reference."""

    name: str  # one of VERDICTS
    why: str = ""  # of not comparable and not run
    difference: float | None = None  # ours - theirs, in the cells' unit
    interval: tuple[float, float] | None = None  # of the difference
    p_value: float | None = None  # two-sided
    smallest_difference: float | None = None  # that such numbers of runs would show with the stated power


def verdict(
    values: Sequence[float],
    reference_mean: float | None,
    reference_std: float | None,
    reference_seeds: int | None,
    *,
    not_comparable: str = "",
    higher_is_better: bool = True,
    significance: float = 0.05,
    power: float = 0.8,
) -> Verdict:
    """Hold a cell's runs against its reference by Welch's test (unequal variances, two-sided).

    *Reproduced* only says that no difference was found: how large one could have gone unseen is
    `smallest_difference` = (t(1 - significance / 2) + t(power)) x standard error, with Welch's degrees of freedom.

    Args:
        values: one per run, as its selection says; none: not run. A run that diverged has no finite one.
        reference_mean, reference_std, reference_seeds: what was published, the deviation as of a sample; None where it
            could not be read.
        not_comparable: why the cell is not to be compared whatever the numbers, such as another scale.
    """
    if not len(values):
        return Verdict("not run", "no run has ended")
    ours = np.asarray(values, np.float64)
    lost = int((~np.isfinite(ours)).sum())
    if lost:
        return Verdict("not comparable", f"{lost} of {len(ours)} runs diverged")
    if reference_mean is None:
        return Verdict("not comparable", not_comparable or "the reference could not be read")
    difference = float(ours.mean()) - reference_mean
    for why in (
        not_comparable,
        "the reference has no spread" if reference_std is None else "",
        "the reference's number of seeds is not known" if reference_seeds is None else "",
        "the reference has one seed" if reference_seeds == 1 else "",
        "one run has no spread" if len(ours) == 1 else "",
    ):
        if why:
            return Verdict("not comparable", why, difference)
    assert reference_std is not None
    assert reference_seeds is not None
    parts = float(ours.var(ddof=1)) / len(ours), reference_std**2 / reference_seeds
    error = math.sqrt(sum(parts))
    if error == 0:
        return Verdict("not comparable", "neither side has any spread", difference)

    from scipy.special import stdtr  # the distribution of Student's t

    freedom = error**4 / (parts[0] ** 2 / (len(ours) - 1) + parts[1] ** 2 / (reference_seeds - 1))
    half = t_quantile(1 - significance / 2, freedom) * error
    p_value = 2 * float(stdtr(freedom, -abs(difference) / error))
    name = "reproduced"
    if p_value < significance:
        name = "better" if (difference > 0) == higher_is_better else "worse"
    return Verdict(
        name, "", difference, (difference - half, difference + half), p_value,
        half + t_quantile(power, freedom) * error,
    )  # fmt: skip


def _scores(scores: ArrayLike) -> Array:
    array = np.asarray(scores, np.float64)
    if array.ndim < 2 or 0 in array.shape:
        raise UserError(f"Scores need two axes, runs and tasks, at least one of each, not the shape {array.shape}.")
    lost = _count_not_finite(array)
    if lost:  # sorted or compared, they would pass for good or bad scores
        raise UserError(f"{lost} of {array.size} scores are no finite numbers; leave out the tasks of these runs.")
    return array


def _count_not_finite(array: Array) -> int:
    return array.size - int(np.count_nonzero(np.isfinite(array)))


def _flat(scores: ArrayLike) -> Array:
    array = _scores(scores)
    return array.reshape(*array.shape[:-2], -1)
