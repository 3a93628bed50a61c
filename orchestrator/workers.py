"""Rollout workers and evaluators: pure functions of what they are sent, in the caller's process or in Ray actors.

Both give the same numbers: a shard's randomness follows from its job, an episode's from its seed. So a worker that
dies is simply asked again once Ray has restarted it. What the jobs of rollouts are run in, dynamics or a diffusion
model, is called their model.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.cpu import configure_cpu
from agents.interaction import (
    DOMAINS,
    Collect,
    Environments,
    InteractionJob,
    InteractionResult,
    run_interaction,
    start_here,
)
from agents.method import Job, RolloutResult
from agents.rollout import RolloutStatistics
from envs.episodes import NonFiniteActionError, run_episodes
from envs.policies import NetworkPolicy

PolicyArrays = Mapping[str, NDArray[Any]]
# Episodes stepped together. Evaluators share an evaluation by such groups, and episodes depend in their last bits on
# which others are stepped with them, so it must not depend on the number of evaluators. Measured on MuJoCo's
# robots, groups of 10 take 3 % less time than groups of 5, and single episodes 25 % more.
GROUP_EPISODES = 5
# rows, tags and statistics of a job's members, and the job's seconds; arrays, which Ray moves without a copy
Answer = tuple[list[NDArray[Any]], list[NDArray[Any]], tuple[RolloutStatistics, ...], float]
MAX_TRIES = 10  # of calls to actors that were there and died; the next death is one too many
RETRY_SECONDS = 0.5  # until an actor that died is asked whether it is back; doubled every time
LONGEST_RETRY_SECONDS = 10.0
AWAY_SECONDS = 120.0  # for which a learner waits for a worker; then the driver does, and asks another learner meanwhile
ANSWER_SECONDS = 10.0  # for workers that have nothing to do to say that they are there


class WorkersAway(RuntimeError):
    """Rollout workers or evaluators have died, and Ray has found no place for new ones yet."""


def evaluate(policy: PolicyArrays, env_id: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Returns `(episodes,)` of the deterministic policy, one whole episode per seed, stepped in lockstep.

    They are not a number where the policy's action is not: a policy of finite, huge weights can overflow.
    """
    network = NetworkPolicy(policy, "learner", "")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return run_episodes(env_id, lambda observations: network.act(observations, None), seeds).returns
    except NonFiniteActionError:
        return np.full(len(seeds), np.nan)


def groups(seeds: Sequence[int]) -> list[list[int]]:
    """The seeds of an evaluation as they are stepped together, wherever that is."""
    return [list(seeds[i : i + GROUP_EPISODES]) for i in range(0, len(seeds), GROUP_EPISODES)]


@dataclass(frozen=True)
class Shipped:
    """A model in the object store. Ray hands the reference on as it is, since it is not an argument itself: only a
    worker that does not have the model yet builds it, which for a simulator takes a while."""

    key: str
    reference: Any


def run_job(job: Job, model: Any) -> RolloutResult:
    """A job's result, with the time that it took."""
    started = time.perf_counter()
    result = job.run(model)
    return replace(result, seconds=time.perf_counter() - started)


class RolloutWorker:
    """Runs shards of rollouts; keeps the model it was given last."""

    def __init__(self, threads: int = 1) -> None:
        configure_cpu(threads)
        self._kept: tuple[str, Any] | None = None

    def _model(self, shipped: Shipped) -> Any:
        import ray

        if self._kept is None or self._kept[0] != shipped.key:
            self._kept = shipped.key, ray.get(shipped.reference)
        return self._kept[1]

    def run(self, shipped: Shipped, jobs: Sequence[Job]) -> list[Answer]:
        """What each job's members have gathered, in the order of the jobs."""
        model = self._model(shipped)
        results = [run_job(job, model) for job in jobs]
        return [([x.numpy() for x in r.rows], [x.numpy() for x in r.tags], r.statistics, r.seconds) for r in results]

    def interact(self, shipped: Shipped, jobs: Sequence[InteractionJob]) -> list[InteractionResult]:
        """Steps in environments, which this worker keeps alive for the next ones."""
        environments = self._model(shipped)
        return [run_interaction(job, environments) for job in jobs]


