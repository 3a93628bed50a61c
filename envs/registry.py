"""Datasets by name, whatever their source: embedded, your own, D4RL's, Minari's, NeoRL's, or the path of a file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from envs import d4rl_sets, minari_sets, neorl_sets
from envs.cache import file_source, flat_store
from envs.catalogue import Entry, Progress
from envs.dataset import Dataset
from envs.episodes import EpisodeError, borrow_envs
from envs.errors import UnknownDatasetError, nearest
from envs.hdf5 import read_hdf5
from envs.names import env_id_of
from envs.npz import read_npz
from envs.online_sets import online_env, read_online
from envs.recipes import EMBEDDED
from envs.transforms import Request, TransformError, apply, check_one_environment, parse

FILE_KINDS = (".hdf5", ".h5", ".npz")

Shown = Callable[[str, str], AbstractContextManager[Progress | None]]
"""What shows the progress of something slow: (dataset, "bytes" or "transitions") -> a context that gives a callback."""


class ShapeError(EpisodeError):
    """Rows do not have the shapes of an environment."""


@dataclass(frozen=True)
class Source:
    """Rows that can be had now."""

    key: dict[str, Any]  # what the flat store knows them by
    make: Callable[[Progress | None], Dataset]  # the callback hears of transitions where they are collected


def load_dataset(name: str, workdir: Path, shown: Shown | None = None) -> Dataset:
    """A dataset by name; its columns are mapped from the flat store (`envs.cache`), which the first use fills.

    - `embedded/...`: collected here on first use, from actors that are part of the package.
    - a path that ends in .hdf5, .h5 or .npz: that file.
    - `hopper-medium-v2`: D4RL's file, where d4rl keeps it ($D4RL_DATASET_DIR, else ~/.d4rl/datasets); downloaded if
      it is not there. Scored in Gymnasium's v4 environment.
    - `neorl/Hopper-v3-medium-1000`: NeoRL's file, likewise.
    - `mujoco/hopper/medium-v0`: Minari's, through its package.
    - `online/HalfCheetah-v5`: no rows; that environment is sampled while a method learns (`envs.online_sets`).
    - any other name: `workdir`/datasets/<name>.hdf5 or .npz.

    Behind the name may stand what is to be done with the rows, and several names may be mixed: see `envs.transforms`.

    Args:
        shown: shows downloads and collections. Nothing is downloaded where $OFFSWEEP_OFFLINE is set.

    Raises:
        UnknownDatasetError: no such dataset (with the nearest names), or not here and not to be had.
        EpisodeError: its rows do not have the shapes of its environment.
        UserError: it cannot be read, used, collected or stored.
    """
    workdir = Path(workdir)
    request, store = parse(name), flat_store(workdir)
    told = {env_id for term in request.terms if (env_id := env_id_of(term.name))}  # before anything is made
    check_one_environment(request, told)
    if any(online_env(term.name) is not None for term in request.terms):
        if not request.plain:
            raise TransformError(
                f"dataset '{name}' asks for rows of an environment that is sampled while learning, which has none: name"
                " it alone and without options."
            )
        return read_online(name)
    parts = []
    for term in request.terms:
        with shown(term.name, "bytes") if shown else nullcontext() as progress:
            _fetch(term.name, workdir, progress)
        source = find_source(term.name, workdir)
        if source is None:
            raise _unknown(term.name, workdir)
        with shown(term.name, "transitions") if shown else nullcontext() as progress:
            parts.append(store.get(source.key, partial(_made, source, progress)))
    if request.plain:
        return parts[0]
    return store.get(_mixed_key(request, parts), lambda: apply(request, parts))


def known_hash(name: str, workdir: Path) -> str | None:
    """The content hash of a dataset that has been used on this machine before; None of any other: nothing is
    downloaded, collected or read anew.

    Raises:
        UserError: the name makes no sense.
    """
    workdir = Path(workdir)
    request, store = parse(name), flat_store(workdir)
    if request.plain and online_env(name) is not None:
        return read_online(name).content_hash
    parts = []
    for term in request.terms:
        source = find_source(term.name, workdir)
        part = None if source is None else store.opened(source.key)
        if part is None:
            return None
        parts.append(part)
    found = parts[0] if request.plain else store.opened(_mixed_key(request, parts))
    return None if found is None else found.content_hash


def _mixed_key(request: Request, parts: Sequence[Dataset]) -> dict[str, Any]:
    return {
        "request": str(request),
        "parts": [part.content_hash for part in parts],
        "states": [part.states is not None for part in parts],  # of which the hashes say nothing
    }


def find_source(name: str, workdir: Path) -> Source | None:
    """Where the rows of one name (without options) come from; None if there is no such dataset or not here."""
    if name in EMBEDDED:
        spec = EMBEDDED[name]

        def collect(progress: Progress | None) -> Dataset:
            return spec.collect(name=name, on_rows=progress and (lambda done: progress(done, spec.rows)))

        return Source({"recipe": spec.identity(), "name": name}, collect)
    if Path(name).suffix in FILE_KINDS:
        return _file(Path(name).expanduser(), None, None)
    d4rl = d4rl_sets.d4rl_spec(name)
    if d4rl is not None:
        return _file(d4rl_sets.d4rl_path(d4rl), name, d4rl.env_id)
    neorl = neorl_sets.neorl_spec(name)
    if neorl is not None:
        path = neorl_sets.neorl_path(neorl)
        return Source(_key(path, name=name), lambda _: neorl_sets.read_neorl(neorl, path))
    own = _own_path(name, workdir)
    if own is not None:
        return _file(own, name, None)
    if minari_sets.is_minari_name(name) and not minari_sets.missing(name):
        return Source(minari_sets.minari_source(name), lambda _: minari_sets.read_minari(name))
    return None


def _file(path: Path, name: str | None, env_id: str | None) -> Source:
    read = read_npz if path.suffix == ".npz" else read_hdf5
    return Source(_key(path, name=name, env_id=env_id), lambda _: read(path, name=name, env_id=env_id))


def _key(path: Path, **more: Any) -> dict[str, Any]:
    # a file that is not there is reported by its reader
    return file_source(path, **more) if path.is_file() else {"missing file": str(path)}


def _fetch(name: str, workdir: Path, progress: Progress | None) -> None:
    """Download what a name stands for, if it is one that can be downloaded and is not here."""
    d4rl, neorl, minari = d4rl_sets.d4rl_spec(name), neorl_sets.neorl_spec(name), minari_sets.missing(name)
    if d4rl is not None:
        d4rl_sets.fetch(d4rl, progress)
    elif neorl is not None:
        neorl_sets.fetch(neorl, progress)
    elif minari is not None and _own_path(name, workdir) is None:
        minari_sets.fetch(minari, progress)


def _own_path(name: str, workdir: Path) -> Path | None:
    """The file of a set of one's own."""
    if ".." in Path(name).parts:
        return None
    paths = (datasets_folder(workdir) / f"{name}{kind}" for kind in FILE_KINDS)
    return next((path for path in paths if path.is_file()), None)


