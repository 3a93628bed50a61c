"""Datasets in NumPy's .npz: plain arrays under D4RL's names or the other names in `envs.columns`."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from envs.columns import build_dataset, column_keys, guess_env_id, state_keys
from envs.dataset import Dataset
from envs.errors import UserError


class NpzError(UserError):
    """A .npz file cannot be read as a dataset."""


def read_npz(path: str | Path, name: str | None = None, env_id: str | None = None) -> Dataset:
    """Read a dataset from a .npz file.

    Missing `next_observations` or `timeouts` are filled in as `envs.columns.build_dataset` says. Arrays that are no
    columns are left alone; pickled ones are never opened.

    Args:
        path: the file.
        name: of the dataset; default the file's own (a text array `name`), else its stem.
        env_id: Gymnasium id; default the file's own (a text array `env_id`), else guessed from the name: the stem
            expert_data_Hopper-v4 says Hopper-v4.

    Raises:
        NpzError: no such file, not an .npz file or cut short, a missing column, or an unknown environment.
        DatasetError: the rows cannot be used.
    """
    path = Path(path)
    with open_npz(path) as archive:
        keys = column_keys((key for key in archive.files if key not in ("name", "env_id")), path, NpzError)
        name = name or _text(archive, "name") or path.stem
        env_id = env_id or _text(archive, "env_id") or guess_env_id(name, path)
        keys |= state_keys(archive.files, env_id)
        columns: dict[str, Any] = {column: archive[key] for column, key in keys.items()}
    if env_id is None:
        raise NpzError(
            f"{path} does not say which environment it belongs to; put the Gymnasium id into a text array 'env_id' or"
            " into the file's name, as in my-data_Hopper-v4.npz."
        )
    return build_dataset(columns, keys, path, name, env_id, {"source": "file", "file": path.name}, NpzError)


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """The open file; what goes wrong in it, also later while its arrays are read, is one sentence.

    Raises:
        NpzError: no such file, another kind of file, cut short or damaged.
    """
    if not path.is_file():
        raise NpzError(f"there is no dataset file {path}.")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise NpzError(f"{path} holds a single array; a dataset is an .npz file of named arrays.")
        with archive:
            yield archive
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise NpzError(
            f"{path} cannot be read as .npz: it is empty, cut short, damaged, another kind of file or holds Python"
            " objects; fetch it again or write it with numpy.savez from plain arrays."
        ) from error


def _text(archive: NpzFile, key: str) -> str | None:
    value = archive[key] if key in archive.files else None
    return str(value[()]) or None if value is not None and value.ndim == 0 and value.dtype.kind == "U" else None
