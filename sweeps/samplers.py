"""Samplers: how a study chooses its next trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from sweeps.errors import StudyError, suggestion

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


def make_sampler(name: str, seed: int, trial_number: int = 0) -> BaseSampler:
    """A sampler for one question to a study.

    The samplers model the study from its records at every question and otherwise carry only their random
    numbers. A new one per trial, seeded from both numbers, therefore makes a resumed study go on as if it had
    never stopped, instead of drawing its first random points again.

    Args:
        name: `tpe` (tree-structured Parzen estimator, multivariate, running trials counted as bad), `gp`
            (Gaussian process; uses completed trials only, so pair it with no pruner), `qmc` (scrambled Sobol'
            sequence) or `random`.
        seed: of the study, >= 0.
        trial_number: of the trial that is asked for.

    Raises:
        StudyError: unknown name (with the nearest one).
    """
    if name not in SAMPLERS:
        raise StudyError(f"Unknown sampler '{name}'; {suggestion(name, SAMPLERS)}.")
    from sweeps._optuna import optuna

    with warnings.catch_warnings():
        # That a sampler's arguments may change in a later version is settled by the bounds in pyproject.toml.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](seed, trial_number)


def _trial_seed(seed: int, trial_number: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence([seed, trial_number]).generate_state(1)[0])


def _tpe(seed: int, trial_number: int) -> BaseSampler:
    from sweeps._optuna import optuna

    return optuna.samplers.TPESampler(seed=_trial_seed(seed, trial_number))


def _gp(seed: int, trial_number: int) -> BaseSampler:
    from sweeps._optuna import optuna

    return optuna.samplers.GPSampler(seed=_trial_seed(seed, trial_number), warn_independent_sampling=False)


def _qmc(seed: int, trial_number: int) -> BaseSampler:
    from sweeps._optuna import optuna

    # One sequence for the whole study, whose position the study's storage remembers: the seed is not the
    # trial's.
    return optuna.samplers.QMCSampler(scramble=True, seed=_trial_seed(seed, 0), warn_independent_sampling=False)


def _random(seed: int, trial_number: int) -> BaseSampler:
    from sweeps._optuna import optuna

    return optuna.samplers.RandomSampler(seed=_trial_seed(seed, trial_number))


SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {
    "tpe": _tpe,
    "gp": _gp,
    "qmc": _qmc,
    "random": _random,
}
