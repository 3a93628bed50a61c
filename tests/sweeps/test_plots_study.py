import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from sweeps.plots_study import (
    confirmed_figure,
    curves_figure,
    history_figure,
    importance_figure,
    pair_figure,
    parallel_figure,
    slice_figure,
    study_figures,
)
from sweeps.space import SearchSpace
from sweeps.summary import Spread
from tests.sweeps.test_summary import RECORDS, SPACE, record


@dataclass(frozen=True)
class Again:
    """A confirmation, made up."""

    number: int
    searched: float
    values: tuple[float, ...]
    interval: tuple[float, float] = (math.nan, math.nan)
    diverged: bool = False

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


def offsets(figure, panel, kind):
    for collection in figure.axes[panel].collections:
        if collection.get_label() == kind:
            return np.asarray(collection.get_offsets()).tolist()
    return []


def test_the_history_figure_tells_results_from_the_rest(tmp_path):
    figure = history_figure(RECORDS, "maximize", "normalised score")
    assert isinstance(figure, Figure)
    assert [value for _, value in offsets(figure, 0, "complete")] == [30.0, 20.0, 10.0, 30.0]
    assert [value for _, value in offsets(figure, 0, "pruned")] == [99.0]
    assert [value for _, value in offsets(figure, 0, "diverged")] == [-50.0]
    (line,) = figure.axes[0].lines
    assert max(line.get_ydata()) == 30.0
    assert figure.axes[0].get_ylabel() == "normalised score"
    figure.savefig(tmp_path / "history.png")
    history_figure([], "maximize").savefig(tmp_path / "empty.png")


def test_the_slice_figure_shows_a_parameter_where_it_applied(tmp_path):
    figure = slice_figure(RECORDS, SPACE)
    assert [axes.get_xlabel() for axes in figure.axes] == ["x", "idle", "kind", "extra"]
    assert figure.axes[0].get_xscale() == "log"
    ((place, value),) = offsets(figure, 2, "pruned")
    assert abs(place - 1) <= 0.15  # its choice is the second one; equal ones are drawn beside each other
    assert value == 99.0
    assert offsets(figure, 3, "pruned") == []  # trial 1 has no extra
    assert len(offsets(figure, 3, "complete")) == 4
    assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["a", "None"]
    figure.savefig(tmp_path / "slices.png")
    slice_figure([], SearchSpace.from_config({})).savefig(tmp_path / "empty.png")


def lines_of(figure):
    """Points of every line of a colour of its own, by collection."""
    return [
        [line.tolist() for line in collection.get_segments()]
        for collection in figure.axes[0].collections
        if hasattr(collection, "get_segments")
    ]


def test_curves_end_where_a_trial_was_stopped(tmp_path):
    records = [
        replace(record(0, 5.0), intermediate={2: 1.0, 10: 5.0}),
        replace(record(1, 2.0, state="pruned"), intermediate={2: 0.5, 4: 2.0}),
        replace(record(2, 4.0), intermediate={2: 3.0, 10: 4.0}),
        replace(record(3, None, state="running"), intermediate={}),
    ]
    figure = curves_figure(records, "maximize", "score", 10)
    pruned, complete = lines_of(figure)
    assert pruned == [[[2.0, 0.5], [4.0, 2.0]]]
    assert len(complete) == 2
    best = next(line for line in figure.axes[0].lines if line.get_label() == "best, trial 0")
    assert best.get_ydata()[-1] == 5.0
    assert "best, trial 2" in [line.get_label() for line in curves_figure(records, "minimize", "s", 10).axes[0].lines]
    figure.savefig(tmp_path / "curves.png")


