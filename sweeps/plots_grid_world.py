"""The figure of the grid-world laboratory. Plain numbers in, a figure out.

Shapes: X, Y cells of the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#555555", "#9467bd", "#e09f3e", "#c1121f", "#2e7d32", "#2a6f97", "#5fa8d3")


@dataclass(frozen=True)
class GridFigure:
    """Everything that the figure shows. Maps are `(X, Y)` arrays, not a number in walls."""

    title: str
    start: tuple[int, int]
    goal: tuple[int, int]
    doors: Sequence[tuple[int, int]]  # where the domains differ and values hardly do
    shortcut: tuple[int, int]
    values: Mapping[str, Any]  # heading -> largest value of each cell
    visits: Mapping[str, Any]  # heading -> share of the steps in each cell
    steps: Sequence[int]  # of the evaluations
    success: Mapping[str, Sequence[float]]  # method -> share of the seeds whose policy reaches the goal


def draw_grid_world(content: GridFigure) -> Figure:
    """Values and visits as maps, then when which method reaches the goal of the target."""
    figure = new_figure(17.0, 8.5)
    figure.suptitle(content.title)
    places = figure.subplots(2, 4).ravel()
    maps = [*((name, grid, "viridis") for name, grid in content.values.items())]
    maps += [(name, grid, "Reds") for name, grid in content.visits.items()]
    for axes, (name, grid, colors) in zip(places[:-1], maps, strict=False):
        _map(axes, content, name, grid, colors)
    axes = places[-1]
    for (method, shares), color in zip(content.success.items(), _COLORS, strict=False):
        axes.plot(content.steps, shares, label=method, color=color)
    axes.set(title="share of the seeds whose policy reaches the goal", xlabel="steps in the source", ylim=(-0.03, 1.03))
    axes.legend(fontsize=7)
    return figure


def _map(axes: Axes, content: GridFigure, name: str, grid: Any, colors: str) -> None:
    image = axes.imshow(grid, cmap=colors, vmin=0)
    axes.set_facecolor("black")  # walls are transparent
    axes.figure.colorbar(image, ax=axes, shrink=0.6)
    for cell, mark, size in ((content.start, "o", 5), (content.goal, "s", 7)):
        axes.plot(cell[1], cell[0], mark, color="#c1121f" if mark == "o" else "#2e7d32", markersize=size)
    for cell in content.doors:
        axes.plot(cell[1], cell[0], "o", markersize=11, markerfacecolor="none", markeredgecolor="#e09f3e")
    row, column = content.shortcut
    axes.plot([column - 0.5] * 2, [row - 0.5, row + 0.5], color="#c1121f", lw=3)
    axes.set(title=name, xticks=[], yticks=[])
