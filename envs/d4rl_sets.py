"""D4RL's datasets by name: where their files are on the web and on this machine, what they are scored in.

D4RL says all of this in its module infos.py. Where the package `d4rl` is installed (the extra [d4rl]), that module is
read as a file, since `import d4rl` fails without MuJoCo 2.1.0; it then says which names there are. Without it the
locomotion and Adroit sets are known from the table below, which a test compares with infos.py.

Sources: names, addresses and reference scores from D4RL 1.1, infos.py; the licence of the sets from D4RL's README
("unless otherwise noted"). Sizes and SHA-256 in references/d4rl_files.csv are those that TensorFlow Datasets has
recorded (tensorflow/datasets, tensorflow_datasets/d4rl/d4rl_{mujoco,adroit}_*/checksums.tsv, at 14d8c88 for Hopper,
09376c3 HalfCheetah, 90b6623 Walker2d, door and hammer, 31f1255 Ant, b1a7bdf pen). It has none of relocate and of
ant-random-expert. The v2 locomotion files were once replaced on D4RL's server, when next_observations were added to
them; the table has the present ones, and an older file that is already on a machine is used as it is.
"""

import csv
import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from envs.catalogue import Entry, Progress
from envs.errors import UserError

LICENCE = "CC BY 4.0"
FILES = Path(__file__).parent / "references" / "d4rl_files.csv"

_ROOT = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
_LOCOMOTION = ("hopper", "halfcheetah", "walker2d", "ant")
_ADROIT = ("door", "hammer", "pen", "relocate")

# D4RL's locomotion sets come from Gym's v2 environments; Gymnasium's v4 are the same on MuJoCo's current bindings. Its
# Ant has 111 observations (Gymnasium's Ant-v4 has 27), so it has an environment of its own here. The Adroit ids are
# those of gymnasium-robotics.
_ENV_IDS = {
    "hopper": "Hopper-v4",
    "halfcheetah": "HalfCheetah-v4",
    "walker2d": "Walker2d-v4",
    "ant": "d4rl/Ant-v4",
    "door": "AdroitHandDoor-v1",
    "hammer": "AdroitHandHammer-v1",
    "pen": "AdroitHandPen-v1",
    "relocate": "AdroitHandRelocate-v1",
}

REFERENCE_PAIRS = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "pen": (96.262799, 3076.8331017826877),
    "relocate": (-6.425911, 4233.877797728884),
}
"""By task: undiscounted returns of the random policy and the expert (REF_MIN_SCORE and REF_MAX_SCORE)."""


def _own_urls() -> dict[str, str]:
    urls = {}
    for task in _LOCOMOTION:
        for kind in ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay"):
            stem = f"{task}_{kind.replace('-', '_')}"
            if kind != "full-replay":
                # The first release had no version in its file names and called the replay buffer "mixed".
                old = stem.replace("medium_replay", "mixed").replace("walker2d_mixed", "walker_mixed")
                urls[f"{task}-{kind}-v0"] = f"{_ROOT}/gym_mujoco/{old}.hdf5"
            for version in ("v1", "v2"):
                urls[f"{task}-{kind}-{version}"] = f"{_ROOT}/gym_mujoco_{version}/{stem}-{version}.hdf5"
    urls["ant-random-expert-v0"] = f"{_ROOT}/gym_mujoco/ant_random_expert.hdf5"
    for task in _ADROIT:
        old_stems = {"human": "v0_demos_clipped", "cloned": "demos-v0-bc-combined", "expert": "v0_expert_clipped"}
        for kind, old in old_stems.items():
            urls[f"{task}-{kind}-v0"] = f"{_ROOT}/hand_dapg/{task}-{old}.hdf5"
            urls[f"{task}-{kind}-v1"] = f"{_ROOT}/hand_dapg_v1/{task}-{kind}-v1.hdf5"
    return urls


OWN_URLS: Mapping[str, str] = _own_urls()


@dataclass(frozen=True)
class D4rlInfos:
    """What the installed d4rl's infos.py says, by dataset name."""

    urls: Mapping[str, str]
    ref_min: Mapping[str, float]
    ref_max: Mapping[str, float]


