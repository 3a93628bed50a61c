"""A study while its MLflow server is away, and while the server's database cannot be written to: what is lost?

A study of many short runs on Pendulum-v1 is trained and sent to a real `mlflow server` over a real PostgreSQL. When
training has begun, the outage begins; `--minutes` later it ends, and when the tracker has caught up, the study is
interrupted. Cases:

    server_stopped       the server is killed and started again
    database_read_only   PostgreSQL refuses every write to the server's database

`value` is 1 if MLflow then holds every point, parameter and end of a run that any spool has, once. `lost` and
`duplicated` count points. `training_ratio` is how many points training logged per second during the outage over those
before it; `caught_up_s` is the time from the outage's end until all was sent.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, print_line, record
from benchmarks.kill_tests import SETTINGS, prepare, wait_until
from benchmarks.storage_servers import PASSWORD, MlflowServer, Postgres, mlflow_server, postgres_server
from orchestrator.spool import read_records

BENCHMARK = "tracking_outage"
CASES = ("server_stopped", "database_read_only")
STUDY = "outage"
BEFORE_S = 20.0  # of training before the outage
PATIENCE_S = 900.0


def settings() -> dict[str, Any]:
    """More runs than can be trained meanwhile."""
    made = copy.deepcopy(SETTINGS)
    made["method"] |= {"num_updates": 2000, "updates_per_epoch": 100}
    made["evaluation"] = {"every_epochs": 5, "episodes": 1}
    made["study"] |= {"name": STUDY, "num_trials": 5000, "sampler": {"name": "random"}}
    made["compute"] |= {"num_learners": 1, "runs_per_pack": 2}
    return made


def spooled(folder: Path) -> tuple[Counter[tuple[str, str, int]], dict[str, str]]:
    """What a study's spools hold: (run, metric, step) -> 1, and how each run has ended."""
    points: Counter[tuple[str, str, int]] = Counter()
    ends: dict[str, str] = {}
    for path in (folder / "spool").glob("*.jsonl"):
        for line, _ in read_records(path):
            if line is not None and line["type"] == "metrics":
                points.update((path.stem, name, line["step"]) for name in line["values"])
            elif line is not None and line["type"] == "end":
                ends[path.stem] = line["status"]
    return Counter(dict.fromkeys(points, 1)), ends


def recorded(address: str) -> tuple[Counter[tuple[str, str, int]], dict[str, str], int]:
    """The same of MLflow's database, and how many runs it has."""
    import psycopg

    with psycopg.connect(address) as connection:
        rows = connection.execute(
            "SELECT t.value, m.key, m.step FROM metrics m"
            " JOIN tags t ON t.run_uuid = m.run_uuid AND t.key = 'offsweep.run_key'"
        ).fetchall()
        runs = connection.execute(
            "SELECT t.value, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'offsweep.run_key'"
        ).fetchall()
    return Counter((key, name, step) for key, name, step in rows), dict(runs), len(runs)


def waiting_runs(folder: Path) -> int | None:
    """Of which something waits to be sent, as the study's status says."""
    try:
        status = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return None
    return int(status["tracking"]["runs"]) if time.time() - status["time"] < 10 else None


def play(
    case: str, minutes: float, base: Path, postgres: Postgres, server: MlflowServer, database: str
) -> dict[str, Any]:
    """One study with one outage; what the line says of it."""
    workdir = base / case
    workdir.mkdir()
    (workdir / "datasets").symlink_to(base / "prepared" / "datasets")
    file, folder = workdir / "study.yaml", workdir / "studies" / STUDY
    file.write_text(yaml.safe_dump(settings()))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"MLFLOW_TRACKING_URI": server.uri}
    command = [sys.executable, "-m", "orchestrator", "sweep", str(file), "--workdir", str(workdir)]
    with open(workdir / "sweep.log", "w") as log:
        sweep = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
    try:
        wait_until("training", lambda: logged(folder) > 0 or sweep.poll() is not None, PATIENCE_S)
        rates = [rate(folder, BEFORE_S)]
        if case == "server_stopped":
            server.stop()
        else:
            postgres.set_read_only(database, True)
        rates.append(rate(folder, 60 * minutes))
        held = waiting_runs(folder)
        if case == "server_stopped":
            server.start()
        else:
            postgres.set_read_only(database, False)
        ended = time.monotonic()
        # the study goes on, so that there is always a run with something new: all but that
        wait_until("the tracker", lambda: (waiting_runs(folder) or 99) <= 3 or sweep.poll() is not None, PATIENCE_S)
        caught_up = time.monotonic() - ended
        if sweep.poll() is not None:
            raise RuntimeError(f"the study ended: {(workdir / 'sweep.log').read_text()[-3000:]}")
        sweep.send_signal(signal.SIGINT)
        sweep.wait(PATIENCE_S)
    finally:
        sweep.kill()
        sweep.wait()
    wanted, ends = spooled(folder)
    found, states, runs = recorded(f"{postgres.url(database)}?password={PASSWORD}")
    lost, doubled = (wanted - found).total(), (found - wanted).total()
    wrong_ends = sum(states.get(key) != status for key, status in ends.items())
    return {
        "minutes": minutes, "points": wanted.total(), "lost": lost, "duplicated": doubled, "runs": runs,
        "runs_ended": len(ends), "wrong_ends": wrong_ends, "runs_twice": runs - len(states), "runs_held_back": held,
        "training_ratio": rates[1] / rates[0], "caught_up_s": caught_up,
    }  # fmt: skip


def logged(folder: Path) -> int:
    """Lines that training has spooled."""
    return sum(path.read_bytes().count(b'"type":"metrics"') for path in (folder / "spool").glob("t*.jsonl"))


def rate(folder: Path, seconds: float) -> float:
    """Lines spooled per second, over the next so many."""
    before, started = logged(folder), time.monotonic()
    time.sleep(seconds)
    return (logged(folder) - before) / (time.monotonic() - started)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=5.0, help="of each outage (default: %(default)s)")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    args = parser.parse_args(words)
    command, failed = " ".join(["python -m", f"benchmarks.{BENCHMARK}", *words]), False
    with tempfile.TemporaryDirectory(prefix="tracking-outage-") as name, postgres_server() as postgres:
        base = Path(name)
        (base / "prepared").mkdir()
        prepare(base / "prepared")
        for case in args.cases:
            database = f"mlflow_{case}"
            with mlflow_server(postgres.create(database)) as server:
                print(f"{BENCHMARK}: {case}", file=sys.stderr, flush=True)
                found = play(case, args.minutes, base, postgres, server, database)
            good = not any(found[name] for name in ("lost", "duplicated", "wrong_ends", "runs_twice"))
            failed |= not good
            print_line(record(BENCHMARK, case, float(good), "nothing lost or doubled", None, 1, command, **found))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
