"""The learner: stopped anywhere it ends as if undisturbed; runs that end early leave the others alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.method import load_method
from agents.model_based import ModelBasedSAC
from benchmarks.kill_tests import policy_digest
from envs.errors import UserError
from orchestrator.artifacts import ArtifactStore, load_tensors, stage_key
from orchestrator.cluster import InlineSlots
from orchestrator.config import ComputeConfig, load_config, to_dict
from orchestrator.learner import Learner, LearnerProcess, PackSpec
from sweeps.study import Study
from tests.orchestrator.studies import (
    IN_PROCESS,
    configured,
    copied,
    dataset_of,
    drive,
    make_learner,
    make_pack,
    points,
    records,
    same,
    train,
)

TWO = [({"method.eta": 0.1}, 0), ({"method.eta": 2.0}, 1)]


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> PackSpec:
    """The pack of two, trained to its end."""
    pack = make_pack(copied(base, tmp_path_factory), TWO)
    train(pack)
    return pack


class Stop(Exception):
    """Stands for a kill."""


def stop_in_epoch(learner: Learner, epoch: int) -> None:
    """Make the learner die in the middle of an epoch: after its rollouts, before anything of it is logged."""
    train_epoch = learner.method.train_epoch

    def dying(number: int) -> Any:
        if number == epoch:
            raise Stop
        return train_epoch(number)

    learner.method.train_epoch = dying  # type: ignore[method-assign, assignment]


def assert_same_end(one: PackSpec, other: PackSpec) -> None:
    for run in one.runs:
        folders = [Path(pack.study_folder) / "runs" / run.run_key for pack in (one, other)]
        assert policy_digest(folders[0] / "policy.npz") == policy_digest(folders[1] / "policy.npz")
        assert same(*(load_tensors(folder / "checkpoint.pt") for folder in folders))
        evaluations = [json.loads((folder / "evaluations.json").read_text()) for folder in folders]
        assert evaluations[0] == evaluations[1]
        assert points(one.study_folder, run.run_key) == points(other.study_folder, run.run_key)


def advance_to_the_end(learner: Learner) -> None:
    while not learner.advance().finished:
        pass


@pytest.mark.parametrize(("epoch", "minutes"), [(0, 0.0), (1, 0.0), (2, 60.0), (3, 0.0)])
def test_a_learner_stopped_in_any_epoch_ends_like_an_undisturbed_one(
    workdir: Path, undisturbed: PackSpec, epoch: int, minutes: float
):
    stopped = make_pack(workdir, TWO)
    compute = ComputeConfig(device="cpu", checkpoint_minutes=minutes)  # 60: from the very beginning
    learner = make_learner(stopped, compute)
    stop_in_epoch(learner, epoch)
    with pytest.raises(Stop):
        advance_to_the_end(learner)
    again = train(stopped, compute)
    assert (again.updates, again.diverged) == (200, {})
    assert_same_end(undisturbed, stopped)
    # what the tracker would be sent: every epoch of every metric, and two evaluations
    steps = {key: {s for k, s in points(stopped.study_folder, "t0000-s0") if k == key} for key in ("eval/score",)}
    assert steps == {"eval/score": {100, 200}}
    assert {s for k, s in points(stopped.study_folder, "t0000-s0") if k.startswith("train/")} == {50, 100, 150, 200}


def test_a_learner_stopped_after_its_last_epoch_finishes(workdir: Path, undisturbed: PackSpec):
    stopped = make_pack(workdir, TWO)
    learner = make_learner(stopped, IN_PROCESS)

    def die() -> None:
        raise Stop

    learner._finish = die  # type: ignore[method-assign]
    learner.advance()
    with pytest.raises(Stop):
        learner.advance()
    report = train(stopped)
    assert report.finished
    assert_same_end(undisturbed, stopped)


def test_a_run_in_a_pack_ends_as_it_does_alone(workdir: Path, undisturbed: PackSpec):
    pack = undisturbed
    for i, member in enumerate(TWO):
        alone = make_pack(workdir, [member], name=f"alone{i}")
        train(alone)
        one = np.load(Path(alone.study_folder) / "runs" / alone.runs[0].run_key / "policy.npz")
        other = np.load(Path(pack.study_folder) / "runs" / pack.runs[i].run_key / "policy.npz")
        for name in one:
            if one[name].dtype.kind == "f":
                np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_dropping_a_run_lets_the_others_go_on(workdir: Path):
    three = [*TWO, ({"method.eta": 0.5}, 2)]
    whole, thinned = (make_pack(workdir, three, name=name) for name in ("whole", "thinned"))
    train(whole)
    learner = make_learner(thinned, IN_PROCESS)
    assert learner.advance().updates == 100
    # a fresh learner, so that the checkpoint of three has to be thinned
    learner = make_learner(thinned, IN_PROCESS)
    report = learner.advance(["t0001-s1", "nobody"])
    assert report.finished
    assert {key: [e.updates for e in done] for key, done in report.evaluations.items()} == {
        "t0000-s0": [100, 200], "t0001-s1": [100], "t0002-s2": [100, 200],
    }  # fmt: skip
    last = records(thinned.study_folder, "t0001-s1")[-2:]
    assert (last[0]["tags"], last[1]["status"]) == ({"outcome": "pruned"}, "KILLED")
    assert not (Path(thinned.study_folder) / "runs" / "t0001-s1" / "policy.npz").exists()
    for key in ("t0000-s0", "t0002-s2"):
        policies = [np.load(Path(p.study_folder) / "runs" / key / "policy.npz") for p in (whole, thinned)]
        for name in policies[0]:
            if policies[0][name].dtype.kind == "f":
                np.testing.assert_allclose(policies[0][name], policies[1][name], rtol=1e-3, atol=1e-4)
    # and a learner that comes after the thinned checkpoint knows of it
    assert make_learner(thinned, IN_PROCESS).alive == ["t0000-s0", "t0002-s2"]


def test_when_all_runs_are_dropped_the_pack_has_ended(workdir: Path):
    pack = make_pack(workdir, TWO)
    learner = make_learner(pack, IN_PROCESS)
    learner.advance()
    assert learner.advance([run.run_key for run in pack.runs]).finished


def test_a_diverging_run_is_stopped_and_marked_and_its_mate_ends_as_alone(workdir: Path):
    mixed = make_pack(workdir, [TWO[0], ({"method.actor_lr": 1e6, "method.critic_lr": 1e6}, 1)], name="mixed")
    alone = make_pack(workdir, TWO[:1], name="alone")
    report, alone_report = train(mixed), train(alone)
    assert list(report.diverged) == ["t0001-s1"]
    assert report.finished
    last = records(mixed.study_folder, "t0001-s1")[-2:]
    assert (last[0]["tags"], last[1]["status"]) == ({"outcome": "diverged"}, "FAILED")
    assert not (Path(mixed.study_folder) / "runs" / "t0001-s1" / "policy.npz").exists()
    values = [[e.value for e in r.evaluations["t0000-s0"]] for r in (report, alone_report)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert records(mixed.study_folder, "t0000-s0")[-1]["status"] == "FINISHED"
    # it stays so for a learner that comes later
    assert make_learner(mixed, IN_PROCESS).diverged == report.diverged


def test_a_policy_that_is_not_finite_counts_as_diverged(workdir: Path):
    """The last update of an epoch can spoil the policy although all metrics of the epoch are finite."""
    pack = make_pack(workdir, TWO)
    learner = make_learner(pack, IN_PROCESS)
    train_epoch = learner.method.train_epoch

    def spoiling(epoch: int) -> Any:
        metrics = train_epoch(epoch)
        if epoch == 1:
            actor = learner.method.sac.actor  # type: ignore[attr-defined]
            actor.blocks(actor.flat)[0][1] = math.nan
            del learner.method.train_epoch  # the method that goes on with the other member has its own
        return metrics

    learner.method.train_epoch = spoiling  # type: ignore[method-assign]
    report = learner.advance()
    assert report.diverged == {"t0001-s1": 100}
    assert report.evaluations["t0001-s1"] == []
    assert [e.updates for e in learner.advance().evaluations["t0000-s0"]] == [100, 200]


def test_what_a_run_announces(workdir: Path):
    pack = make_pack(workdir, TWO)
    make_learner(pack, IN_PROCESS)
    start = records(pack.study_folder, "t0001-s1")[0]
    assert start["run_name"] == "t001-s1"
    assert start["params"]["method.eta"] == "2.0"
    tags = start["tags"]
    assert (tags["trial"], tags["seed"], tags["method"], tags["dataset"]) == ("1", "1", "ravl", "tiny")
    assert tags["pack"] == "pack"
    assert tags["config_hash"] != records(pack.study_folder, "t0000-s0")[0]["tags"]["config_hash"]
    assert start["datasets"][0]["name"] == "tiny"
    stored = load_config([Path(pack.study_folder) / "runs" / "t0001-s1" / "config.yaml"], [])
    assert to_dict(stored) == pack.runs[1].config


def test_a_checkpoint_of_another_pack_is_refused(workdir: Path):
    pack = make_pack(workdir, TWO)
    make_learner(pack, IN_PROCESS).advance()
    other = make_pack(workdir, [TWO[1], TWO[0]])
    with pytest.raises(UserError, match="of another version or pack"):
        make_learner(other, IN_PROCESS)


@pytest.mark.parametrize("minutes", [0.0, 60.0])
def test_a_pack_out_of_memory_is_divided_and_ends_as_if_undisturbed(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, minutes: float
):
    """In its third epoch; the halves go on from the pack's last checkpoint, or from the start where it has none."""
    space = {"method.eta": {"type": "float", "low": 0.01, "high": 10.0, "log": True}}
    words = ["num_seeds=4", "compute.runs_per_pack=4", f"compute.checkpoint_minutes={minutes}"]

    def study(name: str) -> Study:
        config = configured(workdir, *words, name=name, num_trials=1, space=space)
        return drive(config, InlineSlots(config.compute, dataset_of(config)))

    whole = study("whole")
    train_epoch = ModelBasedSAC.train_epoch
    epochs: list[tuple[int, int]] = []

    def failing(self: ModelBasedSAC, epoch: int) -> Any:
        epochs.append((self.num_members, epoch))
        if self.num_members > 2 and epoch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return train_epoch(self, epoch)

    monkeypatch.setattr(ModelBasedSAC, "train_epoch", failing)
    divided = study("divided")
    begin = 2 if minutes == 0 else 0
    assert epochs == [(4, e) for e in range(3)] + 2 * [(2, e) for e in range(begin, 4)]
    assert divided.trials()[0].value == pytest.approx(whole.trials()[0].value, rel=1e-3)
    for seed in range(4):
        key = f"t0000-s{seed}"
        arrays = [np.load(s.folder / "runs" / key / "policy.npz") for s in (whole, divided)]
        for name in arrays[0]:
            if arrays[0][name].dtype.kind == "f":
                np.testing.assert_allclose(arrays[0][name], arrays[1][name], rtol=1e-2, atol=1e-3)
        counted = [
            Counter((r["step"], name) for r in records(s.folder, key) for name in r.get("values", {}))
            for s in (whole, divided)
        ]
        assert set(counted[0]) == set(counted[1])
        if minutes == 0:  # else the epochs before are logged again, which the tracker recognises by their steps
            assert counted[0] == counted[1]


