"""The learner: stopped anywhere it ends as if undisturbed; runs that end early leave the others alone."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.dynamics import DynamicsConfig
from agents.dynamics_stage import ensemble_stage
from agents.method import load_method
from agents.model_based import ModelBasedSAC
from benchmarks.kill_tests import DATASET, policy_digest
from envs.errors import UserError
from envs.policies import load_policy
from envs.registry import load_dataset
from orchestrator.artifacts import ArtifactStore, load_tensors, stage_key
from orchestrator.cluster import InlineSlots
from orchestrator.config import ComputeConfig, load_config, run_config, to_dict
from orchestrator.learner import Learner, LearnerProcess, PackSpec, RunSpec
from orchestrator.workers import Workers
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


def spoil_member_in_epoch(learner: Learner, epoch: int) -> None:
    """Make the second member's policy not a number at the end of an epoch, behind the last look at its statistics."""
    train_epoch = learner.method.train_epoch

    def spoiling(number: int) -> Any:
        metrics = train_epoch(number)
        if number == epoch:
            actor = learner.method.sac.actor  # type: ignore[attr-defined]
            actor.blocks(actor.flat)[0][1] = math.nan
            del learner.method.train_epoch  # the method that goes on with the other member has its own
        return metrics

    learner.method.train_epoch = spoiling  # type: ignore[method-assign, assignment]


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


def model_free_pack(workdir: Path, method: str, name: str) -> PackSpec:
    """Two runs; an odd number of updates an epoch, so that TD3+BC's policy moves at other places in every epoch."""
    settings = {
        "method": {"name": method, "hidden": [16, 16], "batch_size": 32, "num_updates": 100, "updates_per_epoch": 25},
        "dataset": DATASET, "workdir": str(workdir), "evaluation": {"every_epochs": 2, "episodes": 2},
    }  # fmt: skip
    runs = []
    for trial, lr in enumerate((1e-3, 3e-3)):
        config = run_config(load_config([settings], []), {"method.actor_lr": lr}, seed=trial)
        runs.append(RunSpec(f"t{trial:04d}-s{trial}", trial, trial, to_dict(config), {"study": name}))
    return PackSpec("pack", str(workdir / "studies" / name), tuple(runs))


@pytest.mark.parametrize("method", ["td3_bc", "iql", "edac"])
def test_a_method_without_a_model_is_resumed_and_leaves_policies_of_the_environment(workdir: Path, method: str):
    straight, stopped = (model_free_pack(workdir, method, name) for name in ("straight", "stopped"))
    train(straight)
    learner = make_learner(stopped, IN_PROCESS)
    stop_in_epoch(learner, 3)
    with pytest.raises(Stop):
        advance_to_the_end(learner)
    assert train(stopped).updates == 100
    assert_same_end(straight, stopped)

    policy = load_policy(Path(straight.study_folder) / "runs" / "t0001-s1" / "policy.npz")
    kind = {"td3_bc": "tanh", "iql": "tanh", "edac": "squashed"}[method]
    assert (policy.kind, policy.observation_dim, policy.action_dim) == (kind, 3, 1)
    obs = load_dataset(DATASET, workdir).observations
    assert np.abs(policy.act(obs, np.random.default_rng(0))).max() <= 2.0  # Pendulum's torque
    data = make_learner(straight, IN_PROCESS).method.data  # type: ignore[attr-defined]
    standardised = data.observations.mean(0).abs().max() < 1e-3
    assert bool(standardised) == (method == "td3_bc")


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
    spoil_member_in_epoch(learner, 1)
    report = learner.advance()
    assert report.diverged == {"t0001-s1": 100}
    assert report.evaluations["t0001-s1"] == []
    assert [e.updates for e in learner.advance().evaluations["t0000-s0"]] == [100, 200]


class Elsewhere(Workers):
    """Stands for evaluators that are as slow as may be: returns are there when they are waited for.

    Args:
        broken: the numbers, from 0, of evaluations at which the second policy's returns are not a number.
    """

    def __init__(self, broken: Sequence[int] = ()) -> None:
        super().__init__()
        self.broken = broken
        self.started = self.collected = self.most_pending = 0

    @property
    def evaluates_elsewhere(self) -> bool:
        return True

    def start_evaluation(self, policies: Any, env_id: str, seeds: Sequence[int]) -> Callable[[], Any]:
        number, self.started = self.started, self.started + 1
        self.most_pending = max(self.most_pending, self.started - self.collected)
        collect = super().start_evaluation(policies, env_id, seeds)

        def late() -> Any:
            returns = collect()
            self.collected += 1
            if number in self.broken:
                returns[1] = returns[1] * math.nan
            return returns

        return late


