"""The tracker against a real SQLite store: everything arrives, once, whatever dies or goes away meanwhile."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tracking
from orchestrator.spool import RunInfo, RunSpool
from orchestrator.tracking import (
    Tracker,
    TrackingError,
    check_reachable,
    default_tracking_uri,
    ui_command,
)


@pytest.fixture(scope="module", autouse=True)
def _mlflow_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("DO_NOT_TRACK", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="session")
def template_store(tmp_path_factory) -> Path:
    """An empty store, made (7 s) by two processes that find no file at the same time; tests copy it."""
    folder = tmp_path_factory.mktemp("work folder")
    code = "import sys; from orchestrator.tracking import ensure_store; ensure_store(sys.argv[1])"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"sqlite:///{folder}/new/mlflow.db"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [program.communicate(timeout=120)[1] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], outputs
    assert outputs == ["", ""]
    return folder / "new" / "mlflow.db"


class Study:
    """A work folder with a fresh store, its trackers, and a look into the database behind MLflow's back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.database}"

    def spool(self, run_key: str = "run") -> RunSpool:
        return RunSpool(self.folder / "spool", run_key)

    def tracker(self, wrap: Callable[[Any], Any] = lambda client: client, **options: Any) -> Tracker:
        return Tracker(
            self.uri,
            "study",
            self.folder / "spool",
            self.folder / "tracker.json",
            client_factory=lambda uri: wrap(tracking.mlflow_client(uri)),
            **options,
        )

    def client(self) -> Any:
        return tracking.mlflow_client(self.uri)

    def run(self, run_key: str = "run") -> Any:
        client = self.client()
        experiment = client.get_experiment_by_name("study")
        (run,) = client.search_runs([experiment.experiment_id], f"tags.`offsweep.run_key` = '{run_key}'")
        return run

    def rows(self) -> list[tuple]:
        with sqlite3.connect(self.database) as connection:
            return connection.execute("SELECT key, step, value FROM metrics ORDER BY key, step").fetchall()

    def num_runs(self) -> int:
        with sqlite3.connect(self.database) as connection:
            return connection.execute("SELECT count(*) FROM runs").fetchone()[0]


