"""What a search is worth on a real task: penalty, its weight, members, rollout length, critics and their diversity for
MOPO on Hopper (`study_hopper.yaml` beside this file), against the hand-tuned setting that it begins with.

The search is `offsweep sweep benchmarks/study_hopper.yaml`. Its best trials and the hand-tuned setting are trained
again for as many updates with the same fresh seeds, fresh episodes and a fresh ensemble; only that is compared. Of a
finished study in `--workdir` only the lines are made, one that was stopped is resumed.

Cases:

    confirmed/<trial>    mean score of a setting with fresh seeds. `reference`: the hand-tuned setting's. `difference`
                         is that of pairs of seeds with intervals of 95 %, Student's and the bootstrap's
    search               the best value of the search, which was chosen for its luck, too. `reference`: the hand-tuned
                         setting's there. With what the search took
    importance/<name>    of a parameter, by PED-ANOVA. `reference`: what all alike would have
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, print_line, record
from benchmarks.studies import study_main
from envs.errors import UserError
from sweeps.statistics import paired_difference

BENCHMARK = "study_hopper"
STUDY, FILE = "hopper", Path(__file__).with_suffix(".yaml")
HAND_TUNED = 0  # the trial that the search begins with


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    workdir = Path(os.environ.get("OFFSWEEP_WORKDIR", "offsweep-work"))
    parser.add_argument("--workdir", type=Path, default=workdir, help="work folder (default: %(default)s)")
    return parser


def offsweep(*words: str, shown: bool = True) -> str:
    """Run a command.

    Args:
        shown: what it prints is shown (on standard error: standard output is for lines of results), not returned.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False, stdout=sys.stderr if shown else subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"offsweep {words[0]} ended with exit code {done.returncode}")
    return done.stdout or ""


def run_all(args: argparse.Namespace, command: str) -> int:
    where = ["--workdir", str(args.workdir)]
    begun = (args.workdir / "studies" / STUDY / "config.yaml").exists()
    offsweep(*(["resume", STUDY] if begun else ["sweep", str(FILE)]), *where)
    for line in lines(json.loads(offsweep("sweep", "show", STUDY, "--json", *where, shown=False)), command):
        print_line(line)
    return 0


def lines(study: dict[str, Any], command: str) -> Iterator[dict[str, Any]]:
    """The lines of a study.

    Args:
        study: as `offsweep sweep show --json` prints it.

    Raises:
        UserError: it has not confirmed the hand-tuned setting.
    """
    confirmed = {one["trial"]: one for one in study["confirmed"]}
    if HAND_TUNED not in confirmed:
        raise UserError(f"the study {STUDY} has not confirmed trial {HAND_TUNED}; it needs study.confirm.enqueued=1")
    trials = {trial["number"]: trial for trial in study["trials"]}
    tuned = confirmed[HAND_TUNED]
    unit, dataset = study["unit"], study["dataset"]
    for number, one in confirmed.items():
        found = paired_difference(one["values"], tuned["values"]) if number != HAND_TUNED else None
        difference = (
            None if found is None else {"mean": found.mean, "student": found.student, "bootstrap": found.bootstrap}
        )
        yield record(
            BENCHMARK, f"confirmed/{number}", one["mean"], unit, tuned["mean"], 1, command,
            reference_is="the hand-tuned setting with the same fresh seeds", dataset=dataset, difference=difference,
            values=one["values"], interval=one["interval"], searched=one["searched"], params=trials[number]["params"],
            hand_tuned=number == HAND_TUNED, diverged=one["diverged"],
        )  # fmt: skip
    cost = {key: study["cost"][key] for key in ("wall_seconds", "updates", "updates_saved", "online_episodes")}
    yield record(
        BENCHMARK, "search", study["best"]["value"], unit, trials[HAND_TUNED]["value"], 1, command,
        reference_is="the hand-tuned setting in the search", dataset=dataset, trials=study["counts"],
        label=study["label"], data=study["data"], **cost, confirm_updates=study["confirm_cost"]["updates"],
    )  # fmt: skip
    importances = study["importances"] or {}
    for name, value in importances.items():
        yield record(
            BENCHMARK, f"importance/{name.removeprefix('method.')}", value, "share", 1 / len(importances), 1, command,
            reference_is="all alike", dataset=dataset, trials=study["counts"],
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return study_main(BENCHMARK, build_parser(), run_all, argv)


if __name__ == "__main__":
    raise SystemExit(main())
