"""Environments and whole episodes in them.

Shape suffixes: B episodes still alive, S observation, A action.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from envs.environments import register
from envs.errors import UserError, nearest

Act = Callable[[NDArray[Any]], NDArray[Any]]
"""Observations (B, S) -> actions (B, A)."""


class EpisodeError(UserError):
    """An environment cannot be made, or a policy cannot act in it."""


class NonFiniteActionError(EpisodeError):
    """A policy returned an action that is not finite."""


@dataclass(frozen=True, eq=False)
class Episodes:
    """Outcome of n episodes, in the order of their seeds."""

    returns: NDArray[np.float64]  # (n,) undiscounted
    lengths: NDArray[np.int64]  # (n,) steps


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One recorded episode of T steps; float32 as stored in datasets."""

    observations: NDArray[np.float32]  # (T + 1, S): the last one is where the episode ended
    actions: NDArray[np.float32]  # (T, A) as given to the environment
    rewards: NDArray[np.float32]  # (T,)
    terminated: bool  # false: it ended at the time limit
    states: NDArray[np.float64] | None  # (T, X) before each step

    def __len__(self) -> int:
        return len(self.rewards)


def make_env(env_id: str) -> gymnasium.Env[Any, Any]:
    """A Gymnasium environment with vector observations and bounded vector actions.

    Raises:
        EpisodeError: unknown id (with the nearest ones), an environment that cannot be built here, or spaces
            other than flat boxes with finite action bounds.
    """
    register(env_id)
    try:
        with warnings.catch_warnings(), quiet_mujoco():
            # That v4 has a successor is known: D4RL's sets are scored in it on purpose.
            warnings.simplefilter("ignore")
            env = gymnasium.make(env_id, disable_env_checker=True)
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.VersionNotFound) as error:
        raise EpisodeError(
            f"there is no Gymnasium environment '{env_id}'{nearest(env_id, gymnasium.registry)}."
        ) from error
    except (gymnasium.error.Error, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise EpisodeError(f"environment '{env_id}' cannot be made: {reason}.") from error
    space = env.action_space
    if not isinstance(space, Box) or len(space.shape) != 1 or not np.isfinite([space.low, space.high]).all():
        raise EpisodeError(f"environment '{env_id}' has action space {space}: a bounded vector is needed.")
    if not isinstance(env.observation_space, Box) or len(env.observation_space.shape) != 1:
        raise EpisodeError(f"environment '{env_id}' has observations {env.observation_space}: a vector is needed.")
    if env.spec is None or env.spec.max_episode_steps is None:
        raise EpisodeError(f"environment '{env_id}' has no time limit: its episodes might never end.")
    return env


@contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Drops MuJoCo's warnings, of which it would both print each one and append it to a MUJOCO_LOG.TXT in the current
    folder.

    They are about Gymnasium's model files (deprecated attributes) or about states that no robot can be in: nothing a
    user could mend.
    """
    try:
        import mujoco
    except ImportError:  # an environment that needs it says so itself
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda _: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


# Building a MuJoCo environment costs as much as a thousand of its steps, and reset(seed=...) leaves nothing
# of the episode before. List append and pop are atomic, so threads can share this.
_idle: dict[str, list[gymnasium.Env[Any, Any]]] = {}


@contextmanager
def borrow_envs(env_id: str, count: int) -> Iterator[list[gymnasium.Env[Any, Any]]]:
    """`count` environments of this id, kept for the next borrower unless something went wrong in one."""
    idle = _idle.setdefault(env_id, [])
    envs: list[gymnasium.Env[Any, Any]] = []
    try:
        while len(envs) < count:
            try:
                envs.append(idle.pop())
            except IndexError:
                envs.append(make_env(env_id))
        yield envs
    except BaseException:
        for env in envs:
            env.close()
        raise
    idle.extend(envs)


def run_episodes(env_id: str, act: Act, seeds: Sequence[int]) -> Episodes:
    """One episode per seed, stepped in lockstep with one batched `act` call for those still alive.

    Episode i starts from `reset(seed=seeds[i])` and runs until it ends or reaches the environment's time
    limit. Actions are clipped to the environment's bounds. The rows of a matrix product may differ in their
    last bit with
    the number of rows, and MuJoCo amplifies that: to compare episodes bitwise, run the same seeds together.

    Args:
        env_id: Gymnasium id.
        act: observations (B, S), float64 or float32 as the environment gives them, to actions (B, A).
        seeds: one per episode.

    Raises:
        EpisodeError: the environment cannot be made, or `act` returns a wrong shape or a value that is not
            finite.
    """
    lengths = np.zeros(len(seeds), dtype=np.int64)
    with borrow_envs(env_id, len(seeds)) as envs:
        returns = _lockstep(env_id, envs, act, seeds, lengths, None)
    return Episodes(returns, lengths)


State = Callable[[gymnasium.Env[Any, Any]], NDArray[np.float64]]
"""The simulator's state (X,) of an environment as it stands."""


def record_episodes(env_id: str, act: Act, seeds: Sequence[int], state: State | None = None) -> list[Trajectory]:
    """Like `run_episodes`, but with every step kept, and before it the environment's state if `state` is given."""
    lengths = np.zeros(len(seeds), dtype=np.int64)
    with borrow_envs(env_id, len(seeds)) as envs:
        recorder = _Recorder(envs, state)
        _lockstep(env_id, envs, act, seeds, lengths, recorder)
    return [recorder.trajectory(i, int(length)) for i, length in enumerate(lengths)]


class _Recorder:
    """Buffers for whole episodes: allocated once, written in place."""

    def __init__(self, envs: Sequence[gymnasium.Env[Any, Any]], state: State | None) -> None:
        spec, n = envs[0].spec, len(envs)
        assert spec is not None
        assert spec.max_episode_steps is not None
        limit = spec.max_episode_steps
        obs_shape, action_shape = envs[0].observation_space.shape, envs[0].action_space.shape
        assert obs_shape is not None
        assert action_shape is not None
        self.observations = np.empty((n, limit + 1, *obs_shape), dtype=np.float32)
        self.actions = np.empty((n, limit, *action_shape), dtype=np.float32)
        self.rewards = np.empty((n, limit), dtype=np.float32)
        self.terminated = np.zeros(n, dtype=np.bool_)
        self.state = state
        self.states = np.empty((n, limit, len(state(envs[0])) if state else 0))

    def trajectory(self, i: int, length: int) -> Trajectory:
        # Copies: a short episode must not keep a buffer of full length alive.
        return Trajectory(
            self.observations[i, : length + 1].copy(),
            self.actions[i, :length].copy(),
            self.rewards[i, :length].copy(),
            bool(self.terminated[i]),
            self.states[i, :length].copy() if self.state else None,
        )


def _lockstep(
    env_id: str,
    envs: Sequence[gymnasium.Env[Any, Any]],
    act: Act,
    seeds: Sequence[int],
    lengths: NDArray[np.int64],
    recorder: _Recorder | None,
) -> NDArray[np.float64]:
    """Steps all environments to their end; fills `lengths` and the recorder; returns (n,) returns."""
    returns = np.zeros(len(envs), dtype=np.float64)
    if not envs:
        return returns
    space = envs[0].action_space
    assert isinstance(space, Box)
    low, high = space.low, space.high
    alive = list(range(len(envs)))
    first = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
    obs = np.stack(first)  # (B, S) of those alive, rewritten in place
    if recorder is not None:
        recorder.observations[:, 0] = obs
    t = 0
    while alive:
        actions = np.asarray(act(obs))
        if actions.shape != (len(alive), *low.shape):
            raise EpisodeError(
                f"the policy returned actions of shape {actions.shape} in '{env_id}', ({len(alive)},"
                f" {low.shape[0]}) is needed."
            )
        actions = np.clip(actions, low, high)
        if not np.isfinite(actions).all():
            message = f"the policy returned an action that is not finite in '{env_id}' at step {t}."
            raise NonFiniteActionError(message)
        if recorder is not None:
            recorder.actions[alive, t] = actions
        ended = False
        for row, i in enumerate(alive):
            if recorder is not None and recorder.state is not None:
                recorder.states[i, t] = recorder.state(envs[i])
            obs[row], reward, terminated, truncated, _ = envs[i].step(actions[row])
            returns[i] += float(reward)
            if recorder is not None:
                recorder.rewards[i, t] = reward
            if terminated or truncated:
                lengths[i] = t + 1
                ended = True
                if recorder is not None:
                    recorder.terminated[i] = terminated
        if recorder is not None:
            recorder.observations[alive, t + 1] = obs
        t += 1
        if ended:
            keep = [row for row, i in enumerate(alive) if lengths[i] == 0]
            alive = [alive[row] for row in keep]
            obs = obs[keep]
    return returns
