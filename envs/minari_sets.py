"""Minari's datasets by their own ids, such as `mujoco/hopper/medium-v0`.

Minari (the extra `minari`) opens and downloads them; it is not needed to list those on this machine. Its HDF5 files
hold a group of five arrays per episode, and opening these one by one is nearly all the time of reading short episodes.
They are therefore read here, straight into columns for the whole dataset.

Shape suffixes: N rows, E episodes, S observation, A action.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5s, h5t
from numpy.typing import NDArray

from envs.catalogue import Entry, Progress
from envs.columns import STATE_COLUMNS, join_states, state_keys
from envs.dataset import Dataset
from envs.errors import UnknownDatasetError, UserError

_NAME = re.compile(r"(?!(?:embedded|neorl|collected)/)(?:[-\w]+/)+[-\w]+-v\d+")
_MAIN_FILE = "main_data.hdf5"
# What Minari's metadata say about the origin of a dataset, if its makers filled it in.
_ORIGIN = ("author", "algorithm_name", "code_permalink", "license", "combined_datasets", "requirements")
_REFERENCE = ("ref_min_score", "ref_max_score", "num_episodes_average_score")


class MinariError(UserError):
    """A Minari dataset cannot be opened, read or downloaded."""


def is_minari_name(name: str) -> bool:
    """Whether this is the form of a Minari id: at least one namespace, and a version behind."""
    return _NAME.fullmatch(name) is not None


def minari_folder() -> Path:
    """Where Minari keeps datasets: $MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def minari_path(name: str) -> Path:
    """The folder with a dataset's metadata and rows, there or not."""
    return minari_folder() / name / "data"


def missing(name: str) -> str | None:
    """The name, if it is one of Minari's form whose rows are not on this machine."""
    return name if is_minari_name(name) and not _is_whole(minari_path(name)) else None


def minari_source(name: str) -> dict[str, Any]:
    """How a dataset is known again: by its place and its files' sizes and times of change; JSON-able."""
    path = minari_path(name)
    files = [file for file in (path / "metadata.json", path / _MAIN_FILE, path) if file.exists()]
    status = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"minari": name, "folder": str(path.resolve()), "files": status}


