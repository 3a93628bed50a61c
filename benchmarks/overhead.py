"""What Ray, tracking, evaluation and checkpoints cost a pack beside the bare learner loop, and what logging costs.

Each turn trains the same pack twice with the same settings: as `offsweep train` does, with a learner and an evaluator
in Ray, a tracker that sends to an MLflow store, evaluations and checkpoints; and bare, in a process that does nothing
but the method's rollouts and updates. Both are counted from the end of their first epoch to that of the pack, so that
starting processes, loading libraries and opening the store belong to neither. Lines:

    wall          `value` is the pack's wall time in seconds, `reference` the bare loop's, of the turn with the median
                  ratio; `ratios` has all
    processor     the same in processor seconds of the learner's process, its start included in both
    logging       processor seconds of writing what the pack logged and of sending it, `reference` the learner's
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import ROOT, print_line, record
from orchestrator import launch
from orchestrator.config import Config, load_config, to_dict
from orchestrator.connection import connected
from orchestrator.packing import COSTS_FILE, pack_costs
from orchestrator.spool import read_records
from orchestrator.tracking import Tracker, ensure_store

BENCHMARK = "overhead"
WORDS = "--words-in-json"  # of the process that trains bare


class TimedTracker(Tracker):
    """A tracker that says what it took."""

    seconds = 0.0  # of the processor

    def run_loop(self, *args: Any, **kwargs: Any) -> None:
        began = time.thread_time()
        super().run_loop(*args, **kwargs)
        TimedTracker.seconds += time.thread_time() - began

    def drain(self, timeout_s: float = 60.0) -> bool:
        began = time.thread_time()
        done = super().drain(timeout_s)
        TimedTracker.seconds += time.thread_time() - began
        return done


def configured(args: argparse.Namespace, workdir: Path, name: str) -> Config:
    method = {"name": args.method, "num_updates": args.updates, "updates_per_epoch": args.updates_per_epoch}
    if args.hidden:
        method["hidden"] = args.hidden
    return load_config(
        [{
            "method": method, "dataset": args.dataset, "num_seeds": args.seeds, "workdir": str(workdir),
            "study": {"name": name},
            "evaluation": {"every_epochs": args.every_epochs, "episodes": args.episodes},
            "compute": {
                "num_learners": 1, "num_evaluators": 1, "runs_per_pack": args.seeds, "device": "cpu",
                "checkpoint_minutes": args.checkpoint_minutes,
            },
        }], [],
    )  # fmt: skip


def train(config: Config) -> dict[str, float]:
    """Train the pack as a study does; wall and processor seconds of it and of its logging."""
    TimedTracker.seconds = 0.0
    outcome = launch.start(config, Console(file=io.StringIO()))
    folder = outcome.study.folder
    spools = sorted((folder / "spool").glob("t*.jsonl"))
    began, ended = [], []
    for path in spools:
        lines = [line for line, _ in read_records(path) if line is not None]
        began.append(next(line["time"] for line in lines if "time/update_seconds" in line.get("values", {})))
        ended.append(next(line["time"] for line in lines if line["type"] == "end"))
    (cost,) = pack_costs(folder / COSTS_FILE)
    return {
        "wall": (max(ended) - min(began)) / 1000, "cpu": cost["actual_cpu_seconds"], "sending": TimedTracker.seconds,
        "writing": writing_again(spools, Path(config.workdir) / "again"),
    }  # fmt: skip


def writing_again(spools: Sequence[Path], folder: Path) -> float:
    """Processor seconds of logging the same metrics once more."""
    from orchestrator.spool import RunSpool

    seconds = 0.0
    for path in spools:
        lines = [line for line, _ in read_records(path) if line is not None and line["type"] == "metrics"]
        values = [{k: float(v) for k, v in line["values"].items()} for line in lines]
        spool = RunSpool(folder, path.stem)
        began = time.process_time()
        for line, numbers in zip(lines, values, strict=True):
            spool.metrics(line["step"], numbers)
        seconds += time.process_time() - began
        spool.close()
    shutil.rmtree(folder)
    return seconds


def train_bare(config: Config) -> dict[str, float]:
    """The method's rollouts and updates alone, in this process."""
    import torch

    from agents.cpu import configure_cpu
    from agents.method import load_method
    from envs.registry import load_dataset
    from orchestrator.artifacts import ArtifactStore, stage_key
    from orchestrator.config import run_config
    from orchestrator.learner import training_data
    from orchestrator.workers import run_job

    configure_cpu(1)
    dataset = load_dataset(config.dataset, Path(config.workdir))
    device = torch.device("cpu")
    began_cpu = time.process_time()
    configs = [run_config(config, {}, seed) for seed in config.seeds]
    cls, store = load_method(config.method_name), ArtifactStore(Path(config.workdir) / "artifacts")
    artifacts = {
        name: store.load(stage.kind, stage_key(stage, dataset.content_hash))
        for name, stage in cls.stages(config.method).items()
    }
    method = cls([c.method for c in configs], config.seeds, training_data(dataset, device), artifacts, device)
    began = time.perf_counter()
    for epoch in range(config.method.num_epochs):
        method.add_rollouts([run_job(job, method.rollout_model) for job in method.rollout_jobs(epoch)])
        method.train_epoch(epoch)
        if epoch == 0:
            began = time.perf_counter()
    return {"wall": time.perf_counter() - began, "cpu": time.process_time() - began_cpu}


