"""Budgets of episodes: expected best, the bandit, ranks, the choice of trials and the report."""

from __future__ import annotations

import itertools
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sweeps.objectives import ObjectiveSpec
from sweeps.selection import (
    PULLS_FILE,
    Pull,
    bandit_curve,
    best_trials,
    chosen_trials,
    expected_online_performance,
    next_arm,
    rank_correlation,
    read_pulls,
    regret_at,
    report_lines,
    selection_report,
    ucb_index,
)
from sweeps.spec import StudySpec
from sweeps.study import TrialRecord


def record(number: int, value: float | None, state: str = "complete", **attrs: Any) -> TrialRecord:
    now = datetime.now(UTC)
    return TrialRecord(number, state, value, {}, {}, attrs, {}, now, None if state == "running" else now)  # type: ignore[arg-type]


def test_expected_best_is_that_of_all_draws() -> None:
    values = [3.0, 1.0, 2.5]
    for n in (1, 2, 3):
        draws = [max(draw) for draw in itertools.product(values, repeat=n)]
        assert expected_online_performance(values, [n]) == pytest.approx([sum(draws) / len(draws)])
    assert expected_online_performance(values, [10_000]) == pytest.approx([3.0])
    with pytest.raises(ValueError, match="at least 1"):
        expected_online_performance(values, [0])


def test_ucb_index_by_hand() -> None:
    index = ucb_index(np.array([0.5, 0.2, math.nan]), np.array([4.0, 1.0, 0.0]), 5)
    expected = [0.5 + math.sqrt(2 * math.log(5) / 4), 0.2 + math.sqrt(2 * math.log(5)), math.inf]
    np.testing.assert_allclose(index, expected)


def played_one_by_one(arms: list[list[float]], pulls: int, low: float, high: float) -> list[int]:
    """The arms that a bandit of arms whose returns never vary plays."""
    taken: list[int] = []
    for t in range(pulls):
        means = [(arm[0] - low) / (high - low) for arm in arms]
        counts = [taken.count(a) for a in range(len(arms))]
        if 0 in counts:
            taken.append(counts.index(0))
            continue
        scores = [m + math.sqrt(2 * math.log(t) / n) for m, n in zip(means, counts, strict=True)]
        taken.append(max(range(len(arms)), key=scores.__getitem__))
    return taken


def test_the_bandit_plays_as_a_loop_over_its_arms_does() -> None:
    returns = [[1.0], [4.0], [3.0]]
    expected = played_one_by_one(returns, 60, 1.0, 4.0)
    pulls: list[Pull] = []
    for _ in range(60):
        arm = next_arm([0, 1, 2], pulls, 1.0, 4.0)
        pulls.append(Pull(arm, "r", 0, returns[arm][0]))
    assert [p.trial for p in pulls] == expected


def test_the_bandit_finds_the_best_policy_in_time() -> None:
    rng = np.random.default_rng(0)
    values = [10.0, 20.0, 50.0, 0.0]
    curve = bandit_curve([rng.normal(v, 15.0, 40).tolist() for v in values], values, num_repeats=400)
    # the first episode leaves one arm that was ever played: any of the four
    assert curve.mean[0] == pytest.approx(20.0, abs=4.0)
    assert curve.mean[-1] == pytest.approx(50.0, abs=0.5)
    assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    assert curve.pulls[-1] == 200
    # returns that all policies share tell nothing
    same = bandit_curve([[1.0]] * 4, values, num_repeats=400)
    assert same.mean[-1] == pytest.approx(20.0, abs=4.0)


def test_bandit_curve_of_certain_returns_is_exact() -> None:
    # with as many policies as arms and one return each, every repeat believes in the best arm it has seen
    curve = bandit_curve([[1.0], [2.0]], [1.0, 2.0], num_pulls=3, num_repeats=50)
    assert curve.pulls == [1, 2, 3]
    assert curve.mean[1:] == [2.0, 2.0]
    assert curve.low[1:] == curve.high[1:] == [2.0, 2.0]


