"""From the arrays of a file to the columns of a `Dataset`: what the readers of .hdf5 and .npz files share.

Names are D4RL's; the other common ones below are understood too. What is missing and can be known from the rest is
filled in, and the provenance says how.
"""

import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.dataset import COLUMNS, Dataset, check_columns
from envs.errors import UserError
from envs.names import env_id_of

STATE_COLUMNS = ("infos/qpos", "infos/qvel")
"""(N, nq) and (N, nv), D4RL's names for what MuJoCo was in before each step: together a `Dataset`'s `states`."""

EPISODE_LENGTHS = "episode_lengths"
"""(E,) rows of each episode, in file order: stands in for `timeouts`."""

_ALIASES = {
    "observations": ("observation", "obs"),
    "actions": ("action",),
    "rewards": ("reward",),
    "next_observations": ("next_observation", "next_obs"),
    "terminals": ("terminal", "terminations", "termination", "terminated"),
    "timeouts": ("timeout", "truncations", "truncation", "truncated"),
}
_ROWS_AT_ONCE = 65_536
_DONE = ("dones", "done")  # may be set at time limits too, so anything more exact goes first


def column_keys(present: Iterable[str], path: Path, error: type[UserError]) -> dict[str, str]:
    """Which array of a file is which column: {column or EPISODE_LENGTHS: the file's name for it}.

    D4RL's own name goes before any other.

    Args:
        present: the file's names.
        path: of the file, for messages.
        error: what to raise.

    Raises:
        error: a column is missing or there twice, or there is no telling where episodes end.
    """
    present = sorted(present)
    keys: dict[str, str] = {}
    for column in COLUMNS:
        found = [name for name in (column, *_ALIASES[column]) if name in present]
        if column == "terminals" and not found:
            found = [name for name in _DONE if name in present]
        if len(found) > 1 and found[0] != column:
            raise error(f"{path} has both {' and '.join(map(repr, found))}: name the one to use '{column}'.")
        if found:
            keys[column] = found[0]
    if EPISODE_LENGTHS in present:
        keys[EPISODE_LENGTHS] = EPISODE_LENGTHS
    listing = ", ".join(present) or "none"
    for column in ("observations", "actions", "rewards", "terminals"):
        # With the lengths at hand every end can be taken for a cut.
        if column not in keys and (column != "terminals" or EPISODE_LENGTHS not in keys):
            raise error(f"{path} has no column '{column}'; present are {listing}.")
    if keys.keys().isdisjoint(("next_observations", "timeouts", EPISODE_LENGTHS)):
        raise error(
            f"{path} has neither 'next_observations' nor 'timeouts', so the ends of its episodes are unknown; add one"
            f" of them (present are {listing})."
        )
    return keys


def guess_env_id(name: str, path: Path) -> str | None:
    """The Gymnasium id that a dataset's name or its file's name points at, such as expert_data_Hopper-v4.npz."""
    env_id = env_id_of(name) or env_id_of(path.stem)
    if env_id is not None:
        return env_id
    import gymnasium

    parts = set(re.findall(r"(?<![A-Za-z0-9])[A-Z][A-Za-z0-9]*-v\d+", path.stem))
    known = sorted(parts.intersection(gymnasium.registry))
    return known[0] if len(known) == 1 else None


def state_keys(present: Container[str], env_id: str | None) -> dict[str, str]:
    """The part of `column_keys` that depends on the environment: `STATE_COLUMNS` if they are there and of use."""
    if not env_id or not all(key in present for key in STATE_COLUMNS):
        return {}
    from envs.true_dynamics import robot_layout  # brings MuJoCo

    return {} if robot_layout(env_id) is None else {key: key for key in STATE_COLUMNS}


