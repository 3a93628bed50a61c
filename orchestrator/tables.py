"""`offsweep table`: paper tables, from their definition to the page."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from envs.errors import UserError
from envs.files import DiskFullError, locked, write_atomically
from orchestrator.pages import pages_address
from orchestrator.table_index import RunIndex
from orchestrator.table_lookup import CellRuns, Found, Key, cell_runs, find_runs, restricted, slug
from orchestrator.table_outputs import CSV_FILE, print_table, save_all, to_json
from orchestrator.tracking import STATE_FILE, Tracker, TrackingError, default_tracking_uri, shown_uri
from sweeps.errors import StudyBusyError, StudyExistsError
from sweeps.table_references import dump_references, load_references
from sweeps.table_results import TableResult, table_result
from sweeps.tables import Table, known_tables, load_table, scaled, with_references

if TYPE_CHECKING:
    from orchestrator.table_runs import PlannedCell, TableStudy

FOLDER = "tables"  # of the work folder
STUDIES_FILE = "studies.json"  # of a table's folder: the studies that were begun for it
ALLOWED = ("compute.", "tracking_uri=")  # words of a command line that are no part of a table


@dataclass(frozen=True)
class Wanted:
    """Which table, as a command line says it."""

    name: str  # of a shipped table, or its file
    workdir: Path
    scale: float | None = None  # None: as the table's file says
    rows: Sequence[str] = ()  # names or patterns; none: all
    columns: Sequence[str] = ()
    words: Sequence[str] = ()  # compute.* and tracking_uri

    def __post_init__(self) -> None:
        for word in self.words:
            if not word.startswith(ALLOWED):
                raise UserError(
                    f"{word!r} cannot be given to a table, whose settings are in its file; only compute.* and "
                    "tracking_uri can"
                )

    @property
    def store(self) -> str:
        """The MLflow store."""
        given = [word.partition("=")[2] for word in self.words if word.startswith("tracking_uri=")]
        return given[-1] if given else default_tracking_uri(self.workdir)

    def table(self) -> Table:
        """The rows and columns that are asked for, with the references that were imported into the work folder.

        Raises:
            UserError: there is no such table, or no such row, column or scale of it.
        """
        return restricted(self.whole_table(), self.rows, self.columns)

    def whole_table(self) -> Table:
        """All its rows and columns.

        Raises:
            UserError: there is no such table, or no such scale of it.
        """
        table = load_table(self.name)
        file = references_file(self.workdir, table.name)
        if file.exists():
            table = with_references(table, load_references(file).get(table.name, {}))
        if self.scale is not None:
            if any(row.lab for row in table.rows):
                raise UserError(f"table {table.name} is measured by laboratories, which have no scale; leave it out")
            table = scaled(table, self.scale)
        return table

    def folder(self, table: Table) -> Path:
        """Of its files."""
        return self.workdir / FOLDER / slug(table)


@dataclass
class State:
    """A table as far as it is known."""

    table: Table
    runs: Sequence[CellRuns]
    index: RunIndex
    found: Found = field(default_factory=lambda: Found({}, {}, []))

    def look(self, workdir: Path, anew: bool = False) -> None:
        """Ask MLflow what there is."""
        self.index.refresh(anew)
        self.found = find_runs(self.table, self.runs, self.index, workdir)

    @property
    def result(self) -> TableResult:
        return table_result(self.table, self.found.runs, self.found.doubts)


def list_tables(console: Console) -> None:
    """Print the shipped tables."""
    grid = Grid(title="tables that come with offsweep")
    for column, justify in (("table", "left"), ("rows x columns", "right"), ("published", "right"), ("what", "left")):
        grid.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name in known_tables():
        table = load_table(name)
        read = sum(cell.reference.mean is not None for cell in table.cells())
        grid.add_row(name, f"{len(table.rows)} x {len(table.columns)}", str(read), f"{table.title} ({table.paper})")
    console.print(grid)
    console.print("offsweep table show NAME prints one; docs/tables.md says what they are", highlight=False)


def show_table(
    wanted: Wanted, console: Console, *, as_json: bool = False, cells: bool = False, out: Path | None = None,
    mlflow: str | None = None, anew: bool = False,
) -> None:  # fmt: skip
    """Print a table as far as it has been filled.

    Args:
        cells: a line for every cell, too: its verdict and its reference.
        out: folder for all formats.
        mlflow: address of MLflow's pages, for links.
        anew: ask MLflow for all runs, not only for what ended since the last time.

    Raises:
        UserError: there is no such table, or MLflow does not answer.
    """
    table, address = wanted.table(), pages_address(wanted.store, mlflow)
    state = State(table, cell_runs(table, wanted.workdir), RunIndex(wanted.store, wanted.workdir))
    state.look(wanted.workdir, anew)
    result = state.result
    if as_json:
        console.file.write(json.dumps(to_json(result), indent=1) + "\n")
    else:
        print_table(console, result, cells)
    if out is not None:
        for path in save_all(result, out, address):
            if not as_json:
                console.print(str(path), highlight=False, soft_wrap=True)


def plan_table(wanted: Wanted, console: Console, *, as_json: bool = False, measure: bool = False) -> None:
    """Print what `run_table` would train.

    Args:
        measure: how long it would take, too, for which updates are measured that were not measured before.

    Raises:
        UserError: there is no such table, its settings are refused, or MLflow does not answer.
    """
    from orchestrator.table_runs import missing_studies

    state, planned = _planned(wanted.table(), wanted)
    state.look(wanted.workdir)
    studies = missing_studies(state.table, planned, state.found.missing, wanted.workdir, wanted.words)
    there = sum(len(one.hashes) for one in state.runs) - sum(map(len, state.found.missing.values()))
    seconds = _seconds(studies) if measure else {}
    labs = _missing_labs(state)
    if as_json:
        console.file.write(json.dumps({
            "table": state.table.name, "scale": state.table.scale, "runs_there": there,
            "studies": [
                {
                    "name": study.name, "runs": study.runs, "updates": _updates(study),
                    "cells": [{"row": row, "column": column, "seeds": s} for (row, column), s in study.seeds.items()],
                    "seconds": seconds.get(study.name),
                }
                for study in studies
            ],
            "labs": labs, "doubts": state.found.doubts,
        }, indent=1) + "\n")  # fmt: skip
        return
    if state.table.watermark:
        console.print(f"[bold]{state.table.watermark}[/bold]", highlight=False)
    grid = Grid(title=f"what `offsweep table run {state.table.name}` would train")
    for name, justify in (("study", "left"), ("cells", "left"), ("runs", "right"), ("updates", "right"),
                          ("stages", "right"), *([("time", "right")] if measure else [])):  # fmt: skip
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    for study in studies:
        names = ", ".join(column for _, column in study.seeds)
        stages = len(_stage_digests(study))
        took = [_time(seconds[study.name])] if measure else []
        grid.add_row(study.name, names, str(study.runs), f"{_updates(study):,}", str(stages or ""), *took)
    if studies:
        console.print(grid)
    distinct = set().union(*map(_stage_digests, studies)) if studies else set()
    missing = sum(study.runs for study in studies)
    parts = [f"{there} of {there + missing} runs are in {shown_uri(wanted.store)} already"]
    if studies:
        parts.append(f"{missing} to train in {len(studies)} studies, {sum(map(_updates, studies)):,} updates")
    if distinct:
        parts.append(f"{len(distinct)} different stages (ensembles and the like), each built once")
    if measure:
        parts.append(f"about {_time(sum(seconds.values()))}, stages of several studies counted in each")
    if labs:
        parts.append(f"laboratories to run: {', '.join(labs)}")
    console.print("; ".join(parts), highlight=False)
    for doubt in state.found.doubts:
        console.print(f"[yellow]{doubt}[/yellow]", highlight=False)


def run_table(wanted: Wanted, console: Console, mlflow: str | None = None) -> int:
    """Train what is missing of the rows and columns that are asked for, and write the whole table in all formats, also
    as a run of MLflow.

    What is there already, in whatever study of the store, is not trained again; studies of the table that were killed
    go on. Several processes can run the same table in one work folder: a study belongs to who began it.

    Returns:
        0: every cell that was asked for and can be filled here is; 1: runs are missing, since studies failed or other
        processes are at them.

    Raises:
        UserError: before anything is trained, whatever is wrong with the table, the data or the store.
    """
    from orchestrator import launch
    from orchestrator.cluster import joined
    from orchestrator.labs import run_lab
    from orchestrator.table_runs import missing_studies

    asked = {(cell.row.name, cell.column.name) for cell in wanted.table().cells()}
    state, planned = _planned(wanted.whole_table(), wanted)
    table, folder = state.table, wanted.folder(state.table)
    address = pages_address(wanted.store, mlflow)
    tags, failures, set_aside = {"table": slug(table)}, dict[str, str](), set[Key]()

    def missing() -> dict[Key, list[int]]:
        return {key: s for key, s in state.found.missing.items() if key in asked and key not in set_aside}

    def attempt(name: str, cells: Mapping[Key, Any], train: Any) -> None:
        try:
            train()
            return
        except (StudyBusyError, StudyExistsError):
            console.print(f"another process is at {name}", highlight=False)
        except (DiskFullError, TrackingError):
            raise
        except (UserError, RuntimeError) as error:  # of this study; the others may go well
            failures[name] = str(error).splitlines()[0]
            console.print(f"[red]{name}: {failures[name]}[/red]", highlight=False)
        set_aside.update(cells)

    state.look(wanted.workdir, anew=True)
    for study in missing_studies(table, planned, missing(), wanted.workdir, wanted.words):
        launch.check_before_compute(study.config)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if missing():
            stack.enter_context(joined(planned[0].config.compute))
        for name, cells in _begun(folder).items():
            wants = any(seed in missing().get(key, []) for key, seeds in cells.items() for seed in seeds)
            if wants and (wanted.workdir / "studies" / name / "config.yaml").exists():
                console.print(f"going on with {name}", highlight=False)
                attempt(name, cells, lambda n=name: launch.resume(n, wanted.workdir, wanted.words, console, tags=tags))
        state.look(wanted.workdir)
        studies = missing_studies(table, planned, missing(), wanted.workdir, wanted.words)
        for number, study in enumerate(studies):
            console.print(f"[bold]study {number + 1} of {len(studies)}: {study.name}[/bold]", highlight=False)
            _begin(folder, study)
            attempt(study.name, study.seeds, lambda c=study.config: launch.start(c, console, tags=tags))
    for lab in _missing_labs(state, asked):
        attempt(lab, {}, lambda n=lab: run_lab(n, str(wanted.workdir), None, None, console))
    state.look(wanted.workdir)
    result = state.result
    before = _read(folder / CSV_FILE)
    paths = save_all(result, folder, address)
    _log(result, paths if _read(folder / CSV_FILE) != before else [], folder, wanted, console)
    print_table(console, result)
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)
    for name, text in failures.items():
        console.print(f"[red]{name} failed: {text}[/red]", highlight=False)
    set_aside.clear()
    return 1 if failures or missing() else 0


def import_references(file: Path, workdir: Path, console: Console) -> None:
    """Add published values, which all outputs of their tables in this work folder then have.

    Raises:
        UserError: the file makes no sense, or is of no table or cell that there is; nothing is taken in then.
    """
    given = load_references(file)
    texts = {}
    for name, cells in given.items():
        table = load_table(name)
        kept = references_file(workdir, name)
        earlier = load_references(kept).get(name, {}) if kept.exists() else {}
        with_references(table, cells)
        before = with_references(table, earlier).references
        changed = [key for key, r in cells.items() if key in before and before[key].mean not in (None, r.mean)]
        filled = sum(r.mean is not None for r in cells.values())
        texts[kept] = dump_references({name: {**earlier, **cells}})
        console.print(f"{name}: {filled} values, {len(changed)} of them instead of others", highlight=False)
    if not texts:
        raise UserError(f"{file} has no rows; give at least one published value")
    for path, text in texts.items():
        _write(path, text)


def references_file(workdir: Path, table: str) -> Path:
    """Where published values of a table lie that were imported."""
    return workdir / FOLDER / "references" / f"{table}.csv"


def _planned(table: Table, wanted: Wanted) -> tuple[State, list[PlannedCell]]:
    from orchestrator.table_runs import planned_cells

    planned = planned_cells(table, wanted.workdir, wanted.words)
    return State(table, [one.runs for one in planned], RunIndex(wanted.store, wanted.workdir)), planned


def _begun(folder: Path) -> dict[str, dict[Key, list[int]]]:
    """The studies that were begun for a table, with the seeds of each cell."""
    try:
        content = json.loads((folder / STUDIES_FILE).read_text())
    except FileNotFoundError:
        return {}
    return {name: {(row, column): seeds for row, column, seeds in cells} for name, cells in content.items()}


def _begin(folder: Path, study: TableStudy) -> None:
    """Write down that a study is begun, before it is."""
    with locked(folder / f"{STUDIES_FILE}.lock"):
        begun = _begun(folder) | {study.name: study.seeds}
        content = {name: [[row, column, s] for (row, column), s in cells.items()] for name, cells in begun.items()}
        _write(folder / STUDIES_FILE, json.dumps(content, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _missing_labs(state: State, asked: Collection[Key] | None = None) -> list[str]:
    """The laboratories that cells are read from and that have not ended in the work folder."""
    labs = {
        cell.row.lab: (cell.row.name, cell.column.name)
        for cell in state.table.cells()
        if cell.row.lab and (asked is None or (cell.row.name, cell.column.name) in asked)
    }
    return [lab for lab, key in labs.items() if not state.found.runs.get(key)]


def _updates(study: TableStudy) -> int:
    return study.runs * int(study.config.method.num_updates)


def _stage_digests(study: TableStudy) -> set[str]:
    """Stages that its runs need, by dataset, kind and settings."""
    from orchestrator.config import apply_params, stages_of
    from orchestrator.hashing import digest

    found = set()
    for params in study.config.study.trials or [{}]:
        config = apply_params(study.config, params)
        for stage in stages_of(config).values():
            found.add(digest([config.dataset, stage.kind, dict(stage.settings)]))
    return found


def _seconds(studies: Sequence[TableStudy]) -> dict[str, float]:
    from orchestrator import launch
    from orchestrator.cluster import joined

    if not studies:
        return {}
    with joined(studies[0].config.compute):
        return {study.name: launch.planned(study.config).wall_seconds for study in studies}


def _time(seconds: float) -> str:
    from orchestrator.reading import duration

    return duration(seconds)


def _log(result: TableResult, paths: Sequence[Path], folder: Path, wanted: Wanted, console: Console) -> None:
    """Keep what a table says now as a run of MLflow, in an experiment of its own.

    Args:
        paths: its files; none where it says what it said before, and only what was not sent then is sent.
    """
    from orchestrator.launch import tracking
    from orchestrator.spool import RunInfo, RunSpool

    table = result.table
    name = slug(table)
    tracker = Tracker(
        wanted.store, f"table {name}", folder / "spool", folder / STATE_FILE,
        experiment_tags={"offsweep.table": name, "mlflow.experimentKind": "custom_model_development"},
    )  # fmt: skip
    counts = {f"cells/{verdict.replace(' ', '_')}": float(count) for verdict, count in result.counts.items()}
    means = {
        f"iqm/{''.join(c if c.isalnum() or c in '._- /' else '-' for c in a.column)}": float(a.iqm.value)
        for a in result.aggregates.columns
    }
    runs = sum(len(cell.runs) for cell in result.cells.values())
    with tracking(tracker, console), ExitStack() as stack:
        if not paths:
            return
        spool = stack.enter_context(RunSpool(folder / "spool", time.strftime("table-%Y%m%d-%H%M%S")))
        params = {"table": table.name, "scale": f"{table.scale:g}", "selection": table.protocol.selection}
        tags = {"kind": "table", "table": name, "paper": table.paper, "runs": str(runs)}
        if table.watermark:
            tags["watermark"] = table.watermark
        spool.start(RunInfo(spool.path.stem, params, tags))
        spool.metrics(0, counts | means)
        for path in paths:
            spool.artifact(path)
        spool.end("FINISHED")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
