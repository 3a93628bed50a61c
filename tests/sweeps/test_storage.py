"""Several drivers on one study: what they share, and that a kill at any moment neither loses nor doubles a trial."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from benchmarks import storage_servers as storages
from sweeps import storage as storage_module
from sweeps._optuna import optuna
from sweeps.errors import StudyError
from sweeps.spec import PrunerSpec, SamplerSpec, StudySpec
from sweeps.storage import PASSWORD, Ledger, _Patient, new_trial, open_storage
from sweeps.study import Study, TrialTakenOver

SPACE = {"x": {"type": "float", "low": 0.0, "high": 1.0}, "k": {"type": "int", "low": 1, "high": 9}}
needs_postgres = pytest.mark.skipif(storages.postgres_programs() is None, reason="no PostgreSQL server is installed")


def make_spec(url, **changes):
    fields = {"num_trials": 8, "sampler": SamplerSpec("random", 1), "takeover_minutes": 60.0, **changes}
    return StudySpec("shared", fields.pop("space", SPACE), storage=url, pruner=PrunerSpec("none"), **fields)


@pytest.fixture(scope="module")
def postgres():
    pytest.importorskip("psycopg")
    with storages.postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "grpc", pytest.param("postgresql", marks=[needs_postgres, pytest.mark.slow])])
def url(request, tmp_path, monkeypatch):
    """Where a study can be shared: a fresh one for every test."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/studies.db"
    elif request.param == "grpc":
        pytest.importorskip("grpc")
        with storages.grpc_server(tmp_path) as address:
            yield address
    else:
        monkeypatch.setenv(PASSWORD, storages.PASSWORD)
        yield request.getfixturevalue("postgres").create(f"test{time.monotonic_ns()}")


@pytest.fixture
def sqlite(tmp_path):
    return f"sqlite:///{tmp_path}/studies.db"


# Where a study is kept


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("postgresql://me:secret@host/db", f"set the environment variable {PASSWORD}"),
        ("postgresql://me@host/db?password=secret", f"set the environment variable {PASSWORD}"),
        ("postgres://me@host/db", "did you mean 'postgresql'?"),
        ("studies.db", "begins with a scheme"),
        ("sqlite:///studies.db", "full path"),
        ("sqlite://", "full path"),
        ("grpc://host", "grpc://host:port"),
        ("grpc://me:secret@host:1", "grpc://host:port"),
        ("postgresql://me@host:secret/db", "not a database URL"),
    ],
)
def test_what_cannot_be_a_storage_is_refused_before_anything_is_made(tmp_path, text, says):
    with pytest.raises(StudyError, match=r"study\.storage") as caught:
        Study.create(tmp_path / "s", make_spec(text))
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_missing_package_and_a_silent_server_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="driver that is not installed"):
        open_storage("postgresql+nosuchdriver://me@host/db")
    monkeypatch.setattr(storage_module, "CONNECT_SECONDS", 1)
    sentence = r"needs grpcio" if find_spec("grpc") is None else r"Nobody answers at study.storage=grpc"
    with pytest.raises(StudyError, match=sentence):
        open_storage(f"grpc://127.0.0.1:{storages.free_port()}")
    pytest.importorskip("psycopg")
    monkeypatch.setenv(PASSWORD, "hidden")
    with pytest.raises(StudyError, match=r"^Cannot open study.storage=postgresql://me@127.0.0.1.*refused") as caught:
        Study.create(tmp_path / "s", make_spec(f"postgresql://me@127.0.0.1:{storages.free_port()}/db"))
    assert "hidden" not in str(caught.value)
    Study.create(tmp_path / "s", make_spec(f"sqlite:///{tmp_path}/s.db")).close()  # nothing stands in the way


@needs_postgres
@pytest.mark.slow
def test_a_wrong_password_is_one_sentence(postgres, monkeypatch):
    monkeypatch.setenv(PASSWORD, "wrong-one")
    with pytest.raises(StudyError, match="password authentication failed") as caught:
        open_storage(postgres.url("postgres"))
    assert "wrong-one" not in str(caught.value)


def test_calls_are_made_again_during_an_outage_and_for_so_long_only(monkeypatch):
    class Flaky:
        failures = 2

        def ping(self):
            self.failures -= 1
            if self.failures >= 0:
                import sqlalchemy.exc

                raise optuna.exceptions.StorageInternalError from sqlalchemy.exc.OperationalError(
                    "x", {}, OSError("gone")
                )
            return "pong"

        def wrong(self):
            raise KeyError("no such study")

    assert _Patient(Flaky(), "url").ping() == "pong"
    with pytest.raises(KeyError):
        _Patient(Flaky(), "url").wrong()
    monkeypatch.setattr(storage_module, "OUTAGE_SECONDS", 0.05)
    Flaky.failures = 100
    with pytest.raises(StudyError, match=r"has not answered .*gone.*offsweep resume"):
        _Patient(Flaky(), "url").ping()


