"""Runs that learn from pools of synthetic rows: made by workers or here, stopped anywhere, pruned with one ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agents.method import Job, RolloutResult, load_method
from benchmarks.kill_tests import DATASET
from orchestrator.artifacts import ArtifactStore
from orchestrator.calibration import episode_facts, measure, pack_model, ring_bytes
from orchestrator.config import ComputeConfig, load_config, run_config, to_dict
from orchestrator.learner import LearnerProcess, PackSpec, RunSpec
from orchestrator.plan import expected_epochs
from orchestrator.workers import Workers
from tests.orchestrator.studies import IN_PROCESS, copied, dataset_of, make_learner, points, records, same, train
from tests.orchestrator.test_learner import Stop, advance_to_the_end, assert_same_end, stop_in_epoch

SETTINGS: dict[str, Any] = {
    "method": {
        "name": "td3_bc", "hidden": [16], "batch_size": 32, "num_updates": 120, "updates_per_epoch": 20,
        "synthetic": {"source": "diffusion", "num_trajectories": 80, "refresh_every": 40},
        "diffusion": {
            "length": 6, "windows": "whole", "features": 16, "num_blocks": 2, "num_updates": 20, "batch_size": 8,
        },
        # a terminal is there or not: rounding, which packs of other sizes differ by, can decide
        "sampler": {"num_steps": 16, "terminals": "none"},
    },
    "dataset": DATASET, "evaluation": {"every_epochs": 3, "episodes": 1},
}  # fmt: skip
"""Six epochs with refreshes at the beginnings of numbers 0, 2 and 4: the pool of number 4 is under way from 2 on."""


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the diffusion model."""
    folder = copied(base, tmp_path_factory)
    config = load_config([SETTINGS, {"workdir": str(folder)}], [])
    assert LearnerProcess(IN_PROCESS).build_stages([to_dict(config)], "trajectories", dataset_of(config)) == [None]
    return folder


def pack_of(folder: Path, name: str, *overrides: str, runs: int = 2) -> PackSpec:
    config = load_config([SETTINGS, {"workdir": str(folder)}], list(overrides))
    specs = []
    for trial in range(runs):
        # so weak that rounding is not magnified: longer steps than the way to the policy's mode are chaotic
        run = run_config(config, {"method.guidance.coef": 0.05 * (1 + trial)}, seed=trial)
        specs.append(RunSpec(f"t{trial:04d}-s{trial}", trial, trial, to_dict(run), {"study": name}))
    return PackSpec("pack", str(folder / "studies" / name), tuple(specs))


@pytest.fixture(scope="module")
def undisturbed(prepared: Path) -> PackSpec:
    """The pack of two, trained to its end in one process."""
    pack = pack_of(prepared, "undisturbed")
    train(pack)
    return pack


