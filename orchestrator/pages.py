"""Standalone HTML pages: texts, tables and figures in one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
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


@dataclass(frozen=True)
class Cell:
    """Of a table."""

    text: str
    link: str | None = None
    order: float | None = None  # what its column is sorted by; None: its text
    mark: str = ""  # best | muted


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
    """Of a page, in this order: sentences with labels, table, figures, a text as it stands in a file."""

    title: str
    sentences: Sequence[tuple[str, str]] = ()
    table: PageTable | None = None
    figures: Sequence[PageFigure] = ()
    listing: str = ""
    folded: bool = False  # shown when it is asked for


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default=())

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
