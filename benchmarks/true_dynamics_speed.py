"""Speed of rollouts in the true dynamics: transitions per second of `TrueDynamics`, beside Python loops.

Cases: for each robot `<robot>/<n>`, stepped by n threads. Rollouts of given length from states of the embedded medium
actor's episodes, under given uniform actions, so that no policy's time is counted; every step goes on from the states
of the one before.

The loops put one environment into one state after the other and step it: `set_state`, the reference, by these two calls
alone, `with_resets` with the two calls of `reset` before them that OfflineRL-Kit's MujocoOracleDynamics makes (3e47937,
offlinerlkit/dynamics/mujoco_oracle_dynamics.py). They run in a process of their own, because `TrueDynamics` takes away
timers of MuJoCo's that such a loop would have to pay for. All take turns, one at a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import print_line, record, spread
from envs.collect import collect
from envs.episodes import make_env
from envs.policies import load_policy
from envs.true_dynamics import TrueDynamics

BENCHMARK = "true_dynamics_speed"
ROBOTS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
RESETS = {"set_state": 0, "with_resets": 2}  # forms of the loop: calls of reset before a transition
FloatArray = NDArray[np.float64]


class Timing(NamedTuple):
    """What rollouts took, and where they ended."""

    wall: float  # seconds
    cpu: float  # of all threads
    states: FloatArray  # (N, X)


def timed(work: Callable[[], FloatArray]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    states = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Timing(wall, cpu, states)


def roll_out(dynamics: TrueDynamics, states: FloatArray, actions: FloatArray) -> FloatArray:
    """States (N, X) after as many steps as `actions` (T, N, A) has."""
    for step_actions in actions:
        states = dynamics.step(states, step_actions).states
    return states


def loop(env_id: str, resets: int, states: FloatArray, actions: FloatArray) -> Timing:
    """The same by one environment, one transition after the other."""
    env = make_env(env_id)
    env.reset(seed=0)
    robot: Any = env.unwrapped
    nq = robot.model.nq

    def work() -> FloatArray:
        now = states.copy()
        for step_actions in actions:
            for i, action in enumerate(step_actions):
                for _ in range(resets):
                    env.reset()
                robot.set_state(now[i, :nq], now[i, nq:])
                env.step(action)
                now[i, :nq], now[i, nq:] = robot.data.qpos, robot.data.qvel
        return now

    return timed(work)


def measure(
    robot: str, threads: Sequence[int], starts: int, steps: int, blocks: int, command: str
) -> list[dict[str, Any]]:
    """The lines of one robot, one for each number of threads."""
    env_id = ROBOTS[robot]
    states = collect(env_id, [(load_policy(f"{robot}-medium"), 1.0)], starts, seed=0).states
    assert states is not None
    dynamics = {n: TrueDynamics(env_id, n) for n in threads}
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, (steps, starts, dynamics[threads[0]].action_dim))
    ours: dict[int, list[Timing]] = {n: [] for n in threads}
    loops: dict[str, list[Timing]] = {form: [] for form in RESETS}
    for simulator in dynamics.values():
        roll_out(simulator, states[:100], actions[:, :100])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        for _ in range(blocks):
            for form, resets in RESETS.items():
                loops[form].append(apart.submit(loop, env_id, resets, states, actions).result())
            for n, simulator in dynamics.items():
                ours[n].append(timed(lambda simulator=simulator: roll_out(simulator, states, actions)))  # type: ignore[misc]
    rows = starts * steps
    apart_by = np.abs(ours[threads[0]][0].states - loops["set_state"][0].states).max(axis=1)
    lines = []
    for n in threads:
        rates = [rows / mine.wall for mine in ours[n]]
        more: dict[str, Any] = {"per_cpu_second": statistics.median(rows / mine.cpu for mine in ours[n])}
        for form, timings in loops.items():
            paired = [other.wall / mine.wall for mine, other in zip(ours[n], timings, strict=True)]
            more[f"{form}_per_second"] = statistics.median(rows / other.wall for other in timings)
            more[f"{form}_per_cpu_second"] = statistics.median(rows / other.cpu for other in timings)
            more |= {f"{form}_ratio": statistics.median(paired), **spread(f"{form}_ratio", paired)}
            more[f"{form}_cpu_ratio"] = more["per_cpu_second"] / more[f"{form}_per_cpu_second"]
        line = record(
            BENCHMARK, f"{robot}/{n}", statistics.median(rates), "transitions per second", more["set_state_per_second"],
            n, command, reference_is="a Python loop of set_state and step, in turns", env_id=env_id, starts=starts,
            steps=steps, blocks=blocks, **spread("value", rates), **more, median_difference=float(np.median(apart_by)),
            load_average=os.getloadavg()[0],
        )  # fmt: skip
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--robots", nargs="+", choices=ROBOTS, default=list(ROBOTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of the simulator (default: 1 2)")
    parser.add_argument("--starts", type=int, default=5_000, help="rollouts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="of a rollout (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="measurements of each thing (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(*args.threads, args.starts, args.steps, args.blocks) < 1:
        parser.error("threads, starts, steps and blocks must be greater than 0")
    sizes = f"--starts {args.starts} --steps {args.steps} --blocks {args.blocks}"
    for i, robot in enumerate(args.robots, start=1):
        print(f"[{i}/{len(args.robots)}] {robot}", file=sys.stderr, flush=True)
        command = (
            f"python -m benchmarks.{BENCHMARK} --robots {robot} --threads {' '.join(map(str, args.threads))} {sizes}"
        )
        for line in measure(robot, args.threads, args.starts, args.steps, args.blocks, command):
            print_line(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
