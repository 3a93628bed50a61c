import math
import os
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from envs.errors import UserError
from sweeps.errors import StudyError
from sweeps.spec import PrunerSpec, SamplerSpec, StudySpec
from sweeps.study import Study

ROOT = Path(__file__).parents[2]
SPACE = {
    "eta": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
    "critics": {"type": "int", "low": 2, "high": 10},
    "penalty": {"type": "categorical", "choices": [None, "std", 1, False]},
    "coef": {"type": "float", "low": 0.0, "high": 1.0, "when": {"penalty": "std"}},
}


def make_spec(**changes):
    fields = {"num_trials": 16, "sampler": SamplerSpec("tpe", 5), "total_steps": 9, **changes}
    return StudySpec("made-up", SPACE, **fields)


def value_of(params):
    """A made-up objective of all parameter types; the best is eta = 1, 6 critics, std, coef = 0.3."""
    value = -abs(math.log(params["eta"])) - abs(params["critics"] - 6) / 4
    return value - (abs(params["coef"] - 0.3) if params["penalty"] == "std" else 0.5)


def run_all(study):
    while (trial := study.ask()) is not None:
        study.tell(trial.number, value_of(trial.params))
    return [record.params for record in study.trials()]


# Asking


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "gp", "gp-mixed"])
def test_trials_follow_from_the_seed_and_the_results_also_across_resumes(tmp_path, sampler, capfd, recwarn):
    spec = make_spec(sampler=SamplerSpec(sampler, 5), num_trials=13)
    with Study.create(tmp_path / "whole", spec) as study:
        whole = run_all(study)
    assert len(whole) == 13
    assert len({tuple(params.values()) for params in whole}) == 13  # no point is drawn twice

    Study.create(tmp_path / "parts", spec).close()
    for _ in range(13):  # a driver per trial
        with Study.open(tmp_path / "parts") as study:
            trial = study.ask()
            study.tell(trial.number, value_of(trial.params))
    with Study.open(tmp_path / "parts") as study:
        assert study.ask() is None
        assert [record.params for record in study.trials()] == whole

    with Study.create(tmp_path / "other", make_spec(sampler=SamplerSpec(sampler, 6), num_trials=2)) as study:
        assert run_all(study) != whole[:2]
    # The optimiser reports to the driver, not to the terminal.
    assert capfd.readouterr() == ("", "")
    assert recwarn.list == []


def test_tpe_is_optunas_though_it_is_told_the_space(tmp_path):
    import optuna

    plain = optuna.create_study(direction="maximize")
    with Study.create(tmp_path, make_spec()) as study:
        for number in range(16):
            ours = study.ask()
            seed = int(np.random.SeedSequence([5, number]).generate_state(1)[0])
            plain.sampler = optuna.samplers.TPESampler(seed=seed)
            theirs = plain.ask(study.space.distributions())
            assert ours.params == theirs.params
            study.tell(number, value_of(ours.params))
            plain.tell(theirs, value_of(ours.params))


def test_the_sampler_learns_from_what_it_is_told(tmp_path):
    """The same sampler and seed, told the objective or its opposite, part ways after the random start."""
    for name, sign in (("good", 1.0), ("bad", -1.0)):
        with Study.create(tmp_path / name, make_spec(num_trials=40)) as study:
            while (trial := study.ask()) is not None:
                study.tell(trial.number, sign * value_of(trial.params))
    late = {}
    for name in ("good", "bad"):
        with Study.open(tmp_path / name, read_only=True) as study:
            late[name] = sum(value_of(record.params) for record in study.trials()[20:]) / 20
    assert late["good"] > late["bad"] + 0.5


def test_only_parameters_that_apply_are_active_but_all_are_drawn(tmp_path):
    with Study.create(tmp_path, make_spec()) as study:
        run_all(study)
        records = study.trials()
    assert all(record.params.keys() == SPACE.keys() for record in records)
    with_coef = ["coef" in record.active for record in records]
    assert with_coef == [record.params["penalty"] == "std" for record in records]
    assert any(with_coef)
    assert not all(with_coef)
    for record in records:
        assert record.params["penalty"] in (None, "std", 1, False)
        assert isinstance(record.params["critics"], int)


