"""`offsweep table show` of a table of several hundred runs in an MLflow store (SQLite) of ten thousand.

The store holds the runs of ten days as learners log them (tags, some sixty parameters, a dataset, twenty evaluations),
with random numbers for scores. Those of the table are logged one by one; the others, those of searches, are copies of
one in the database, under other ids and times. Every line is the wall time of a whole process:

    first      nothing is known of the store yet: every run is asked for, and the course of each of the table's
    again      the store has not changed
    ten_more   ten runs of another study have ended in between
    page       `--out`: all formats, with the learning curves of every cell
"""

from __future__ import annotations

import argparse
import os
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import ROOT, print_line, record
from orchestrator.table_runs import planned_cells
from orchestrator.tracking import ensure_store, mlflow_client
from sweeps.table_references import dump_references
from sweeps.tables import load_table

BENCHMARK = "table_speed"
TARGET_S = 3.0
ROWS, COLUMNS, SEEDS, EVALUATIONS = 12, 11, 6, 20
PARAMETERS = 60
DAYS = 10  # in which the runs ended
DAY = 24 * 3600 * 1000  # milliseconds


def write_table(folder: Path) -> Path:
    """A table of that size; its datasets are on no machine."""
    protocol = {"seeds": SEEDS, "updates": 20_000, "updates_per_epoch": 1000, "evaluations": EVALUATIONS}
    content = {
        "title": "A large table", "paper": "none", "metric": "score", "unit": "score", "reference": "large",
        "protocol": protocol,
        "rows": [{"name": f"dataset {i}", "dataset": f"made-up-{i}"} for i in range(ROWS)],
        "columns": [
            {"name": f"method {i}", "settings": {"method": "td3_bc", "method.alpha": 1.0 + i}} for i in range(COLUMNS)
        ],
    }  # fmt: skip
    (folder / "large.csv").write_text(dump_references({"large": {}}) + "large,dataset 0,method 0,,,,,,made up\n")
    path = folder / "large.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Store:
    """An MLflow store that is filled with runs."""

    def __init__(self, uri: str, runs: int) -> None:
        from mlflow.entities import Dataset, DatasetInput

        ensure_store(uri)
        self._client = mlflow_client(uri)
        self._experiments = [self._client.create_experiment(f"study {i}") for i in range(50)]
        self._draw = np.random.default_rng(0)
        self._data = [DatasetInput(Dataset("made-up", "0123456789abcdef", "code", "{}"))]
        self._count = 0
        self._ago, self._apart = DAYS * DAY, DAYS * DAY // runs

    def add(self, settings_hash: str, dataset: str, seed: int) -> None:
        """A run that has ended."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000) - self._ago
        tags = {
            "study": f"study {self._count % 50}", "trial": str(self._count // 50), "seed": str(seed),
            "method": "td3_bc", "dataset": dataset, "pack": "p", "environment": "Pendulum-v1", "device": "cpu",
            "outcome": "finished",
            "config_hash": f"{self._count:016x}", "settings_hash": settings_hash, "score_reference": "made up",
        }  # fmt: skip
        run = self._client.create_run(self._experiments[self._count % 50], run_name=f"t{self._count:04d}-s{seed}")
        scores = 50 + 10 * self._draw.standard_normal(EVALUATIONS)
        metrics = [Metric("eval/score", float(v), now, 1000 * (i + 1)) for i, v in enumerate(scores)]
        params = [Param(f"method.parameter_{i}", str(i)) for i in range(PARAMETERS)]
        self._client.log_batch(run.info.run_id, metrics, params, [RunTag(k, v) for k, v in tags.items()])
        self._client.log_inputs(run.info.run_id, self._data)
        self._client.set_terminated(run.info.run_id, "FINISHED", end_time=now)
        self._count += 1
        self._ago = max(0, self._ago - DAYS * DAY // (ROWS * COLUMNS * SEEDS))

    def copy_last(self, path: Path, copies: int) -> None:
        """More runs like the last one, of other settings, written into the store's file."""
        with closing(sqlite3.connect(path)) as database:
            (run_id,) = database.execute("SELECT run_uuid FROM runs ORDER BY end_time DESC LIMIT 1").fetchone()
            fresh = [(uuid.uuid4().hex, i) for i in range(copies)]
            for table in ("runs", "params", "tags", "metrics", "latest_metrics", "inputs"):
                columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
                key = "destination_id" if table == "inputs" else "run_uuid"
                rows = database.execute(f"SELECT * FROM {table} WHERE {key} = ?", (run_id,)).fetchall()
                changed = (
                    [
                        self._changed(table, column, value, row, columns, *one)
                        for column, value in zip(columns, row, strict=True)
                    ]
                    for one in fresh
                    for row in rows
                )
                database.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(columns))})", changed)
            database.commit()

    def _changed(
        self, table: str, column: str, value: Any, row: Sequence[Any], columns: Sequence[str], run_id: str, number: int
    ) -> Any:
        if column in ("run_uuid", "destination_id"):
            return run_id
        if column == "input_uuid":
            return uuid.uuid4().hex
        if column in ("start_time", "end_time") and table == "runs":
            return value - (number + 1) * self._apart
        if table == "tags" and column == "value" and row[columns.index("key")] in ("settings_hash", "config_hash"):
            return f"{number:016x}"
        return value


def show(table: Path, workdir: Path, uri: str, *words: str) -> float:
    """Seconds of wall time."""
    command = [sys.executable, "-m", "orchestrator", "table", "show", str(table), "--workdir", str(workdir), *words]
    began = time.perf_counter()
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MLFLOW_TRACKING_URI": uri}, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCHMARK}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=10_000, help="in the store, 800 or more (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of what takes a short time (default: %(default)s)")
    args = parser.parse_args(words)
    if args.runs < 800 or args.repeats < 1:
        parser.error("--runs must be at least 800, --repeats at least 1")
    command = f"python -m benchmarks.{BENCHMARK} {shlex.join(words)}".strip()
    with tempfile.TemporaryDirectory(prefix="table-speed-") as name:
        folder = Path(name)
        table, workdir, uri = write_table(folder), folder / "work", f"sqlite:///{folder / 'mlflow.db'}"
        store = Store(uri, args.runs)
        wanted = [
            (hash_, one.runs.dataset, seed)
            for one in planned_cells(load_table(table), workdir)
            for seed, hash_ in one.runs.hashes.items()
        ]
        for one in wanted:
            store.add(*one)
        store.add("0", "made-up-0", 0)
        store.copy_last(folder / "mlflow.db", args.runs - len(wanted) - 1)

        def tell(case: str, seconds: Sequence[float], **more: Any) -> None:
            print_line(record(
                BENCHMARK, case, sorted(seconds)[len(seconds) // 2], "seconds", TARGET_S, 1, command,
                reference_is="what it may take", runs=args.runs, runs_of_the_table=len(wanted),
                all=list(seconds), load_average=os.getloadavg()[0], **more,
            ))  # fmt: skip

        tell("first", [show(table, workdir, uri)])
        tell("again", [show(table, workdir, uri) for _ in range(args.repeats)])
        times = []
        for repeat in range(args.repeats):
            for number in range(10):
                store.add(f"more{repeat}{number}", "made-up-0", 0)
            times.append(show(table, workdir, uri))
        tell("ten_more", times)
        tell("page", [show(table, workdir, uri, "--out", str(folder / "out"))])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
