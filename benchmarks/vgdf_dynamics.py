"""Whether VGDF's target dynamics are as good in mixed precision and by cheaper schedules as in float32 by the released
one: error and likelihood on rows that no refit has seen, and the CPU-seconds that the refits took.

A replay of `offsweep/HalfCheetah-kinematic-v5` grows from nothing, ensembles are refitted every 25 target steps (250
updates) until it holds `--rows`, then at `--late-rows` (as at updates of ten times as many) `--late` times. Actions
are drawn: a random walk within the bounds, so that the robot moves. Members of a pack are the seeds.

- `mse`: squared error of the mean of all networks' means over rows and outputs, each output divided by its variance
- `log_likelihood`: of an output under a network's Gaussian, mean over rows, outputs and networks
- `spread`: standard deviation of the networks' means, in standard deviations of the output: what VGDF's gate divides by
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.cpu import configure_cpu
from agents.replay import transition_rows
from agents.target_dynamics import TargetDynamics, TargetDynamicsConfig
from benchmarks.common import print_line, record
from envs.episodes import make_env

BENCHMARK = "vgdf_dynamics"
ENVIRONMENT, GAMMA, TEST_ROWS = "offsweep/HalfCheetah-kinematic-v5", 10, 5_000
CASES: dict[str, dict[str, Any]] = {
    "released/float32": {},
    "released/mixed": {"precision": "mixed"},
    "released/mixed/3 networks": {"precision": "mixed", "ensemble_size": 3},
    "restore best/mixed": {"precision": "mixed", "restore_best": True},
    "one-epoch/mixed": {"precision": "mixed", "schedule": "one-epoch"},
    "fixed-steps/mixed": {"precision": "mixed", "schedule": "fixed-steps", "steps": 50},
}


def collected(count: int, seed: int) -> Tensor:
    """Rows of a random walk's actions."""
    env, draw = make_env(ENVIRONMENT), np.random.default_rng(seed)
    columns: list[list[Any]] = [[] for _ in range(5)]
    obs, _ = env.reset(seed=seed)
    action = np.zeros(env.action_space.shape or (), dtype=np.float32)
    for _ in range(count):
        action = np.clip(0.9 * action + 0.4 * draw.standard_normal(action.shape), -1, 1).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        for column, value in zip(columns, (obs, action, reward, terminated, next_obs), strict=True):
            column.append(value)
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
    return transition_rows(*(torch.as_tensor(np.asarray(column), dtype=torch.float32) for column in columns))


def quality(dynamics: TargetDynamics, test: Tensor, obs_dim: int, action_dim: int) -> list[dict[str, float]]:
    """What the ensembles' predictions of test rows are worth, per member."""
    x, reward = test[:, : obs_dim + action_dim], test[:, obs_dim + action_dim : obs_dim + action_dim + 1]
    y = torch.cat((reward, test[:, -obs_dim:] - test[:, :obs_dim]), 1)
    scale = y.std(0)
    found = []
    means, variances = dynamics.predict(x.expand(len(dynamics.seeds), -1, -1))
    for mean, variance in zip(means, variances, strict=True):
        log_likelihood = -0.5 * ((y - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))
        found.append({
            "mse": float((((mean.mean(0) - y) / scale) ** 2).mean()), "log_likelihood": float(log_likelihood.mean()),
            "spread": float((mean.std(0) / scale).mean()),
        })  # fmt: skip
    return found


def course(changes: dict[str, Any], rows: Sequence[Tensor], test: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Refit as a run would; what the ensembles are worth at the end of the growth and at the end."""
    obs_dim, width = test.shape[1] - args.action_dim - 2, args.action_dim
    obs_dim //= 2
    dynamics = TargetDynamics(TargetDynamicsConfig(**changes), range(len(rows)), obs_dim, width)
    found: dict[str, Any] = {}
    begun, steps = time.process_time(), 0.0
    every = dynamics.config.refit_every
    for t in range(every, GAMMA * args.rows + 1, every):
        metrics = dynamics.refit([r[: t // GAMMA] for r in rows], t)
        steps += sum(m.get("dynamics/gradient_steps", 0.0) for m in metrics)
    found["early"] = quality(dynamics, test, obs_dim, width)
    for i in range(args.late):
        metrics = dynamics.refit([r[: args.late_rows] for r in rows], GAMMA * args.late_rows + i * every)
        steps += sum(m["dynamics/gradient_steps"] for m in metrics)
    found["late"] = quality(dynamics, test, obs_dim, width)
    found["cpu_seconds"] = (time.process_time() - begun) / len(rows)
    found["gradient_steps"] = steps / len(rows)
    return found


def lines_of(
    case: str, found: dict[str, Any], reference: dict[str, Any], args: argparse.Namespace, command: str
) -> None:
    for stage in ("early", "late"):
        mine, theirs = ([one["mse"] for one in side[stage]] for side in (found, reference))
        more = {name: [one[name] for one in found[stage]] for name in ("mse", "log_likelihood", "spread")}
        of_reference = {
            f"reference_{name}": [one[name] for one in reference[stage]] for name in ("log_likelihood", "spread")
        }
        print_line(record(
            BENCHMARK, f"{case}/{stage}", statistics.fmean(mine), "squared error in variances of the outputs",
            statistics.fmean(theirs), 1, command, reference_is="released/float32", settings=CASES[case],
            rows=args.rows if stage == "early" else args.late_rows, seeds=args.seeds, **more, **of_reference,
            gradient_steps=found["gradient_steps"], cpu_seconds=found["cpu_seconds"],
            reference_cpu_seconds=reference["cpu_seconds"],
        ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=300, help="of the growing replay (default: %(default)s)")
    parser.add_argument("--late-rows", type=int, default=3_000, help="of the last refits (default: %(default)s)")
    parser.add_argument("--late", type=int, default=2, help="how many these are (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="members of the pack (default: %(default)s)")
    args = parser.parse_args(argv)
    configure_cpu(1)
    command = f"python -m benchmarks.{BENCHMARK} --rows {args.rows} --late-rows {args.late_rows} --late {args.late}"
    args.action_dim = int(np.prod(make_env(ENVIRONMENT).action_space.shape or ()))
    rows = [collected(args.late_rows, seed) for seed in range(args.seeds)]
    test = collected(TEST_ROWS, 1_000)
    with torch.inference_mode():
        reference: dict[str, Any] = {}
        for i, (case, changes) in enumerate(CASES.items(), start=1):
            print(f"[{i}/{len(CASES)}] {case}", file=sys.stderr, flush=True)
            found = course(changes, rows, test, args)
            reference = reference or found
            lines_of(case, found, reference, args, f"{command} --seeds {args.seeds}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