def test_an_end_whose_answer_was_lost_is_not_taken_for_somebody_elses(sqlite):
    storage = open_storage(sqlite)
    study = optuna.create_study(storage=storage)
    number = study.ask().number
    real = storage.impatient

    class Lossy:
        lost = False

        def __getattr__(self, name):
            return getattr(real, name)

        def set_trial_state_values(self, *args, **kwargs):
            done = real.set_trial_state_values(*args, **kwargs)
            if not self.lost:
                import sqlalchemy.exc

                self.lost = True
                raise sqlalchemy.exc.OperationalError("x", {}, OSError("gone"))
            return done

    optuna.load_study(study_name=study.study_name, storage=_Patient(Lossy(), "url")).tell(number, 2.0)
    assert study.trials[0].value == 2.0


# Who asks for what

WORKER = """
import json, sys, time
from pathlib import Path
from sweeps.spec import StudySpec
from sweeps.study import Study
folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
spec = StudySpec.from_config(config)
study = Study.open(folder) if (folder / "study.yaml").exists() else Study.create(folder, spec)
log = (folder / "done.log").open("a")
with study:
    for k in (1, 2, 3):
        study.enqueue({"k": k})
    todo = study.unfinished()
    print("ready", flush=True)
    while True:
        ticket = todo.pop() if todo else study.ask()
        if ticket is None:
            if not study.others_running():
                break
            time.sleep(0.1)
            continue
        time.sleep(float(sys.argv[3]))
        study.report(ticket.number, 1, 0.5)
        study.tell(ticket.number, ticket.params["x"])
        log.write(f"{ticket.number}\\n"); log.flush()
"""


def start_worker(folder, spec, seconds=0.0):
    import json

    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WORKER, str(folder), json.dumps(spec.to_config()), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished_by(folder):
    path = folder / "done.log"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def look(folder):
    return Study.open(folder, read_only=True)


def test_drivers_that_ask_at_once_get_different_trials_and_no_more_than_there_are(tmp_path, url):
    spec = make_spec(url, num_trials=9)
    folders = [tmp_path / f"d{i}" for i in range(4)]
    workers = [start_worker(folder, spec) for folder in folders]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0, 0]
    done = [finished_by(folder) for folder in folders]
    study = look(folders[0])
    trials = study.trials()
    assert sorted(number for numbers in done for number in numbers) == [trial.number for trial in trials]
    assert len(trials) == 9
    assert {trial.state for trial in trials} == {"complete"}
    assert [t.params["k"] for t in trials if "point" in t.attrs] == [1, 2, 3]  # each once, whoever enqueued it
    assert len({trial.params["x"] for trial in trials}) == 9  # no two drivers draw the same numbers
    assert {trial.attrs["driver"] for trial in trials} <= {(f / "driver.id").read_text().strip() for f in folders}


def test_the_trials_of_a_killed_driver_are_done_by_another(tmp_path, url):
    spec = make_spec(url, num_trials=5, takeover_minutes=0.05)
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    first = start_worker(slow, spec, seconds=600)
    assert first.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not look(slow).trials() and time.monotonic() < deadline:
        time.sleep(0.1)
    first.kill()
    first.wait()
    assert start_worker(quick, spec).wait(120) == 0
    study = look(quick)
    assert [trial.number for trial in study.discarded()] == [0]
    trials = study.trials()
    assert len(trials) == 5
    assert {trial.state for trial in trials} == {"complete"}
    anew = next(trial for trial in trials if trial.attrs.get("resumed_from") == 0)
    assert anew.params == study.trial(0).params
    assert study.trial(0).attrs["resumed_as"] == anew.number
    with Study.open(slow) as back:  # comes back, and finds nothing of its own
        assert back.unfinished() == []
        assert back.ask() is None
        with pytest.raises(TrialTakenOver, match=f"trial {anew.number} took its place"):
            back.tell(0, 1.0)


@pytest.mark.slow
def test_drivers_killed_at_any_moment_neither_lose_nor_double_a_trial(tmp_path, url):
    spec = make_spec(url, num_trials=30, takeover_minutes=0.05)
    folders = [tmp_path / f"d{i}" for i in range(2)]
    for round_ in range(6):
        workers = [start_worker(folder, spec) for folder in folders]
        for worker in workers:
            worker.stdout.readline()
        time.sleep(0.05 + 0.11 * round_)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
    assert start_worker(folders[0], spec).wait(300) == 0
    trials = look(folders[0]).trials()
    assert len(trials) == 30
    assert {trial.state for trial in trials} == {"complete"}
    assert sorted(t.params["k"] for t in trials if "point" in t.attrs) == [1, 2, 3]
    done = [number for folder in folders for number in finished_by(folder)]
    assert len(set(done)) == len(done)
    assert set(done) <= {trial.number for trial in trials}


