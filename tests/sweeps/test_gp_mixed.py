import math
import sys

import numpy as np
import pytest
import torch
from linear_operator.utils.errors import NotPSDError

from envs.errors import UserError
from sweeps.gp_mixed import Encoding, observations
from sweeps.gp_model import MixedKernel, propose
from sweeps.space import SearchSpace
from sweeps.spec import SamplerSpec, StudySpec
from sweeps.study import Study

SPACE = {
    "kind": {"type": "categorical", "choices": ["a", "b", None]},
    "length": {"type": "int", "low": 1, "high": 50, "log": True},
    "rate": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True},
    "share": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.25},
}


def encoding(space):
    return Encoding(SearchSpace.from_config(space).distributions())


def test_points_become_rows_and_rows_the_nearest_points():
    points = [
        {"kind": "b", "length": 1, "rate": 1e-4, "share": 0.75},
        {"kind": None, "length": 50, "rate": 1e-3, "share": 0.0},
    ]
    code = encoding(SPACE)
    rows = code.rows(points)
    assert rows == pytest.approx(np.array([[1, 0, 0.5, 0.75], [2, 1, 1, 0]]))
    for row, point in zip(rows, points, strict=True):
        assert code.params(row) == pytest.approx(point)
    # halfway between 6 and 7 on the log scale lies below 6.5
    between = (math.log(6.6) / math.log(50), math.log(6.4) / math.log(50))
    assert [code.params(np.array([0, x, 0.5, 0.6]))["length"] for x in between] == [7, 6]
    assert code.params(np.array([0, 1, 0.5, 0.6]))["share"] == 0.5
    assert code.levels[1] == pytest.approx([math.log(n) / math.log(50) for n in range(1, 51)])
    assert code.levels[3] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert code.choices == {0: [0, 1, 2]}


def test_the_start_gives_choices_and_whole_numbers_even_shares():
    code = encoding({"kind": SPACE["kind"], "n": {"type": "int", "low": 1, "high": 4}})
    uniform = np.stack([np.linspace(0, 1, 1201)[:-1]] * 2, axis=1)
    rows = code.even_rows(uniform)
    assert np.unique(rows[:, 0], return_counts=True)[1].tolist() == [400, 400, 400]
    assert np.unique(rows[:, 1], return_counts=True)[1] == pytest.approx(300, abs=2)


def test_bad_values_do_not_set_the_scale():
    good = [1.0, 2.0, 3.0, 4.0, 5.0]
    values, _ = observations([*good, -1e9], [[]] * 6)
    # the median of all is 2.5 and the best 2.5 above it, so that the worst counts as -2.5
    told = np.array([*good, -2.5])
    assert values == pytest.approx((told - told.mean()) / told.std())
    constant, _ = observations([3.0] * 4, [[]] * 4)
    assert np.isfinite(constant).all()


def test_noise_is_the_spread_of_seeds_over_their_number():
    seeds = [[1.0, 3.0], [10.0, 12.0, 14.0], [7.0], [0.0, 4.0], [5.0, 5.0]]
    means = [float(np.mean(s)) for s in seeds]
    pooled = (2 + 8 + 0 + 8 + 0) / 5  # squares about each trial's mean over the degrees of freedom, 1 + 2 + 1 + 1
    _, variances = observations(means, seeds)
    raw = np.array(means)
    assert variances == pytest.approx(pooled / raw.var() / np.array([2, 3, 1, 2, 2]))
    assert observations(means[:3], seeds[:3])[1] is None  # 3 degrees of freedom tell too little


def test_the_kernel_is_the_documented_one():
    kernel = MixedKernel(3, {1}).double()
    kernel.lengthscale = torch.tensor([0.5, 2.0, 1.5])
    with torch.no_grad():
        kernel.raw_weights.copy_(torch.tensor([0.1, 0.2, 0.3]))
    w = torch.nn.functional.softplus(kernel.raw_weights).tolist()
    a, b = torch.tensor([[0.2, 1.0, 0.9]]).double(), torch.tensor([[0.6, 0.0, 0.3], [0.2, 1.0, 0.9]]).double()
    ordered = math.exp(-((0.4 / 0.5) ** 2 + (0.6 / 1.5) ** 2) / 2)
    categorical = math.exp(-1 / 2.0)
    expected = [w[0] * ordered + w[1] * categorical + w[2] * ordered * categorical, sum(w)]
    assert kernel(a, b).to_dense().tolist()[0] == pytest.approx(expected)
    assert kernel(a.expand(2, 3), b, diag=True).tolist() == pytest.approx(expected)


