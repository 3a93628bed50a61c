"""Where processes of a slot are placed, what is refused, and how many cores they keep busy."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from orchestrator.cluster import RaySlots, _default_learners, _gpus_each, check_nodes, slot_bundles
from orchestrator.config import ComputeConfig
from tests.orchestrator.studies import configured, dataset_of, make_pack

SMALL, LARGE = {"CPU": 2.0, "memory": 1e9}, {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}


def test_a_slot_reserves_cpus_for_the_threads_of_each_process():
    compute = ComputeConfig(threads=2, num_rollout_workers=1, num_evaluators=2)
    assert compute.cpus_per_learner == 8
    assert slot_bundles(compute, 0.5) == [{"CPU": 2.0, "GPU": 0.5}, *[{"CPU": 2.0}] * 3]
    assert slot_bundles(ComputeConfig(), 0) == [{"CPU": 1.0}]


@pytest.mark.parametrize(
    ("compute", "gpus", "learners", "each"),
    [
        (ComputeConfig(), 4, 4, 1.0),
        (ComputeConfig(num_learners=8), 4, 8, 0.5),
        (ComputeConfig(num_learners=3), 1, 3, 0.3333),
        (ComputeConfig(num_learners=2), 4, 2, 1.0),
        (ComputeConfig(gpus_per_learner=0.25), 2, 8, 0.25),
        (ComputeConfig(gpus_per_learner=0.3), 1, 3, 0.3),
        (ComputeConfig(gpus_per_learner=0.25, num_learners=2), 1, 2, 0.25),
        (ComputeConfig(device="cpu", gpus_per_learner=0.5), 4, 16, 0.0),
        (ComputeConfig(), 0, 16, 0.0),
    ],
)
def test_learners_share_gpus(compute: ComputeConfig, gpus: int, learners: int, each: float):
    assert _default_learners(compute, 16, gpus) == learners
    assert _gpus_each(compute, gpus, learners) == each


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_no_share_of_a_gpu(workdir: Path, share: str):
    with pytest.raises(UserError, match=r"compute.gpus_per_learner=.* must be above 0 and at most 1"):
        configured(workdir, f"compute.gpus_per_learner={share}")


@pytest.mark.parametrize(
    ("bundles", "slots", "message"),
    [
        ([{"CPU": 16.0}], 1, "needs 16 CPUs .*no machine .*: the largest has 8 CPUs; lower these settings"),
        ([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 9.0}], 1, "needs 9 CPUs"),
        ([{"CPU": 2.0, "GPU": 2.0}], 1, "needs 2 CPUs and 2 GPUs .* has 8 CPUs and 1 GPUs"),
        ([{"CPU": 3.0}], 4, "4 learners, each with 3 CPUs for itself and its workers, .* have room for 2"),
        ([{"CPU": 1.0, "GPU": 0.5}, {"CPU": 1.0}], 3, "have room for 2; lower compute.num_learners"),
    ],
)
def test_what_no_machine_can_hold_is_refused(bundles: list[dict[str, float]], slots: int, message: str):
    with pytest.raises(UserError, match=message):
        check_nodes(bundles, slots, [SMALL, LARGE, SMALL])


def test_what_fits_is_not_refused():
    check_nodes([{"CPU": 2.0}], 6, [SMALL, LARGE, SMALL])
    check_nodes([{"CPU": 1.0, "GPU": 0.3333}, {"CPU": 1.0}], 3, [SMALL, LARGE, SMALL])
    check_nodes([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}], 4, [SMALL, LARGE, SMALL])  # a slot on two machines


@pytest.fixture
def machines(tmp_path: Path, no_ray: None) -> Iterator[Any]:
    """A head without CPUs and two machines with three each."""
    import ray
    from ray.cluster_utils import Cluster

    from orchestrator.environment import prepare_environment, worker_environment

    prepare_environment()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=3)
    environment = {**worker_environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def places(slots: RaySlots) -> list[list[str]]:
    """The nodes of every slot's learner and workers."""
    import ray

    def where(process: Any) -> list[str]:
        def here(_: Any) -> str:
            return str(ray.get_runtime_context().get_node_id())

        actors = [*process.workers._rollout_workers, *process.workers._evaluators]
        return [here(None), *ray.get([actor.__ray_call__.remote(here) for actor in actors])]

    return ray.get([actor.__ray_call__.remote(where) for actor in slots._actors], timeout=240)


@pytest.mark.slow
def test_workers_are_beside_their_learner_also_after_a_machine_has_died(workdir: Path, machines: Any):
    import ray
    from ray.exceptions import RayActorError

    config = configured(workdir)
    compute = ComputeConfig(device="cpu", num_rollout_workers=1, num_evaluators=1)
    slots = RaySlots(compute, dataset_of(config), 2, 0)
    try:
        before = places(slots)
        assert [len(set(nodes)) for nodes in before] == [1, 1]
        assert before[0] != before[1]
        lost = next(node for node in machines.list_all_nodes() if node.node_id == before[0][0])
        machines.remove_node(lost, allow_graceful=False)
        machines.add_node(num_cpus=3)
        for _ in range(60):
            try:
                after = places(slots)
                break
            except RayActorError:
                time.sleep(1.0)
        assert [len(set(nodes)) for nodes in after] == [1, 1]
        assert after[1] == before[1]
        assert lost.node_id not in after[0]
    finally:
        slots.close()
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.mark.slow
def test_no_process_keeps_more_cores_busy_than_are_reserved_for_it(workdir: Path, ray_cluster: None):
    """A learner and a rollout worker, with networks that torch would share among all cores if it were let."""
    import ray

    def threads(_: Any) -> tuple[int, int]:
        import torch

        return torch.get_num_threads(), int(os.environ["OMP_NUM_THREADS"])

    sizes = ("method.hidden=[256,256]", "method.num_updates=4000", "method.updates_per_epoch=200")
    compute = ComputeConfig(device="cpu", num_rollout_workers=1)
    pack = make_pack(workdir, [({}, 0), ({}, 1)], *sizes)
    slots = RaySlots(compute, dataset_of(configured(workdir)), 1, 0)
    try:
        assert ray.get([actor.__ray_call__.remote(threads) for actor in slots._actors]) == [(1, 1)]
        pids = [pid for group in slots.pids()[0].values() for pid in group]
        slots.submit(0, "advance", pack, [])
        used, began = list(map(_cpu_seconds, pids)), time.monotonic()
        while not slots.wait(0.5) and time.monotonic() < began + 20:
            pass
        busy = [_cpu_seconds(pid) - before for pid, before in zip(pids, used, strict=True)]
        seconds = time.monotonic() - began
        assert busy[0] > 1.0
        assert max(busy) < 1.15 * seconds + 0.5
    finally:
        slots.close()


def _cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
