"""D4RL's recipes by name: which actors collect a set, in which shares and how many rows.

D4RL's sets (Fu et al. 2020, section 5 and appendix) hold a million rows each: `random` from uniform actions, `medium`
from an agent stopped at about a third of the expert's return, `expert` from one trained to the end, `medium-expert`
two million, medium first. `medium-snapshots` stands where D4RL has `medium-replay`, the replay buffer of the training
up to the medium agent; this project keeps actors of its trainings and not their buffers, and gives every actor up to
the medium one an equal share. It carries another name so that nobody takes one for the other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.collect import COLLECTION_SCHEME, RunShards, collect, run_here, uniform_policy
from envs.dataset import Dataset
from envs.errors import UserError, nearest
from envs.policies import Policy, embedded_actors, load_policy
from envs.toys import ProportionalController

UNIFORM = "uniform"
"""The actor name that stands for actions drawn uniformly from the action space."""

CONTROLLER = "refrigerator-controller"
"""The actor name that stands for the toy task's proportional controller."""


class RecipeError(UserError):
    """There is no such recipe, or its actors are not installed."""


@dataclass(frozen=True)
class Recipe:
    """How a set is collected."""

    name: str
    env_id: str
    actors: tuple[tuple[str, float], ...]  # (embedded actor, UNIFORM or CONTROLLER, relative share), oldest first
    rows: int  # D4RL's number, for its robots
    text: str  # what of D4RL's it follows, and where it does not
    seed: int = 0

    def missing_actors(self) -> list[str]:
        """Actors that are not installed: while there are any, nothing can be collected by this recipe."""
        here = {UNIFORM, CONTROLLER, *embedded_actors()}
        return [actor for actor, _ in self.actors if actor not in here]

    def available(self) -> bool:
        """Whether all actors are installed."""
        return not self.missing_actors()

    def identity(self) -> dict[str, Any]:
        """What the rows depend on, JSON-able: the same only for recipes that collect the same rows.

        Raises:
            UserError: an actor is not installed, or its file is damaged.
        """
        self._check_installed()
        # uniform actions follow from the environment, which need not be built to say so
        actors = [
            [actor if actor == UNIFORM else _policy(actor, self.env_id).describe(), share]
            for actor, share in self.actors
        ]
        return {
            "scheme": COLLECTION_SCHEME, "env_id": self.env_id, "actors": actors, "rows": self.rows, "seed": self.seed
        }  # fmt: skip

    def policies(self) -> list[tuple[Policy, float]]:
        """(policy, relative share), oldest first, as `collect` takes them.

        Raises:
            RecipeError: an actor is not installed.
            UserError: the environment cannot be made, or an actor's file is damaged.
        """
        self._check_installed()
        return [(_policy(actor, self.env_id), share) for actor, share in self.actors]

    def _check_installed(self) -> None:
        missing = self.missing_actors()
        if missing:
            raise RecipeError(
                f"recipe '{self.name}' needs the embedded actor '{missing[0]}', which is not installed: reinstall"
                " offsweep, choose another recipe, or collect from a policy file of your own."
            )

    def about(self) -> dict[str, str]:
        """What the provenance of a set says of the recipe."""
        return {"recipe_name": self.name, "recipe_text": self.text}

    def collect(
        self,
        name: str | None = None,
        path: Path | None = None,
        run_shards: RunShards = run_here,
        on_rows: Callable[[int], None] | None = None,
    ) -> Dataset:
        """Collect by this recipe; arguments and errors as for `envs.collect.collect`."""
        return collect(
            self.env_id, self.policies(), self.rows, self.seed, name=name, path=path, run_shards=run_shards,
            on_rows=on_rows, about=self.about(),
        )  # fmt: skip


def _policy(actor: str, env_id: str) -> Policy:
    if actor == UNIFORM:
        return uniform_policy(env_id)
    return ProportionalController() if actor == CONTROLLER else load_policy(actor)


