"""A table in all its forms: terminal, Markdown, LaTeX, CSV, JSON, and a page with what is behind every cell."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from envs.errors import UserError
from envs.files import write_atomically
from orchestrator.pages import Cell, Page, PageFigure, PageTable, Section, page_figure
from sweeps.plots_tables import budget_figure, curves_figure, profiles_figure
from sweeps.table_results import Aggregate, CellResult, TableResult
from sweeps.table_statistics import Estimate

MARKS = {"reproduced": "=", "better": "+", "worse": "-", "not comparable": "~", "not run": ""}
LEGEND = (
    "= reproduced: no difference to the published value found at 5 %; + better; - worse; ~ not comparable; bold: best "
    "of its row, or not told apart from it at 5 %"
)
CSV_FILE, PAGE_FILE = "table.csv", "table.html"
NAMES = ("table.md", "table.tex", CSV_FILE, "table.json", PAGE_FILE)
_NO_CAPTION = ("verdicts", "published values")  # of LaTeX: the sources stand in comments
_WIDE = 6  # columns of a LaTeX table beyond which it is made to fit the text
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "°": r"$^\circ$",
}  # fmt: skip
Row = tuple[str, list[str]]  # of aggregates: name, and a text per column


def save_all(result: TableResult, folder: Path, mlflow: str) -> list[Path]:
    """Write all forms.

    Args:
        mlflow: address of MLflow's pages, for links.

    Raises:
        UserError: the folder cannot be written.
    """
    texts = {
        "table.md": markdown(result, PAGE_FILE), "table.tex": latex(result), CSV_FILE: csv_text(result),
        "table.json": json.dumps(to_json(result), indent=1) + "\n",
    }  # fmt: skip
    for name, text in texts.items():
        try:
            write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write {folder / name}: {error.strerror}; choose another folder") from error
    page(result, mlflow).save(folder / PAGE_FILE)
    return [folder / name for name in NAMES]


# ---- one cell in words --------------------------------------------------------------------------------------------


class Numbers:
    """How a table's numbers are written: as many decimals as two digits of its typical spread need."""

    def __init__(self, result: TableResult) -> None:
        spreads = [cell.std for cell in result.cells.values() if cell.std]
        means = [abs(cell.mean) for cell in result.cells.values() if cell.mean]
        size = float(np.median(spreads)) if spreads else float(np.median(means)) / 10 if means else 1.0
        self.decimals = min(4, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 1

    def __call__(self, value: float) -> str:
        return f"{value:,.{self.decimals}f}"

    def spread(self, mean: float, std: float | None) -> str:
        return self(mean) if std is None else f"{self(mean)} ± {self(std)}"

    def estimate(self, found: Estimate) -> str:
        return f"{self(float(found.value))} [{self(float(found.low))}, {self(float(found.high))}]"

    def ours(self, cell: CellResult) -> str:
        """Mean and spread of a cell's runs, or what there is instead of them."""
        if cell.cell.column.reference_only:
            return ""
        if not cell.runs:
            return "not run"
        if cell.mean is None:
            return f"{cell.diverged} of {len(cell.runs)} diverged"
        state = f" ({len(cell.runs)}/{cell.wanted})" if len(cell.runs) < cell.wanted else ""
        return f"{self.spread(cell.mean, cell.std)}{state}"

    def published(self, cell: CellResult) -> str:
        r = cell.cell.reference
        return "" if r.mean is None else self.spread(r.mean, r.spread)


def verdict_sentence(cell: CellResult, number: Callable[[float], str]) -> str:
    """Of a cell: what was found, by how much, and what would have been."""
    v = cell.verdict
    words = v.name if not v.why else f"{v.name}: {v.why}"
    if v.difference is not None:
        words += f"; {number(v.difference)} above" if v.difference >= 0 else f"; {number(-v.difference)} below"
    if v.interval is not None and v.p_value is not None and v.smallest_difference is not None:
        low, high = v.interval
        words += (
            f" (95 %: {number(low)} to {number(high)}, p = {v.p_value:.2g}); a difference of "
            f"{number(v.smallest_difference)} would have been seen in 4 of 5 cases"
        )
    return words


def _aggregate_rows(result: TableResult, number: Numbers) -> list[Row]:
    """Below the table: a line per statistic; none where there are no aggregates."""
    by_column = {one.column: one for one in result.aggregates.columns}
    names = [column.name for column in result.table.columns]

    def line(label: str, text: Callable[[Aggregate], str]) -> Row:
        return label, [text(by_column[name]) if name in by_column else "" for name in names]

    if not by_column or len(result.aggregates.rows) < 2:
        return []
    return [line("IQM", lambda a: number.estimate(a.iqm)), line("mean", lambda a: number.estimate(a.mean))]


# ---- terminal -----------------------------------------------------------------------------------------------------


def print_table(console: Console, result: TableResult, cells: bool = False) -> None:
    """Print a table; below each of our values the published one.

    Args:
        cells: a line for every cell, too.
    """
    table, number = result.table, Numbers(result)
    grid = Grid(title=Text(table.title, style="bold"), show_lines=True)
    grid.add_column("")
    for column in table.columns:
        grid.add_column(column.name, justify="right", style="dim" if column.reference_only else "")
    for row in table.rows:
        texts = [_terminal_cell(result.cell(row.name, column.name), number) for column in table.columns]
        grid.add_row(row.name, *texts)
    for label, values in _aggregate_rows(result, number):
        grid.add_row(Text(label, style="italic"), *values)
    if table.watermark:
        console.print(Text(table.watermark, style="bold red"))
    console.print(grid)
    console.print(Text(LEGEND, style="dim"))
    for label, sentence in result.caption():
        console.print(Text.assemble((f"{label}: ", "dim"), sentence))
    if result.aggregates.why_none and any(cell.runs for cell in result.cells.values()):
        console.print(Text(f"nothing is said over all rows: {result.aggregates.why_none}", style="dim"))
    for doubt in result.doubts:
        console.print(Text(doubt, style="yellow"))
    if cells:
        for cell in result.cells.values():
            source = cell.cell.reference.source or cell.cell.reference.note
            console.print(Text.assemble(
                (f"{cell.cell.row.name} / {cell.cell.column.name}: ", "bold"), verdict_sentence(cell, number),
                f"; published: {number.published(cell) or 'none'} ({source or 'no source'})",
            ))  # fmt: skip


def _terminal_cell(cell: CellResult, number: Numbers) -> Text:
    ours, theirs = number.ours(cell), number.published(cell)
    style = "bold" if cell.is_best else "" if cell.mean is not None else "dim"
    mark = MARKS[cell.verdict.name]
    parts: list[Any] = [(f"{ours} {mark}".strip(), style)] if ours else []
    if theirs:
        parts.append((f"{chr(10) if ours else ''}{theirs}", "dim italic"))
    return Text.assemble(*parts)


# ---- texts --------------------------------------------------------------------------------------------------------


def markdown(result: TableResult, page_name: str | None = None) -> str:
    """As a GitHub table.

    Args:
        page_name: of the page beside it, to whose sections every number leads.
    """
    table, number = result.table, Numbers(result)
    lines = [f"# {table.title}", ""]
    if table.watermark:
        lines += [f"> **{table.watermark}**", ""]
    lines.append("| | " + " | ".join(_escaped(column.name) for column in table.columns) + " |")
    lines.append("|---|" + "---:|" * len(table.columns))
    for r, row in enumerate(table.rows):
        texts = []
        for c, column in enumerate(table.columns):
            cell = result.cell(row.name, column.name)
            ours, theirs = number.ours(cell), number.published(cell)
            mark = MARKS[cell.verdict.name]
            if ours and cell.runs and page_name:
                ours = f"[{ours}]({page_name}#{_anchor(r, c)})"
            ours = f"**{ours}**" if cell.is_best else ours
            texts.append(" <br> ".join(filter(None, [f"{ours} {mark}".strip(), theirs and f"*{theirs}*"])))
        lines.append(f"| {_escaped(row.name)} | " + " | ".join(texts) + " |")
    lines += [f"| {label} | " + " | ".join(values) + " |" for label, values in _aggregate_rows(result, number)]
    lines += ["", f"In italics: published. {LEGEND}.", ""]
    lines += [f"- {label}: {sentence}" for label, sentence in result.caption()]
    lines += [f"- **{doubt}**" for doubt in result.doubts]
    return "\n".join(lines) + "\n"


def latex(result: TableResult) -> str:
    r"""A `table` for `\usepackage{booktabs}` (and graphicx, where it has many columns)."""
    table, number = result.table, Numbers(result)
    wide = len(table.columns) > _WIDE
    packages = r"\usepackage{booktabs,graphicx}" if wide else r"\usepackage{booktabs}"
    caption = [table.title, *([table.watermark] if table.watermark else [])]
    caption += [f"{label}: {sentence}" for label, sentence in result.caption() if label not in _NO_CAPTION]
    caption.append("Second lines: published. Bold: best, or not told apart from it at 5 %")
    lines = [
        f"% {packages}", *(f"% {line}" for line in _provenance(result)), r"\begin{table}[t]", r"\centering",
        rf"\caption{{{_tex('. '.join(text.rstrip('.') for text in caption))}.}}", rf"\label{{tab:{table.name}}}",
        *([r"\resizebox{\textwidth}{!}{%"] if wide else [r"\small"]),
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule",
        " & " + " & ".join(_tex(column.name) for column in table.columns) + r" \\", r"\midrule",
    ]  # fmt: skip
    for row in table.rows:
        cells = [result.cell(row.name, column.name) for column in table.columns]
        ours = [_tex(number.ours(cell)) for cell in cells]
        bold = [rf"\textbf{{{text}}}" if cell.is_best else text for text, cell in zip(ours, cells, strict=True)]
        lines.append(f"{_tex(row.name)} & " + " & ".join(bold) + r" \\")
        theirs = [_tex(number.published(cell)) for cell in cells]
        if any(theirs):
            lines.append(" & " + " & ".join(rf"{{\scriptsize {text}}}" if text else "" for text in theirs) + r" \\")
    rows = _aggregate_rows(result, number)
    lines += [r"\midrule"] * bool(rows)
    lines += [f"{_tex(label)} & " + " & ".join(map(_tex, values)) + r" \\" for label, values in rows]
    lines += [r"\bottomrule", r"\end{tabular}" + ("}" if wide else ""), r"\end{table}"]
    return "\n".join(lines) + "\n"


CSV_COLUMNS = (
    "table", "scale", "row", "column", "runs", "wanted", "diverged", "mean", "std", "low", "high", "best", "values",
    "seeds", "last", "average", "best_evaluation", "verdict", "why", "difference", "p_value", "smallest_difference",
    "published", "published_spread", "spread_kind", "published_seeds", "source", "updates", "dataset_hash", "run_ids",
)  # fmt: skip


def csv_text(result: TableResult) -> str:
    """A line per cell; several values of a cell stand in one field, with spaces between them."""
    table = result.table
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for cell in result.cells.values():
        r, v = cell.cell.reference, cell.verdict
        low, high = cell.interval or (None, None)
        selected = cell.by_selection
        writer.writerow([
            table.name, f"{table.scale:g}", cell.cell.row.name, cell.cell.column.name, len(cell.runs), cell.wanted,
            cell.diverged, cell.mean, cell.std, low, high, cell.is_best, _spaced(cell.values),
            _spaced(run.seed for run in cell.runs),
            *(_mean(selected.get(name)) for name in ("last", "average", "best")),
            v.name, v.why, v.difference, v.p_value, v.smallest_difference, r.mean, r.spread, r.spread_kind, r.seeds,
            r.source, cell.cell.updates, _spaced(dict.fromkeys(run.dataset_hash for run in cell.runs)),
            _spaced(run.run_id for run in cell.runs),
        ])  # fmt: skip
    return text.getvalue()


def to_json(result: TableResult) -> dict[str, Any]:
    """Everything, with the course of every run."""
    table, found = result.table, result.aggregates
    return {
        "table": table.name, "title": table.title, "paper": table.paper, "scale": table.scale,
        "watermark": table.watermark, "caption": dict(result.caption()), "doubts": list(result.doubts),
        "verdicts": result.counts,
        "cells": [
            {
                "row": cell.cell.row.name, "column": cell.cell.column.name, "wanted": cell.wanted,
                "mean": cell.mean, "std": cell.std, "interval": cell.interval, "best": cell.is_best,
                "verdict": _plain(vars(cell.verdict)), "reference": vars(cell.cell.reference),
                "words": cell.cell.words, "selections": _plain(cell.by_selection),
                "runs": [
                    _plain({**vars(run), "offline": {name: list(v) for name, v in run.offline.items()}})
                    for run in cell.runs
                ],
            }
            for cell in result.cells.values()
        ],
        "aggregates": {
            "rows": found.rows, "why_none": found.why_none, "thresholds": found.thresholds,
            "columns": [
                {
                    "column": one.column, "profile": one.profile.tolist(),
                    **{
                        name: _numbers(getattr(one, name))
                        for name in ("iqm", "median", "mean", "optimality_gap", "improvement")
                    },
                }
                for one in found.columns
            ],
        },
        "budget_curves": result.budget_curves,
    }  # fmt: skip


# ---- the page -----------------------------------------------------------------------------------------------------


def page(result: TableResult, mlflow: str) -> Page:
    """The table with a section for every cell that has runs: its runs in MLflow, learning curves, words to train it.

    Args:
        mlflow: address of MLflow's pages.
    """
    table, number = result.table, Numbers(result)
    sections = [
        Section("Table", table=_page_table(result, number)),
        Section("How to read it", [*result.caption(), ("marks", LEGEND)]),
        Section("Verdicts", table=_verdicts(result, number)),
    ]
    if result.aggregates.columns:
        figures = [page_figure("share of runs above a threshold", profiles_figure(result))]
        sections.append(Section("Over all rows", _behind(result), _aggregates(result, number), figures))
    elif any(cell.runs for cell in result.cells.values()):
        sections.append(Section("Over all rows", [("none", result.aggregates.why_none)]))
    if selections := _selections(result, number):
        figures = [page_figure(_BUDGET, budget_figure(result))] if result.budget_curves else []
        sections.append(Section("Selection", table=selections, figures=figures))
    for r, row in enumerate(table.rows):
        for c, column in enumerate(table.columns):
            cell = result.cell(row.name, column.name)
            if cell.runs:
                sections.append(_cell_section(cell, result, number, mlflow, _anchor(r, c)))
    warnings = [*([table.watermark] if table.watermark else []), *result.doubts]
    return Page(
        table.title, f"{table.paper}; table {table.name}", sections, warnings,
        f"REDUCED to {table.scale:g}" if table.watermark else "",
    )  # fmt: skip


_BUDGET = (
    "expected best value of k of the policies behind the table, each tried in the environment; chosen by the episodes "
    "that it is judged by"
)  # fmt: skip


def _page_table(result: TableResult, number: Numbers) -> PageTable:
    table = result.table
    rows = []
    for r, row in enumerate(table.rows):
        cells = [Cell(row.name)]
        for c, column in enumerate(table.columns):
            cell = result.cell(row.name, column.name)
            theirs = number.published(cell)
            text = f"{number.ours(cell)} {MARKS[cell.verdict.name]}".strip()
            mark = "best" if cell.is_best else "muted" if cell.mean is None else ""
            order = cell.mean if cell.mean is not None else cell.cell.reference.mean
            link = f"#{_anchor(r, c)}" if cell.runs else None
            cells.append(Cell(text, link, order, mark, f"published {theirs}" if theirs else ""))
        rows.append(cells)
    rows += [[Cell(label), *(Cell(text) for text in texts)] for label, texts in _aggregate_rows(result, number)]
    return PageTable(["", *(column.name for column in table.columns)], rows, "a number leads to its runs")


def _verdicts(result: TableResult, number: Numbers) -> PageTable:
    rows = []
    for cell in result.cells.values():
        v, r = cell.verdict, cell.cell.reference
        rows.append([
            Cell(cell.cell.row.name), Cell(cell.cell.column.name),
            Cell(f"{v.name}: {v.why}" if v.why else v.name, mark="muted" if v.p_value is None else ""),
            Cell(number.ours(cell), order=cell.mean), Cell(number.published(cell), order=r.mean),
            Cell("" if v.difference is None else number(v.difference), order=v.difference),
            Cell("" if v.interval is None else " to ".join(map(number, v.interval))),
            Cell("" if v.p_value is None else f"{v.p_value:.2g}", order=v.p_value),
            Cell("" if v.smallest_difference is None else number(v.smallest_difference), order=v.smallest_difference),
            Cell(r.source or r.note),
        ])  # fmt: skip
    columns = ["row", "column", "verdict", "ours", "published", "difference", "95 %", "p", "would be seen", "source"]
    caption = "Welch's test, two-sided; 'would be seen': the difference that as many runs show in 4 of 5 cases"
    return PageTable(columns, rows, caption)


def _behind(result: TableResult) -> list[tuple[str, str]]:
    return [("rows", ", ".join(result.aggregates.rows))]


def _aggregates(result: TableResult, number: Numbers) -> PageTable:
    found = result.aggregates.columns
    normalised, last = found[0].optimality_gap is not None, found[-1].column
    rows = []
    for one in found:
        texts = [one.iqm, one.median, one.mean, *([one.optimality_gap] if normalised else [])]
        cells = [Cell(number.estimate(e), order=float(e.value)) for e in texts if e is not None]
        p = one.improvement
        text = "" if p is None else f"{float(p.value):.2f} [{float(p.low):.2f}, {float(p.high):.2f}]"
        rows.append([Cell(one.column), *cells, Cell(text, order=None if p is None else float(p.value))])
    columns = ["column", "IQM", "median", "mean", *(["optimality gap"] if normalised else [])]
    caption = "with 95 % intervals of a bootstrap stratified by row"
    return PageTable([*columns, f"P({last} is better)"], rows, caption)


def _selections(result: TableResult, number: Numbers) -> PageTable | None:
    cells = [cell for cell in result.cells.values() if cell.runs and not cell.diverged]
    names = list(dict.fromkeys(name for cell in cells for name in cell.by_selection))
    if not cells:
        return None
    rows = []
    for cell in cells:
        found = {name: _mean(values) for name, values in cell.by_selection.items()}
        rows.append([
            Cell(cell.cell.row.name), Cell(cell.cell.column.name),
            *(Cell("" if found.get(n) is None else number(found[n]), order=found.get(n)) for n in names),  # type: ignore[arg-type]
        ])  # fmt: skip
    titles = {"best": "best evaluation (too high)", "average": "mean of the last 10"}
    caption = (
        f"means over runs; the table's numbers are: {result.table.protocol.selection}. The best evaluation was chosen "
        "by what it is judged by"
    )
    return PageTable(["row", "column", *(titles.get(n, n) for n in names)], rows, caption)


def _cell_section(cell: CellResult, result: TableResult, number: Numbers, mlflow: str, anchor: str) -> Section:
    r, base = cell.cell.reference, mlflow.rstrip("/")
    ids = [run.run_id for run in cell.runs if run.run_id]
    said: list[tuple[str, str | Cell]] = [
        ("ours", number.ours(cell)),
        *([("95 % interval", " to ".join(map(number, cell.interval)))] if cell.interval else []),
        ("verdict", verdict_sentence(cell, number)),
        ("published", f"{number.published(cell) or 'none'}; {r.source or r.note or 'no source'}"),
        *([("note", r.note)] if r.note and r.source else []),
        *([("train it", f"offsweep train {' '.join(cell.cell.words)}")] if cell.cell.words else []),
    ]
    if len(ids) > 1:
        experiments = sorted({run.experiment_id for run in cell.runs})
        link = f"{base}/#/compare-runs?runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(experiments))}"
        said.append(("in MLflow", Cell("compare its runs", link)))
    rows = [
        [
            Cell(str(run.seed), f"{base}/#/runs/{run.run_id}" if run.run_id else None, run.seed), Cell(run.study),
            Cell(run.outcome), Cell(f"{run.updates[-1]:,}" if run.updates else ""),
            *(Cell(_shown(values[n], number)) for values in cell.by_selection.values()),
            Cell(run.dataset_hash),
        ]
        for n, run in enumerate(cell.runs)
    ]  # fmt: skip
    columns = ["seed", "study", "outcome", "updates", *cell.by_selection, "dataset"]
    figures: list[PageFigure] = []
    if any(len(run.values) > 1 for run in cell.runs):
        figures.append(page_figure("evaluations of every run", curves_figure(cell, result)))
    title = f"{cell.cell.column.name} on {cell.cell.row.name}"
    return Section(
        title, said, PageTable(columns, rows, "a seed leads to its run"), figures, folded=True, anchor=anchor
    )


# ---- small things -------------------------------------------------------------------------------------------------


def _anchor(row: int, column: int) -> str:
    return f"cell-{row}-{column}"


def _shown(value: float, number: Numbers) -> str:
    return number(value) if math.isfinite(value) else "none"


def _mean(values: Sequence[float] | None) -> float | None:
    """None where there is none, or a run diverged."""
    if not values or not all(map(math.isfinite, values)):
        return None
    return float(np.mean(values))


def _spaced(values: Any) -> str:
    return " ".join("" if isinstance(v, float) and not math.isfinite(v) else str(v) for v in values)


def _numbers(found: Estimate | None) -> list[float] | None:
    return None if found is None else [float(found.value), float(found.low), float(found.high)]


def _plain(content: Any) -> Any:
    """Numbers that are none as null, which is what JSON has."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], text)


def _provenance(result: TableResult) -> Iterator[str]:
    """Where numbers are from, for the head of a file."""
    hashes = sorted({run.dataset_hash for cell in result.cells.values() for run in cell.runs if run.dataset_hash})
    yield f"table {result.table.name}, scale {result.table.scale:g}; datasets: {' '.join(hashes) or 'none'}"
    for source in dict.fromkeys(cell.cell.reference.source for cell in result.cells.values()):
        if source:
            yield f"published: {source}"
