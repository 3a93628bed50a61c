"""Datasets in D4RL's HDF5 layout.

Written: the six columns of `Dataset` under D4RL's names, and metadata/{name, env_id, provenance} as strings.
Read: such files and D4RL's own; `infos/*` and everything else is left alone.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from envs.dataset import COLUMNS, Dataset
from envs.errors import UserError
from envs.names import env_id_of

_REQUIRED = ("observations", "actions", "rewards", "terminals")


class Hdf5Error(UserError):
    """An HDF5 file cannot be read as a dataset, or not be written."""


def check_writable(path: Path) -> None:
    """Create the folder if needed and try to put a file beside the target.

    Raises:
        Hdf5Error: that does not work.
    """
    if path.is_dir():
        raise Hdf5Error(f"cannot write {path}: it is a folder; give the path of a .hdf5 file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise Hdf5Error(f"cannot write {path}: {error.strerror or error}; choose another place.") from error


def write_hdf5(dataset: Dataset, path: str | Path) -> None:
    """Write a dataset; the file appears whole or not at all.

    Raises:
        Hdf5Error: the target cannot be written, or the provenance is not JSON.
    """
    path = Path(path)
    check_writable(path)
    try:
        provenance = json.dumps(dict(dataset.provenance), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Hdf5Error(f"dataset '{dataset.name}': its provenance cannot be stored as JSON ({error}).") from error
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with h5py.File(temporary, "w") as file:
            for column in COLUMNS:
                file.create_dataset(column, data=getattr(dataset, column))
            metadata = file.create_group("metadata")
            metadata["name"] = dataset.name
            metadata["env_id"] = dataset.env_id
            metadata["provenance"] = provenance
        os.chmod(temporary, 0o644)  # mkstemp's files are private, datasets are shared
        os.replace(temporary, path)
    except OSError as error:
        raise Hdf5Error(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_hdf5(path: str | Path, name: str | None = None, env_id: str | None = None) -> Dataset:
    """Read a dataset in D4RL's layout.

    Without `next_observations` they are taken from the following row of the same episode. The last row of
    every episode then has no known successor and is dropped; the row before it becomes a timeout, since the
    episode goes on where the rows stop. The provenance says how many rows and terminals were lost.

    Without `timeouts` a row that is not a terminal ends an episode where its next observation is not the next
    row's observation, and the last row does. Without either there is no telling where episodes end: an error.

    Args:
        path: the file.
        name: of the dataset; default the file's own (metadata/name), else its stem.
        env_id: Gymnasium id; default the file's own (metadata/env_id), else guessed from the name.

    Raises:
        Hdf5Error: no such file, not an HDF5 file or cut short, a missing column, or an unknown environment.
        DatasetError: the rows cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise Hdf5Error(f"there is no dataset file {path}.")
    try:
        with h5py.File(path, "r") as file:
            present = sorted(key for key, item in file.items() if isinstance(item, h5py.Dataset))
            columns = {column: file[column][()] for column in COLUMNS if column in present}
            metadata = _metadata(file)
    except (OSError, RuntimeError, KeyError) as error:
        raise Hdf5Error(
            f"{path} cannot be read as HDF5: it is cut short, damaged or another kind of file; fetch or"
            " collect it again."
        ) from error

    for column in _REQUIRED:
        if column not in columns:
            raise Hdf5Error(f"{path} has no column '{column}'; present are {', '.join(present) or 'none'}.")
    if "next_observations" not in columns and "timeouts" not in columns:
        raise Hdf5Error(
            f"{path} has neither 'next_observations' nor 'timeouts', so the ends of its episodes are"
            f" unknown; add one of them (present are {', '.join(present)})."
        )
    name = name or str(metadata.get("name") or path.stem)
    env_id = env_id or str(metadata.get("env_id") or env_id_of(name) or env_id_of(path.stem) or "")
    if not env_id:
        raise Hdf5Error(
            f"{path} does not say which environment it belongs to; write the Gymnasium id into"
            " metadata/env_id or give env_id."
        )
    provenance = _provenance(metadata, path)
    for column in ("rewards", "terminals", "timeouts"):
        if column in columns and columns[column].ndim == 2 and columns[column].shape[1] == 1:
            columns[column] = columns[column][:, 0]
    _same_rows(columns, path)

    if "timeouts" not in columns:
        columns["timeouts"] = _infer_timeouts(columns)
        provenance["timeouts"] = (
            f"not in the file: {int(columns['timeouts'].sum())} set where the next observation is not the"
            " following row's observation, and at the last row"
        )
    if "next_observations" not in columns:
        columns, provenance["next_observations"] = _from_following_rows(columns, path)
    return Dataset(name=name, env_id=env_id, provenance=provenance, **columns)


def _metadata(file: h5py.File) -> dict[str, str | float | bool]:
    """Scalars under metadata/, attributes or datasets; the policies that D4RL keeps there are skipped."""
    found: dict[str, Any] = {}
    group = file.get("metadata")
    if isinstance(group, h5py.Group):
        found |= {key: value for key, value in group.attrs.items() if np.ndim(value) == 0}
        found |= {key: item[()] for key, item in group.items() if isinstance(item, h5py.Dataset) and item.shape == ()}
    plain: dict[str, str | float | bool] = {}
    for key, value in found.items():
        scalar = value.item() if isinstance(value, np.generic) else value
        if isinstance(scalar, bytes):
            scalar = scalar.decode("utf-8", errors="replace")
        if isinstance(scalar, str | int | float | bool):
            plain[key] = scalar
    return plain


def _provenance(metadata: dict[str, str | float | bool], path: Path) -> dict[str, Any]:
    if "provenance" in metadata:
        try:
            stored = json.loads(str(metadata["provenance"]))
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise Hdf5Error(f"{path}: metadata/provenance is not a JSON object; remove it or repair it.")
        return stored
    others = {key: value for key, value in metadata.items() if key not in ("name", "env_id")}
    return {"source": "file", "file": path.name} | ({"metadata": others} if others else {})


def _same_rows(columns: dict[str, NDArray[Any]], path: Path) -> None:
    """What follows pairs rows up, so this cannot wait for the checks of `Dataset`."""
    rows = {column: values.shape[0] if values.ndim else 0 for column, values in columns.items()}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{column} {count}" for column, count in rows.items())
        raise Hdf5Error(f"{path}: columns have different numbers of rows ({counts}).")
    if not rows["observations"]:
        raise Hdf5Error(f"{path} has no rows.")


def _infer_timeouts(columns: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    obs, next_obs = columns["observations"], columns["next_observations"]
    timeouts = np.ones(len(obs), dtype=np.bool_)
    # The tolerance forgives columns that were rounded differently; a reset moves the state by far more.
    timeouts[:-1] = ~np.isclose(next_obs[:-1], obs[1:], rtol=1e-4, atol=1e-5).all(axis=1)
    return timeouts & ~columns["terminals"].astype(np.bool_)


def _from_following_rows(columns: dict[str, NDArray[Any]], path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    last = columns["terminals"].astype(np.bool_) | columns["timeouts"].astype(np.bool_)
    lost_terminals = int(np.count_nonzero(columns["terminals"]))
    last[-1] = True
    if last.all():
        raise Hdf5Error(f"{path} has no 'next_observations' and every row ends an episode: no transition is left.")
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