def test_the_cost_of_a_pack_is_of_one_process_from_its_start(workdir: Path):
    pack = make_pack(workdir, TWO)
    dataset = dataset_of(load_config([pack.runs[0].config], []))
    process = LearnerProcess(IN_PROCESS)
    reports = [process.advance(pack, [], dataset) for _ in range(2)]
    assert reports[1].finished
    costs = [report.cost for report in reports]
    assert costs[0] is not None
    assert costs[1] is not None
    assert 0 < costs[0].seconds < costs[1].seconds
    assert 0 < costs[1].memory < 2e9
    # one that takes up a checkpoint does not know what was before
    other = make_pack(workdir, TWO, name="other")
    process.advance(other, [], dataset)
    assert LearnerProcess(IN_PROCESS).advance(other, [], dataset).cost is None


def test_a_pack_survives_json(workdir: Path):
    pack = make_pack(workdir, TWO)
    assert PackSpec.from_json(json.loads(json.dumps(pack.to_json()))) == pack


def test_a_stage_is_built_once_and_keeps_its_history(workdir: Path):
    config = configured(workdir, "method.dynamics.seed=7")
    process = LearnerProcess(IN_PROCESS)
    process.build_stage(to_dict(config), "dynamics", dataset_of(config))
    store = ArtifactStore(workdir / "artifacts")
    dataset_hash = dataset_of(config).content_hash
    stage = load_method("ravl").stages(config.method)["dynamics"]  # type: ignore[attr-defined]
    key = stage_key(stage, dataset_hash)
    content = store.folder(stage.kind, key) / "content.pt"
    before = content.stat().st_mtime_ns
    process.build_stage(to_dict(config), "dynamics", dataset_of(config))
    assert content.stat().st_mtime_ns == before
    history = store.description(stage.kind, key)["history"]
    assert [step for step, _ in history] == sorted({step for step, _ in history})
    assert history[0][1]["train_loss"] > 0


def test_a_stage_whose_data_cannot_be_learned_leaves_nothing(workdir: Path):
    """Rewards of 1e38 overflow: said at once, and no half-made artifact is taken for a whole one."""
    import dataclasses

    from envs.hdf5 import write_hdf5
    from envs.registry import load_dataset

    tiny = load_dataset("tiny", workdir)
    rewards = np.where(np.arange(len(tiny.rewards)) % 2, 1e38, -1e38).astype(np.float32)
    write_hdf5(dataclasses.replace(tiny, name="huge", rewards=rewards), workdir / "datasets" / "huge.hdf5")
    config = configured(workdir, "dataset=huge")
    before = set((workdir / "artifacts").rglob("content.pt"))
    with pytest.raises(UserError, match="diverged"):
        LearnerProcess(IN_PROCESS).build_stage(to_dict(config), "dynamics", dataset_of(config))
    assert set((workdir / "artifacts").rglob("content.pt")) == before
