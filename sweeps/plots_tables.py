"""Figures of a table: learning curves behind a cell, performance profiles, what policies tried online buy."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from sweeps.plots import new_figure
from sweeps.table_results import CellResult, TableResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves_figure(cell: CellResult, result: TableResult) -> Figure:
    """Every run's evaluations, their mean where all runs have one, and the published value with its spread unless the
    table is reduced.

    Args:
        cell: with at least one run that was evaluated.
    """
    table = result.table
    figure = new_figure(6.0, 3.0)
    axes = figure.add_subplot()
    runs = [run for run in cell.runs if run.values]
    for run in runs:
        axes.plot(run.updates, run.values, color="#2a6f97", alpha=0.35, linewidth=0.9)
    common = sorted(set.intersection(*(set(run.updates) for run in runs)))
    means = [statistics.fmean(run.values[run.updates.index(u)] for run in runs) for u in common]
    axes.plot(common, means, color="#2a6f97", linewidth=2, label=f"mean of {len(runs)} runs")
    reference = cell.cell.reference
    if reference.mean is not None and not table.watermark:
        axes.axhline(reference.mean, color="#c1121f", linestyle="--", linewidth=1.2, label="published")
        if reference.spread is not None:
            low, high = reference.mean - reference.spread, reference.mean + reference.spread
            axes.axhspan(low, high, color="#c1121f", alpha=0.12, linewidth=0)
    axes.set_title(_title(f"{cell.cell.column.name} on {cell.cell.row.name}", result))
    axes.set_xlabel("updates")
    axes.set_ylabel(table.metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def profiles_figure(result: TableResult) -> Figure:
    """Share of each column's runs above every threshold.

    Args:
        result: with aggregates.
    """
    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    found = result.aggregates
    for number, one in enumerate(found.columns):
        axes.plot(found.thresholds, one.profile, color=f"C{number % 10}", label=one.column)
    axes.set_title(_title("performance profiles", result))
    axes.set_xlabel(f"{result.table.metric} (threshold)")
    axes.set_ylabel("share of runs above")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def budget_figure(result: TableResult) -> Figure:
    """Expected best value of k policies that are tried in the environment, by column.

    Args:
        result: with budget curves.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(result.budget_curves.items()):
        k, values = zip(*curve, strict=True)
        together = name == "all columns"
        axes.plot(
            k, values, marker="o", markersize=3, label=name, linestyle="--" if together else "-",
            color="black" if together else f"C{number % 10}",
        )  # fmt: skip
    axes.set_title(_title("what policies tried online buy", result))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("policies tried in the environment")
    axes.set_ylabel(f"expected best {result.table.metric}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _title(text: str, result: TableResult) -> str:
    return f"{text} (REDUCED: {result.table.scale:g} of the updates)" if result.table.watermark else text
