"""The confirm stage: what is chosen, and what is read back."""

import math

import pytest

from sweeps.confirm import (
    FINAL_VALUES,
    FOLDER,
    Candidate,
    Confirmation,
    ConfirmSpec,
    candidates,
    confirmations,
    load_candidates,
    save_candidates,
)
from sweeps.errors import StudyError
from sweeps.selection import best_trials
from sweeps.spec import StudySpec
from sweeps.study import Study

SPACE = {
    "eta": {"type": "float", "low": 0.0, "high": 10.0},
    "stage.seed": {"type": "int", "low": 0, "high": 9},
}


@pytest.fixture
def search(tmp_path):
    """Trials of values 1, 5, diverged, 5, pruned, 3; the settings of 1 and 5 differ in the stage's seed alone."""
    points = [(1.0, 0), (2.0, 0), (3.0, 0), (4.0, 0), (5.0, 0), (2.0, 7)]
    with Study.create(tmp_path / "s", StudySpec("s", SPACE, num_trials=6, total_steps=9)) as study:
        for point in points:
            study.enqueue(dict(zip(SPACE, point, strict=True)))
        for value in (1.0, 5.0, None, 5.0, "pruned", 3.0):
            number = study.ask().number
            if value is None:
                study.tell_diverged(number, 9.0)
            elif value == "pruned":
                study.report(number, 3, 100.0)
                study.tell_pruned(number)
            else:
                study.tell(number, value)
    return tmp_path / "s"


def test_the_best_complete_settings_are_chosen_none_of_them_twice(search):
    records = Study.open(search, read_only=True).trials()
    best, least = (best_trials(records, 9, direction) for direction in ("maximize", "minimize"))
    chosen = candidates(records, best, 9, ["stage.seed"])
    assert chosen == [
        Candidate(1, 5.0, {"eta": 2.0}), Candidate(3, 5.0, {"eta": 4.0}), Candidate(0, 1.0, {"eta": 1.0}),
    ]  # fmt: skip
    assert [one.number for one in candidates(records, best, 9)] == [1, 3, 5, 0]
    assert [one.number for one in candidates(records, least, 2)] == [0, 5]
    # what the search began with: trial 1 is the best, trial 4 was pruned, trial 5 is as trial 1 but for a seed
    begun_with = candidates(records, best, 1, ["stage.seed"], enqueued=(0, 1, 4, 5))
    assert [(one.number, one.searched) for one in begun_with] == [(1, 5.0), (0, 1.0), (4, 100.0)]


def test_confirmations_come_with_their_interval_best_first(search):
    assert confirmations(search) == []
    folder = search / FOLDER
    chosen = [Candidate(n, v, {"eta": e}) for n, v, e in ((1, 5.0, 2.0), (3, 5.0, 4.0), (5, 3.0, 3.0), (0, 1.0, 1.0))]
    save_candidates(folder, chosen)
    assert load_candidates(folder) == chosen
    assert confirmations(search) == []
    spec = StudySpec("s", trials=[one.params for one in chosen], num_trials=4, seeds_per_trial=3)
    with Study.create(folder, spec) as study:
        for values in ((1.0, 2.0, 3.0), (2.0, 4.0, 6.0), None):
            number = study.ask().number
            if values is None:
                study.tell_diverged(number, 7.0)
                continue
            study.set_attr(number, FINAL_VALUES, {f"c-s{i}": value for i, value in enumerate(values)})
            study.tell(number, sum(values) / 3)
        found = confirmations(search)  # while the last is running
        assert [(one.number, one.searched, one.mean, one.diverged) for one in found] == [
            (3, 5.0, 4.0, False), (1, 5.0, 2.0, False), (5, 3.0, 7.0, True),
        ]  # fmt: skip
    # 97.5 % point of Student's t with 2 degrees 4.302653, standard deviation 2, 3 runs
    half = 4.302653 * 2.0 / math.sqrt(3.0)
    assert found[0].interval == pytest.approx((4.0 - half, 4.0 + half), rel=1e-6)
    assert all(map(math.isnan, Confirmation(0, 1.0, (1.0,)).interval))


@pytest.mark.parametrize("spec", [ConfirmSpec(top=-1), ConfirmSpec(num_seeds=0), ConfirmSpec(top=True)])
def test_numbers_that_make_no_sense_are_refused(spec):
    with pytest.raises(StudyError, match=r"study\.confirm\..* must be a whole number"):
        spec.validate()
    with pytest.raises(StudyError, match=r"study\.confirm\.enqueued is given, but top is 0"):
        ConfirmSpec(top=0, enqueued=1).validate()