EVERY_EPOCH = ("evaluation.every_epochs=1", "method.num_updates=300")  # six evaluations


@pytest.fixture(scope="module")
def evaluated_at_once(base: Path, tmp_path_factory: pytest.TempPathFactory) -> PackSpec:
    """The pack of two, evaluated after each of its six epochs, which wait for it."""
    pack = make_pack(copied(base, tmp_path_factory), TWO, *EVERY_EPOCH)
    train(pack)
    return pack


def test_training_goes_on_while_evaluations_are_pending(workdir: Path, evaluated_at_once: PackSpec):
    pack, workers = make_pack(workdir, TWO, *EVERY_EPOCH), Elsewhere()
    learner = make_learner(pack, workers=workers)
    seen = []
    while not (report := learner.advance()).finished:
        seen.append((report.updates, [e.updates for e in report.evaluations["t0000-s0"]]))
    assert seen == [(50, []), (100, []), (150, [50]), (200, [50, 100]), (250, [50, 100, 150])]
    assert [e.updates for e in report.evaluations["t0001-s1"]] == [50, 100, 150, 200, 250, 300]
    assert (workers.most_pending, workers.collected) == (3, 6)
    assert_same_end(evaluated_at_once, pack)
    # in the order of updates, as the tracker needs it, although the training was further
    steps = [r["step"] for r in records(pack.study_folder, "t0000-s0") if "eval/score" in r.get("values", {})]
    assert steps == [50, 100, 150, 200, 250, 300]


def test_any_number_of_evaluators_gives_the_same_points_and_results(
    workdir: Path, evaluated_at_once: PackSpec, ray_cluster: None
):
    import ray

    for number in (1, 2):
        pack, workers = make_pack(workdir, TWO, *EVERY_EPOCH, name=f"evaluators{number}"), Workers(0, number)
        try:
            train(pack, workers=workers)
        finally:
            for actor in workers._evaluators:
                ray.kill(actor)
        assert_same_end(evaluated_at_once, pack)
        logged = [r["values"] for r in records(pack.study_folder, "t0000-s0") if "values" in r]
        assert len([v for v in logged if v.get("time/evaluation_wait_seconds", -1.0) >= 0.0]) == 6


@pytest.mark.parametrize("epoch", [1, 3, 5, 6])
def test_pending_evaluations_outlive_a_kill(workdir: Path, evaluated_at_once: PackSpec, epoch: int):
    """With the last epoch of all, the kill comes between the last checkpoint and the end."""
    pack = make_pack(workdir, TWO, *EVERY_EPOCH)
    learner = make_learner(pack, workers=Elsewhere())
    if epoch < 6:
        stop_in_epoch(learner, epoch)
    else:
        learner._log_waiting = _stop_at(learner, 300)  # type: ignore[method-assign]
    with pytest.raises(Stop):
        advance_to_the_end(learner)
    again = make_learner(pack, workers=Elsewhere())
    assert [p.updates for p in again._pending] == [50 * e for e in (epoch - 1, epoch) if e]
    advance_to_the_end(again)
    assert_same_end(evaluated_at_once, pack)
    # also where nobody evaluates elsewhere any more
    advance_to_the_end(make_learner(pack, workers=Workers()))
    assert_same_end(evaluated_at_once, pack)


def _stop_at(learner: Learner, updates: int) -> Callable[[], None]:
    log = learner._log_waiting

    def dying() -> None:
        if learner.updates == updates:
            raise Stop
        log()

    return dying


