"""What all tests share: the environment that every process of offsweep starts with, and one Ray cluster."""

import logging
import os
from collections.abc import Iterator

import pytest

from orchestrator.environment import prepare_environment, worker_environment

# A user's settings must not lead tests to that user's cluster, server or data.
for _name in (
    "RAY_ADDRESS", "RAY_AUTH_MODE", "MLFLOW_TRACKING_URI", "OFFSWEEP_WORKDIR", "OFFSWEEP_CACHE",
    "D4RL_DATASET_DIR", "NEORL_DATASET_DIR", "MINARI_DATASETS_PATH",
):  # fmt: skip
    os.environ.pop(_name, None)
os.environ["OFFSWEEP_OFFLINE"] = "1"  # nothing is downloaded; the tests of downloads have a server of their own
os.environ["MPLBACKEND"] = "Agg"
prepare_environment()  # before any test module imports ray, torch or mlflow


@pytest.fixture(autouse=True)
def drawn_the_same_every_time() -> None:
    """Tests that draw without a generator of their own: what passes once passes again."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_ends() -> Iterator[None]:
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(ray_ends: None) -> None:
    """A local Ray of two CPUs, started (6 s) for the first module that asks for it, and anew after `no_ray`."""
    import ray

    if ray.is_initialized():
        return
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": worker_environment()},
    )


@pytest.fixture
def no_ray() -> None:
    """For a test with a cluster of its own, before any that asks for `ray_cluster` in its module."""
    import ray

    ray.shutdown()
