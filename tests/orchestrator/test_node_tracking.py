"""A tracker on every machine: machines die and come back, and MLflow has every point once."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from orchestrator import launch, node_tracking
from orchestrator.artifacts import load_tensors
from orchestrator.config import ComputeConfig
from orchestrator.node_tracking import NodeTracker, NodeTrackers, Secrets, keep_unsent, place_of, unsent_lines
from orchestrator.spool import RunInfo, RunSpool, spool_folder
from orchestrator.tracking import STARTED_TAG, STATE_FILE, Tracker
from tests.orchestrator.studies import configured, copied, make_learner, make_pack, points, quiet, records


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(base, tmp_path_factory)


class Store:
    """An MLflow store, and machines that send to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"

    def spool(self, machine: str) -> RunSpool:
        return RunSpool(self.folder / machine, "t0000-s0")

    def tracker(self, machine: str) -> Tracker:
        return Tracker(self.uri, "study", self.folder / machine, self.folder / machine / STATE_FILE)

    def run(self) -> Any:
        client = self.tracker("nobody")
        experiment = client.connect()
        (run,) = client._client.search_runs([experiment])
        return run

    def steps(self) -> list[int]:
        client = self.tracker("nobody")
        client.connect()
        return sorted(m.step for m in client._client.get_metric_history(self.run().info.run_id, "loss"))


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Store:
    shutil.copy(base / "mlflow.db", tmp_path / "mlflow.db")
    return Store(tmp_path)


def log(spool: RunSpool, first: int, last: int) -> None:
    for step in range(first, last + 1):
        spool.metrics(step, {"loss": step / 8})


def start(spool: RunSpool) -> None:
    time.sleep(0.002)  # lives of a run do not begin in the same millisecond
    spool.start(RunInfo("run", {"lr": "0.1"}, {"seed": "0"}))


# A run that goes on on another machine


def test_a_run_goes_on_on_another_machine_and_the_first_is_gone_for_good(store: Store):
    first, tracker = store.spool("a"), store.tracker("a")
    start(first)
    log(first, 1, 4)
    assert tracker.drain(30)
    log(first, 5, 8)  # never sent from there
    unsent = unsent_lines({"t0000-s0": first})["t0000-s0"]  # what the checkpoint at step 8 holds
    assert unsent.count("\n") == 4
    log(first, 9, 10)

    second = store.spool("b")
    second.take_in(unsent)
    second.take_in(unsent)
    start(second)
    log(second, 9, 12)
    second.end()
    assert store.tracker("b").drain(30)
    assert store.steps() == list(range(1, 13))
    assert store.run().info.status == "FINISHED"


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_machine_sends_late_neither_doubles_points_nor_revives_the_run(
    store: Store, killed: bool, monkeypatch: pytest.MonkeyPatch
):
    first, tracker = store.spool("a"), store.tracker("a")
    start(first)
    log(first, 1, 4)
    assert tracker.drain(30)
    unsent = first.unsent(0)
    log(first, 5, 8)  # the machine is lost to sight here
    first.set_tags({"outcome": "pruned"})
    first.end("KILLED")
    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_batch", lambda *_, **__: 1 / 0)
        tracker.poll()
        assert "division" in (tracker.status().last_error or "")

    second = store.spool("b")
    second.take_in(unsent)
    start(second)
    log(second, 5, 12)
    second.set_tags({"outcome": "finished"})
    second.end()
    assert store.tracker("b").drain(30)

    late = store.tracker("a") if killed else tracker
    assert late.drain(30)
    assert store.steps() == list(range(1, 13))
    assert store.run().data.tags["outcome"] == "finished"
    assert store.run().info.status == "FINISHED"


def test_a_machine_that_a_run_comes_back_to(store: Store):
    first, tracker = store.spool("a"), store.tracker("a")
    start(first)
    log(first, 1, 6)
    assert tracker.drain(30)
    second = store.spool("b")
    second.take_in(first.unsent(0))
    start(second)
    log(second, 5, 10)
    assert store.tracker("b").drain(30)
    first.take_in(second.unsent(0))  # of a checkpoint at step 10
    start(first)
    log(first, 9, 14)
    first.end()
    assert tracker.drain(30)
    assert store.steps() == list(range(1, 15))


def test_the_state_of_a_tracker_holds_no_steps_of_runs_that_have_ended(store: Store):
    spool, tracker = store.spool("a"), store.tracker("a")
    start(spool)
    log(spool, 1, 3)
    spool.end()
    assert tracker.drain(30)
    assert '"steps":{}' in (store.folder / "a" / STATE_FILE).read_text()
    start(spool)  # and goes on all the same
    log(spool, 2, 5)
    assert tracker.drain(30)
    assert store.steps() == [1, 2, 3, 4, 5]


