"""What a trial costs in each place where a study can be kept: ms from `ask` to `tell`.

A trial has 6 parameters, 5 reports and an attribute, and is drawn at random, so that no sampler's time is counted. The
reference is the journal in the study's folder. All places take turns, a few trials at a time, and each number is the
median over turns. `cpu_ms` is of the driver's process, without that of a server. PostgreSQL waits for the disk (fsync),
as do the journal and SQLite; the gRPC server is Optuna's over Optuna's own journal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import print_line, record
from benchmarks.storage_servers import PASSWORD, grpc_server, postgres_programs, postgres_server
from sweeps.spec import SamplerSpec, StudySpec
from sweeps.storage import PASSWORD as PASSWORD_VARIABLE
from sweeps.study import Study

BENCHMARK = "storage"
SPACE = {f"method.x{i}": {"type": "float", "low": 0.0, "high": 1.0} for i in range(6)}


def run_trials(study: Study, number: int) -> tuple[float, float]:
    """Wall and CPU ms per trial."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        ticket = study.ask()
        assert ticket is not None
        for step in range(1, 6):
            study.report(ticket.number, step, 0.5)
        study.set_attr(ticket.number, "run_values", {"t0000-s0": 0.5})
        study.tell(ticket.number, 0.5)
    return 1e3 * (time.perf_counter() - wall) / number, 1e3 * (time.process_time() - cpu) / number


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="of each place (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=5, help="in a turn (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.turns, args.trials) < 1:
        parser.error("turns and trials must be at least 1")
    command = f"python -m benchmarks.{BENCHMARK} --turns {args.turns} --trials {args.trials}"
    os.environ[PASSWORD_VARIABLE] = PASSWORD
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = {"journal": None, "sqlite": f"sqlite:///{folder}/studies.db"}
        places["grpc"] = stack.enter_context(grpc_server(folder))
        if postgres_programs() is None:
            print("no PostgreSQL server is installed: left out", file=sys.stderr)
        else:
            places["postgresql"] = stack.enter_context(postgres_server(durable=True)).create("studies")
        total = (args.turns + 1) * args.trials
        studies = {
            place: stack.enter_context(
                Study.create(
                    folder / place, StudySpec("timed", SPACE, SamplerSpec("random"), num_trials=total, storage=url)
                )
            )
            for place, url in places.items()
        }
        for study in studies.values():  # caches and connections
            run_trials(study, args.trials)
        turns = [{place: run_trials(study, args.trials) for place, study in studies.items()} for _ in range(args.turns)]
    wall = {place: statistics.median(turn[place][0] for turn in turns) for place in places}
    cpu = {place: statistics.median(turn[place][1] for turn in turns) for place in places}
    for place in places:
        print_line(
            record(
                BENCHMARK, place, wall[place], "ms/trial", wall["journal"], 1, command, cpu_ms=cpu[place], trials=total
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
