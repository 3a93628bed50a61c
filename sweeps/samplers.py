"""Samplers: how a study chooses its next trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sweeps._optuna import optuna
from sweeps.errors import StudyError, suggestion

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Space = Mapping[str, "BaseDistribution"]


def make_sampler(name: str, seed: int, trial_number: int, space: Space) -> BaseSampler:
    """A sampler for one question to a study.

    The samplers model the study from its records at every question and otherwise carry only their random
    numbers. A new one per trial, seeded from both numbers, therefore makes a resumed study go on as if it had
    never stopped, instead of drawing its first random points again.

    Args:
        name: `tpe` (tree-structured Parzen estimator, multivariate, running trials counted as bad), `gp-mixed`
            (Gaussian process of `sweeps.gp_mixed`), `gp` (Optuna's; uses completed trials only, so pair it with
            no pruner), `qmc` (scrambled Sobol' sequence) or `random`.
        seed: of the study, >= 0.
        trial_number: of the trial that is asked for.
        space: distribution of every parameter.

    Raises:
        StudyError: unknown name (with the nearest one).
    """
    if name not in SAMPLERS:
        raise StudyError(f"Unknown sampler '{name}'; {suggestion(name, SAMPLERS)}.")
    with warnings.catch_warnings():
        # That a sampler's arguments may change in a later version is settled by the bounds in pyproject.toml.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = SAMPLERS[name](seed, trial_number, space)
    if name in ("tpe", "gp"):
        # Theirs is the intersection of all trials' parameters, which is the space here and takes longer to find than
        # the point.
        joint = {key: distribution for key, distribution in sorted(space.items()) if not distribution.single()}
        sampler.infer_relative_search_space = lambda study, trial: dict(joint)  # type: ignore[method-assign]
    return sampler


def check_sampler(name: str) -> None:
    """Make sure that a sampler exists and has what it needs.

    Raises:
        StudyError: unknown name (with the nearest one), or a package that is not installed.
    """
    if name not in SAMPLERS:
        raise StudyError(f"Unknown sampler '{name}'; {suggestion(name, SAMPLERS)}.")
    if name == "gp-mixed":
        from sweeps.gp_mixed import check_installed

        check_installed()


class GivenSampler(optuna.samplers.BaseSampler):
    """Gives what was chosen before.

    Args:
        params: a value for every parameter.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = dict(params)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._params[param_name]


def _trial_seed(seed: int, trial_number: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence([seed, trial_number]).generate_state(1)[0])


def _tpe(seed: int, trial_number: int, space: Space) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=_trial_seed(seed, trial_number))


def _gp(seed: int, trial_number: int, space: Space) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=_trial_seed(seed, trial_number), warn_independent_sampling=False)


def _gp_mixed(seed: int, trial_number: int, space: Space) -> BaseSampler:
    from sweeps.gp_mixed import GPMixedSampler

    return GPMixedSampler(_trial_seed(seed, trial_number), _trial_seed(seed, 0), space)


def _qmc(seed: int, trial_number: int, space: Space) -> BaseSampler:
    # One sequence for the whole study, whose position the study's storage remembers: the seed is not the
    # trial's.
    return optuna.samplers.QMCSampler(scramble=True, seed=_trial_seed(seed, 0), warn_independent_sampling=False)


def _random(seed: int, trial_number: int, space: Space) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=_trial_seed(seed, trial_number))


SAMPLERS: dict[str, Callable[[int, int, Space], BaseSampler]] = {
    "tpe": _tpe,
    "gp-mixed": _gp_mixed,
    "gp": _gp,
    "qmc": _qmc,
    "random": _random,
}
ADAPTIVE_SAMPLERS = ("tpe", "gp-mixed", "gp")  # those that learn from the results so far
SLOW_SAMPLERS = ("gp-mixed", "gp")  # those that think for longer than the scheduling of runs should wait
