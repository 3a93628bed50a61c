"""Edge-of-reach diagnostics of runs: logged at every evaluation, the same after a kill, without influence; and what is
said of runs that collapse."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agents.model_based import ModelBasedSAC
from benchmarks.kill_tests import policy_digest
from envs.collect import collect, uniform_policy
from envs.hdf5 import write_hdf5
from orchestrator import reading
from orchestrator.artifacts import load_tensors, write_text
from orchestrator.cluster import InlineSlots
from orchestrator.config import load_config, to_dict, to_yaml
from orchestrator.learner import Learner, LearnerProcess, PackReport, PackSpec
from sweeps import plots
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
# rewards of the order of 20 a step, so that values are positive and an expert's is known
OVERRIDES = ("dataset=tiny,reward_shift=20", "evaluation.every_epochs=1", "method.critic_lr=0.01")
EXPERT = (20 - 147.62 / 200) * (1 - 0.99**200) / 0.01


@pytest.fixture(scope="module")
def work(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the ensemble that the dataset above needs."""
    workdir = copied(base, tmp_path_factory)
    config = configured(workdir, *OVERRIDES)
    assert LearnerProcess(IN_PROCESS).build_stages([to_dict(config)], "dynamics", dataset_of(config)) == [None]
    return workdir


@pytest.fixture(scope="module")
def trained(work: Path) -> PackSpec:
    pack = make_pack(work, TWO, *OVERRIDES, name="trained")
    train(pack)
    return pack


def diagnosed(pack: PackSpec, run_key: str) -> dict[tuple[str, int], Any]:
    found = points(pack.study_folder, run_key)
    return {(name.removeprefix("reach/"), step): x for (name, step), x in found.items() if name.startswith("reach/")}


def test_metrics_are_logged_at_the_updates_of_every_evaluation(trained: PackSpec):
    for run in trained.runs:
        found = diagnosed(trained, run.run_key)
        assert all(math.isfinite(x) for x in found.values())
        steps = [50, 100, 150, 200]
        always = {"share", "share_control", "q_mean", "q_within", "penalty_within", "q_step_01", "q_step_02"}
        for step in steps:
            names = {name for name, s in found if s == step}
            assert always | {"log10_q", "q_over_qstar"} <= names
            assert "edge_share" not in names  # Pendulum has no exact test
            assert 0 <= found["share", step] <= 1
            assert found["penalty_within", step] >= 0
            assert found["q_over_qstar", step] == pytest.approx(found["q_mean", step] / EXPERT)
        assert [s for name, s in found if name == "log10_q_slope"] == steps[1:]
        q = [found["log10_q", s] for s in steps]
        # least squares over 0.05, 0.1, 0.15 and 0.2 thousand updates
        assert found["log10_q_slope", 200] == pytest.approx((3 * (q[3] - q[0]) + q[2] - q[1]) / (10 * 0.05))


def test_a_run_trains_the_same_without_diagnostics(work: Path, trained: PackSpec):
    without = make_pack(work, TWO, *OVERRIDES, "evaluation.diagnostics=false", name="without")
    train(without)
    for run in trained.runs:
        folders = [Path(pack.study_folder) / "runs" / run.run_key for pack in (trained, without)]
        assert policy_digest(folders[0] / "policy.npz") == policy_digest(folders[1] / "policy.npz")
        assert same(*(load_tensors(folder / "checkpoint.pt") for folder in folders))
        assert [(folder / "diagnostics.png").exists() for folder in folders] == [True, False]
        assert not diagnosed(without, run.run_key)
        tags = [records(pack.study_folder, run.run_key)[0]["tags"]["config_hash"] for pack in (trained, without)]
        assert tags[0] == tags[1]


class Stop(Exception):
    """Stands for a kill."""


def to_the_end(learner: Learner) -> PackReport:
    while not (report := learner.advance()).finished:
        pass
    return report


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_resumed_run_is_diagnosed_as_an_undisturbed_one(work: Path, trained: PackSpec, epoch: int):
    pack = make_pack(work, TWO, *OVERRIDES, name=f"stopped{epoch}")
    learner = make_learner(pack)
    save = learner._save

    def dying(force: bool = False) -> None:
        if learner.epoch == epoch + 1:
            raise Stop  # between an evaluation and its checkpoint
        save(force)

    learner._save = dying  # type: ignore[method-assign]
    with pytest.raises(Stop):
        to_the_end(learner)
    train(pack)
    for run in trained.runs:
        assert diagnosed(pack, run.run_key) == diagnosed(trained, run.run_key)


