"""Pruners: when a study stops a trial early."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sweeps.errors import StudyError, suggestion

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

    from sweeps.spec import PrunerSpec


def make_pruner(spec: PrunerSpec, total_steps: int) -> BasePruner:
    """The pruner that `spec` describes.

    Args:
        spec: `median` stops a trial whose best report so far is worse than the median of the completed
            trials' reports at the same step; `none` stops nothing.
        total_steps: the largest step a trial reports; nothing is pruned before
            ceil(spec.warmup_fraction * total_steps).

    Raises:
        StudyError: unknown name (with the nearest one).
    """
    if spec.name not in PRUNERS:
        raise StudyError(f"Unknown pruner '{spec.name}'; {suggestion(spec.name, PRUNERS)}.")
    return PRUNERS[spec.name](spec, total_steps)


def _median(spec: PrunerSpec, total_steps: int) -> BasePruner:
    from sweeps._optuna import optuna

    # A share such as 0.1 of 30 comes out a little above 3 and must not round up to 4.
    warmup_steps = math.ceil(round(spec.warmup_fraction * total_steps, 6))
    return optuna.pruners.MedianPruner(n_startup_trials=spec.startup_trials, n_warmup_steps=warmup_steps)


def _none(spec: PrunerSpec, total_steps: int) -> BasePruner:
    from sweeps._optuna import optuna

    return optuna.pruners.NopPruner()


PRUNERS: dict[str, Callable[[PrunerSpec, int], BasePruner]] = {"median": _median, "none": _none}
