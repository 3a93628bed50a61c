"""Population-based training (`study.pbt`) beside constants at the same number of updates: EDAC on Pendulum-v1, eta and
the actor's learning rate, a population of `--population`.

For every seed two studies are trained: a population, and the same trials, with the hyperparameters that the population
begins with, to their ends without being replaced. The best trial of each is then trained again with `--fresh` other
seeds, a population's by its schedule.

`value` is the mean score of the population's best (`schedule/...`), `reference` that of the best constants, each as the
fresh seeds' mean; `searched` and `searched_reference` are their scores in the studies themselves. Last comes the mean
over seeds with the 95 % interval of the differences (Student's t).
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import print_line, record
from benchmarks.studies import shown_command
from orchestrator.config import load_config
from orchestrator.launch import start
from sweeps.pbt import replayed_params
from sweeps.statistics import paired_difference
from sweeps.study import Study

BENCHMARK = "pbt"
EPOCH = 250  # updates
SPACE: dict[str, Any] = {
    "method.eta": {"type": "float", "low": 0.01, "high": 10.0, "log": True},
    "method.actor_lr": {"type": "float", "low": 1e-5, "high": 3e-3, "log": True},
}
SETTINGS: dict[str, Any] = {
    "method": {
        "name": "edac", "hidden": [64, 64], "num_critics": 4, "batch_size": 64, "updates_per_epoch": EPOCH,
    },
    "dataset": "embedded/pendulum-medium-snapshots-v0",
    "evaluation": {"episodes": 10, "diagnostics": False},
    "compute": {"num_learners": 0, "device": "cpu"},
}  # fmt: skip


def trained(args: argparse.Namespace, name: str, seed: int, **study: Any) -> Study:
    """A study of this benchmark, trained to its end."""
    apart = args.turn_updates if "pbt" in study else args.updates  # constants need no score on the way
    given = {
        "workdir": str(args.workdir), "seed": seed, "method": {"num_updates": args.updates},
        "evaluation": {"every_epochs": apart // EPOCH}, "study": {"name": f"{args.name}-{name}", **study},
    }  # fmt: skip
    config = load_config([SETTINGS, given], [
        f"num_seeds={args.fresh if 'trials' in study else 1}", f"compute.runs_per_pack={args.population}",
    ])  # fmt: skip
    return start(config, Console(file=io.StringIO())).study


def best_and_fresh(args: argparse.Namespace, name: str, seed: int, **study: Any) -> tuple[float, float]:
    """The best value of a study, and the mean of fresh seeds of what gave it."""
    found = trained(
        args, name, seed, space=SPACE, num_trials=args.population, sampler={"name": "qmc", "seed": seed},
        pruner={"name": "none"}, **study,
    )  # fmt: skip
    best = found.best
    if best is None or best.value is None:
        raise ValueError(f"no trial of {name} has ended")
    again = trained(args, f"{name}-again", 1000 + 100 * seed, trials=[replayed_params(best)]).best
    if again is None or again.value is None:
        raise ValueError(f"the best of {name} cannot be trained again")
    return best.value, again.value


def main() -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of the whole (default: %(default)s)")
    parser.add_argument("--fresh", type=int, default=4, help="further seeds of each best trial (default: %(default)s)")
    parser.add_argument("--population", type=int, default=8, help="members (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=2_000, help="of every run (default: %(default)s)")
    parser.add_argument("--turn-updates", type=int, default=250, help="between two turns (default: %(default)s)")
    workdir = Path(os.environ.get("OFFSWEEP_WORKDIR", "offsweep-work"))
    parser.add_argument("--workdir", type=Path, default=workdir, help="work folder (default: %(default)s)")
    parser.add_argument("--name", default=f"pbt-{time.strftime('%Y%m%d-%H%M%S')}", help="of the studies")
    args = parser.parse_args()
    command, rows = shown_command(BENCHMARK, sys.argv[1:]), []
    common = {"population": args.population, "updates": args.updates, "turn_updates": args.turn_updates}
    reference_is = "the best of as many constants, trained for as many updates"
    for seed in range(args.seeds):
        searched, fresh = best_and_fresh(args, f"population-{seed}", seed, pbt={})
        searched_constants, fresh_constants = best_and_fresh(args, f"constants-{seed}", seed)
        rows.append((fresh, fresh_constants))
        print_line(record(
            BENCHMARK, f"schedule/seed {seed}", fresh, "score", fresh_constants, 1, command, reference_is=reference_is,
            fresh_seeds=args.fresh, searched=searched, searched_reference=searched_constants, seed=seed, **common,
        ))  # fmt: skip
    populations, constants = zip(*rows, strict=True)
    difference = paired_difference(populations, constants)
    print_line(record(
        BENCHMARK, "schedule/all seeds", statistics.mean(populations), "score", statistics.mean(constants), 1, command,
        reference_is=reference_is, difference=difference.mean, difference_interval=difference.student, **common,
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