def test_parallel_lines_run_only_where_parameters_apply(tmp_path):
    space = SearchSpace.from_config(
        {
            "kind": {"type": "categorical", "choices": ["a", "b"]},
            "coef": {"type": "float", "low": 0.01, "high": 100.0, "log": True, "when": {"kind": "a"}},
            "ratio": {"type": "float", "low": 0.0, "high": 2.0},
        }
    )

    def made(number, value, kind, **changes):
        params = {"kind": kind, "coef": 1.0, "ratio": 0.5}
        return replace(record(number, value, **changes), params=params, active=space.active(params))

    def segments(*records, **options):
        return lines_of(parallel_figure(records, space, "maximize", "score", **options))

    whole, _, _ = segments(made(0, 3.0, "a"))
    assert [[a[0], b[0]] for a, b in whole] == [[0, 1], [1, 2], [2, 3]]
    # 1 lies in the middle of 0.01 to 100
    assert [end[1] for _, end in whole[:2]] == pytest.approx([0.5, 0.25])
    gap, _, _ = segments(made(0, 3.0, "b"))
    assert [[a[0], b[0]] for a, b in gap] == [[2, 3]]  # nothing to coef, nor from it
    both, *_ = segments(made(0, 3.0, "a"), made(1, 9.0, "a", state="pruned"))
    assert sorted([a[0], b[0]] for a, b in both) == [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3]]  # it has no value
    figure = parallel_figure([made(0, 3.0, "a"), made(4, 2.0, "a")], space, "maximize", "score", {4})
    (stars,) = [c for c in figure.axes[0].collections if c.get_label() == "confirmed"]
    assert stars.get_offsets().tolist() == [[3.0, 0.0]]
    figure.savefig(tmp_path / "parallel.png")


def test_a_surface_is_drawn_only_where_it_predicts():
    rng = np.random.default_rng(0)
    points = [(10 ** rng.uniform(-1, 1), rng.uniform()) for _ in range(40)]

    def drawn(value):
        records = [record(i, value(x, idle), x=x, idle=idle) for i, (x, idle) in enumerate(points)]
        return pair_figure(records, SPACE, "maximize", ("x", "idle"), "score").axes[0]

    smooth = drawn(lambda x, idle: -(math.log(x) ** 2) + idle)
    assert smooth.get_title().startswith("surface: explains 9")
    noise = drawn(lambda x, idle: rng.normal())
    assert noise.get_title().startswith("no surface")
    assert len(noise.collections) < len(smooth.collections)
    few = [record(i, float(i % 5), x=1.0 + i % 5, idle=0.2 * (i % 5)) for i in range(40)]  # they predict each other
    assert "no surface" in pair_figure(few, SPACE, "maximize", ("x", "idle"), "score").axes[0].get_title()
    beside = pair_figure(RECORDS, SPACE, "maximize", ("x", "kind"), "score").axes[0]
    assert [tick.get_text() for tick in beside.get_yticklabels()] == ["a", "None"]


def test_importances_and_confirmed_values_are_drawn_as_they_are():
    bars = importance_figure({"method.x": Spread(0.7, 0.5, 0.9), "y": Spread(0.3, math.nan, math.nan)}).axes[0]
    assert [bar.get_width() for bar in bars.patches] == [0.3, 0.7]
    assert [tick.get_text() for tick in bars.get_yticklabels()] == ["y", "x"]
    axes = confirmed_figure([Again(3, 50.0, (40.0, 44.0), (16.0, 68.0)), Again(1, 52.0, (39.0,))], "score").axes[0]
    heights = [c.get_offsets()[:, 1].tolist() for c in axes.collections]
    assert heights == [[50.0], [42.0], [40.0, 44.0], [52.0], [39.0], [39.0]]
    assert [16.0, 68.0] in [list(line.get_ydata()) for line in axes.lines]


def test_a_study_has_the_figures_that_it_has_something_for(tmp_path):
    def names(records, space=SPACE, importances=None, confirmed=()):
        figures = study_figures(records, space, "maximize", "score", 10, importances, confirmed)
        for name, draw in figures.items():
            draw().savefig(tmp_path / name)
        return sorted(name.removesuffix(".png") for name in figures)

    assert names([]) == ["history", "slices"]
    assert names([], SearchSpace.from_config({})) == []
    assert names([record(0, 1.0, state="failed")]) == ["curves", "history", "slices"]
    importances = {"x": Spread(0.7, 0.5, 0.9), "kind": Spread(0.3, 0.1, 0.5)}
    full = names(RECORDS, importances=importances, confirmed=[Again(2, 30.0, (25.0,))])
    assert full == ["confirmed", "curves", "history", "importances", "pair", "parallel", "slices"]
