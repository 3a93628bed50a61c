"""The offline dataset: transitions in file order, checked once and then trusted.

Shape suffixes: N rows, S observation, A action, E episodes, X simulator state.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.errors import UserError
from envs.scores import normalized_score, reference_scores

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


class DatasetError(UserError):
    """The rows of a dataset cannot be used as they are."""


# (column, number of axes); the order is also the order in which the content hash reads them.
_FLOAT_COLUMNS = (("observations", 2), ("actions", 2), ("rewards", 1), ("next_observations", 2))
_FLAG_COLUMNS = ("terminals", "timeouts")
COLUMNS = (*(name for name, _ in _FLOAT_COLUMNS), *_FLAG_COLUMNS)


def check_columns(columns: Mapping[str, NDArray[Any]], where: str, error: type[UserError]) -> None:
    """Make sure that columns, all of `COLUMNS` or some, hold numbers of the right shapes that pair up.

    Args:
        where: they come from, for the sentence.
        error: what is raised.

    Raises:
        error: a column of the wrong kind or shape, different numbers of rows, or none.
    """
    axes = {**dict(_FLOAT_COLUMNS), **dict.fromkeys(_FLAG_COLUMNS, 1)}
    for column, values in columns.items():
        if values.dtype.kind not in ("biuf" if column in _FLAG_COLUMNS else "iuf"):
            raise error(f"{where}: column '{column}' holds {values.dtype}, numbers are needed.")
        if values.ndim != axes[column]:
            meaning = "1-D (rows)" if axes[column] == 1 else "2-D (rows x entries)"
            raise error(f"{where}: column '{column}' has shape {values.shape}, it must be {meaning}.")
        if column in _FLAG_COLUMNS and values.dtype.kind != "b" and not np.isin(values, (0, 1)).all():
            raise error(f"{where}: column '{column}' ({values.dtype}) must hold true/false or 0/1.")
    rows = {column: len(values) for column, values in columns.items()}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{column} {count}" for column, count in rows.items())
        raise error(f"{where}: columns have different numbers of rows ({counts}).")
    if not rows["observations"]:
        raise error(f"{where} has no rows.")
    for column in ("observations", "actions"):
        if columns[column].shape[1] == 0:
            raise error(f"{where}: column '{column}' has no entries per row.")
    width = columns["observations"].shape[1]
    if "next_observations" in columns and columns["next_observations"].shape[1] != width:
        raise error(
            f"{where}: observations are {width} wide, next_observations {columns['next_observations'].shape[1]}."
        )


@dataclass(frozen=True, eq=False)
class EpisodeIndex:
    """Where episodes lie: episode e is rows starts[e] to ends[e] - 1."""

    starts: IntArray  # (E,)
    ends: IntArray  # (E,) exclusive
    complete: BoolArray  # (E,) ended by a terminal or a timeout; false only for a last episode that the file cuts

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> IntArray:
        """(E,) rows of each episode."""
        return self.ends - self.starts


@dataclass(frozen=True, eq=False)
class Scaling:
    """How a dataset's numbers differ from its environment's; the fields' defaults change nothing.

    stored observation = (observation - observation_mean) / observation_std, stored reward = reward_scale * reward +
    reward_shift.
    """

    observation_mean: FloatArray | None = None  # (S,)
    observation_std: FloatArray | None = None  # (S,)
    reward_scale: float = 1.0
    reward_shift: float = 0.0

    def rewards(self, stored: FloatArray) -> NDArray[np.float64]:
        """The environment's rewards for stored ones, any shape."""
        return (stored.astype(np.float64) - self.reward_shift) / self.reward_scale

    def update_hash(self, digest: Any) -> None:
        if self.observation_mean is not None and self.observation_std is not None:
            for name, values in (("mean", self.observation_mean), ("std", self.observation_std)):
                digest.update(f"observation_{name}{values.shape}".encode())
                digest.update(np.ascontiguousarray(values, dtype="<f4").data)
        if (self.reward_scale, self.reward_shift) != (1.0, 0.0):
            digest.update(f"reward {self.reward_scale!r} {self.reward_shift!r}".encode())