def catalogue(workdir: Path) -> Iterator[Entry]:
    """Every dataset that is known by name: embedded, those under `workdir`, Minari's local ones, D4RL's, NeoRL's."""
    store = flat_store(workdir)
    for entry in _entries(Path(workdir)):
        source = find_source(entry.name, workdir) if entry.present else None
        yield replace(entry, cached=source is not None and store.holds(source.key))


def _entries(workdir: Path) -> Iterator[Entry]:
    for name, spec in EMBEDDED.items():
        if spec.available():
            yield Entry(name, "embedded", spec.env_id, None, True, None, "MIT")
    folder = datasets_folder(workdir)
    for path in sorted(p for kind in FILE_KINDS for p in folder.rglob(f"*{kind}")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in EMBEDDED and not d4rl_sets.d4rl_spec(name) and not neorl_sets.neorl_spec(name):
            yield Entry(name, "collected", None, path, True, path.stat().st_size, None)
    yield from minari_sets.entries()
    yield from d4rl_sets.entries()
    yield from neorl_sets.entries()


def _unknown(name: str, workdir: Path) -> UnknownDatasetError:
    known = [entry.name for entry in _entries(workdir)]
    return UnknownDatasetError(
        f"there is no dataset '{name}'{nearest(name, known)}; `offsweep data list` shows the names, and paths that end"
        f" in {', '.join(FILE_KINDS)} work too."
    )


def datasets_folder(workdir: Path) -> Path:
    """Where sets of one's own lie."""
    return workdir / "datasets"


def _made(source: Source, progress: Progress | None) -> Dataset:
    """Read or collect a source, and refuse rows whose shapes are not those of their environment.

    That is done when the rows are stored, not at every use. An environment that is not installed is no obstacle to
    looking at the data.
    """
    dataset = source.make(progress)
    try:
        check_shapes(dataset, dataset.env_id)
    except ShapeError:
        raise
    except EpisodeError:
        pass
    return dataset


def check_shapes(dataset: Dataset, env_id: str) -> None:
    """Make sure that a policy learned from these rows can act in an environment.

    Raises:
        ShapeError: its observations or actions have another width.
        EpisodeError: the environment cannot be made.
    """
    with borrow_envs(env_id, 1) as (env,):
        observation_shape, action_shape = env.observation_space.shape, env.action_space.shape
    if observation_shape != (dataset.observation_dim,) or action_shape != (dataset.action_dim,):
        raise ShapeError(
            f"dataset '{dataset.name}' has {dataset.observation_dim} observations and {dataset.action_dim} actions per"
            f" row, environment '{env_id}' has {observation_shape} and {action_shape}: it belongs to another"
            " environment or version."
        )
