"""Pruners: when a study stops a trial early.

A trial reports the mean over its runs after every evaluation. What is not here, and why: Optuna's Wilcoxon pruner
compares trials run by run in turn, which is what `sweeps.racing` does, and with the handful of runs that trials have
here its signed-rank test can hardly ever reject (no p-value of 3 pairs is below 1/8); its patient pruner stops trials
that no longer improve, as good ones do when they have converged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sweeps.errors import StudyError, suggestion

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

    from sweeps.spec import PrunerSpec, StudySpec

HALVING = ("asha", "hyperband")  # of many trials few go on, by their first reports
COMPLETE_ONLY = ("gp",)  # samplers that learn nothing from a pruned trial


def make_pruner(spec: PrunerSpec, total_steps: int) -> BasePruner:
    """The pruner that `spec` describes.

    Args:
        spec: `median` stops a trial whose best report so far is worse than the median of the completed
            trials' reports at the same step; `percentile` one that is not among the best `percentile` per cent there;
            `asha` (asynchronous successive halving) lets the best 1 / reduction_factor of those that came so far go on
            at each rung, the first after the warm-up, each further one at reduction_factor times the steps;
            `hyperband` gives trials to such brackets whose first rungs differ; `none` stops nothing.
        total_steps: the largest step a trial reports; nothing is pruned before
            ceil(spec.warmup_fraction * total_steps).

    Raises:
        StudyError: unknown name (with the nearest one).
    """
    check_pruner(spec)
    return PRUNERS[spec.name](spec, total_steps)


def check_pruner(spec: PrunerSpec) -> None:
    """Raises:
    StudyError: unknown name, or a number that makes no sense.
    """
    if spec.name == "wilcoxon":
        raise StudyError(
            "The pruner 'wilcoxon' cannot tell trials apart by the few runs they have here; set "
            "study.racing.first_seeds, which gives further seeds only to trials that may be the best."
        )
    if spec.name not in PRUNERS:
        raise StudyError(f"Unknown pruner '{spec.name}'; {suggestion(spec.name, PRUNERS)}.")
    if not 0 <= spec.warmup_fraction <= 1:
        raise StudyError(f"study.pruner.warmup_fraction is a share from 0 to 1, not {spec.warmup_fraction!r}.")
    if spec.name in HALVING and spec.warmup_fraction == 0:
        raise StudyError(
            f"study.pruner.warmup_fraction is 0, but the first rung of {spec.name} needs a share of the steps; set it "
            "above 0, 1/3 for example."
        )
    if isinstance(spec.startup_trials, bool) or not isinstance(spec.startup_trials, int) or spec.startup_trials < 0:
        raise StudyError(
            f"study.pruner.startup_trials must be a whole number of at least 0, not {spec.startup_trials!r}."
        )
    if not 0 < spec.percentile < 100:
        raise StudyError(f"study.pruner.percentile must lie between 0 and 100, not {spec.percentile!r}.")
    factor = spec.reduction_factor
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise StudyError(f"study.pruner.reduction_factor must be a whole number of at least 2, not {factor!r}.")


def warnings_of(spec: StudySpec) -> list[str]:
    """What speaks against a study's pruner, a sentence each, for its user to read before it starts."""
    found = []
    if spec.pruner.name in HALVING:
        found.append(
            f"The pruner {spec.pruner.name} ends most trials by their first reports, and keeps bad settings that peak "
            "early and then collapse, as offline model-based ones do (measured on made-up curves, mean regret: 40.8 "
            "without pruning, 43.6 with a first rung at 1/3 of the training, 82.8 at 1/9); median is safer."
        )
    if spec.pruner.name != "none" and spec.sampler.name in COMPLETE_ONLY:
        found.append(
            f"The sampler {spec.sampler.name} learns nothing from pruned trials; set study.pruner.name=none, or "
            "study.sampler.name=tpe, which does."
        )
    return found


def _warmup(spec: PrunerSpec, total_steps: int) -> int:
    # A share such as 0.1 of 30 comes out a little above 3 and must not round up to 4.
    return math.ceil(round(spec.warmup_fraction * total_steps, 6))


def _median(spec: PrunerSpec, total_steps: int) -> BasePruner:
    from sweeps._optuna import optuna

    return optuna.pruners.MedianPruner(
        n_startup_trials=spec.startup_trials, n_warmup_steps=_warmup(spec, total_steps)
    )  # fmt: skip


def _percentile(spec: PrunerSpec, total_steps: int) -> BasePruner:
    from sweeps._optuna import optuna

    return optuna.pruners.PercentilePruner(
        spec.percentile, n_startup_trials=spec.startup_trials, n_warmup_steps=_warmup(spec, total_steps)
    )


def _asha(spec: PrunerSpec, total_steps: int) -> BasePruner:
    from sweeps._optuna import optuna

    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=max(1, _warmup(spec, total_steps)), reduction_factor=spec.reduction_factor
    )


def _hyperband(spec: PrunerSpec, total_steps: int) -> BasePruner:
    from sweeps._optuna import optuna

    first = max(1, _warmup(spec, total_steps))
    # Optuna takes 1 + floor(log(max / min)) brackets: a first rung that was rounded up must not cost one
    last = max(total_steps, first * math.floor(1 / spec.warmup_fraction + 1e-6))
    return optuna.pruners.HyperbandPruner(min_resource=first, max_resource=last, reduction_factor=spec.reduction_factor)


def _none(spec: PrunerSpec, total_steps: int) -> BasePruner:
    from sweeps._optuna import optuna

    return optuna.pruners.NopPruner()


PRUNERS: dict[str, Callable[[PrunerSpec, int], BasePruner]] = {
    "median": _median,
    "percentile": _percentile,
    "asha": _asha,
    "hyperband": _hyperband,
    "none": _none,
}
