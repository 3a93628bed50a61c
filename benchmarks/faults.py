"""Processes and machines of a Ray cluster killed at random moments: does a study end as if nothing had happened?

The cluster is one of several Ray nodes on this machine, which are started once and replaced when they are killed. Every
round trains a study on Pendulum-v1 and kills one thing with SIGKILL at a random moment of the training; rounds go
through the faults in turn. Cases:

    worker, learner, evaluator  the process that runs model rollouts, that trains, that runs episodes
    raylet   the node on which the learner is, with all its processes; another one comes
    driver   `python -m orchestrator sweep` itself; then the same command with --resume
    head     the head's processes, while the learner lives on. The driver must end by itself, with exit code 2 and a
             sentence, or finish the study; then a new cluster is started, and the study resumed
    cluster  the head and all nodes, likewise; the driver cannot finish
    table    16 trials of 3 seeds with three learners, while nodes are killed and added all the time

`value` is 1 (and `equal` true) if the study ended with the same trials, values and final policies (bit for bit) as an
undisturbed one on the same cluster, and MLflow holds every run, parameter, outcome and metric point once. `runs` counts
the trainings in MLflow; `lost` and `duplicated` count trials of the study, and runs, parameters and metric points of
MLflow. Times measured on the way (`time/...`) differ, and in the table the order in which trials end. The moment of
a kill is that of a point which training logs, and up to 0.3 s more, drawn from `--seed` and the number of the round.

With `--lines FILE` every line is kept there as it is made, and rounds that are in it are not played again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, print_line, record
from benchmarks.kill_tests import (
    PATIENCE_S,
    SETTINGS,
    TITLES,
    Remains,
    Sweep,
    compare,
    descendants,
    kill_all,
    logged_points,
    prepare,
    workdir_from,
)
from orchestrator.environment import prepare_environment

BENCHMARK = "faults"
PROCESSES = {"worker": "rollout_worker", "learner": "learner", "evaluator": "evaluator"}
FAULTS = (*PROCESSES, "raylet", "driver", "head", "cluster")
SINGLE = {"num_learners": 1, "num_rollout_workers": 1, "num_evaluators": 1, "runs_per_pack": 2}
TABLE = {"num_learners": 3, "runs_per_pack": 3}
CPUS = 3  # that every node says it has: one is enough for a learner and what belongs to it
GCS_S = "30"  # after which Ray ends what has lost the head; its default of 60 makes longer rounds
TRIES = 5  # of a round whose kill came too late


def table_settings() -> dict[str, Any]:
    """48 runs, whose trials do not depend on the order in which they end."""
    made = copy.deepcopy(SETTINGS)
    made["num_seeds"] = 3
    made["method"]["num_updates"] = 1000
    trials = [
        {"method.eta": eta, "method.rollout_length": length}
        for eta in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0) for length in (1, 2)
    ]  # fmt: skip
    made["study"] |= {"num_trials": len(trials), "trials": trials, "space": {}}
    return made


# ---- nodes ----------------------------------------------------------------------------------------------------------


class Nodes:
    """A head without CPUs, to which drivers connect, and nodes on which learners are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._start()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        options = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": options}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = str(self._cluster.address)
        for _ in range(self.count):
            self.add()

    @property
    def workers(self) -> list[Any]:
        return list(self._cluster.worker_nodes)

    def add(self) -> None:
        self._cluster.add_node(num_cpus=CPUS)

    def kill(self, node: Any) -> None:
        """A machine that loses its power."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        head: Any = self._cluster.head_node
        self.kill(head)

    def again(self) -> None:
        """A new cluster in place of this one."""
        self.close()
        self._start()

    def mend(self) -> None:
        """Bring back what a round that failed has left dead."""
        if self._cluster.head_node is None:
            self.again()
        while len(self.workers) < self.count:
            self.add()

    def close(self) -> None:
        self._cluster.shutdown()

    def with_learner(self) -> Any:
        """The node on which a learner is, or None."""
        for node in self.workers:
            raylet = node.all_processes["raylet"][0].process.pid
            if any(title.startswith(TITLES["learner"]) for title in descendants(raylet).values()):
                return node
        return None

    def kill_process(self, title: str) -> bool:
        """Kill a process of the nodes; False if there is none (any more)."""
        pids = [pid for pid, name in descendants(os.getpid()).items() if name.startswith(title)]
        kill_all(pids[:1])
        return bool(pids)


# ---- rounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """A round."""

    remains: Remains
    kills: int
    at_point: int  # logged by then


def undisturbed(base: Path, nodes: Nodes, compute: dict[str, Any], settings: dict[str, Any]) -> tuple[Remains, int]:
    """What an undisturbed study leaves, and how many points it logs. Others need not measure packs again."""
    with workdir_from(base) as workdir:
        remains = Sweep(workdir, {**compute, "address": nodes.address}, settings=settings).finish()
        shutil.copytree(workdir / "calibrations", base / "calibrations", dirs_exist_ok=True)
        return remains, logged_points(workdir)


def play(fault: str, base: Path, nodes: Nodes, at_point: int, delay_s: float) -> Played | None:
    """A round with one kill; None if it came too late."""
    with workdir_from(base) as workdir:
        compute = {**SINGLE, "address": nodes.address}
        sweep = Sweep(workdir, compute)
        try:
            sweep.wait_for_training(at_point)
            time.sleep(delay_s)
            if sweep.process.poll() is not None or not strike(fault, nodes, sweep):
                sweep.finish()
                return None
            if fault in ("head", "cluster"):
                check_sentence(sweep, may_finish=fault == "head")
                nodes.again()
            if fault in ("head", "cluster", "driver"):
                sweep = Sweep(workdir, {**SINGLE, "address": nodes.address}, resume=True)
            return Played(sweep.finish(), 1, at_point)
        finally:
            if sweep.process.poll() is None:
                sweep.process.kill()
                sweep.process.wait()


def strike(fault: str, nodes: Nodes, sweep: Sweep) -> bool:
    """Kill; False if there was nothing to be killed."""
    if fault in PROCESSES:
        return nodes.kill_process(TITLES[PROCESSES[fault]])
    if fault == "raylet":
        node = nodes.with_learner()
        if node is None:
            return False
        nodes.kill(node)
        nodes.add()
    elif fault == "driver":
        sweep.process.kill()
        sweep.process.wait()
    else:
        nodes.kill_head()
        for node in nodes.workers if fault == "cluster" else ():
            nodes.kill(node)
    return True


def check_sentence(sweep: Sweep, may_finish: bool) -> None:
    """A driver that has lost the head says so, unless it was nearly done."""
    code = sweep.process.wait(PATIENCE_S)
    text = sweep.log.read_text()
    if may_finish and code == 0:
        return
    if code != 2 or "the head of the Ray cluster" not in text:
        raise RuntimeError(f"without a head the driver ended with exit code {code}: {text[-1000:]}")


def play_table(base: Path, nodes: Nodes, draw: random.Random) -> Played:
    """The table while nodes go and come: a kill every 3 to 10 s, and a new node 1 to 5 s later."""
    kills, deadline = 0, time.monotonic() + 4 * PATIENCE_S
    with workdir_from(base) as workdir:
        sweep = Sweep(workdir, {**TABLE, "address": nodes.address}, settings=table_settings())

        def is_over(seconds: float) -> bool:
            """Whether the study has ended, in so many seconds at the latest."""
            with contextlib.suppress(subprocess.TimeoutExpired):
                sweep.process.wait(seconds)
            return sweep.process.poll() is not None or time.monotonic() > deadline

        try:
            sweep.wait_for_training()
            while not is_over(draw.uniform(3.0, 10.0)):
                nodes.kill(draw.choice(sorted(nodes.workers, key=str)))
                kills += 1
                is_over(draw.uniform(1.0, 5.0))
                nodes.add()
            return Played(sweep.finish(), kills, 0)
        finally:
            if sweep.process.poll() is None:
                sweep.process.kill()
                sweep.process.wait()


def of_trainings(remains: Remains) -> Remains:
    """Without the points of the study's own run, which are in the order in which trials end."""
    points = Counter({key: n for key, n in remains.points.items() if key[0] != "study"})
    values = {key: value for key, value in remains.values.items() if key[0] != "study"}
    return replace(remains, points=points, values=values)