def test_an_evaluation_that_is_not_finite_marks_the_run_at_its_step(workdir: Path):
    pack = make_pack(workdir, TWO, *EVERY_EPOCH)
    learner = make_learner(pack, workers=Elsewhere(broken=[1]))
    while not (report := learner.advance()).finished and not report.diverged:
        pass
    assert (report.updates, report.diverged) == (200, {"t0001-s1": 100})
    assert [e.updates for e in report.evaluations["t0001-s1"]] == [50]
    assert learner.alive == ["t0000-s0"]
    advance_to_the_end(learner)
    last = records(pack.study_folder, "t0001-s1")[-2:]
    assert (last[0]["tags"], last[1]["status"]) == ({"outcome": "diverged"}, "FAILED")
    evaluated = [s for k, s in points(pack.study_folder, "t0001-s1") if k == "eval/score"]
    assert evaluated == [50, 100]
    assert [e.updates for e in learner.evaluations["t0000-s0"]] == [50, 100, 150, 200, 250, 300]


def test_a_run_that_diverges_in_training_keeps_the_evaluations_before(workdir: Path):
    """Its spool ends with it, so they are waited for; what they show comes first."""
    spoiled = {}
    for name, workers in (("at-once", Workers()), ("late", Elsewhere()), ("shown", Elsewhere(broken=[1]))):
        pack = make_pack(workdir, TWO, *EVERY_EPOCH, name=name)
        learner = make_learner(pack, workers=workers)
        spoil_member_in_epoch(learner, 2)
        advance_to_the_end(learner)
        spoiled[name] = (learner.diverged, [e.updates for e in learner.evaluations["t0001-s1"]])
        assert records(pack.study_folder, "t0001-s1")[-1]["status"] == "FAILED"
    assert spoiled["at-once"] == spoiled["late"] == ({"t0001-s1": 150}, [50, 100])
    assert spoiled["shown"] == ({"t0001-s1": 100}, [50])


def test_evaluations_of_a_pruned_run_are_not_taken_in(workdir: Path):
    pack, workers = make_pack(workdir, TWO, *EVERY_EPOCH), Elsewhere()
    learner = make_learner(pack, workers=workers)
    for _ in range(3):
        learner.advance()
    report = learner.advance(["t0001-s1"])
    assert [e.updates for e in report.evaluations["t0001-s1"]] == [50]
    assert learner.advance(["t0001-s1", "t0000-s0"]).finished
    assert workers.collected == 2  # nobody waits for what nobody wants
    assert records(pack.study_folder, "t0001-s1")[-1] | {"time": 0} == {"type": "end", "time": 0, "status": "KILLED"}


def test_a_learner_that_failed_in_mid_epoch_starts_from_its_checkpoint(workdir: Path, undisturbed: PackSpec):
    """What is left of it in memory has half an epoch behind it."""
    pack = make_pack(workdir, TWO)
    process = LearnerProcess(IN_PROCESS)
    dataset = dataset_of(load_config([pack.runs[0].config], []))
    process.advance(pack, [], dataset)
    assert process._learner is not None
    stop_in_epoch(process._learner, 3)
    with pytest.raises(Stop):
        process.advance(pack, [], dataset)
    assert process.advance(pack, [], dataset).finished
    assert_same_end(undisturbed, pack)


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
    assert process.build_stages([to_dict(config)], "dynamics", dataset_of(config)) == [None]
    store = ArtifactStore(workdir / "artifacts")
    dataset_hash = dataset_of(config).content_hash
    stage = load_method("ravl").stages(config.method)["dynamics"]  # type: ignore[attr-defined]
    key = stage_key(stage, dataset_hash)
    content = store.folder(stage.kind, key) / "content.pt"
    before = content.stat().st_mtime_ns
    assert process.build_stages([to_dict(config)], "dynamics", dataset_of(config)) == [None]
    assert content.stat().st_mtime_ns == before
    history = store.description(stage.kind, key)["history"]
    assert [step for step, _ in history] == sorted({step for step, _ in history})
    assert history[0][1]["train_loss"] > 0


def test_ensembles_keep_their_keys_and_a_filter_takes_the_same():
    """Stores of earlier versions stay in use."""
    key = "af787607f2596a1a"
    for config in (DynamicsConfig(), DynamicsConfig(filter="morec")):
        assert stage_key(ensemble_stage(config), "0" * 64) == key