def train_bare_apart(config: Config) -> dict[str, float]:
    """The same in a fresh process, with the environment that Ray's workers have."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", f"benchmarks.{BENCHMARK}", WORDS, json.dumps(to_dict(config))]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [WORDS]:
        print(json.dumps(train_bare(load_config([json.loads(words[1])], []))))
        return 0
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--method", default="td3_bc", help="one without pools made ahead (default: %(default)s)")
    parser.add_argument("--dataset", default="embedded/pendulum-medium-snapshots-v0")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="widths (default: 256 256)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of the pack (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=20_000, help="of each run (default: %(default)s)")
    parser.add_argument("--updates-per-epoch", type=int, default=1000)
    parser.add_argument("--every-epochs", type=int, default=5, help="between evaluations (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=10, help="of an evaluation (default: %(default)s)")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0, help="besides the one at the end")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--store", help="MLflow store (default: an SQLite file)")
    args = parser.parse_args(words)
    command = " ".join(["python -m", f"benchmarks.{BENCHMARK}", *words])
    launch.Tracker = TimedTracker  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="overhead-") as name, connected(None, 3):
        workdir = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = args.store or f"sqlite:///{workdir / 'mlflow.db'}"
        if args.store is None:
            ensure_store(os.environ["MLFLOW_TRACKING_URI"])
        importlib.import_module("mlflow.entities")  # its loading is not the sending's

        turns = []
        for turn in range(args.turns):
            print(f"{BENCHMARK}: turn {turn + 1} of {args.turns}", file=sys.stderr, flush=True)
            config = configured(args, workdir, f"turn-{turn}")
            full = train(config)  # first: it builds what stages the method has
            turns.append((full, train_bare_apart(config)))
    print_lines(turns, args, command)
    return 0


def print_lines(
    turns: Sequence[tuple[dict[str, float], dict[str, float]]], args: argparse.Namespace, command: str
) -> None:
    settings = {
        "method": args.method, "dataset": args.dataset, "hidden": args.hidden, "seeds": args.seeds,
        "updates": args.updates, "evaluations": args.updates // args.updates_per_epoch // args.every_epochs,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    for case, name in (("wall", "wall"), ("processor", "cpu")):
        pairs = sorted(((full[name], bare[name]) for full, bare in turns), key=lambda pair: pair[0] / pair[1])
        value, reference = pairs[len(pairs) // 2]
        print_line(record(
            BENCHMARK, case, value, "seconds", reference, 1, command, reference_is="the bare learner loop",
            ratios=[full / bare for full, bare in pairs], **settings,
        ))  # fmt: skip
    writing, sending, cpu = (statistics.median(full[k] for full, _ in turns) for k in ("writing", "sending", "cpu"))
    print_line(record(
        BENCHMARK, "logging", writing + sending, "processor seconds", cpu, 1, command,
        reference_is="the learner's process", writing=writing, sending=sending, **settings,
    ))  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
