"""A simulator stepped from the states that observations describe, and recorded rows held against it.

Shape suffixes: N rows, S observation, A action, K entries of an observation that hold the state.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.classic_control.continuous_mountain_car import Continuous_MountainCarEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from envs.episodes import make_env, quiet_mujoco
from envs.errors import UserError
from envs.true_dynamics import StateLayout, TrueDynamics, has_true_dynamics, mujoco_layout

_APART = 1e-3  # standard deviations by which the steps of two versions must differ: well above float32's rounding


class SimulationError(UserError):
    """An environment's state cannot be set from its observations."""


@dataclass(frozen=True, eq=False)
class Steps:
    """What the simulator makes of N observations and actions, one step each."""

    next_observations: NDArray[np.float64]  # (N, S)
    rewards: NDArray[np.float64]  # (N,)
    terminals: NDArray[np.bool_]  # (N,)


class Simulator:
    """An environment that is stepped from the states that observations describe; its time limit does not count.

    Works for Gymnasium's MuJoCo robots whose observations begin with positions and velocities (Hopper, HalfCheetah,
    Walker2d, Ant, Swimmer, Humanoid, InvertedPendulum; also d4rl/ and neorl/ ones), for Pendulum,
    MountainCarContinuous and EdgeOfReach. Positions that are not observed (x, and y for Ant, Swimmer and Humanoid) are
    set to 0: neither the dynamics nor the rewards of these robots depend on them.

    A step depends on nothing but the observation and the action: what the solver remembers of earlier rows is
    cleared. Actions beyond the bounds are passed on as they are; MuJoCo clips the control while Gymnasium's control
    cost takes the whole action. Where there are `TrueDynamics`, they step all rows at once; elsewhere the environment
    is put into one state after the other.

    Ant's reward is exact only to about 1e-2: it reads the torso's position from before the last integration stage,
    which no observation holds.

    Attributes:
        env_id: Gymnasium id.
        state_dim: the first entries of an observation, which hold the state; what follows them (contact forces of
            Ant-v5) is computed.

    Raises:
        EpisodeError: the environment cannot be made.
        SimulationError: its observations do not hold its state.
    """

    def __init__(self, env_id: str) -> None:
        self.env_id = env_id
        known = _repeating_dynamics(env_id) or _OneByOne(env_id)
        self._layout = known.layout
        self._steps = known.steps if isinstance(known, _OneByOne) else partial(_true_steps, known)
        self.state_dim = self._layout.size

    def restorable(self, observations: NDArray[Any]) -> NDArray[np.bool_]:
        """(N, S) -> (N,) whether an observation holds the whole state.

        Hopper and Walker2d clip the velocities that they show to +-10: where one is clipped, the true one is unknown.
        """
        return self._layout.complete(observations)

    def steps(self, observations: NDArray[Any], actions: NDArray[Any]) -> Steps:
        """One step with the environment's own frame skip from each of the observations (N, S), with its action (N, A).

        Clipped velocities are taken as they are shown.
        """
        return self._steps(observations, actions)


def versions(env_id: str) -> list[str]:
    """Ids of the same environment in all registered versions, itself included, oldest first."""
    name, _, _ = env_id.rpartition("-v")
    found = [re.fullmatch(rf"{re.escape(name)}-v(\d+)", known) for known in gymnasium.registry]
    return [match[0] for match in sorted((m for m in found if m), key=lambda m: int(m[1]))]


