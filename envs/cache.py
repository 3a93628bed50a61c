"""The flat store: every dataset once, under its content hash, as columns that are mapped into memory.

    <folder>/sets/<content hash>/observations.npy, actions.npy, ...   what `np.load(..., mmap_mode="r")` reads
    <folder>/sets/<content hash>-states/...                           the same and states.npy, which the hash leaves out
    <folder>/sources/<key>.json                                       what a source gave: its set, name, provenance

A source is looked up by what it is made of (a file's path, size and time; a recipe; the hashes that a mix is made of),
so the second use opens the columns without reading them, whatever the source. Processes that map them share the pages.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.dataset import COLUMNS, Dataset, Scaling
from envs.errors import UserError
from envs.files import locked, write_atomically

_LAYOUT = 2  # raised when readers give other rows for the same source, or the files below change
_SCALING_ARRAYS = ("observation_mean", "observation_std")


class CacheError(UserError):
    """The flat store cannot be written."""


@dataclass(frozen=True)
class FlatStore:
    """The flat store in `folder`."""

    folder: Path

    def get(self, source: Mapping[str, Any], make: Callable[[], Dataset]) -> Dataset:
        """The dataset of a source: opened if it was stored before, else made, checked and stored.

        Of two processes that need it at once, one makes it. A set that is damaged is made again.

        Args:
            source: JSON-able; names everything that the rows and their provenance depend on.

        Raises:
            CacheError: there is no room, or the folder cannot be written.
            UserError: whatever `make` raises.
        """
        path = self._source_path(source)
        dataset = self._open(path)
        if dataset is None:
            dataset = self._make(path, source, make)
            if dataset is None:
                raise CacheError(f"{path} was written and cannot be read back; remove {self.folder} and try again.")
        return dataset

    def _make(self, path: Path, source: Mapping[str, Any], make: Callable[[], Dataset]) -> Dataset | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"the cache folder {self.folder} cannot be made: {error.strerror or error}; point $OFFSWEEP_CACHE at"
                " another folder."
            ) from error
        with locked(path.with_suffix(".lock")):
            dataset = self._open(path)  # another process may have made it meanwhile
            if dataset is None:
                self._store(path, source, make())
                dataset = self._open(path)
        return dataset

    def holds(self, source: Mapping[str, Any]) -> bool:
        """Whether `get` would open this source instead of making it."""
        return self.opened(source) is not None

    def opened(self, source: Mapping[str, Any]) -> Dataset | None:
        """The dataset of a source if it was stored before."""
        return self._open(self._source_path(source))

    def _source_path(self, source: Mapping[str, Any]) -> Path:
        text = json.dumps([_LAYOUT, source], sort_keys=True)
        return self.folder / "sources" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _set_folder(self, content_hash: str, with_states: bool) -> Path:
        return self.folder / "sets" / (content_hash[:32] + ("-states" if with_states else ""))

    def _open(self, path: Path) -> Dataset | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            folder = self._set_folder(record["content_hash"], record["states"])
            names = (*COLUMNS, "states") if record["states"] else COLUMNS
            columns = {column: _mapped(folder / f"{column}.npy") for column in names}
            scaling = {k: _mapped(folder / f"{k}.npy") for k in _SCALING_ARRAYS if record["scaling"][k]}
            if {len(column) for column in columns.values()} != {record["rows"]}:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or damaged: it is made again
        return Dataset.trusted(
            record["content_hash"], name=record["name"], env_id=record["env_id"], provenance=record["provenance"],
            scaling=Scaling(**(record["scaling"] | dict.fromkeys(_SCALING_ARRAYS) | scaling)), **columns,
        )  # fmt: skip

    def _store(self, path: Path, source: Mapping[str, Any], dataset: Dataset) -> None:
        arrays = {column: getattr(dataset, column) for column in COLUMNS}
        if dataset.states is not None:
            arrays["states"] = dataset.states
        kept = {name: getattr(dataset.scaling, name) for name in _SCALING_ARRAYS}
        arrays |= {name: values for name, values in kept.items() if values is not None}
        record = {
            "source": source, "name": dataset.name, "env_id": dataset.env_id, "rows": dataset.num_transitions,
            "content_hash": dataset.content_hash, "states": dataset.states is not None,
            "provenance": dict(dataset.provenance),
            "scaling": {
                "reward_scale": dataset.scaling.reward_scale, "reward_shift": dataset.scaling.reward_shift,
                **{name: values is not None for name, values in kept.items()},
            },
        }  # fmt: skip
        target = self._set_folder(dataset.content_hash, dataset.states is not None)
        temporary: Path | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            needed = sum(values.nbytes for values in arrays.values())
            free = shutil.disk_usage(target.parent).free
            if needed > free:
                raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
            for name, values in arrays.items():
                np.save(temporary / f"{name}.npy", values)
            temporary.chmod(0o755)  # mkdtemp's folders are private, datasets are shared
            _replace_folder(temporary, target)
            write_atomically(path, lambda p: p.write_text(json.dumps(record), encoding="utf-8"))
        except OSError as error:
            raise CacheError(
                f"dataset '{dataset.name}' cannot be stored in {self.folder}: {error.strerror or error}; free some"
                " room, or point $OFFSWEEP_CACHE at another folder."
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def flat_store(workdir: Path) -> FlatStore:
    """The store in $OFFSWEEP_CACHE, else `workdir`/cache."""
    return FlatStore(Path(os.environ.get("OFFSWEEP_CACHE") or workdir / "cache").expanduser())


def file_source(path: Path, **more: Any) -> dict[str, Any]:
    """How a file is known again: by its place, size and time of change.

    Args:
        more: what else the rows depend on, such as the name under which it is loaded.
    """
    status = path.stat()
    return {"file": str(path.resolve()), "size": status.st_size, "changed": status.st_mtime_ns, **more}


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    # a plain view: an array of the subclass memmap would be pickled whole and be slower to index
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _replace_folder(new: Path, target: Path) -> None:
    """Put a whole folder in place of whatever is there: a damaged set, or the same columns from another source."""
    with locked(target.with_suffix(".lock")):
        if target.exists():
            aside = new.with_name(f"{new.name}-old")
            os.rename(target, aside)  # who has it mapped keeps its pages
            os.rename(new, target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(new, target)