def test_enqueued_trials_come_first_and_are_completed_by_the_sampler(tmp_path):
    known = {"eta": 1.0, "critics": 6, "penalty": None}
    Study.create(tmp_path, make_spec(num_trials=3)).close()
    for _ in range(2):  # the second driver repeats what it cannot know was done
        with Study.open(tmp_path) as study:
            study.enqueue(known)
            study.enqueue({"eta": 2.0})
    with Study.open(tmp_path) as study:
        assert [record.state for record in study.trials()] == ["waiting", "waiting"]
        first, second, third = study.ask(), study.ask(), study.ask()
        assert study.ask() is None
    assert {key: first.params[key] for key in known} == known
    assert 0 <= first.params["coef"] <= 1
    assert second.params["eta"] == 2.0
    assert third.params["eta"] not in (1.0, 2.0)


def test_a_point_outside_the_space_is_not_enqueued(tmp_path):
    with Study.create(tmp_path, make_spec()) as study:
        with pytest.raises(UserError, match=r"critics = 11 is outside"):
            study.enqueue({"critics": 11})
        assert study.trials() == []


def test_a_study_of_nothing_is_one_trial(tmp_path):
    with Study.create(tmp_path, StudySpec("single")) as study:
        trial = study.ask()
        assert (trial.number, trial.params) == (0, {})
        assert study.ask() is None
        study.tell(0, 1.0)
        assert study.best.number == 0


def test_the_budget_can_be_raised_for_good(tmp_path):
    with Study.create(tmp_path, make_spec(num_trials=1)) as study:
        run_all(study)
        study.extend(2)
    with Study.open(tmp_path) as study:
        assert study.ask().number == 1
        assert study.ask() is None


# Telling


def test_records_hold_what_was_told(tmp_path):
    began = datetime.now(UTC)
    with Study.create(tmp_path, make_spec()) as study:
        for _ in range(5):
            study.ask()
        study.report(0, 3, 0.5)
        study.report(0, 1, 0.25)
        study.report(0, 3, 99.0)  # repeated after a resume: what was first reported stands
        study.set_attr(0, "seeds", [1, 2])
        study.tell(0, 0.75)
        study.report(1, 2, -1.0)
        study.tell_pruned(1)
        study.tell_diverged(2, -100.0)
        study.tell_failed(3, "out of memory")
        study.set_study_attr("confirmed", {"0": 0.7})
    with Study.open(tmp_path) as study:
        records = study.trials()
        assert [record.state for record in records] == ["complete", "pruned", "complete", "failed", "running"]
        assert [record.value for record in records] == [0.75, -1.0, -100.0, None, None]
        assert records[0].intermediate == {1: 0.25, 3: 0.5}
        assert list(records[0].intermediate) == [1, 3]
        assert [record.diverged for record in records] == [False, False, True, False, False]
        assert records[0].attrs == study.attrs(0) == {"seeds": [1, 2]}
        assert records[3].attrs == {"failure": "out of memory"}
        assert study.study_attrs == {"confirmed": {"0": 0.7}}
        assert study.num_finished == 4
        assert began <= records[0].started <= records[0].finished <= datetime.now(UTC)
        assert records[4].finished is None


@pytest.mark.parametrize(("direction", "best"), [("maximize", 2), ("minimize", 1)])
def test_the_best_trial_is_complete_and_did_not_diverge(tmp_path, direction, best):
    with Study.create(tmp_path, make_spec(direction=direction)) as study:
        for _ in range(5):
            study.ask()
        assert study.best is None
        extreme = 1000.0 if direction == "maximize" else -1000.0
        study.tell_diverged(0, extreme)
        assert study.best.number == 0  # nothing better is known
        study.tell(1, 1.0)
        study.tell(2, 2.0)
        study.report(3, 9, extreme)
        study.tell_pruned(3)
        study.tell(4, 2.0 if direction == "maximize" else 1.0)
        assert study.best.number == best


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda study: study.tell(0, 1.0), "Trial 0 is complete"),
        (lambda study: study.report(0, 4, 1.0), "Trial 0 is complete"),
        (lambda study: study.should_prune(0), "Trial 0 is complete"),
        (lambda study: study.tell(7, 1.0), "no trial 7"),
        (lambda study: study.tell(1, math.nan), "diverged"),
        (lambda study: study.tell_diverged(1, -math.inf), "finite"),
        (lambda study: study.report(1, 4, math.nan), "diverged"),
        (lambda study: study.report(1, -4, 1.0), "step"),
        (lambda study: study.set_attr(1, "path", Path()), "'path' must be JSON-able"),
    ],
)
def test_a_senseless_change_is_refused_and_changes_nothing(tmp_path, change, words):
    with Study.create(tmp_path, make_spec()) as study:
        study.ask()
        study.ask()
        study.tell(0, 1.0)
        before = study.trials()
        with pytest.raises(UserError, match=words):
            change(study)
        assert study.trials() == before
    with Study.open(tmp_path) as study:
        assert study.trials() == before


