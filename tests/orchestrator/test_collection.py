"""Collection in Ray actors gives the rows of the parent process, whatever happens to the actors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from envs.collect import RunShards, Shard, collect, run_here, uniform_policy
from envs.dataset import Dataset
from envs.episodes import Trajectory
from envs.errors import UserError
from envs.policies import Policy, load_policy
from orchestrator.collection import CollectionWorkers, parallel_shards

ROWS = 9_000  # four shards of one policy, two of another


def collected(run_shards: RunShards, on_rows: Callable[[int], None] | None = None) -> Dataset:
    policies: list[tuple[Policy, float]] = [
        (load_policy("pendulum-medium"), 2.0), (uniform_policy("Pendulum-v1"), 1.0),
    ]  # fmt: skip
    return collect("Pendulum-v1", policies, ROWS, seed=0, run_shards=run_shards, on_rows=on_rows)


@pytest.fixture(scope="module")
def here() -> Dataset:
    return collected(run_here)


@pytest.fixture(scope="module")
def two_workers(ray_cluster: None) -> Iterator[CollectionWorkers]:
    """They take up the two CPUs of the tests' Ray."""
    with parallel_shards(2) as workers:
        assert isinstance(workers, CollectionWorkers)
        yield workers


def test_two_actors_give_the_rows_of_the_parent_process(here: Dataset, two_workers: CollectionWorkers):
    there = collected(two_workers)
    assert there.content_hash == here.content_hash
    assert there.provenance == here.provenance


def test_one_actor_gives_the_rows_of_the_parent_process(here: Dataset, two_workers: CollectionWorkers):
    one = CollectionWorkers(0)
    one._workers = two_workers._workers[:1]
    assert collected(one).content_hash == here.content_hash


def test_a_killed_worker_changes_nothing(here: Dataset, two_workers: CollectionWorkers):
    pids = two_workers.pids()
    killed: list[int] = []

    def kill(rows: int) -> None:
        if not killed:  # after the first shard: the workers are busy with those that follow
            os.kill(pids[1], signal.SIGKILL)
            killed.append(rows)

    there = collected(two_workers, kill)
    assert there.content_hash == here.content_hash
    assert killed[0] < ROWS / 4
    after = two_workers.pids()
    assert (after[0], after[1] != pids[1]) == (pids[0], True)


def test_what_a_shard_raises_arrives_as_it_was_raised(two_workers: CollectionWorkers):
    class Broken:
        observation_dim = None
        action_dim = 1

        def act(self, observations: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
            return np.full((len(observations), 1), np.nan, dtype=np.float32)

        def describe(self) -> dict[str, Any]:
            return {}

    with pytest.raises(UserError, match=r"^the policy returned an action that is not finite in 'Pendulum-v1' at st"):
        collect("Pendulum-v1", [(Broken(), 1.0)], 1000, seed=0, run_shards=two_workers)


def test_a_policy_travels_once_and_shards_are_taken_as_they_are_needed(
    two_workers: CollectionWorkers, monkeypatch: pytest.MonkeyPatch
):
    import ray

    put: list[Any] = []
    put_object = ray.put

    def noted(value: Any) -> Any:
        put.append(value)
        return put_object(value)

    monkeypatch.setattr(ray, "put", noted)
    taken: list[Shard] = []

    def lazily(shards: Iterable[Shard]) -> Generator[list[Trajectory], None, None]:
        def note() -> Iterator[Shard]:
            for shard in shards:
                taken.append(shard)
                yield shard

        return two_workers(note())

    policy = uniform_policy("Pendulum-v1")
    ahead: list[int] = []
    collect(
        "Pendulum-v1", [(policy, 1.0)], 16_000, 0, run_shards=lazily,
        on_rows=lambda rows: ahead.append(len(taken) - rows // 1600),
    )  # fmt: skip
    assert put == [policy]
    assert len(taken) == 10
    assert max(ahead) == 4  # two for each worker


def test_workers_load_what_they_need_only(two_workers: CollectionWorkers):
    """Torch would double the time that a worker takes to start."""
    import ray

    def loaded(_: Any) -> set[str]:
        return {"envs", "torch", "mlflow"} & set(sys.modules)

    assert ray.get(two_workers._workers[0].__ray_call__.remote(loaded)) == {"envs"}


def test_no_workers_need_no_ray():
    with parallel_shards(0) as run_shards:
        assert run_shards is run_here


def test_impossible_numbers_of_workers_are_refused(ray_cluster: None):
    with pytest.raises(UserError, match="must not be negative"), parallel_shards(-1):
        pass
    with pytest.raises(UserError, match="worker processes for 3 CPUs do not fit the 2 CPUs"), parallel_shards(3):
        pass


@pytest.mark.slow
def test_a_ray_of_its_own_is_started_and_stopped(here: Dataset):
    code = """
import ray
from orchestrator.collection import parallel_shards
from tests.orchestrator.test_collection import collected
with parallel_shards(1) as workers:
    print(collected(workers).content_hash)
print(ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [here.content_hash, "False"]