@dataclass(frozen=True)
class Votes:
    """Rows on which two versions of an environment differ and one is clearly right: (the first's, the other's)."""

    other: str
    dynamics: tuple[int, int]
    rewards: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Replay:
    """Recorded rows beside what each version of their environment makes of them.

    Errors are in standard deviations of the data; that of a state is the root mean square over its K entries.
    """

    env_id: str  # the version in the rows' label
    observations: NDArray[np.float64]  # (N, S)
    actions: NDArray[np.float32]  # (N, A)
    next_observations: NDArray[np.float64]  # (N, S)
    rewards: NDArray[np.float64]  # (N,)
    simulated: dict[str, Steps]  # by environment id; the label's first
    state_std: NDArray[np.float64]  # (K,)
    reward_std: float

    def state_errors(self, env_id: str) -> NDArray[np.float64]:
        """(N,) recorded next states against this version's."""
        return self._distance(self.simulated[env_id].next_observations, self.next_observations)

    def reward_errors(self, env_id: str) -> NDArray[np.float64]:
        """(N,) recorded rewards against this version's."""
        return np.abs(self.simulated[env_id].rewards - self.rewards) / self.reward_std

    def step_sizes(self) -> NDArray[np.float64]:
        """(N,) how far the recorded steps move the state."""
        return self._distance(self.observations, self.next_observations)

    def votes(self, other: str) -> Votes:
        """The label's version against another one."""
        a, b = self.simulated[self.env_id], self.simulated[other]
        states_apart = self._distance(a.next_observations, b.next_observations)
        rewards_apart = np.abs(a.rewards - b.rewards) / self.reward_std
        return Votes(
            other,
            _votes(self.state_errors(self.env_id), self.state_errors(other), states_apart),
            _votes(self.reward_errors(self.env_id), self.reward_errors(other), rewards_apart),
        )

    def _distance(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        k = len(self.state_std)
        return np.asarray(np.sqrt(np.square((a[:, :k] - b[:, :k]) / self.state_std).mean(axis=1)))


def replay(
    simulator: Simulator,
    observations: NDArray[np.float64],
    actions: NDArray[np.float32],
    next_observations: NDArray[np.float64],
    rewards: NDArray[np.float64],
    observation_std: NDArray[np.float64],
    reward_std: float,
) -> Replay:
    """Step recorded rows in their environment and in its other versions, as far as these can be made.

    Args:
        simulator: of the version in the rows' label.
        observations: (N, S) that hold the whole state (`Simulator.restorable`), in the environment's units.
        actions: (N, A) as recorded.
        next_observations: (N, S).
        rewards: (N,).
        observation_std: (S,) above 0.
        reward_std: above 0.
    """
    simulated = {simulator.env_id: simulator.steps(observations, actions)}
    for env_id in versions(simulator.env_id):
        if env_id in simulated:
            continue
        try:
            other = Simulator(env_id)
        except UserError:  # registered, but Gymnasium does not make it any more
            continue
        if other.state_dim == simulator.state_dim:
            simulated[env_id] = other.steps(observations, actions)
    state_std = observation_std[: simulator.state_dim]
    return Replay(simulator.env_id, observations, actions, next_observations, rewards, simulated, state_std, reward_std)


def _votes(
    errors: NDArray[np.float64], other_errors: NDArray[np.float64], apart: NDArray[np.float64]
) -> tuple[int, int]:
    """A row has a vote where a version reproduces it four times better than the two agree."""
    clear = (apart > _APART) & (np.minimum(errors, other_errors) < apart / 4)
    return int((clear & (errors < other_errors)).sum()), int((clear & (other_errors < errors)).sum())


def _repeating_dynamics(env_id: str) -> TrueDynamics | None:
    """True dynamics that repeat recorded episodes, if the environment has any."""
    known = TrueDynamics(env_id) if has_true_dynamics(env_id) else None
    return known if known is not None and known.repeats_episodes else None


def _true_steps(dynamics: TrueDynamics, observations: NDArray[Any], actions: NDArray[Any]) -> Steps:
    step = dynamics.step(dynamics.states_of(observations), actions)
    return Steps(step.observations, step.rewards, step.terminals)


class _OneByOne:
    """An environment that is put into every state before its own step.

    Attributes:
        layout: where its observations hold the state.
    """

    def __init__(self, env_id: str) -> None:
        self._env = make_env(env_id)
        self._env.reset(seed=0)
        found = _layout_and_setter(self._env.unwrapped)
        if found is None:
            raise SimulationError(
                f"the state of environment '{env_id}' cannot be set from its observations: they show less than all of"
                " it, or something else than its positions and velocities."
            )
        self.layout, self._set_state = found

    def steps(self, observations: NDArray[Any], actions: NDArray[Any]) -> Steps:
        rows = []
        with quiet_mujoco():
            for state, action in zip(self.layout.states(observations), actions, strict=True):
                self._set_state(state)
                rows.append(self._env.step(action))
        return Steps(
            np.array([row[0] for row in rows], dtype=np.float64).reshape(len(rows), -1),
            np.array([row[1] for row in rows], dtype=np.float64),
            np.array([row[2] for row in rows], dtype=np.bool_),
        )


_SetState = Callable[[NDArray[np.float64]], None]  # of (X,)


def _layout_and_setter(env: gymnasium.Env[Any, Any]) -> tuple[StateLayout, _SetState] | None:
    if isinstance(env, MujocoEnv):
        layout = mujoco_layout(env)
        return None if layout is None else (layout, partial(_set_mujoco_state, env))
    if isinstance(env, PendulumEnv):
        # Observation: cos, sin, angular velocity.
        return StateLayout(0, 2, 1), lambda o: setattr(env, "state", np.array([np.arctan2(o[1], o[0]), o[2]]))
    if isinstance(env, Continuous_MountainCarEnv):
        return StateLayout(0, 1, 1), lambda o: setattr(env, "state", o)
    return None


def _set_mujoco_state(env: MujocoEnv, state: NDArray[np.float64]) -> None:
    mujoco.mj_resetData(env.model, env.data)  # clears the solver's starting point, left by the row before
    env.set_state(state[: env.model.nq], state[env.model.nq :])