class Beside(Workers):
    """Nobody elsewhere, but it looks as if; counts what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def rolls_out_elsewhere(self, device: Any) -> bool:
        return True

    def start_rollouts(self, jobs: Sequence[Job], model: Any) -> Callable[[], list[RolloutResult]]:
        self.asked.append(len(jobs))
        return lambda: [job.run(model) for job in jobs]


def test_metrics_of_pools(undisturbed: PackSpec) -> None:
    logged = points(undisturbed.study_folder, "t0001-s1")
    transitions = {step: value for (key, step), value in logged.items() if key == "synthetic/transitions"}
    assert sorted(transitions) == [20, 100]  # the first epoch's, and that of the refresh at update 80
    assert transitions[100] == 80 * 5
    stale = {step: value for (key, step), value in logged.items() if key == "synthetic/staleness_updates"}
    assert stale == {100: 60.0, 120: 80.0}  # of the policy of update 40
    times = [r["values"] for r in records(undisturbed.study_folder, "t0001-s1") if "values" in r]
    computing = [v["time/rollout_computing_seconds"] for v in times if "time/rollout_computing_seconds" in v]
    assert [c > 0 for c in computing] == [True, False, False, False, True, False]


def test_two_workers_give_the_results_of_none(prepared: Path, undisturbed: PackSpec, ray_cluster: None) -> None:
    import ray

    pack, workers = pack_of(prepared, "workers"), Workers(2, 0)
    try:
        train(pack, workers=workers)
    finally:
        for actor in workers._rollout_workers:
            ray.kill(actor)
    assert_same_end(undisturbed, pack)
    assert points(pack.study_folder, "t0000-s0") == points(undisturbed.study_folder, "t0000-s0")


@pytest.mark.parametrize("workers", [Workers, Beside])
@pytest.mark.parametrize("epoch", [0, 2, 3, 4, 5])
def test_a_run_stopped_in_any_epoch_ends_like_an_undisturbed_one(
    prepared: Path, undisturbed: PackSpec, epoch: int, workers: type[Workers]
) -> None:
    pack = pack_of(prepared, f"stopped{epoch}{workers.__name__}")
    learner = make_learner(pack, IN_PROCESS, workers())
    stop_in_epoch(learner, epoch)
    with pytest.raises(Stop):
        advance_to_the_end(learner)
    again = make_learner(pack, IN_PROCESS, workers())
    under_way = epoch in (3, 4)  # asked for in epoch 2, taken in by epoch 4, after which nothing is kept
    assert (again.method.jobs_ahead is not None) == under_way
    assert (again._rollouts_ahead is not None) == (under_way and workers is Beside)
    advance_to_the_end(again)
    assert_same_end(undisturbed, pack)


@pytest.mark.parametrize("workers", [Workers, Beside])
def test_a_run_pruned_with_a_pool_under_way_leaves_the_others_alone(prepared: Path, workers: type[Workers]) -> None:
    whole, thinned = (pack_of(prepared, f"{name}{workers.__name__}", runs=3) for name in ("whole", "thinned"))
    train(whole)
    learner = make_learner(thinned, IN_PROCESS, workers())
    assert learner.advance().updates == 60
    assert learner.method.jobs_ahead is not None
    report = learner.advance(["t0001-s1"])
    assert report.finished
    finals = [make_learner(pack).method.select([m]) for pack, m in ((whole, 2), (thinned, 1))]
    rings = [method.replay.member_rows(0) for method in finals]  # type: ignore[attr-defined]
    assert rings[0].shape == rings[1].shape
    assert abs(rings[0] - rings[1]).max() < 1e-2
    values = [points(pack.study_folder, "t0002-s2")["synthetic/reward_mean", 100] for pack in (whole, thinned)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_a_pack_of_one_and_a_synchronous_run(prepared: Path, undisturbed: PackSpec) -> None:
    alone = pack_of(prepared, "alone", runs=1)
    train(alone)
    mine, theirs = (points(p.study_folder, "t0000-s0") for p in (alone, undisturbed))
    assert mine.keys() == theirs.keys()
    assert mine == pytest.approx(theirs, rel=0.05, abs=0.05)
    at_once = pack_of(prepared, "synchronous", "method.synthetic.synchronous=true", runs=1)
    train(at_once)
    stale = {s: v for (k, s), v in points(at_once.study_folder, "t0000-s0").items() if k.endswith("staleness_updates")}
    assert stale == {60: 20.0, 80: 40.0, 100: 20.0, 120: 40.0}
    checkpoints = [make_learner(p).method.state_dict() for p in (alone, at_once)]
    assert not same(checkpoints[0]["updater"], checkpoints[1]["updater"])


def test_a_calibration_counts_refreshes_and_pools(prepared: Path) -> None:
    config = load_config([SETTINGS, {"workdir": str(prepared)}], [])
    dataset = dataset_of(config)
    assert ring_bytes(config, dataset) == 80 * 5 * (4 * (2 * 3 + 1 + 2) + 2)
    measured = measure(config, dataset, ComputeConfig(device="cpu"), Workers(), [1], 1.0, 1e12, 0)
    (pack,) = measured.packs
    assert pack.rollout_seconds > 0
    facts = episode_facts(config, dataset)
    often = load_config([SETTINGS, {"workdir": str(prepared)}], ["method.synthetic.refresh_every=20"])
    costs = [pack_model(c, dataset, measured, facts).seconds(1) for c in (config, often)]
    assert costs[1] - costs[0] == pytest.approx(3 * pack.rollout_seconds, rel=0.05)  # six instead of three


def test_a_plan_counts_the_updates_of_a_diffusion_model_that_is_not_there_yet(base: Path) -> None:
    config = load_config([SETTINGS, {"workdir": str(base)}], ["method.diffusion.num_updates=123456"])
    measured = measure(config, dataset_of(config), ComputeConfig(device="cpu"), Workers(), [1], 0.1, 1e12, 0)
    (stage,) = load_method("td3_bc").stages(config.method).values()
    assert stage.epoch_updates is not None
    epochs, _ = expected_epochs(stage, ArtifactStore(base / "artifacts"), "hash")
    assert (epochs - 1) * stage.epoch_updates < 123_456 <= epochs * stage.epoch_updates
    assert 0 < measured.stages["trajectories"].epoch_seconds / stage.epoch_updates < 1
