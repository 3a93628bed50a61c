"""Datasets by name: embedded, your own, D4RL's, or the path of a file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.collect import collect, uniform_policy
from envs.dataset import Dataset
from envs.episodes import EpisodeError, borrow_envs
from envs.errors import UserError
from envs.hdf5 import Hdf5Error, check_writable, read_hdf5, write_hdf5
from envs.names import EMBEDDED, UNIFORM, EmbeddedSpec, d4rl_spec, nearest
from envs.policies import Policy, embedded_actors, load_policy


class UnknownDatasetError(UserError):
    """There is no dataset of this name, or its file is not there."""


def load_dataset(name: str, workdir: Path) -> Dataset:
    """A dataset by name.

    - `embedded/...`: collected from the embedded actors on first use and kept under `workdir`/datasets. Two
      processes that do so at once do the same work twice and leave the same file.
    - a path that ends in .hdf5 (or .h5): that file.
    - a D4RL name such as `hopper-medium-replay-v2`: the file d4rl would use, under $D4RL_DATASET_DIR, else
      ~/.d4rl/datasets. It is scored in Gymnasium's v4 environment.
    - any other name: `workdir`/datasets/<name>.hdf5.

    Raises:
        UnknownDatasetError: no such dataset (with the nearest names), or its file is missing (with the path).
        EpisodeError: its rows do not have the shapes of its environment.
        UserError: it cannot be read, used or collected.
    """
    if name in EMBEDDED:
        return _load_embedded(name, Path(workdir))
    if Path(name).suffix in (".hdf5", ".h5"):
        return _checked(read_hdf5(Path(name).expanduser()))
    d4rl = d4rl_spec(name)
    if d4rl is not None:
        folder = d4rl_folder()
        path = folder / d4rl.file_name
        if not path.is_file():
            raise UnknownDatasetError(
                f"the D4RL dataset '{name}' is not on this machine: {path} does not exist; put D4RL's"
                f" {d4rl.file_name} there, or point D4RL_DATASET_DIR at the folder that holds it."
            )
        return _checked(read_hdf5(path, name=name, env_id=d4rl.env_id))
    path = _datasets_folder(Path(workdir)) / f"{name}.hdf5"
    if path.is_file() and ".." not in Path(name).parts:
        return _checked(read_hdf5(path, name=name))
    known = dataset_names(Path(workdir))
    raise UnknownDatasetError(
        f"there is no dataset '{name}'{nearest(name, known)}; loadable now are {', '.join(known)}; D4RL's"
        " names (with their files in place) and paths that end in .hdf5 work too."
    )


def _checked(dataset: Dataset) -> Dataset:
    """The dataset, if a policy learned from it could act in its environment.

    D4RL's Ant sets, for one, have 111 observations where Gymnasium's Ant-v4 has 27. An environment that is
    not installed is no obstacle to looking at the data.
    """
    try:
        with borrow_envs(dataset.env_id, 1) as (env,):
            observation_shape, action_shape = env.observation_space.shape, env.action_space.shape
    except EpisodeError:
        return dataset
    if observation_shape != (dataset.observation_dim,) or action_shape != (dataset.action_dim,):
        raise EpisodeError(
            f"dataset '{dataset.name}' has {dataset.observation_dim} observations and {dataset.action_dim}"
            f" actions per row, its environment '{dataset.env_id}' has {observation_shape} and"
            f" {action_shape}: it belongs to another environment or version."
        )
    return dataset


def dataset_names(workdir: Path | None = None) -> list[str]:
    """Names that `load_dataset` can load now: embedded ones, those under `workdir`, D4RL's present ones."""
    actors = {UNIFORM, *embedded_actors()}
    names = [name for name, spec in EMBEDDED.items() if all(actor in actors for actor, _ in spec.actors)]
    if workdir is not None:
        folder = _datasets_folder(Path(workdir))
        own = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.hdf5"))
        # D4RL's names always mean D4RL's files.
        names += [name for name in own if name not in EMBEDDED and d4rl_spec(name) is None]
    folder = d4rl_folder()
    for task in ("hopper", "halfcheetah", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay"):
            for version in ("v0", "v1", "v2"):
                d4rl = d4rl_spec(f"{task}-{kind}-{version}")
                if d4rl is not None and (folder / d4rl.file_name).is_file():
                    names.append(f"{task}-{kind}-{version}")
    return names


def d4rl_folder() -> Path:
    """Where d4rl keeps its files: $D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def _datasets_folder(workdir: Path) -> Path:
    return workdir / "datasets"


def _load_embedded(name: str, workdir: Path) -> Dataset:
    spec = EMBEDDED[name]
    path = _datasets_folder(workdir) / f"{name}.hdf5"
    policies = [(_actor(actor, spec, name), weight) for actor, weight in spec.actors]
    if path.is_file():
        try:
            kept = read_hdf5(path, name=name)
        except Hdf5Error:
            kept = None  # damaged: it can be made again
        if kept is not None and _same_recipe(kept.provenance, spec, policies):
            return kept
    check_writable(path)
    write_hdf5(collect(spec.env_id, policies, spec.rows, spec.seed, name=name), path)
    return read_hdf5(path, name=name)


def _actor(actor: str, spec: EmbeddedSpec, dataset: str) -> Policy:
    if actor == UNIFORM:
        return uniform_policy(spec.env_id)
    if actor not in embedded_actors():
        raise UnknownDatasetError(
            f"dataset '{dataset}' needs the embedded actor '{actor}', which is not installed: reinstall"
            " offsweep, or use another dataset."
        )
    return load_policy(actor)


def _same_recipe(provenance: Mapping[str, Any], spec: EmbeddedSpec, policies: list[tuple[Policy, float]]) -> bool:
    """False when the kept file comes from other actors or settings than this version's."""
    stored = provenance.get("policies")
    if not isinstance(stored, list) or len(stored) != len(policies):
        return False
    wanted = [policy.describe() | {"weight": weight} for policy, weight in policies]
    return (
        all(item | expected == item for item, expected in zip(stored, wanted, strict=True))
        and provenance.get("env_id") == spec.env_id
        and provenance.get("rows") == spec.rows
        and provenance.get("seed") == spec.seed
    )
