"""NeoRL's MuJoCo sets (Qin et al. 2022): where their files are, and how their rows are read.

Names are `neorl/<environment>-<level>-<trajectories>`, such as `neorl/Hopper-v3-medium-1000`, and with `-val` NeoRL's
validation files. File names, addresses and checksums (references/neorl_files.csv) are those of polixir/NeoRL a4b6c57,
neorl/data_map.json. NeoRL's loader does not offer the `expert` files that this map also lists.
"""

import csv
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.catalogue import Entry, Progress
from envs.columns import as_vector
from envs.dataset import Dataset, check_columns
from envs.errors import UserError
from envs.npz import open_npz

LICENCE = "CC BY 4.0"  # of the data: NeoRL's README

_FILES = Path(__file__).parent / "references" / "neorl_files.csv"
_SERVER = "http://datasets.polixir.site/v2"
_TIME_LIMIT = 1000
_KEYS = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "next_observations": "next_obs",
    "terminals": "done",
}


class NeorlError(UserError):
    """A file is not one of NeoRL's."""


@dataclass(frozen=True)
class NeorlSpec:
    """A NeoRL set: the environment that it is scored in, its file and where that comes from."""

    name: str
    env_id: str
    file_name: str
    url: str
    md5: str


@cache
def neorl_specs() -> dict[str, NeorlSpec]:
    """All sets by name, in the order of NeoRL's own map."""
    specs = {}
    with open(_FILES, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # <environment>-v3-<level>-<trajectories>-<train|val>-noise.npz
            label, part = row["file"].removesuffix("-noise.npz").rsplit("-", 1)
            environment = label.split("-")[0]
            name = f"neorl/{label}" + ("-val" if part == "val" else "")
            url = f"{_SERVER}/{environment}-v3/{row['file']}"
            specs[name] = NeorlSpec(name, f"neorl/{environment}-v4", row["file"], url, row["md5"])
    return specs


def neorl_spec(name: str) -> NeorlSpec | None:
    """The NeoRL set of this name, or None."""
    return neorl_specs().get(name)


def neorl_folder() -> Path:
    """Where downloads go: $NEORL_DATASET_DIR, else ~/.neorl/datasets."""
    return Path(os.environ.get("NEORL_DATASET_DIR") or "~/.neorl/datasets").expanduser()


def neorl_path(spec: NeorlSpec) -> Path:
    """The set's file: in `neorl_folder()`, or where an installed `neorl` package has put it (its folder `data`)."""
    path = neorl_folder() / spec.file_name
    package = find_spec("neorl")
    if not path.is_file() and package is not None and package.origin:
        theirs = Path(package.origin).parent / "data" / spec.file_name
        if theirs.is_file():
            return theirs
    return path


def entries() -> list[Entry]:
    """A line per set. NeoRL publishes no sizes: only those of files in place are known."""
    lines = []
    for spec in neorl_specs().values():
        path = neorl_path(spec)
        present = path.is_file()
        size = path.stat().st_size if present else None
        lines.append(Entry(spec.name, "NeoRL", spec.env_id, path, present, size, LICENCE))
    return lines


def fetch(spec: NeorlSpec, progress: Progress | None = None) -> Path:
    """The set's file, downloaded and checked unless it is there already.

    Args:
        spec: the set.
        progress: called with the bytes done and the total (None: not known).

    Raises:
        DownloadError: it cannot be downloaded.
    """
    path = neorl_path(spec)
    if path.is_file():
        return path
    from envs.download import download  # brings requests

    return download(spec.name, spec.url, path, md5=spec.md5, progress=progress)


def read_neorl(spec: NeorlSpec, path: Path) -> Dataset:
    """Read one of NeoRL's files.

    NeoRL's `done` is set where a trajectory reached 1000 steps, too. Such a row is a timeout here when its next
    observation is still healthy by the environment's rule, and so is the end of a trajectory that is not done.

    Raises:
        NpzError, NeorlError: the file cannot be read, or is not laid out as NeoRL's are.
        DatasetError: the rows cannot be used.
    """
    with open_npz(path) as archive:
        missing = [key for key in (*_KEYS.values(), "index") if key not in archive.files]
        if missing:
            raise NeorlError(
                f"{path} has no '{missing[0]}'; a NeoRL file holds {', '.join((*_KEYS.values(), 'index'))}, present"
                f" are {', '.join(sorted(archive.files)) or 'none'}."
            )
        columns: dict[str, Any] = {column: archive[key] for column, key in _KEYS.items()}
        index = as_vector(archive["index"])
    for column in ("rewards", "terminals"):
        columns[column] = as_vector(columns[column])
    check_columns(columns, str(path), NeorlError)

    ends = _trajectory_ends(index, len(columns["rewards"]), path)
    done = columns["terminals"].astype(np.bool_)
    at_limit = ends[np.diff(ends, prepend=-1) >= _TIME_LIMIT]
    healthy = at_limit[~_terminated(spec.env_id, columns["next_observations"][at_limit])]
    timeouts = np.zeros(len(done), dtype=np.bool_)
    timeouts[ends[~done[ends]]] = True
    timeouts[healthy] = True
    columns |= {"terminals": done & ~timeouts, "timeouts": timeouts}
    provenance = {
        "source": "NeoRL",
        "file": spec.file_name,
        "url": spec.url,
        "licence": LICENCE,
        "trajectories": len(ends),
        "timeouts": f"{int(done[healthy].sum())} rows that 'done' marks at {_TIME_LIMIT} steps, still healthy; and"
        f" {int((~done[ends]).sum())} trajectories that end without it",
    }
    return Dataset(name=spec.name, env_id=spec.env_id, provenance=provenance, **columns)


def _trajectory_ends(index: NDArray[Any], rows: int, path: Path) -> NDArray[np.int64]:
    """(E,) last row of every trajectory; `index` holds where the following ones start, maybe as float32."""
    whole = index.ndim == 1 and index.dtype.kind in "iuf" and bool(np.all(index == np.floor(index)))
    starts = index.astype(np.int64) if whole else np.array([-1])
    if (starts < 0).any() or (starts > rows).any() or (np.diff(starts) < 1).any():
        raise NeorlError(
            f"{path}: 'index' must be increasing row numbers from 0 to {rows}, the starts of trajectories."
        )
    # NeoRL's loader puts the 0 in front; the number of rows may or may not be the last entry.
    return np.append(starts[(starts > 0) & (starts < rows)], rows) - 1


def _terminated(env_id: str, next_observations: NDArray[Any]) -> NDArray[np.bool_]:
    from envs.termination import terminated  # brings torch

    return terminated(env_id, next_observations)
