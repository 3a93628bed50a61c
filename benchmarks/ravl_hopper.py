"""RAVL, its base method and MOPO on Hopper, trained by `offsweep train`: scores and value estimates.

The paper's claim in small: without RAVL's many critics, values of the edge-of-reach states, from which no rollout ever
starts, grow without bound (`max_mean_q`) and the policy fails; with them they do not. The three methods learn from the
same dataset and roll out in the same dynamics ensemble:

    ravl   10 critics, eta = 1
    base   the same program with 2 critics and eta = 0
    mopo   2 critics and a penalty on the reward

Each is trained on a pack of seeds and evaluated every 5,000 updates. Networks, number of updates and dataset are far
from the paper's and stand in every line: these are no results to put beside the paper's tables.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.method import load_method
from benchmarks.common import ROOT, print_line, record
from envs.dataset import Dataset
from envs.errors import UserError
from envs.registry import load_dataset
from orchestrator.artifacts import stage_key
from orchestrator.config import Config, load_config, to_dict
from orchestrator.learner import flatten
from orchestrator.spool import read_records

BENCHMARK = "ravl_hopper"
METHODS = {
    "base": ("method=ravl", "method.num_critics=2", "method.eta=0"),
    "ravl": ("method=ravl", "method.num_critics=10", "method.eta=1"),
    "mopo": ("method=mopo",),
}
EVALUATE_EVERY = 5_000  # updates
EPOCH = 1_000  # updates


def overrides(method: str, args: argparse.Namespace) -> list[str]:
    """The words behind `offsweep train` for a method; what is not named keeps the method's settings for the dataset."""
    epoch = math.gcd(args.updates, EPOCH)
    return [
        *METHODS[method], f"dataset={args.dataset}", f"seed={args.seed}", f"num_seeds={args.seeds}",
        f"method.num_updates={args.updates}", f"method.updates_per_epoch={epoch}",
        f"method.hidden=[{','.join(map(str, args.hidden))}]", *dynamics_overrides(args),
        f"evaluation.every_epochs={max(1, EVALUATE_EVERY // epoch)}", f"evaluation.episodes={args.episodes}",
        "compute.num_learners=0", f"compute.threads={args.threads}",
    ]  # fmt: skip


def dynamics_overrides(args: argparse.Namespace) -> list[str]:
    """RAVL's settings of the dynamics ensemble, spelled out: the others would otherwise train one of their own."""
    config = load_config([], ["method=ravl", f"dataset={args.dataset}"]).method.dynamics
    if args.dynamics_epochs is not None:
        config.max_epochs = args.dynamics_epochs
    return [f"method.dynamics.{key}={value}" for key, value in flatten(asdict(config)).items()]


def ensemble_key(config: Config, dataset: Dataset) -> str:
    """The content key of the dynamics ensemble of a configuration."""
    stage = load_method(config.method_name).stages(config.method)["dynamics"]
    return stage_key(stage, dataset.content_hash)


def train(method: str, config: Config, words: Sequence[str], args: argparse.Namespace) -> Path:
    """Run `offsweep train`, or `offsweep resume` if it was begun under that name, in a process of its own.

    Returns:
        The study's folder.
    """
    study = f"bench-{method}-{args.name}"
    folder: Path = args.workdir / "studies" / study
    command = [sys.executable, "-m", "orchestrator"]
    if (folder / "config.yaml").exists():
        begun = to_dict(load_config([folder / "config.yaml"], []))
        wanted = to_dict(config)
        if any(begun[k] != wanted[k] for k in ("method", "dataset", "seed", "num_seeds", "evaluation")):
            raise UserError(f"the study {study} was begun with other settings; give another --name")
        command += ["resume", study, "--workdir", str(args.workdir)]
    else:
        command += ["train", "--workdir", str(args.workdir), f"study.name={study}", *words]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    print(f"{BENCHMARK}: training {method}", file=sys.stderr, flush=True)
    # what the program shows goes to standard error: standard output is for lines of results
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise UserError(f"training {method} ended with exit code {done.returncode}")
    return folder


def run_summary(spool: Path) -> dict[str, Any]:
    """What a run's spool says of it.

    Returns:
        environment, outcome (finished, diverged); updates done; wall_s that its pack was being trained and evaluated
        (without the dynamics ensemble and without the time between a kill and a resume); scores by update and
        normalized_score, the last; of train/q_mean (the critics' mean value, over minibatches and critics, of every
        epoch) mean_q, the last, and max_mean_q over the training.
    """
    scores: dict[int, float] = {}
    mean_qs: dict[int, float] = {}
    tags: dict[str, str] = {}
    wall_ms, previous = 0, 0
    for line, _ in read_records(spool):
        if line is None:
            continue
        if line["type"] != "start":
            wall_ms += line["time"] - previous
        previous = line["time"]
        if line["type"] == "metrics":
            values = line["values"]
            if "eval/score" in values:
                scores[line["step"]] = float(values["eval/score"])
            if "train/q_mean" in values:
                mean_qs[line["step"]] = float(values["train/q_mean"])
        tags |= line.get("tags", {})
    finite = [q for q in mean_qs.values() if math.isfinite(q)]
    return {
        "environment": tags["environment"],
        "score_reference": tags["score_reference"],
        "outcome": tags.get("outcome", "unfinished"),
        "updates": max(mean_qs, default=0),
        "normalized_score": scores[max(scores)] if scores and tags.get("outcome") == "finished" else None,
        "scores": {str(step): score for step, score in sorted(scores.items())},
        "mean_q": mean_qs[max(mean_qs)] if mean_qs else None,
        "max_mean_q": max(finite, default=None),
        "wall_s": wall_ms / 1000,
    }


