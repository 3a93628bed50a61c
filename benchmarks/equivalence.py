"""Do runs end alike alone, in a pack, and in mixed precision?

Eight seeds of a method are trained on `embedded/pendulum-medium-snapshots-v0`, each alone, all in one pack, and in one
pack with `method.precision=mixed`; on a GPU also in one pack whose updates are executed without a graph. Two lines for
each of the other ways, both against the runs alone:

    <method>/<way>/parameters   `value` is the largest difference of a policy's parameters after 50 updates, over the
                                largest parameter; `reference` the tolerance
    <method>/<way>/scores       `value` is the mean score after all updates, `reference` that of the runs alone;
                                `p_value` is of the two-sided Mann-Whitney test that both come from one distribution,
                                and `standard_error` that of the difference of the means
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from agents.cpu import configure_cpu
from agents.method import Method, load_method
from agents.policies import in_environment
from benchmarks.common import print_line, record
from envs.registry import load_dataset
from envs.scores import normalized_score, reference_scores
from orchestrator.config import Config, load_config
from orchestrator.learner import action_bounds, training_data
from orchestrator.workers import Workers

BENCHMARK = "equivalence"
DATASET = "embedded/pendulum-medium-snapshots-v0"
METHODS = ("edac", "td3_bc", "iql")
SEEDS = range(8)
EARLY = 50  # updates after which parameters are compared: later a run's own chaos hides everything
TOLERANCE = {"pack": 5e-3, "eager": 5e-3, "mixed": 0.2}
"""Of parameters, relative: rounding of batched products; of bfloat16 or TF32, 8 or 11 bits."""


class Study:
    """Runs of one method."""

    def __init__(self, method: str, updates: int, hidden: Sequence[int], device: torch.device, workdir: Path) -> None:
        words = [f"method={method}", f"dataset={DATASET}", f"method.num_updates={updates}",
                 f"method.updates_per_epoch={EARLY}", f"method.hidden=[{','.join(map(str, hidden))}]"]  # fmt: skip
        self.words, self.workdir, self.device = words, workdir, device
        self.dataset = load_dataset(DATASET, workdir)
        self.data = training_data(self.dataset, device)
        self.method = method

    def config(self, *overrides: str) -> Config:
        return load_config([{"workdir": str(self.workdir)}], [*self.words, *overrides])

    def train(self, seeds: Sequence[int], *overrides: str) -> tuple[list[np.ndarray], list[float]]:
        """Early parameters and final score of every seed, trained as one pack."""
        config = self.config(*overrides)
        learner = load_method(self.method)([config.method] * len(seeds), seeds, self.data, {}, self.device)
        early: list[np.ndarray] = []
        for epoch in range(config.method.num_epochs):
            learner.train_epoch(epoch)
            if epoch == 0:
                early = [parameters(learner, m) for m in range(len(seeds))]
        low, high = action_bounds(self.dataset.env_id)
        policies = [in_environment(learner.policy(m), low, high) for m in range(len(seeds))]
        returns = Workers().start_evaluation(policies, self.dataset.env_id, range(10_000, 10_010))()
        reference = reference_scores(self.dataset.env_id)
        assert reference is not None
        return early, [float(normalized_score(float(r.mean()), reference)) for r in returns]


def parameters(learner: Method, member: int) -> np.ndarray:
    """All weights and biases of a policy."""
    arrays = learner.policy(member)
    return np.concatenate([arrays[k].ravel() for k in sorted(arrays) if k[0] in "Wb"])


def compare(study: Study, command: str) -> None:
    alone = [study.train([seed]) for seed in SEEDS]
    early_alone, scores_alone = [early[0] for early, _ in alone], [scores[0] for _, scores in alone]
    ways = {"pack": [], "mixed": ["method.precision=mixed"]}
    if study.device.type == "cuda":
        ways["eager"] = []
    common: dict[str, Any] = {
        "device": torch.cuda.get_device_name(study.device) if study.device.type == "cuda" else "cpu",
        "dataset": DATASET, "seeds": len(SEEDS), "hidden": study.config().method.hidden,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    for way, overrides in ways.items():
        os.environ["OFFSWEEP_CUDA_GRAPHS"] = "0" if way == "eager" else "1"
        early, scores = study.train(list(SEEDS), *overrides)
        differences = [
            float(np.abs(mine - other).max() / np.abs(other).max())
            for mine, other in zip(early, early_alone, strict=True)
        ]
        case, updates = f"{study.method}/{way}", study.config().method.num_updates
        print_line(record(
            BENCHMARK, f"{case}/parameters", max(differences), "relative difference", TOLERANCE[way], 1, command,
            reference_is="tolerance", updates=EARLY, **common,
        ))  # fmt: skip
        error = (statistics.variance(scores) / len(scores) + statistics.variance(scores_alone) / len(scores)) ** 0.5
        print_line(record(
            BENCHMARK, f"{case}/scores", statistics.mean(scores), "normalised score", statistics.mean(scores_alone), 1,
            command, reference_is="the same seeds, each alone", standard_error=error,
            p_value=float(mannwhitneyu(scores, scores_alone).pvalue), scores=scores, scores_alone=scores_alone,
            updates=updates, **common,
        ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--updates", type=int, default=2000, help="of every run (default: %(default)s)")
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 128], help="widths of all networks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.updates < EARLY or args.updates % EARLY:
        parser.error(f"--updates must be a multiple of {EARLY}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; say --device cpu")
    configure_cpu(1)
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            compare(Study(method, args.updates, args.hidden, torch.device(args.device), Path(folder)), command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
