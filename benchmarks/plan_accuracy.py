"""Is a study over when the plan says, and does it take the memory that the plan says?

Studies of about a minute on embedded datasets are planned in an empty folder of calibrations, and then run with
`offsweep train`'s code in fresh processes:

    ravl_small    RAVL with the small networks of embedded/pendulum-*
    ravl_n10      RAVL as published, 10 critics of 3 x 256, on embedded/hopper-medium-snapshots-v0
    mopo          MOPO with its published networks, on the same data

each with packs of 1 and of 4 and with 1 and 2 learners at once (`<case>/p<runs per pack>/l<learners>`), 4 runs in all.

A plan for a CPU counts on cores that nobody else uses, so there `value` is the processor time that a pack took (on a
GPU its time by the clock) and `reference` what was predicted for it. `wall_ratio` is the same by the clock,
`study_ratio` that of the whole study, its start left out: they also show who else wanted the cores. Each study is
planned anew, with new measurements, when it has ended: `ratio_between` is `value` over the mean of both predictions,
which tells an error of the plan from a change of the machine's speed. `memory_ratio` is the pack's measured peak over
the predicted one.
"""

from __future__ import annotations

import argparse
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

from benchmarks.common import ROOT, print_line, record, spread
from orchestrator.artifacts import DESCRIPTION
from orchestrator.packing import COSTS_FILE, PACKING_FILE, pack_costs

BENCHMARK = "plan_accuracy"
RUNS = 4
TARGET = 0.25  # relative error

_HOPPER = ["dataset=embedded/hopper-medium-snapshots-v0", "method.dynamics.max_epochs=2", "method.updates_per_epoch=50"]
CASES: dict[str, tuple[list[str], dict[int, int]]] = {
    # settings, and updates by runs per pack, so that a study takes about a minute
    "ravl_small": (
        ["method=ravl", "dataset=embedded/pendulum-medium-snapshots-v0", "method.dynamics.max_epochs=5",
         "method.updates_per_epoch=500"], {1: 6000, 4: 6000},
    ),
    "ravl_n10": (
        ["method=ravl", "method.hidden=[256,256,256]", *_HOPPER], {1: 200, 4: 200},
    ),
    "mopo": (["method=mopo", *_HOPPER], {1: 1000, 4: 1000}),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--packs", nargs="+", type=int, choices=(1, RUNS), default=[1, RUNS], help="runs per pack")
    parser.add_argument("--learners", nargs="+", type=int, default=[1, 2], help="packs trained at once")
    parser.add_argument("--workdir", type=Path, help="where data and stages are kept between runs")
    parser.add_argument("--share", type=float, default=1.0, help="of the updates, for a quick look")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *words])
    with tempfile.TemporaryDirectory() as scratch:
        workdir = (args.workdir or Path(scratch)).absolute()
        for name in args.cases:
            for runs_per_pack in args.packs:
                for learners in args.learners:
                    if learners * runs_per_pack > RUNS:
                        continue  # a slot without work
                    print_line(measure(name, runs_per_pack, learners, args.share, workdir, command))
    return 0


def measure(name: str, runs_per_pack: int, learners: int, share: float, workdir: Path, command: str) -> dict[str, Any]:
    """Plan a study and run it; one line of results."""
    settings, updates_of = CASES[name]
    every = int(next(word for word in settings if word.startswith("method.updates_per_epoch=")).partition("=")[2])
    updates = max(1, round(updates_of[runs_per_pack] * share / every)) * every
    study = f"{name}-p{runs_per_pack}-l{learners}-{time.strftime('%Y%m%d-%H%M%S')}"
    words = [
        *settings, f"method.num_updates={updates}", f"num_seeds={RUNS}", f"compute.runs_per_pack={runs_per_pack}",
        f"compute.num_learners={learners}", "evaluation.episodes=5", "evaluation.every_epochs=4",
        "compute.checkpoint_minutes=5", f"study.name={study}",
    ]  # fmt: skip
    planned = plan(workdir, words)
    stages = len(list((workdir / "artifacts").rglob(DESCRIPTION)))
    offsweep("train", "--workdir", str(workdir), *words)
    folder = workdir / "studies" / study
    [pack_after] = plan(workdir, words)["packs"]
    packs = pack_costs(folder / COSTS_FILE)
    [pack] = planned["packs"]
    on_cpu = planned["device"] == "cpu"
    took = [p["actual_cpu_seconds" if on_cpu else "actual_seconds"] for p in packs]
    wall = statistics.median(p["actual_seconds"] for p in packs)
    tags = _study_tags(folder)
    predicted = json.loads((folder / PACKING_FILE).read_text())["predicted_seconds"]
    assert planned["runs_per_pack"] == runs_per_pack
    return record(
        BENCHMARK, f"{name}/p{runs_per_pack}/l{learners}", statistics.median(took),
        "CPU-s per pack" if on_cpu else "s per pack", pack["seconds"], 1, command,
        reference_is="predicted by `offsweep plan`", packs=len(packs), runs=RUNS, updates=updates,
        within_target=abs(statistics.median(took) / pack["seconds"] - 1) <= TARGET, **spread("value", took),
        reference_after=pack_after["seconds"],
        ratio_between=statistics.median(took) / statistics.mean((pack["seconds"], pack_after["seconds"])),
        wall_seconds=wall, wall_ratio=wall / pack["seconds"], load_average=os.getloadavg()[0],
        study_seconds=float(tags["plan/actual_seconds"]), study_predicted=predicted,
        study_ratio=float(tags["plan/actual_seconds"]) / predicted, stage_was_built=stages > 0,
        memory=max(p["actual_bytes"] for p in packs), memory_predicted=pack["memory"],
        memory_ratio=max(p["actual_bytes"] for p in packs) / pack["memory"],
        calibration_seconds=planned["calibration_seconds"],
    )  # fmt: skip


def plan(workdir: Path, words: Sequence[str]) -> dict[str, Any]:
    """The plan of a study, from new measurements."""
    shutil.rmtree(workdir / "calibrations", ignore_errors=True)
    planned: dict[str, Any] = json.loads(offsweep("plan", "--json", "--workdir", str(workdir), *words))
    return planned


def offsweep(*words: str) -> str:
    """A command of offsweep in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"offsweep {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _study_tags(folder: Path) -> dict[str, str]:
    tags: dict[str, str] = {}
    for line in (folder / "spool" / "study.jsonl").read_text().splitlines():
        tags |= json.loads(line).get("tags", {})
    return tags


if __name__ == "__main__":
    raise SystemExit(main())
