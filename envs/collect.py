"""Datasets from your own policies, by D4RL's recipe."""

import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.dataset import Dataset
from envs.episodes import Trajectory, borrow_envs, record_episodes
from envs.errors import UserError
from envs.hdf5 import check_writable, write_hdf5
from envs.policies import Policy, UniformPolicy

# Episodes stepped at once, with one forward pass for all. Part of the recipe: noise is drawn per batch.
_LOCKSTEP = 8


class CollectError(UserError):
    """What was asked for cannot be collected."""


def uniform_policy(env_id: str) -> UniformPolicy:
    """Uniform actions within the environment's bounds."""
    with borrow_envs(env_id, 1) as (env,):
        space = env.action_space
    return UniformPolicy(space.low, space.high)  # type: ignore[attr-defined]


def collect(
    env_id: str,
    policies: Sequence[tuple[Policy, float]],
    num_transitions: int,
    seed: int,
    deterministic: bool = False,
    name: str | None = None,
    path: Path | None = None,
) -> Dataset:
    """Roll policies out and keep every transition, as D4RL's sets were made (Fu et al. 2020, appendix).

    Whole trajectories up to the environment's time limit, `timeouts` set there; actions sampled from the
    policy and clipped to the bounds; exactly `num_transitions` rows, the last trajectory cut there and marked
    as a timeout. Several policies follow one another in the order given, each with a contiguous share of the
    rows, like a replay buffer over training; a policy's last trajectory is finished before the next policy
    starts. The same arguments give the same rows on the same machine and library versions.

    Args:
        env_id: Gymnasium id.
        policies: (policy, weight > 0), oldest first; shares are proportional to the weights.
        num_transitions: rows.
        seed: of the initial states and of the actions.
        deterministic: take the policies' deterministic actions instead of sampling.
        name: of the dataset; default made from the environment's id.
        path: if given, the set is also written there as HDF5; an unwritable target is refused before any
            step.

    Raises:
        CollectError, EpisodeError, Hdf5Error: all UserError; before any step is taken, except for a policy
            that returns values that are not finite.
    """
    if num_transitions < 1:
        raise CollectError(f"the number of transitions must be at least 1, not {num_transitions}.")
    if seed < 0:
        raise CollectError(f"the seed must not be negative, it is {seed}.")
    if not policies:
        raise CollectError("collection needs at least one policy.")
    weights = [float(weight) for _, weight in policies]
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise CollectError(f"policy weights must be positive numbers, they are {weights}.")
    if path is not None:
        check_writable(path)
    with borrow_envs(env_id, 1) as (env,):
        assert env.observation_space.shape
        assert env.action_space.shape
        assert env.spec
        observation_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        time_limit = env.spec.max_episode_steps
        assert time_limit is not None
    for policy, _ in policies:
        if policy.observation_dim not in (None, observation_dim) or policy.action_dim != action_dim:
            raise CollectError(
                f"policy {policy.describe().get('name', '')} takes {policy.observation_dim} observations and"
                f" gives {policy.action_dim} actions, '{env_id}' has {observation_dim} and {action_dim}."
            )

    dataset = _collect(env_id, policies, weights, num_transitions, seed, deterministic, time_limit, name)
    if path is not None:
        write_hdf5(dataset, path)
    return dataset


def _collect(
    env_id: str,
    policies: Sequence[tuple[Policy, float]],
    weights: Sequence[float],
    num_transitions: int,
    seed: int,
    deterministic: bool,
    time_limit: int,
    name: str | None,
) -> Dataset:
    targets = np.rint(np.cumsum(weights) / sum(weights) * num_transitions).astype(int)
    targets[-1] = num_transitions
    noise_seed, reset_seed = np.random.SeedSequence(seed).spawn(2)
    noise, resets = np.random.default_rng(noise_seed), np.random.default_rng(reset_seed)

    trajectories: list[Trajectory] = []
    first_rows = [0]  # of each policy's share
    rows = 0
    for (policy, _), target in zip(policies, targets.tolist(), strict=True):
        act = partial(policy.act, rng=None if deterministic else noise)
        for trajectory in _trajectories(env_id, act, target - rows, time_limit, resets):
            trajectories.append(trajectory)
            rows += len(trajectory)
        first_rows.append(min(rows, num_transitions))

    overshoot = rows - num_transitions
    timeouts = np.concatenate([_last(len(t), not t.terminated) for t in trajectories])[:num_transitions]
    terminals = np.concatenate([_last(len(t), t.terminated) for t in trajectories])[:num_transitions]
    timeouts[-1] = not terminals[-1]
    provenance: dict[str, Any] = {
        "source": "collected",
        "recipe": (
            "whole trajectories to the time limit, timeout flagged there; "
            + ("deterministic actions" if deterministic else "sampled actions")
            + ", clipped to the bounds; policies in contiguous shares, oldest first; float32"
        ),
        "env_id": env_id,
        "time_limit": time_limit,
        "rows": num_transitions,
        "last_trajectory_cut": overshoot > 0,
        "seed": seed,
        "deterministic": deterministic,
        "policies": [
            {**policy.describe(), "weight": weight, "rows": [start, end]}
            for (policy, _), weight, (start, end) in zip(policies, weights, pairwise(first_rows), strict=True)
        ],
        "versions": {name: importlib.metadata.version(name) for name in ("gymnasium", "mujoco", "numpy")},
    }
    return Dataset(
        name=name or f"{env_id.lower()}-collected",
        env_id=env_id,
        observations=np.concatenate([t.observations[:-1] for t in trajectories])[:num_transitions],
        actions=np.concatenate([t.actions for t in trajectories])[:num_transitions],
        rewards=np.concatenate([t.rewards for t in trajectories])[:num_transitions],
        next_observations=np.concatenate([t.observations[1:] for t in trajectories])[:num_transitions],
        terminals=terminals,
        timeouts=timeouts,
        provenance=provenance,
    )


def _last(length: int, flag: bool) -> NDArray[np.bool_]:
    flags = np.zeros(length, dtype=np.bool_)
    flags[-1] = flag
    return flags


def _trajectories(
    env_id: str, act: Any, needed: int, time_limit: int, resets: np.random.Generator
) -> Iterator[Trajectory]:
    """Whole trajectories of one policy in the order they were started, until they have `needed` rows.

    Those stepped together are kept in starting order: keeping the first to finish would favour short ones.
    """
    rows = count = 0
    while rows < needed:
        mean_length = rows / count if count else time_limit
        at_once = min(_LOCKSTEP, math.ceil((needed - rows) / mean_length))
        seeds = resets.integers(2**31, size=at_once).tolist()
        for trajectory in record_episodes(env_id, act, seeds):
            if rows >= needed:
                return
            rows += len(trajectory)
            count += 1
            yield trajectory
