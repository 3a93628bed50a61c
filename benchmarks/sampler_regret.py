"""How good the best trial is that each sampler has found after 25, 50 and 100 trials.

Regret is the best possible value less the true value, without noise, of the trial that told the best value, noise
included: what a user who takes the best trial gets. Workers are simulated: each takes up a trial when it is done with
the last, trials take times of a lognormal distribution, and so results come in out of order, with as many trials
running as there are workers. `optuna-tpe` is Optuna's sampler as its users call it, the others are those of studies.

Rows of `--curves` that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, print_line, record
from benchmarks.made_up_objectives import MADE_UP, Objective, tabular
from envs.errors import UserError
from sweeps._optuna import optuna
from sweeps.samplers import SAMPLERS
from sweeps.space import Params, SearchSpace
from sweeps.spec import SamplerSpec, StudySpec
from sweeps.study import Study

NAME = "sampler_regret"
PLAIN = "optuna-tpe"
AT = (25, 50, 100)  # finished trials
COLUMNS = ("objective", "sampler", "workers", "seed", "trials", "regret")
DURATION_SIGMA = 0.5  # of the logarithm of a trial's duration

Ask = Callable[[], tuple[int, Params]]
Tell = Callable[[int, float], None]


@dataclass(frozen=True, order=True)
class Case:
    """One run of one sampler."""

    objective: str
    sampler: str
    workers: int
    seed: int


def regrets(case: Case, objective: Objective, at: Sequence[int] = AT) -> list[float]:
    """Regret after each of these numbers of finished trials."""
    trials = max(at) + case.workers - 1  # every worker is busy until the last one that counts has ended
    if case.sampler == PLAIN:
        plain = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=case.seed))
        distributions = SearchSpace.from_config(objective.space).distributions()

        def ask() -> tuple[int, Params]:
            trial = plain.ask(distributions)
            return trial.number, trial.params

        def tell(number: int, value: float) -> None:
            plain.tell(number, value)

        return _simulate(case, objective, at, ask, tell)
    with tempfile.TemporaryDirectory() as folder:
        spec = StudySpec("regret", objective.space, SamplerSpec(case.sampler, case.seed), num_trials=trials)
        with Study.create(folder, spec) as own:

            def ask_own() -> tuple[int, Params]:
                ticket = own.ask()
                assert ticket is not None
                return ticket.number, ticket.params

            return _simulate(case, objective, at, ask_own, own.tell)


def _simulate(case: Case, objective: Objective, at: Sequence[int], ask: Ask, tell: Tell) -> list[float]:
    under_way: list[tuple[float, int, float, float]] = []  # end, trial, told and true value

    def begin(now: float) -> None:
        number, params = ask()
        rng = np.random.default_rng([case.seed, 3, number])
        end = now + math.exp(DURATION_SIGMA * rng.standard_normal())
        heapq.heappush(under_way, (end, number, objective.told(params, rng), objective.true(params)))

    for _ in range(case.workers):
        begin(0.0)
    found: list[float] = []
    best_told, of_best = -math.inf, math.nan
    for ended in range(1, max(at) + 1):
        now, number, told, true = heapq.heappop(under_way)
        tell(number, told)
        if told > best_told:
            best_told, of_best = told, true
        if ended in at:
            found.append(objective.best - of_best)
        if ended < max(at):
            begin(now)
    return found


def read_curves(path: Path) -> dict[tuple[Case, int], float]:
    """(run, trials) -> regret of every row."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (Case(row["objective"], row["sampler"], int(row["workers"]), int(row["seed"])), int(row["trials"])): float(
                row["regret"]
            )
            for row in csv.DictReader(file)
        }


def append_curves(path: Path, case: Case, found: Iterable[float]) -> None:
    """Add the rows of a run, all of them or, if this process is killed, none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = f"{case.objective},{case.sampler},{case.workers},{case.seed}"
    lines = [f"{about},{trials},{regret:.6g}\n" for trials, regret in zip(AT, found, strict=True)]
    if not path.exists():
        lines.insert(0, ",".join(COLUMNS) + "\n")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, "".join(lines).encode())
    finally:
        os.close(descriptor)


def summary(known: dict[tuple[Case, int], float], cases: Sequence[Case], command: str) -> None:
    """Print a line for every objective, number of workers, sampler and number of trials, beside random search."""
    groups: dict[tuple[str, int, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.objective, case.workers, case.sampler), []).append(case)
    for (objective, workers, sampler), members in groups.items():
        for trials in AT:
            values = [known[case, trials] for case in members]
            random = [known.get((Case(objective, "random", workers, case.seed), trials)) for case in members]
            reference = [value for value in random if value is not None]
            error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
            print_line(record(
                NAME, f"{objective}/w{workers}/{sampler}/@{trials}", float(np.mean(values)), "regret",
                float(np.mean(reference)) if len(reference) == len(values) else None, 1, command,
                reference_is="random search with the same seeds", objective=objective, sampler=sampler, workers=workers,
                trials=trials, standard_error=error, seeds=len(values), first_seed=min(case.seed for case in members),
                regrets=values,
            ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    samplers = [*SAMPLERS, PLAIN]
    parser.add_argument("--objectives", nargs="+", default=list(MADE_UP), choices=[*MADE_UP, "tabular"])
    parser.add_argument("--samplers", nargs="+", default=samplers, choices=samplers)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 64], help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="of objectives and samplers (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="trials.csv of a finished study, for the objective tabular")
    parser.add_argument("--curves", type=Path, default=RESULTS / f"{NAME}.csv", help="(default: %(default)s)")
    args = parser.parse_args(words)
    if "tabular" in args.objectives and args.table is None:
        parser.error("the objective tabular needs --table")
    if min(args.workers) < 1 or args.seeds < 1 or args.first_seed < 0:
        parser.error("workers and seeds must be at least 1")
    command = f"python -m benchmarks.{NAME} {shlex.join(words)}".strip()
    cases = [
        Case(objective, sampler, workers, seed)
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for objective in args.objectives for workers in args.workers for sampler in args.samplers
    ]  # fmt: skip
    try:
        known = read_curves(args.curves)
        for case in cases:
            if all((case, trials) in known for trials in AT):
                continue
            objective = tabular(args.table) if case.objective == "tabular" else MADE_UP[case.objective](case.seed)
            started = time.process_time()
            found = regrets(case, objective)
            append_curves(args.curves, case, found)
            known |= {(case, trials): regret for trials, regret in zip(AT, found, strict=True)}
            took = time.process_time() - started
            shown = " ".join(f"{regret:.3g}" for regret in found)
            print(f"{case}: {shown} ({took:.1f} s of processor time)", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    summary(known, cases, command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
