"""`online/<Gymnasium id>`: datasets without rows, whose environment is sampled while a method learns."""

import hashlib

import numpy as np

from envs.dataset import COLUMNS, Dataset, Scaling
from envs.episodes import borrow_envs
from envs.errors import UserError

PREFIX = "online/"


def online_env(name: str) -> str | None:
    """The Gymnasium id of the environment that a dataset name stands for; None for one with rows."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def read_online(name: str) -> Dataset:
    """The dataset of a name of this kind: columns of the environment's widths, and no rows.

    Its content hash is made of the environment's id.

    Raises:
        EpisodeError: the environment cannot be made, or has other spaces than vectors (see `envs.episodes.make_env`).
        UserError: none is named.
    """
    env_id = name.removeprefix(PREFIX)
    if not env_id:
        raise UserError(f"dataset={name} names no environment; give its Gymnasium id, such as {PREFIX}HalfCheetah-v5")
    with borrow_envs(env_id, 1) as (env,):
        observation_shape, action_shape = env.observation_space.shape, env.action_space.shape
    assert observation_shape is not None
    assert action_shape is not None
    shapes = {"observations": observation_shape, "actions": action_shape, "next_observations": observation_shape}
    flags = ("terminals", "timeouts")
    columns: dict[str, np.ndarray] = {
        c: np.empty((0, *shapes.get(c, ())), np.bool_ if c in flags else np.float32) for c in COLUMNS
    }
    return Dataset.trusted(
        hashlib.sha256(name.encode()).hexdigest(), name=name, env_id=env_id, **columns,
        provenance={"source": "sampled while learning", "environment": env_id}, scaling=Scaling(), states=None,
    )  # fmt: skip
