"""The true dynamics of environments, many states at a time: what a learned model of them would be without any error.

Shape suffixes: N rows, X simulator state, S observation, A action.
"""

import contextlib
import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import (
    MujocoEnv,
    half_cheetah_v4,
    half_cheetah_v5,
    hopper_v4,
    hopper_v5,
    walker2d_v4,
    walker2d_v5,
)
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from mujoco.rollout import Rollout
from numpy.typing import NDArray

from envs.episodes import EpisodeError, make_env, quiet_mujoco
from envs.errors import UserError
from envs.shifted_robots import HalfCheetahV4, HalfCheetahV5, HopperV4, HopperV5, Walker2dV4, Walker2dV5
from envs.toys import EdgeOfReach, Refrigerator

FloatArray = NDArray[np.float64]

# Exactly these classes: one derived from them may pay or show something else.
_ROBOTS = (
    hopper_v4.HopperEnv,
    hopper_v5.HopperEnv,
    half_cheetah_v4.HalfCheetahEnv,
    half_cheetah_v5.HalfCheetahEnv,
    walker2d_v4.Walker2dEnv,
    walker2d_v5.Walker2dEnv,
    HopperV4,
    HopperV5,
    HalfCheetahV4,
    HalfCheetahV5,
    Walker2dV4,
    Walker2dV5,
)
_MAX_HIDDEN = 2  # Gymnasium's robots leave x, or x and y, out of their observations


class TrueDynamicsError(UserError):
    """An environment's dynamics cannot be stepped from any state."""


@dataclass(frozen=True, eq=False)
class TrueStep:
    """What one step makes of N states and actions."""

    states: FloatArray  # (N, X)
    observations: FloatArray  # (N, S)
    rewards: FloatArray  # (N,)
    terminals: NDArray[np.bool_]  # (N,) as the environment says, which knows velocities that it does not show


@dataclass(frozen=True)
class StateLayout:
    """How an observation begins with the simulator's state: positions, then velocities.

    The state itself is (hidden positions, shown positions, velocities).
    """

    hidden: int  # leading positions that are not shown: neither dynamics nor rewards depend on where the origin is
    positions: int  # that are shown
    velocities: int
    velocity_limit: float = np.inf  # velocities are shown clipped to it

    @property
    def size(self) -> int:
        """Entries of an observation that hold the state."""
        return self.positions + self.velocities

    @property
    def state_dim(self) -> int:
        """X"""
        return self.hidden + self.size

    def complete(self, observations: NDArray[Any]) -> NDArray[np.bool_]:
        """(N, S) -> (N,) whether an observation holds the whole state: no velocity is at the limit."""
        velocities = np.asarray(observations)[:, self.positions : self.size]
        complete: NDArray[np.bool_] = (np.abs(velocities) < self.velocity_limit).all(axis=1)
        return complete

    def states(self, observations: NDArray[Any]) -> FloatArray:
        """(N, S) -> (N, X): hidden positions are 0, clipped velocities are taken as they are shown."""
        states = np.zeros((len(observations), self.state_dim))
        states[:, self.hidden :] = np.asarray(observations)[:, : self.size]
        return states

    def observe(self, states: FloatArray) -> FloatArray:
        """(N, X) -> (N, size), the beginning of observations."""
        shown = states[:, self.hidden :].copy()
        velocities = shown[:, self.positions :]
        np.clip(velocities, -self.velocity_limit, self.velocity_limit, out=velocities)
        return shown


