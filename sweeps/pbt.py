"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): the trials of a study are trained together, the
worst go on from the best ones' state, with hyperparameters a little beside theirs.

What comes of it is a schedule of hyperparameters rather than constants. Here is what a population decides, as pure
functions; `orchestrator.population` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.errors import StudyError
from sweeps.space import Parameter, Params, SearchSpace

if TYPE_CHECKING:
    from sweeps.study import TrialRecord

SCHEDULE = "schedule"
"""What a trial of a population keeps: [{updates: 0, key: value, ...}, ...], the settings that its last state has been
trained with, from so many updates on."""


@dataclass
class PBTSpec:
    """Population-based training; its defaults are choices of ours in the range of the paper's."""

    every_evaluations: int = 1  # evaluations between two turns, at which members are replaced
    # share of the members that is replaced at a turn, by as many of the best; greater than 0, at most 0.5
    quantile: float = 0.25
    perturb: list[float] = field(default_factory=lambda: [0.8, 1.25])  # factors, of which each number gets one
    resample: float = 0.25  # probability that a hyperparameter is drawn anew from its range instead

    def validate(self, space: SearchSpace, num_trials: int, seeds_per_trial: int) -> None:
        """Check every field, and that the study can be a population.

        Raises:
            StudyError: naming the first thing that makes no sense.
        """
        every = self.every_evaluations
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise StudyError(f"study.pbt.every_evaluations must be a whole number of at least 1, not {every!r}.")
        if not 0 < self.quantile <= 0.5:
            raise StudyError(
                f"study.pbt.quantile is the share of the population that is replaced, greater than 0 and at most 0.5, "
                f"not {self.quantile!r}."
            )
        if not 0 <= self.resample <= 1:
            raise StudyError(f"study.pbt.resample is a probability from 0 to 1, not {self.resample!r}.")
        if not self.perturb or not all(0 < factor < math.inf for factor in self.perturb):
            raise StudyError(f"study.pbt.perturb must list factors greater than 0, not {self.perturb!r}.")
        if not space.parameters:
            raise StudyError("study.pbt needs hyperparameters to change; add them to study.space.")
        if num_trials < 2:
            raise StudyError("study.pbt needs a population; set study.num_trials to its size, of at least 2.")
        if seeds_per_trial != 1:
            raise StudyError(
                f"study.pbt trains every trial with one seed, not {seeds_per_trial}; set num_seeds to 1, and repeat "
                "the schedule that is found with other seeds."
            )
        for parameter in space.parameters.values():
            if parameter.when:
                raise StudyError(
                    f"study.pbt cannot change {parameter.key}, which applies under a condition only; drop its `when`, "
                    "or leave it out of study.space."
                )


def exploit(values: Sequence[float | None], quantile: float, generator: np.random.Generator) -> list[int]:
    """Truncation selection: whose state every member goes on from.

    The worst members take that of a member drawn from as many of the best, if it is better than they are; the others
    go on as they are. A member without a value, which has diverged, is replaced in any case.

    Args:
        values: of the members, larger is better; at least one is not None.
        quantile: share of the members that counts as the best, and as the worst; at most 0.5.
        generator: of the draws.

    Returns:
        For every member the number of another one, or its own.
    """
    known = {number: value for number, value in enumerate(values) if value is not None}
    ranked = sorted(known, key=lambda number: (-known[number], number))  # the best first
    count = max(1, int(quantile * len(values) + 1e-9))
    best = ranked[: max(1, min(count, len(ranked) // 2))]
    missing = [number for number in range(len(values)) if number not in known]
    worst = [*missing, *ranked[: len(best) - 1 : -1]][: max(count, len(missing))]
    sources = list(range(len(values)))
    for number in sorted(worst):
        source = best[int(generator.integers(len(best)))]
        if number in missing or known[source] > known[number]:
            sources[number] = source
    return sources


def explore(params: Mapping[str, Any], space: SearchSpace, spec: PBTSpec, generator: np.random.Generator) -> Params:
    """Hyperparameters a little beside others.

    Each one is drawn anew from its range with probability `spec.resample`. Else a number is multiplied with one of the
    factors of `spec.perturb`, brought back into its range and onto its grid, and a whole number moves by one at least;
    a categorical one stays.

    Args:
        params: a value for every parameter of the space.
        generator: of the draws.
    """
    changed: Params = {}
    for key, parameter in space.parameters.items():
        anew = generator.random() < spec.resample
        if anew:
            changed[key] = _drawn(parameter, generator)
        elif parameter.type == "categorical":
            changed[key] = params[key]
        else:
            factor = spec.perturb[int(generator.integers(len(spec.perturb)))]
            changed[key] = _moved(parameter, params[key], factor)
    return changed


def replayed_params(record: TrialRecord) -> Params:
    """What a run must be given to be trained as a trial was: its hyperparameters, of a member of a population the
    schedule of its last state."""
    steps: list[dict[str, Any]] | None = record.attrs.get(SCHEDULE)
    if not steps:
        return dict(record.active)
    first, *later = steps
    settings = {key: value for key, value in first.items() if key != "updates"}
    return {**settings, "schedule": [dict(step) for step in later]} if later else settings


def _drawn(parameter: Parameter, generator: np.random.Generator) -> Any:
    """A value of the range, by the distribution that a random search has."""
    if parameter.type == "categorical":
        return parameter.choices[int(generator.integers(len(parameter.choices)))]
    low, high = _bounds(parameter)
    if parameter.step is not None or (parameter.type == "int" and not parameter.log):
        step = parameter.step or 1
        return _number(parameter, low + step * int(generator.integers(round((high - low) / step) + 1)))
    if parameter.log:
        margin = 0.5 if parameter.type == "int" else 0.0  # so that the ends are as likely as their neighbours
        return _number(parameter, math.exp(generator.uniform(math.log(low - margin), math.log(high + margin))))
    return _number(parameter, generator.uniform(low, high))


def _moved(parameter: Parameter, value: float, factor: float) -> float:
    moved = _number(parameter, value * factor)
    step = parameter.step or (1 if parameter.type == "int" else None)
    if moved == value and step is not None and factor != 1 and value != 0:
        moved = _number(parameter, value + math.copysign(step, value * (factor - 1)))
    return moved


def _number(parameter: Parameter, value: float) -> float:
    """The nearest value of the range."""
    low, high = _bounds(parameter)
    if parameter.step is not None:
        value = low + parameter.step * round((value - low) / parameter.step)
    value = min(max(value, low), high)
    return round(value) if parameter.type == "int" else float(value)


def _bounds(parameter: Parameter) -> tuple[float, float]:
    assert parameter.low is not None
    assert parameter.high is not None
    return parameter.low, parameter.high
