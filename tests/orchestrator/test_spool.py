"""The spool keeps what was logged, through kills and resumes, without loading MLflow."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.spool import DatasetRecord, RunInfo, RunSpool, SpoolError, count_lines, last_record, read_records


def records(path: Path, offset: int = 0) -> list[dict | None]:
    return [record for record, _ in read_records(path, offset)]


def test_everything_logged_is_read_back_in_order(tmp_path):
    info = RunInfo("ravl seed 0", {"method.eta": "0.5"}, {"offsweep.study": "s"}, [{"name": "d", "digest": "ab"}])
    spool = RunSpool(tmp_path / "spool", "trial-1-seed-0")
    spool.start(info)
    spool.metrics(1000, {"loss/critic": 0.25, "score": 3})
    spool.set_tags({"stage": "dynamics"})
    spool.artifact(tmp_path / "config.yaml", "settings")
    spool.end("FAILED")

    start, metrics, tags, artifact, end = records(tmp_path / "spool" / "trial-1-seed-0.jsonl")
    assert start["run_name"] == "ravl seed 0"
    assert start["params"] == {"method.eta": "0.5"}
    assert start["datasets"] == [{"name": "d", "digest": "ab"}]
    assert metrics["step"] == 1000
    assert metrics["values"] == {"loss/critic": 0.25, "score": 3.0}
    assert tags["tags"] == {"stage": "dynamics"}
    assert artifact["path"] == str(tmp_path / "config.yaml")
    assert end["status"] == "FAILED"
    assert 0 <= end["time"] - start["time"] < 60_000


def test_non_finite_values_survive_in_valid_json(tmp_path):
    spool = RunSpool(tmp_path, "run")
    spool.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads(spool.path.read_text(), parse_constant=refuse)["values"]
    assert math.isnan(float(values["a"]))
    assert [float(values["b"]), float(values["c"])] == [math.inf, -math.inf]


def test_a_line_is_on_disk_when_the_call_returns(tmp_path):
    spool = RunSpool(tmp_path, "run")
    for step in range(3):
        spool.metrics(step, {"loss": 1.0})
        assert count_lines(spool.path) == step + 1


def test_torn_last_line_waits_and_is_closed_by_the_next_writer(tmp_path):
    spool = RunSpool(tmp_path, "run")
    spool.metrics(1, {"loss": 1.0})
    spool.metrics(2, {"loss": 2.0})
    spool.close()
    spool.path.write_bytes(spool.path.read_bytes()[:-10])  # killed within a write

    assert [record["step"] for record in records(spool.path)] == [1]
    RunSpool(tmp_path, "run").metrics(2, {"loss": 2.0})
    first, torn, repeated = records(spool.path)
    assert (first["step"], torn, repeated["step"]) == (1, None, 2)


def test_reading_goes_on_from_an_offset(tmp_path):
    spool = RunSpool(tmp_path, "run")
    for step in range(5):
        spool.metrics(step, {"loss": 1.0})
    offsets = [end for _, end in read_records(spool.path)]
    assert [record["step"] for record in records(spool.path, offsets[2])] == [3, 4]
    assert count_lines(spool.path, offsets[2]) == 2


def test_a_spool_can_be_sent_to_another_process(tmp_path):
    spool = RunSpool(tmp_path, "run")
    spool.metrics(1, {"loss": 1.0})
    copy = pickle.loads(pickle.dumps(spool))
    copy.metrics(2, {"loss": 1.0})
    spool.metrics(3, {"loss": 1.0})
    assert [record["step"] for record in records(spool.path)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["", "loss@critic", "a//b", "/a", "../a", "a/", "x" * 251])
def test_names_that_mlflow_refuses_are_refused_at_once(tmp_path, name):
    with pytest.raises(SpoolError, match="cannot name a metric"):
        RunSpool(tmp_path, "run").metrics(1, {name: 1.0})


@pytest.mark.parametrize("key", ["", "../run", "a/b", ".hidden", "x" * 201])
def test_run_key_must_name_a_file(tmp_path, key):
    with pytest.raises(SpoolError, match="run key"):
        RunSpool(tmp_path, key)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [({"name": "d"}, "needs a digest"), ({"name": "d", "digest": "a", "hash": "b"}, "no field 'hash'")],
)
def test_dataset_records_are_checked(tmp_path, dataset: DatasetRecord, message: str):
    with pytest.raises(SpoolError, match=message):
        RunSpool(tmp_path, "run").start(RunInfo("run", datasets=[dataset]))


def test_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "spool").write_text("a file where the folder should be")
    with pytest.raises(SpoolError, match="Cannot write the spool file"):
        RunSpool(tmp_path / "spool", "run").metrics(1, {"loss": 1.0})


def test_training_side_imports_neither_mlflow_nor_ray():
    code = (
        "import sys, orchestrator.spool;"
        "sys.exit(' '.join({'mlflow', 'ray', 'torch', 'numpy', 'optuna'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("block", [8, 1 << 14])
def test_the_last_whole_record(tmp_path, block):
    with RunSpool(tmp_path, "r") as spool:
        for step in range(20):
            spool.metrics(step, {"a": 1.0})
    assert last_record(spool.path, block)["step"] == 19
    with spool.path.open("ab") as file:
        file.write(b'damaged\n{"type": "end", "torn')
    assert last_record(spool.path, block)["step"] == 19
    spool.path.write_bytes(b'{"type": "end"')
    assert last_record(spool.path, block) is None


def test_what_is_not_sent_is_known_of_a_file_that_was_removed(tmp_path: Path):
    with RunSpool(tmp_path, "r") as spool:
        spool.metrics(1, {"a": 1.0})
        first = spool.path.stat().st_size
        spool.metrics(2, {"a": 2.0})
        assert [json.loads(line)["step"] for line in spool.unsent(first).splitlines()] == [2]
        spool.path.unlink()  # with the disk that it lies on
        spool.metrics(3, {"a": 3.0})
        assert [json.loads(line)["step"] for line in spool.unsent(0).splitlines()] == [1, 2, 3]
    assert spool.unsent(0) == ""
