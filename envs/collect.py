"""Datasets from your own policies, by D4RL's recipe.

A collection is made of shards: a few episodes of one policy stepped in lockstep, whose randomness follows from the
collection's seed and the shard's place in it. Rows are taken from the shards in their order, so they are the same
whoever computes the shards, wherever and however many at once.
"""

import contextlib
import importlib.metadata
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from envs.dataset import Dataset
from envs.episodes import Trajectory, borrow_envs, record_episodes
from envs.errors import UserError
from envs.hdf5 import check_writable, write_hdf5
from envs.policies import Policy, UniformPolicy

COLLECTION_SCHEME = 2
"""Raised when the same arguments give other rows than before; part of what a stored set is known by."""

# Most episodes of a shard, with one forward pass for all. Part of the recipe: a shard's noise is drawn per batch.
_LOCKSTEP = 8


class CollectError(UserError):
    """What was asked for cannot be collected."""


@dataclass(frozen=True)
class Shard:
    """Some episodes of one policy: a pure function of its fields, which can be computed in any process."""

    env_id: str
    policy: Policy
    deterministic: bool  # the policy's deterministic actions instead of sampled ones
    seed: int  # of the collection
    place: tuple[int, int]  # (of the policy in the collection, of the shard in the policy's share)
    episodes: int  # stepped in lockstep

    def run(self) -> list[Trajectory]:
        """Its trajectories, in the order in which they were started.

        Raises:
            EpisodeError: the policy returns a wrong shape or a value that is not finite.
        """
        from envs.true_dynamics import robot_layout, simulator_state  # bring MuJoCo

        resets, noise = np.random.SeedSequence(self.seed, spawn_key=self.place).spawn(2)
        act = partial(self.policy.act, rng=None if self.deterministic else np.random.default_rng(noise))
        state = simulator_state if robot_layout(self.env_id) else None
        return record_episodes(self.env_id, act, resets.generate_state(self.episodes).tolist(), state)


RunShards = Callable[[Iterable[Shard]], Generator[list[Trajectory], None, None]]
"""Computes shards: yields each one's trajectories, in the order of the shards. It should take them lazily, and is
closed when there are rows enough."""