def quadratic(code, number, best=0.7):
    rng = np.random.default_rng(0)
    rows = code.even_rows(rng.random((number, len(code.bounds[0]))))
    values = -((rows[:, 0] - best) ** 2)
    return rows, (values - values.mean()) / values.std()


def test_the_choice_is_near_the_best_and_away_from_what_is_running():
    code = encoding({"x": {"type": "float", "low": 0.0, "high": 1.0}})
    rows, values = quadratic(code, 12)
    variances = np.full(12, 1e-2)
    first, fit = propose(code, rows, values, variances, np.empty((0, 1)), None, 0)
    assert first[0] == pytest.approx(0.7, abs=0.15)
    second, _ = propose(code, rows, values, variances, first[None], fit, 0)
    assert abs(second[0] - first[0]) > 0.01
    again, _ = propose(code, rows, values, variances, first[None], fit, 0)
    assert again == second


def test_nothing_is_tried_twice_where_something_is_left():
    code = encoding({"kind": SPACE["kind"], "n": {"type": "int", "low": 1, "high": 4}})
    every = np.array([[k, n / 3] for k in range(3) for n in range(4)])
    for left in (0, 7):
        tried = np.delete(every, left, axis=0)
        values = tried[:, 1] - tried[:, 1].mean()  # n = 4 is the best by far
        row, _ = propose(code, tried[:8], values[:8], None, tried[8:], None, left)
        assert row == pytest.approx(every[left])
    row, _ = propose(code, every, every[:, 1], None, np.empty((0, 2)), None, 0)  # the space is too small: again
    assert row.tolist() in every.tolist()


def test_without_botorch_a_study_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "botorch", None)
    with pytest.raises(UserError, match=r"needs BoTorch; run pip install 'offsweep\[bo\]'"):
        Study.create(tmp_path / "study", StudySpec("s", SPACE, SamplerSpec("gp-mixed"), num_trials=3))
    assert not (tmp_path / "study").exists()


def test_pruned_trials_are_known_and_a_failing_model_ends_nothing(tmp_path, monkeypatch):
    told = []

    def fails(code, rows, values, *rest):
        told.append((len(rows), int(values.argmin())))
        raise NotPSDError("no")

    monkeypatch.setattr("sweeps.gp_model.propose", fails)
    with Study.create(tmp_path, StudySpec("s", SPACE, SamplerSpec("gp-mixed", 1), num_trials=20)) as study:
        for i in range(11):
            trial = study.ask()
            if i == 4:
                study.report(i, 1, -5.0)
                study.tell_pruned(i)
            else:
                study.tell(trial.number, float(i))
        assert told == [(10, 4)]
        assert study._trial(10).system_attrs["gp-mixed:failure"] == "no"
        assert study.trials()[10].state == "complete"
        assert study.trials()[10].params not in [t.params for t in study.trials()[:10]]


def test_a_killed_drivers_choice_is_made_again_from_what_was_known(tmp_path):
    """The first driver tells how a trial ended while the sampler thinks, and dies before it asks."""

    def value(params):
        return -abs(math.log(params["rate"] / 1e-4)) + (params["kind"] == "b") - params["share"]

    def begun(name):
        study = Study.create(tmp_path / name, StudySpec("s", SPACE, SamplerSpec("gp-mixed", 1), num_trials=20))
        for _ in range(10):
            trial = study.ask()
            study.tell(trial.number, value(trial.params))
        return study, study.ask()

    study, running = begun("whole")
    with study:
        choose = study.propose()
        study.tell(running.number, 9.0)
        whole = study.ask(choose())
    study, running = begun("killed")
    with study:
        assert study.propose() is not None
        study.tell(running.number, 9.0)
    with Study.open(tmp_path / "killed") as study:
        assert study.ask() == whole
        # what chose it is kept with it, and the next choice knows what was told
        assert "gp-mixed:fit" in study._trial(11).system_attrs
        assert study.ask().number == 12
