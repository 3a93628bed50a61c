"""Rollout workers and evaluators: pure functions of what they are sent, in the caller's process or in Ray actors.

Both give the same numbers: a shard's randomness follows from its job, an episode's from its seed. So a worker that
dies is simply asked again once Ray has restarted it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.cpu import configure_cpu
from agents.dynamics import Ensemble
from agents.method import RolloutJob, RolloutResult
from envs.episodes import run_episodes
from envs.policies import NetworkPolicy

PolicyArrays = Mapping[str, NDArray[Any]]
MAX_TRIES = 20  # of one call whose actor keeps dying
RETRY_SECONDS = 0.5


def evaluate(policy: PolicyArrays, env_id: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Returns `(episodes,)` of the deterministic policy, one whole episode per seed."""
    network = NetworkPolicy(policy, "learner", "")
    return run_episodes(env_id, lambda observations: network.act(observations, None), seeds).returns


class RolloutWorker:
    """Runs shards of model rollouts; keeps the ensemble it was given last."""

    def __init__(self, threads: int = 1) -> None:
        configure_cpu(threads)
        self._ensemble: tuple[str, Ensemble] | None = None

    def ensure(self, key: str, state: dict[str, Any]) -> None:
        if self._ensemble is None or self._ensemble[0] != key:
            tensors = {name: torch.tensor(value) for name, value in state["tensors"].items()}
            self._ensemble = (key, Ensemble.from_state_dict({**state, "tensors": tensors}))

    def run(self, key: str, state: dict[str, Any], jobs: Sequence[RolloutJob]) -> list[tuple[list[NDArray[Any]], Any]]:
        """Rows of each member as arrays (Ray moves arrays without a copy) and statistics, in the order of the jobs."""
        self.ensure(key, state)
        assert self._ensemble is not None
        results = [job.run(self._ensemble[1]) for job in jobs]
        return [([rows.numpy() for rows in r.rows], r.statistics) for r in results]


class Evaluator:
    """Runs episodes."""

    def __init__(self, threads: int = 1) -> None:
        configure_cpu(threads)

    def run(self, policy: PolicyArrays, env_id: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        return evaluate(policy, env_id, seeds)


class Workers:
    """What a learner hands rollouts and evaluations to.

    Args:
        num_rollout_workers, num_evaluators: Ray actors; 0 computes in this process, as do rollouts on a GPU anyway.
        threads: of torch in each actor.
    """

    def __init__(self, num_rollout_workers: int = 0, num_evaluators: int = 0, threads: int = 1) -> None:
        self._rollout_workers = [_actor(RolloutWorker, threads) for _ in range(num_rollout_workers)]
        self._evaluators = [_actor(Evaluator, threads) for _ in range(num_evaluators)]
        self._shipped: tuple[Ensemble, str, Any] | None = None

    def pids(self) -> dict[str, list[int]]:
        """Process ids of the actors, for tests and for `ps`."""
        import ray

        groups = {"rollout_workers": self._rollout_workers, "evaluators": self._evaluators}
        return {name: ray.get([a.__ray_call__.remote(_pid) for a in actors]) for name, actors in groups.items()}

    def rollouts(self, jobs: Sequence[RolloutJob], ensemble: Ensemble) -> list[RolloutResult]:
        """The results of the jobs, in their order.

        Jobs of a learner on a GPU are run here: the GPU is faster than any number of workers, and what it draws is not
        what they would draw.
        """
        if not self._rollout_workers or not jobs or jobs[0].starts.device.type != "cpu":
            return [job.run(ensemble) for job in jobs]
        key, reference = self._ship(ensemble)
        workers = len(self._rollout_workers)
        shares = [list(jobs[i::workers]) for i in range(workers)]
        calls = [
            partial(w.run.remote, key, reference, share) for w, share in zip(self._rollout_workers, shares, strict=True)
        ]
        answers = _call_all(calls)
        results: list[RolloutResult | None] = [None] * len(jobs)
        for i, answer in enumerate(answers):
            for job_index, (rows, statistics) in zip(range(i, len(jobs), workers), answer, strict=True):
                received = tuple(torch.tensor(array) for array in rows)
                results[job_index] = RolloutResult(jobs[job_index].members, received, statistics)
        return [r for r in results if r is not None]

    def evaluate(
        self, policies: Sequence[PolicyArrays], env_id: str, seeds: Sequence[int]
    ) -> list[NDArray[np.float64]]:
        """Episode returns of every policy."""
        if not self._evaluators:
            return [evaluate(policy, env_id, seeds) for policy in policies]
        actors = itertools.cycle(self._evaluators)
        calls = [partial(next(actors).run.remote, dict(policy), env_id, list(seeds)) for policy in policies]
        return _call_all(calls)

    def _ship(self, ensemble: Ensemble) -> tuple[str, Any]:
        """Put the ensemble into the object store, once."""
        import ray

        if self._shipped is None or self._shipped[0] is not ensemble:
            state = ensemble.to("cpu").state_dict()
            arrays = {name: tensor.numpy() for name, tensor in state["tensors"].items()}
            reference = ray.put({**state, "tensors": arrays})
            # the ensemble itself, not its id: a later pack's may lie at the same address
            self._shipped = (ensemble, reference.hex(), reference)
        return self._shipped[1], self._shipped[2]


def _pid(_: Any) -> int:
    return os.getpid()


def _actor(cls: type, threads: int) -> Any:
    """A Ray actor that comes back after its process dies. Its calls are not repeated by Ray: we repeat them
    ourselves."""
    import ray

    return ray.remote(cls).options(num_cpus=1, max_restarts=-1, max_task_retries=0).remote(threads)


def _call_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Make all calls at once; repeat the ones whose actor died."""
    import ray
    from ray.exceptions import RayActorError

    references = [call() for call in calls]
    answers = []
    for call, reference in zip(calls, references, strict=True):
        for attempt in range(MAX_TRIES):
            try:
                answers.append(ray.get(reference))
                break
            except RayActorError:
                if attempt + 1 == MAX_TRIES:
                    raise
                time.sleep(RETRY_SECONDS)
                reference = call()
    return answers