def test_a_run_without_model_rows_has_none(work: Path):
    pack = make_pack(work, TWO[:1], *OVERRIDES, "method.real_ratio=1", name="real")
    train(pack)
    assert not diagnosed(pack, "t0000-s0")
    assert not (Path(pack.study_folder) / "runs" / "t0000-s0" / "diagnostics.png").exists()


# ---- errors of the model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plane(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a dataset whose environment has true dynamics, and its ensemble."""
    workdir = copied(work, tmp_path_factory)
    env_id = "offsweep/EdgeOfReach-v0"
    write_hdf5(collect(env_id, [(uniform_policy(env_id), 1.0)], 300, seed=0), workdir / "datasets" / "plane.hdf5")
    config = configured(workdir, *PLANE)
    assert LearnerProcess(IN_PROCESS).build_stages([to_dict(config)], "dynamics", dataset_of(config)) == [None]
    return workdir


PLANE = ("dataset=plane", "evaluation.every_epochs=2", "method.rollout_length=3")


def of_the_model(pack: PackSpec, run_key: str) -> dict[tuple[str, int], Any]:
    found = points(pack.study_folder, run_key)
    return {(name.removeprefix("model/"), step): x for (name, step), x in found.items() if name.startswith("model/")}


def test_errors_of_the_model_are_logged_without_influence_and_the_same_after_a_kill(plane: Path):
    packs = {
        name: make_pack(plane, TWO, *PLANE, *more, name=name)
        for name, more in (("with", ()), ("off", ("evaluation.diagnostics=false",)), ("killed", ()))
    }
    for name in ("with", "off"):
        train(packs[name])
    make_learner(packs["killed"]).advance()
    learner = make_learner(packs["killed"])  # goes on from a checkpoint with a diagnosis
    assert learner.epoch == 2
    to_the_end(learner)
    for run in packs["with"].runs:
        found = of_the_model(packs["with"], run.run_key)
        by_step = {f"{name}_step_{t}" for name in ("rmse", "one_step_error", "alive_share") for t in (1, 3)}
        assert {name for name, _ in found} == {"one_step_error"} | by_step
        assert {step for _, step in found} == {100, 200}
        assert all(math.isfinite(x) for x in found.values())
        assert of_the_model(packs["killed"], run.run_key) == found
        assert not of_the_model(packs["off"], run.run_key)
        states = [
            load_tensors(Path(pack.study_folder) / "runs" / run.run_key / "checkpoint.pt") for pack in packs.values()
        ]
        assert same(states[0], states[1])
        assert same(states[0], states[2])


