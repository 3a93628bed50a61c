"""What a trial costs the driver, in processor time, when so many trials have ended before it.

A simulated study (`benchmarks.simulation`: the real driver, study, journal and spool; learners that are modelled) of
random trials is run until it has so many, and then extended by `--measured` trials of each sampler. `rest` is the
driver's processor time per trial without `Study.ask`, `ask` what the sampler and the journal take for a suggestion (of
tpe nearly all of it is Optuna's model of the trials), `resume` what a resumed driver takes until it hands out its first
pack. `whole` is `rest` of all the trials before, from the first on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import print_line, record
from benchmarks.simulation import Outcome, Scenario, configuration, simulate
from sweeps.spec import SamplerSpec, StudySpec
from sweeps.study import SPEC_FILE

BENCHMARK = "driver_cost"
NODES = 8
SEEDS = 2
SAMPLERS = ("random", "tpe")


def extended(scenario: Scenario, workdir: Path) -> Outcome:
    """Go on with a study, with another sampler and more trials."""
    path = workdir / "studies" / configuration(scenario, workdir).study.name / SPEC_FILE
    replace(StudySpec.load(path), sampler=SamplerSpec(scenario.sampler)).save(path)
    return simulate(scenario, workdir, resume=True)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--trials", nargs="+", type=int, default=[100, 1_000, 10_000], help="(default: %(default)s)")
    parser.add_argument("--measured", type=int, default=64, help="trials of each sampler (default: %(default)s)")
    args = parser.parse_args(words)
    if min(*args.trials, args.measured) < 1:
        parser.error("trials and measured must be at least 1")
    command = f"python -m benchmarks.{BENCHMARK} {shlex.join(words)}".strip()
    first: dict[str, float] = {}  # what -> with the fewest trials
    for trials in args.trials:
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            print(f"{BENCHMARK}: {trials} trials", file=sys.stderr, flush=True)
            scenario = Scenario(trials, NODES, SEEDS, SEEDS, evaluations=5)
            simulate(replace(scenario, trials=4), Path(folder) / "warm-up")
            whole = simulate(scenario, Path(folder))
            found["whole"] = 1e3 * (whole.cpu_seconds - whole.ask_seconds) / trials
            for i, sampler in enumerate(SAMPLERS, start=1):
                more = replace(scenario, trials=trials + i * args.measured, sampler=sampler)
                outcome = extended(more, Path(folder))
                [resume] = outcome.resume_seconds
                rest = outcome.cpu_seconds - outcome.ask_seconds - resume
                found[f"{sampler}/rest"] = 1e3 * rest / args.measured
                found[f"{sampler}/ask"] = 1e3 * outcome.ask_seconds / args.measured
                found["resume"] = 1e3 * resume
        for what, value in found.items():
            reference = first.setdefault(what, value)
            print_line(record(
                BENCHMARK, f"{trials} trials/{what}", value, "CPU ms" + ("" if what == "resume" else " per trial"),
                reference, 1, command, reference_is=f"with {args.trials[0]} trials", trials=trials, what=what,
                seeds=SEEDS, evaluations=scenario.evaluations, slots=NODES, load_average=os.getloadavg()[0],
            ))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
