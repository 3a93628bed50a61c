"""Stand-ins for the trials of a study that has not begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sweeps._optuna import optuna
from sweeps.samplers import ADAPTIVE_SAMPLERS, make_sampler
from sweeps.space import Params
from sweeps.spec import StudySpec

__all__ = ["ADAPTIVE_SAMPLERS", "stand_in_trials"]


def stand_in_trials(spec: StudySpec, enqueue: Sequence[Mapping[str, Any]] = ()) -> list[Params]:
    """The active parameters of as many trials as the study has: listed ones, else drawn at random in place of its
    sampler.

    Args:
        spec: the study; its sampler's seed is the draws'.
        enqueue: values of trials that come first.
    """
    space = spec.validate()
    if spec.trials:
        return [dict(params) for params in spec.trials]
    distributions = space.distributions()
    study = optuna.create_study()
    for params in list(enqueue)[: spec.num_trials]:
        study.enqueue_trial(dict(params))
    trials = []
    for number in range(spec.num_trials):
        study.sampler = make_sampler("random", spec.sampler.seed, number, distributions)
        params = study.ask(distributions).params
        trials.append(space.active({key: params[key] for key in space.parameters}))
    return trials
