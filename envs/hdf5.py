"""Datasets in D4RL's HDF5 layout.

Written: the columns of `Dataset` under D4RL's names (states as infos/qpos and infos/qvel), and metadata/{name, env_id,
provenance} as strings. Read: such files and D4RL's own; other `infos/*` and everything else is left alone.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from envs.columns import STATE_COLUMNS, build_dataset, column_keys, guess_env_id, state_keys
from envs.dataset import COLUMNS, Dataset
from envs.errors import UserError
from envs.files import write_atomically


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
        Hdf5Error: the target cannot be written, the provenance is not JSON, or the states are not those of a robot that
            `envs.true_dynamics` knows.
    """
    path = Path(path)
    check_writable(path)
    states = _split_states(dataset)
    try:
        provenance = json.dumps(dict(dataset.provenance), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Hdf5Error(f"dataset '{dataset.name}': its provenance cannot be stored as JSON ({error}).") from error

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w") as file:
            for column in COLUMNS:
                file.create_dataset(column, data=getattr(dataset, column))
            for column, values in states.items():
                file.create_dataset(column, data=values)
            metadata = file.create_group("metadata")
            metadata["name"] = dataset.name
            metadata["env_id"] = dataset.env_id
            metadata["provenance"] = provenance

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # h5py closes a file on a full disk with a RuntimeError
        raise Hdf5Error(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free some room or choose another place."
        ) from error


def read_hdf5(path: str | Path, name: str | None = None, env_id: str | None = None) -> Dataset:
    """Read a dataset in D4RL's layout; other names for its columns are those of `envs.columns`.

    Missing `next_observations` or `timeouts` are filled in as `envs.columns.build_dataset` says; without either there
    is no telling where episodes end: an error.

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
    if not path.stat().st_size:
        raise Hdf5Error(f"{path} is empty; fetch or collect it again.")
    try:
        with h5py.File(path, "r") as file:
            keys = column_keys((key for key, item in file.items() if isinstance(item, h5py.Dataset)), path, Hdf5Error)
            metadata = _metadata(file)
            name = name or str(metadata.get("name") or path.stem)
            env_id = env_id or str(metadata.get("env_id") or guess_env_id(name, path) or "")
            keys |= state_keys(file, env_id)
            columns = {column: file[key][()] for column, key in keys.items()}
    except (OSError, RuntimeError, KeyError) as error:
        raise Hdf5Error(
            f"{path} cannot be read as HDF5: it is cut short, damaged or another kind of file; fetch or"
            " collect it again."
        ) from error

    if not env_id:
        raise Hdf5Error(
            f"{path} does not say which environment it belongs to; write the Gymnasium id into"
            " metadata/env_id or give env_id."
        )
    return build_dataset(columns, keys, path, name, env_id, _provenance(metadata, path), Hdf5Error)


def _split_states(dataset: Dataset) -> dict[str, NDArray[np.float64]]:
    if dataset.states is None:
        return {}
    from envs.true_dynamics import robot_layout  # brings MuJoCo

    layout = robot_layout(dataset.env_id)
    if layout is None or layout.state_dim != dataset.states.shape[1]:
        raise Hdf5Error(
            f"dataset '{dataset.name}': its {dataset.states.shape[1]} states per row are not qpos and qvel of"
            f" '{dataset.env_id}'; write it without them."
        )
    return dict(zip(STATE_COLUMNS, np.split(dataset.states, [layout.hidden + layout.positions], axis=1), strict=True))


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