# ---- lines ----------------------------------------------------------------------------------------------------------


class Lines:
    """The lines of results, printed and kept as they are made."""

    def __init__(self, path: Path | None, command: str, seed: int) -> None:
        self.path, self.command, self.seed = path, command, seed
        kept = path.read_text().splitlines() if path is not None and path.exists() else []
        self.done: set[tuple[str, int]] = set()
        self.all_equal = True
        for line in map(json.loads, kept):
            self.done.add((line["fault"], line["round"]))
            self.all_equal &= line["equal"]
            print_line(line)

    def play(self, fault: str, number: int, wanted: Remains, one_round: Callable[[], Played]) -> None:
        """Play a round and keep its line; a round that ends in an error is a line, too."""
        began, failure = time.monotonic(), ""
        played = Played(Remains({}, {}, Counter(), Counter(), Counter(), {}), 0, 0)
        try:
            played = one_round()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"[-1500:]
        remains = played.remains
        if fault == "table":
            wanted, remains = of_trainings(wanted), of_trainings(remains)
        result = compare(wanted, remains)
        self.all_equal &= result.equal
        line = record(
            BENCHMARK, fault, float(result.equal), "equal to undisturbed", None, 1, self.command, fault=fault,
            round=number, runs=sum(n for (key, *_), n in remains.runs.items() if key != "study"), lost=result.lost,
            duplicated=result.duplicated, equal=result.equal, kills=played.kills, at_point=played.at_point,
            points=remains.points.total(), different=result.different, failure=failure,
            round_s=time.monotonic() - began, seed=self.seed,
        )  # fmt: skip
        line = {**line, "reference": "undisturbed study"}
        print_line(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def play_until_struck(fault: str, base: Path, nodes: Nodes, points: int, draw: random.Random) -> Played:
    """A round whose kill came in time."""
    for _ in range(TRIES):
        played = play(fault, base, nodes, draw.randint(1, points - 1), draw.uniform(0.0, 0.3))
        if played is not None:
            return played
    raise RuntimeError(f"in {TRIES} studies there was nothing left to kill")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=12, help="with one kill each (default: %(default)s)")
    parser.add_argument("--tables", type=int, default=1, help="rounds of the table (default: %(default)s)")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=FAULTS, metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--lines", type=Path, help="file that keeps the lines; what is in it is not played again")
    args = parser.parse_args(words)
    prepare_environment()  # and with it the authentication mode of the nodes and drivers to come
    os.environ |= {"RAY_gcs_rpc_server_reconnect_timeout_s": GCS_S, "PYTHONPATH": str(ROOT)}
    os.environ.pop("RAY_ADDRESS", None)
    lines = Lines(args.lines, " ".join(["python -m", f"benchmarks.{BENCHMARK}", *words]), args.seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        base = Path(folder) / "base"
        prepare(base)
        nodes = Nodes(3)
        try:
            tables = [n for n in range(1, args.tables + 1) if ("table", n) not in lines.done]
            if tables:
                wanted, points = undisturbed(base, nodes, TABLE, table_settings())
                print(f"undisturbed table: {points} points of training", file=sys.stderr)
            for number in tables:
                draw = random.Random(f"{args.seed}/table/{number}")
                lines.play("table", number, wanted, lambda draw=draw: play_table(base, nodes, draw))  # type: ignore[misc]
                nodes.mend()
            turns = [(args.faults[n % len(args.faults)], n + 1) for n in range(args.rounds)]
            turns = [turn for turn in turns if turn not in lines.done]
            if turns:
                wanted, points = undisturbed(base, nodes, SINGLE, SETTINGS)
                print(f"undisturbed study: {points} points of training", file=sys.stderr)
            for fault, number in turns:
                draw = random.Random(f"{args.seed}/{fault}/{number}")

                def one_round(fault: str = fault, draw: random.Random = draw) -> Played:
                    return play_until_struck(fault, base, nodes, points, draw)

                lines.play(fault, number, wanted, one_round)
                nodes.mend()
        finally:
            nodes.close()
    return int(not lines.all_equal)


if __name__ == "__main__":
    raise SystemExit(main())
