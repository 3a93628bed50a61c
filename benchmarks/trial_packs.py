"""What a study of many short trials gains from packs, and what pruning saves in them.

The study draws 64 trials of one seed at random for RAVL on Pendulum-v1, 1,000 updates of networks of 2 x 64, one pack
key (the space varies nothing but eta and the actor's learning rate). The ensemble is there beforehand; the confirm
stage is left out. Trials and seeds are the same in every case.

Cases:

    packs        wall clock of `offsweep sweep` with packs of `--pack` runs. `reference`: of one run per pack, in as
                 many learner processes (`--learners`)
    pruning      gradient updates of the same study with the median pruner. `reference`: without
    freed/<M>    of the study with the median pruner: median seconds of an epoch per run, in packs that pruning has left
                 with M runs. `reference`: in full packs. 1 means that a place that pruning has freed costs nothing, so
                 that nothing could be gained by giving it to another trial; M would mean that it costs all it did
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, print_line, record
from benchmarks.kill_tests import SETTINGS, prepare, workdir_from
from orchestrator.learner import PackSpec
from orchestrator.spool import read_records
from sweeps.study import Study

BENCHMARK = "trial_packs"
EPOCHS, UPDATES = 10, 100  # of each run, of an epoch


def settings(trials: int, pruner: str) -> dict[str, Any]:
    made = copy.deepcopy(SETTINGS)
    made["num_seeds"] = 1
    made["method"] |= {
        "hidden": [64, 64], "batch_size": 128, "num_updates": EPOCHS * UPDATES, "updates_per_epoch": UPDATES,
        "rollout_batch": 200,
    }  # fmt: skip
    made["study"] |= {
        "name": pruner, "num_trials": trials, "sampler": {"name": "random"}, "pruner": {"name": pruner},
        "space": {
            "method.eta": {"type": "float", "low": 0.01, "high": 10.0, "log": True},
            "method.actor_lr": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
        },
    }  # fmt: skip
    made["evaluation"] = {"every_epochs": 1, "episodes": 2}
    return made


def sweep(workdir: Path, trials: int, pruner: str, runs_per_pack: int, learners: int) -> tuple[Path, float]:
    """The folder of a study that was run to its end, and the seconds that its command took."""
    file = workdir / f"{pruner}.yaml"
    file.write_text(yaml.safe_dump(settings(trials, pruner)))
    words = [f"compute.runs_per_pack={runs_per_pack}", f"compute.num_learners={learners}", "--workdir", str(workdir)]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "sweep", str(file), *words], cwd=ROOT, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the sweep ended with exit code {done.returncode}: {done.stdout}")
    return workdir / "studies" / pruner, time.perf_counter() - started


def updates_of(folder: Path) -> int:
    """Gradient updates that a study's trials took."""
    return sum(record.attrs["updates"] for record in Study.open(folder, read_only=True).trials())


def seconds_by_size(folder: Path) -> dict[int, list[float]]:
    """Seconds of an epoch per run, by how many runs were left in the pack: of all epochs but each pack's first."""
    found = defaultdict(list)
    for path in folder.glob("packs/*/pack.json"):
        pack = PackSpec.load(folder, path.parent.name)
        epochs: dict[int, list[float]] = defaultdict(list)
        for run in pack.runs:
            for entry, _ in read_records(folder / "spool" / f"{run.run_key}.jsonl"):
                values = (entry or {}).get("values", {})
                if entry and "time/update_seconds" in values and entry["step"] > UPDATES:
                    epochs[entry["step"]].append(values["time/update_seconds"] + values["time/rollout_seconds"])
        for seconds in epochs.values():
            found[len(seconds)].append(seconds[0] / len(seconds))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--trials", type=int, default=64, help="of the study (default: %(default)s)")
    parser.add_argument("--pack", type=int, default=8, help="runs of a pack (default: %(default)s)")
    parser.add_argument("--learners", type=int, default=2, help="processes that train; 0: the command's own")
    args = parser.parse_args(words)
    command = " ".join(["python -m", f"benchmarks.{BENCHMARK}", *words])
    common = {"trials": args.trials, "pack": args.pack, "learners": args.learners}

    def show(case: str, value: float, unit: str, reference: float, what: str, **more: Any) -> None:
        line = record(BENCHMARK, case, value, unit, reference, 1, command, **common, **more)
        print_line({**line, "reference_is": what})

    with tempfile.TemporaryDirectory(prefix="trial-packs-") as folder:
        base = Path(folder) / "base"
        prepare(base)
        sweep(base, 1, "percentile", 1, 0)  # so that the ensemble is there
        with workdir_from(base) as workdir:
            _, alone = sweep(workdir, args.trials, "none", 1, args.learners)
        with workdir_from(base) as workdir:
            whole, packed = sweep(workdir, args.trials, "none", args.pack, args.learners)
            all_updates = updates_of(whole)
        show("packs", packed, "s", alone, "one run per pack")
        with workdir_from(base) as workdir:
            pruned, seconds = sweep(workdir, args.trials, "median", args.pack, args.learners)
            states = [one.state for one in Study.open(pruned, read_only=True).trials()]
            show(
                "pruning", updates_of(pruned), "updates", all_updates, "no pruning", pruned=states.count("pruned"),
                seconds=seconds, seconds_without=packed,
            )  # fmt: skip
            sizes = seconds_by_size(pruned)
        full = statistics.median(sizes[args.pack])
        for size in sorted(sizes):
            show(
                f"freed/{size}", statistics.median(sizes[size]), "s per run and epoch", full, "full packs",
                epochs=len(sizes[size]),
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
