"""Processes of a study killed with SIGKILL at random moments: does it end as if nothing had happened?

Cases, each with a study on Pendulum-v1 of three trials of two seeds, one learner with one rollout worker and one
evaluator in Ray:

    learner         the process that trains
    rollout_worker  the process that runs model rollouts
    evaluator       the process that runs episodes
    driver          `python -m orchestrator sweep` itself, in odd rounds alone, in even ones with every process of its
                    Ray; then the same command with --resume

`value` is 1 if the study ended with the same trials, values and final policies (bit for bit) as an undisturbed one, and
MLflow holds every run, parameter, outcome and metric point once. Times measured on the way (`time/...`) differ.
`lost` and `duplicated` count trials, runs and metric points of MLflow. `killed_at_s` counts from the first point that
training logs; the moments are drawn from `--seed`, over the time that the undisturbed training took.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import ROOT, print_line, record
from envs.collect import collect
from envs.hdf5 import write_hdf5
from envs.policies import load_policy
from orchestrator.tracking import ensure_store
from sweeps.study import Study

BENCHMARK = "kill_tests"
DATASET = "tiny"  # collected by `prepare`
STUDY = "killed"
TITLES = {"learner": "ray::LearnerProcess", "rollout_worker": "ray::RolloutWorker", "evaluator": "ray::Evaluator"}
CASES = (*TITLES, "driver")
PATIENCE_S = 300.0  # for anything that has to happen

SETTINGS: dict[str, Any] = {
    "method": {
        "name": "ravl",
        "hidden": [16, 16],
        "num_critics": 2,
        "eta": 0.1,
        "batch_size": 32,
        "num_updates": 200,
        "updates_per_epoch": 50,
        "rollout_batch": 50,
        "rollout_length": 2,
        "dynamics": {
            "ensemble_size": 2,
            "num_elites": 1,
            "hidden": [16],
            "weight_decay": [0.0, 0.0],
            "max_epochs": 2,
        },
    },
    "dataset": DATASET,
    "num_seeds": 2,
    "study": {
        "name": STUDY,
        "num_trials": 3,
        "confirm": {"top": 0},
        "space": {
            "method.eta": {"type": "float", "low": 0.01, "high": 10.0, "log": True},
            "method.rollout_length": {"type": "categorical", "choices": [1, 2]},
        },
    },
    "evaluation": {"every_epochs": 2, "episodes": 2},
    "compute": {"num_learners": 0, "checkpoint_minutes": 0.0, "device": "cpu"},
}
"""A study of seconds, as a YAML file would hold it."""


def prepare(workdir: Path) -> None:
    """Make a work folder with the dataset and an empty MLflow store, to be copied for every study."""
    data = collect("Pendulum-v1", [(load_policy("pendulum-medium"), 1.0)], 600, seed=0, name=DATASET)
    write_hdf5(data, workdir / "datasets" / f"{DATASET}.hdf5")
    ensure_store(f"sqlite:///{workdir / 'mlflow.db'}")


# ---- what a study has left behind -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remains:
    """All that must be the same after a kill."""

    trials: dict[int, Any]  # number -> state, value, parameters, reports
    policies: dict[str, str]  # run key -> digest of the final policy's arrays
    runs: Counter[tuple[str, str, str]]  # (run key, status, outcome) of MLflow's runs
    params: Counter[tuple[str, str, str]]  # (run key, name, value), without where it was computed
    points: Counter[tuple[str, str, int]]  # (run key, metric, step)
    values: dict[tuple[str, str, int], float]  # without times

    @classmethod
    def of(cls, workdir: Path, study: str) -> Remains:
        folder = workdir / "studies" / study
        trials = {
            t.number: (t.state, t.diverged, t.value, t.params, t.intermediate)
            for t in Study.open(folder, read_only=True).trials()
        }
        policies = {path.parent.name: policy_digest(path) for path in folder.glob("runs/*/policy.npz")}
        with contextlib.closing(sqlite3.connect(f"file:{workdir / 'mlflow.db'}?mode=ro", uri=True)) as store:
            runs = store.execute(
                "SELECT r.run_uuid, k.value, r.status, coalesce(o.value, '') FROM runs r"
                " JOIN experiments e ON e.experiment_id = r.experiment_id AND e.name = ?"
                " JOIN tags k ON k.run_uuid = r.run_uuid AND k.key = 'offsweep.run_key'"
                " LEFT JOIN tags o ON o.run_uuid = r.run_uuid AND o.key = 'outcome'",
                (study,),
            ).fetchall()
            keys = {uuid: key for uuid, key, _, _ in runs}
            metrics = store.execute("SELECT run_uuid, key, step, value FROM metrics").fetchall()
            params = store.execute("SELECT run_uuid, key, value FROM params").fetchall()
        mine = [(keys[uuid], name, step, value) for uuid, name, step, value in metrics if uuid in keys]
        return cls(
            trials,
            policies,
            Counter((key, status, outcome) for _, key, status, outcome in runs),
            Counter(
                (keys[uuid], name, value)
                for uuid, name, value in params
                if uuid in keys and not name.startswith("compute.")
            ),
            Counter((key, name, step) for key, name, step, _ in mine),
            {(key, name, step): value for key, name, step, value in mine if not name.startswith("time/")},
        )


def policy_digest(path: Path) -> str:
    """Digest of a policy's arrays, bit for bit."""
    digest = hashlib.sha256()
    with np.load(path) as arrays:
        for name in sorted(arrays):
            digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Comparison:
    """How what a study left differs from what the undisturbed one left."""

    lost: int
    duplicated: int
    different: list[str]  # in words; empty if equal

    @property
    def equal(self) -> bool:
        return not (self.lost or self.duplicated or self.different)


