"""Which runs a table needs, and which of them an MLflow store has.

To know which settings a run has takes the methods' own code, and so torch; what follows of it is kept in the work
folder, so that a table can be looked at without.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.registry import known_hash
from orchestrator.hashing import digest
from orchestrator.table_index import FOLDER, Course, IndexedRun, RunIndex, keep
from sweeps.errors import suggestion
from sweeps.table_results import RunScores
from sweeps.tables import Table

METRICS = {"score": "eval/score", "return": "eval/return_mean"}
ROOT = Path(__file__).parent.parent
CODE = ("agents", "envs", "orchestrator/config.py", "orchestrator/table_runs.py")  # what hashes of settings come from
Key = tuple[str, str]  # row and column


@dataclass(frozen=True)
class CellRuns:
    """The runs that fill a cell."""

    row: str
    column: str
    dataset: str
    hashes: Mapping[int, str]  # seed -> of the settings of its run; of a search one per confirmed run, all empty
    search: str = ""  # the study whose confirmed best fills it

    @property
    def key(self) -> Key:
        return self.row, self.column


@dataclass(frozen=True)
class Found:
    """What there is of a table."""

    runs: dict[Key, list[RunScores]]
    missing: dict[Key, list[int]]  # seeds, of cells that are trained
    doubts: list[str]


def slug(table: Table) -> str:
    """A table's name in those of folders, studies and experiments: a reduced one is another table."""
    return table.name if table.scale == 1 else f"{table.name}-scale{table.scale:g}"


def restricted(table: Table, rows: Sequence[str], columns: Sequence[str]) -> Table:
    """A table of some rows and columns, named or by patterns such as 'hopper-*'; of all where none is given.

    Raises:
        UserError: a name or pattern that fits none.
    """
    kept: list[list[Any]] = []
    for what, patterns, items in (("row", rows, table.rows), ("column", columns, table.columns)):
        names = [item.name for item in items]  # type: ignore[attr-defined]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"table {table.name} has no {what} {pattern!r}; {suggestion(pattern, names)}")
        chosen = [name for name in names if not patterns or any(fnmatchcase(name, p) for p in patterns)]
        kept.append([item for item in items if item.name in chosen])  # type: ignore[attr-defined]
    return replace(table, rows=kept[0], columns=kept[1])


def cell_runs(table: Table, workdir: Path) -> list[CellRuns]:
    """The runs of all cells that runs fill, as they are known from the last time, or found anew where the table or the
    code has changed.

    Raises:
        UserError: settings that `offsweep train` would refuse; it names the cell.
    """
    path = workdir / FOLDER / f"{slug(table)}.runs.json"
    key = digest([[cell.words for cell in table.cells()], _code()])
    try:
        content = json.loads(path.read_bytes())
        if content["key"] == key:
            return [_cell_runs(one) for one in content["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    from orchestrator.table_runs import planned_cells

    found = [one.runs for one in planned_cells(table, workdir)]
    keep(path, json.dumps({"key": key, "cells": [asdict(one) for one in found]}))
    return found


def _cell_runs(content: Mapping[str, Any]) -> CellRuns:
    hashes = {int(seed): found for seed, found in content["hashes"].items()}
    return CellRuns(content["row"], content["column"], content["dataset"], hashes, content["search"])


def _code() -> list[Any]:
    """What changes with the code that hashes come from."""
    files = [path for name in CODE for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.*"))]
    stats = [(str(path), path.stat()) for path in sorted(files) if path.suffix in (".py", ".yaml")]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]


def find_runs(table: Table, wanted: Sequence[CellRuns], index: RunIndex, workdir: Path) -> Found:
    """The runs that there are, whoever trained them and whatever for: of the same settings, seed and data.

    Where a dataset is not on this machine, its runs are taken from the version that most of them learnt from.

    Raises:
        UserError: the store cannot be reached.
    """
    metric = METRICS.get(table.metric, "")
    known = index.by_settings()
    hashes = {name: known_hash(name, workdir) for name in {one.dataset for one in wanted}}
    taken: dict[Key, dict[int, IndexedRun]] = {}
    doubts: list[str] = []
    others: Counter[str] = Counter()  # runs of other data, by the dataset's name
    for one in wanted:
        if one.search:
            taken[one.key] = _best_confirmed(table, one, index, metric)
            continue
        candidates = {seed: _of_dataset(known.get(h, []), one.dataset) for seed, h in one.hashes.items()}
        mine = hashes[one.dataset]
        if mine is None:
            versions = Counter(run.dataset_hash for runs in candidates.values() for run in runs)
            mine = versions.most_common(1)[0][0] if versions else ""
        taken[one.key] = {}
        for seed, runs in candidates.items():
            same = [run for run in runs if run.dataset_hash == mine[:16]]
            others[one.dataset] += bool(runs) and not same
            finished = [run for run in same if run.outcome == "finished"] or same
            if finished:
                taken[one.key][seed] = finished[0]
    for name, count in sorted(others.items()):
        if count:
            doubts.append(f"{count} runs learnt from another version of {name} and are left out.")
    courses = index.courses([run for runs in taken.values() for run in runs.values()], metric) if metric else {}
    found = {key: [_scores(run, courses[run.run_id], metric) for run in runs.values()] for key, runs in taken.items()}
    empty = sum(not run.values and run.outcome != "diverged" for runs in found.values() for run in runs)
    if empty:
        doubts.append(f"{empty} runs have no {metric} in MLflow and are left out.")
    filled = {key: [r for r in runs if r.values or r.outcome == "diverged"] for key, runs in found.items()}
    missing = {
        one.key: [seed for seed in one.hashes if (not taken[one.key] if one.search else seed not in taken[one.key])]
        for one in wanted
    }
    for cell in table.cells():
        if cell.row.lab:
            from orchestrator.labs import lab_values

            values = lab_values(cell.row.lab, workdir, cell.row.reads, cell.column.reads)
            filled[cell.row.name, cell.column.name] = [RunScores(seed, [0], [value]) for seed, value in values.items()]
    return Found(filled, {key: seeds for key, seeds in missing.items() if seeds}, doubts)


def _best_confirmed(table: Table, one: CellRuns, index: RunIndex, metric: str) -> dict[int, IndexedRun]:
    """The fresh runs of the trial of a search that did best in them; nothing before the search has ended."""
    whole = [runs for runs in index.confirmed(one.search).values() if len(runs) >= len(one.hashes)]
    courses = index.courses([run for runs in whole for run in runs], metric)

    def worth(runs: list[IndexedRun]) -> float:
        values = [_scores(run, courses[run.run_id], metric).value(table.protocol.selection) for run in runs]
        value = sum(values) / len(values)
        return -math.inf if math.isnan(value) else value if table.higher_is_better else -value

    return {run.seed: run for run in max(whole, key=worth)} if whole else {}


def _of_dataset(runs: Sequence[IndexedRun], name: str) -> list[IndexedRun]:
    """Of runs with the same settings, those of a dataset: its name is not part of their hash."""
    return [run for run in runs if run.dataset == name]


def _scores(run: IndexedRun, courses: Mapping[str, Course], metric: str) -> RunScores:
    course = courses[metric]
    offline = {
        name.partition("/")[2]: found.values
        for name, found in courses.items()
        if name != metric and found.updates == course.updates
    }
    return RunScores(
        run.seed, course.updates, course.values, run.run_id, run.experiment_id, run.study, run.outcome,
        run.dataset_hash, offline,
    )  # fmt: skip