# Pruning


def test_the_median_pruner_waits_for_its_warm_up_and_its_first_trials(tmp_path):
    """9 steps, warm-up of a third: no earlier than step 3; and not before 4 trials are complete."""
    with Study.create(tmp_path, make_spec(pruner=PrunerSpec("median"))) as study:
        for trial in (study.ask() for _ in range(4)):
            for step in range(1, 10):
                study.report(trial.number, step, float(trial.number))  # medians: 1.5
        early = study.ask().number
        study.report(early, 5, -1.0)
        for number in range(4):
            assert not study.should_prune(early)
            study.tell(number, float(number))
        assert study.should_prune(early)

        bad, good = study.ask().number, study.ask().number
        verdicts = []
        for step in range(1, 5):
            study.report(bad, step, 1.0)
            study.report(good, step, 2.0)
            verdicts.append((study.should_prune(bad), study.should_prune(good)))
        assert verdicts == [(False, False), (False, False), (True, False), (True, False)]
        study.tell_pruned(bad)
        assert study.trials()[bad].state == "pruned"


def test_no_pruner_prunes_nothing(tmp_path):
    with Study.create(tmp_path, make_spec(pruner=PrunerSpec("none"))) as study:
        for _ in range(6):
            number = study.ask().number
            study.report(number, 9, -float(number))
            assert not study.should_prune(number)
            study.tell(number, -float(number))


# Folders, drivers and kills


def test_a_study_is_created_once_and_opened_where_it_is(tmp_path):
    with pytest.raises(UserError, match="no study"):
        Study.open(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    Study.create(tmp_path / "s", make_spec()).close()
    with pytest.raises(UserError, match="--resume"):
        Study.create(tmp_path / "s", make_spec())
    with Study.open(tmp_path / "s") as study:
        assert study.spec == make_spec()


def test_a_refused_study_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="num_trials"):
        Study.create(tmp_path / "s", make_spec(num_trials=0))
    assert not (tmp_path / "s").exists()


def test_a_second_driver_is_refused_and_a_reader_is_not(tmp_path):
    with Study.create(tmp_path, make_spec()) as study:
        with pytest.raises(UserError, match=f"already has a driver.*process {os.getpid()}"):
            Study.open(tmp_path)
        script = "import sys; from sweeps.study import Study; Study.open(sys.argv[1])"
        other = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert "already has a driver" in other.stderr

        reader = Study.open(tmp_path, read_only=True)
        number = study.ask().number
        assert [record.number for record in reader.trials()] == [number]
        study.tell(number, 1.0)
        assert reader.best.value == 1.0
        with pytest.raises(UserError, match="reading only"):
            reader.ask()
        with pytest.raises(UserError, match="reading only"):
            reader.report(number, 1, 1.0)
    with pytest.raises(UserError, match="closed"):
        study.ask()
    Study.open(tmp_path).close()


DRIVER = """
    import sys
    from sweeps.study import Study
    from tests.sweeps.test_study import value_of

    with Study.open(sys.argv[1]) as study:
        while (trial := study.ask()) is not None:
            study.set_attr(trial.number, "checkpoint", f"{trial.number}.pt")
            for step in range(1, 4):
                study.report(trial.number, step, value_of(trial.params) * step / 3)
            print(trial.number, flush=True)
            ahead = study.ask() if trial.number % 3 == 0 else None  # some run beside each other
            study.tell(trial.number, value_of(trial.params))
            if ahead is not None:
                print(ahead.number, flush=True)
                study.report(ahead.number, 1, 0.0)
                study.tell(ahead.number, value_of(ahead.params))
"""