@dataclass(frozen=True)
class D4rlSpec:
    """A D4RL set: its file, and what it is scored in."""

    name: str
    env_id: str  # Gymnasium's; the name itself where Gymnasium has none: such data can be looked at, not scored in
    url: str
    file_name: str  # as d4rl stores it
    size: int | None  # bytes; None: not known
    sha256: str | None


@functools.cache
def infos() -> D4rlInfos | None:
    """The installed d4rl's names, addresses and reference scores; None when it is not installed.

    Raises:
        UserError: d4rl is installed and its infos.py cannot be used.
    """
    package = importlib.util.find_spec("d4rl")  # finds the package without importing it
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "infos.py"
        spec = importlib.util.spec_from_file_location("d4rl_infos", path)
        if not path.is_file() or spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            return D4rlInfos(module.DATASET_URLS, module.REF_MIN_SCORE, module.REF_MAX_SCORE)
        except Exception as error:
            raise UserError(
                f"the installed d4rl cannot be used ({path}: {error!r}): reinstall it, or uninstall it to use"
                " offsweep's own table."
            ) from error
    return None


def d4rl_spec(name: str) -> D4rlSpec | None:
    """The D4RL set of this name, for example `hopper-medium-replay-v2`; None when there is none.

    Raises:
        UserError: the installed d4rl, or offsweep's table of files, cannot be used.
    """
    url = _urls().get(name)
    if url is None:
        return None
    task = _task(name)
    size, sha256 = _files().get(url, (None, None))
    return D4rlSpec(name, _ENV_IDS[task] if task else name, url, _basename(url), size, sha256)


def env_id_of_file(stem: str) -> str | None:
    """The environment that belongs to a D4RL file's name without its ending, such as `walker_mixed`; else None."""
    for name, url in _urls().items():
        if _basename(url) == f"{stem}.hdf5":
            task = _task(name)
            return _ENV_IDS[task] if task else name
    return None


def reference_pair(name: str) -> tuple[float, float] | None:
    """D4RL's returns of the random policy and the expert for one of its sets; None when D4RL states none."""
    found, task = infos(), _task(name)
    if found is not None and name in found.ref_min and name in found.ref_max:
        return float(found.ref_min[name]), float(found.ref_max[name])
    return REFERENCE_PAIRS[task] if task and name in _urls() else None


def d4rl_folder() -> Path:
    """Where d4rl and just-d4rl keep their files: $D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def d4rl_path(spec: D4rlSpec) -> Path:
    """Where the file of a set is, or will be."""
    return d4rl_folder() / spec.file_name


def entries() -> list[Entry]:
    """The locomotion and Adroit sets, and of the installed d4rl's others those whose file is present."""
    found = []
    for name in _urls():
        spec = d4rl_spec(name)
        if spec is None:
            continue
        path = d4rl_path(spec)
        present = path.is_file()
        if present or name in OWN_URLS:
            size = path.stat().st_size if present else spec.size
            found.append(Entry(name, "D4RL", spec.env_id, path, present, size, LICENCE))
    return found


def fetch(spec: D4rlSpec, progress: Progress | None = None) -> Path:
    """The file of a set, downloaded to where d4rl looks for it unless it is there already.

    Args:
        spec: the set.
        progress: called with the bytes done and the total (None: not known).

    Raises:
        DownloadError: it cannot be downloaded.
    """
    path = d4rl_path(spec)
    if path.is_file():
        return path
    from envs.download import download  # here, since it brings requests, which only a download needs

    return download(spec.name, spec.url, path, size=spec.size, sha256=spec.sha256, progress=progress)


def _urls() -> dict[str, str]:
    found = infos()
    return {**OWN_URLS, **(found.urls if found else {})}


def _task(name: str) -> str | None:
    """The task of a locomotion or Adroit set."""
    match = re.fullmatch(r"([a-z0-9]+)-.*-v\d+", name)
    return match[1] if match and match[1] in _ENV_IDS else None


def _basename(url: str) -> str:
    return url.rsplit("/", 1)[-1]


@functools.cache
def _files() -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by address."""
    try:
        with open(FILES, newline="", encoding="ascii") as file:
            return {row["url"]: (int(row["size"]), row["sha256"]) for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{FILES} is damaged ({error!r}): restore it from the repository or the package.") from error