def entries() -> list[Entry]:
    """A line per dataset on this machine."""
    folder = minari_folder()
    lines = []
    for path in _data_folders(folder):
        if not _is_whole(path):
            continue
        try:
            metadata = _metadata(path) or {}
        except MinariError:  # shown all the same: loading it says what is wrong
            metadata = {}
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        name = path.parent.relative_to(folder).as_posix()
        lines.append(Entry(name, "Minari", _env_id(metadata), path, True, size, metadata.get("license")))
    return sorted(lines, key=lambda line: line.name)


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Download a dataset through Minari, to where Minari keeps it, unless it is there; returns its folder.

    The download is resumed and shown by Minari's own client: `progress` is not called. No part of a dataset stays
    behind under its name.

    Raises:
        UserError: Minari is not installed, its server cannot be reached or does not have the dataset.
    """
    path = minari_path(name)
    if _is_whole(path):
        return path
    minari = _import_minari(name)
    from envs.download import probe  # brings requests

    probe(name, _address(name), path)
    # Minari takes any folder of this name for the dataset.
    _remove_part(path)
    try:
        minari.download_dataset(name)
    except Exception as error:  # Minari and its storage clients raise whatever suits them
        raise MinariError(
            f"the Minari dataset '{name}' cannot be downloaded to {path}: {_first_line(error)}"
        ) from error
    finally:
        _remove_part(path)
    if not _is_whole(path):
        raise MinariError(f"Minari downloaded '{name}' without its rows to {path}; try again.")
    return path


def read_minari(name: str) -> Dataset:
    """Read a dataset that is on this machine; the network is left alone.

    A row that Minari marks as both terminated and truncated is a terminal; a last row that it marks as neither is a
    timeout.

    Raises:
        UnknownDatasetError: it is not on this machine.
        MinariError: Minari is not installed or cannot open it, it is damaged, its observations or actions are not
            flat vectors, or it names no environment.
        DatasetError: the rows cannot be used.
    """
    path = minari_path(name)
    if not _is_whole(path):
        raise UnknownDatasetError(
            f"the Minari dataset '{name}' is not on this machine: {path} does not hold it; download it with"
            f" `minari download {name}`, or point MINARI_DATASETS_PATH at the folder that holds it."
        )
    minari = _import_minari(name)
    try:
        dataset = minari.load_dataset(name)
        metadata = _metadata(path) or {}
        shapes = [_vector_length(name, kind, getattr(dataset, f"{kind}_space")) for kind in ("observation", "action")]
        if dataset.env_spec is None:
            raise MinariError(f"the Minari dataset '{name}' does not say which environment it belongs to.")
        rows = _Rows.empty(int(dataset.total_steps), int(dataset.total_episodes), *shapes)
        stored: dict[str, NDArray[Any]] = {}
        if metadata.get("data_format") == "hdf5":
            _read_file(path / _MAIN_FILE, rows)
            stored = _read_states(path / _MAIN_FILE, rows, dataset.env_spec.id)
        else:
            _read_episodes(dataset, rows)
    except UserError:
        raise
    except Exception as error:
        raise MinariError(
            f"the Minari dataset '{name}' in {path} cannot be read with Minari {minari.__version__}"
            f" ({_first_line(error)}); if it is damaged, remove the folder and download it again."
        ) from error
    return _dataset(name, dataset, metadata, rows, stored)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Columns of a whole dataset, filled episode after episode; an episode of T steps has T + 1 observations."""

    observations: NDArray[np.float32]  # (N + E, S)
    actions: NDArray[np.float32]  # (N, A)
    rewards: NDArray[np.float32]  # (N,)
    terminations: NDArray[np.uint8]  # (N,)
    truncations: NDArray[np.uint8]  # (N,)
    lengths: NDArray[np.int64]  # (E,)

    @classmethod
    def empty(cls, rows: int, episodes: int, observation_dim: int, action_dim: int) -> "_Rows":
        return cls(
            np.empty((rows + episodes, observation_dim), np.float32),
            np.empty((rows, action_dim), np.float32),
            np.empty(rows, np.float32),
            np.empty(rows, np.uint8),
            np.empty(rows, np.uint8),
            np.zeros(episodes, np.int64),
        )

    def episode(self, number: int, start: int, length: int) -> dict[str, NDArray[Any]]:
        """Where the arrays of an episode go; `start` is its first row."""
        self.lengths[number] = length
        stop = start + length
        return {
            "observations": self.observations[start + number : stop + number + 1],
            "actions": self.actions[start:stop],
            "rewards": self.rewards[start:stop],
            "terminations": self.terminations[start:stop],
            "truncations": self.truncations[start:stop],
        }


def _read_file(file_path: Path, rows: _Rows) -> None:
    """Fill `rows` from Minari's HDF5 layout, group episode_<i> for each i."""
    memory_types = {np.dtype(np.float32): h5t.NATIVE_FLOAT, np.dtype(np.uint8): h5t.NATIVE_UINT8}
    start = 0
    with h5py.File(file_path, "r") as file:
        for number in range(len(rows.lengths)):
            # The low-level calls, since file[...][()] takes four times as long here.
            group = h5g.open(file.id, f"episode_{number}".encode())
            length = h5d.open(group, b"rewards").shape[0]
            for key, target in rows.episode(number, start, length).items():
                source = h5d.open(group, key.encode())
                _check_shape(number, key, source.shape, target.shape)  # HDF5 would write past the end
                source.read(h5s.ALL, h5s.ALL, target, memory_types[target.dtype])
            start += length
    _check_total(start, rows)


def _read_states(file_path: Path, rows: _Rows, env_id: str) -> dict[str, NDArray[Any]]:
    """`STATE_COLUMNS` where the infos of every episode hold them: T rows, or T + 1 with that of the reset first."""
    found = {}
    with h5py.File(file_path, "r") as file:
        for column in state_keys(file["episode_0"], env_id) if len(rows.lengths) else ():
            parts = [
                file[f"episode_{number}"][column][:length]
                for number, length in enumerate(rows.lengths)
                if column in file[f"episode_{number}"]
            ]
            if len(parts) == len(rows.lengths):
                found[column] = np.concatenate(parts)
    return found if len(found) == len(STATE_COLUMNS) else {}


def _read_episodes(dataset: Any, rows: _Rows) -> None:
    """Fill `rows` through Minari, for its other storage formats."""
    start = 0
    for number, episode in enumerate(dataset.iterate_episodes()):
        length = len(episode.rewards)
        for key, target in rows.episode(number, start, length).items():
            values = np.asarray(getattr(episode, key))
            _check_shape(number, key, values.shape, target.shape)
            target[...] = values
        start += length
    _check_total(start, rows)


