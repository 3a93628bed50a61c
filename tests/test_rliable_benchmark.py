"""benchmarks/rliable_agreement.py: what it reads and compares; rliable itself is not needed."""

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import rliable_agreement as bench
from benchmarks.rliable_agreement import Algorithm, Ends
from envs.errors import UserError
from sweeps import table_statistics as statistics

HEAD = "algorithm,task,run,score\n"
FILE = HEAD + "A,walk,0,1.5\nA,hop,0,3\nA,walk,1,2\nA,hop,1,4\nB,hop,0,7\nB,swim,0,8\n"


def write(folder, text):
    path = folder / "runs.csv"
    path.write_text(text)
    return path


def test_scores_are_read_by_task_and_algorithms_are_held_together_on_common_tasks(tmp_path):
    found = bench.read_scores(write(tmp_path, FILE))
    assert [*found] == ["A", "B"]
    assert found["A"].tasks == ("hop", "walk")
    assert found["A"].scores.tolist() == [[3.0, 1.5], [4.0, 2.0]]
    x, y = bench.on_common_tasks(found["A"], found["B"])
    assert (x.tolist(), y.tolist()) == ([[3.0], [4.0]], [[7.0]])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("algorithm,task,score\nA,hop,1\n", "it lacks run"),
        (HEAD, "has no runs"),
        (HEAD + "A,hop,0,1\nA,hop,0,2\n", "line 3: run 0 of A on hop is there twice"),
        (HEAD + "A,hop,0,much\n", "line 2: 'much' is no score"),
        (HEAD + "A,hop,0\n", "line 2: None is no score"),
        (HEAD + "A,hop,0,nan\n", "A: 1 of 1 scores are no finite numbers"),
        (HEAD + "A,hop,0,1\nA,hop,1,1\nA,walk,0,1\n", "A: aggregates need as many runs of every task"),
    ],
)
def test_another_layout_is_refused_in_a_sentence(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.read_scores(write(tmp_path, text))


def test_every_number_of_runs_and_tasks_is_compared_and_pairs_with_fewer_runs():
    published = {name: Algorithm(("hop", "walk"), np.arange(6.0).reshape(3, 2)) for name in ("A1", "B2")}
    points = bench.points_of(published)
    assert len(points.samples) == 2 * 3 * 2
    assert points.samples["A1"].shape == (3, 2)
    assert sorted(s.size % 4 for s in points.samples.values()) == sorted(2 * [1, 2, 2, 0, 3, 2])
    assert {len(y) for x, y in points.pairs.values()} == {1, 2, 3}
    assert np.array_equal(points.pairs["A1 over A1"], [published["A1"].scores] * 2)
    assert {0.0, 5.0} <= set(points.thresholds)  # scores, which are not above themselves


def test_the_largest_difference_is_found_and_nothing_hides_in_what_is_no_number():
    assert bench.largest_difference([1.0, [2.0, 3.0]], [1.0, [2.5, 3.0]]) == 0.5
    assert bench.largest_difference([1.0, 2.0], [1.0, float("nan")]) == float("inf")
    with pytest.raises(ValueError, match="shapes"):
        bench.largest_difference([[1.0, 2.0]], [[1.0]])


def test_bounds_are_held_together_in_monte_carlo_errors():
    draw = np.random.default_rng(0)
    ours, theirs = (
        draw.normal((0.0, 10.0), (1.0, 2.0), (400, 10, 2)),
        draw.normal((0.0, 10.0), (1.0, 2.0), (400, 10, 2)),
    )
    ends = Ends.of_seeds(ours, theirs)
    assert np.sqrt((ends.in_errors**2).mean()) == pytest.approx(np.sqrt(18 / 16), rel=0.1)  # Student's t, 18 degrees
    apart = Ends.of_seeds(ours + 5, theirs)
    assert np.abs(apart.in_errors).mean() > 5
    fields = bench.interval_fields(apart, ["x"])
    assert fields["mean_width_ratio"] == pytest.approx(1.0, rel=0.05)
    constant = Ends.of_seeds(np.ones((1, 3, 2)), np.ones((1, 3, 2)) + 1e-16)
    assert np.abs(constant.in_errors).max() < 1e-6
    assert bench.interval_fields(constant, ["x"])["mean_width_ratio"] is None


def test_our_intervals_are_of_each_seed_and_hold_the_value():
    scores = np.random.default_rng(1).normal(size=(5, 3))
    asked = {"samples": {"A": scores}, "pairs": {"A over B": (scores, scores[:3] - 0.5)}}
    found = bench.our_intervals(asked, bench.Options(seeds=2, resamples=200, pair_resamples=100))
    samples, pairs = np.asarray(found["samples"]), np.asarray(found["pairs"])
    assert (samples.shape, pairs.shape) == ((1, 2, 2, 7), (1, 2, 2))
    assert (samples[:, :, 0] <= bench.aggregates_of(scores)).all()
    assert (samples[:, :, 1] >= bench.aggregates_of(scores)).all()
    assert not np.array_equal(samples[:, 0], samples[:, 1])


def test_an_interpreter_without_rliable_is_one_sentence_and_no_result(tmp_path, capsys):
    has_none = subprocess.run([sys.executable, "-S", "-c", "import rliable"], check=False, capture_output=True)
    assert has_none.returncode
    without = tmp_path / "python"
    without.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # -S: nothing that was installed
    without.chmod(0o755)
    path = write(tmp_path, FILE)
    options = ["--seeds", "2", "--resamples", "2", "--pair-resamples", "2", "--scores", str(path), "--source", "mine"]
    for python, sentence in ((str(without), "gave no answer of rliable"), (str(tmp_path / "no"), "cannot be started")):
        assert bench.main(["--python", python, *options]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("benchmarks: ")) == ("", 1)
        assert sentence in err


def stand_in(shift):
    """A module with the functions of rliable that are used, by our statistics; its interquartile mean is shifted."""

    def intervals(scores, func, reps):
        arrays = scores["x"] if isinstance(scores["x"], tuple) else (scores["x"],)
        many = lambda *drawn: np.stack([np.asarray(func(*one)) for one in zip(*drawn, strict=True)])  # noqa: E731
        statistic = lambda *drawn: many(*drawn) if drawn[0].ndim == 3 else np.asarray(func(*drawn))  # noqa: E731
        found = statistics.stratified_bootstrap(statistic, *arrays, resamples=reps, seed=np.random.randint(1 << 30))
        return {}, {"x": np.stack([found.low, found.high])}

    return SimpleNamespace(
        library=SimpleNamespace(
            score_distributions=statistics.performance_profile, get_interval_estimates=intervals,
        ),
        metrics=SimpleNamespace(
            aggregate_mean=statistics.mean, aggregate_median=statistics.median,
            aggregate_iqm=lambda s: statistics.iqm(s) + shift,
            aggregate_optimality_gap=lambda s, gamma: statistics.optimality_gap(s, gamma),
            probability_of_improvement=statistics.probability_of_improvement,
        ),
    )  # fmt: skip


def test_lines_tell_which_statistic_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rliable", stand_in(shift=0.5))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(
        bench, "ask_rliable",
        lambda python, question: bench.answer_of_rliable(json.loads(json.dumps(question, default=np.ndarray.tolist))),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    rows = [f"{a},{t},{r},{draw.normal(50, 10)!r}" for a in "AB" for t in ("hop", "walk") for r in range(4)]
    path = write(tmp_path, HEAD + "\n".join(rows) + "\n")
    options = ["--seeds", "5", "--resamples", "60", "--pair-resamples", "60", "--source", "mine", "--scores", str(path)]
    assert bench.main(["--python", "python", *options]) == 0
    lines = {(line := json.loads(text))["case"]: line for text in capsys.readouterr().out.splitlines()}
    names = (*bench.AGGREGATES, bench.PROFILE, bench.PAIRWISE)
    for name in names:
        for group in ("runs", "made up"):
            expected = 0.5 if name == "iqm" else 0.0
            assert lines[f"{group}/{name}"]["value"] == pytest.approx(expected, abs=1e-9), name
    assert lines["runs/iqm"]["compared"] == 2 * 4 * 2
    assert set(lines["runs/iqm"]["values"]) == {"A", "B"}
    assert set(lines[f"runs/{bench.PAIRWISE}"]["values"]) == {f"{x} over {y}" for x in "AB" for y in "AB"}
    shares = [f"share_above_{tau:g}" for tau in bench.INTERVAL_THRESHOLDS]
    bounds = {name: lines[f"runs/interval of {name}"] for name in (*bench.AGGREGATES, *shares, bench.PAIRWISE)}
    assert bounds["mean"]["value"] < 2.5
    assert bounds["mean"]["runs"] == 16
    assert set(bounds[bench.PAIRWISE]["bounds"]) == {"A over B"}
    assert len(lines) == 2 * len(names) + len(bounds)
