"""Environments with shifted dynamics, by id: the targets of off-dynamics reinforcement learning.

    offsweep/Pendulum-gravity-<factor>-v1      Pendulum-v1 with g = 10 * factor

Any positive factor is an id: `envs.environments.register` makes one known when it is asked for.
"""

import math
import re
from dataclasses import dataclass

from gymnasium.envs.registration import EnvSpec


@dataclass(frozen=True)
class Shift:
    """What an id says.

    Attributes:
        robot: Pendulum.
        kind: gravity.
        factor: of the gravity.
        version: of the Gymnasium environment that it is made from.
    """

    robot: str
    kind: str
    factor: float
    version: int

    @property
    def source_id(self) -> str:
        """The same environment with its dynamics as they are."""
        return f"{self.robot}-v{self.version}"


def parse(env_id: str) -> Shift | None:
    """What a shifted environment's id says; None for every other id."""
    match = re.fullmatch(r"offsweep/(Pendulum)-(gravity)-(\d+(?:\.\d+)?)-v(1)", env_id)
    if match is None:
        return None
    factor = float(match[3])
    return Shift(match[1], match[2], factor, int(match[4])) if 0 < factor < math.inf else None


def source_id(target_id: str) -> str | None:
    """The id of a shifted environment's unshifted counterpart; None for an id that is none of a shifted environment."""
    shift = parse(target_id)
    return shift.source_id if shift is not None else None


def specification(env_id: str) -> EnvSpec | None:
    """How Gymnasium makes a shifted environment; None for every other id."""
    shift = parse(env_id)
    if shift is None:
        return None
    return EnvSpec(
        env_id,
        entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv",
        max_episode_steps=200,
        kwargs={"g": 10.0 * shift.factor},
    )