# What a kill can leave between two writes; two drivers in one process


def make_pair(tmp_path, spec):
    return Study.create(tmp_path / "a", spec), Study.create(tmp_path / "b", spec)


def declare_dead(study, *drivers):
    heartbeat = study._heartbeat
    heartbeat.is_dead = lambda driver: driver in drivers


def test_a_living_drivers_trials_are_left_alone_and_its_own_come_back(tmp_path, sqlite):
    a, b = make_pair(tmp_path, make_spec(sqlite, num_trials=2))
    with b:
        with a:
            mine = a.ask()
        assert b.unfinished() == []
        theirs = b.ask()
        assert theirs.number != mine.number
        assert b.ask() is None
        assert b.others_running()
        with Study.open(tmp_path / "a") as resumed:
            assert resumed.driver == a.driver
            (again,) = resumed.unfinished()
            assert (again.number, again.params, again.place) == (mine.number, mine.params, 0)
            resumed.tell(again.number, 1.0)
        assert not b.others_running()


def test_a_trial_killed_while_it_was_asked_for_does_not_count(tmp_path, sqlite):
    a, b = make_pair(tmp_path, make_spec(sqlite, num_trials=2))
    with b:
        new_trial(a._storage, a._study._study_id, {"driver": a.driver, "place": 0})  # and no parameters
        new_trial(a._storage, a._study._study_id, {"driver": b.driver, "place": 0})
        a.close()
        assert b.trials() == []
        assert [b.ask() is None for _ in range(2)] == [False, True]  # b's own is cleared away, a may still go on
        Study.open(tmp_path / "a").close()
        assert b.ask() is not None
        assert b.ask() is None
        assert len(b.trials()) == 2


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("taker", ["a", "b"])
def test_a_takeover_cut_short_is_completed_once(tmp_path, sqlite, taker, ended):
    """The taker has created the new trial and is killed; it comes back itself (a) or is taken for dead, too (b)."""
    spec = make_spec(sqlite, num_trials=2)
    with Study.create(tmp_path / "dead", spec) as dead:
        old = dead.ask()
    a, b = make_pair(tmp_path, spec)
    a._replace = lambda trial: False  # as if killed before it ends the old one
    declare_dead(a, dead.driver)
    a.ask()
    a.close()
    if ended:
        with Study.open(tmp_path / "dead") as back:
            back.tell(old.number, 3.0)
    taking = Study.open(tmp_path / "a") if taker == "a" else b
    declare_dead(taking, dead.driver, *([a.driver] if taker == "b" else []))
    tickets = [*taking.unfinished()]
    while (ticket := taking.ask()) is not None:
        tickets.append(ticket)
    counting = taking.trials()
    assert len(counting) == 2
    assert sum(trial.params == old.params for trial in counting) == 1
    assert sorted(t.number for t in tickets) == sorted(r.number for r in counting if r.state == "running")
    assert any(record.number == old.number for record in counting) is ended
    taking.close()
    b.close()


def test_two_that_take_over_the_same_trial_agree_on_one(tmp_path, sqlite):
    spec = make_spec(sqlite, num_trials=1)
    with Study.create(tmp_path / "dead", spec) as dead:
        old = dead.ask()
    a, b = make_pair(tmp_path, spec)
    with a, b:
        declare_dead(a, dead.driver)
        declare_dead(b, dead.driver)
        attrs = {"driver": b.driver, "place": 0, "resumed_from": old.number}
        real = a._replace

        def late(trial):  # b has created its own in the meantime, and ends the old one first
            number = new_trial(
                b._storage, b._study._study_id, attrs, params=trial.params, distributions=trial.distributions
            )
            b._asked.add(number)
            assert not b._replace(b._trial(number))
            return real(trial)

        a._replace = late
        taken = a.ask()
        assert taken.params == old.params
        assert b.ask() is None
        assert [record.number for record in a.trials()] == [taken.number]


def test_listed_trials_are_each_done_once(tmp_path, sqlite):
    listed = [{"method.n": n} for n in range(5)]
    spec = make_spec(sqlite, space={}, trials=listed, num_trials=5)
    a, b = make_pair(tmp_path, spec)
    with a, b:
        # both look before either has asked: b's comes second and gives way
        number = new_trial(a._storage, a._study._study_id, {"driver": a.driver, "place": 0, "point": 0})
        a._asked.add(number)
        taken = [a._ticket(a._trial(number))] + [study.ask() for study in (b, a, b, a)]
        assert [ticket.active for ticket in taken] == listed
        assert a.ask() is None
        assert b.ask() is None
        twice = new_trial(b._storage, b._study._study_id, {"driver": b.driver, "place": 9, "point": 2})
        b._asked.add(twice)
        assert not b._stands(b._trial(twice))
        b.close()
        declare_dead(a, b.driver)
        for ticket in taken[::2]:
            a.tell(ticket.number, 0.0)
        again = [a.ask(), a.ask()]
        assert sorted(ticket.active["method.n"] for ticket in again) == [1, 3]
        assert a.ask() is None
        assert sorted(record.active["method.n"] for record in a.trials()) == [0, 1, 2, 3, 4]


