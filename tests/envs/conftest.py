from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.dataset import Dataset
from envs.policies import save_policy

# 10 rows: a terminal after row 3, a timeout after row 7, and two rows of an episode that is cut.
ENDS = {"terminals": [3], "timeouts": [7]}


@pytest.fixture
def columns() -> dict[str, Any]:
    """Columns of a small dataset; where an episode ends, the next observation is not the next one's first."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(10, 3)).astype(np.float32)
    next_observations = np.roll(observations, -1, axis=0)
    next_observations[[3, 7, 9]] = 100.0 + rng.normal(size=(3, 3))
    flags = {name: np.isin(np.arange(10), rows) for name, rows in ENDS.items()}
    return {
        "observations": observations,
        "actions": rng.normal(size=(10, 2)).astype(np.float32),
        "rewards": np.arange(10, dtype=np.float32),
        "next_observations": next_observations,
        **flags,
    }


@pytest.fixture
def dataset(columns: dict[str, Any]) -> Dataset:
    return Dataset("small", "Hopper-v4", **columns, provenance={"source": "test", "seed": 3})


@pytest.fixture(scope="session")
def hopping() -> Dataset:
    """A few falls of Hopper-v5 under random actions, with the simulator's states."""
    from envs.collect import collect, uniform_policy

    return collect("Hopper-v5", [(uniform_policy("Hopper-v5"), 1.0)], 150, seed=0)


@pytest.fixture
def write_actor() -> Callable[..., str]:
    """Writes a squashed actor with random weights; returns its file hash."""

    def write(path: Path, observation_dim: int, action_dim: int, high: float = 1.0, seed: int = 0) -> str:
        rng = np.random.default_rng(seed)

        def layer(fan_in: int, fan_out: int) -> tuple[np.ndarray, np.ndarray]:
            return rng.normal(size=(fan_out, fan_in)) / np.sqrt(fan_in), rng.normal(size=fan_out) * 0.1

        return save_policy(
            path,
            [layer(observation_dim, 16), layer(16, 16)],
            layer(16, action_dim),
            layer(16, action_dim),
            action_low=-high,
            action_high=high,
        )

    return write
