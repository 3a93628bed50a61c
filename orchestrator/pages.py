"""Standalone HTML pages: texts, tables and figures in one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from envs.errors import UserError
from envs.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.j2"
MLFLOW = "http://127.0.0.1:5000"  # where `offsweep ui` serves it


@dataclass(frozen=True)
class Cell:
    """Of a table."""

    text: str
    link: str | None = None
    order: float | None = None  # what its column is sorted by; None: its text
    mark: str = ""  # best | muted
    note: str = ""  # a second line, smaller


@dataclass(frozen=True)
class PageTable:
    """A table whose rows can be sorted by a click on a column's name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class PageFigure:
    """A picture."""

    title: str
    png: str  # base64


@dataclass(frozen=True)
class Section:
    """Of a page, in this order: sentences with labels, tables, figures, a text as it stands in a file."""

    title: str
    sentences: Sequence[tuple[str, str | Cell]] = ()
    table: PageTable | None = None
    figures: Sequence[PageFigure] = ()
    listing: str = ""
    folded: bool = False  # shown when it is asked for
    anchor: str = ""  # by which links lead to it


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default=())
    watermark: str = ""  # across the page

    def html(self) -> str:
        """The whole page."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        return environment.get_template(TEMPLATE).render(page=self)

    def save(self, path: Path) -> None:
        """Write it, atomically.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: temporary.write_text(self.html(), encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another file") from error


def page_figure(title: str, figure: Figure) -> PageFigure:
    """A drawn figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return PageFigure(title, base64.b64encode(buffer.getvalue()).decode())


def pages_address(store: str, given: str | None) -> str:
    """Where MLflow's pages of a store are looked at: as given, else the store itself if it is a server, else where
    `offsweep ui` serves them.

    Raises:
        UserError: what is given is no address.
    """
    if given is not None and re.match(r"https?://[^/\s]+", given) is None:
        raise UserError(f"--mlflow {given!r} is not an address such as {MLFLOW}")
    return given or (store if store.startswith(("http://", "https://")) else MLFLOW)