def test_ranks_and_regret() -> None:
    metric, scores = [1.0, 3.0, 2.0, 0.0], [10.0, 20.0, 60.0, 30.0]
    assert regret_at(1, metric, scores) == 40.0
    assert regret_at(2, metric, scores) == 0.0
    # ranks 2 4 3 1 and 1 2 4 3: 1 - 6 (1 + 4 + 1 + 4) / (4 * 15)
    assert rank_correlation(metric, scores) == pytest.approx(0.0)
    assert rank_correlation([1.0, 1.0, 1.0], scores[:3]) is None
    assert rank_correlation(metric[:2], scores[:2]) is None


def test_the_choice_is_by_value_until_a_bandit_was_played(tmp_path: Path) -> None:
    records = [
        record(0, 1.0), record(1, 5.0), record(2, 9.0, diverged=True), record(3, 3.0), record(4, 9.0, "pruned"),
        record(5, None, "running"),
    ]  # fmt: skip
    assert best_trials(records, 2) == [1, 3]
    assert best_trials(records, 2, "minimize") == [0, 3]
    assert chosen_trials(tmp_path, records, 2) == [1, 3]
    pulls = [Pull(1, "t0001-s0", 7, -3.0), Pull(3, "t0003-s0", 7, 2.0), Pull(1, "t0001-s1", 8, -1.0)]
    lines = "".join(json.dumps(vars(p)) + "\n" for p in pulls)
    (tmp_path / PULLS_FILE).write_text(lines + '{"trial": 0, "ru')  # a kill has cut the last one
    assert read_pulls(tmp_path) == pulls
    assert chosen_trials(tmp_path, records, 3) == [3, 1, 0]


def make_study(folder: Path, objective: ObjectiveSpec, metrics: list[float] | None = None) -> list[TrialRecord]:
    """Four trials of one run each, whose scores are 0, 10, 20 and 30; the first one was pruned."""
    StudySpec("s", objective=objective).save(folder / "study.yaml")
    records = []
    for number in range(4):
        run = f"t{number:04d}-s0"
        path = folder / "runs" / run / "evaluations.json"
        path.parent.mkdir(parents=True)
        score = 10.0 * number
        evaluations = [{"updates": 1, "value": 0.0, "returns": [0.0, 0.0]}]
        if number:
            evaluations.append({"updates": 2, "value": score, "returns": [score - 1.0, score + 1.0]})
        for evaluation in evaluations:
            evaluation["offline"] = {} if metrics is None else {"fqe": metrics[number]}  # type: ignore[assignment]
        path.write_text(json.dumps(evaluations))
        state = "complete" if number else "pruned"
        # the last one is of before episodes were counted
        counted = {} if number == 3 else {"online_episodes": 2 * len(evaluations)}
        records.append(record(number, score, state, run_values={run: score}, **counted))
    return records


def test_the_report_counts_every_episode(tmp_path: Path) -> None:
    records = make_study(tmp_path, ObjectiveSpec())
    report = selection_report(tmp_path, records)
    assert report is not None
    assert report.search_episodes == 2 + 3 * 4
    assert report.num_policies == 3  # a pruned trial has none that anybody would choose
    assert report.eop[0] == (1, pytest.approx(20.0))
    assert report.bandit is not None
    assert report.bandit.mean[-1] == pytest.approx(30.0, abs=0.1)
    assert report.rank_correlation is None
    assert report_lines(report)[0] == "online episodes: 14 in the search"
    assert selection_report(tmp_path, [record(0, None, "running")]) is None


def test_the_report_holds_an_offline_metric_against_the_scores(tmp_path: Path) -> None:
    records = make_study(tmp_path, ObjectiveSpec("offline", "fqe"), metrics=[0.0, 1.0, 3.0, 2.0])
    report = selection_report(tmp_path, records)
    assert report is not None
    assert report.rank_correlation == pytest.approx(0.5)  # ranks 1 3 2 and 1 2 3
    assert report.regret == {1: 10.0}
    lines = report_lines(report)
    assert lines[0] == "online episodes: 14 in the search, which it did not see (it was led by fqe)"
    assert "rank correlation 0.50, regret@1 10.0" in lines[-1]
    json.dumps(report.to_json())