def mujoco_layout(env: MujocoEnv) -> StateLayout | None:
    """How a robot's observations hold its state; None if they do not. The robot is left in its reset state.

    Found by trying: numbers are put into the simulator and looked for in the observation. So a robot's variants
    (another model, positions kept in the observation) need no table of their own.
    """
    nq, nv = env.model.nq, env.model.nv
    positions, velocities = 2.0 + np.arange(nq), 1000.0 + np.arange(nv)
    env.data.qpos[:], env.data.qvel[:] = positions, velocities
    shown = env._get_obs()  # type: ignore[attr-defined]
    mujoco.mj_resetData(env.model, env.data)
    hidden = next((k for k in range(_MAX_HIDDEN + 1) if np.array_equal(shown[: nq - k], positions[k:])), None)
    if hidden is None:
        return None
    start, end = nq - hidden, nq - hidden + nv
    if np.array_equal(shown[start:end], velocities):
        return StateLayout(hidden, start, nv)
    if len(shown) >= end and (shown[start:end] == shown[start]).all():
        return StateLayout(hidden, start, nv, float(shown[start]))
    return None


class TrueDynamics:
    """An environment's own step from any of its states, a batch at a time.

    For Hopper, HalfCheetah and Walker2d (Gymnasium's, in the versions that it makes, neorl/ and shifted ones), for
    EdgeOfReach and for Refrigerator. Next state, observation, reward and terminal of a row are those of the environment
    put into that state; they depend on the row's state and action alone, not on the batch or the number of threads.

    Refrigerator's are those with the door shut and without the sensor's noise: the door is no part of the state that a
    policy or a model sees, and noise has no true value. So they say what a model should predict on the average while
    the door is shut, and recorded episodes, which have both, are not repeated by them (`repeats_episodes`).

    A robot's state is MuJoCo's qpos and qvel. What else an environment carries from step to step is the solver's
    starting point (qacc_warmstart). It is cleared here before every step: to an environment that is put into the state
    after mj_resetData the step is equal bit for bit, and the solver converges from either start. Measured against
    undisturbed episodes, 20,000 steps of each robot under random actions and a medium actor: after one step 99.9 % of
    the states differ by less than 1e-12, one in ten thousand by up to 3e-7. Over 50 steps in closed loop, 20 rollouts
    under random actions, differences stay below 1e-12 for Hopper and Walker2d; HalfCheetah's contacts let them grow to
    7e-10 (median) and 1e-5 (highest).

    MuJoCo clips the controls, while control costs take the whole action. A state that MuJoCo cannot go on from (numbers
    that are not finite or above 1e10) it replaces by the model's initial one, as in the environment, which then goes
    on for the rest of the step.

    Can be pickled: the copy builds a simulator of its own. One object must not be used by two threads at once.

    Attributes:
        env_id: Gymnasium id.
        observation_dim: S.
        action_dim: A.
        state_dim: X, nq + nv of a robot, 2 of EdgeOfReach, 1 (the temperature) of Refrigerator.
        layout: where an observation holds the state.
        repeats_episodes: whether a step from a recorded observation with the recorded action gives the recorded one.

    Args:
        env_id: Gymnasium id.
        num_threads: that share the rows of a step of a robot.

    Raises:
        TrueDynamicsError: there are no true dynamics for this environment.
        EpisodeError: there is no such environment.
    """

    def __init__(self, env_id: str, num_threads: int = 1) -> None:
        self.env_id = env_id
        self.num_threads = num_threads
        env = _bare(make_env(env_id))
        if not _supported(env):
            env.close()
            raise TrueDynamicsError(
                f"there are no true dynamics for environment '{env_id}': they can be had for Hopper, HalfCheetah and"
                " Walker2d (Gymnasium's v4 and v5, neorl/ and shifted ones), for offsweep/EdgeOfReach-v0 and for"
                " offsweep/Refrigerator-v0 and RefrigeratorShut-v0. Ant's reward needs more than its observation."
            )
        self._dynamics: _Plane | _Cooling | _Robot
        if isinstance(env, EdgeOfReach):
            self._dynamics = _Plane()
        elif isinstance(env, Refrigerator):
            self._dynamics = _Cooling()
        else:
            self._dynamics = _Robot(env, num_threads)
        self.layout = self._dynamics.layout
        self.repeats_episodes = not isinstance(self._dynamics, _Cooling)
        assert env.observation_space.shape
        assert env.action_space.shape
        self.observation_dim = env.observation_space.shape[0]
        self.action_dim = env.action_space.shape[0]
        self.state_dim = self.layout.state_dim
        env.close()

    def __reduce__(self) -> tuple[type["TrueDynamics"], tuple[str, int]]:
        return TrueDynamics, (self.env_id, self.num_threads)

    def states_of(self, observations_NS: NDArray[Any]) -> FloatArray:
        """The states (N, X) that observations (N, S) show.

        x is 0 where it is not shown, on which nothing depends. Hopper and Walker2d show velocities clipped to +-10;
        a clipped one is taken as it is shown, though it may have been higher (`layout.complete` finds such rows).
        """
        return self.layout.states(observations_NS)

    def observe(self, states_NX: FloatArray) -> FloatArray:
        """What the environment shows of states (N, X): (N, S)."""
        return self._dynamics.observe(states_NX)

    def step(self, states_NX: FloatArray, actions_NA: NDArray[Any]) -> TrueStep:
        """One step of the environment, frame skip included, from every state.

        Args:
            states_NX: (N, X); N may be 0.
            actions_NA: (N, A) in the environment's units. Costs are computed in float64 whatever the type; the
                environment computes those of a float32 action in float32.
        """
        return self._dynamics.step(np.asarray(states_NX, np.float64), np.asarray(actions_NA, np.float64))


