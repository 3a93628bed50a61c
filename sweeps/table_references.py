"""Published values of tables: CSV files with one row per cell, each with its source.

The columns are table, dataset, method (the names of the table, its row and its column), mean, spread, spread_kind,
seeds, source and note. A value that could not be read leaves mean empty and says so in note.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sweeps.errors import TableError, suggestion
from sweeps.table_statistics import SPREAD_KINDS, sample_std

COLUMNS = ("table", "dataset", "method", "mean", "spread", "spread_kind", "seeds", "source", "note")


@dataclass(frozen=True)
class Reference:
    """What was published of a cell, in the unit of its table."""

    mean: float | None = None  # None: it could not be read
    spread: float | None = None
    spread_kind: str = ""  # one of SPREAD_KINDS where there is a spread
    seeds: int | None = None  # runs behind the mean; None: not said
    source: str = ""  # of the mean: paper and table, or repository and file
    note: str = ""  # what else is to be known; why there is no mean

    @property
    def std(self) -> float | None:
        """The spread as the standard deviation of a sample; None where it or the number of seeds is missing."""
        if self.spread is None or self.seeds is None or self.seeds < 2:
            return None
        return sample_std(self.spread, self.spread_kind, self.seeds)


References = dict[tuple[str, str], Reference]  # by dataset and method


def load_references(path: Path) -> dict[str, References]:
    """Read a CSV file of references, of one table or of several: by table, then by dataset and method.

    Raises:
        TableError: the file cannot be read, a column is missing or unknown, or a row makes no sense; it names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark at its beginning
    except OSError as error:
        raise TableError(f"Cannot read the references in {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise TableError(
            f"Cannot read the references in {path}: it is no UTF-8 text; save it as CSV (UTF-8)."
        ) from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found: dict[str, References] = {}
    try:
        header = reader.fieldnames or []
        for name in header:
            if name not in COLUMNS:
                raise TableError(f"{path}: unknown column '{name}'; {suggestion(name, COLUMNS)}.")
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise TableError(f"{path} has no column {', '.join(missing)}; its first line must be {','.join(COLUMNS)}.")
        if len(set(header)) < len(header):
            raise TableError(f"{path} has a column twice; its first line must be {','.join(COLUMNS)}.")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise TableError(f"{where}: it must have {len(COLUMNS)} fields; put fields with commas into quotes.")
            values = {name: row[name].strip() for name in COLUMNS}
            for name in ("table", "dataset", "method"):
                if not values[name]:
                    raise TableError(f"{where}: {name} is empty; say which cell this is.")
            cells = found.setdefault(values["table"], {})
            cell = values["dataset"], values["method"]
            if cell in cells:
                raise TableError(f"{where}: {cell[1]} on {cell[0]} has a line above already; leave one of them out.")
            cells[cell] = _reference(values, where)
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.line_num}: this is no CSV: {error}.") from None
    return found


def dump_references(tables: Mapping[str, References]) -> str:
    """The CSV text that `load_references` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for table, cells in tables.items():
        for (dataset, method), r in cells.items():
            numbers = ["" if value is None else f"{value:.17g}" for value in (r.mean, r.spread)]
            seeds = "" if r.seeds is None else str(r.seeds)
            writer.writerow([table, dataset, method, *numbers, r.spread_kind, seeds, r.source, r.note])
    return text.getvalue()


def _reference(values: Mapping[str, str], where: str) -> Reference:
    mean, spread = (_number(values, name, where) for name in ("mean", "spread"))
    kind = values["spread_kind"]
    try:
        seeds = int(values["seeds"]) if values["seeds"] else None
    except ValueError:
        seeds = 0
    if seeds is not None and seeds < 1:
        raise TableError(f"{where}: seeds must be a whole number of at least 1, or empty, not '{values['seeds']}'.")
    if mean is None:
        if spread is not None:
            raise TableError(f"{where}: there is a spread but no mean; give the mean, or leave both empty.")
        if not values["note"]:
            raise TableError(f"{where}: mean and note are empty; say in note why there is no value.")
    elif not values["source"]:
        raise TableError(f"{where}: source is empty; say where the mean was read.")
    if spread is not None:
        if spread < 0:
            raise TableError(f"{where}: spread must be 0 or greater, not '{values['spread']}'.")
        if kind not in SPREAD_KINDS:
            raise TableError(f"{where}: unknown spread_kind '{kind}'; {suggestion(kind, SPREAD_KINDS)}.")
    elif kind:
        raise TableError(f"{where}: spread_kind is '{kind}' but spread is empty; give the spread, or leave both empty.")
    return Reference(mean, spread, kind, seeds, values["source"], values["note"])


def _number(values: Mapping[str, str], name: str, where: str) -> float | None:
    if not values[name]:
        return None
    try:
        number = float(values[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise TableError(f"{where}: {name} must be a finite number, or empty, not '{values[name]}'.")
    return number
