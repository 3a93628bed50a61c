"""Checkpoints: what is damaged is noticed, what is old goes, and another machine goes on from the storage."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from envs.errors import UserError
from orchestrator.activity import Activity
from orchestrator.checkpoints import MANIFEST, Checkpoints, check_storage, storage_of
from orchestrator.cli import main
from orchestrator.config import ComputeConfig
from tests.orchestrator.studies import make_learner, make_pack, train
from tests.orchestrator.test_learner import advance_to_the_end, assert_same_end


def state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "weights": torch.full((3,), float(epoch))}


@pytest.fixture
def storage() -> str:
    return "memory://checkpoints/study/pack"


@pytest.fixture(autouse=True)
def empty_memory() -> None:
    fsspec.filesystem("memory").store.clear()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_last_two_are_kept_and_the_latest_is_loaded(tmp_path: Path, storage: str):
    kept = Checkpoints(tmp_path, storage)
    assert not kept.exist()
    assert kept.load() is None
    for epoch in (1, 2, 5):
        assert kept.save(epoch, state(epoch)) is None
    loaded = kept.load()
    assert loaded is not None
    assert (loaded["epoch"], loaded["weights"].tolist()) == (5, [5.0] * 3)
    files = {MANIFEST, "checkpoint-000002.pt", "checkpoint-000005.pt"}
    assert {path.name for path in tmp_path.iterdir()} == files
    memory = fsspec.filesystem("memory")
    assert {name.rpartition("/")[2] for name in memory.ls("/checkpoints/study/pack", detail=False)} == files
    assert kept.newest.name == "checkpoint-000005.pt"


@pytest.mark.parametrize("how", ["bits", "short", "gone"])
def test_the_one_before_a_damaged_one_is_used(tmp_path: Path, how: str):
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1))
    kept.save(2, state(2))
    if how == "bits":
        damage(kept.newest)
    elif how == "short":
        kept.newest.write_bytes(kept.newest.read_bytes()[:-10])
    else:
        kept.newest.unlink()
    with pytest.warns(UserWarning, match=r"checkpoint checkpoint-000002.pt in .* is not used") as said:
        loaded = kept.load()
    assert loaded is not None
    assert loaded["epoch"] == 1
    damage(tmp_path / "checkpoint-000001.pt")
    with pytest.warns(UserWarning, match="is not used"):
        assert kept.load() is None
    if how == "bits":
        assert "its content is not what was written" in str(said[0].message)


def test_a_damaged_manifest_is_none(tmp_path: Path):
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1))
    (tmp_path / MANIFEST).write_text("{")
    with pytest.warns(UserWarning, match="a manifest of checkpoints is damaged"):
        assert kept.load() is None


def test_the_storage_stands_in_for_a_damaged_or_older_file_of_the_folder(tmp_path: Path, storage: str):
    kept = Checkpoints(tmp_path / "a", storage)
    kept.save(1, state(1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # another machine, which had it before
    kept.save(2, state(2))
    for folder in ("b", "c"):
        loaded = Checkpoints(tmp_path / folder, storage).load()
        assert loaded is not None
        assert loaded["epoch"] == 2
    damage(kept.newest)
    with pytest.warns(UserWarning, match="is not used"):
        loaded = kept.load()
    assert loaded is not None
    assert loaded["epoch"] == 2


def test_going_back_forgets_what_was_after_it(tmp_path: Path, storage: str):
    """As after a damaged one: the epochs come again."""
    kept = Checkpoints(tmp_path, storage)
    for epoch in (1, 3, 2):
        kept.save(epoch, state(epoch))
    saved = json.loads((tmp_path / MANIFEST).read_text())["saved"]
    assert [one["epoch"] for one in saved] == [2, 1]
    loaded = kept.load()
    assert loaded is not None
    assert loaded["epoch"] == 2


def test_a_storage_that_fails_does_not_end_a_training(tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    kept = Checkpoints(tmp_path, storage)
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
        trouble = kept.save(1, state(1))
    assert trouble == f"the checkpoint of epoch 1 is not in {storage}: PermissionError: Access Denied"
    assert kept.save(2, state(2)) is None
    loaded = Checkpoints(tmp_path / "other", storage).load()
    assert loaded is not None
    assert loaded["epoch"] == 2


def test_studies_of_one_name_do_not_meet():
    one, other = (storage_of("s3://bucket/x/", f"/{where}/studies/mine", "p1") for where in "ab")
    assert one != other
    assert one is not None
    assert one.startswith("s3://bucket/x/mine-")
    assert one.endswith("/p1")
    assert storage_of(None, "/a/studies/mine", "p1") is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://x", "cannot be opened: Protocol not known: nowhere; name a folder"),
        ("s3://key:secret@bucket/x", "must not hold a password"),
        ("/proc/x", "cannot be written to: "),
    ],
)
def test_a_storage_is_refused_before_anything_is_trained(
    workdir: Path, url: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UserError, match=message):
        check_storage(url)
    words = ["method=bc", "dataset=embedded/pendulum-medium-v0", f"compute.checkpoints={url}", "study.name=refused"]
    assert main(["train", "--workdir", str(workdir), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "secret" not in error
    assert not (workdir / "studies" / "refused").exists()


def test_another_machine_goes_on_from_the_storage(workdir: Path, tmp_path: Path):
    """It has the study's stages but none of the pack's files, and ends as undisturbed."""
    runs: list[Any] = [({}, 0), ({}, 1)]
    undisturbed, moved = (make_pack(workdir, runs, name=name) for name in ("still", "moved"))
    compute = ComputeConfig(device="cpu", checkpoint_minutes=0, checkpoints=str(tmp_path / "storage"))
    train(undisturbed)
    make_learner(moved, compute).advance()
    shutil.rmtree(moved.folder)
    moved.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        second = make_learner(moved, compute)
        assert second.epoch > 0
        advance_to_the_end(second)
    assert_same_end(undisturbed, moved)


def test_a_learner_says_that_the_storage_fails(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.checkpoints.Checkpoints._upload", lambda *_: 1 / 0)
    pack = make_pack(workdir, [({}, 0)], name="fails")
    compute = ComputeConfig(device="cpu", checkpoint_minutes=0, checkpoints="memory://x")
    report = make_learner(pack, compute).advance()
    assert "is not in memory://x/fails-" in report.trouble
    assert "ZeroDivisionError" in (Path(pack.study_folder) / "runs" / "t0000-s0" / "log.txt").read_text()
    activity = Activity()
    activity.began(pack, 100)
    activity.reported(report)
    assert activity.to_json()["events"][0]["kind"] == "checkpoint"