def test_a_run_is_closed_for_a_machine_only_where_nobody_has_ended_it(store: Store):
    (driver := store.spool("driver")).close_run("KILLED", {"outcome": "pruned"})
    assert store.tracker("driver").drain(30)  # of a run that was never heard of: nothing
    start(spool := store.spool("a"))
    assert store.tracker("a").drain(30)
    driver.close_run("KILLED", {"outcome": "pruned"})
    assert store.tracker("driver").drain(30)
    assert (store.run().info.status, store.run().data.tags["outcome"]) == ("KILLED", "pruned")
    start(spool)
    spool.set_tags({"outcome": "finished"})
    spool.end()
    assert store.tracker("a").drain(30)
    driver.close_run("KILLED", {"outcome": "pruned"})
    assert store.tracker("driver").drain(30)
    assert (store.run().info.status, store.run().data.tags["outcome"]) == ("FINISHED", "finished")
    assert int(store.run().data.tags[STARTED_TAG]) > 0


# Trackers of machines


def test_one_of_two_trackers_of_a_folder_waits_for_the_others_end(store: Store, tmp_path: Path):
    arguments = (store.uri, "study", str(tmp_path / "studies" / "s"), str(tmp_path / "disk"))
    one = NodeTracker(*arguments)
    spool = RunSpool(one.folder, "t0000-s0")
    start(spool)
    log(spool, 1, 3)
    deadline = time.monotonic() + 30
    while one.drain(30) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    two = NodeTracker(*arguments)
    assert two.folder == one.folder == spool_folder(tmp_path / "studies" / "s", str(tmp_path / "disk"))
    backlog = one.backlog()
    assert backlog is not None
    assert (backlog.runs, backlog.bytes, backlog.place) == (0, 0, place_of(one.folder))
    assert two.backlog() is None
    assert two.drain(1) is None
    one.stop()
    log(spool, 4, 5)
    while two.drain(30) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    two.stop()
    assert store.steps() == [1, 2, 3, 4, 5]


def test_lines_of_a_machine_that_is_gone_are_sent_by_the_driver(store: Store, tmp_path: Path):
    folder = tmp_path / "studies" / "s"
    tracker = Tracker(store.uri, "study", folder / "spool", folder / STATE_FILE)
    gone = store.spool("gone")
    start(gone)
    log(gone, 1, 3)
    gone.end()
    keep_unsent(folder, "gone:/disk", {"t0000-s0": gone.unsent(0), "t0000-s1": ""})
    with NodeTrackers(tracker, folder, str(tmp_path / "disk"), 30.0) as trackers:
        here = spool_folder(folder, str(tmp_path / "disk"))
        (other := RunSpool(here, "t0001-s0")).metrics(1, {"other": 1.0})
        other.close()
        keep_unsent(folder, place_of(here), {"t0001-s0": other.unsent(0)})
    assert trackers.left == []
    assert [path.name for path in (folder / "spool").iterdir()] == ["t0000-s0.jsonl"]
    assert not list((folder / "unsent").rglob("*.jsonl"))  # this machine has sent its own
    assert tracker.drain(30)
    runs = tracker._client.search_runs([tracker.connect()])
    assert {run.data.tags["offsweep.run_key"]: run.info.status for run in runs} == {
        "t0000-s0": "FINISHED", "t0001-s0": "RUNNING",
    }  # fmt: skip


def test_other_machines_cannot_send_to_a_file_of_this_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nodes = [{"NodeManagerHostname": name} for name in (socket.gethostname(), "another")]
    monkeypatch.setattr(node_tracking, "_nodes", lambda: nodes)
    tracker = Tracker(store.uri, "study", tmp_path / "spool", tmp_path / STATE_FILE)
    with pytest.raises(UserError, match=r"another cannot write to sqlite.*name an MLflow server"):
        NodeTrackers(tracker, tmp_path, "/disk", 1.0)


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "xyzzy")
    found = Secrets.of_this_process()
    assert "MLFLOW_TRACKING_PASSWORD" in repr(found)
    assert "xyzzy" not in repr(found)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "kept")
    found.set()
    assert node_tracking.os.environ["MLFLOW_TRACKING_PASSWORD"] == "xyzzy"


# Learners and studies


def test_a_checkpoint_carries_what_is_not_sent_to_another_machine(prepared: Path, tmp_path: Path):
    pack = make_pack(prepared, [({}, 0), ({}, 1)], name="moves")

    def compute(disk: str) -> ComputeConfig:
        return ComputeConfig(device="cpu", checkpoint_minutes=0.0, spool_folder=str(tmp_path / disk))

    assert not make_learner(pack, compute("a")).advance().finished
    assert set(load_tensors(pack.checkpoints().newest)["unsent"]) == {"t0000-s0", "t0001-s1"}
    learner = make_learner(pack, compute("b"))
    while not learner.advance().finished:
        pass
    alone = make_pack(prepared, [({}, 0), ({}, 1)], name="stays")
    learner = make_learner(alone, ComputeConfig(device="cpu", checkpoint_minutes=0.0))
    while not learner.advance().finished:
        pass
    moved = spool_folder(pack.study_folder, str(tmp_path / "b"))
    for key in ("t0000-s0", "t0001-s1"):
        (tmp_path / "b" / "spool").mkdir(exist_ok=True)
        shutil.copy(moved / f"{key}.jsonl", tmp_path / "b" / "spool")
        assert points(tmp_path / "b", key) == points(alone.study_folder, key)