def test_a_driver_is_dead_when_it_gives_no_sign_for_long_enough(tmp_path, sqlite):
    spec = make_spec(sqlite, takeover_minutes=0.02)
    a, b = make_pair(tmp_path, spec)
    with b:
        with a:
            a.ask()
            time.sleep(2.5)
            assert not b._is_dead(a.driver)
        deadline = time.monotonic() + 20
        while not b._is_dead(a.driver) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert b._is_dead(a.driver)
        assert not b._is_dead(b.driver)


def test_a_copied_folder_is_found_out(tmp_path, sqlite):
    import shutil

    a = Study.create(tmp_path / "a", make_spec(sqlite))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with a, Study.open(tmp_path / "copy"):
        a._heartbeat.beat()
        with pytest.raises(StudyError, match="give every driver a work folder of its own"):
            a.ask()


# What drivers agree on


def test_a_driver_with_other_settings_is_refused_and_leaves_nothing(tmp_path, sqlite):
    spec = make_spec(sqlite)
    with Study.create(tmp_path / "a", spec, {"method.h": 5}) as study:
        with pytest.raises(StudyError, match=r"has method.h=5, not 6"):
            Study.create(tmp_path / "b", spec, {"method.h": 6})
        with pytest.raises(StudyError, match=r"has study.direction=maximize, not minimize"):
            Study.create(tmp_path / "b", make_spec(sqlite, direction="minimize"), {"method.h": 5})
        with pytest.raises(StudyError, match=r"has study.num_trials=8, not 9"):
            Study.create(tmp_path / "b", make_spec(sqlite, num_trials=9), {"method.h": 5})
        study.extend(9)
        with Study.create(tmp_path / "b", make_spec(sqlite, num_trials=9), {"method.h": 5}) as other:
            study.extend(2)
            assert [other.ask() is None for _ in range(3)] == [False, False, True]
            assert other.spec.num_trials == 2


def test_what_is_done_once_is_done_by_the_first_to_claim_it_while_it_lives(tmp_path, sqlite):
    a, b = make_pair(tmp_path, make_spec(sqlite))
    with b:
        with a:
            assert a.claim("report")
            assert not b.claim("report")
            assert b.claim("something else")
        with Study.open(tmp_path / "a") as resumed:
            assert resumed.claim("report")
        declare_dead(b, a.driver)
        assert b.claim("report")


def test_reading_changes_nothing_and_needs_the_study_to_be_there(tmp_path, sqlite):
    with Study.create(tmp_path / "a", make_spec(sqlite)) as study:
        number = study.ask().number
        reader = look(tmp_path / "a")
        assert [record.state for record in reader.trials()] == ["running"]
        with pytest.raises(StudyError, match="reading only"):
            reader.tell(number, 1.0)
        study.tell(number, 0.5)
        assert reader.best.value == 0.5
    (tmp_path / "studies.db").unlink()
    with pytest.raises(StudyError, match=r"There is no study shared in study.storage=sqlite"):
        look(tmp_path / "a")


def test_the_ledger_gives_everybody_the_same_first_entry(sqlite):
    storage = open_storage(sqlite)
    one, other = Ledger(storage, "s"), Ledger(open_storage(sqlite), "s")
    assert one.settle("budget", "a", 3) == ("a", 3)
    assert other.settle("budget", "b", 4) == ("a", 3)
    other.add("point", "b", {"k": 1})
    assert one.read("point") == [("b", {"k": 1})]


@needs_postgres
@pytest.mark.slow
def test_a_study_waits_for_a_server_that_is_restarted(tmp_path, postgres, monkeypatch):
    monkeypatch.setenv(PASSWORD, storages.PASSWORD)
    spec = make_spec(postgres.create("restarted"), num_trials=4)
    worker = start_worker(tmp_path / "w", spec, seconds=1.0)
    assert worker.stdout.readline() == "ready\n"
    time.sleep(1.5)
    postgres.stop()
    time.sleep(3)
    postgres.start()
    assert worker.wait(120) == 0
    assert finished_by(tmp_path / "w") == [0, 1, 2, 3]
    text = "".join(path.read_text() for path in (tmp_path / "w").iterdir())
    assert storages.PASSWORD not in text
