"""The driver: a study of real trainings as MLflow shows it, and scripted learners for everything that can happen."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.kill_tests import Remains
from envs.dataset import Dataset
from envs.errors import UserError
from orchestrator import launch
from orchestrator.artifacts import load_tensors
from orchestrator.cluster import InlineSlots, RaySlots
from orchestrator.config import Config, identity, load_config
from orchestrator.hashing import digest
from orchestrator.learner import LearnerProcess, PackReport, PackSpec
from orchestrator.memory import OutOfMemory
from orchestrator.packing import Packing
from orchestrator.spool import RunInfo, RunSpool
from sweeps.study import Proposal, Study
from tests.orchestrator.studies import (
    Killed,
    ScriptedSlots,
    configured,
    copied,
    dataset_of,
    drive,
    dying,
    points,
    records,
)

ETA = {"method.eta": {"type": "float", "low": 0.01, "high": 10.0, "log": True}}
ALL_RUNS = [f"t{trial:04d}-s{seed}" for trial in range(3) for seed in range(2)]


# ---- a study of real trainings --------------------------------------------------------------------------------------


class Finished:
    """A study that ran to its end, what it printed, and MLflow's tables."""

    def __init__(self, workdir: Path, name: str) -> None:
        self.workdir, self.name = workdir, name
        self.folder = workdir / "studies" / name
        self.text = io.StringIO()
        self.stages_built = 0

    def query(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.workdir / "mlflow.db")) as store:
            return store.execute(sql, args).fetchall()

    def run_ids(self) -> dict[str, str]:
        rows = self.query("SELECT value, run_uuid FROM tags WHERE key = 'offsweep.run_key'")
        assert len({key for key, _ in rows}) == len(rows), "a run exists twice"
        return dict(rows)

    def tags(self, run_key: str) -> dict[str, str]:
        return dict(self.query("SELECT key, value FROM tags WHERE run_uuid = ?", self.run_ids()[run_key]))

    def params(self, run_key: str) -> dict[str, str]:
        return dict(self.query("SELECT key, value FROM params WHERE run_uuid = ?", self.run_ids()[run_key]))

    def metric(self, run_key: str, name: str) -> dict[int, float]:
        rows = self.query(
            "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ?", self.run_ids()[run_key], name
        )
        assert len({step for step, _ in rows}) == len(rows), "a point exists twice"
        return dict(sorted(rows))

    def artifacts(self, run_key: str) -> set[str]:
        [(uri,)] = self.query("SELECT artifact_uri FROM runs WHERE run_uuid = ?", self.run_ids()[run_key])
        root = Path(uri.removeprefix("file://"))
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three trials of two seeds, from a work folder without stages."""
    workdir = copied(base, tmp_path_factory)
    shutil.rmtree(workdir / "artifacts")
    done = Finished(workdir, "whole")
    with pytest.MonkeyPatch.context() as patch:
        build = LearnerProcess.build_stages

        def counted(
            self: LearnerProcess, configs: Sequence[dict[str, Any]], name: str, dataset: Dataset
        ) -> list[UserError | None]:
            done.stages_built += len(configs)
            return build(self, configs, name, dataset)

        patch.setattr(LearnerProcess, "build_stages", counted)
        launch.start(configured(workdir, name="whole"), Console(file=done.text, width=200))
    return done


def test_every_trial_ends_with_the_mean_score_of_its_runs(finished: Finished):
    trials = Study.open(finished.folder, read_only=True).trials()
    assert [(t.number, t.state) for t in trials] == [(0, "complete"), (1, "complete"), (2, "complete")]
    for trial in trials:
        scores = [finished.metric(f"t{trial.number:04d}-s{seed}", "eval/score") for seed in range(2)]
        assert [list(s) for s in scores] == [[100, 200]] * 2
        assert trial.value == pytest.approx((scores[0][200] + scores[1][200]) / 2)
        assert trial.intermediate == pytest.approx(
            {step: (scores[0][step] + scores[1][step]) / 2 for step in (100, 200)}
        )
    assert len({t.value for t in trials}) == 3


def test_the_stage_is_built_once_for_all_trials(finished: Finished):
    assert finished.stages_built == 1
    assert len([*(finished.workdir / "artifacts").rglob("content.pt")]) == 1
    # its history is in the study's own run
    assert finished.metric("study", "dynamics/train_loss")


def test_every_run_exists_once_in_mlflow_and_has_ended(finished: Finished):
    assert sorted(finished.run_ids()) == sorted([*ALL_RUNS, "study"])
    experiments = finished.query(
        "SELECT DISTINCT e.name FROM runs r JOIN experiments e ON e.experiment_id = r.experiment_id"
    )
    assert experiments == [("whole",)]
    assert finished.query("SELECT DISTINCT status FROM runs") == [("FINISHED",)]


def test_the_tags_parameters_and_dataset_of_a_run(finished: Finished):
    trial = Study.open(finished.folder, read_only=True).trials()[1]
    tags, params = finished.tags("t0001-s1"), finished.params("t0001-s1")
    config = load_config([finished.folder / "runs" / "t0001-s1" / "config.yaml"], [])
    [(name, dataset_digest)] = finished.query(
        "SELECT d.name, d.digest FROM inputs i JOIN datasets d ON d.dataset_uuid = i.source_id"
        " WHERE i.destination_id = ?", finished.run_ids()["t0001-s1"],
    )  # fmt: skip
    assert name == "tiny"
    wanted = {"study": "whole", "trial": "1", "seed": "1", "method": "ravl", "dataset": "tiny", "outcome": "finished"}
    assert wanted.items() <= tags.items()
    assert (finished.folder / "packs" / tags["pack"] / "pack.json").exists()
    content_hash = dataset_of(config).content_hash
    assert tags["config_hash"] == digest(identity(config, content_hash))
    assert content_hash.startswith(dataset_digest)
    assert float(params["method.eta"]) == trial.params["method.eta"]
    assert (params["method.hidden"], params["seed"]) == ("[16, 16]", "1")


def test_every_epoch_of_every_metric_is_in_mlflow_with_its_step(finished: Finished):
    for key in ALL_RUNS:
        spooled = points(finished.folder, key)
        assert {step for name, step in spooled if name == "train/actor_loss"} == {50, 100, 150, 200}
        names = {name for name, _ in spooled}
        assert {"rollout/transitions", "eval/return_mean"} <= names
        for name in names:
            assert finished.metric(key, name) == pytest.approx({s: v for (n, s), v in spooled.items() if n == name})


def test_the_artifacts_of_a_run_and_of_the_study(finished: Finished):
    files = {"config.yaml", "policy.npz", "checkpoint.pt", "evaluations.json", "diagnostics.png", "logs/log.txt"}
    assert finished.artifacts("t0002-s0") == files
    assert {"config.yaml", "trials.csv", "plots/history.png", "plots/slices.png"} <= finished.artifacts("study")
    state = load_tensors(finished.folder / "runs" / "t0002-s0" / "checkpoint.pt")
    assert "replay" not in state


def test_the_studys_own_run_tells_how_it_went(finished: Finished):
    trials = Study.open(finished.folder, read_only=True).trials()
    values = [t.value for t in trials if t.value is not None]
    assert finished.metric("study", "trial/value") == pytest.approx(dict(enumerate(values)))
    assert finished.metric("study", "trial/best_value") == pytest.approx({i: max(values[: i + 1]) for i in range(3)})
    assert finished.tags("study")["best_trial"] == str(values.index(max(values)))


def test_what_the_user_reads(finished: Finished):
    text = finished.text.getvalue()
    assert "building dynamics" in text
    assert text.count(" complete ") >= 6  # a line each, and the table
    assert "best trial:" in text
    assert "offsweep train --config" in text


def test_resuming_a_finished_study_changes_nothing(finished: Finished):
    before = Remains.of(finished.workdir, "whole")
    launch.resume("whole", finished.workdir, [], Console(file=io.StringIO()))
    assert Remains.of(finished.workdir, "whole") == before


@pytest.mark.slow  # test_kill.py holds a learner in Ray, and killed there, against one in this process
def test_one_learner_in_ray_gives_the_same_trials(workdir: Path, ray_cluster: None):
    config = configured(workdir, name="inline", num_trials=2)
    inline = drive(config, InlineSlots(config.compute, dataset_of(config)))
    config = configured(workdir, name="ray", num_trials=2)
    slots = RaySlots(config.compute, dataset_of(config), 1, 0)
    try:
        in_ray = drive(config, slots)
    finally:
        import ray

        ray.kill(slots._actors[0])
    assert [(t.params, t.value, t.intermediate) for t in inline.trials()] == [
        (t.params, t.value, t.intermediate) for t in in_ray.trials()
    ]


def test_the_number_of_runs_in_a_pack_does_not_change_the_trials(workdir: Path):
    results = []
    for runs_per_pack in (1, 2):
        config = configured(workdir, f"compute.runs_per_pack={runs_per_pack}", name=f"p{runs_per_pack}", num_trials=2)
        study = drive(config, InlineSlots(config.compute, dataset_of(config)))
        packs = [*(study.folder / "packs").glob("*/pack.json")]
        results.append((len(packs), [(t.params, t.value) for t in study.trials()]))
    assert [number for number, _ in results] == [4, 2]
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], rel=1e-3)


# ---- scripted learners ----------------------------------------------------------------------------------------------


def scripted(workdir: Path, *overrides: str, **study: Any) -> Config:
    return configured(
        workdir, "method.num_updates=300", "evaluation.every_epochs=2",
        *overrides, **{"name": "s", "space": ETA, "num_trials": 4, **study},
    )  # fmt: skip


def config_folder(config: Config) -> Path:
    return Path(config.workdir) / "studies" / config.study.name


def test_a_bad_trial_is_pruned_and_its_runs_are_dropped(workdir: Path):
    config = scripted(workdir, pruner={"name": "median", "warmup_fraction": 0.0, "startup_trials": 2})
    slots = ScriptedSlots(config, lambda trial, seed, updates: (10.0 if trial < 3 else 1.0) + seed)
    trials = drive(config, slots).trials()
    assert [t.state for t in trials] == ["complete"] * 3 + ["pruned"]
    assert trials[3].intermediate == {100: 1.5}
    assert [t.value for t in trials[:3]] == [10.5] * 3
    assert slots.dropped[-1] == {"t0003-s0", "t0003-s1"}
    assert slots.calls.count(slots.calls[-1]) == 2  # one evaluation, and the call that drops them


class LateSlots(ScriptedSlots):
    """Reports hold nothing of what evaluations found before the pack has finished."""

    def advance(self, pack: PackSpec, dropped: Sequence[str]) -> PackReport:
        report = super().advance(pack, dropped)
        if report.finished:
            return report
        return dataclasses.replace(report, evaluations={key: [] for key in report.evaluations}, diverged={})


def test_evaluations_that_come_late_are_judged_in_their_order(workdir: Path):
    """Whatever came in together, a trial ends as if each evaluation had been known at its step."""

    def script(trial: int, seed: int, updates: int) -> float | str:
        if trial == 2 and (seed, updates) == (1, 200):
            return "diverged"
        return 10.0 + trial + seed if trial < 2 else updates / 100

    ended = []
    for name, slots_class in (("at-once", ScriptedSlots), ("late", LateSlots)):
        config = scripted(
            workdir, name=name, num_trials=3, pruner={"name": "median", "warmup_fraction": 0.0, "startup_trials": 2}
        )
        slots = slots_class(config, script)
        ended.append([
            (t.state, t.diverged, t.value, t.intermediate, t.attrs["run_values"]) for t in drive(config, slots).trials()
        ])  # fmt: skip
    assert ended[0][2] == ("pruned", False, 1.0, {100: 1.0}, {"t0002-s0": 1.0, "t0002-s1": 1.0})
    assert ended[0] == ended[1]


def test_a_diverged_trial_is_told_a_bad_value_and_the_study_goes_on(workdir: Path):
    config = scripted(workdir, pruner={"name": "none"})
    slots = ScriptedSlots(config, lambda trial, seed, updates: "diverged" if (trial, seed) == (1, 0) else -3.0 - trial)
    study = drive(config, slots)
    trials = study.trials()
    assert [t.diverged for t in trials] == [False, True, False, False]
    assert trials[1].value == -3.0  # no better than the worst so far, nor than a random policy
    assert study.best is not None
    assert study.best.number == 0
    assert {"t0001-s0", "t0001-s1"} in slots.dropped


@pytest.mark.parametrize(
    ("study", "bound"),
    [({}, 3.0), ({"divergence": {"q_bound": None}}, None), ({"space": {}, "num_trials": 1}, None),
     ({"space": {}, "num_trials": 1, "divergence": {"always": True}}, 3.0)],
)  # fmt: skip
def test_values_beyond_all_bounds_end_runs_of_a_search_and_of_a_training_if_asked(
    workdir: Path, study: dict[str, Any], bound: float | None
):
    config = scripted(workdir, "num_seeds=1", **{"num_trials": 2, **study})
    if "space" in study:
        config.study.space = {}
    made = drive(config, ScriptedSlots(config, lambda trial, seed, updates: 1.0))
    packs = [PackSpec.load(made.folder, path.parent.name) for path in made.folder.glob("packs/*/pack.json")]
    assert {pack.q_bound for pack in packs} == {bound}


def test_an_impossible_combination_is_told_as_diverged(workdir: Path):
    space = {**ETA, "method.num_critics": {"type": "categorical", "choices": [1, 2]}}
    config = scripted(workdir, "method.eta=0", space=space, num_trials=2, enqueue=[
        {"method.eta": 1.0, "method.num_critics": 1}, {"method.eta": 1.0, "method.num_critics": 2}])  # fmt: skip
    slots = ScriptedSlots(config, lambda trial, seed, updates: 5.0)
    trials = drive(config, slots).trials()
    assert (trials[0].diverged, trials[1].value) == (True, 5.0)
    assert "num_critics of at least 2" in trials[0].attrs["failure"]
    assert [method for method, _ in slots.calls if method == "advance"] == ["advance"] * 3


def test_a_stage_that_diverges_with_one_trials_settings_ends_that_trial_alone(workdir: Path):
    space = {"method.dynamics.learning_rate": {"type": "categorical", "choices": [1e-3, 2e-3, 1e3]}}
    enqueue = [{"method.dynamics.learning_rate": rate} for rate in (2e-3, 1e3, 1e-3)]
    config = scripted(workdir, space=space, num_trials=3, enqueue=enqueue)
    slots = ScriptedSlots(config, lambda trial, seed, updates: 5.0)
    with_divergence(slots, 1e3)
    trials = drive(config, slots).trials()
    assert [t.diverged for t in trials] == [False, True, False]
    assert trials[1].attrs["failure"] == "dynamics training diverged"
    assert slots.built == [1, 1]  # on CPUs one by one


def test_on_a_gpu_the_stages_that_waiting_packs_miss_are_built_together(workdir: Path):
    """One of them diverges: its trial ends, the others go on."""
    space = {
        "method.dynamics.learning_rate": {"type": "categorical", "choices": [2e-3, 3e-3, 1e3]},
        "method.dynamics.patience": {"type": "categorical", "choices": [1, 2]},
        "method.rollout_length": {"type": "categorical", "choices": [1, 2]},  # keeps runs in packs of their own
    }
    # the first two share a stage
    chosen = [(2e-3, 1, 1), (2e-3, 1, 2), (1e3, 1, 1), (3e-3, 2, 1), (3e-3, 1, 1)]
    enqueue = [dict(zip(space, values, strict=True)) for values in chosen]
    config = scripted(workdir, "compute.runs_per_pack=10", space=space, num_trials=5, enqueue=enqueue)
    slots = ScriptedSlots(config, lambda trial, seed, updates: 5.0, on_gpu=True)
    with_divergence(slots, 1e3)
    study = drive(config, slots)
    assert [t.diverged for t in study.trials()] == [False, False, True, False, False]
    # the learning rates differ in one batch, another patience is another schedule
    assert slots.built == [3, 1]
    # each stage has its own history
    labels = {name for r in records(study.folder, "study") for name in r.get("values", {}) if "train_loss" in name}
    assert len(labels) == 3


def with_divergence(slots: ScriptedSlots, rate: float) -> None:
    """Let no ensemble of this learning rate be built."""
    build = slots.build_stages

    def diverging(configs: Sequence[dict[str, Any]], name: str) -> list[UserError | None]:
        bad = [config["method"]["dynamics"]["learning_rate"] == rate for config in configs]
        good = [config for config, is_bad in zip(configs, bad, strict=True) if not is_bad]
        if good:
            build(good, name)
        return [UserError("dynamics training diverged") if is_bad else None for is_bad in bad]

    slots.build_stages = diverging  # type: ignore[method-assign]


def test_a_failing_pack_fails_its_trial_alone(workdir: Path):
    config = scripted(workdir, pruner={"name": "none"})

    def script(trial: int, seed: int, updates: int) -> float | Exception:
        return RuntimeError("out of memory") if (trial, updates) == (2, 200) else 1.0

    study = drive(config, ScriptedSlots(config, script))
    assert [t.state for t in study.trials()] == ["complete", "complete", "failed", "complete"]
    assert "out of memory" in study.trials()[2].attrs["failure"]


def test_a_study_in_which_nothing_works_stops(workdir: Path):
    config = scripted(workdir)
    slots = ScriptedSlots(config, lambda trial, seed, updates: RuntimeError("broken"))
    with pytest.raises(RuntimeError, match=r"3 packs in a row failed, .*broken"):
        drive(config, slots)
    assert len(slots.calls) == 3
    # mended, the study goes on with the same trials
    study = drive(config, ScriptedSlots(config, lambda trial, seed, updates: 1.0), resume=True)
    assert [(t.number, t.value) for t in study.trials()] == [(i, 1.0) for i in range(4)]


def test_a_learner_that_dies_is_asked_again_with_the_same_pack(workdir: Path):
    from ray.exceptions import ActorDiedError

    deaths = Counter[int]()

    def script(trial: int, seed: int, updates: int) -> float | Exception:
        if trial == 1 and deaths[updates] < 1:
            deaths[updates] += 1
            return ActorDiedError()
        return float(updates)

    config = scripted(workdir, pruner={"name": "none"}, num_trials=2)
    slots = ScriptedSlots(config, script)
    assert [t.value for t in drive(config, slots).trials()] == [300.0, 300.0]
    assert sum(deaths.values()) == 3


def test_trials_that_overtake_each_other_are_all_recorded(workdir: Path):
    """Two slots, answered last in, first out: the later trial ends first."""
    config = scripted(workdir, pruner={"name": "none"})
    study = drive(config, ScriptedSlots(config, lambda trial, seed, updates: float(trial), size=2))
    assert [t.value for t in study.trials()] == [0.0, 1.0, 2.0, 3.0]
    metrics = [r for r in records(study.folder, "study") if r["type"] == "metrics" and "trial/value" in r["values"]]
    assert [r["step"] for r in metrics] == [0, 1, 2, 3]  # ascending, else the tracker takes them for repetitions
    assert [r["values"]["trial/number"] for r in metrics] != [0, 1, 2, 3]
    assert {r["values"]["trial/value"] for r in metrics} == {0.0, 1.0, 2.0, 3.0}


def test_reports_are_handled_while_the_sampler_thinks(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    """Its choice of trial 2 is made only when the study has been told how trial 1 went on."""
    config = scripted(workdir, num_trials=4, sampler={"name": "gp", "seed": 0}, pruner={"name": "none"})
    handled = threading.Event()
    propose, report = Study.propose, Study.report

    def late(study: Study) -> Callable[[], Proposal] | None:
        choose, late = propose(study), len(study.trials()) == 2
        if choose is None:
            return None

        def think() -> Proposal:
            assert not late or handled.wait(30), "the driver waited for the sampler"
            return choose()

        return think

    def seen(study: Study, number: int, step: int, value: float) -> None:
        report(study, number, step, value)
        if study.trials()[0].finished is not None and number == 1:
            handled.set()

    monkeypatch.setattr(Study, "propose", late)
    monkeypatch.setattr(Study, "report", seen)
    slots = AlternatingSlots(config, lambda trial, seed, updates: float(trial), size=2)
    trials = drive(config, slots).trials()
    assert [t.value for t in trials] == [0.0, 1.0, 2.0, 3.0]
    assert handled.is_set()


class AlternatingSlots(ScriptedSlots):
    """Slots take turns, and the first is ahead by one call."""

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        self._under_way.reverse()
        return super().wait(timeout)


def test_stages_of_a_searched_dynamics_setting_do_not_mix(workdir: Path):
    space = {"method.dynamics.learning_rate": {"type": "categorical", "choices": [0.002, 0.003]}}
    config = scripted(workdir, space=space, num_trials=2, enqueue=[
        {"method.dynamics.learning_rate": 0.002}, {"method.dynamics.learning_rate": 0.003}])  # fmt: skip
    slots = ScriptedSlots(config, lambda trial, seed, updates: 1.0, size=2)
    study = drive(config, slots)
    assert [call for call in slots.calls if call[0] == "build_stages"] == [("build_stages", "dynamics")] * 2
    steps: dict[str, list[int]] = {}
    for record in records(study.folder, "study"):
        for name in record.get("values", {}):
            if name.endswith("/train_loss"):
                steps.setdefault(name, []).append(record["step"])
    assert list(steps.values()) == [[0, 1, 2], [0, 1, 2]]


def too_large(largest: int) -> Any:
    """A learner that more than so many members make run out of memory."""

    def advance(self: ScriptedSlots, pack: PackSpec, dropped: Any) -> Any:
        if len([run for run in pack.runs if run.run_key not in dropped]) > largest:
            raise OutOfMemory("tried to allocate 9 GB")
        return ScriptedSlots.advance(self, pack, dropped)

    return advance


def test_a_pack_that_does_not_fit_is_divided_until_it_does(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    enqueue = [{"method.eta": eta, "method.rollout_length": 1} for eta in (0.1, 0.2, 0.3, 0.4)]  # one pack key
    config = scripted(workdir, "num_seeds=5", num_trials=4, pruner={"name": "none"}, enqueue=enqueue)
    slots = ScriptedSlots(config, lambda trial, seed, updates: float(10 * trial + seed))
    monkeypatch.setattr(slots, "advance", too_large(2).__get__(slots))
    packing = Packing(config_folder(config) / "packing.json", 10)
    study = drive(config, slots, packing=packing)
    assert [(t.state, t.value) for t in study.trials()] == [("complete", 10.0 * i + 2) for i in range(4)]
    packs = [PackSpec.load(study.folder, path.parent.name) for path in study.folder.glob("packs/*/pack.json")]
    trained = [pack for pack in packs if not pack.children]
    runs = Counter(run.run_key for pack in trained for run in pack.runs)
    assert runs == Counter(f"t{trial:04d}-s{seed}" for trial in range(4) for seed in range(5))  # each once
    # 10 -> 5 -> 3 -> 2; what was not begun by then was divided before it was tried, and later packs are made small
    failed = [calls for calls in slots.calls if len(PackSpec.load(study.folder, calls[1]).runs) > 2]
    assert len(failed) == 3
    later = [pack for pack in packs if {run.trial for run in pack.runs} <= {2, 3}]
    assert all(len(pack.runs) <= 2 and pack.parent is None for pack in later)
    assert json.loads(packing.path.read_text())["limits"] == {packs[0].key: 2}  # type: ignore[union-attr]


def test_a_run_that_does_not_fit_alone_fails_with_one_sentence(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    config = scripted(workdir, num_trials=1, space={})
    slots = ScriptedSlots(config, lambda trial, seed, updates: 1.0)
    monkeypatch.setattr(slots, "advance", too_large(0).__get__(slots))
    with pytest.raises(UserError, match=r"run t0000-s0 does not fit the memory even alone .*; lower method.batch_size"):
        drive(config, slots)


@pytest.mark.parametrize("written", [3, 5, 6])  # files of packs until the kill: a child, its parent, a grandchild
def test_a_driver_killed_while_it_divides_a_pack_loses_and_doubles_nothing(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, written: int
):
    def study_of(resume: bool = False) -> Study:
        config = scripted(workdir, "num_seeds=4", num_trials=2, pruner={"name": "none"})
        slots = ScriptedSlots(config, lambda trial, seed, updates: float(trial + seed))
        monkeypatch.setattr(slots, "advance", too_large(1).__get__(slots))
        return drive(config, slots, resume, Packing(config_folder(config) / "packing.json", 4))

    with monkeypatch.context() as patch:
        patch.setattr(PackSpec, "save", dying(PackSpec.save, written))
        with pytest.raises(Killed):
            study_of()
    assert [(t.state, t.value) for t in study_of(resume=True).trials()] == [("complete", 1.5), ("complete", 2.5)]


@pytest.mark.parametrize(("moment", "call"), [("ask", 2), ("set_attr", 1), ("set_attr", 2), ("set_attr", 4)])
def test_a_driver_killed_while_it_makes_a_pack_of_several_trials_makes_it_again(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, moment: str, call: int
):
    enqueue = [{"method.eta": eta, "method.rollout_length": 1} for eta in (0.1, 0.2, 0.3, 0.4, 0.5)]
    words = ("num_seeds=1", "compute.runs_per_pack=3")
    config = scripted(workdir, *words, num_trials=5, pruner={"name": "none"}, enqueue=enqueue)

    def study_of(resume: bool = False) -> tuple[Study, ScriptedSlots]:
        slots = ScriptedSlots(config, lambda trial, seed, updates: float(trial))
        return drive(config, slots, resume), slots

    with monkeypatch.context() as patch:
        patch.setattr(Study, moment, dying(getattr(Study, moment), call))
        with pytest.raises(Killed):
            study_of()
    study, slots = study_of(resume=True)
    assert [t.value for t in study.trials()] == [0.0, 1.0, 2.0, 3.0, 4.0]
    # every run is trained once, in the packs of an undisturbed study
    packs = [PackSpec.load(study.folder, pack) for pack in dict.fromkeys(pack for _, pack in slots.calls)]
    if moment == "ask" or call < 4:
        assert [[run.trial for run in pack.runs] for pack in packs] == [[0, 1, 2], [3, 4]]
    assert Counter(pack for _, pack in slots.calls).total() == 3 * len(packs)


def pruning(workdir: Path, name: str, resume: bool = False) -> Study:
    """A study of three trials; the last is pruned."""
    pruner = {"name": "median", "warmup_fraction": 0.0, "startup_trials": 1}
    config = scripted(workdir, "num_seeds=1", name=name, num_trials=3, pruner=pruner)
    slots = ScriptedSlots(config, lambda trial, seed, updates: (9.0 if trial < 2 else 2.0) + updates / 100 + trial)
    return drive(config, slots, resume)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = pruning(copied(base, tmp_path_factory), "undisturbed")
    assert [t.state for t in study.trials()] == ["complete", "complete", "pruned"]
    return study


@pytest.mark.parametrize(
    ("moment", "call"),
    [("ask", 2), ("set_attr", 1), ("set_attr", 5), ("report", 7), ("should_prune", 3), ("tell", 1), ("tell_pruned", 1),
     ("metrics", 1), ("metrics", 5)],
)  # fmt: skip
def test_a_driver_killed_anywhere_leaves_a_study_that_ends_the_same(
    workdir: Path, undisturbed: Study, monkeypatch: pytest.MonkeyPatch, moment: str, call: int
):
    """The driver dies right after it has written something down; a new one with new learners goes on."""
    owner: Any = RunSpool if moment == "metrics" else Study
    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, dying(getattr(owner, moment), call))
        with pytest.raises(Killed):
            pruning(workdir, "killed")
    killed = pruning(workdir, "killed", resume=True)

    def shown(study: Study) -> list[Any]:
        return [(t.number, t.state, t.value, t.params, t.intermediate) for t in study.trials()]

    assert shown(killed) == shown(undisturbed)
    assert points(killed.folder, "study") == points(undisturbed.folder, "study")


def test_a_run_whose_driver_died_before_it_could_be_dropped_is_ended(workdir: Path):
    """The study knows that the trial was pruned, but its learner went down with the driver."""
    config = scripted(workdir, num_trials=1)
    folder = workdir / "studies" / "s"
    with Study.create(folder, config.study_spec()) as study:
        ticket = study.ask()
        assert ticket is not None
        study.report(ticket.number, 100, 1.0)
        study.tell_pruned(ticket.number)
    for seed in range(2):
        with RunSpool(folder / "spool", f"t0000-s{seed}") as spool:
            spool.start(RunInfo("t000"))
            spool.metrics(50, {"train/x": 1.0})
    for _ in range(2):  # the second time there is nothing left to do
        drive(config, ScriptedSlots(config, lambda trial, seed, updates: 1.0), resume=True)
        for seed in range(2):
            kinds = [record["type"] for record in records(folder, f"t0000-s{seed}")]
            assert kinds == ["start", "metrics", "tags", "end"]
        assert records(folder, "t0000-s1")[-1]["status"] == "KILLED"