_ROBOTS = {
    "hopper": "Hopper-v5",
    "halfcheetah": "HalfCheetah-v5",
    "walker2d": "Walker2d-v5",
    "pendulum": "Pendulum-v1",
}
_ROWS = 1_000_000
_KINDS = {
    "random": "D4RL's random: uniform actions",
    "medium": "D4RL's medium: sampled actions of an actor stopped at about a third of the expert's return",
    "medium-snapshots": (
        "in place of D4RL's medium-replay, and not the same: sampled actions of actors kept along the training up to"
        " the medium one, each with an equal share, oldest first; D4RL has the training's replay buffer there"
    ),
    "medium-expert": "D4RL's medium-expert: medium first, then as many rows of the expert",
    "expert": "D4RL's expert: sampled actions of an actor trained to the end",
}
_TOYS = {
    "edge-of-reach-random": Recipe(
        "edge-of-reach-random", "offsweep/EdgeOfReach-v0", ((UNIFORM, 1.0),), 100_000,
        "uniform actions; the number of rows is this project's",
    ),
    "refrigerator-behaviour": Recipe(
        "refrigerator-behaviour", "offsweep/Refrigerator-v0", ((CONTROLLER, 1.0),), 100_000,
        "the toy task's proportional controller with its noise; the number of rows is this project's",
    ),
    "refrigerator-shut": Recipe(
        "refrigerator-shut", "offsweep/RefrigeratorShut-v0", ((CONTROLLER, 1.0),), 100_000,
        "the same of a refrigerator without a door",
    ),
}  # fmt: skip

RECIPES = (*(f"{robot}-{kind}" for robot in _ROBOTS for kind in _KINDS), *_TOYS)
"""The names of all recipes, also of those whose actors are not installed."""


def recipe(name: str, env_id: str | None = None) -> Recipe:
    """The recipe of this name, for example `hopper-medium-expert`.

    Args:
        name: one of `RECIPES`.
        env_id: another version of its environment, such as Hopper-v4 (default: Gymnasium's newest).

    Raises:
        RecipeError: no such recipe (with the nearest names), or the environment is another one.
    """
    if name not in RECIPES:
        raise RecipeError(
            f"there is no recipe '{name}'{nearest(name, RECIPES)}; known are {', '.join(_KINDS)} of"
            f" {', '.join(_ROBOTS)} (as in hopper-medium) and {', '.join(_TOYS)}."
        )
    found = _TOYS[name] if name in _TOYS else _of_robot(name)
    if env_id is None:
        return found
    if not re.fullmatch(re.escape(found.env_id.rpartition("-")[0]) + r"-v\d+", env_id):
        raise RecipeError(f"recipe '{name}' is for {found.env_id} and its other versions, not for '{env_id}'.")
    return replace(found, env_id=env_id)


def _of_robot(name: str) -> Recipe:
    robot, _, kind = name.partition("-")
    medium, expert = f"{robot}-medium", f"{robot}-expert"
    actors = {
        "random": (UNIFORM,),
        "medium": (medium,),
        "medium-snapshots": (*_snapshots(robot), medium),
        "medium-expert": (medium, expert),
        "expert": (expert,),
    }[kind]
    rows = 2 * _ROWS if kind == "medium-expert" else _ROWS
    return Recipe(name, _ROBOTS[robot], tuple((actor, 1.0) for actor in actors), rows, _KINDS[kind])


def _snapshots(robot: str) -> list[str]:
    """The actors kept before the medium one, oldest first."""
    if robot == "pendulum":
        return [UNIFORM, "pendulum-random"]  # its training is so short that the untrained actor is all there is
    numbered = [(re.fullmatch(rf"{robot}-snapshot-(\d+)", actor), actor) for actor in embedded_actors()]
    found = [(int(match[1]), actor) for match, actor in numbered if match]
    return [actor for _, actor in sorted(found)] or [f"{robot}-snapshot-0"]


_EMBEDDED = (
    "pendulum-random", "pendulum-medium", "pendulum-expert", "pendulum-medium-snapshots", "hopper-medium",
    "hopper-medium-snapshots", "hopper-random", "hopper-medium-expert", "hopper-expert",
    *(f"{robot}-{kind}" for robot in ("halfcheetah", "walker2d") for kind in _KINDS),
    *_TOYS,
)  # fmt: skip

EMBEDDED = {
    f"embedded/{name}-v0": replace(recipe(name), rows=20_000 if name.startswith("pendulum") else 100_000, seed=seed)
    for seed, name in enumerate(_EMBEDDED, start=1)
}
"""Datasets small enough to be collected on first use: name -> recipe with fewer rows."""
