"""What a dataset name stands for: its environment, and where its rows come from."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

UNIFORM = "uniform"
"""The actor name that stands for actions drawn uniformly from the action space."""


@dataclass(frozen=True)
class EmbeddedSpec:
    """How an embedded dataset is collected."""

    env_id: str
    actors: tuple[tuple[str, float], ...]  # (embedded actor or UNIFORM, relative share), oldest first
    rows: int
    seed: int


EMBEDDED: dict[str, EmbeddedSpec] = {
    "embedded/pendulum-random-v0": EmbeddedSpec("Pendulum-v1", ((UNIFORM, 1.0),), 20_000, 1),
    "embedded/pendulum-medium-v0": EmbeddedSpec("Pendulum-v1", (("pendulum-medium", 1.0),), 20_000, 2),
    "embedded/pendulum-expert-v0": EmbeddedSpec("Pendulum-v1", (("pendulum-expert", 1.0),), 20_000, 3),
    "embedded/pendulum-medium-replay-v0": EmbeddedSpec(
        "Pendulum-v1", ((UNIFORM, 1.0), ("pendulum-random", 1.0), ("pendulum-medium", 1.0)), 20_000, 4
    ),
    "embedded/hopper-medium-v0": EmbeddedSpec("Hopper-v5", (("hopper-medium", 1.0),), 100_000, 5),
    "embedded/hopper-medium-replay-v0": EmbeddedSpec(
        "Hopper-v5", (*((f"hopper-replay-{i}", 1.0) for i in range(5)), ("hopper-medium", 1.0)), 100_000, 6
    ),
}

_TASKS = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d", "ant": "Ant"}
_SETS = "random|medium|expert|medium-replay|medium-expert|full-replay"
_D4RL = re.compile(rf"(?P<task>{'|'.join(_TASKS)})-(?P<set>{_SETS})-v(?P<version>[012])")


@dataclass(frozen=True)
class D4rlSpec:
    """A D4RL locomotion set: the file d4rl stores it in, and the environment that it is scored in."""

    env_id: str
    file_name: str


def d4rl_spec(name: str) -> D4rlSpec | None:
    """The D4RL set of this name (for example `hopper-medium-replay-v2`), or None.

    The sets were made in Gym's v2 environments; Gymnasium's v4 are the same environments on the current
    MuJoCo bindings. File names are the last part of the addresses in D4RL's infos.py.
    """
    match = _D4RL.fullmatch(name)
    if match is None:
        return None
    task, version = match["task"], match["version"]
    stem = match["set"].replace("-", "_")
    if version == "0":
        # The first release had no version in its file names and called the replay buffer "mixed".
        if stem == "full_replay":
            return None
        stem = "mixed" if stem == "medium_replay" else stem
        prefix = "walker" if (task, stem) == ("walker2d", "mixed") else task  # D4RL's own exception
        file_name = f"{prefix}_{stem}.hdf5"
    else:
        file_name = f"{task}_{stem}-v{version}.hdf5"
    return D4rlSpec(env_id=f"{_TASKS[task]}-v4", file_name=file_name)


def env_id_of(name: str) -> str | None:
    """The Gymnasium id that a dataset name or a file's stem points at; None when it says nothing.

    An id (`Hopper-v5`) is its own answer.
    """
    if name in EMBEDDED:
        return EMBEDDED[name].env_id
    spec = d4rl_spec(name)
    if spec is not None:
        return spec.env_id
    if re.fullmatch(r"(?:[\w.-]+/)*[A-Z]\w*-v\d+", name):
        return name
    if name == "walker_mixed":
        return "Walker2d-v4"
    # A D4RL file's stem, such as hopper_medium_replay-v2.
    match = re.fullmatch(rf"({'|'.join(_TASKS)})_(?:{_SETS.replace('-', '_')}|mixed)(?:-v[012])?", name)
    return f"{_TASKS[match[1]]}-v4" if match else None


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`; nearest: a, b` for the end of an error sentence, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(by_lower[item] for item in found)}" if found else ""
