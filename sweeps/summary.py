"""What a study found: its table, its history, which parameters mattered, and two figures.

Everything here is computed from `Study.trials()` alone, so it works on a study that is running, resumed or
made up. A trial that was pruned or diverged is shown as such and never counts as a result: the value of the
first is a report from mid-training, that of the second a stand-in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sweeps.errors import StudyError
from sweeps.plots import new_figure
from sweeps.space import Params, SearchSpace
from sweeps.study import State, TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLLAPSING = "run_collapsing"  # what a trial keeps: run key -> mean Q over an expert's value, of the collapsing runs

_COLORS = {"complete": "#2a6f97", "pruned": "#b0b0b0", "diverged": "#c1121f", "best": "#e09f3e"}


@dataclass(frozen=True)
class TrialRow:
    """A row of the table of trials."""

    rank: int | None  # 1 is the best; None unless complete and not diverged
    number: int
    state: State
    diverged: bool
    value: float | None
    gap: float | None  # how far below (maximize) or above (minimize) the best value, >= 0; None without a rank
    last_step: int | None  # largest reported step
    duration: float | None  # seconds from being asked to being told, time between drivers included
    params: Params  # the active ones


@dataclass(frozen=True)
class History:
    """The course of a study in the order in which trials finished; all arrays (n,)."""

    numbers: np.ndarray  # int, of the complete trials that did not diverge
    values: np.ndarray  # float
    best: np.ndarray  # float, best value so far
    regret: np.ndarray | None  # float, distance of `best` from the optimum; None where that is not known


def trial_rows(records: Sequence[TrialRecord], direction: str) -> list[TrialRow]:
    """The table of trials: ranked ones from the best on (equals by number), then the others by number."""
    results = _results(records)
    sign = _sign(direction)
    ranked = sorted(results, key=lambda record: (-sign * _value(record), record.number))
    ranks = {record.number: rank for rank, record in enumerate(ranked, start=1)}
    top = _value(ranked[0]) if ranked else math.nan
    others = sorted((r for r in records if r.number not in ranks), key=lambda record: record.number)
    return [
        TrialRow(
            rank=ranks.get(record.number),
            number=record.number,
            state=record.state,
            diverged=record.diverged,
            value=record.value,
            gap=sign * (top - _value(record)) if record.number in ranks else None,
            last_step=max(record.intermediate, default=None),
            duration=(
                (record.finished - record.started).total_seconds()
                if record.started is not None and record.finished is not None
                else None
            ),
            params=record.active,
        )
        for record in (*ranked, *others)
    ]


def collapsing_runs(record: TrialRecord) -> dict[str, float]:
    """Name of every run of a trial that was collapsing at its last evaluation (its critics' mean value far above an
    expert's, and rising) -> that value over the expert's."""
    runs = record.attrs.get(COLLAPSING, {})
    return {f"t{record.number:03d}-{key.partition('-')[2]}": ratio for key, ratio in sorted(runs.items())}


def collapse_sentences(records: Sequence[TrialRecord], most: int = 10) -> list[str]:
    """One sentence for every collapsing run, by trial; beyond `most` of them only how many more there are."""
    runs = [item for record in sorted(records, key=lambda r: r.number) for item in collapsing_runs(record).items()]
    sentences = [
        f"{name} is collapsing: mean Q {ratio:.1f} times the value of an expert and rising" for name, ratio in runs
    ]
    more = len(sentences) - most
    return sentences if more <= 0 else [*sentences[:most], f"and {more} more runs are collapsing"]


def history(records: Sequence[TrialRecord], direction: str, optimum: float | None = None) -> History:
    """Best value so far after each result.

    Args:
        records: of the study.
        direction: maximize or minimize.
        optimum: the best possible value, where it is known (made-up objectives); gives the simple regret.
    """
    results = sorted(_results(records), key=_finishing_order)
    sign = _sign(direction)
    values = np.array([_value(record) for record in results], dtype=np.float64)
    best = sign * np.maximum.accumulate(sign * values)
    return History(
        numbers=np.array([record.number for record in results], dtype=np.int64),
        values=values,
        best=best,
        regret=None if optimum is None else sign * (optimum - best),
    )


def parameter_importances(
    records: Sequence[TrialRecord], space: SearchSpace, direction: str, min_trials: int = 20
) -> dict[str, float] | None:
    """How much each parameter decides whether a trial is among the best tenth; most important first, sum 1.

    PED-ANOVA (Watanabe et al., IJCAI 2023, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in
    Arbitrary Subspaces") as implemented by Optuna, over complete trials, diverged ones included (that they
    are bad is known). A conditional parameter counts over all trials, also where it did not apply, which
    understates it.

    Args:
        records: of the study.
        space: of the study.
        direction: maximize or minimize.
        min_trials: complete trials below which the answer would be noise.

    Returns:
        None with fewer complete trials, with fewer than two parameters, or when all values are equal.
    """
    complete = [record for record in records if record.state == "complete"]
    values = {_value(record) for record in complete}
    if len(complete) < min_trials or len(space.parameters) < 2 or len(values) < 2:
        return None
    from sweeps._optuna import optuna

    sign = _sign(direction)
    distributions = space.distributions()
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=record.params, distributions=distributions, value=-sign * _value(record))
            for record in complete
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return dict(sorted(importances.items(), key=lambda item: -item[1]))


def history_figure(records: Sequence[TrialRecord], direction: str, value_name: str = "score") -> Figure:
    """Every trial's value and the best so far, over the order in which trials finished.

    Args:
        records: of the study; may hold no finished trial.
        direction: maximize or minimize.
        value_name: of the vertical axis.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    finished = sorted((r for r in records if r.value is not None and r.finished), key=_finishing_order)
    place = {record.number: index for index, record in enumerate(finished, start=1)}
    _scatter(axes, finished, [place[record.number] for record in finished])
    course = history(finished, direction)
    if len(course.numbers):
        places = [place[int(number)] for number in course.numbers]
        axes.step(
            [*places, len(finished)],
            [*course.best, course.best[-1]],
            where="post",
            color=_COLORS["best"],
            label="best so far",
        )
    axes.set_xlabel("finished trials")
    axes.set_ylabel(value_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if finished:
        axes.legend()
    return figure


def slice_figure(
    records: Sequence[TrialRecord], space: SearchSpace, value_name: str = "score", columns: int = 3
) -> Figure:
    """Every parameter against the value, one panel each; a trial appears only where the parameter applied.

    Args:
        records: of the study; may hold no finished trial.
        space: of the study.
        value_name: of the vertical axes.
        columns: panels side by side, >= 1.
    """
    keys = list(space.parameters)
    columns = max(1, min(columns, len(keys)))
    rows = max(1, math.ceil(len(keys) / columns))
    figure = new_figure(3.4 * columns, 2.8 * rows)
    finished = [record for record in records if record.value is not None and record.finished]
    first: Axes | None = None
    for index, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, index + 1, sharey=first)
        first = first or axes
        parameter = space.parameters[key]
        shown = [record for record in finished if key in record.active]
        if parameter.type == "categorical":
            labels = [str(choice) for choice in parameter.choices]
            _scatter(axes, shown, [parameter.choices.index(record.active[key]) for record in shown])
            axes.set_xticks(range(len(labels)), labels)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        else:
            _scatter(axes, shown, [record.active[key] for record in shown])
            if parameter.log:
                axes.set_xscale("log")
        axes.set_xlabel(key)
        if index % columns == 0:
            axes.set_ylabel(value_name)
    return figure


def _scatter(axes: Axes, records: Sequence[TrialRecord], positions: Sequence[float]) -> None:
    kinds = ["diverged" if record.diverged else str(record.state) for record in records]
    for kind, marker in (("complete", "o"), ("pruned", "v"), ("diverged", "x")):
        chosen = [index for index, found in enumerate(kinds) if found == kind]
        if chosen:
            axes.scatter(
                [positions[index] for index in chosen],
                [_value(records[index]) for index in chosen],
                s=18,
                marker=marker,
                color=_COLORS[kind],
                label=kind,
            )


def _results(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.state == "complete" and not record.diverged]


def _value(record: TrialRecord) -> float:
    assert record.value is not None
    return record.value


def _finishing_order(record: TrialRecord) -> tuple[float, int]:
    return (record.finished.timestamp() if record.finished else math.inf, record.number)


def _sign(direction: str) -> float:
    if direction not in ("maximize", "minimize"):
        raise StudyError(f"Unknown direction '{direction}'; use maximize or minimize.")
    return 1.0 if direction == "maximize" else -1.0
