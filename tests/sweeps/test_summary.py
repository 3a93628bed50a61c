from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from envs.errors import UserError
from sweeps.space import SearchSpace
from sweeps.study import TrialRecord
from sweeps.summary import (
    collapse_sentences,
    collapsing_runs,
    failures,
    history,
    importance_spreads,
    parameter_importances,
    running_trials,
    state_counts,
    study_cost,
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


def test_states_are_counted_and_failures_grouped_by_reason():
    assert state_counts(RECORDS) == {"complete": 4, "pruned": 1, "diverged": 1, "failed": 1, "running": 1}
    assert state_counts([]) == {}
    reasons = {2: "too wide", 5: "killed\n  twice", 7: "killed twice"}
    records = [replace(r, attrs={"failure": reasons[r.number]}) if r.number in reasons else r for r in RECORDS]
    assert failures(records) == {"killed twice": [5, 7], "too wide": [2]}
    assert failures(RECORDS) == {}


def test_running_trials_say_how_far_they_are():
    under_way = [replace(RECORDS[6], intermediate={2: 5.0, 4: 7.5}), replace(RECORDS[6], number=8), RECORDS[0]]
    first, second = running_trials(under_way, 10, now=START + timedelta(seconds=30))
    assert (first.number, first.age, first.share, first.value) == (6, 30.0, 0.4, 7.5)
    assert (second.number, second.share, second.value) == (8, 0.0, None)


def test_what_a_study_cost_by_hand():
    # trials 0 and 1 share a pack from 0 to 60 s, trial 2 has one from 100 to 120 s, trial 3 has run since 130 s
    complete = replace(record(0, 1.0), attrs={"packs": ["a"], "updates": 20, "online_episodes": 12})
    pruned = replace(record(1, 1.0, state="pruned", seconds=30), attrs={"packs": ["a"], "updates": 12})
    late = START + timedelta(seconds=100)
    alone = replace(record(2, 1.0, seconds=120), attrs={"packs": ["b"], "seeds": [4]}, started=late)
    running = replace(record(3, None, state="running"), started=START + timedelta(seconds=130), intermediate={3: 0.0})
    cost = study_cost(
        [complete, pruned, alone, running], seeds=2, total_steps=10, episodes=5, now=START + timedelta(seconds=150)
    )
    assert (cost.wall_seconds, cost.pack_seconds) == (150.0, 60.0 + 20.0 + 20.0)
    # kept; kept; one seed to its last report at 6; two seeds to 3
    assert cost.updates == 20 + 12 + 6 + 2 * 3
    assert cost.updates_saved == (2 * 10 - 12) + (2 * 10 - 6)  # pruned; not given its second seed
    # kept; two seeds, two reports; one seed, two reports; two seeds, one report
    assert cost.online_episodes == 12 + 2 * 2 * 5 + 2 * 5 + 2 * 5
    assert not cost.exact
    assert study_cost([complete], 2, 10, 5).exact
    assert study_cost([], 2, 10, 5).wall_seconds == 0.0


def test_importances_vary_less_with_more_trials():
    def made(count):
        rng = np.random.default_rng(1)
        drawn = [(10 ** rng.uniform(-1, 1), rng.uniform()) for _ in range(count)]
        return [record(i, -abs(np.log(x)) - 0.3 * idle, x=x, idle=idle) for i, (x, idle) in enumerate(drawn)]

    few, many = (importance_spreads(made(count), SPACE, "maximize", resamples=20) for count in (30, 400))
    assert few is not None
    assert many is not None
    assert next(iter(many)) == "x"
    assert all(spread.low <= spread.high for spread in few.values())
    assert many["x"].high - many["x"].low < few["x"].high - few["x"].low
    assert importance_spreads(made(10), SPACE, "maximize") is None
    beyond = importance_spreads(made(501), SPACE, "maximize")
    assert beyond is not None
    assert np.isnan(beyond["x"].low)
