"""MOPO and MOBILE beside OfflineRL-Kit's own code: scores after the same short training on the same data.

Both sides learn from the same 100,000 rows with the same settings: OfflineRL-Kit's (agents/mopo.yaml,
agents/mobile.yaml) for the D4RL set whose place an embedded one takes, but with small networks, few updates and higher
learning rates, so that something is learned in them. Each has one ensemble of its own for a dataset, at most 15 epochs,
shared by its methods and seeds; the policies of both are scored by this project's evaluator, 10 deterministic episodes.

The scores of OfflineRL-Kit's code lie in offlinerlkit_scores.json, where they were measured once; ours are trained
anew, by `offsweep train`, the seeds of a method in one pack. Three seeds of runs that are this short tell a slip in an
update from none, and no more: nothing here belongs beside a paper's table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import print_line, record
from benchmarks.studies import run_summary, study_main, train
from envs.registry import load_dataset
from orchestrator.config import load_config

BENCHMARK = "offlinerlkit_scores"
THEIRS = Path(__file__).parent / "offlinerlkit_scores.json"
UPDATES = {"mopo": 10_000, "mobile": 5_000}
ROWS = "subsample=100000,seed=0"
COEFFICIENTS = {  # OfflineRL-Kit's for the D4RL set <robot>-medium-replay-v2
    ("hopper", "mopo"): 2.5, ("halfcheetah", "mopo"): 0.5, ("hopper", "mobile"): 0.1, ("halfcheetah", "mobile"): 0.1,
}  # fmt: skip


def dataset_name(robot: str) -> str:
    return f"embedded/{robot}-medium-snapshots-v0,{ROWS}"


def overrides(robot: str, method: str, args: argparse.Namespace) -> list[str]:
    """The words behind `offsweep train`; what is not named keeps the method's settings for the dataset."""
    return [
        f"method={method}", f"dataset={dataset_name(robot)}", "seed=0", f"num_seeds={args.seeds}",
        "method.hidden=[64,64]", "method.rollout_length=5", "method.rollout_batch=5000",
        f"method.penalty_coef={COEFFICIENTS[robot, method]}", f"method.num_updates={UPDATES[method]}",
        *(f"method.{name}_lr=0.001" for name in ("actor", "critic", "alpha")), "method.dynamics.max_epochs=15",
        "evaluation.every_epochs=5", "evaluation.diagnostics=false", "compute.num_learners=0",
        f"compute.runs_per_pack={args.seeds}", "compute.threads=1",
    ]  # fmt: skip


def line_of(
    robot: str, method: str, implementation: str, runs: Sequence[dict[str, Any]], reference: float | None,
    command: str, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The line of an implementation.

    Args:
        runs: of each its seed, its last score and its scores by update; a score is None where the run diverged.
        reference: the other implementation's mean, if it was trained for as many updates.
    """
    scores = [run["score"] for run in runs]
    whole = None not in scores
    return record(
        BENCHMARK, f"{robot}/{method}/{implementation}", statistics.fmean(scores) if whole else None,
        "D4RL-normalised score", reference, 1, command, dataset=dataset_name(robot), method=method,
        implementation=implementation, seeds=[run["seed"] for run in runs], scores=scores,
        mean=statistics.fmean(scores) if whole else None,
        std=statistics.stdev(scores) if whole and len(scores) > 1 else None,
        curves=[run["curve"] for run in runs], **more,
    )  # fmt: skip


def lines(robot: str, method: str, args: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    """Theirs, where it was measured, and ours."""
    words = overrides(robot, method, args)
    config = load_config([], words)
    folder = train(BENCHMARK, f"kit/{robot}/{method}", config, words, args)
    runs, environment = [], ""
    for seed in config.seeds:
        run = run_summary(folder / "spool" / f"t0000-s{seed}.jsonl")
        runs.append({"seed": seed, "score": run["normalized_score"], "curve": run["scores"]})
        environment = run["environment"]
    m = config.method
    settings = {
        "hidden": m.hidden, "rollout_length": m.rollout_length, "rollout_batch": m.rollout_batch,
        "penalty_coef": m.penalty_coef, "actor_lr": m.actor_lr, "critic_lr": m.critic_lr, "alpha_lr": m.alpha_lr,
        "actor_lr_schedule": m.actor_lr_schedule, "batch": m.batch_size, "real_ratio": m.real_ratio,
        "ensemble": f"{m.dynamics.ensemble_size}/{m.dynamics.num_elites}, {m.dynamics.max_epochs} epochs at most",
    }  # fmt: skip
    common = {
        "updates": m.num_updates, "settings": settings, "environment": environment,
        "episodes": config.evaluation.episodes,
        "dataset_hash": load_dataset(config.dataset, args.workdir).content_hash[:16],
    }  # fmt: skip
    made, reference = [], None
    content = json.loads(THEIRS.read_text())
    theirs = [r for r in content["runs"] if (r["robot"], r["method"], r["updates"]) == (robot, method, m.num_updates)]
    if theirs:
        source = f"{content['repository']} at {content['commit']}"
        made.append(line_of(
            robot, method, "OfflineRL-Kit", theirs, None, source, **common | {"machine": content["machine"]}
        ))  # fmt: skip
        reference = made[0]["mean"]
    ours = line_of(
        robot, method, "offsweep", runs, reference, command, **common, reference_is="OfflineRL-Kit's mean score"
    )
    return [*made, ours]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--robots", nargs="+", choices=["hopper", "halfcheetah"], default=["hopper", "halfcheetah"])
    parser.add_argument("--methods", nargs="+", choices=["mopo", "mobile"], default=["mopo", "mobile"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, from seed 0 (default: %(default)s)")
    parser.add_argument("--name", default=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                        help="of the studies; with the name of an earlier call its studies are resumed")  # fmt: skip
    workdir = Path(os.environ.get("OFFSWEEP_WORKDIR", "offsweep-work"))
    parser.add_argument("--workdir", type=Path, default=workdir, help="work folder (default: %(default)s)")
    parser.set_defaults(threads=1)
    return parser


def run_all(args: argparse.Namespace, command: str) -> int:
    for robot in args.robots:
        for method in args.methods:
            for line in lines(robot, method, args, command):
                print_line(line)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return study_main(BENCHMARK, build_parser(), run_all, argv)


if __name__ == "__main__":
    raise SystemExit(main())
