"""Pruners by name: which trials they stop, when, and what they are warned of."""

import pytest

from sweeps.errors import StudyError
from sweeps.pruners import warnings_of
from sweeps.spec import PrunerSpec, SamplerSpec, StudySpec
from sweeps.study import Study

SPACE = {"eta": {"type": "float", "low": 0.0, "high": 1.0}}


def course(tmp_path, pruner, curves, num_trials=None):
    """Number of reports that each trial makes before it is stopped, of three at most at steps 100, 200 and 300."""
    spec = StudySpec("s", SPACE, pruner=pruner, num_trials=num_trials or len(curves), total_steps=300)
    reports = []
    with Study.create(tmp_path / pruner.name, spec) as study:
        for curve in curves:
            number = study.ask().number
            for i, value in enumerate(curve):
                study.report(number, 100 * (i + 1), value)
                if study.should_prune(number):
                    study.tell_pruned(number)
                    reports.append(i + 1)
                    break
            else:
                study.tell(number, curve[-1])
                reports.append(len(curve))
    return reports


UP, LOW, LATER = (5.0, 6.0, 7.0), (1.0, 2.0, 3.0), (4.0, 9.0, 9.0)


def test_each_pruner_stops_what_its_rule_says(tmp_path):
    curves = [UP, UP, LATER, LOW]
    assert course(tmp_path, PrunerSpec("median", startup_trials=3), curves) == [3, 3, 3, 1]
    assert course(tmp_path, PrunerSpec("percentile", startup_trials=3, percentile=75.0), curves) == [3, 3, 3, 1]
    # the best half so far: the third trial is the best of none
    harsh = [UP, UP, (4.9, 6.0, 7.0), UP]
    assert course(tmp_path, PrunerSpec("asha", reduction_factor=3), harsh) == [3, 3, 1, 3]
    assert course(tmp_path, PrunerSpec("none"), curves) == [3, 3, 3, 3]


@pytest.mark.parametrize("name", ["median", "percentile", "asha", "hyperband"])
def test_nothing_is_stopped_before_the_warm_up(tmp_path, name):
    pruner = PrunerSpec(name, warmup_fraction=0.5, startup_trials=1)
    curves = [(float(10 - i), float(10 - i), 0.0) for i in range(8)]
    reports = course(tmp_path, pruner, curves)
    assert min(reports) == 2
    assert max(reports) == 3


def test_hyperband_lets_a_bracket_of_trials_go_on_that_halving_would_stop(tmp_path):
    falling = [(float(20 - i),) * 3 for i in range(20)]  # each trial is worse than all before it
    halved = course(tmp_path, PrunerSpec("asha"), falling)
    reports = course(tmp_path, PrunerSpec("hyperband"), falling)
    assert set(halved) == set(reports) == {1, 3}
    assert halved.count(3) == 1
    assert reports.count(3) > 3


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        (PrunerSpec("hyperbnad"), "did you mean 'hyperband'"),
        (PrunerSpec("wilcoxon"), r"set study\.racing\.first_seeds"),
        (PrunerSpec("asha", warmup_fraction=0.0), "first rung of asha"),
        (PrunerSpec("asha", reduction_factor=1), "at least 2"),
        (PrunerSpec("percentile", percentile=0.0), "between 0 and 100"),
    ],
)
def test_settings_that_make_no_sense_are_refused(pruner, words):
    with pytest.raises(StudyError, match=words):
        StudySpec("s", SPACE, pruner=pruner, num_trials=4).validate()


def test_what_a_user_is_warned_of():
    def of(pruner, sampler="tpe"):
        return warnings_of(StudySpec("s", SPACE, SamplerSpec(sampler), PrunerSpec(pruner), num_trials=4))

    assert of("median") == of("none", "gp") == []
    assert ["collapse" in sentence for sentence in of("asha")] == [True]
    assert ["learns nothing from pruned trials" in sentence for sentence in of("median", "gp")] == [True]
    assert len(of("hyperband", "gp")) == 2