class Evaluator:
    """Runs episodes."""

    def __init__(self, threads: int = 1) -> None:
        configure_cpu(threads)

    def run(
        self, policies: Sequence[PolicyArrays], member: int, env_id: str, seeds: Sequence[int]
    ) -> NDArray[np.float64]:
        """Returns of one of a pack's policies, which lie in the object store together."""
        return evaluate(policies[member], env_id, seeds)


class Workers:
    """What a learner hands rollouts and evaluations to.

    Args:
        num_rollout_workers, num_evaluators: Ray actors; 0 computes in this process, as do rollouts on a GPU anyway.
        threads: of torch in each actor.
    """

    def __init__(self, num_rollout_workers: int = 0, num_evaluators: int = 0, threads: int = 1) -> None:
        self._rollout_workers = [_actor(RolloutWorker, threads) for _ in range(num_rollout_workers)]
        self._evaluators = [_actor(Evaluator, threads) for _ in range(num_evaluators)]
        self._turns = itertools.cycle(self._evaluators)
        self._shipped: tuple[Any, Shipped] | None = None

    def pids(self) -> dict[str, list[int]]:
        """Process ids of the actors, for tests and for `ps`."""
        import ray

        groups = {"rollout_workers": self._rollout_workers, "evaluators": self._evaluators}
        return {name: ray.get([a.__ray_call__.remote(_pid) for a in actors]) for name, actors in groups.items()}

    def check_there(self) -> None:
        """Ask the actors for a sign of life.

        Raises:
            WorkersAway: one does not answer.
        """
        actors = [*self._rollout_workers, *self._evaluators]
        if not actors:
            return
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            ray.get([actor.__ray_call__.remote(_pid) for actor in actors], timeout=ANSWER_SECONDS)
        except (GetTimeoutError, RayActorError) as error:
            raise WorkersAway(f"a rollout worker or evaluator does not answer: {error}") from None

    def rollouts(self, jobs: Sequence[Job], model: Any) -> list[RolloutResult]:
        """The results of the jobs, in their order; waits for them."""
        return self.start_rollouts(jobs, model)()

    def start_rollouts(self, jobs: Sequence[Job], model: Any) -> Callable[[], list[RolloutResult]]:
        """Begin some jobs.

        Jobs of a learner on a GPU are run here: the GPU is faster than any number of workers, and what it draws is not
        what they would draw. Here nothing happens before the call of what is returned. A worker that has died is asked
        again when its answer is wanted.

        Returns:
            A function that waits for the results of the jobs, in their order.
        """
        if not jobs or not self.rolls_out_elsewhere(jobs[0].device):
            return lambda: [run_job(job, model) for job in jobs]
        shipped = self._ship(model)
        workers = len(self._rollout_workers)
        shares = [list(jobs[i::workers]) for i in range(workers)]
        workers_and_shares = zip(self._rollout_workers, shares, strict=True)
        calls = [(worker, partial(worker.run.remote, shipped, share)) for worker, share in workers_and_shares]
        answers = _start_all(calls)

        def collect() -> list[RolloutResult]:
            results: list[RolloutResult | None] = [None] * len(jobs)
            for i, answer in enumerate(answers()):
                for place, (rows, tags, statistics, seconds) in zip(range(i, len(jobs), workers), answer, strict=True):
                    received_rows, received_tags = (tuple(map(torch.tensor, arrays)) for arrays in (rows, tags))
                    members = jobs[place].members
                    results[place] = RolloutResult(members, received_rows, received_tags, statistics, seconds)
            return [r for r in results if r is not None]

        return collect

    def start_interaction(self, jobs: Sequence[InteractionJob], environments: Environments) -> Collect:
        """Begin steps in environments, those of each domain in a worker of its own, always the same one.

        Without workers nothing happens before the call of what is returned. A worker that has died is asked again when
        its answer is wanted: the one that takes its place repeats the episodes that are under way.

        Returns:
            A function that waits for the results of the jobs, in their order.
        """
        if not jobs or not self._rollout_workers:
            return start_here(jobs, environments)
        shipped = self._ship(environments)
        shares: dict[int, list[int]] = {}
        for place, job in enumerate(jobs):
            shares.setdefault(DOMAINS.index(job.domain) % len(self._rollout_workers), []).append(place)
        actors = self._rollout_workers
        calls = [
            (actors[worker], partial(actors[worker].interact.remote, shipped, [jobs[place] for place in places]))
            for worker, places in shares.items()
        ]
        answers = _start_all(calls)

        def collect() -> list[InteractionResult]:
            by_place = {
                place: result
                for places, results in zip(shares.values(), answers(), strict=True)
                for place, result in zip(places, results, strict=True)
            }
            return [by_place[place] for place in range(len(jobs))]

        return collect

    def rolls_out_elsewhere(self, device: torch.device) -> bool:
        """Whether the rollouts of a learner on a device run beside it."""
        return bool(self._rollout_workers) and device.type == "cpu"

    @property
    def evaluates_elsewhere(self) -> bool:
        """Whether evaluations run beside the caller."""
        return bool(self._evaluators)

    def start_evaluation(
        self, policies: Sequence[PolicyArrays], env_id: str, seeds: Sequence[int]
    ) -> Callable[[], list[NDArray[np.float64]]]:
        """Begin to evaluate some policies.

        Evaluators are sent the policies once and take turns at groups of episodes; an evaluator that has died is asked
        again when its answer is wanted. Without evaluators nothing happens before the call of what is returned.

        Returns:
            A function that waits for the episode returns `(episodes,)` of every policy.
        """
        shares = groups(seeds)
        if not self._evaluators:
            return lambda: [np.concatenate([evaluate(p, env_id, share) for share in shares]) for p in policies]
        import ray

        reference = ray.put([dict(policy) for policy in policies])
        calls = [
            (evaluator := next(self._turns), partial(evaluator.run.remote, reference, member, env_id, share))
            for member in range(len(policies))
            for share in shares
        ]
        answers = _start_all(calls)

        def collect() -> list[NDArray[np.float64]]:
            parts, n = answers(), len(shares)
            return [np.concatenate(parts[i : i + n]) for i in range(0, len(parts), n)]

        return collect

    def _ship(self, model: Any) -> Shipped:
        """Put the model into the object store, once."""
        import ray

        if self._shipped is None or self._shipped[0] is not model:
            reference = ray.put(model)
            # the model itself, not its id: a later pack's may lie at the same address
            self._shipped = (model, Shipped(reference.hex(), reference))
        return self._shipped[1]


