"""What a suggestion costs: processor time of `Study.ask`, sampler and journal together.

A study of the space of the objective `mbrl` with so many finished trials and seven running ones is asked, told how a
running trial ended, and asked again, some times over. `first` is a suggestion after new results, `next` one that
follows it without any. The samplers take turns. The rest of what a driver does for a trial is measured beside it:
reports, attributes, the end, and reading all trials.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.common import print_line, record
from benchmarks.made_up_objectives import mbrl
from sweeps.samplers import SAMPLERS, make_sampler
from sweeps.spec import SamplerSpec, StudySpec
from sweeps.study import Study

NAME = "sampler_latency"
RUNNING = 7
AT_MOST = {"gp": 200, "gp-mixed": 200}  # trials


def filled(folder: str, sampler: str, trials: int, calls: int) -> Study:
    """A study with so many finished random trials and `RUNNING` running ones."""
    objective, rng = mbrl(0), np.random.default_rng(0)
    spec = StudySpec("latency", objective.space, SamplerSpec(sampler), num_trials=trials + RUNNING + 2 * calls)
    study = Study.create(folder, spec)
    # one write for all: this is the history that the measurement begins with
    with study._group():
        for number in range(trials + RUNNING):
            study._study.sampler = make_sampler("random", 0, number, study._distributions)
            params = study._study.ask(study._distributions).params
            if number < trials:
                study._study.tell(number, objective.told(params, rng))
    return study


def measure(study: Study, trials: int, calls: int, times: dict[str, list[float]]) -> None:
    """Append the processor time of everything, in seconds, by name."""

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = call()
        times.setdefault(name, []).append(time.process_time() - started)
        return result

    for i in range(calls):
        number = trials + i
        timed("report", partial(study.report, number, 1, 10.0))
        timed("set_attr", partial(study.set_attr, number, "run_values", {"s0": 10.0}))
        timed("tell", partial(study.tell, number, 10.0))
        timed("trials", study.trials)
        timed("first", study.ask)
        timed("next", study.ask)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--trials", nargs="+", type=int, default=[50, 200, 1000], help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=5, help="of each kind (default: %(default)s)")
    args = parser.parse_args(words)
    if min(args.trials) < RUNNING or not 1 <= args.calls <= RUNNING:
        parser.error(f"trials must be at least {RUNNING} and calls from 1 to {RUNNING}")
    command = f"python -m benchmarks.{NAME} {shlex.join(words)}".strip()
    cases = [(s, n) for n in args.trials for s in args.samplers if n <= AT_MOST.get(s, n)]
    times: dict[tuple[str, int], dict[str, list[float]]] = {case: {} for case in cases}
    for turn in range(2):  # the first turn's beginning imports and compiles, and is not kept
        for sampler, trials in cases:
            with tempfile.TemporaryDirectory() as folder, filled(folder, sampler, trials, args.calls) as study:
                kept = times[sampler, trials] if turn else {}
                measure(study, trials, args.calls if turn else 1, kept)
    for sampler, trials in cases:
        for name, seconds in times[sampler, trials].items():
            reference = times.get(("random", trials), {}).get(name)
            print_line(record(
                NAME, f"{sampler}/{trials}/{name}", statistics.median(seconds), "CPU s",
                statistics.median(reference) if reference else None, 1, command,
                reference_is="the sampler random", sampler=sampler, trials=trials, what=name, least=min(seconds),
                most=max(seconds), calls=len(seconds),
            ))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