def test_samples_are_kept_of_the_last_diagnosis_and_drawn(plane: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []

    def diagnostics(self: ModelBasedSAC, epoch: int) -> list[dict[str, Any]]:
        sample = {"model/sample_dynamics_reward": [0.5, 0.7], "model/sample_log10_error": [float(epoch), -1.0]}
        return [{"model/rmse_step_1": 1.0, **sample} for _ in self.seeds]

    def drawn(course: plots.RunCourse) -> Any:
        shown.append(course.samples)
        return figure(course)

    figure = plots.diagnostics_figure
    monkeypatch.setattr(ModelBasedSAC, "diagnostics", diagnostics)
    monkeypatch.setattr(plots, "diagnostics_figure", drawn)
    pack = make_pack(plane, TWO[:1], *PLANE, name="sampled")
    make_learner(pack).advance()
    learner = make_learner(pack)
    assert learner.diagnoses["t0000-s0"][0].samples["model/sample_log10_error"] == [2.0, -1.0]
    to_the_end(learner)
    assert shown == [{"model/sample_dynamics_reward": [0.5, 0.7], "model/sample_log10_error": [4.0, -1.0]}]
    assert [bool(d.samples) for d in learner.diagnoses["t0000-s0"]] == [False, True]
    assert of_the_model(pack, "t0000-s0") == {("rmse_step_1", 100): 1.0, ("rmse_step_1", 200): 1.0}
    assert (Path(pack.study_folder) / "runs" / "t0000-s0" / "diagnostics.png").exists()


# ---- runs that collapse -----------------------------------------------------------------------------------------


def made_up(mean_q: Callable[[int, int], float]) -> Callable[[ModelBasedSAC, int], list[dict[str, float]]]:
    """Diagnostics in which a run's mean Q is a function of its seed and the epoch."""

    def diagnostics(self: ModelBasedSAC, epoch: int) -> list[dict[str, float]]:
        return [{"reach/q_mean": mean_q(seed, epoch), "reach/q_step_01": 1.0} for seed in self.seeds]

    return diagnostics


def explodes_with_seed_1(seed: int, epoch: int) -> float:
    return EXPERT * (10.0 ** (epoch - 2) if seed == 1 else 0.5)


def ending(learner: Learner, run_key: str) -> dict[str, str]:
    return next(r["tags"] for r in reversed(records(learner.pack.study_folder, run_key)) if r["type"] == "tags")


def test_an_exploding_run_is_tagged_and_its_mate_is_not(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelBasedSAC, "diagnostics", made_up(explodes_with_seed_1))
    learner = make_learner(make_pack(work, TWO, *OVERRIDES, name="exploding"))
    report = to_the_end(learner)
    assert report.collapsing == {"t0000-s0": {}, "t0001-s1": {150: pytest.approx(10), 200: pytest.approx(100)}}
    assert ending(learner, "t0000-s0") == {"outcome": "finished"}
    assert ending(learner, "t0001-s1") == {"outcome": "finished", "collapsing": "true"}
    # known to a learner that comes later, too
    again = make_learner(learner.pack).advance()
    assert again.collapsing == report.collapsing


def test_one_that_was_pruned_is_tagged_and_drawn_as_well(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelBasedSAC, "diagnostics", made_up(explodes_with_seed_1))
    learner = make_learner(make_pack(work, TWO, *OVERRIDES, name="pruned"))
    for _ in range(3):
        learner.advance()
    learner.advance(["t0001-s1"])
    assert ending(learner, "t0001-s1") == {"outcome": "pruned", "collapsing": "true"}
    artifacts = [
        Path(r["path"]).name for r in records(learner.pack.study_folder, "t0001-s1") if r["type"] == "artifact"
    ]
    assert "diagnostics.png" in artifacts
    assert (learner.run_folder("t0001-s1") / "diagnostics.png").exists()


def test_a_run_whose_values_have_come_down_again_is_not_collapsing(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelBasedSAC, "diagnostics", made_up(lambda seed, epoch: EXPERT * [0, 9, 8, 7, 6][epoch]))
    learner = make_learner(make_pack(work, TWO[:1], *OVERRIDES, name="falling"))
    report = to_the_end(learner)
    assert report.collapsing == {"t0000-s0": {}}
    assert ending(learner, "t0000-s0") == {"outcome": "finished"}


def test_the_table_of_a_study_names_its_collapsing_runs(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelBasedSAC, "diagnostics", made_up(explodes_with_seed_1))
    config = configured(work, *OVERRIDES, name="shown", num_trials=1, space={})
    study = drive(config, InlineSlots(config.compute, dataset_of(config)))
    write_text(study.folder / "config.yaml", to_yaml(config))
    assert study.trials()[0].attrs["run_collapsing"] == {"t0000-s1": pytest.approx(100)}
    text = io.StringIO()
    reading.show("shown", work, Console(file=text, width=200))
    assert "complete, 1 collapsing" in text.getvalue()
    assert "t000-s1 is collapsing: mean Q 100.0 times the value of an expert and rising" in text.getvalue()
    assert "t000-s0 is collapsing" not in text.getvalue()


def test_the_switch_is_an_evaluation_key(work: Path):
    assert configured(work).evaluation.diagnostics
    stored = to_dict(configured(work))
    del stored["evaluation"]["diagnostics"]  # as a study from before has it
    assert load_config([stored], []).evaluation.diagnostics