def _pid(_: Any) -> int:
    return os.getpid()


def _actor(cls: type, threads: int) -> Any:
    """A Ray actor that comes back after its process dies. Its calls are not repeated by Ray: we repeat them
    ourselves."""
    import ray

    return ray.remote(cls).options(num_cpus=threads, max_restarts=-1, max_task_retries=0).remote(threads)


def _start_all(calls: Sequence[tuple[Any, Callable[[], Any]]]) -> Callable[[], list[Any]]:
    """Make all calls at once; what is returned waits for their answers and repeats the ones whose actor died.

    Args:
        calls: each with its actor.

    Returns:
        A function that gives the answers. It raises `WorkersAway` if an actor does not come back for `AWAY_SECONDS`,
        and `RuntimeError` if actors that had come back have died of their calls too often.
    """
    import ray
    from ray.exceptions import RayActorError

    references = [call() for _, call in calls]
    answers: dict[int, Any] = {}

    def collect() -> list[Any]:
        deaths = 0
        while True:
            died = []
            for i, reference in enumerate(references):
                if i in answers:
                    continue
                try:
                    answers[i] = ray.get(reference)
                except RayActorError as error:
                    died.append(i)
                    reason = error
            if not died:
                return [answers[i] for i in range(len(calls))]
            deaths += 1
            if deaths > MAX_TRIES:
                raise RuntimeError(f"rollout workers or evaluators died {deaths} times of the same work ({reason})")
            _wait_until_back([calls[i][0] for i in died])
            for i in died:
                references[i] = calls[i][1]()

    return collect


def _wait_until_back(actors: Sequence[Any]) -> None:
    """Ask actors that have died until all of them answer: meanwhile any other call would fail.

    Raises:
        WorkersAway: one does not for too long.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    began, pause = time.monotonic(), RETRY_SECONDS
    while True:
        time.sleep(pause)
        left = began + AWAY_SECONDS - time.monotonic()
        try:
            ray.get([actor.__ray_call__.remote(_pid) for actor in actors], timeout=max(left, RETRY_SECONDS))
            return
        except (GetTimeoutError, RayActorError) as error:
            if left <= 0:
                raise WorkersAway(
                    f"a rollout worker or evaluator has had no machine for {AWAY_SECONDS:.0f} s ({error})"
                ) from None
        pause = min(2 * pause, LONGEST_RETRY_SECONDS)
