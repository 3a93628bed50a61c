"""How well offline metrics rank policies: snapshots of a run, from its first network to its last, by each metric of
`study.objective` and by episodes.

`value` is Spearman's rank correlation with the true mean returns, `reference` what a perfect metric has, 1. Each line
tells all values, the true returns, regret@1 and the CPU-seconds of a policy's evaluation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from agents.actors import actor_from_arrays
from agents.cpu import configure_cpu
from agents.dynamics import DynamicsConfig, train_ensemble
from agents.fqe import FQESettings, fitted_q_evaluation
from agents.method import load_method
from agents.model_return import model_return
from agents.policies import in_environment
from benchmarks.common import print_line, record
from envs.registry import load_dataset
from orchestrator.config import load_config
from orchestrator.learner import action_bounds, training_data
from orchestrator.workers import evaluate
from sweeps.selection import rank_correlation, regret_at

BENCHMARK = "offline_metrics"
SNAPSHOTS = (0, 1, 2, 3, 5, 8, 13, 20)  # epochs of 20
EPISODES = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="embedded/pendulum-medium-v0")
    parser.add_argument("--method", default="td3_bc")
    parser.add_argument("--updates", type=int, default=10_000, help="of the run")
    parser.add_argument("--fqe-updates", type=int, nargs="+", default=[1_000, 2_000])
    parser.add_argument("--horizon", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--workdir", type=Path, default=Path("offsweep-work"))
    args = parser.parse_args(arguments)
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *(arguments or sys.argv[1:])])
    configure_cpu(1)
    words = [f"method={args.method}", f"dataset={args.dataset}", f"method.num_updates={args.updates}"]
    config = load_config([], [*words, f"method.updates_per_epoch={args.updates // 20}"])
    dataset = load_dataset(args.dataset, args.workdir)
    data = training_data(dataset, torch.device("cpu"))
    bounds, scaling = action_bounds(dataset.env_id), dataset.scaling
    method = load_method(args.method)([config.method], [0], data, {}, "cpu")
    policies, true, own, own_seconds = [], [], [], 0.0
    for epoch in range(SNAPSHOTS[-1] + 1):
        if epoch in SNAPSHOTS:
            policies.append(method.policy(0))
            acting = in_environment(policies[-1], *bounds, scaling.observation_mean, scaling.observation_std)
            true.append(float(evaluate(acting, dataset.env_id, range(10_000, 10_000 + EPISODES)).mean()))
            started = time.process_time()
            own.append(float(method.initial_values()[0]))  # type: ignore[attr-defined]
            own_seconds += time.process_time() - started
        if epoch < SNAPSHOTS[-1]:
            method.train_epoch(epoch)

    def tell(metric: str, values: Sequence[float], seconds: float) -> None:
        print_line(record(
            BENCHMARK, f"{args.dataset}/{metric}", rank_correlation(values, true), "rank correlation", 1.0, 1, command,
            values=np.round(values, 1).tolist(), true_returns=np.round(true, 1).tolist(),
            regret_at_1=regret_at(1, values, true), cpu_seconds_per_policy=seconds / len(policies),
            method=args.method, updates=args.updates, episodes=EPISODES, rows=dataset.num_transitions,
        ))  # fmt: skip

    tell("initial_value", own, own_seconds)
    actor, seeds = actor_from_arrays(policies), [0] * len(policies)
    for updates in args.fqe_updates:
        started = time.process_time()
        fitted = fitted_q_evaluation(actor, data, seeds, FQESettings(config.method.gamma, updates))
        tell(f"fqe, {updates} updates", fitted.tolist(), time.process_time() - started)
    small = DynamicsConfig(
        ensemble_size=3, num_elites=3, hidden=[100, 100], weight_decay=[2.5e-5, 5e-5, 1e-4], max_epochs=15
    )
    ensemble = train_ensemble(data.observations, data.actions, data.rewards, data.next_observations, small)
    for horizon in args.horizon:
        started = time.process_time()
        returns = model_return(actor, ensemble, data, seeds, horizon)
        tell(f"model_return, {horizon} steps", returns.tolist(), time.process_time() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
