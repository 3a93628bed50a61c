"""The benchmarks of samplers: what they count, and that they go on where they ended."""

import csv

import pytest

from benchmarks import sampler_regret
from benchmarks.made_up_objectives import MADE_UP, Objective, tabular
from benchmarks.sampler_regret import Case, read_curves, regrets
from envs.errors import UserError
from sweeps.preview import stand_in_trials
from sweeps.spec import SamplerSpec, StudySpec


@pytest.mark.parametrize("name", MADE_UP)
def test_the_best_value_is_the_largest(name):
    """Of 300 random points none is better, and another seed has another optimum."""
    values = []
    for seed in (0, 1):
        objective = MADE_UP[name](seed)
        space = {key: {k: v for k, v in entry.items() if k != "when"} for key, entry in objective.space.items()}
        points = stand_in_trials(StudySpec("s", space, SamplerSpec("random", 3), num_trials=300))
        values.append([objective.true(point) for point in points])
        assert max(values[-1]) <= objective.best + 1e-9
    assert values[0] != values[1]


def test_regret_is_of_the_trial_that_told_the_best_value():
    """Noise is added to what is told, and none to what counts."""
    space = {"x": {"type": "float", "low": 0.0, "high": 1.0}}
    told = []

    class Noted(Objective):
        def told(self, params, rng):
            told.append((super().told(params, rng), params["x"]))
            return told[-1][0]

    objective = Noted(space, lambda params: params["x"], lambda value: 5.0, 1.0)
    found = regrets(Case("made up", "random", 1, 0), objective, (4, 20))
    assert found == pytest.approx([1 - max(told[:4])[1], 1 - max(told[:20])[1]])
    assert len(told) == 20


@pytest.mark.parametrize("sampler", ["random", "optuna-tpe"])
def test_as_many_trials_run_as_there_are_workers(sampler):
    begun = []

    class Counted(Objective):
        def told(self, params, rng):
            begun.append(params["x"])
            return 0.0

    objective = Counted({"x": {"type": "float", "low": 0.0, "high": 1.0}}, lambda p: p["x"], lambda v: 0.0, 1.0)
    regrets(Case("made up", sampler, 8, 0), objective, (10,))
    assert len(begun) == 8 + 10 - 1  # one more whenever one has ended, but for the last


def test_a_stopped_benchmark_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampler_regret, "AT", (3, 5))
    monkeypatch.setattr(sampler_regret.regrets, "__defaults__", ((3, 5),))
    file = tmp_path / "curves.csv"
    words = ["--objectives", "mbrl", "--samplers", "random", "qmc", "--workers", "2", "--curves", str(file)]
    assert sampler_regret.main([*words, "--seeds", "1"]) == 0
    first = file.read_text()
    with file.open(newline="") as lines:
        assert tuple(next(csv.reader(lines))) == sampler_regret.COLUMNS
    assert len(read_curves(file)) == 4
    made = {"mbrl": lambda seed: MADE_UP["mbrl"](seed) if seed else pytest.fail("computed again")}
    monkeypatch.setattr(sampler_regret, "MADE_UP", made)
    assert sampler_regret.main([*words, "--seeds", "2"]) == 0
    assert file.read_text().startswith(first)
    assert len(read_curves(file)) == 8
    assert '"case": "mbrl/w2/qmc/@5"' in capsys.readouterr().out


def test_a_table_answers_with_its_nearest_trial(tmp_path):
    file = tmp_path / "trials.csv"
    file.write_text(
        "rank,trial,state,score,collapsing,hyperparameters\n"
        "1,0,complete,50.0,,penalty=std weight=0.01 h=1\n"
        "2,1,complete,20.0,,penalty=max weight=1 h=1\n"
        "3,2,complete,10.0,,penalty=std weight=100 h=5\n"
        ",3,pruned,99.0,,penalty=std weight=10 h=5\n"
    )
    objective = tabular(file)
    assert objective.best == 50.0
    assert objective.space["weight"] == {"type": "float", "low": 0.01, "high": 100.0, "log": True}
    assert objective.space["h"] == {"type": "int", "low": 1, "high": 5, "log": False}
    assert objective.true({"penalty": "std", "weight": 0.05, "h": 2}) == 50.0
    assert objective.true({"penalty": "max", "weight": 2.0, "h": 1}) == 20.0
    assert objective.true({"penalty": "std", "weight": 80.0, "h": 4}) == 10.0
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"not the trials\.csv"):
        tabular(file)