def run_here(shards: Iterable[Shard]) -> Generator[list[Trajectory], None, None]:
    """Computes shards one after the other in this process."""
    for shard in shards:
        yield shard.run()


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
    run_shards: RunShards = run_here,
    on_rows: Callable[[int], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Dataset:
    """Roll policies out and keep every transition, as D4RL's sets were made (Fu et al. 2020, appendix).

    Whole trajectories up to the environment's time limit, `timeouts` set there; actions sampled from the
    policy and clipped to the bounds; exactly `num_transitions` rows, the last trajectory cut there and marked
    as a timeout. Several policies follow one another in the order given, each with a contiguous share of the
    rows, like a replay buffer over training; a policy's last trajectory is finished before the next policy
    starts. The same arguments give the same rows on the same machine and library versions, whatever
    `run_shards` is. Of robots with true dynamics the simulator's states are kept, too.

    Args:
        env_id: Gymnasium id.
        policies: (policy, weight > 0), oldest first; shares are proportional to the weights.
        num_transitions: rows.
        seed: of the initial states and of the actions.
        deterministic: take the policies' deterministic actions instead of sampling.
        name: of the dataset; default made from the environment's id.
        path: if given, the set is also written there as HDF5; an unwritable target is refused before any
            step.
        run_shards: who computes the episodes; `orchestrator.collection.parallel_shards` does it in Ray actors.
        on_rows: called with the number of rows so far.
        about: more for the provenance, JSON-able.

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
    from envs.true_dynamics import robot_layout  # brings MuJoCo

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

    layout = robot_layout(env_id)
    rows = _Rows(num_transitions, observation_dim, action_dim, layout.state_dim if layout else None)
    targets = np.rint(np.cumsum(weights) / sum(weights) * num_transitions).astype(np.int64).tolist()
    targets[-1] = num_transitions
    shares = []
    for place, ((policy, weight), target) in enumerate(zip(policies, targets, strict=True)):
        shard = Shard(env_id, policy, deterministic, seed, (place, 0), _LOCKSTEP)
        first = rows.filled
        for trajectory in _trajectories(shard, target - rows.seen, time_limit, run_shards):
            rows.append(trajectory)
            if on_rows is not None:
                on_rows(rows.filled)
        shares.append({**policy.describe(), "weight": weight, "rows": [first, rows.filled]})

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
        "last_trajectory_cut": rows.seen > num_transitions,
        "seed": seed,
        "deterministic": deterministic,
        "episodes_in_lockstep": _LOCKSTEP,
        "policies": shares,
        "versions": {package: _version(package) for package in ("offsweep", "gymnasium", "mujoco", "numpy")},
    }
    dataset = Dataset(
        name=name or f"{env_id.lower()}-collected",
        env_id=env_id,
        observations=rows.observations,
        actions=rows.actions,
        rewards=rows.rewards,
        next_observations=rows.next_observations,
        terminals=rows.terminals,
        timeouts=rows.timeouts,
        states=rows.states,
        provenance={**provenance, **(about or {})},
    )
    if path is not None:
        write_hdf5(dataset, path)
    return dataset


def _trajectories(first: Shard, needed: int, time_limit: int, run_shards: RunShards) -> Iterator[Trajectory]:
    """Whole trajectories of one policy in the order they were started, until they have `needed` rows.

    Those stepped together are kept in starting order: keeping the first to finish would favour short ones.
    """
    policy, number = first.place
    rows = count = 0
    while rows < needed:
        # As many episodes as will do by the mean length so far; at first as many as are needed whatever their length.
        # So little is computed in vain, and the shards of a round are known before it begins.
        missing = needed - rows
        episodes = math.ceil(missing * count / rows) if count else math.ceil(missing / time_limit)
        sizes = [min(_LOCKSTEP, episodes - started) for started in range(0, episodes, _LOCKSTEP)]
        shards = [replace(first, place=(policy, number + i), episodes=size) for i, size in enumerate(sizes)]
        number += len(shards)
        with contextlib.closing(run_shards(shards)) as results:
            for trajectory in itertools.chain.from_iterable(results):
                if rows >= needed:
                    return
                rows += len(trajectory)
                count += 1
                yield trajectory


class _Rows:
    """The columns of a dataset whose number of rows is known, filled trajectory by trajectory."""

    def __init__(self, size: int, observation_dim: int, action_dim: int, state_dim: int | None) -> None:
        self.size = size
        self.seen = 0  # rows of all trajectories, also those of the last one that no longer fit
        try:
            self.observations = np.empty((size, observation_dim), dtype=np.float32)
            self.actions = np.empty((size, action_dim), dtype=np.float32)
            self.rewards = np.empty(size, dtype=np.float32)
            self.next_observations = np.empty((size, observation_dim), dtype=np.float32)
            self.terminals = np.zeros(size, dtype=np.bool_)
            self.timeouts = np.zeros(size, dtype=np.bool_)
            self.states = None if state_dim is None else np.empty((size, state_dim))
        except (MemoryError, ValueError) as error:
            gigabytes = size * (4 * (2 * observation_dim + action_dim + 1) + 8 * (state_dim or 0) + 2) / 1e9
            raise CollectError(
                f"{size} transitions need {gigabytes:.0f} GB of memory, more than there is; ask for fewer."
            ) from error

    @property
    def filled(self) -> int:
        return min(self.seen, self.size)

    def append(self, trajectory: Trajectory) -> None:
        """Only the last trajectory may be longer than what is left; it is cut and marked as a timeout."""
        start = self.filled
        self.seen += len(trajectory)
        end = self.filled
        kept = end - start
        self.observations[start:end] = trajectory.observations[:kept]
        self.actions[start:end] = trajectory.actions[:kept]
        self.rewards[start:end] = trajectory.rewards[:kept]
        self.next_observations[start:end] = trajectory.observations[1 : kept + 1]
        if self.states is not None and trajectory.states is not None:
            self.states[start:end] = trajectory.states[:kept]
        self.terminals[end - 1] = trajectory.terminated and kept == len(trajectory)
        self.timeouts[end - 1] = not self.terminals[end - 1]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that runs without having been installed
        return "not installed"
