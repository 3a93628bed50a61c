"""Collection in Ray actors: the same rows as in one process, sooner.

This module and what it imports load neither torch nor MLflow, and so do the actors, which start in a second or two.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import fields
from typing import Any

from envs.collect import RunShards, Shard, run_here
from envs.episodes import Trajectory
from envs.errors import UserError
from envs.policies import Policy
from orchestrator.connection import check_room, cluster_address, connected

SHARDS_PER_WORKER = 2  # under way or waiting to be taken: a worker has its next shard when it ends one
MAX_TRIES = 20  # of one shard whose worker keeps dying


class CollectionWorker:
    """Computes shards. Its BLAS has one thread by the variables that its process starts with."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, policy: Policy, rest: dict[str, Any]) -> list[Trajectory]:
        """The trajectories of the shard with this policy and these other fields."""
        return Shard(policy=policy, **rest).run()


class CollectionWorkers:
    """Ray actors that compute shards: a `RunShards` of `envs.collect`.

    A worker that dies is started again by Ray, and its shards are repeated, which changes nothing about them.
    """

    def __init__(self, num_workers: int) -> None:
        import ray

        options = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": MAX_TRIES - 1}
        actor = ray.remote(CollectionWorker).options(**options)
        self._workers: list[Any] = [actor.remote() for _ in range(num_workers)]
        self._shipped: dict[int, tuple[Policy, Any]] = {}

    def __call__(self, shards: Iterable[Shard]) -> Generator[list[Trajectory], None, None]:
        workers = itertools.cycle(self._workers)
        under_way: deque[Any] = deque()
        for shard in shards:
            rest = {field.name: getattr(shard, field.name) for field in fields(shard) if field.name != "policy"}
            under_way.append(next(workers).run.remote(self._ship(shard.policy), rest))
            if len(under_way) == SHARDS_PER_WORKER * len(self._workers):
                yield _result(under_way.popleft())
        while under_way:
            yield _result(under_way.popleft())

    def pids(self) -> list[int]:
        """Process ids of the workers, for tests and for `ps`."""
        import ray

        return ray.get([worker.pid.remote() for worker in self._workers])

    def close(self) -> None:
        """End the workers, also in the middle of a shard."""
        import ray

        for worker in self._workers:
            ray.kill(worker, no_restart=True)
        self._workers.clear()
        self._shipped.clear()

    def _ship(self, policy: Policy) -> Any:
        """Put a policy into the object store, once."""
        import ray

        if id(policy) not in self._shipped:
            self._shipped[id(policy)] = (policy, ray.put(policy))  # kept, so that no other one gets its id
        return self._shipped[id(policy)][1]


def _result(reference: Any) -> list[Trajectory]:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        trajectories: list[Trajectory] = ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None  # what the shard itself raised, not Ray's wrapping of it
    except RayActorError as error:
        raise UserError(
            f"a collection worker died {MAX_TRIES} times in the same episodes: give the machine more memory, or use"
            f" fewer workers ({str(error).splitlines()[0]})."
        ) from error
    return trajectories


@contextlib.contextmanager
def parallel_shards(num_workers: int, address: str | None = None) -> Iterator[RunShards]:
    """Something for `collect(..., run_shards=...)` that computes in Ray actors, for as long as the context lasts.

    Args:
        num_workers: actors, each with one CPU; 0 computes in this process, without Ray.
        address: of a running Ray cluster (default: $RAY_ADDRESS, else one of our own on this machine). Where this
            process is connected to Ray already, that one is used.

    Raises:
        UserError: no cluster answers, or it is too small.
    """
    if num_workers < 0:
        raise UserError(f"the number of collection workers must not be negative, it is {num_workers}.")
    if num_workers == 0:
        yield run_here
        return
    with connected(cluster_address(address), num_workers) as resources:
        check_room(num_workers, resources, "use fewer")
        workers = CollectionWorkers(num_workers)
        try:
            yield workers
        finally:
            workers.close()