def lines_of(method: str, folder: Path, config: Config, dataset: Dataset, command: str) -> Iterator[dict[str, Any]]:
    """One line per seed of a trained study."""
    m = config.method
    behaviour = dataset.summary().get("score")
    for seed in config.seeds:
        run = run_summary(folder / "spool" / f"t0000-s{seed}.jsonl")
        score = run["normalized_score"]
        yield record(
            BENCHMARK, f"{method}/s{seed}", score, f"D4RL-normalised score in {run['environment']}", behaviour,
            config.compute.threads, command, reference_is="mean score of the dataset's episodes", method=method,
            seed=seed, **run, updates_planned=m.num_updates, seeds_in_pack=config.num_seeds,
            episodes=config.evaluation.episodes, num_critics=m.num_critics, eta=m.eta,
            penalty_coef=getattr(m, "penalty_coef", None), hidden=m.hidden, batch=m.batch_size,
            rollout_length=m.rollout_length, rollout_batch=m.rollout_batch, dataset=dataset.name,
            dataset_hash=dataset.content_hash[:16], dynamics_ensemble=ensemble_key(config, dataset),
        )  # fmt: skip


def mean_line(method: str, lines: Sequence[dict[str, Any]], base: float | None, command: str) -> dict[str, Any]:
    """A method's mean over its seeds, beside the base method's; no value where a seed has none."""
    scores = [line["normalized_score"] for line in lines]
    whole = None not in scores
    qs = [line["mean_q"] for line in lines if line["mean_q"] is not None]
    return record(
        BENCHMARK, f"{method}/mean", statistics.fmean(scores) if whole else None, lines[0]["unit"], base,
        lines[0]["threads"], command, reference_is="the base method's mean over its seeds", method=method,
        seeds=[line["seed"] for line in lines], updates=min(line["updates"] for line in lines),
        std=statistics.stdev(scores) if whole and len(scores) > 1 else None, normalized_scores=scores,
        mean_q=statistics.fmean(qs) if qs else None,
        max_mean_q=max((line["max_mean_q"] for line in lines if line["max_mean_q"] is not None), default=None),
        hidden=lines[0]["hidden"], wall_s=max(line["wall_s"] for line in lines), environment=lines[0]["environment"],
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--updates", type=int, default=20_000, help="of every run (default: %(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="actor's and critics' hidden widths")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, one pack (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--episodes", type=int, default=10, help="of an evaluation (default: %(default)s)")
    parser.add_argument("--dataset", default="embedded/hopper-medium-snapshots-v0")
    parser.add_argument("--dynamics-epochs", type=int, help="most for the ensemble (default: until it stops)")
    parser.add_argument("--at-once", type=int, default=1, help="methods trained at a time (default: %(default)s)")
    parser.add_argument("--name", default=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                        help="of the studies; with the name of an earlier call its studies are resumed")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each method (default: %(default)s)")
    workdir = Path(os.environ.get("OFFSWEEP_WORKDIR", "offsweep-work"))
    parser.add_argument("--workdir", type=Path, default=workdir, help="work folder (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    # where it was run and under which name is of no use to others
    private = ("--workdir", "--name")
    shown = [w for w, before in zip(words, ["", *words], strict=False)
             if w.partition("=")[0] not in private and before not in private]  # fmt: skip
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *map(shlex.quote, shown)])
    args.workdir = args.workdir.absolute()
    try:
        return run_all(args, command)
    except UserError as error:
        print(f"{BENCHMARK}: {error}", file=sys.stderr)
        return 2


def run_all(args: argparse.Namespace, command: str) -> int:
    dataset = load_dataset(args.dataset, args.workdir)
    chosen = {method: overrides(method, args) for method in METHODS if method in args.methods}  # base comes first
    configs = {method: load_config([], given) for method, given in chosen.items()}
    if len({ensemble_key(config, dataset) for config in configs.values()}) != 1:
        raise UserError("the methods would not share one dynamics ensemble; their dynamics settings differ")
    base: float | None = None
    with ThreadPoolExecutor(max(1, args.at_once)) as pool:
        # the ensemble is built once: the store lets a second process wait for it
        trained = {method: pool.submit(train, method, configs[method], given, args) for method, given in chosen.items()}
        for method, future in trained.items():
            lines = list(lines_of(method, future.result(), configs[method], dataset, command))
            for line in lines:
                print_line(line)
            mean = mean_line(method, lines, base, command)
            if method == "base":
                base = mean["value"]
            print_line(mean)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