def test_a_study_that_logs_on_a_disk_of_its_own(prepared: Path, tmp_path: Path):
    config = configured(prepared, f"compute.spool_folder={tmp_path}/disk", name="own-disk", num_trials=2)
    outcome = launch.start(config, quiet())
    folder = outcome.study.folder
    assert [path.name for path in (folder / "spool").glob("*.jsonl")] == ["study.jsonl"]
    tracker = Tracker(f"sqlite:///{prepared / 'mlflow.db'}", "own-disk", folder / "spool", folder / STATE_FILE)
    runs = {run.data.tags["offsweep.run_key"]: run for run in _runs(tracker)}
    assert set(runs) == {"study", *(f"t{trial:04d}-s{seed}" for trial in range(2) for seed in range(2))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert not list((folder / "unsent").rglob("*.jsonl"))
    log_text = (folder / "runs" / "t0001-s1" / "log.txt").read_text()
    assert "begins, of pack" in log_text
    assert "ends at update 200: finished" in log_text


def _runs(tracker: Tracker) -> list[Any]:
    experiment = tracker.connect()
    return list(tracker._client.search_runs([experiment]))


def test_a_failure_is_in_the_logs_of_its_runs(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    from orchestrator.learner import LearnerProcess
    from tests.orchestrator.studies import dataset_of

    pack = make_pack(prepared, [({}, 0)], name="fails")
    process = LearnerProcess(ComputeConfig(device="cpu"))
    monkeypatch.setattr("orchestrator.learner.Learner._train_epoch", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        process.advance(pack, [], dataset_of(configured(prepared)))
    text = (Path(pack.study_folder) / "runs" / "t0000-s0" / "log.txt").read_text()
    assert "ZeroDivisionError" in text
    assert records(pack.study_folder, "t0000-s0")[-1]["artifact_path"] == "logs"


@pytest.mark.slow
def test_a_machine_dies_while_its_tracker_has_something_to_send(
    prepared: Path, tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
):
    """Two raylets with a disk each; one is killed under way, its disk is gone, and another one comes."""
    import os
    import sqlite3
    import threading

    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from orchestrator.environment import prepare_environment, worker_environment
    from orchestrator.spool import read_records

    prepare_environment()
    # a node that is added in a thread cannot register its handler, which the tests do not need
    monkeypatch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

    def add(name: str) -> Any:
        return cluster.add_node(num_cpus=1, env_vars={"TEST_DISK": str(tmp_path / name)})

    nodes = [add("a"), add("b")]
    ray.init(
        cluster.address, log_to_driver=False,
        runtime_env={"env_vars": {**worker_environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
    )  # fmt: skip
    killed = threading.Event()

    def kill() -> None:
        while not list((tmp_path / "a").rglob("t*.jsonl")):
            time.sleep(0.05)
        time.sleep(1.0)
        cluster.remove_node(nodes[0], allow_graceful=False)
        shutil.rmtree(tmp_path / "a")
        add("c")
        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        outcome = launch.start(
            configured(
                prepared, "compute.spool_folder=$TEST_DISK/spool", "compute.num_learners=2", "compute.runs_per_pack=2",
                "method.num_updates=1000", name="machines", num_trials=4,
            ), quiet(),
        )  # fmt: skip
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed.is_set()
    keys = {f"t{trial:04d}-s{seed}" for trial in range(4) for seed in range(2)}
    with sqlite3.connect(prepared / "mlflow.db") as connection:
        rows = connection.execute(
            "SELECT t.value, r.status, m.key, m.step FROM runs r JOIN experiments e USING (experiment_id)"
            " JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'offsweep.run_key'"
            " JOIN metrics m ON m.run_uuid = r.run_uuid WHERE e.name = 'machines'"
        ).fetchall()
    assert len(rows) == len(set(rows))
    assert {key: status for key, status, _, _ in rows} == dict.fromkeys({*keys, "study"}, "FINISHED")
    updates = {
        key: {step for k, _, name, step in rows if k == key and name == "time/update_seconds"} for key in keys
    }  # fmt: skip
    assert set(map(frozenset, updates.values())) == {frozenset(range(50, 1001, 50))}
    left = {
        (path.stem, name, line["step"])
        for disk in ("b", "c") for path in (tmp_path / disk).rglob("t*.jsonl")
        for line, _ in read_records(path) if line and line["type"] == "metrics" for name in line["values"]
    }  # fmt: skip
    assert left <= {(key, name, step) for key, _, name, step in rows}
    assert outcome.study.num_finished == 4
