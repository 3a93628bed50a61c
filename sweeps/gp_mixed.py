"""The sampler `gp-mixed`: a Gaussian process over continuous, whole-number and categorical parameters together.

The model is BoTorch's `MixedSingleTaskGP`, whose kernel is the sum and the product of one over the ordered parameters
and one over the categorical ones, the form of CASMOPOLITAN (Wan et al., ICML 2021). The next point maximises the noisy
expected improvement (Letham et al., 2019), in the logarithmic form of Ament et al. (NeurIPS 2023), over what the model
makes of all trials so far, running ones included: an observed maximum, which noise makes too high, is nowhere used.

N is the number of trials, D that of parameters. A trial is a row of D numbers: an ordered parameter from 0 to 1, on a
log scale where the space says so; of a categorical one the index of the choice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from sweeps._optuna import optuna
from sweeps.errors import StudyError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Floats = NDArray[np.float64]

FIT = "gp-mixed:fit"  # what a trial keeps: the model's parameters when it was chosen
FAILURE = "gp-mixed:failure"  # likewise: why there was no model, so that the trial is a point of the Sobol' sequence
SEED_VALUES = "run_values"  # likewise: run key -> value, a run for each seed

START_TRIALS = 10  # trials that must have ended before the model chooses
SPREAD_FREEDOM = 5  # degrees of freedom from which on the seeds' spread, and not the fit, says how large the noise is
LEAST_NOISE = 1e-4  # variance, of standardised values
MAX_LEVELS = 100  # an ordered parameter with more values is treated as continuous, and rounded


def check_installed() -> None:
    """Make sure that BoTorch is there.

    Raises:
        StudyError: it is not.
    """
    if find_spec("botorch") is None:  # not imported here, which takes seconds
        raise StudyError(
            "The sampler gp-mixed needs BoTorch; run pip install 'offsweep[bo]', or set study.sampler.name=tpe."
        )


class GPMixedSampler(optuna.samplers.BaseSampler):
    """Optuna sampler; makes no difference between a fresh object and one that was asked before.

    Args:
        seed: of this question.
        start_seed: of the Sobol' sequence that the study begins with; point n of it is trial n.
        distributions: of every parameter.
    """

    def __init__(self, seed: int, start_seed: int, distributions: Mapping[str, BaseDistribution]) -> None:
        self._seed, self._start_seed = seed, start_seed
        self._space = {key: d for key, d in sorted(distributions.items()) if not d.single()}
        self._independent = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        encoding = Encoding(search_space)
        trials = [t for t in study.get_trials(deepcopy=False) if search_space.keys() <= t.params.keys()]
        # the last report of a pruned trial is no result, but it keeps the model from going there again
        ended = [t for t in trials if t.state.name in ("COMPLETE", "PRUNED") and t.values is not None]
        if len(ended) < START_TRIALS:
            return encoding.params(self._start(len(search_space), trial.number, encoding))
        from sweeps.gp_model import FAILURES, propose

        sign = 1.0 if study.direction.name == "MAXIMIZE" else -1.0
        values, variances = observations([sign * t.values[0] for t in ended], [_seed_values(t) for t in ended])
        earlier = next((t.system_attrs[FIT] for t in reversed(trials) if FIT in t.system_attrs), None)
        running = [t.params for t in trials if t.state.name == "RUNNING"]
        try:
            row, fit = propose(
                encoding, encoding.rows([t.params for t in ended]), values, variances, encoding.rows(running), earlier,
                self._seed,
            )  # fmt: skip
        except FAILURES as error:  # a study does not end because a matrix could not be factored
            study._storage.set_trial_system_attr(trial._trial_id, FAILURE, str(error)[:200])
            return encoding.params(self._start(len(search_space), trial.number, encoding))
        study._storage.set_trial_system_attr(trial._trial_id, FIT, fit)
        return encoding.params(row)

    def _start(self, dimensions: int, number: int, encoding: Encoding) -> Floats:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that not all powers of two are drawn
            sequence = qmc.Sobol(dimensions, scramble=True, rng=self._start_seed)
            return encoding.even_rows(sequence.random(number + 1)[-1:])[0]


class Encoding:
    """Points of a space as rows of numbers.

    Args:
        space: the distributions, of more than one value each, in the order of the columns.
    """

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self._keys = list(space)
        self._scales = [_Scale(distribution) for distribution in space.values()]
        self.choices = {i: scale.levels() for i, scale in enumerate(self._scales) if scale.categorical}
        self.levels = {
            i: scale.levels()
            for i, scale in enumerate(self._scales)
            if not scale.categorical and scale.size is not None and scale.size <= MAX_LEVELS
        }

    @property
    def bounds(self) -> Floats:
        """(2, D): least and largest number of every column."""
        return np.array([[0.0] * len(self._scales), [scale.upper for scale in self._scales]])

    def rows(self, points: Sequence[Mapping[str, Any]]) -> Floats:
        """Rows (N, D) of N points, mappings with a value for every parameter."""
        columns = [[scale.number(p[key]) for p in points] for key, scale in zip(self._keys, self._scales, strict=True)]
        return np.array(columns, dtype=np.float64).T.reshape(len(points), len(self._keys))

    def nearest(self, row: Floats) -> Floats:
        """The row (D,) of the point nearest to a row."""
        return self.rows([self.params(row)])[0]

    def params(self, row: Floats) -> dict[str, Any]:
        """The point nearest to a row (D,)."""
        return {key: s.value(x) for key, s, x in zip(self._keys, self._scales, row.tolist(), strict=True)}

    def even_rows(self, uniform: Floats) -> Floats:
        """Rows (N, D) of points of the unit cube (N, D), by which all choices and whole numbers get equal shares."""
        columns = [[s.even(u) for u in uniform[:, i].tolist()] for i, s in enumerate(self._scales)]
        return np.array(columns, dtype=np.float64).T


class _Scale:
    """One column: between values of a parameter and its numbers."""

    def __init__(self, distribution: BaseDistribution) -> None:
        self._distribution = distribution
        self.categorical = isinstance(distribution, optuna.distributions.CategoricalDistribution)
        self.size: int | None  # how many values there are; None: a continuum
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            self.size, self.upper = len(distribution.choices), len(distribution.choices) - 1.0
            return
        assert isinstance(distribution, optuna.distributions.IntDistribution | optuna.distributions.FloatDistribution)
        self.upper = 1.0
        self._low, self._high, self._step = float(distribution.low), float(distribution.high), distribution.step
        self._log = distribution.log
        self.size = None if self._step is None else round((self._high - self._low) / self._step) + 1

    def levels(self) -> list[float]:
        """The numbers of all values, ascending."""
        assert self.size is not None
        if self.categorical:
            return [float(i) for i in range(self.size)]
        assert self._step is not None
        return [self._unit(self._low + i * self._step) for i in range(self.size)]

    def number(self, value: Any) -> float:
        internal = self._distribution.to_internal_repr(value)
        return internal if self.categorical else self._unit(internal)

    def value(self, number: float) -> Any:
        if self.categorical:
            return self._distribution.to_external_repr(round(number))
        low, high = self._curve(self._low), self._curve(self._high)
        return self._distribution.to_external_repr(self._rounded(self._inverse(low + number * (high - low))))

    def even(self, uniform: float) -> float:
        if self.categorical:
            return float(min(int(uniform * (self.upper + 1)), int(self.upper)))
        half = 0.0 if self._step is None else self._step / 2
        low, high = self._curve(self._low - half), self._curve(self._high + half)
        return self._unit(self._rounded(self._inverse(low + uniform * (high - low))))

    def _unit(self, value: float) -> float:
        low, high = self._curve(self._low), self._curve(self._high)
        return (self._curve(value) - low) / (high - low)

    def _rounded(self, value: float) -> float:
        if self._step is not None:
            value = self._low + round((value - self._low) / self._step) * self._step
        return min(max(value, self._low), self._high)

    def _curve(self, value: float) -> float:
        return math.log(value) if self._log else value

    def _inverse(self, position: float) -> float:
        return math.exp(position) if self._log else position


def observations(values: Sequence[float], seed_values: Sequence[Sequence[float]]) -> tuple[Floats, Floats | None]:
    """What the model is fitted to.

    Values far below the others, such as the stand-ins of trials that diverged, say only that a point is bad. They are
    moved up to twice as far below the median as the best is above it, so that the scale stays that of the good trials.

    Args:
        values: of N trials, larger is better.
        seed_values: of each trial the values of its seeds, which may be none.

    Returns:
        Standardised values (N,), and the variance of each one's noise (N,): the variance between seeds pooled over
        trials, divided by the trial's number of seeds. None where too few trials have several seeds to tell.
    """
    raw = np.array(values)
    middle = float(np.median(raw))
    raw = np.maximum(raw, middle - 2 * max(float(raw.max()) - middle, 1e-12))
    scale = max(float(raw.std()), 1e-12)
    standardised = (raw - raw.mean()) / scale
    several = [np.array(seeds) for seeds in seed_values if len(seeds) > 1]
    freedom = sum(len(seeds) - 1 for seeds in several)
    if freedom < SPREAD_FREEDOM:
        return standardised, None
    pooled = sum(float(((seeds - seeds.mean()) ** 2).sum()) for seeds in several) / freedom
    counts = np.array([max(len(seeds), 1) for seeds in seed_values])
    return standardised, np.maximum(pooled / scale**2 / counts, LEAST_NOISE)


def _seed_values(trial: FrozenTrial) -> list[float]:
    return [float(value) for value in trial.user_attrs.get(SEED_VALUES, {}).values()]
