"""The slots in which learners run: Ray actors, or this process.

A slot is a learner and the rollout workers and evaluators that work for it. In Ray these share a placement group, which
reserves room for all of them at once, on one machine where there is such room and on several otherwise (strategy PACK;
STRICT_PACK would leave a large slot waiting that two machines could hold). A learner creates its workers itself, in its
group. If a machine dies, Ray finds another place for what was there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from envs.dataset import Dataset
from envs.errors import UserError
from orchestrator.config import ComputeConfig
from orchestrator.connection import can_grow, check_room, cluster_address, connected
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
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.size, self.on_gpu = size, gpus_each > 0
        self._dataset = ray.put(dataset)  # copied once; each node fetches it once, and its actors map the same pages
        bundles = slot_bundles(compute, gpus_each)
        self._groups = [placement_group(bundles, strategy="PACK") for _ in range(size if len(bundles) > 1 else 0)]
        places: list[Any] = [
            PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
            for group in self._groups
        ]  # fmt: skip
        actor = ray.remote(LearnerProcess)
        options = {"num_cpus": compute.threads, "num_gpus": gpus_each, "max_restarts": -1, "max_task_retries": 0}
        self._actors: list[Any] = [
            actor.options(**options, scheduling_strategy=place).remote(compute) for place in places or [None] * size
        ]
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
        from ray.util.placement_group import remove_placement_group

        if ray.is_initialized() and not self._head.is_gone:
            for actor in self._actors:
                ray.kill(actor, no_restart=True)
            for group in self._groups:
                remove_placement_group(group)
        self._actors.clear()
        self._groups.clear()
        self._running.clear()
        del self._dataset

    def pids(self) -> list[dict[str, list[int]]]:
        """Process ids of every slot's learner, rollout workers and evaluators."""
        import ray

        return ray.get([actor.pids.remote() for actor in self._actors])


@contextlib.contextmanager
def joined(compute: ComputeConfig) -> Iterator[dict[str, float]]:
    """Ray as studies with these settings need it, which several of them, one after the other, can share; nothing where
    all is done in this process.

    Raises:
        UserError: no cluster answers.
    """
    if compute.num_learners == 0 and compute.num_workers == 0:
        yield {}
        return
    address, each = cluster_address(compute.address), compute.cpus_per_learner
    gpus = _gpus_here(compute) if address is None else 0
    learners = _default_learners(compute, len(os.sched_getaffinity(0)) // each, gpus)
    with connected(address, max(learners, 1) * each, gpus) as resources:
        yield resources


@contextlib.contextmanager
def open_slots(compute: ComputeConfig, dataset: Dataset) -> Iterator[Slots]:
    """Connect to Ray if anything is to run in it, and make the slots.

    Raises:
        UserError: no cluster answers, or there is no room in it for what is to run.
    """
    address, each = cluster_address(compute.address), compute.cpus_per_learner
    inline = compute.num_learners == 0
    if inline and compute.num_workers == 0:
        yield InlineSlots(compute, dataset)
        return
    with joined(compute) as resources:
        if address is None:
            gpus = _gpus_here(compute)
            learners = _default_learners(compute, len(os.sched_getaffinity(0)) // each, gpus)
        else:
            gpus = int(resources.get("GPU", 0)) if compute.device != "cpu" else 0
            learners = _default_learners(compute, int(resources.get("CPU", 0)) // each, gpus)
            check_room(max(learners, 1) * each, resources, ADVICE)
        gpus_each = _gpus_each(compute, gpus, learners)
        if address is not None and not can_grow():
            import ray

            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            check_nodes(slot_bundles(compute, gpus_each), max(learners, 1), nodes)
        if inline:
            yield InlineSlots(compute, dataset)
            return
        slots = RaySlots(compute, dataset, learners, gpus_each)
        try:
            yield slots
        finally:
            slots.close()


ADVICE = "lower compute.num_learners, num_rollout_workers, num_evaluators or threads"
Bundle = dict[str, float]


def slot_bundles(compute: ComputeConfig, gpus_each: float) -> list[Bundle]:
    """What the processes of a slot need, the learner's first."""
    learner: Bundle = {"CPU": float(compute.threads)} | ({"GPU": gpus_each} if gpus_each else {})
    return [learner, *({"CPU": float(compute.threads)} for _ in range(compute.num_workers))]


def check_nodes(bundles: Sequence[Bundle], slots: int, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse what the machines of a cluster cannot hold, each by itself: Ray would wait for it for ever.

    Args:
        bundles: of a slot.
        slots: of these.
        nodes: resources of the machines.

    Raises:
        UserError: a process is larger than every machine, or not all slots have a place.
    """
    for bundle in bundles:
        if not any(_fits(bundle, node) for node in nodes):
            largest = max(nodes, key=lambda node: [node.get(kind, 0.0) for kind in reversed(bundle)], default={})
            need, have = (
                " and ".join(f"{amounts.get(kind, 0.0):g} {kind}s" for kind in bundle) for amounts in (bundle, largest)
            )
            raise UserError(
                f"a process of this study needs {need} (compute.threads, compute.gpus_per_learner), and no machine of "
                f"the Ray cluster has them: the largest has {have}; lower these settings or add such a machine"
            )
    free = [dict(node) for node in nodes]
    placed = 0
    while placed < slots and _place(bundles, free):
        placed += 1
    if placed < slots:
        cpus = sum(bundle["CPU"] for bundle in bundles)
        raise UserError(
            f"{slots} learners, each with {cpus:g} CPUs for itself and its workers, do not fit the machines of the Ray "
            f"cluster, which have room for {placed}; {ADVICE}"
        )


def _fits(bundle: Bundle, node: Mapping[str, float]) -> bool:
    return all(node.get(kind, 0.0) >= amount - 1e-9 for kind, amount in bundle.items())


def _place(bundles: Sequence[Bundle], free: list[dict[str, float]]) -> bool:
    """Take a slot's room from machines, one after the other; whether there was enough."""
    for bundle in sorted(bundles, key=lambda b: "GPU" not in b):
        node = next((node for node in free if _fits(bundle, node)), None)
        if node is None:
            return False
        for kind, amount in bundle.items():
            node[kind] -= amount
    return True


def _gpus_each(compute: ComputeConfig, gpus: int, learners: int) -> float:
    """Of a learner: as configured, else its share of all."""
    if not gpus or not learners or compute.device == "cpu":
        return 0.0
    if compute.gpus_per_learner is not None:
        return compute.gpus_per_learner
    return min(1.0, int(1e4 * gpus / learners) / 1e4)


def _gpus_here(compute: ComputeConfig) -> int:
    if compute.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def _default_learners(compute: ComputeConfig, cpus: int, gpus: int) -> int:
    if compute.num_learners is not None:
        return compute.num_learners
    if gpus and compute.device != "cpu":
        return max(1, int(gpus / (compute.gpus_per_learner or 1.0) + 1e-9))
    return max(1, cpus)