def test_stages_built_together_are_those_built_alone(workdir: Path):
    names = ("method.dynamics.seed=7", "method.dynamics.learning_rate=0.002", "method.dynamics.learning_rate=1e30")
    configs = [configured(workdir, name) for name in names]
    dataset = dataset_of(configs[0])
    stages = [load_method("ravl").stages(config.method)["dynamics"] for config in configs]  # type: ignore[attr-defined]
    keys = [stage_key(stage, dataset.content_hash) for stage in stages]
    store, process = ArtifactStore(workdir / "artifacts"), LearnerProcess(IN_PROCESS)
    failures = process.build_stages([to_dict(config) for config in configs], "dynamics", dataset)
    assert failures[:2] == [None, None]
    assert "diverged" in str(failures[2])
    together = [(store.load("dynamics_ensemble", k), store.description("dynamics_ensemble", k)) for k in keys[:2]]
    assert not store.exists("dynamics_ensemble", keys[2])
    for config, key, (content, description) in zip(configs, keys, together, strict=False):
        shutil.rmtree(store.folder("dynamics_ensemble", key))
        assert process.build_stages([to_dict(config)], "dynamics", dataset) == [None]
        alone = store.load("dynamics_ensemble", key)
        for name, tensor in alone["tensors"].items():
            torch.testing.assert_close(content["tensors"][name], tensor, rtol=1e-3, atol=1e-5)
        expected = store.description("dynamics_ensemble", key)
        assert description["settings"] == expected["settings"]
        assert [step for step, _ in description["history"]] == [step for step, _ in expected["history"]]


def test_stages_that_do_not_fit_together_are_refused(workdir: Path):
    configs = [configured(workdir, f"method.dynamics.patience={n}", "method.dynamics.seed=9") for n in (1, 2)]
    with pytest.raises(ValueError, match="cannot be built in one go"):
        LearnerProcess(IN_PROCESS).build_stages([to_dict(c) for c in configs], "dynamics", dataset_of(configs[0]))


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
    (failure,) = LearnerProcess(IN_PROCESS).build_stages([to_dict(config)], "dynamics", dataset_of(config))
    assert "diverged" in str(failure)
    assert set((workdir / "artifacts").rglob("content.pt")) == before


def test_a_policy_of_recorded_rows_is_evaluated_in_the_environment_that_is_named(workdir: Path):
    """Zero-shot transfer: CQL learns from Pendulum's rows and is evaluated where gravity is another."""
    target = "offsweep/Pendulum-gravity-0.5-v1"
    values = []
    for name, words in (("here", []), ("there", [f"evaluation.env_id={target}"])):
        small = ["method.hidden=[8]", "method.num_actions=2", "method.batch_size=16"]
        small += ["method.num_updates=20", "method.updates_per_epoch=10", "evaluation.every_epochs=2"]
        config = load_config([], ["method=cql", f"dataset={DATASET}", f"workdir={workdir}", *small, *words])
        run = RunSpec("t0000-s0", 0, 0, to_dict(run_config(config, {}, 0)), {"study": name})
        learner = make_learner(PackSpec("pack", str(workdir / "studies" / name), (run,)))
        advance_to_the_end(learner)
        values.append(learner.evaluations["t0000-s0"][-1])
    digests = [policy_digest(workdir / "studies" / n / "runs" / "t0000-s0" / "policy.npz") for n in ("here", "there")]
    assert digests[0] == digests[1]
    assert values[0] != values[1]


def test_a_run_whose_mean_q_is_beyond_all_bounds_diverges_alone(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    pack = replace(make_pack(workdir, [({}, 0), ({}, 1)]), q_bound=3.0)
    learner = make_learner(pack)
    rewards = np.abs(dataset_of(learner.configs[0]).rewards).max()
    bound = 3.0 * float(rewards) / (1.0 - learner.configs[0].method.gamma)
    train_epoch = type(learner.method).train_epoch

    def rising(self: Any, epoch: int) -> list[dict[str, float]]:
        metrics = train_epoch(self, epoch)
        if epoch == 1:
            metrics[0]["train/q_mean"] = 1.01 * bound
            metrics[1]["train/q_mean"] = 0.99 * bound
        if epoch == 2:
            metrics[0]["train/q_mean"] = -10 * bound  # a large penalty
        return metrics

    monkeypatch.setattr(type(learner.method), "train_epoch", rising)
    while not (report := learner.advance()).finished:
        pass
    assert report.diverged == {"t0000-s0": 100}
    assert [e.updates for e in report.evaluations["t0001-s1"]] == [100, 200]
