"""The shifted robots under random actions and without any, and what their stepping takes.

Cases: `<robot>/random`, mean return of whole episodes in 3,000 uniform random steps (action space and first reset
seeded with 0), beside the source's, with mean length and steps per CPU second; `<robot>/zero`, mean length of 20
episodes of at most 200 steps without any torque, resets seeded with 0 to 19.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


if __name__ == "__main__":
    main()