def test_a_killed_driver_loses_and_repeats_nothing(tmp_path):
    folder = tmp_path / "s"
    Study.create(folder, make_spec(num_trials=3000)).close()
    announced = []
    for kill_after in (3, 7, 5):  # three drivers, each killed at some moment after so many trials
        driver = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DRIVER), str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert driver.stdout is not None
        for _ in range(kill_after):
            announced.append(int(driver.stdout.readline()))
        driver.send_signal(signal.SIGKILL)
        announced += [int(line) for line in driver.stdout.read().split()]
        driver.stdout.close()
        driver.wait()

        with Study.open(folder, read_only=True) as study:
            before = study.trials()
        with Study.open(folder) as study:
            assert study.trials() == before
            running = [record for record in before if record.state == "running"]
            tickets = study.unfinished()
            assert [ticket.number for ticket in tickets] == [record.number for record in running]
            for ticket, record in zip(tickets, running, strict=True):
                assert (ticket.params, ticket.active) == (record.params, record.active)
                assert ticket.attrs == record.attrs
                assert ticket.params.keys() == SPACE.keys()
                for step in range(1, 4):  # from its checkpoint on
                    study.report(ticket.number, step, value_of(ticket.params) * step / 3)
                study.tell(ticket.number, value_of(ticket.params))
            assert study.unfinished() == []

    assert len(announced) == len(set(announced)) >= 15
    with Study.open(folder) as study:
        records = study.trials()
        assert [record.number for record in records] == list(range(len(records)))
        assert set(announced) <= {record.number for record in records}
        assert all(record.state == "complete" for record in records)
        assert all(record.value == value_of(record.params) for record in records)
        assert study.ask().number == len(records)


def test_a_journal_cut_at_any_byte_goes_on_as_if_nothing_had_happened(tmp_path):
    """Whatever a kill or a full disk has left of it, the continued study asks for the same trials."""
    spec = make_spec(num_trials=13)  # past the random start
    with Study.create(tmp_path / "whole", spec) as study:
        study.enqueue({"eta": 3.0})
        whole = run_all(study)
    journal = (tmp_path / "whole" / "journal.log").read_bytes()
    lines = journal.splitlines(keepends=True)

    ends = [sum(map(len, lines[: count + 1])) for count in range(len(lines))]
    cuts = [end - back for end in ends[1:4] + ends[-14:] for back in (0, 1, 15)]
    for cut in cuts:
        folder = tmp_path / str(cut)
        folder.mkdir()
        spec.save(folder / "study.yaml")
        (folder / "journal.log").write_bytes(journal[:cut])
        with Study.open(folder) as study:
            study.enqueue({"eta": 3.0})
            for ticket in study.unfinished():
                study.tell(ticket.number, value_of(ticket.params))
            assert run_all(study) == whole
        with Study.open(folder) as study:  # nothing new is glued to a stump
            assert [record.params for record in study.trials()] == whole
            assert {record.state for record in study.trials()} == {"complete"}


def test_a_failed_write_leaves_the_study_as_it_was(tmp_path, monkeypatch):
    with Study.create(tmp_path, make_spec()) as study:
        run = study.ask()
        before = (tmp_path / "journal.log").read_bytes()
        write = os.write

        def full(descriptor, data):
            if len(data) > 40:
                return write(descriptor, bytes(data[:40]))
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(UserError, match="No space left"):
                study.ask()
            with pytest.raises(UserError, match="No space left"):
                study.tell_diverged(run.number, -1.0)
        assert (tmp_path / "journal.log").read_bytes() == before
        assert [record.state for record in study.trials()] == ["running"]
        assert study.attrs(run.number) == {}
        study.tell(run.number, 1.0)
        assert study.ask().number == 1
    with Study.open(tmp_path) as study:
        assert [record.state for record in study.trials()] == ["complete", "running"]