def compare(undisturbed: Remains, other: Remains) -> Comparison:
    lost = duplicated = 0
    for name in ("points", "runs", "params"):
        wanted, found = getattr(undisturbed, name), getattr(other, name)
        if name == "runs":  # how they ended is compared below
            wanted, found = (Counter(key for key, _, _ in c.elements()) for c in (wanted, found))
        lost += (wanted - found).total()
        duplicated += (found - wanted).total()
    lost += len(undisturbed.trials.keys() - other.trials.keys())
    duplicated += len(other.trials.keys() - undisturbed.trials.keys())
    different = []
    for name in ("trials", "policies", "runs", "values"):
        wanted, found = getattr(undisturbed, name), getattr(other, name)
        keys = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
        different += [f"{name} {key}: {wanted.get(key)} became {found.get(key)}" for key in keys[:3]]
    return Comparison(lost, duplicated, different)


# ---- processes ------------------------------------------------------------------------------------------------------


def wait_until(what: str, condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} has not happened in {patience_s:.0f} s")
        time.sleep(0.01)


def logged_points(workdir: Path, study: str = STUDY) -> int:
    """Lines of metrics that training has spooled."""
    paths = (workdir / "studies" / study / "spool").glob("t*.jsonl")
    return sum(path.read_bytes().count(b'"type":"metrics"') for path in paths)


