"""What the checks of a dataset share, worked out once: its environment, its moments, rows in the simulator.

Shape suffixes: N rows, S observation, A action.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from envs.dataset import Dataset
from envs.episodes import make_env
from envs.errors import UserError
from envs.simulate import Replay, Simulator, Votes, replay
from envs.termination import terminated

ROUNDING = 1e-6
"""What rounding to float32 can move, as a share of a value."""

_CHUNK = 65_536  # rows looked at together
_TERMINAL_ROWS = 500  # replayed besides the random ones: some versions differ only where an episode terminates
CONCLUSIVE_ROWS = 5  # needed to say that a label's version is not the one that the rows were recorded in
_STRAY_VOTES = 0.2  # share of rows that may speak for the wrong version, in data of another MuJoCo release


@dataclass(frozen=True, eq=False)
class EnvironmentFacts:
    """What the rows must fit."""

    observation_dim: int
    low: NDArray[np.float32]  # (A,)
    high: NDArray[np.float32]
    time_limit: int


@dataclass(frozen=True, eq=False)
class Moments:
    """In the environment's units; a deviation of 0 is replaced by the value's size, so that one can divide by it."""

    mean: NDArray[np.float64]  # (S,)
    std: NDArray[np.float64]  # (S,)
    reward_mean: float
    reward_std: float


@dataclass(frozen=True, eq=False)
class RuleBesideFlags:
    """What the environment's termination rule says of every row."""

    done: NDArray[np.bool_]  # (N,) the rule ends the episode at the next observation
    disputed: NDArray[np.bool_]  # (N,) and the terminal flag says otherwise, by more than rounding


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows in the simulator."""

    replay: Replay
    num_random: int  # these first, then terminal ones
    left_out: int  # rows that were drawn and whose state is not known
    recorded_in: str  # the version that the rows speak for; the label's, if they do not say
    votes: Votes | None  # for and against the label's version; None: there is no other


class Evidence:
    """The dataset under test, and what is worked out of it once."""

    def __init__(self, dataset: Dataset, known_as: str | None, replay_rows: int, seed: int) -> None:
        self.dataset, self.known_as, self.replay_rows, self.seed = dataset, known_as, replay_rows, seed

    def chunks(self) -> Iterator[slice]:
        """All rows in file order, a part of them at a time."""
        for start in range(0, self.dataset.num_transitions, _CHUNK):
            yield slice(start, min(start + _CHUNK, self.dataset.num_transitions))

    def raw(self, stored: NDArray[np.float32]) -> NDArray[np.float64]:
        """Observations (..., S) in the environment's units; a copy."""
        scaling, raw = self.dataset.scaling, np.array(stored, dtype=np.float64)
        if scaling.observation_mean is not None and scaling.observation_std is not None:
            raw = raw * scaling.observation_std + scaling.observation_mean
        return raw

    @cached_property
    def environment(self) -> EnvironmentFacts | str:
        """Its facts, or why there are none."""
        try:
            env = make_env(self.dataset.env_id)
        except UserError as error:
            return str(error).rstrip(".")
        actions, shape, spec = env.action_space, env.observation_space.shape, env.spec
        env.close()
        assert isinstance(actions, Box)
        assert shape is not None
        assert spec is not None
        assert spec.max_episode_steps is not None
        return EnvironmentFacts(
            shape[0], actions.low.astype(np.float32), actions.high.astype(np.float32), spec.max_episode_steps
        )

    @cached_property
    def misfit(self) -> str | None:
        """Why the rows cannot be held against their environment; None: they can."""
        d, environment = self.dataset, self.environment
        if isinstance(environment, str):
            return environment
        if (d.observation_dim, d.action_dim) == (environment.observation_dim, len(environment.low)):
            return None
        return (
            f"{d.observation_dim} observations and {d.action_dim} actions per row, {d.env_id} has"
            f" {environment.observation_dim} and {len(environment.low)}"
        )

    @cached_property
    def ends(self) -> NDArray[np.bool_]:
        """(N,) an episode ends with this row."""
        return self.dataset.terminals | self.dataset.timeouts

    @cached_property
    def follows(self) -> NDArray[np.bool_]:
        """(N,) the next observation is the following row's observation; false for the last row."""
        d = self.dataset
        follows = np.zeros(d.num_transitions, dtype=np.bool_)
        for rows in self.chunks():
            following = d.observations[rows.start + 1 : rows.stop + 1]
            here = d.next_observations[rows][: len(following)]
            same = (here == following).all(axis=1)
            other = np.flatnonzero(~same)
            # Columns that were rounded differently are forgiven; a reset moves the state by far more.
            same[other] = np.isclose(here[other], following[other], rtol=1e-4, atol=1e-5).all(axis=1)
            follows[rows][: len(same)] = same
        return follows

    @cached_property
    def at_time_limit(self) -> NDArray[np.bool_]:
        """(N,) an episode ends with this row after exactly as many steps as the time limit allows."""
        at_limit = np.zeros(self.dataset.num_transitions, dtype=np.bool_)
        if isinstance(self.environment, EnvironmentFacts):
            episodes = self.dataset.episodes
            whole = episodes.complete & (episodes.lengths == self.environment.time_limit)
            at_limit[episodes.ends[whole] - 1] = True
        return at_limit

    @cached_property
    def rule(self) -> RuleBesideFlags | str:
        """What the termination rule says of all rows, or why it says nothing."""
        d = self.dataset
        if self.misfit:
            return self.misfit
        done, disputed = np.zeros((2, d.num_transitions), dtype=np.bool_)
        try:
            for rows in self.chunks():
                states = self.raw(d.next_observations[rows])
                done[rows] = terminated(d.env_id, states)
                differs = np.flatnonzero(done[rows] != d.terminals[rows])
                # The simulator's rule saw more digits than float32 keeps: only what is clear on both sides counts.
                less, more = (terminated(d.env_id, states[differs] * (1 + s * ROUNDING)) for s in (-1, 1))
                disputed[rows.start + differs[less == more]] = True
        except UserError:
            return f"no termination rule of {d.env_id} is known"
        return RuleBesideFlags(done, disputed)

    @cached_property
    def moments(self) -> Moments:
        d = self.dataset
        total, squares = np.zeros((2, d.observation_dim + 1))
        origin = None
        for rows in self.chunks():
            rewards = d.scaling.rewards(d.rewards[rows])
            values = np.concatenate([self.raw(d.observations[rows]), rewards[:, None]], axis=1)
            if origin is None:
                origin = values.mean(axis=0)  # deviations from about the mean: their squares keep their digits
            values -= origin
            total += values.sum(axis=0)
            squares += np.square(values).sum(axis=0)
        assert origin is not None
        shift = total / d.num_transitions
        mean, std = origin + shift, np.sqrt(np.maximum(squares / d.num_transitions - np.square(shift), 0.0))
        size = 1.0 + np.abs(mean)
        std = np.where(std > ROUNDING * size, std, size)
        return Moments(mean[:-1], std[:-1], float(mean[-1]), float(std[-1]))

    @cached_property
    def row_hashes(self) -> NDArray[np.int64]:
        """(N,) of everything in a row but its flags."""
        d = self.dataset
        hashes = np.empty(d.num_transitions, dtype=np.int64)
        for rows in self.chunks():
            parts = (d.observations[rows], d.actions[rows], d.rewards[rows, None], d.next_observations[rows])
            table = np.concatenate(parts, axis=1)
            as_bytes = table.view(f"V{table.shape[1] * table.itemsize}")[:, 0].tolist()
            hashes[rows] = np.fromiter(map(hash, as_bytes), dtype=np.int64, count=len(as_bytes))
        return hashes

    @cached_property
    def sample(self) -> Sample | str:
        """Rows in the simulator, or why there are none."""
        if self.misfit:
            return self.misfit
        try:
            return self._replay(Simulator(self.dataset.env_id))
        except UserError as error:
            return str(error).rstrip(".")

    def _replay(self, simulator: Simulator) -> Sample | str:
        d, rng = self.dataset, np.random.default_rng(self.seed)
        chosen, left_out = self._draw(rng.permutation(d.num_transitions), self.replay_rows, simulator)
        if not len(chosen):
            return "no row's state is known: velocities are clipped in all of them"
        terminal, _ = self._draw(
            rng.permutation(np.setdiff1d(np.flatnonzero(d.terminals), chosen)), _TERMINAL_ROWS, simulator
        )
        rows = np.concatenate([chosen, terminal])
        result = replay(
            simulator,
            self.raw(d.observations[rows]),
            d.actions[rows],
            self.raw(d.next_observations[rows]),
            d.scaling.rewards(d.rewards[rows]),
            self.moments.std,
            self.moments.reward_std,
        )
        votes = [result.votes(other) for other in result.simulated if other != d.env_id]
        against = max(votes, key=lambda v: (v.dynamics[1], v.rewards[1]), default=None)
        recorded_in = d.env_id
        if against and "other" in (winner(against.dynamics), winner(against.rewards)):
            recorded_in = against.other
        return Sample(result, len(chosen), left_out, recorded_in, against)

    def _draw(self, candidates: NDArray[np.int64], wanted: int, simulator: Simulator) -> tuple[NDArray[np.int64], int]:
        """The first `wanted` candidates that can be replayed, and how many before them cannot."""
        found = np.empty(0, dtype=np.int64)
        seen = 0
        while len(found) < wanted and seen < len(candidates):
            block = candidates[seen : seen + 4 * wanted]
            usable = simulator.restorable(self.raw(self.dataset.observations[block]))
            usable &= ~(self.ends[block] & self.follows[block])  # the next observation is another episode's
            last = np.flatnonzero(np.cumsum(usable) == wanted - len(found))
            block, usable = (block[: last[0] + 1], usable[: last[0] + 1]) if len(last) else (block, usable)
            found = np.concatenate([found, block[usable]])
            seen += len(block)
        return found, seen - len(found)


def winner(votes: tuple[int, int]) -> Literal["label", "other", "both"]:
    """Which version rows speak for; too few of them speak for the label."""
    own, other = votes
    if other < max(CONCLUSIVE_ROWS, _STRAY_VOTES * (own + other)):
        return "label"
    return "other" if own < _STRAY_VOTES * (own + other) else "both"