def build_dataset(
    columns: dict[str, Any],
    keys: dict[str, str],
    path: Path,
    name: str,
    env_id: str,
    provenance: dict[str, Any],
    error: type[UserError],
) -> Dataset:
    """The dataset of a file's columns.

    Without `timeouts` the ends of episodes come from `episode_lengths`; without these, a row that is not a terminal
    ends an episode where its next observation is not the next row's observation, and the last row does. Without
    `terminals` (possible with `episode_lengths`) every end is taken for a cut.

    Without `next_observations` they are taken from the following row of the same episode. The last row of every
    episode then has no known successor and is dropped; the row before it becomes a timeout, since the episode goes
    on where the rows stop.

    States that do not fit the observations are left out.

    Args:
        columns: {column, EPISODE_LENGTHS or one of STATE_COLUMNS: array}; what `keys` names.
        keys: from `column_keys` and `state_keys`.
        path: of the file, for messages.
        provenance: what is known so far; entries on what had to be filled in are added.
        error: what to raise for columns that cannot be paired up.

    Raises:
        error: kinds, shapes or lengths of columns do not fit together.
        DatasetError: the rows cannot be used.
    """
    columns, provenance = dict(columns), dict(provenance)
    positions, velocities = (columns.pop(key, None) for key in STATE_COLUMNS)
    for column in columns.keys() - {"observations", "actions", "next_observations"}:
        columns[column] = as_vector(columns[column])
    lengths = columns.pop(EPISODE_LENGTHS, None)
    check_columns(columns, str(path), error)
    if positions is not None and velocities is not None:
        try:
            columns["states"] = join_states(positions, velocities, env_id, columns["observations"])
        except ValueError as reason:
            provenance["states"] = f"infos/qpos and infos/qvel are left out: {reason}"

    if lengths is not None and "timeouts" not in columns:
        ends = _ends(lengths, len(columns["observations"]), path, error)
        if "terminals" not in columns:
            columns["terminals"] = np.zeros(len(ends), dtype=np.bool_)
            provenance["terminals"] = "not in the file: the end of every episode is taken for a cut"
        columns["timeouts"] = ends & ~columns["terminals"].astype(np.bool_)
        provenance["timeouts"] = f"not in the file: from its {EPISODE_LENGTHS}, {len(lengths)} episodes"
    elif "timeouts" not in columns:
        columns["timeouts"] = _infer_timeouts(columns)
        provenance["timeouts"] = (
            f"not in the file: {int(columns['timeouts'].sum())} set where the next observation is not the"
            " following row's observation, and at the last row"
        )
    if keys.get("terminals") in _DONE:
        cut = columns["terminals"].astype(np.bool_) & columns["timeouts"].astype(np.bool_)
        columns["terminals"] = columns["terminals"].astype(np.bool_) & ~cut
        provenance["terminals"] = f"from '{keys['terminals']}'" + (
            f", without the {int(cut.sum())} rows that '{keys['timeouts']}' marks as cut"
            if "timeouts" in keys
            else ", which may be set at time limits too: the file does not tell them apart"
        )
    if "next_observations" not in columns:
        columns, provenance["next_observations"] = _from_following_rows(columns, path, error)
    return Dataset(name=name, env_id=env_id, provenance=provenance, **columns)


def join_states(
    positions: NDArray[Any], velocities: NDArray[Any], env_id: str, observations: NDArray[Any]
) -> NDArray[np.float64]:
    """States (N, X) of a robot with true dynamics from its qpos (N, nq) and qvel (N, nv).

    Raises:
        ValueError: they are not those of this robot, or not those that the observations (N, S) show; says which.
    """
    from envs.true_dynamics import robot_layout  # brings MuJoCo

    layout, rows = robot_layout(env_id), len(observations)
    if layout is None:
        raise ValueError(f"{env_id} is no robot with true dynamics")
    expected = (rows, layout.hidden + layout.positions), (rows, layout.velocities)
    if (positions.shape, velocities.shape) != expected or not {positions.dtype.kind, velocities.dtype.kind} <= set(
        "fiu"
    ):
        raise ValueError(f"they have the shapes {positions.shape} and {velocities.shape}, not {expected[0]} each")
    states = np.concatenate([positions, velocities], axis=1, dtype=np.float64)
    for start in range(0, rows, _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        shown = layout.observe(states[some])
        same = np.isclose(observations[some, : layout.size], shown, rtol=1e-4, atol=1e-5).all(axis=1)
        if not same.all():
            raise ValueError(f"they do not show the observation of row {start + int(np.argmin(same))}")
    return states


def as_vector(values: NDArray[Any]) -> NDArray[Any]:
    """(N, 1) as (N,); anything else as it is."""
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _ends(lengths: NDArray[Any], rows: int, path: Path, error: type[UserError]) -> NDArray[np.bool_]:
    """(N,) true at the last row of every episode."""
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any() or lengths.sum() != rows:
        raise error(
            f"{path}: '{EPISODE_LENGTHS}' must be whole numbers above 0 that add up to the {rows} rows, they are"
            f" {lengths.dtype} of shape {lengths.shape}"
            + (f" and add up to {lengths.sum()}." if lengths.dtype.kind in "iuf" else ".")
        )
    ends = np.zeros(rows, dtype=np.bool_)
    ends[np.cumsum(lengths) - 1] = True
    return ends


def _infer_timeouts(columns: dict[str, Any]) -> NDArray[np.bool_]:
    obs, next_obs = columns["observations"], columns["next_observations"]
    timeouts = np.ones(len(obs), dtype=np.bool_)
    # The tolerance forgives columns that were rounded differently; a reset moves the state by far more.
    timeouts[:-1] = ~np.isclose(next_obs[:-1], obs[1:], rtol=1e-4, atol=1e-5).all(axis=1)
    return timeouts & ~columns["terminals"].astype(np.bool_)


def _from_following_rows(columns: dict[str, Any], path: Path, error: type[UserError]) -> tuple[dict[str, Any], str]:
    last = columns["terminals"].astype(np.bool_) | columns["timeouts"].astype(np.bool_)
    lost_terminals = int(np.count_nonzero(columns["terminals"]))
    last[-1] = True
    if last.all():
        raise error(f"{path} has no 'next_observations' and every row ends an episode: no transition is left.")
    kept = ~last
    successors = columns["observations"][1:][kept[:-1]]
    ends_now = np.append(last[1:], True)  # the row that follows is dropped
    built = {column: values[kept] for column, values in columns.items()}
    built["next_observations"] = successors
    built["terminals"] = np.zeros(len(successors), dtype=np.bool_)
    built["timeouts"] = ends_now[kept]
    return built, (
        f"not in the file: taken from the following row of the same episode; {int(last.sum())} rows at"
        f" episode ends were dropped, {lost_terminals} of them terminals, so episode returns miss their last"
        " reward"
    )
