from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from matplotlib.figure import Figure

from envs.errors import UserError
from sweeps.space import SearchSpace
from sweeps.study import TrialRecord
from sweeps.summary import (
    collapse_sentences,
    collapsing_runs,
    history,
    history_figure,
    parameter_importances,
    slice_figure,
    trial_rows,
)

SPACE = SearchSpace.from_config(
    {
        "x": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
        "idle": {"type": "float", "low": 0.0, "high": 1.0},
        "kind": {"type": "categorical", "choices": ["a", None]},
        "extra": {"type": "int", "low": 1, "high": 3, "when": {"kind": "a"}},
    }
)
START = datetime(2026, 1, 1, tzinfo=UTC)


def record(number, value, *, state="complete", diverged=False, seconds=60.0, x=1.0, idle=0.5, kind="a", extra=2):
    params = {"x": x, "idle": idle, "kind": kind, "extra": extra}
    done = state in ("complete", "pruned", "failed")
    return TrialRecord(
        number=number,
        state=state,
        value=value,
        params=params,
        active=SPACE.active(params),
        attrs={"diverged": True} if diverged else {},
        intermediate={3: 1.0, 6: 2.0} if done else {},
        started=START,
        finished=START + timedelta(seconds=seconds) if done else None,
    )


RECORDS = [
    record(0, 10.0, seconds=40),
    record(1, 99.0, state="pruned", kind=None),
    record(2, 30.0, seconds=20),
    record(3, -50.0, diverged=True),
    record(4, 20.0, seconds=30),
    record(5, None, state="failed"),
    record(6, None, state="running"),
    record(7, 30.0, seconds=90),
]


def test_only_results_are_ranked():
    rows = trial_rows(RECORDS, "maximize")
    assert [(row.rank, row.number, row.gap) for row in rows] == [
        (1, 2, 0.0),
        (2, 7, 0.0),
        (3, 4, 10.0),
        (4, 0, 20.0),
        (None, 1, None),
        (None, 3, None),
        (None, 5, None),
        (None, 6, None),
    ]
    assert (rows[0].duration, rows[0].last_step, rows[-1].duration, rows[-1].last_step) == (
        20.0,
        6,
        None,
        None,
    )
    assert rows[5].diverged
    assert rows[4].params == {"x": 1.0, "idle": 0.5, "kind": None}  # the active ones
    assert [row.number for row in trial_rows(RECORDS, "minimize")[:4]] == [0, 4, 2, 7]
    assert trial_rows(RECORDS, "minimize")[1].gap == 10.0
    with pytest.raises(UserError, match="maximize or minimize"):
        trial_rows(RECORDS, "max")


def test_history_goes_by_the_time_of_finishing():
    course = history(RECORDS, "maximize", optimum=50.0)
    assert course.numbers.tolist() == [2, 4, 0, 7]
    assert course.values.tolist() == [30.0, 20.0, 10.0, 30.0]
    assert course.best.tolist() == [30.0, 30.0, 30.0, 30.0]
    assert course.regret is not None
    assert course.regret.tolist() == [20.0] * 4
    down = history(RECORDS, "minimize", optimum=0.0)
    assert down.best.tolist() == [30.0, 20.0, 10.0, 10.0]
    assert down.regret is not None
    assert down.regret.tolist() == [30.0, 20.0, 10.0, 10.0]
    assert history(RECORDS, "maximize").regret is None
    assert history([], "maximize").best.shape == (0,)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_parameter_that_decides_is_the_most_important(direction):
    rng = np.random.default_rng(0)
    sign = 1.0 if direction == "maximize" else -1.0
    records = []
    for number in range(80):
        x, idle, extra = 10 ** rng.uniform(-1, 1), rng.uniform(), int(rng.integers(1, 4))
        value = -sign * abs(np.log(x))
        records.append(record(number, value, x=x, idle=idle, kind=("a", None)[number % 2], extra=extra))
    importances = parameter_importances(records, SPACE, direction)
    assert importances is not None
    assert next(iter(importances)) == "x"
    assert importances["x"] > 0.5
    assert sum(importances.values()) == pytest.approx(1.0)
    # Nothing is said on too little.
    assert parameter_importances(records[:19], SPACE, direction) is None
    pruned = [replace(item, state="pruned") for item in records]
    assert parameter_importances(pruned, SPACE, direction) is None
    equal = [replace(item, value=1.0) for item in records]
    assert parameter_importances(equal, SPACE, direction) is None


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
    assert offsets(figure, 2, "pruned") == [[1.0, 99.0]]
    assert offsets(figure, 3, "pruned") == []  # trial 1 has no extra
    assert len(offsets(figure, 3, "complete")) == 4
    assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["a", "None"]
    figure.savefig(tmp_path / "slices.png")
    slice_figure([], SearchSpace.from_config({})).savefig(tmp_path / "empty.png")


def test_collapsing_runs_are_named_by_trial_and_seed():
    ratios = {"t0003-s1": 12.34, "t0003-s0": 4.0}
    found = replace(record(3, 1.0), attrs={"run_collapsing": ratios})
    assert collapsing_runs(found) == {"t003-s0": 4.0, "t003-s1": 12.34}
    assert collapsing_runs(record(4, 1.0)) == {}
    sentences = collapse_sentences([record(4, 1.0), found])
    assert sentences[1] == "t003-s1 is collapsing: mean Q 12.3 times the value of an expert and rising"
    many = [replace(found, number=n) for n in range(7)]
    assert len(collapse_sentences(many)) == 11
    assert collapse_sentences(many)[-1] == "and 4 more runs are collapsing"
