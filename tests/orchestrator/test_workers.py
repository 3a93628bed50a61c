"""Rollout workers and evaluators: Ray actors give the numbers of the parent process, whatever happens to them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.dynamics import Ensemble
from agents.dynamics_reward import DynamicsReward
from agents.method import Job, RolloutJob, RolloutResult
from agents.rollout import Dynamics
from agents.transition_filter import FilterConfig, FilteredDynamics
from orchestrator.learner import Learner
from orchestrator.workers import GROUP_EPISODES, Workers
from tests.agents.filters import random_reward
from tests.orchestrator.studies import copied, make_learner, make_pack

SEEDS = range(10_000, 10_003)


@pytest.fixture(scope="module")
def learner(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """A pack of three, whose first epoch's rollouts make three jobs."""
    pack = make_pack(copied(base, tmp_path_factory), [({}, seed) for seed in range(3)], name="workers")
    return make_learner(pack)


def policies(learner: Learner) -> list[dict[str, np.ndarray]]:
    return [learner._policy(m) for m in range(3)]


def same_rollouts(one: Sequence[RolloutResult], other: Sequence[RolloutResult]) -> bool:
    return len(one) == len(other) and all(
        (a.members, a.statistics) == (b.members, b.statistics)
        and all(map(torch.equal, (*a.rows, *a.tags), (*b.rows, *b.tags)))
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest, ray_cluster: None) -> Iterator[Workers]:
    """Two actors of the kind that the test names: they take up the two CPUs of the tests' Ray."""
    import ray

    kind = request.param
    workers = Workers(2, 0) if kind == "rollout_workers" else Workers(0, 2)
    yield workers
    for actor in (*workers._rollout_workers, *workers._evaluators):
        ray.kill(actor)


def first_of(pool: Workers) -> Workers:
    workers = Workers()
    workers._rollout_workers, workers._evaluators = pool._rollout_workers[:1], pool._evaluators[:1]
    workers._turns = itertools.cycle(workers._evaluators)
    return workers


def evaluated(workers: Workers, learner: Learner, seeds: Sequence[int]) -> list[np.ndarray]:
    return workers.start_evaluation(policies(learner), "Pendulum-v1", seeds)()


