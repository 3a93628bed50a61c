"""Environments that Gymnasium does not bring: D4RL's Ant, NeoRL's robots, the toy tasks and the shifted robots.

`register()` makes their ids known to `gymnasium.make`; `envs.episodes.make_env` calls it.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box

from envs import shifts

D4RL_ANT_FORCES = 84  # 14 bodies x (3 torques, 3 forces)


class ZeroContactForces(gymnasium.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """Ant-v4 with the 111 observations of D4RL's sets: behind its 27, the 84 contact forces, which are all zero.

    In D4RL's sets they are zero because MuJoCo 2.0 and 2.1 do not compute them for Gym's Ant-v2 (openai/gym issue 1541,
    Farama-Foundation/D4RL issue 143); the contact cost of Ant-v2 is zero for the same reason, and Ant-v4 by default
    has none. Ant-v4's own `use_contact_forces=True` has 111 observations too, but with real forces, which no policy
    learned from those sets has seen.
    """

    def __init__(self, env: gymnasium.Env[np.ndarray, Any]) -> None:
        super().__init__(env)
        shape = env.observation_space.shape
        assert shape is not None
        self.observation_space = Box(-np.inf, np.inf, (shape[0] + D4RL_ANT_FORCES,), np.float64)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([observation, np.zeros(D4RL_ANT_FORCES)])


def d4rl_ant(**kwargs: Any) -> gymnasium.Env[np.ndarray, Any]:
    """Ant-v4 as D4RL's sets show it."""
    from gymnasium.envs.mujoco.ant_v4 import AntEnv

    return ZeroContactForces(AntEnv(**kwargs))


# NeoRL keeps the robot's x position in the observation (polixir/NeoRL a4b6c57, neorl/neorl_envs/mujoco.py). Its Gym v3
# environments are gone; v4 are the same with the same flag on the current MuJoCo bindings.
_WITH_POSITION = {"exclude_current_positions_from_observation": False}

_SPECS = (
    EnvSpec("d4rl/Ant-v4", entry_point="envs.environments:d4rl_ant", max_episode_steps=1000),
    *(
        EnvSpec(
            f"neorl/{name}-v4",
            entry_point=f"gymnasium.envs.mujoco.{module}_v4:{name}Env",
            max_episode_steps=1000,
            kwargs=_WITH_POSITION,
        )
        for name, module in (("Hopper", "hopper"), ("HalfCheetah", "half_cheetah"), ("Walker2d", "walker2d"))
    ),
    EnvSpec("offsweep/EdgeOfReach-v0", entry_point="envs.toys:EdgeOfReach", max_episode_steps=30),
    EnvSpec("offsweep/Refrigerator-v0", entry_point="envs.toys:Refrigerator", max_episode_steps=2000),
    EnvSpec(
        "offsweep/RefrigeratorShut-v0",
        entry_point="envs.toys:Refrigerator",
        max_episode_steps=2000,
        kwargs={"door": False},
    ),
)


def register(env_id: str = "") -> None:
    """Make the ids known to Gymnasium; a second call changes nothing.

    Args:
        env_id: made known, too, in all its versions, if it is one of `envs.shifts`, of which there are any number.
    """
    for spec in _SPECS:
        gymnasium.registry.setdefault(spec.id, spec)
    for known in (*shifts.ids(), *shifts.versions(env_id)):
        shift = shifts.parse(known) if known not in gymnasium.registry else None
        if shift is not None:
            gymnasium.registry[known] = _shifted(known, shift)


def specification(env_id: str) -> EnvSpec | None:
    """What Gymnasium knows of an environment before it is made; None for an id that it does not know."""
    register(env_id)
    return gymnasium.registry.get(env_id)


def _shifted(env_id: str, shift: shifts.Shift) -> EnvSpec:
    if shift.robot == "Pendulum":
        (edit,) = shift.change.edits
        assert isinstance(edit, shifts.Gravity)
        entry_point = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
        return EnvSpec(env_id, entry_point, max_episode_steps=200, kwargs={"g": 10.0 * edit.factor})
    entry_point = f"envs.shifted_robots:{shift.robot}V{shift.version}"
    return EnvSpec(env_id, entry_point, max_episode_steps=1000, kwargs={"shift": shift.name})