def _check_shape(number: int, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"'{key}' of episode {number} has shape {found}, {expected} is left for it")


def _check_total(total: int, rows: _Rows) -> None:
    if total != len(rows.rewards):
        raise ValueError(f"its episodes have {total} steps, its metadata say {len(rows.rewards)}")


def _dataset(
    name: str, dataset: Any, metadata: dict[str, Any], rows: _Rows, stored: dict[str, NDArray[Any]]
) -> Dataset:
    ends = np.cumsum(rows.lengths)
    last = ends + np.arange(len(ends))  # of each episode's observations
    is_next, is_current = np.ones((2, len(rows.observations)), dtype=np.bool_)
    is_next[last - rows.lengths] = False
    is_current[last] = False
    terminals = rows.terminations.astype(np.bool_)
    timeouts = rows.truncations.astype(np.bool_)
    timeouts[ends - 1] = True
    timeouts &= ~terminals
    spec = dataset.env_spec
    provenance: dict[str, Any] = {
        "source": "Minari",
        "dataset": dataset.id,
        "minari_version": dataset.minari_version,
        "environment": {"id": spec.id, "kwargs": spec.kwargs},
    }
    evaluation = json.loads(metadata.get("eval_env_spec") or "{}")
    if evaluation and (evaluation.get("id"), evaluation.get("kwargs")) != (spec.id, spec.kwargs):
        provenance["evaluation_environment"] = {key: evaluation.get(key) for key in ("id", "kwargs")}
    provenance |= {key: metadata[key] for key in (*_ORIGIN, *_REFERENCE) if metadata.get(key) not in (None, [])}
    observations, states = rows.observations[is_current], None
    if stored:
        try:
            positions, velocities = (stored[column] for column in STATE_COLUMNS)
            states = join_states(positions, velocities, spec.id, observations)
        except ValueError as reason:
            provenance["states"] = f"infos/qpos and infos/qvel are left out: {reason}"
    return Dataset(
        name=name,
        env_id=spec.id,
        observations=observations,
        actions=rows.actions,
        rewards=rows.rewards,
        next_observations=rows.observations[is_next],
        terminals=terminals,
        timeouts=timeouts,
        states=states,
        provenance=provenance,
    )


def _vector_length(name: str, kind: str, space: Any) -> int:
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or len(space.shape) != 1:
        raise MinariError(
            f"the Minari dataset '{name}' has {kind}s of the form {' '.join(str(space).split())}; only flat vectors (a"
            " Box with one axis) can be learned from here."
        )
    return space.shape[0]


def _import_minari(name: str) -> Any:
    try:
        import minari
    except ImportError as error:
        raise MinariError(
            f"the Minari dataset '{name}' needs Minari, which is not installed: pip install 'offsweep[minari]'."
        ) from error
    return minari


def _address(name: str) -> str:
    """What a download reaches first: $MINARI_REMOTE, else Minari's account at Hugging Face."""
    kind, _, account = (os.environ.get("MINARI_REMOTE") or "hf://farama-minari").partition("://")
    if kind == "gcp":
        return f"https://storage.googleapis.com/{account}/{name}"
    server = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{server}/datasets/{account}/{name.split('/')[0]}"


def _is_whole(path: Path) -> bool:
    try:
        metadata = _metadata(path)
    except MinariError:
        return True  # there, and damaged: reading it says so
    if metadata is None:
        return False
    if metadata.get("data_format") in (None, "hdf5"):
        return (path / _MAIN_FILE).is_file()
    return sum(entry.name.isdecimal() for entry in os.scandir(path)) >= metadata.get("total_episodes", 1)


def _metadata(path: Path) -> dict[str, Any] | None:
    file = path / "metadata.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MinariError(
            f"{file} cannot be read as Minari's metadata; remove the dataset and get it again."
        ) from error
    return content if isinstance(content, dict) else {}


def _env_id(metadata: dict[str, Any]) -> str | None:
    try:
        return str(json.loads(metadata["env_spec"])["id"])
    except (KeyError, TypeError, ValueError):
        return None


def _data_folders(folder: Path) -> Iterator[Path]:
    for root, folders, _ in os.walk(folder):
        if "data" in folders:
            folders.clear()
            yield Path(root) / "data"
        folders[:] = [name for name in folders if not name.startswith(".")]


def _remove_part(path: Path) -> None:
    """Remove what is there of a dataset that is not whole."""
    if path.parent.is_dir() and not _is_whole(path):
        shutil.rmtree(path, ignore_errors=True)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