def same_returns(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return [r.tolist() for r in one] == [r.tolist() for r in other]


rollout_workers = pytest.mark.parametrize("pool", ["rollout_workers"], indirect=True)
evaluators = pytest.mark.parametrize("pool", ["evaluators"], indirect=True)


@rollout_workers
def test_one_and_two_actors_give_the_rollouts_of_the_parent_process(learner: Learner, pool: Workers):
    jobs = learner.method.rollout_jobs(0)
    assert len(jobs) == 3
    here = Workers().rollouts(jobs, learner.method.rollout_model)
    assert len({tuple(r.rows[0][0].tolist()) for r in here}) == 3
    assert same_rollouts(here, pool.rollouts(jobs, learner.method.rollout_model))
    assert same_rollouts(here, first_of(pool).rollouts(jobs, learner.method.rollout_model))


@rollout_workers
def test_filtered_rollouts_are_those_of_the_parent_process(learner: Learner, pool: Workers):
    learned = learner.method.rollout_model
    assert isinstance(learned, Ensemble)
    plain = [job for job in learner.method.rollout_jobs(0) if isinstance(job, RolloutJob)]
    jobs = [dataclasses.replace(job, cut="drop") for job in plain]
    state = random_reward(8, learned.observation_dim, jobs[0].actor.action_dim)
    reward = DynamicsReward.from_state_dict(state, num_discriminators=3)
    dynamics = FilteredDynamics(learned, reward, FilterConfig(threshold=0.75))
    here = Workers().rollouts(jobs, dynamics)
    assert sum(r.statistics[0].cut for r in here) > 0
    assert same_rollouts(here, pool.rollouts(jobs, dynamics))
    assert same_rollouts(here, first_of(pool).rollouts(jobs, dynamics))


@rollout_workers
def test_jobs_on_a_gpu_do_not_go_to_workers(learner: Learner, pool: Workers):
    """Here a device whose tensors hold nothing plays the GPU."""

    class Stay(Exception):
        pass

    class GPUJob(RolloutJob):
        def run(self, model: Dynamics) -> RolloutResult:
            raise Stay

    fields = vars(learner.method.rollout_jobs(0)[0]) | {"starts": torch.empty((1, 5, 3), device="meta")}
    with pytest.raises(Stay):
        pool.rollouts([GPUJob(**fields)], learner.method.rollout_model)


@rollout_workers
def test_a_worker_never_uses_the_ensemble_of_an_earlier_pack(learner: Learner, pool: Workers):
    """Ensembles come and go with their packs; a new one may lie where an old one lay."""
    jobs, workers = learner.method.rollout_jobs(0), first_of(pool)
    learned = learner.method.rollout_model
    assert isinstance(learned, Ensemble)
    elites, width = learned.elites, learned.observation_dim
    weights = [{k: v * factor for k, v in learned.tensors.items()} for factor in (0.9, 1.1)]
    ensemble = Ensemble(weights[0], elites, width)
    address = id(ensemble)
    workers.rollouts(jobs, ensemble)
    del ensemble
    others = [Ensemble(weights[1], elites, width) for _ in range(1000)]
    other = next((e for e in others if id(e) == address), others[0])
    assert same_rollouts(Workers().rollouts(jobs, other), workers.rollouts(jobs, other))


def killed_in_mid_work(work: Callable[[], Any], pid: int, after: float = 0.1) -> Any:
    """Do some work while a process it needs is killed."""
    killed_at: list[float] = []

    def kill() -> None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        killed_at.append(time.monotonic())

    thread = threading.Thread(target=kill)
    thread.start()
    result = work()
    ended_at = time.monotonic()
    thread.join()
    assert killed_at[0] < ended_at, "the work was done before the kill: give it more to do"
    return result


@rollout_workers
def test_a_killed_rollout_worker_is_asked_again(learner: Learner, pool: Workers):
    jobs: list[Job] = [job for epoch in range(120) for job in learner.method.rollout_jobs(epoch)]
    pids = pool.pids()["rollout_workers"]
    here = Workers().rollouts(jobs, learner.method.rollout_model)
    there = killed_in_mid_work(lambda: pool.rollouts(jobs, learner.method.rollout_model), pids[0])
    assert same_rollouts(here, there)
    after = pool.pids()["rollout_workers"]
    assert (after[0] != pids[0], after[1]) == (True, pids[1])
    # and the restarted one goes on
    assert same_rollouts(here[:3], pool.rollouts(jobs[:3], learner.method.rollout_model))


@evaluators
def test_one_and_two_actors_give_the_evaluations_of_the_parent_process(learner: Learner, pool: Workers):
    """Also where evaluators share the episodes of a policy, the last group smaller than the others."""
    for seeds in (SEEDS, range(GROUP_EPISODES + 2)):
        here = evaluated(Workers(), learner, seeds)
        assert len({tuple(r.tolist()) for r in here}) == 3
        assert {len(r) for r in here} == {len(seeds)}
        for workers in (pool, first_of(pool)):
            assert same_returns(here, evaluated(workers, learner, seeds))


@evaluators
def test_an_evaluation_runs_while_the_caller_does_something_else(learner: Learner, pool: Workers):
    began = time.monotonic()
    seeds = range(100)
    collect = pool.start_evaluation(policies(learner), "Pendulum-v1", seeds)
    started = time.monotonic()
    there = collect()
    assert started - began < 0.5 * (time.monotonic() - began)
    assert same_returns(evaluated(Workers(), learner, seeds), there)


@evaluators
def test_a_killed_evaluator_is_asked_again(learner: Learner, pool: Workers):
    seeds = range(50)
    pids = pool.pids()["evaluators"]
    here = evaluated(Workers(), learner, seeds)
    there = killed_in_mid_work(lambda: evaluated(pool, learner, seeds), pids[0])
    assert same_returns(here, there)
    after = pool.pids()["evaluators"]
    assert (after[0] != pids[0], after[1]) == (True, pids[1])


def test_returns_of_a_policy_that_overflows_are_not_numbers(learner: Learner):
    """Its weights are finite, so it was not seen to have diverged."""
    good, bad = policies(learner)[:2]
    bad["W0"], bad["Wm"] = np.full_like(bad["W0"], 3e38), np.full_like(bad["Wm"], 3e38)
    bad["Wm"][:, ::2] *= -1
    returns = Workers().start_evaluation([bad, good], "Pendulum-v1", SEEDS)()
    assert np.isnan(returns[0]).all()
    assert same_returns([returns[1]], Workers().start_evaluation([good], "Pendulum-v1", SEEDS)())


def test_no_jobs_are_no_work(learner: Learner):
    assert Workers().rollouts([], learner.method.rollout_model) == []
