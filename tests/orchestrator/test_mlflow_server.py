"""A real MLflow server over a real PostgreSQL: artifacts through it, who is let in, trackers of two machines."""

from __future__ import annotations

import importlib.util
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.storage_servers import (
    MlflowServer,
    Postgres,
    mlflow_server,
    postgres_programs,
    postgres_server,
)
from orchestrator.cli import main
from orchestrator.spool import RunInfo, RunSpool
from orchestrator.tracking import STATE_FILE, Tracker, TrackingError, check_reachable, ui_command, ui_environment

HOSTS = "mlflow.example.org,127.0.0.1:*"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if postgres_programs() is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs PostgreSQL's programs and psycopg")
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> Iterator[MlflowServer]:
    with mlflow_server(postgres.create("mlflow"), ["--allowed-hosts", HOSTS]) as running:
        yield running


def log(folder: Path, first: int, last: int, artifact: Path | None = None) -> RunSpool:
    spool = RunSpool(folder, "t0000-s0")
    spool.start(RunInfo("run", {"lr": "0.1"}))
    for step in range(first, last + 1):
        spool.metrics(step, {"loss": step / 8})
    if artifact is not None:
        spool.artifact(artifact, "logs")
    return spool


def code_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_artifacts_go_through_the_server_and_points_of_two_machines_are_there_once(
    server: MlflowServer, postgres: Postgres, tmp_path: Path
):
    check_reachable(server.uri)
    (tmp_path / "log.txt").write_text("begins\n")

    def tracker(machine: str) -> Tracker:
        return Tracker(server.uri, "study", tmp_path / machine, tmp_path / machine / STATE_FILE)

    first = log(tmp_path / "a", 1, 6, tmp_path / "log.txt")
    sending = tracker("a")
    assert sending.drain(60)
    for step in (7, 8):
        first.metrics(step, {"loss": step / 8})
    unsent = first.unsent(0)
    postgres.set_read_only("mlflow", True)
    assert not sending.drain(1)
    assert sending.status().refused == {}  # an outage, not a fault of the run
    assert "read-only" in (sending.status().last_error or "")
    postgres.set_read_only("mlflow", False)

    RunSpool(tmp_path / "b", "t0000-s0").take_in(unsent)
    with log(tmp_path / "b", 7, 10) as second:
        second.end()
    assert tracker("b").drain(60)
    assert sending.drain(60)  # late
    (run,) = sending._client.search_runs([sending.connect()])
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert [file.path for file in sending._client.list_artifacts(run.info.run_id, "logs")] == ["logs/log.txt"]
    history: list[Any] = sending._client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 11))


@pytest.mark.slow
def test_only_known_names_and_the_same_site_are_let_in(server: MlflowServer):
    experiments = f"{server.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert code_of(experiments) == 200
    assert code_of(experiments, Host="mlflow.example.org") == 200
    assert code_of(experiments, Host="evil.example") == 403
    create = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/experiments/create", b'{"name": "x"}',
        {"Content-Type": "application/json", "Origin": "http://evil.example"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(create, timeout=20)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("flask_wtf") is None, reason="needs mlflow[auth]")
def test_a_server_with_passwords(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tmp_path / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/users.db\n"
        "admin_username = admin\nadmin_password = a-long-password\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    variables = {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-this-test"}
    with mlflow_server(postgres.create("guarded"), ["--app-name", "basic-auth"], variables) as server:
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            check_reachable(server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        check_reachable(server.uri)
        log(tmp_path / "a", 1, 3)
        tracker = Tracker(server.uri, "study", tmp_path / "a", tmp_path / "a" / STATE_FILE)
        assert tracker.drain(60)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        RunSpool(tmp_path / "a", "t0000-s0").metrics(4, {"loss": 1.0})
        late = Tracker(server.uri, "study", tmp_path / "a", tmp_path / "a" / STATE_FILE)
        assert not late.drain(1)
        assert late.status().refused == {}  # a login that fails concerns all runs: nothing is given up
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        assert late.drain(60)


# Without a server


@pytest.mark.parametrize(
    "uri",
    ["http://me:xyzzy@mlflow:5000", "postgresql://me:xyzzy@host/mlflow", "postgresql://me@host/mlflow?password=xyzzy"],
)
def test_a_password_in_the_configuration_is_refused(
    uri: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["train", "method=ravl", f"dataset={base}/datasets/tiny.hdf5", f"tracking_uri={uri}"]
    assert main([*words, "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds a password" in error
    assert "xyzzy" not in error
    assert not list(tmp_path.iterdir())


def test_a_password_in_the_environment_is_shown_nowhere(tmp_path: Path):
    uri = "http://me:xyz%20zy@127.0.0.1:9"
    tracker = Tracker(uri, "study", tmp_path / "spool", tmp_path / STATE_FILE)
    log(tmp_path / "spool", 1, 2)
    assert not tracker.drain(0.1)
    said = tracker.status().last_error or ""
    assert "xyz" not in said
    assert tracker.backlog().runs == 1
    with pytest.raises(TrackingError) as refused:
        check_reachable(uri)
    assert "xyz" not in str(refused.value)
    database = "postgresql://me:xyzzy@127.0.0.1:9/mlflow"
    with pytest.raises(TrackingError) as refused:
        check_reachable(database)
    assert "xyzzy" not in str(refused.value)
    assert "xyzzy" not in " ".join(ui_command(database))
    assert ui_environment(database)["MLFLOW_BACKEND_STORE_URI"] == database


def test_pages_with_passwords_need_what_asks_for_them(monkeypatch: pytest.MonkeyPatch):
    uri = "sqlite:////somewhere/mlflow.db"
    command = ui_command(uri, host="0.0.0.0", allowed_hosts="mlflow.example.org")
    assert command[command.index("--allowed-hosts") + 1] == "mlflow.example.org"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackingError, match="pip install 'mlflow"):
        ui_command(uri, auth=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "basic-auth" in ui_command(uri, auth=True)
    assert len(ui_environment(uri, auth=True)["MLFLOW_FLASK_SERVER_SECRET_KEY"]) == 32
