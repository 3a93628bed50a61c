"""A thousand nodes and a hundred thousand runs in virtual time: what the driver takes, and where it bends first.

The driver, the study with its journal, the packing and the spool are the real ones (`benchmarks.simulation`); learners
are modelled: a pack takes a lognormal time, its evaluations follow a formula, bad trials are pruned, some runs diverge,
nodes fail and come back, the driver is killed and resumed. `value` counts the results of packs (an evaluation, an end,
a failure) that the driver handles per second of its processor time; `reference` is how many come per second of virtual
time, so that `ratio` says how many times as many there could be.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import print_line, record
from benchmarks.simulation import HOUR, Outcome, Sampled, Scenario, ideal_hours, simulate

BENCHMARK = "scheduler_simulation"
SHOWN = 8  # functions


def line(outcome: Outcome, profile: Sampled, wall: float, command: str) -> dict[str, Any]:
    """What a simulation found."""
    s, trials = outcome.scenario, outcome.scenario.trials
    total = sum(outcome.slot_seconds.values())
    before = [(0, 0.0, 0.0), *((m.runs, m.cpu_seconds, m.ask_seconds) for m in outcome.marks)]
    tenths = [
        1e3 * (cpu - cpu0) / (runs - runs0) * s.seeds for (runs0, cpu0, _), (runs, cpu, _) in itertools.pairwise(before)
    ]
    return record(
        BENCHMARK, f"{trials * s.seeds} runs/{s.nodes} nodes", outcome.results / outcome.cpu_seconds,
        "results per CPU s of the driver", outcome.results / (outcome.hours * HOUR), 1, command,
        reference_is="results that come per second of virtual time",
        trials=trials, runs=trials * s.seeds, runs_per_pack=s.runs_per_pack, nodes=s.nodes, sampler=s.sampler,
        pruner=s.pruner, evaluations=s.evaluations, median_hours=s.median_hours,
        failures_per_node_hour=s.failures_per_node_hour, away_minutes=s.away_minutes,
        ended_once=sum(count == 1 for count in outcome.ended.values()), ended_twice=sum(
            count > 1 for count in outcome.ended.values()), states=outcome.states,
        results=outcome.results, node_failures=outcome.node_failures, driver_kills=s.driver_kills,
        driver_cpu_seconds=outcome.cpu_seconds, cpu_ms_per_trial=1e3 * outcome.cpu_seconds / trials,
        ask_ms_per_trial=1e3 * outcome.ask_seconds / trials, cpu_ms_per_trial_by_tenth=tenths,
        share_of_a_core=outcome.cpu_seconds / (outcome.hours * HOUR), resume_cpu_seconds=outcome.resume_seconds,
        hours=outcome.hours, ideal_hours=ideal_hours(outcome),
        slot_time={kind: seconds / total for kind, seconds in outcome.slot_seconds.items()},
        journal_writes_per_trial=outcome.journal_writes / trials,
        bytes_per_trial={kind: count / trials for kind, count in outcome.bytes.items()}, files=outcome.files,
        resident_mb={m.runs: m.resident_bytes / 1e6 for m in outcome.marks},
        open_files=max((m.open_files for m in outcome.marks), default=None),
        hottest={name: count / profile.samples for name, count in profile.self_counts.most_common(SHOWN)},
        hottest_with_callees={name: count / profile.samples for name, count in profile.counts.most_common(2 * SHOWN)},
        wall_seconds=wall, load_average=os.getloadavg()[0],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--runs", nargs="+", type=int, default=[1_000, 10_000, 100_000], help="(default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1_000, help="of one slot each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="runs of a trial, one pack (default: %(default)s)")
    parser.add_argument("--sampler", default="random", choices=["random", "tpe", "qmc"])
    parser.add_argument("--pruner", default="median")
    parser.add_argument("--failures", type=float, default=0.05, help="of a node, per hour (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=2, help="of the driver (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for the study's files; default: the system's for temporary files")
    args = parser.parse_args(words)
    if min(*args.runs, args.nodes, args.seeds) < 1 or args.failures < 0 or args.kills < 0:
        parser.error("runs, nodes and seeds must be at least 1, failures and kills at least 0")
    private = {"--folder", str(args.folder)}
    command = f"python -m benchmarks.{BENCHMARK} {shlex.join(w for w in words if w not in private)}".strip()
    for runs in args.runs:
        trials = -(-runs // args.seeds)
        hours = max(1.0, 0.5 * trials / args.nodes)  # some of the kills come while packs are being trained
        scenario = Scenario(
            trials, args.nodes, args.seeds, args.seeds, sampler=args.sampler, pruner=args.pruner,
            failures_per_node_hour=args.failures, driver_kills=args.kills, kills_within_hours=hours,
        )  # fmt: skip
        print(f"{BENCHMARK}: {runs} runs on {args.nodes} nodes", file=sys.stderr, flush=True)
        profile, started = Sampled(), time.monotonic()
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            marks = [trials * args.seeds * tenth // 10 for tenth in range(1, 11)]
            outcome = simulate(scenario, Path(folder), marks, profile=profile)
        print_line(line(outcome, profile, time.monotonic() - started, command))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
