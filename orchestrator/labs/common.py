"""What the laboratories leave in their study's folder and as artifacts: rows as lab.csv, and a figure."""

from __future__ import annotations

import csv
import io
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from envs.errors import UserError
from envs.files import write_atomically
from orchestrator.artifacts import write_text
from orchestrator.spool import RunSpool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS_FILE = "lab.csv"

Row = TypeVar("Row")


def keep_rows(folder: Path, rows: Sequence[Any], row_type: type, spool: RunSpool | None, name: str = ROWS_FILE) -> None:
    """Write rows, of a dataclass whose fields are texts, numbers, truth values or tuples of floats, to a .csv.

    It becomes an artifact of the spool's run, if there is one.
    """
    columns = [f.name for f in fields(row_type)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (getattr(row, column) for column in columns)
        writer.writerow([" ".join(f"{x:.6g}" for x in v) if isinstance(v, tuple) else v for v in values])
    write_text(folder / name, buffer.getvalue())
    if spool is not None:
        spool.artifact(folder / name)


def read_rows(folder: Path, row_type: type[Row], name: str = ROWS_FILE) -> list[Row]:
    """The rows of a finished laboratory from its study's folder.

    Raises:
        UserError: it is not there or not finished.
    """
    try:
        rows = list(csv.DictReader((folder / name).read_text().splitlines()))
    except OSError as error:
        raise UserError(f"cannot read {folder / name}: {error.strerror}; run `offsweep lab` first") from None
    types = typing.get_type_hints(row_type)
    return [row_type(**{column: _value(text, types[column]) for column, text in row.items()}) for row in rows]


def _value(text: str, kind: Any) -> Any:
    if kind is bool:
        return text == "True"
    return kind(text) if kind in (str, int, float) else tuple(map(float, text.split()))


def keep_figure(path: Path, figure: Figure, spool: RunSpool | None, console: Console) -> None:
    """Write a figure as .png and say where it is."""
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=75))
    if spool is not None:
        spool.artifact(path, "plots")
    console.print(f"figure: {path}", highlight=False, soft_wrap=True)
