"""A whole search killed five times with SIGKILL at random moments: is it the search it would have been?

The study is one of 8 trials of up to 3 seeds on Pendulum-v1, with everything that decides by results: TPE, the median
pruner, adaptive seeds, and the confirm stage of its two best trials. Each kill hits `python -m orchestrator sweep` and
every process of its Ray; then the same command goes on with `--resume`, until it is killed again.

Cases:

    in_process  the learner in the driver's process, without Ray
    one_slot    one learner in Ray, so that results come in one order as well. For both `value` is 1 if trials, values,
                final policies (bit for bit), everything in MLflow and the confirmed best are those of the
                undisturbed study, which is trained in the driver's process
    two_slots   two learners, whose results come in any order, so that TPE may choose other points in any two studies.
                `value` is 1 if every trial has ended, every run is in MLflow once and the confirm stage is whole

`lost` and `duplicated` count trials, runs, parameters and metric points beside the undisturbed study (two_slots: runs).
The moments are drawn from `--seed`: `kills_s` seconds after training has gone on.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import print_line, record
from benchmarks.kill_tests import SETTINGS, STUDY, Remains, Sweep, compare, prepare, wait_until, workdir_from
from sweeps.confirm import FOLDER, Confirmation, confirmations

BENCHMARK = "driver_kills"
CASES = {"in_process": 0, "one_slot": 1, "two_slots": 2}  # learners in Ray
STARTS = 3  # of a sweep whose Ray does not come up in time, as on a machine with too much else to do
TOP, FRESH_SEEDS = 2, 2


def settings() -> dict[str, Any]:
    """The study of the kill tests, with all that decides."""
    made = copy.deepcopy(SETTINGS)
    made["num_seeds"] = 3
    made["method"]["num_updates"] = 400
    made["study"] |= {
        "num_trials": 8, "pruner": {"name": "median", "startup_trials": 2}, "racing": {"first_seeds": 1},
        "confirm": {"top": TOP, "num_seeds": FRESH_SEEDS},
    }  # fmt: skip
    return made


def what_is_left(workdir: Path) -> tuple[Remains, list[Confirmation], dict[str, str]]:
    """Of the search and of its confirm stage: all of MLflow, the confirmations, the fresh policies."""
    folder = workdir / "studies" / STUDY
    repeated = Remains.of(workdir, f"{STUDY}/{FOLDER}")
    return Remains.of(workdir, STUDY), confirmations(folder), repeated.policies


def spooled(workdir: Path) -> int:
    """Bytes that learners have logged."""
    return sum(path.stat().st_size for path in (workdir / "studies" / STUDY).rglob("spool/[tc]0*.jsonl"))


def wait_for_growth(workdir: Path, before: int, sweep: Sweep) -> None:
    """Until learners have logged more than before, or all is over."""
    wait_until("training", lambda: spooled(workdir) > before or sweep.process.poll() is not None)


def undisturbed(base: Path) -> tuple[Any, float]:
    """What an undisturbed study leaves, trained in the driver's process, and how many seconds it was at work."""
    with workdir_from(base) as workdir:
        sweep = Sweep(workdir, {"num_learners": 0}, settings=settings())
        wait_for_growth(workdir, 0, sweep)
        began = time.monotonic()
        sweep.finish()
        return what_is_left(workdir), time.monotonic() - began


def killed(base: Path, learners: int, kills: int, longest: float, draw: random.Random) -> tuple[Any, list[float], int]:
    """What the study leaves after so many kills, when they were, and how many of them hit its confirm stage."""
    with workdir_from(base) as workdir:
        moments, confirming = [], 0
        for number in range(kills):
            before = spooled(workdir)
            sweep = Sweep(workdir, {"num_learners": learners}, number > 0, settings())
            wait_for_growth(workdir, before, sweep)
            delay = draw.uniform(0.0, longest)
            time.sleep(delay)
            if sweep.process.poll() is not None:
                break
            confirming += (workdir / "studies" / STUDY / FOLDER).exists()
            sweep.kill()
            moments.append(delay)
        finish(workdir, learners)
        return what_is_left(workdir), moments, confirming


def finish(workdir: Path, learners: int) -> None:
    """Resume the study and wait for its end."""
    for left in reversed(range(STARTS)):
        sweep = Sweep(workdir, {"num_learners": learners}, True, settings())
        try:
            sweep.finish()
        except RuntimeError:
            if not left or "timed out during startup" not in sweep.log.read_text():
                raise
        else:
            return


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=5, help="of each study (default: %(default)s)")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args(words)
    draw, command = random.Random(args.seed), " ".join(["python -m", f"benchmarks.{BENCHMARK}", *words])
    failed = False
    with tempfile.TemporaryDirectory(prefix="driver-kills-") as folder:
        base = Path(folder) / "base"
        prepare(base)
        (wanted, wanted_best, wanted_fresh), seconds = undisturbed(base)
        print(f"undisturbed: {seconds:.0f} s of training and tracking", file=sys.stderr)
        for case in args.cases:
            learners = CASES[case]
            left, moments, confirming = killed(base, learners, args.kills, seconds / args.kills, draw)
            remains, best, fresh = left
            states = [state for state, *_ in remains.trials.values()]
            ended = len(states) == settings()["study"]["num_trials"] and set(states) <= {"complete", "pruned"}
            once = max(remains.runs.values()) == max(remains.points.values()) == 1
            whole = len(best) == TOP and len(fresh) == TOP * FRESH_SEEDS
            result = compare(wanted, remains)
            equal = ended and once and whole
            if case != "two_slots":
                equal = equal and result.equal and best == wanted_best and fresh == wanted_fresh
            failed |= not equal
            line = record(
                BENCHMARK, case, float(equal), "as wanted", None, 1, command, kills=len(moments),
                kills_in_confirm_stage=confirming, kills_s=moments, trials=len(states),
                pruned=states.count("pruned"), runs=remains.runs.total(),
                lost=result.lost if case != "two_slots" else 0 if once and ended else None,
                duplicated=result.duplicated if case != "two_slots" else remains.runs.total() - len(remains.runs),
                confirmed=[[one.number, one.searched, one.mean] for one in best],
                different=result.different if case != "two_slots" else [], training_s=seconds, seed=args.seed,
            )  # fmt: skip
            print_line({**line, "reference": "undisturbed study"})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