class Batch(NamedTuple):
    """Rows of a dataset, B of them."""

    observations: FloatArray  # (B, S)
    actions: FloatArray  # (B, A)
    rewards: FloatArray  # (B,)
    next_observations: FloatArray  # (B, S)
    terminals: BoolArray  # (B,)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Transitions (s, a, r, s', terminal, timeout) in file order.

    Columns are converted to C-contiguous float32 and bool arrays; an array that already is one is kept, not
    copied, so do not write to it afterwards (the content hash is computed once).

    `states` are what the simulator was in before each step, unrounded and whole, which observations are not: starts for
    rollouts in the true dynamics. They are optional, and stay in the simulator's units whatever `scaling` says.

    Raises:
        DatasetError: no rows, shapes that disagree, a column of the wrong kind, or a value that is not
            finite.
    """

    name: str
    env_id: str  # Gymnasium id that a policy learned from it is scored in
    observations: FloatArray  # (N, S)
    actions: FloatArray  # (N, A) in the environment's own units
    rewards: FloatArray  # (N,)
    next_observations: FloatArray  # (N, S) the true successor, also where an episode ends
    terminals: BoolArray  # (N,) the environment ended the episode: s' has no value
    timeouts: BoolArray  # (N,) the episode was cut here (time limit, or end of collection): s' has a value
    provenance: Mapping[str, Any] = field(default_factory=dict)  # JSON-able: who made the rows, and how
    scaling: Scaling = field(default_factory=Scaling)
    states: NDArray[np.float64] | None = None  # (N, X) a robot's qpos and qvel

    @classmethod
    def trusted(cls, content_hash: str, **fields: Any) -> "Dataset":
        """A dataset of columns that were checked before, taken as they are: nothing is read here.

        Args:
            content_hash: of these columns and this scaling.
            fields: every field of the class.
        """
        dataset = object.__new__(cls)
        dataset.__dict__.update(fields, content_hash=content_hash)
        return dataset

    def __post_init__(self) -> None:
        columns = {column: np.asarray(getattr(self, column)) for column in COLUMNS}
        check_columns(columns, f"dataset '{self.name}'", DatasetError)
        for column, _ in _FLOAT_COLUMNS:
            object.__setattr__(self, column, self._as_float(column, columns[column]))
        for column in _FLAG_COLUMNS:
            object.__setattr__(self, column, np.ascontiguousarray(columns[column], dtype=np.bool_))
        if self.states is not None:
            object.__setattr__(self, "states", self._checked_states(np.asarray(self.states)))

    def _checked_states(self, states: NDArray[Any]) -> NDArray[np.float64]:
        if states.ndim != 2 or len(states) != self.num_transitions or states.dtype.kind not in "iuf":
            raise DatasetError(
                f"dataset '{self.name}': states are {states.dtype} of shape {states.shape}, numbers of shape"
                f" ({self.num_transitions}, entries) are needed."
            )
        converted = np.ascontiguousarray(states, dtype=np.float64)
        # as for the other columns; that finite float64 overflow a sum is no state of a simulator
        if not np.isfinite(converted.sum()):
            row = int(np.argmax(~np.isfinite(converted).all(axis=1)))
            raise DatasetError(f"dataset '{self.name}': states are not finite at row {row}; leave them out.")
        return converted

    def _as_float(self, column: str, values: NDArray[Any]) -> FloatArray:
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is reported below
            converted = np.ascontiguousarray(values, dtype=np.float32)
            finite = bool(np.isfinite(converted.sum(dtype=np.float64)))
        # The sum of finite float32 is finite in float64; the search is only paid for when it is not.
        if not finite:
            bad = ~np.isfinite(converted)
            place = np.unravel_index(int(np.argmax(bad)), bad.shape)
            where = f"row {place[0]}" + (f", entry {place[1]}" if values.ndim == 2 else "")
            raise DatasetError(
                f"dataset '{self.name}': column '{column}' is {values[place]} at {where} (the first of"
                f" {int(bad.sum())} values that are not finite in float32); remove or repair those rows."
            )
        return converted

    @property
    def num_transitions(self) -> int:
        return self.observations.shape[0]

    @property
    def observation_dim(self) -> int:
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        return self.actions.shape[1]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the six arrays' names, shapes and bytes and of the scaling; the name is not part of it.

        Neither are `states`: what is learned from the rows does not depend on them. So a set has the same products of
        stages, calibrations and place in tables whether its file kept them or not. Only rollouts in the true dynamics
        tell the two apart, by starts that differ in the rounding and clipping of observations.
        """
        digest = hashlib.sha256()
        for column in COLUMNS:
            values = getattr(self, column)
            digest.update(f"{column}{values.shape}".encode())
            # Little-endian on every machine; no copy where it already is.
            digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
        self.scaling.update_hash(digest)
        return digest.hexdigest()

    @cached_property
    def episodes(self) -> EpisodeIndex:
        """Episodes in file order, each ended by a terminal or a timeout; rows after the last are one more."""
        flagged = np.flatnonzero(self.terminals | self.timeouts) + 1
        n = self.num_transitions
        if n == 0:  # an environment that is sampled while learning
            return EpisodeIndex(flagged, flagged, np.ones(0, dtype=np.bool_))
        cut = len(flagged) == 0 or int(flagged[-1]) != n
        ends = np.append(flagged, n) if cut else flagged
        complete = np.ones(len(ends), dtype=np.bool_)
        complete[-1] = not cut
        return EpisodeIndex(np.concatenate([[0], ends[:-1]]).astype(np.int64), ends.astype(np.int64), complete)

    def episode_returns(self) -> NDArray[np.float64]:
        """(number of complete episodes,) undiscounted returns in the environment's rewards, in file order."""
        episodes = self.episodes
        if not len(episodes):
            return np.zeros(0)
        rewards = self.scaling.rewards(self.rewards)
        sums = np.add.reduceat(rewards, episodes.starts, dtype=np.float64)
        return sums[episodes.complete]

    def rows(self, indices: IntArray) -> Batch:
        """The rows of these numbers, copied."""
        return Batch(
            np.take(self.observations, indices, axis=0),
            np.take(self.actions, indices, axis=0),
            np.take(self.rewards, indices),
            np.take(self.next_observations, indices, axis=0),
            np.take(self.terminals, indices),
        )

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Rows drawn uniformly with replacement."""
        return self.rows(rng.integers(self.num_transitions, size=batch_size))

    def summary(self) -> dict[str, Any]:
        """What `offsweep data info` shows, as plain JSON-able values.

        Return statistics are over complete episodes and None when there are none; `score` is the
        D4RL-normalised mean return, None when the environment has no reference pair.
        """
        returns = self.episode_returns()
        reference = reference_scores(self.env_id)
        some = len(returns) > 0
        return {
            "name": self.name,
            "env_id": self.env_id,
            "rows": self.num_transitions,
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "episodes": len(self.episodes),
            "complete_episodes": len(returns),
            "return_mean": float(returns.mean()) if some else None,
            "return_std": float(returns.std()) if some else None,
            "return_min": float(returns.min()) if some else None,
            "return_max": float(returns.max()) if some else None,
            "score": normalized_score(float(returns.mean()), reference) if some and reference else None,
            "score_source": reference.label if reference else None,
            "terminals": int(self.terminals.sum()),
            "timeouts": int(self.timeouts.sum()),
            "states": self.states is not None,
            "content_hash": self.content_hash,
            "provenance": dict(self.provenance),
        }