def test_a_changed_space_or_a_damaged_journal_is_refused(tmp_path):
    with Study.create(tmp_path, make_spec()) as study:
        run_all(study)
    spec = make_spec()
    spec.space = {key: SPACE[key] for key in ("eta", "critics")}
    spec.save(tmp_path / "study.yaml")
    with pytest.raises(UserError, match=r"study\.yaml is not the one"):
        Study.open(tmp_path)

    make_spec().save(tmp_path / "study.yaml")
    journal = (tmp_path / "journal.log").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.log").write_bytes(b"".join([*journal[:5], b"?\n", *journal[6:]]))
    with pytest.raises(UserError, match="damaged"):
        Study.open(tmp_path)
    Path(tmp_path / "driver.lock").unlink()  # a refused driver holds no lock


def test_the_journal_is_optunas(tmp_path):
    """Other tools, such as dashboards, read the file with Optuna's own backend."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    with Study.create(tmp_path, make_spec(num_trials=5)) as study:
        params = run_all(study)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    trials = optuna.load_study(study_name="made-up", storage=storage).trials
    assert [trial.params for trial in trials] == params


# Listed trials


LISTED = [{"critics": 2}, {"critics": 10, "eta": 1.0}, {}]


def listed(**changes):
    return StudySpec("listed", num_trials=3, trials=LISTED, total_steps=9, **changes)


def test_listed_trials_come_in_their_order_also_across_a_resume_and_are_never_pruned(tmp_path):
    with Study.create(tmp_path, listed(pruner=PrunerSpec("median", 0.0, 0))) as study:
        first, second = study.ask(), study.ask()
        assert (first.number, first.active, second.active) == (0, LISTED[0], LISTED[1])
        for step in range(5):
            study.report(0, step, 10.0)
        study.tell(0, 10.0)
    with Study.open(tmp_path) as study:
        assert [(t.number, t.active) for t in study.unfinished()] == [(1, LISTED[1])]
        for step in range(5):
            study.report(1, step, -10.0)
        assert not study.should_prune(1)
        study.tell(1, -10.0)
        third = study.ask()
        assert (third.number, third.active) == (2, {})
        study.tell(2, 0.0)
        assert study.ask() is None
        assert [record.params for record in study.trials()] == LISTED
        assert study.best.number == 0
        with pytest.raises(UserError, match="listed"):
            study.enqueue({"critics": 3})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"trials": LISTED, "num_trials": 2}, "lists 3"),
        ({"trials": LISTED, "num_trials": 3, "space": SPACE}, "leave out study.space"),
        ({"trials": [{"a": 1}, {"a": 1}], "num_trials": 2}, "trials 0 and 1 are the same"),
        ({"trials": ["eta"], "num_trials": 1}, "trial 0 is 'eta'"),
    ],
)
def test_what_cannot_be_a_list_of_trials(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        StudySpec("listed", **fields).validate()


def tell_nan(study, number):
    with study.together():
        study.set_attr(number, "a", 1)
        study.tell(number, math.nan)


def test_what_is_done_together_is_one_write(tmp_path):
    with Study.create(tmp_path, make_spec()) as study:
        first, second = study.ask(), study.ask()
        lines = (tmp_path / "journal.log").read_text().count("\n")
        with study.together():
            study.set_attr(first.number, "a", 1)
            study.tell(first.number, 1.0)
            assert (tmp_path / "journal.log").read_text().count("\n") == lines
        assert study.trial(0).state == "complete"
        with pytest.raises(StudyError, match="finite"):
            tell_nan(study, second.number)
        assert study.attrs(1) == {}
        assert (study.trial(1).state, study.num_finished) == ("running", 1)
    with Study.open(tmp_path, read_only=True) as study:
        assert (study.trial(0).value, study.attrs(0)["a"], study.num_finished) == (1.0, 1, 1)


def test_what_has_ended_since(tmp_path):
    with Study.create(tmp_path, make_spec()) as study:
        for _ in range(4):
            study.ask()
        for number in (2, 0):
            study.tell(number, float(number))
        assert [record.number for record in study.ended_beside({2})] == [0]
    with Study.open(tmp_path) as study:
        study.tell(3, 1.0)
        assert [record.number for record in study.ended_beside({0, 2})] == [3]
        assert [record.number for record in study.ended_beside(())] == [0, 2, 3]
        assert study.ended_beside({0, 2, 3}) == []
        looking = Study.open(tmp_path, read_only=True)
        assert [record.number for record in looking.ended_beside({0})] == [2, 3]
