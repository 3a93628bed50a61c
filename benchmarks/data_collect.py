"""Speed of collection: rows per second of `envs.collect.collect`, beside a plain Gymnasium loop.

Cases: for each robot `<robot>/<n>`, collected by n Ray actors; 0 means in this process, without Ray. The plain loop
has one environment made by `gymnasium.make`, asks the same policy for one action at a time and stores the same six
columns.

`value` counts rows per second of processor time, of this process and the actors together (Ray's own processes are left
out): what a core does, also where the cores are shared. `per_wall_second` is what a user waits for. Every line comes
from a process of its own, in which blocks of the plain loop and of the collection take turns, after a short one of each
that is not counted, nor is the start of Ray. All cases of a robot give the same rows, as `content_hash` shows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from benchmarks.common import ROOT, print_line, record, spread
from envs.collect import RunShards, collect
from envs.policies import NetworkPolicy, embedded_actors, load_policy
from orchestrator.collection import CollectionWorkers, parallel_shards
from orchestrator.environment import KNOBS

BENCHMARK = "data_collect"
ROBOTS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5"}
HIDDEN = 128  # width of both layers of the embedded actors


class Rate(NamedTuple):
    """Rows per second."""

    per_cpu: float  # of processor time of all processes that compute
    per_wall: float


def actor(robot: str, env_id: str) -> NetworkPolicy:
    """The embedded medium actor; where there is none, one of its size with random weights, which costs the same."""
    if f"{robot}-medium" in embedded_actors():
        return load_policy(f"{robot}-medium")
    env = gymnasium.make(env_id)
    assert env.observation_space.shape is not None
    assert env.action_space.shape is not None
    width, actions = env.observation_space.shape[0], env.action_space.shape[0]
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"kind": np.array("squashed"), "act": np.array("relu")}
    layers = {"0": (width, HIDDEN), "1": (HIDDEN, HIDDEN), "m": (HIDDEN, actions), "s": (HIDDEN, actions)}
    for key, (n_in, n_out) in layers.items():
        arrays[f"W{key}"] = rng.normal(size=(n_out, n_in)) / np.sqrt(n_in)
        arrays[f"b{key}"] = np.zeros(n_out)
    return NetworkPolicy(arrays, f"{robot}-random-weights", "")


def plain_loop(env: gymnasium.Env[Any, Any], policy: NetworkPolicy, rows: int) -> None:
    """What one writes without this project."""
    assert env.observation_space.shape is not None
    width, rng = env.observation_space.shape[0], np.random.default_rng(0)
    observations, next_observations = np.empty((2, rows, width), np.float32)
    actions = np.empty((rows, policy.action_dim), np.float32)
    rewards = np.empty(rows, np.float32)
    terminals, timeouts = np.empty((2, rows), np.bool_)
    observation, _ = env.reset(seed=0)
    for i in range(rows):
        action = policy.act(observation[None], rng)[0]
        next_observation, reward, terminated, truncated, _ = env.step(action)
        observations[i], actions[i], rewards[i], next_observations[i] = observation, action, reward, next_observation
        terminals[i], timeouts[i] = terminated, truncated
        observation = env.reset()[0] if terminated or truncated else next_observation


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of this process and of the others, by Linux's /proc."""
    ticks = 0
    for pid in pids:
        # utime and stime, counted from behind the name, which may hold spaces
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], object], rows: int, pids: Sequence[int]) -> Rate:
    wall, cpu = time.perf_counter(), cpu_seconds(pids)
    work()
    cpu, wall = cpu_seconds(pids) - cpu, time.perf_counter() - wall
    return Rate(rows / cpu, rows / wall)


def measure(robot: str, workers: int, rows: int, blocks: int, command: str) -> dict[str, Any]:
    """Time one case in this process; the line of results."""
    env_id = ROBOTS[robot]
    env, policy = gymnasium.make(env_id), actor(robot, env_id)

    def collected(run_shards: RunShards, num_rows: int) -> str:
        return collect(env_id, [(policy, 1.0)], num_rows, seed=0, run_shards=run_shards).content_hash

    with parallel_shards(workers) as run_shards:
        pids = run_shards.pids() if isinstance(run_shards, CollectionWorkers) else []
        # enough for every worker to have had a shard
        collected(run_shards, min(rows, 10_000 * max(workers, 1)))
        plain_loop(env, policy, min(rows, 1_000))
        of_plain, rates, hashes = [], [], set()
        for _ in range(blocks):
            of_plain.append(timed(lambda: plain_loop(env, policy, rows), rows, []))
            rates.append(timed(lambda: hashes.add(collected(run_shards, rows)), rows, pids))
    value, reference = (statistics.median(rate.per_cpu for rate in of) for of in (rates, of_plain))
    paired = [rate.per_cpu / plain.per_cpu for rate, plain in zip(rates, of_plain, strict=True)]
    per_wall, plain_per_wall = (statistics.median(rate.per_wall for rate in of) for of in (rates, of_plain))
    return record(
        BENCHMARK, f"{robot}/{workers}", value, "rows per CPU-second", reference, 1, command,
        reference_is="a plain Gymnasium loop, in turns in the same process", env_id=env_id, policy=policy.name,
        workers=workers, rows=rows, blocks=blocks, **spread("value", [rate.per_cpu for rate in rates]),
        **spread("ratio", paired), per_wall_second=per_wall, plain_per_wall_second=plain_per_wall,
        wall_ratio=per_wall / plain_per_wall, content_hash=", ".join(sorted(hashes)),
        load_average=os.getloadavg()[0],
    )  # fmt: skip


def words(robot: str, workers: int, rows: int, blocks: int) -> list[str]:
    """The options that name one case."""
    return ["--robots", robot, "--workers", str(workers), "--rows", str(rows), "--blocks", str(blocks)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--robots", nargs="+", choices=ROBOTS, default=list(ROBOTS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="Ray actors; 0: in the process")
    parser.add_argument("--rows", type=int, default=50_000, help="of a collection (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="measurements of each thing (default: %(default)s)")
    parser.add_argument("--in-process", action="store_true", help="time a single case in this process")
    args = parser.parse_args(argv)
    if min(args.workers) < 0 or min(args.rows, args.blocks) < 1:
        parser.error("workers must not be negative, rows and blocks must be greater than 0")
    cases = [(robot, workers) for robot in args.robots for workers in args.workers]
    if args.in_process:
        if len(cases) != 1:
            parser.error("--in-process times one robot with one number of workers")
        robot, workers = cases[0]
        command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *words(robot, workers, args.rows, args.blocks)])
        print_line(measure(robot, workers, args.rows, args.blocks, command))
        return 0
    for i, (robot, workers) in enumerate(cases, start=1):
        print(f"[{i}/{len(cases)}] {robot}, {workers} worker(s)", file=sys.stderr, flush=True)
        apart = [sys.executable, "-m", f"benchmarks.{BENCHMARK}", *words(robot, workers, args.rows, args.blocks)]
        # numpy's BLAS reads its variables when it is loaded
        done = subprocess.run([*apart, "--in-process"], cwd=ROOT, env=os.environ | KNOBS, check=False)
        if done.returncode != 0:
            print(f"{BENCHMARK}: {robot}/{workers} failed with exit code {done.returncode}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
