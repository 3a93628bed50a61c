"""The slots in which learners run: Ray actors, or this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Protocol

from envs.dataset import Dataset
from orchestrator.config import ComputeConfig
from orchestrator.connection import check_room, cluster_address, connected
from orchestrator.head import Head
from orchestrator.learner import LearnerProcess, resolve_device


class Slots(Protocol):
    """Where learners run. A slot has at most one call under way."""

    size: int
    on_gpu: bool  # whether learners compute on a GPU

    def submit(self, slot: int, method: str, *args: Any) -> None:
        """Begin a call of `LearnerProcess`."""

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        """(slot, result) of calls that have ended; a result may be an exception."""


class InlineSlots:
    """One slot in this process: a call runs when it is waited for."""

    size = 1

    def __init__(self, compute: ComputeConfig, dataset: Dataset) -> None:
        self._process, self._dataset = LearnerProcess(compute), dataset
        self.on_gpu = resolve_device(compute.device).type == "cuda"
        self._call: tuple[str, tuple[Any, ...]] | None = None

    def submit(self, slot: int, method: str, *args: Any) -> None:
        self._call = (method, args)

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        if self._call is None:
            return []
        (method, args), self._call = self._call, None
        try:
            return [(0, getattr(self._process, method)(*args, dataset=self._dataset))]
        except Exception as error:
            return [(0, error)]


class RaySlots:
    """Ray actors, one a slot. An actor whose process dies is restarted by Ray; its call is not repeated by Ray."""

    def __init__(self, compute: ComputeConfig, dataset: Dataset, size: int, gpus_each: float) -> None:
        import ray

        self.size, self.on_gpu = size, gpus_each > 0
        self._dataset = ray.put(dataset)  # copied once; each node fetches it once, and its actors map the same pages
        options = {"num_cpus": 1, "num_gpus": gpus_each, "max_restarts": -1, "max_task_retries": 0}
        actor = ray.remote(LearnerProcess).options(**options)
        self._actors: list[Any] = [actor.remote(compute) for _ in range(size)]
        self._running: dict[Any, int] = {}
        self._head = Head()

    def submit(self, slot: int, method: str, *args: Any) -> None:
        self._running[getattr(self._actors[slot], method).remote(*args, dataset=self._dataset)] = slot

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        import ray

        self._head.check()
        if not self._running:
            return []
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout)
        results: list[tuple[int, Any]] = []
        for reference in ready:
            slot = self._running.pop(reference)
            try:
                results.append((slot, ray.get(reference)))
            except Exception as error:
                # what the call itself raised, not Ray's wrapping of it
                results.append((slot, getattr(error, "cause", None) or error))
        return results

    def close(self) -> None:
        """End the actors, also those that Ray is restarting."""
        import ray

        for actor in self._actors if ray.is_initialized() else ():  # not where the head was lost
            ray.kill(actor, no_restart=True)
        self._actors.clear()
        self._running.clear()
        del self._dataset

    def pids(self) -> list[dict[str, list[int]]]:
        """Process ids of every slot's learner, rollout workers and evaluators."""
        import ray

        return ray.get([actor.pids.remote() for actor in self._actors])


@contextlib.contextmanager
def open_slots(compute: ComputeConfig, dataset: Dataset) -> Iterator[Slots]:
    """Connect to Ray if anything is to run in it, and make the slots.

    Raises:
        UserError: no cluster answers, or it has fewer CPUs than there are processes to run.
    """
    address = cluster_address(compute.address)
    per_learner = 1 + compute.num_rollout_workers + compute.num_evaluators
    inline = compute.num_learners == 0
    if inline and per_learner == 1:
        yield InlineSlots(compute, dataset)
        return
    gpus = _gpus_here(compute) if address is None else 0
    learners = _default_learners(compute, len(os.sched_getaffinity(0)) // per_learner, gpus)
    with connected(address, max(learners, 1) * per_learner, gpus) as resources:
        if address is not None:
            gpus = int(resources.get("GPU", 0))
            learners = _default_learners(compute, int(resources.get("CPU", 0)) // per_learner, gpus)
            advice = "lower compute.num_learners, num_rollout_workers or num_evaluators"
            check_room(max(learners, 1) * per_learner, resources, advice)
        if inline:
            yield InlineSlots(compute, dataset)
            return
        use_gpu = gpus and compute.device != "cpu"
        slots = RaySlots(compute, dataset, learners, min(1.0, int(1e4 * gpus / learners) / 1e4) if use_gpu else 0)
        try:
            yield slots
        finally:
            slots.close()


def _gpus_here(compute: ComputeConfig) -> int:
    if compute.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def _default_learners(compute: ComputeConfig, cpus: int, gpus: int) -> int:
    if compute.num_learners is not None:
        return compute.num_learners
    return max(1, gpus if gpus and compute.device != "cpu" else cpus)