@lru_cache
def has_true_dynamics(env_id: str) -> bool:
    """Whether `TrueDynamics` can be made for an environment; false for an id that does not exist."""
    try:
        env = _bare(make_env(env_id))
    except EpisodeError:
        return False
    env.close()
    return _supported(env)


@lru_cache
def robot_layout(env_id: str) -> StateLayout | None:
    """How observations of a robot with true dynamics hold qpos and qvel; None for every other environment."""
    layout = TrueDynamics(env_id).layout if has_true_dynamics(env_id) else None
    return layout if layout is not None and layout.velocities else None


def simulator_state(env: gymnasium.Env[Any, Any]) -> FloatArray:
    """(X,) qpos and qvel of a MuJoCo environment as it stands."""
    data = env.unwrapped.data  # type: ignore[attr-defined]
    return np.concatenate([data.qpos, data.qvel])


def _bare(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """Without the wrappers that change nothing of a step. Any other stays: it may."""
    while isinstance(env, TimeLimit | OrderEnforcing):
        env = env.env
    return env


def _supported(env: gymnasium.Env[Any, Any]) -> bool:
    return type(env) in (*_ROBOTS, EdgeOfReach, Refrigerator)


class _Plane:
    """EdgeOfReach: its state is its observation before that is rounded to float32."""

    layout = StateLayout(0, 2, 0)

    def observe(self, states_NX: FloatArray) -> FloatArray:
        return states_NX.astype(np.float32).astype(np.float64)

    def step(self, states_NX: FloatArray, actions_NA: FloatArray) -> TrueStep:
        after = states_NX + np.clip(actions_NA, -1.0, 1.0)
        rewards = EdgeOfReach.reward(states_NX)
        return TrueStep(after, self.observe(after), rewards, np.zeros(len(after), np.bool_))


class _Cooling:
    """Refrigerator with its door shut and a perfect sensor; the state is the temperature in °C.

    T' = (T - u) - ((T - u) - 15) 0.02,   r = -|T' + 2|
    """

    layout = StateLayout(0, 1, 0)

    def observe(self, states_NX: FloatArray) -> FloatArray:
        return states_NX.astype(np.float32).astype(np.float64)

    def step(self, states_NX: FloatArray, actions_NA: FloatArray) -> TrueStep:
        cooled = states_NX - np.clip(actions_NA, 0.0, Refrigerator.MAX_POWER)
        after = cooled - (cooled - Refrigerator.OUTSIDE) * Refrigerator.LEAK_SHUT
        shown = self.observe(after)
        rewards = -np.abs(shown[:, 0] - Refrigerator.TARGET)
        return TrueStep(after, shown, rewards, np.zeros(len(after), np.bool_))


class _Robot:
    """A MuJoCo robot that is paid for its speed along x and, where it can fall, for standing.

        r = w_x (x' - x) / dt + w_h [standing] - w_c sum_i a_i^2

    All weights and limits are read from the environment. Versions before v5 pay w_h in the step of the fall, too.
    """

    def __init__(self, env: Any, num_threads: int) -> None:
        layout = mujoco_layout(env)
        assert layout is not None
        self.layout = layout
        _stop_timers()
        self._model = env.model
        # A robot is one tree of bodies, so its constraints are one island: looking for more changes no bit of a step.
        self._model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
        # The state that MuJoCo's rollouts take and give is (time, qpos, qvel) for models without activations.
        self._full_size = mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
        assert self._full_size == 1 + layout.state_dim
        self._frame_skip = env.frame_skip
        self._dt = env.dt
        self._forward_weight = env._forward_reward_weight
        self._control_weight = env._ctrl_cost_weight
        self._can_fall = hasattr(env, "is_healthy")
        if self._can_fall:
            self._z_range, self._angle_range = env._healthy_z_range, env._healthy_angle_range
            self._state_range = getattr(env, "_healthy_state_range", None)
            self._terminates = env._terminate_when_unhealthy
            self._standing_reward = env._healthy_reward
            env.data.qpos[:] = np.nan
            self._fallen_reward = env.healthy_reward
            mujoco.mj_resetData(env.model, env.data)
        self._datas = [mujoco.MjData(env.model) for _ in range(num_threads)]
        self._rollout = Rollout(nthread=num_threads if num_threads > 1 else 0)

    def observe(self, states_NX: FloatArray) -> FloatArray:
        return self.layout.observe(states_NX)

    def step(self, states_NX: FloatArray, actions_NA: FloatArray) -> TrueStep:
        after = self._simulate(states_NX, actions_NA) if len(states_NX) else np.empty((0, self.layout.state_dim))
        x_velocity = (after[:, 0] - states_NX[:, 0]) / self._dt
        rewards = self._forward_weight * x_velocity - self._control_weight * np.square(actions_NA).sum(axis=1)
        terminals = np.zeros(len(after), np.bool_)
        if self._can_fall:
            standing = self._standing(after)
            rewards += np.where(standing, self._standing_reward, self._fallen_reward)
            terminals = ~standing & self._terminates
        return TrueStep(after, self.observe(after), rewards, terminals)

    def _simulate(self, states_NX: FloatArray, actions_NA: FloatArray) -> FloatArray:
        initial = np.zeros((len(states_NX), self._full_size))
        initial[:, 1:] = states_NX
        with quiet_mujoco():
            steps, _ = self._rollout.rollout(
                self._model,
                self._datas,
                initial,
                actions_NA[:, None],
                nstep=self._frame_skip,  # the control is held
                initial_warmstart=np.zeros((1, self._model.nv)),
            )
        return np.ascontiguousarray(steps[:, -1, 1:])

    def _standing(self, states_NX: FloatArray) -> NDArray[np.bool_]:
        """(N, X) -> (N,) the environment's is_healthy: height, angle and, for Hopper, all from the angle on."""
        standing = _within(states_NX[:, 1], self._z_range) & _within(states_NX[:, 2], self._angle_range)
        if self._state_range is not None:
            standing &= _within(states_NX[:, 2:], self._state_range).all(axis=1)
        return standing


def _stop_timers() -> None:
    """Take away the clock that MuJoCo's Python package sets for MuJoCo's profiler.

    Nobody reads that here, and the clock, asked at the beginning and end of every part of a step, takes 15 % of it.
    The package's own setter puts back its default clock when it is given none.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a build that hides it: steps take longer, no more
        ctypes.c_void_p.in_dll(ctypes.CDLL(mujoco._callbacks.__file__), "mjcb_time").value = None


def _within(values: FloatArray, limits: tuple[float, float]) -> NDArray[np.bool_]:
    within: NDArray[np.bool_] = (limits[0] < values) & (values < limits[1])
    return within
