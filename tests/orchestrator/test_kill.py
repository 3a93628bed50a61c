"""SIGKILL in mid-training: the study ends with the same trials, values and policies, and MLflow has all of it once.

Rollout workers and evaluators alone are killed in test_workers.py; whole sweeps with Ray, here, are slow, and
`python -m benchmarks.kill_tests` does the same at random moments.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_tests import (
    CASES,
    RAY,
    SETTINGS,
    STUDY,
    TITLES,
    Remains,
    Sweep,
    compare,
    descendants,
    kill_all,
    logged_points,
    wait_until,
)
from orchestrator.cluster import InlineSlots, RaySlots
from orchestrator.tracking import Tracker
from tests.orchestrator.studies import configured, copied, dataset_of, drive

VGDF: dict[str, Any] = {
    **SETTINGS,
    "dataset": "online/Pendulum-v1",
    "method": {
        "name": "vgdf",
        "target": "offsweep/Pendulum-gravity-0.5-v1",
        "hidden": [16, 16],
        "batch_size": 8,
        "num_updates": 200,
        "updates_per_epoch": 50,
        "updates_per_target_step": 2,
        "start_gate": 60,
        "dynamics": {
            "ensemble_size": 2,
            "hidden": [16],
            "weight_decay": [0.0, 0.0],
            "refit_every": 25,
            "batch_size": 16,
        },
    },
    "study": {**SETTINGS["study"], "space": {"method.keep_fraction": {"type": "float", "low": 0.1, "high": 0.5}}},
}


def tracked(workdir: Path) -> None:
    """Send what a study has spooled to MLflow."""
    folder = workdir / "studies" / STUDY
    tracker = Tracker(f"sqlite:///{workdir / 'mlflow.db'}", STUDY, folder / "spool", folder / "tracker.json")
    assert tracker.drain(60.0), tracker.status()


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Remains:
    workdir = copied(base, tmp_path_factory)
    config = configured(workdir)
    drive(config, InlineSlots(config.compute, dataset_of(config)))
    tracked(workdir)
    return Remains.of(workdir, STUDY)


def of_trainings(remains: Remains) -> Remains:
    """Without the study's own run, of which a sweep writes more than a bare driver."""

    def kept(counter: Counter[Any]) -> Counter[Any]:
        return Counter({key: n for key, n in counter.items() if key[0] != "study"})

    values = {key: value for key, value in remains.values.items() if key[0] != "study"}
    runs, params, points = kept(remains.runs), kept(remains.params), kept(remains.points)
    return Remains(remains.trials, remains.policies, runs, params, points, values)


def assert_equal(undisturbed: Remains, killed: Remains) -> None:
    result = compare(undisturbed, killed)
    assert result.equal, result
    assert (len(killed.trials), len(killed.policies)) == (3, 6)


# a checkpoint every epoch, and none before the end
@pytest.mark.parametrize("minutes", [0.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_killed_learner_takes_its_pack_up_again(
    workdir: Path, undisturbed: Remains, ray_cluster: None, minutes: float
):
    import ray

    config = configured(workdir, f"compute.checkpoint_minutes={minutes}")
    slots = RaySlots(config.compute, dataset_of(config), 1, 0)
    [before] = slots.pids()

    def kill() -> None:
        wait_until("training", lambda: logged_points(workdir) >= 9)  # in the second trial
        os.kill(before["learner"][0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        drive(config, slots)
        thread.join()
        assert slots.pids() != [before]
    finally:
        ray.kill(slots._actors[0])
    tracked(workdir)
    assert_equal(undisturbed, Remains.of(workdir, STUDY))


def test_a_killed_sweep_ends_the_same_when_it_is_resumed(workdir: Path, undisturbed: Remains):
    """The whole program, without Ray."""
    sweep = Sweep(workdir, {})
    sweep.wait_for_training(9)
    sweep.kill()
    killed = Remains.of(workdir, STUDY)
    assert len(killed.policies) < 6, "the study had ended before the kill"
    resumed = Sweep(workdir, {}, resume=True).finish()
    assert_equal(of_trainings(undisturbed), of_trainings(resumed))
    assert resumed.runs["study", "FINISHED", ""] == 1
    assert max(resumed.points.values()) == 1


@pytest.fixture(scope="module")
def undisturbed_sweep(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Remains:
    return Sweep(copied(base, tmp_path_factory), RAY).finish()


@pytest.fixture(scope="module")
def undisturbed_vgdf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Remains:
    return Sweep(copied(base, tmp_path_factory), RAY, settings=VGDF).finish()


def killed_sweep(workdir: Path, case: str, settings: dict[str, Any]) -> Remains:
    """What a sweep leaves of which a process is killed in its second trial."""
    sweep = Sweep(workdir, RAY, settings=settings)
    sweep.wait_for_training(9)
    if case in TITLES:
        assert sweep.kill_worker(case)
        return sweep.finish()
    sweep.kill()
    return Sweep(workdir, RAY, resume=True, settings=settings).finish()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_sweep_with_a_process_killed_ends_the_same(workdir: Path, undisturbed_sweep: Remains, case: str):
    assert_equal(undisturbed_sweep, killed_sweep(workdir, case, SETTINGS))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_so_does_one_whose_runs_step_environments(workdir: Path, undisturbed_vgdf: Remains, case: str):
    """What the killed process knew were the states of environments, two replays and an ensemble amid its refits."""
    assert undisturbed_vgdf.values["t0002-s0", "train/gate/accepted", 200] > 0
    assert undisturbed_vgdf.values["t0002-s0", "dynamics/epochs", 200] > 0
    assert_equal(undisturbed_vgdf, killed_sweep(workdir, case, VGDF))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_ray_workers_do_not_outlive_their_driver(workdir: Path):
    """Else an orphaned learner would write beside the one that resumes its pack."""
    sweep = Sweep(workdir, RAY)
    sweep.wait_for_training(3)
    workers = [pid for pid, title in descendants(sweep.process.pid).items() if title.startswith((*TITLES.values(),))]
    assert workers
    below = sweep.kill(with_ray=False)
    try:
        wait_until("the end of the workers", lambda: not any(map(alive, workers)), 5.0)
    finally:
        kill_all(below)


def test_the_comparison_sees_what_is_lost_doubled_or_different(undisturbed: Remains):
    point = ("t0000-s0", "eval/score", 100)
    assert compare(undisturbed, undisturbed).equal
    lost = replace(undisturbed, points=undisturbed.points - Counter([point]))
    assert (compare(undisturbed, lost).lost, compare(undisturbed, lost).duplicated) == (1, 0)
    doubled = replace(undisturbed, points=undisturbed.points + Counter([point]))
    assert (compare(undisturbed, doubled).lost, compare(undisturbed, doubled).duplicated) == (0, 1)
    other = replace(undisturbed, values={**undisturbed.values, point: 0.0})
    assert len(compare(undisturbed, other).different) == 1
    without_trial = replace(undisturbed, trials={k: v for k, v in undisturbed.trials.items() if k})
    assert compare(undisturbed, without_trial).lost == 1
    other_policy = replace(undisturbed, policies={**undisturbed.policies, "t0000-s0": "other"})
    assert not compare(undisturbed, other_policy).equal