@pytest.fixture
def study(tmp_path, template_store) -> Study:
    shutil.copy(template_store, tmp_path / "mlflow.db")
    return Study(tmp_path)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is saved after it."""


class Wrapped:
    """A client whose calls go through `around(name, call)`."""

    def __init__(self, client: Any, around: Callable[[str, Callable[[], Any]], Any]) -> None:
        self._client = client
        self._around = around

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._around(name, lambda: method(*args, **kwargs))


def log_steps(spool: RunSpool, first: int, last: int, keys: tuple[str, ...] = ("loss",)) -> None:
    for step in range(first, last + 1):
        spool.metrics(step, dict.fromkeys(keys, step / 8))


# Arriving


def test_a_run_arrives_whole(study, tmp_path):
    (tmp_path / "config.yaml").write_text("method: ravl\n")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.txt").write_text("a")
    spool = study.spool("t3-s0")
    spool.start(RunInfo("ravl seed 0", {"method.eta": "0.5", "long": "x" * 7000}, {"offsweep.trial": "3"}))
    log_steps(spool, 1, 3)
    spool.metrics(3, {"score": 71.5, "diverged": float("nan")})
    spool.artifact(tmp_path / "config.yaml")
    spool.artifact(tmp_path / "plots", "figures")
    spool.set_tags({"offsweep.stage": "policy"})
    spool.end("FINISHED")

    tracker = study.tracker(experiment_tags={"offsweep.study": "study"})
    tracker.set_experiment_note("How to resume: offsweep study --resume")
    assert tracker.drain(30)

    run = study.run("t3-s0")
    assert run.info.run_name == "ravl seed 0"
    assert run.info.status == "FINISHED"
    assert run.data.params["method.eta"] == "0.5"
    assert run.data.params["long"] == "x" * 6000
    assert run.data.tags["offsweep.trial"] == "3"
    assert run.data.tags["offsweep.stage"] == "policy"
    assert "mlflow.parentRunId" not in run.data.tags
    history = study.client().get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert run.data.metrics["score"] == 71.5
    assert run.data.metrics["diverged"] != run.data.metrics["diverged"]

    experiment = study.client().get_experiment(run.info.experiment_id)
    assert experiment.tags["offsweep.study"] == "study"
    assert "offsweep study --resume" in experiment.tags["mlflow.note.content"]
    stored = tmp_path / "mlartifacts" / "study" / run.info.run_id / "artifacts"
    assert run.info.artifact_uri == stored.as_uri()
    assert (stored / "config.yaml").read_text() == "method: ravl\n"
    assert (stored / "figures" / "plots" / "a.txt").read_text() == "a"

    status = tracker.status()
    assert (status.pending_lines, status.sent_metrics, status.last_error) == (0, 5, None)


def test_dataset_is_found_by_search(study):
    from mlflow.data import get_source

    digest = "0123456789abcdef" * 4
    spool = study.spool()
    spool.start(
        RunInfo(
            "run",
            datasets=[
                {
                    "name": "hopper-medium-v2",
                    "digest": digest,
                    "source": "/data/hopper_medium-v2.hdf5",
                    "schema": {"observations": {"dtype": "float32", "shape": [-1, 11]}},
                    "profile": {"rows": 999906},
                }
            ],
        )
    )
    spool.start(RunInfo("run", datasets=[{"name": "hopper-medium-v2", "digest": digest}]))
    assert study.tracker().drain(30)

    client = study.client()
    experiment = client.get_experiment_by_name("study")
    (run,) = client.search_runs([experiment.experiment_id], "datasets.name = 'hopper-medium-v2'")
    (used,) = run.inputs.dataset_inputs
    assert digest.startswith(used.dataset.digest)
    assert digest in used.dataset.profile
    assert "observations" in used.dataset.schema
    assert get_source(used).uri == "/data/hopper_medium-v2.hdf5"
    assert used.tags[0].value == "training"


def test_values_travel_in_batches_of_a_thousand(study):
    sizes = []

    def around(name: str, call: Callable[[], Any]) -> Any:
        if name == "log_batch":
            sizes.append(time.monotonic())
        return call()

    spool = study.spool()
    log_steps(spool, 1, 500, ("a", "b", "c", "d"))
    spool.metrics(501, {f"wide/{i}": 0.0 for i in range(1100)})
    tracker = study.tracker(lambda client: Wrapped(client, around))
    assert tracker.drain(30)
    assert len(study.rows()) == 3100
    assert len(sizes) == 4


def test_idle_polls_open_no_file(study, monkeypatch):
    for index in range(30):
        study.spool(f"run-{index}").set_tags({"a": "b"})
    tracker = study.tracker()
    assert tracker.drain(30)
    with study.spool("run-0").path.open("ab") as file:
        file.write(b'{"type":"metrics","ti')  # torn: read once, and then not before it grows
    tracker.poll()

    def refuse(*_: Any) -> Any:
        raise AssertionError("a file was read")

    monkeypatch.setattr(tracking, "read_records", refuse)
    tracker.poll()
    assert tracker.status().last_error is None


# Once


@pytest.mark.parametrize("state", ["old", "lost"])
def test_a_tracker_killed_anywhere_adds_no_duplicates(study, tmp_path, state):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    calls = 0

    def dies_behind_call(number: int) -> Callable[[str, Callable[[], Any]], Any]:
        def around(name: str, call: Callable[[], Any]) -> Any:
            nonlocal calls
            result = call()
            calls += 1
            if calls == number:
                raise Killed
            return result

        return around

    spool = study.spool()
    if state == "old":
        log_steps(spool, -3, 0)
        assert study.tracker().drain(30)
    spool.start(RunInfo("run", {"lr": "0.1"}, {"offsweep.seed": "0"}, [{"name": "d", "digest": "a"}]))
    log_steps(spool, 1, 5)
    spool.set_tags({"a": "b"})
    log_steps(spool, 6, 8)
    spool.artifact(tmp_path / "config.yaml")
    spool.end()
    deaths = 0
    while True:
        calls = 0
        around = dies_behind_call(deaths + 1)
        tracker = study.tracker(lambda client, around=around: Wrapped(client, around))
        try:
            assert tracker.drain(30)
            break
        except Killed:
            deaths += 1
            log_steps(spool, 8 + deaths, 8 + deaths)  # the next batch has other bounds than the one sent
    assert deaths >= 8  # run, parameters, dataset, metrics, tags, metrics, artifact, end
    assert study.num_runs() == 1
    assert [step for _, step, _ in study.rows()] == list(range(-3 if state == "old" else 1, 9 + deaths))


def test_a_restarted_tracker_sends_only_what_is_new(study):
    spool = study.spool()
    log_steps(spool, 1, 5)
    assert study.tracker().drain(30)
    log_steps(spool, 6, 7)
    restarted = study.tracker()
    assert restarted.drain(30)
    assert restarted.status().sent_metrics == 2
    assert len(study.rows()) == 7


def test_a_run_resumed_from_an_older_checkpoint_adds_no_duplicates(study):
    info = RunInfo("run", {"lr": "0.1"})
    tracker = study.tracker()
    spool = study.spool()
    spool.start(info)
    log_steps(spool, 1, 6)
    assert tracker.drain(30)
    log_steps(spool, 7, 8)  # not sent yet when the run dies
    spool.close()

    resumed = study.spool()
    time.sleep(0.002)  # another time stamp, so that MLflow by itself would keep both
    resumed.start(info)
    log_steps(resumed, 4, 10)
    resumed.end()
    assert tracker.drain(30)
    assert study.rows() == [("loss", step, step / 8) for step in range(1, 11)]
    assert tracker.status().repeated_metrics == 5
    assert study.num_runs() == 1


def test_a_run_goes_on_after_its_end(study):
    tracker = study.tracker()
    with study.spool() as spool:
        spool.start(RunInfo("run"))
        spool.end("FAILED")
        assert tracker.drain(30)
        assert study.run().info.status == "FAILED"
        spool.start(RunInfo("run"))
        assert tracker.drain(30)
    assert study.run().info.status == "RUNNING"


def test_torn_line_is_skipped_and_the_rest_arrives(study):
    tracker = study.tracker()
    spool = study.spool()
    log_steps(spool, 1, 2)
    spool.close()
    with spool.path.open("ab") as file:
        file.write(b'{"type":"metrics","time":17')
    assert tracker.drain(30)
    assert len(study.rows()) == 2
    log_steps(study.spool(), 3, 4)
    assert tracker.drain(30)
    assert [step for _, step, _ in study.rows()] == [1, 2, 3, 4]
    assert tracker.status().damaged_lines == 1


def test_changed_parameters_do_not_block(study):
    tracker = study.tracker()
    spool = study.spool()
    spool.start(RunInfo("run", {"lr": "0.1", "batch": "256"}))
    assert tracker.drain(30)
    spool.start(RunInfo("run", {"lr": "0.2", "batch": "256", "extra": "1"}))
    log_steps(spool, 1, 2)
    assert tracker.drain(30)
    assert study.run().data.params == {"lr": "0.1", "batch": "256", "extra": "1"}
    assert len(study.rows()) == 2
    assert "lr stays '0.1'" in tracker.status().notes["run"][0]


def test_missing_artifact_is_noted_and_the_rest_arrives(study, tmp_path):
    spool = study.spool()
    spool.artifact(tmp_path / "gone.pt")
    log_steps(spool, 1, 2)
    tracker = study.tracker()
    assert tracker.drain(30)
    assert len(study.rows()) == 2
    assert "gone.pt" in tracker.status().notes["run"][0]


# Outages


def test_nothing_is_lost_in_an_outage(study):
    from mlflow.exceptions import MlflowException

    down = threading.Event()
    attempts = 0

    def around(_: str, call: Callable[[], Any]) -> Any:
        nonlocal attempts
        attempts += 1
        if down.is_set():
            raise MlflowException("API request failed: connection refused")
        return call()

    tracker = study.tracker(lambda client: Wrapped(client, around))
    spools = [study.spool(f"run-{index}") for index in range(3)]
    for spool in spools:
        spool.start(RunInfo("run"))
        log_steps(spool, 1, 3)
    assert tracker.drain(30)

    down.set()
    for spool in spools:
        log_steps(spool, 4, 9)
    attempts = 0
    for _ in range(50):
        assert tracker.poll() == 0
    assert attempts == 2  # two runs failed, then the store is left alone
    status = tracker.status()
    assert status.pending_lines == 18
    assert status.next_attempt_s > 0
    assert status.last_error is not None
    assert "connection refused" in status.last_error
    assert not tracker.drain(0.1)

    down.clear()
    assert tracker.drain(30)
    assert len(study.rows()) == 27
    assert tracker.status().last_error is None


def test_back_off_grows_and_ends(study, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])

    def fail(_: str) -> Any:
        raise ConnectionError("refused")

    study.spool().metrics(1, {"loss": 1.0})
    tracker = Tracker(study.uri, "study", study.folder / "spool", study.folder / "t.json", client_factory=fail)
    waits = []
    for _ in range(9):
        tracker.poll()
        waits.append(tracker.status().next_attempt_s)
        now[0] += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    tracker._client_factory = tracking.mlflow_client
    assert tracker.poll() == 1
    assert tracker.status().next_attempt_s == 0


def test_unreachable_server_blocks_neither_poll_nor_training(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    tracker = Tracker(uri, "study", tmp_path / "spool", tmp_path / "tracker.json")
    stop = threading.Event()
    thread = threading.Thread(target=tracker.run_loop, args=(stop, 0.01))
    thread.start()
    spool = RunSpool(tmp_path / "spool", "run")
    log_steps(spool, 1, 1000)
    deadline = time.monotonic() + 20
    while tracker.status().last_error is None and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert tracker.status().pending_lines == 1000
    assert "127.0.0.1" in (tracker.status().last_error or "")


def test_status_and_logging_do_not_wait_for_a_server_that_hangs(study):
    answers = threading.Event()
    asked = threading.Event()

    def around(_: str, call: Callable[[], Any]) -> Any:
        asked.set()
        assert answers.wait(20)
        return call()

    tracker = study.tracker(lambda client: Wrapped(client, around))
    spool = study.spool()
    log_steps(spool, 1, 2)
    thread = threading.Thread(target=tracker.poll)
    thread.start()
    try:
        assert asked.wait(20)
        log_steps(spool, 3, 4)
        tracker.set_experiment_note("note")
        assert tracker.status().pending_lines == 4
        assert thread.is_alive()
    finally:
        answers.set()
        thread.join(20)
    assert tracker.drain(30)
    assert len(study.rows()) == 4


def test_one_refused_run_does_not_block_the_others(study):
    tracker = study.tracker()
    for key in ("a", "b"):
        study.spool(key).metrics(1, {"loss": 1.0})
    assert tracker.drain(30)
    study.client().delete_run(study.run("a").info.run_id)
    for key in ("a", "b"):
        study.spool(key).metrics(2, {"loss": 1.0})
    assert not tracker.drain(30)
    assert [step for _, step, _ in study.rows()] == [1, 1, 2]
    assert list(tracker.status().refused) == ["a"]
    assert tracker.status().pending_lines == 1


def test_an_emptied_store_is_filled_again(study, template_store):
    spool = study.spool()
    spool.start(RunInfo("run", {"lr": "0.1"}))
    log_steps(spool, 1, 4)
    assert study.tracker().drain(30)
    study.database = study.folder / "other.db"
    shutil.copy(template_store, study.database)
    other = f"sqlite:///{study.database}"
    tracker = study.tracker()
    tracker._client_factory = lambda _: tracking.mlflow_client(other)
    log_steps(spool, 5, 6)
    assert tracker.drain(30)
    assert [step for _, step, _ in study.rows()] == [1, 2, 3, 4, 5, 6]


def test_run_loop_delivers_while_the_run_goes_on(study):
    tracker = study.tracker()
    stop = threading.Event()
    thread = threading.Thread(target=tracker.run_loop, args=(stop, 0.02))
    thread.start()
    try:
        spool = study.spool()
        log_steps(spool, 1, 20)
        deadline = time.monotonic() + 20
        while tracker.status().pending_lines and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(study.rows()) == 20
    finally:
        stop.set()
        thread.join(20)


# Stores


def test_new_store_is_complete_and_keeps_artifacts_beside_it(template_store):
    (default,) = tracking.mlflow_client(f"sqlite:///{template_store}").search_experiments()
    assert default.artifact_location == f"{(template_store.parent / 'mlartifacts').as_uri()}/0"
    assert not list(template_store.parent.glob(".*.tmp*"))
    assert template_store.stat().st_mode & 0o444 == 0o444


def test_default_store_is_in_the_work_folder_unless_the_user_names_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri("work") == f"sqlite:///{tmp_path}/work/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_tracking_uri("work") == "http://tracking:5000"


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "sqlite:///:memory:", "ftp://host/x"])
def test_stores_mlflow_does_not_have_are_refused(tmp_path, uri):
    with pytest.raises(TrackingError, match=r"sqlite:////absolute/path/mlflow\.db"):
        Tracker(uri, "study", tmp_path, tmp_path / "state.json")


def test_reachability_is_said_in_one_sentence(study, tmp_path):
    check_reachable(study.uri)
    check_reachable(f"sqlite:///{tmp_path}/not/yet/mlflow.db")
    assert not (tmp_path / "not").exists()

    (tmp_path / "notes.db").write_text("dear diary, " * 100)
    with pytest.raises(TrackingError, match="not an SQLite database"):
        check_reachable(f"sqlite:///{tmp_path}/notes.db")
    with pytest.raises(TrackingError, match="cannot be written to"):
        check_reachable("sqlite:////proc/mlflow.db" if os.geteuid() else f"sqlite:///{tmp_path}/notes.db/mlflow.db")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(TrackingError, match="No MLflow server answers"):
        check_reachable(f"http://user:secret@127.0.0.1:{port}")


def test_what_a_killed_process_has_written_half_way_is_rolled_back(tmp_path):
    path, left = tmp_path / "mlflow.db", tmp_path / "left"
    left.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (name TEXT)")
        connection.execute("INSERT INTO runs VALUES ('kept')")
    connection.execute("PRAGMA cache_size = 1")  # the transaction spills into the file
    connection.executemany("INSERT INTO runs VALUES (?)", [("lost" * 500,)] * 2000)
    for file in (path, tmp_path / "mlflow.db-journal"):  # as they lie after a kill
        shutil.copy(file, left)
    connection.rollback()
    connection.close()
    check_reachable(f"sqlite:///{left / 'mlflow.db'}")
    with sqlite3.connect(left / "mlflow.db") as mended:
        assert mended.execute("SELECT name FROM runs").fetchall() == [("kept",)]


def test_a_web_server_that_is_not_mlflow_is_told_apart():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(TrackingError, match="not as an MLflow server"):
            check_reachable(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_deleted_experiment_is_explained(study):
    tracker = study.tracker()
    study.client().delete_experiment(tracker.connect())
    with pytest.raises(TrackingError, match="restore it"):
        study.tracker().connect()


def test_ui_serves_the_store(study, tmp_path):
    command = ui_command(study.uri, port=5050)
    assert command[command.index("--backend-store-uri") + 1] == study.uri
    assert command[command.index("--default-artifact-root") + 1] == (tmp_path / "mlartifacts").as_uri()
    assert command[command.index("--workers") + 1] == "1"
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in command
    with pytest.raises(TrackingError, match="browser"):
        ui_command("http://tracking:5000")