def descendants(pid: int) -> dict[int, str]:
    """Process id -> title of all processes below one."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found: dict[int, str] = {}
    generation = {pid}
    while generation:
        generation = {p for p, parent in parents.items() if parent in generation and p not in found}
        found |= {p: titles.get(p, "") for p in generation}
    return found


class Sweep:
    """`python -m orchestrator sweep` in a process of its own.

    Args:
        workdir: made by `prepare`.
        compute: the overrides `compute.<key>=<value>`.
        resume: continue the study that is there.
        settings: of the study.
    """

    def __init__(
        self, workdir: Path, compute: dict[str, Any], resume: bool = False, settings: dict[str, Any] = SETTINGS
    ) -> None:
        self.workdir = workdir
        file = workdir / "study.yaml"
        file.write_text(yaml.safe_dump(settings))
        overrides = [f"compute.{key}={value}" for key, value in compute.items()]
        command = [sys.executable, "-m", "orchestrator", "sweep", str(file), *["--resume"][: int(resume)], *overrides]
        self.log = workdir / f"sweep-{int(resume)}.log"
        environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--workdir", str(workdir)], cwd=ROOT, stdout=log, stderr=log, env=environment
            )

    def finish(self) -> Remains:
        """Wait for the end; what the study left behind."""
        if self.process.wait(PATIENCE_S) != 0:
            raise RuntimeError(f"the sweep ended with exit code {self.process.returncode}: {self.log.read_text()}")
        return Remains.of(self.workdir, STUDY)

    def wait_for_training(self, points: int = 1) -> None:
        """Until training has logged so many points."""
        wait_until(
            f"training ({self.log.read_text()})",
            lambda: logged_points(self.workdir) >= points or self.process.poll() is not None,
        )

    def kill_worker(self, case: str) -> bool:
        """Kill one of the processes of a case; False if there is none (any more)."""
        pids = [pid for pid, title in descendants(self.process.pid).items() if title.startswith(TITLES[case])]
        for pid in pids[:1]:
            os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def kill(self, with_ray: bool = True) -> list[int]:
        """Kill the driver; returns the ids of processes below it, which are killed too or left to themselves."""
        below = [*descendants(self.process.pid)]
        self.process.kill()
        if with_ray:
            kill_all(below)
        self.process.wait(PATIENCE_S)
        return below


def kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- rounds ---------------------------------------------------------------------------------------------------------

RAY = {"num_learners": 1, "num_rollout_workers": 1, "num_evaluators": 1}


@contextlib.contextmanager
def workdir_from(base: Path) -> Iterator[Path]:
    """A copy of a prepared work folder, removed afterwards."""
    folder = Path(tempfile.mkdtemp(dir=base.parent))
    try:
        yield shutil.copytree(base, folder, dirs_exist_ok=True)
    finally:
        shutil.rmtree(folder)


def undisturbed(base: Path) -> tuple[Remains, float]:
    """What an undisturbed study leaves, and how many seconds it trains."""
    with workdir_from(base) as workdir:
        sweep = Sweep(workdir, RAY)
        sweep.wait_for_training()
        began = time.monotonic()
        policies = SETTINGS["study"]["num_trials"] * SETTINGS["num_seeds"]
        wait_until("the end", lambda: len([*workdir.glob("studies/*/runs/*/policy.npz")]) == policies)
        seconds = time.monotonic() - began
        return sweep.finish(), seconds


def play(case: str, base: Path, kill_at_s: float, driver_alone: bool) -> tuple[Remains, float] | None:
    """One round: what the study left, and when the kill was; None if the kill came too late."""
    with workdir_from(base) as workdir:
        sweep = Sweep(workdir, RAY)
        sweep.wait_for_training()
        began = time.monotonic()
        time.sleep(kill_at_s)
        if sweep.process.poll() is not None:
            return None
        if case != "driver":
            killed_at = time.monotonic() - began
            if not sweep.kill_worker(case):
                sweep.finish()
                return None
            return sweep.finish(), killed_at
        left = sweep.kill(with_ray=not driver_alone)
        killed_at = time.monotonic() - began
        try:
            return Sweep(workdir, RAY, resume=True).finish(), killed_at
        finally:
            kill_all([pid for pid in left if "ray" in _title(pid)])


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="of every case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    args = parser.parse_args(words)
    draw = random.Random(args.seed)
    failed = False
    with tempfile.TemporaryDirectory(prefix="kill-tests-") as folder:
        base = Path(folder) / "base"
        prepare(base)
        wanted, seconds = undisturbed(base)
        print(f"undisturbed: {len(wanted.trials)} trials, {seconds:.1f} s of training", file=sys.stderr)
        for case in args.cases:
            for number in range(1, args.rounds + 1):
                outcome = None
                while outcome is None:  # the machine may be faster this time, so that nothing was left to kill
                    outcome = play(case, base, draw.uniform(0.0, seconds), driver_alone=number % 2 == 1)
                remains, killed_at = outcome
                result = compare(wanted, remains)
                failed |= not result.equal
                command = " ".join(["python -m", f"benchmarks.{BENCHMARK}", *words])
                line = record(
                    BENCHMARK, case, float(result.equal), "equal to undisturbed", None, 1, command,
                    round=number, killed_at_s=killed_at, training_s=seconds, trials=len(remains.trials),
                    points=remains.points.total(), lost=result.lost, duplicated=result.duplicated,
                    different=result.different, seed=args.seed, with_ray=case == "driver" and number % 2 == 0,
                )  # fmt: skip
                print_line({**line, "reference": "undisturbed run"})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
