"""Population-based training: who is replaced by whom, and with which hyperparameters."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from sweeps.errors import StudyError
from sweeps.pbt import SCHEDULE, PBTSpec, exploit, explore, replayed_params
from sweeps.plots_pbt import schedule_figure
from sweeps.space import SearchSpace
from sweeps.spec import PrunerSpec, StudySpec
from sweeps.study import TrialRecord

LR = {"type": "float", "low": 1e-5, "high": 1e-3, "log": True}
SPACE = SearchSpace.from_config({
    "method.lr": LR,
    "method.coef": {"type": "float", "low": 0.0, "high": 10.0, "step": 0.5},
    "method.count": {"type": "int", "low": 1, "high": 20},
    "method.kind": {"type": "categorical", "choices": ["a", "b", "c"]},
})  # fmt: skip
POINT = {"method.lr": 1e-4, "method.coef": 2.0, "method.count": 2, "method.kind": "b"}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(5))
def test_the_worst_quarter_goes_on_from_the_best(seed: int) -> None:
    sources = exploit([1.0, 7.0, 3.0, 0.0, 9.0, 4.0, 5.0, 6.0], 0.25, generator(seed))
    assert [i for i, source in enumerate(sources) if source != i] == [0, 3]
    assert {sources[0], sources[3]} <= {1, 4}


def test_every_one_of_the_best_is_drawn() -> None:
    drawn = {exploit([0.0, 1.0, 2.0, 3.0], 0.5, generator(seed))[0] for seed in range(20)}
    assert drawn == {2, 3}


@pytest.mark.parametrize(
    ("values", "sources"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 2, 3]),  # nobody is better
        ([1.0, 2.0], [1, 1]),
        ([1.0, None, 3.0, 2.0], [0, 2, 2, 3]),  # who has diverged is the worst
        ([None, None, 2.0, None], [2, 2, 2, 2]),  # and replaced, whatever the share
        ([None, 1.0, 2.0, 2.0], [2, 1, 2, 3]),  # the first of equals is the best
    ],
)
def test_who_is_replaced(values: list[float | None], sources: list[int]) -> None:
    assert exploit(values, 0.25, generator()) == sources


def test_numbers_are_multiplied_and_stay_in_their_range_and_on_their_grid() -> None:
    spec = PBTSpec(perturb=[1.25], resample=0.0)
    assert explore(POINT, SPACE, spec, generator()) == {
        "method.lr": pytest.approx(1.25e-4), "method.coef": 2.5, "method.count": 3, "method.kind": "b",
    }  # fmt: skip
    high = {"method.lr": 9e-4, "method.coef": 10.0, "method.count": 20, "method.kind": "c"}
    assert explore(high, SPACE, spec, generator()) == {**high, "method.lr": 1e-3}
    # 0.9 x 2 = 1.8 is nearest to 2 again, and so is 2.0 on a grid of 0.5: one step down
    down = explore(POINT, SPACE, PBTSpec(perturb=[0.9], resample=0.0), generator())
    assert (down["method.count"], down["method.coef"]) == (1, 1.5)
    assert isinstance(down["method.count"], int)


def test_factors_are_drawn_for_each_number() -> None:
    drawn = [explore(POINT, SPACE, PBTSpec(resample=0.0), generator(seed)) for seed in range(30)]
    pairs = {(round(p["method.lr"] * 1e6), p["method.count"]) for p in drawn}
    assert pairs == {(80, 1), (80, 3), (125, 1), (125, 3)}


def test_what_is_drawn_anew_is_of_the_whole_range() -> None:
    drawn = [explore(POINT, SPACE, PBTSpec(resample=1.0), generator(seed)) for seed in range(400)]
    for params in drawn:
        SPACE.check(params)
    assert {p["method.kind"] for p in drawn} == {"a", "b", "c"}
    assert {p["method.count"] for p in drawn} == set(range(1, 21))
    assert {p["method.coef"] for p in drawn} == {0.5 * i for i in range(21)}
    assert np.mean([p["method.lr"] < 1e-4 for p in drawn]) == pytest.approx(0.5, abs=0.1)  # uniform in the logarithm
    kept = [explore(POINT, SPACE, PBTSpec(resample=0.3), generator(seed))["method.kind"] == "b" for seed in range(400)]
    assert np.mean(kept) == pytest.approx(1 - 0.3 * 2 / 3, abs=0.08)


@pytest.mark.parametrize(
    ("pbt", "study", "sentence"),
    [
        ({"quantile": 0.6}, {}, r"study\.pbt\.quantile .* at most 0\.5, not 0\.6"),
        ({"every_evaluations": 0}, {}, r"every_evaluations must be a whole number of at least 1"),
        ({"resample": 1.5}, {}, r"resample is a probability"),
        ({"perturb": [0.8, -1.0]}, {}, r"perturb must list factors greater than 0"),
        ({"quantle": 0.2}, {}, r"Unknown setting study\.pbt\.quantle; did you mean 'quantile'"),
        ({}, {"num_trials": 1}, r"needs a population; set study\.num_trials"),
        ({}, {"seeds_per_trial": 2}, r"one seed, not 2; set num_seeds to 1"),
        ({}, {"space": {}, "trials": [{"method.lr": 1e-4}, {"method.lr": 1e-3}], "num_trials": 2}, "to study.space"),
        ({}, {"space": {"k": {"type": "int", "low": 1, "high": 2}, "method.lr": {**LR, "when": {"k": [1]}}}}, "`when`"),
        ({}, {"pruner": {"name": "median", "startup_trials": 9}}, r"leave out study\.pruner"),
    ],
)
def test_what_can_be_no_population_is_refused(pbt: dict[str, Any], study: dict[str, Any], sentence: str) -> None:
    base = {"name": "s", "space": {"method.lr": LR}, "num_trials": 4}
    with pytest.raises(StudyError, match=sentence):
        StudySpec.from_config({**base, **study, "pbt": pbt}).validate()


def test_a_population_is_kept_in_the_studys_file(tmp_path: Any) -> None:
    spec = StudySpec("s", {"method.lr": LR}, num_trials=4, pruner=PrunerSpec("none"), pbt=PBTSpec(quantile=0.5))
    spec.save(tmp_path / "study.yaml")
    assert StudySpec.load(tmp_path / "study.yaml") == spec


def test_a_trial_is_repeated_with_its_schedule() -> None:
    def record(**attrs: Any) -> TrialRecord:
        now = datetime.now(UTC)
        return TrialRecord(0, "complete", 1.0, {"a": 1, "b": 2}, {"a": 1}, attrs, {}, now, now)

    steps = [{"updates": 0, "a": 3}, {"updates": 50, "a": 4}]
    assert replayed_params(record()) == {"a": 1}
    assert replayed_params(record(**{SCHEDULE: steps})) == {"a": 3, "schedule": [{"updates": 50, "a": 4}]}
    assert replayed_params(record(**{SCHEDULE: steps[:1]})) == {"a": 3}


def test_the_figure_shows_the_ancestry_of_the_best() -> None:
    one = [{"updates": 0, "run": "t0", "settings": POINT}]
    two = [*one, {"updates": 50, "run": "t1", "settings": {**POINT, "method.lr": 2e-4}}]
    figure = schedule_figure({"t0": one, "t1": two}, "t1", SPACE, 100)
    [other, best] = figure.axes[0].get_lines()
    assert best.get_label() == "best run's ancestry"
    assert np.asarray(best.get_data()).T.tolist() == [[0, 1e-4], [50, 2e-4], [100, 2e-4]]
    assert np.asarray(other.get_data()).T.tolist() == [[0, 1e-4], [100, 1e-4]]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["a", "b", "c"]
