"""The shifted robots under random actions and without any, and what their stepping takes.

Cases: `<robot>/random`, mean return of whole episodes in 3,000 uniform random steps (action space and first reset
seeded with 0), beside the source's, with mean length and steps per CPU second; `<robot>/zero`, mean length of 20
episodes of at most 200 steps without any torque, resets seeded with 0 to 19; `<robot>/<joint>`, for VGDF's kinematic
shifts the share of the same random steps in which the joint is beyond its limits, which in MuJoCo are soft.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import print_line, record
from envs import shifts
from envs.episodes import make_env, quiet_mujoco

BENCHMARK = "shift_robots"


class RandomPolicy(NamedTuple):
    """Whole episodes under random actions."""

    mean_return: float
    mean_length: float
    episodes: int
    steps_per_second: float  # of CPU time


def random_policy(env_id: str, steps: int) -> RandomPolicy:
    """Uniform random steps; an episode that is not over by the last one does not count."""
    env = make_env(env_id)
    env.reset(seed=0)
    env.action_space.seed(0)
    returns, lengths, total, length = [], [], 0.0, 0
    start = time.process_time()
    with quiet_mujoco():
        for _ in range(steps):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, length = total + float(reward), length + 1
            if terminated or truncated:
                returns.append(total)
                lengths.append(length)
                total, length = 0.0, 0
                env.reset()
    seconds = time.process_time() - start
    return RandomPolicy(float(np.mean(returns)), float(np.mean(lengths)), len(returns), steps / seconds)


def zero_action_lengths(env_id: str, episodes: int, limit: int) -> list[int]:
    """Steps until an episode without any torque terminates, at most `limit`, for resets seeded with 0, 1, ..."""
    env = make_env(env_id)
    shape = env.action_space.shape
    assert shape is not None
    lengths = []
    for seed in range(episodes):
        env.reset(seed=seed)
        length = 0
        while length < limit:
            length += 1
            if env.step(np.zeros(shape, np.float32))[2]:
                break
        lengths.append(length)
    return lengths


class Joint(NamedTuple):
    """A hinge with edited limits under random actions; degrees."""

    name: str
    limits: tuple[float, float]
    visited: tuple[float, float]
    outside: float  # share of the steps
    resets_outside: float  # share of the resets


def edited_joints(env_id: str, steps: int, resets: int) -> list[Joint]:
    """Where the joints of a kinematic shift are under uniform random actions, as in `random_policy`."""
    shift = shifts.parse(env_id)
    assert shift is not None
    env = make_env(env_id)
    robot: Any = env.unwrapped
    names = [edit.joint for edit in shift.change.edits if isinstance(edit, shifts.JointRange)]
    limits = np.degrees([robot.model.joint(name).range for name in names])  # (J, 2)

    def angles() -> NDArray[np.float64]:
        return np.degrees([robot.data.joint(name).qpos[0] for name in names])

    at_resets = []
    for seed in range(resets):
        env.reset(seed=seed)
        at_resets.append(angles())
    env.reset(seed=0)
    env.action_space.seed(0)
    seen = []
    with quiet_mujoco():
        for _ in range(steps):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            seen.append(angles())
            if terminated or truncated:
                env.reset()
    visited, first = np.array(seen), np.array(at_resets)  # (steps, J), (resets, J)
    outside = [((a < limits[:, 0]) | (a > limits[:, 1])).mean(axis=0) for a in (visited, first)]
    low, high = visited.min(axis=0), visited.max(axis=0)
    return [
        Joint(
            name, (float(limits[j, 0]), float(limits[j, 1])), (float(low[j]), float(high[j])), float(outside[0][j]),
            float(outside[1][j]),
        )
        for j, name in enumerate(names)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="ODRL's shifts, too")
    args = parser.parse_args(argv)
    command = f"python -m benchmarks.{BENCHMARK}{' --all' if args.all else ''}"
    wanted = [env_id for env_id in shifts.ids() if "Pendulum" not in env_id and env_id.endswith("-v5")]
    if not args.all:
        paper = ("", "kinematic", "morphology")
        wanted = [i for i in wanted if (shift := shifts.parse(i)) is not None and shift.name in paper]
    sources: dict[str, RandomPolicy] = {}
    for env_id in wanted:
        found = random_policy(env_id, 3000)
        source = shifts.source_id(env_id)
        sources.setdefault(env_id, found)
        reference = sources[source].mean_return if source else None
        print_line(
            record(
                BENCHMARK, f"{env_id}/random", found.mean_return, "mean return", reference, 1, command,
                reference_is="the source's" if source else None, mean_length=found.mean_length,
                episodes=found.episodes, steps_per_cpu_second=found.steps_per_second,
            )
        )  # fmt: skip
        lengths = zero_action_lengths(env_id, 20, 200)
        print_line(
            record(
                BENCHMARK, f"{env_id}/zero", float(np.mean(lengths)), "mean length", None, 1, command,
                least=min(lengths), limit=200,
            )
        )  # fmt: skip
        joints = edited_joints(env_id, 3000, 100) if env_id.endswith("-kinematic-v5") else []
        for joint in joints:
            print_line(
                record(
                    BENCHMARK, f"{env_id}/{joint.name}", joint.outside, "share of steps beyond the limits", None, 1,
                    command, limits_degrees=joint.limits, visited_degrees=joint.visited,
                    resets_beyond=joint.resets_outside,
                )
            )  # fmt: skip


if __name__ == "__main__":
    main()
