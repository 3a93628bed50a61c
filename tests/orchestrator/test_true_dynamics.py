"""Studies whose rollouts step through the true dynamics: from the command line, interrupted, with rollout workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.ravl import RAVL
from benchmarks.kill_tests import SETTINGS, Remains
from envs.collect import collect, uniform_policy
from envs.hdf5 import write_hdf5
from orchestrator.artifacts import load_tensors
from orchestrator.cli import main
from orchestrator.cluster import InlineSlots
from orchestrator.config import load_config
from orchestrator.plan import make_plan
from orchestrator.workers import Workers
from tests.orchestrator.studies import IN_PROCESS, dataset_of, make_pack, same, train


@pytest.fixture
def plane(workdir: Path) -> Path:
    """A work folder with a dataset of EdgeOfReach, a study's file, and no ensemble."""
    shutil.rmtree(workdir / "artifacts")
    env_id = "offsweep/EdgeOfReach-v0"
    write_hdf5(collect(env_id, [(uniform_policy(env_id), 1.0)], 300, seed=0), workdir / "datasets" / "plane.hdf5")
    method = {**SETTINGS["method"], "model_quality": 1.0}
    content = {**SETTINGS, "dataset": "plane", "method": method, "study": {"name": "plane"}, "workdir": str(workdir)}
    (workdir / "plane.yaml").write_text(yaml.safe_dump(content))
    return workdir


def checkpoints(workdir: Path, study: str) -> list[Any]:
    return [load_tensors(path) for path in sorted((workdir / "studies" / study).glob("runs/*/checkpoint.pt"))]


def test_a_study_in_true_dynamics_is_resumed_bit_for_bit(plane: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["train", "--config", str(plane / "plane.yaml")]
    assert main([*words, "study.name=straight"]) == 0
    train_epoch = RAVL.train_epoch

    def dying(self: RAVL, epoch: int) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(RAVL, "train_epoch", dying)
        assert main([*words, "study.name=stopped"]) == 130
    assert checkpoints(plane, "stopped") == []
    assert main(["resume", "stopped", "--workdir", str(plane)]) == 0
    straight, stopped = (Remains.of(plane, name) for name in ("straight", "stopped"))
    assert len(straight.policies) == 2
    assert stopped.policies == straight.policies
    assert [t[2] for t in stopped.trials.values()] == [t[2] for t in straight.trials.values()]
    assert same(checkpoints(plane, "straight"), checkpoints(plane, "stopped"))
    assert not list(plane.glob("artifacts/**/content.pt"))  # no ensemble has been built


def test_rollout_workers_step_the_same_simulator(plane: Path, ray_cluster: None):
    import ray

    overrides = ["dataset=plane", "method.rollout_length=3", "method.model_quality=1"]
    workers = Workers(2)
    here, there = (make_pack(plane, [({}, 0), ({}, 1)], *overrides, name=name) for name in ("here", "there"))
    train(here)
    train(there, IN_PROCESS, workers)
    assert same(checkpoints(plane, "here"), checkpoints(plane, "there"))
    assert len(checkpoints(plane, "there")) == 2
    for actor in workers._rollout_workers:
        ray.kill(actor)


def test_a_plan_in_true_dynamics_has_no_stage(plane: Path):
    config = load_config([plane / "plane.yaml"], [])
    dataset = dataset_of(config)
    slots = InlineSlots(config.compute, dataset)
    plan = make_plan(config, config.study_spec(), dataset, slots, seconds=1.0)
    assert plan.stages == []
    assert sum(row.size * row.packs for row in plan.packs) == 2
    assert all(row.measured and row.seconds > 0 for row in plan.packs)


@pytest.mark.parametrize(
    "words",
    [
        ["method.model_quality=0.5"],
        ["study.num_trials=2", "study.space={method.model_quality: {type: categorical, choices: [0, 1]}}"],
        ["study.num_trials=2", "study.space={method.model_quality: {type: float, low: -1, high: 1}}"],
    ],
)  # fmt: skip
def test_true_dynamics_that_there_are_not_are_missed_before_anything_is_computed(
    workdir: Path, capsys: pytest.CaptureFixture[str], words: list[str]
):
    assert main(["train", "method=ravl", "dataset=tiny", "--workdir", str(workdir), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("offsweep: method.model_quality=")
    assert "no true dynamics for environment 'Pendulum-v1'" in line
    assert not (workdir / "studies").exists()
