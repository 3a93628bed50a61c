"""The grid-world laboratory: the motivating example of VGDF (Xu et al. 2023, Figure 2), in a layout of ours.

The domains are those of `envs.grid_world`, the methods those of `agents.tabular`: a correction of rewards for dynamics
keeps the policy in its room, filters by dynamics or by value do not. Tables are learned in seconds in this process, so
there is no study, and nothing to resume; docs/off_dynamics.md says what is shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from agents.tabular import METHODS, TabularConfig, TabularRun, accepted, train
from envs import grid_world
from envs.grid_world import CELLS, GAMMA, LAYOUT
from orchestrator.labs.common import keep_figure, keep_rows
from sweeps.plots_grid_world import GridFigure, draw_grid_world

ABOUT = "value-guided against dynamics-guided use of source transitions, with tables and exact dynamics"
FIGURE_FILE = "grid_world.png"
SEEDS = 5


@dataclass(frozen=True)
class LabRun:
    """One run of the laboratory at its end."""

    method: str
    seed: int
    steps_to_goal: float  # of its greedy policy in the target; not a number: it does not get there
    solved_from: float  # steps in the source from which on it always gets there; not a number: never
    start_value: float  # max_a Q at the start
    true_value: float  # of the greedy policy there, in the target
    harmless_accepted: float  # share of the 4 actions that differ harmlessly that it learns from at its end
    harmful_accepted: float  # likewise of the 2 at the shortcut


def run(workdir: str, seeds: int | None, updates: int | None, console: Console) -> list[LabRun]:
    """Learn, print the table, and leave lab.csv and the figure in `<workdir>/labs/grid-world`.

    Args:
        updates: steps in the source; None: 500,000, the paper's.
    """
    config = TabularConfig() if updates is None else TabularConfig(steps=updates)
    learned = [train(method, seed, config) for method in METHODS for seed in range(seeds or SEEDS)]
    rows = [_row(one, config) for one in learned]
    folder = Path(workdir) / "labs" / "grid-world"
    folder.mkdir(parents=True, exist_ok=True)
    keep_rows(folder, rows, LabRun, None)
    console.print(_table(rows, config))
    keep_figure(folder / FIGURE_FILE, draw_grid_world(_figure(learned)), None, console)
    return rows


def _row(learned: TabularRun, config: TabularConfig) -> LabRun:
    steps = learned.steps_to_goal[-1]
    never = [t for t, found in zip(learned.steps, learned.steps_to_goal, strict=True) if found is None]
    since = math.nan if steps is None else float(next(t for t in learned.steps if t > max(never, default=0)))
    keep, differ = accepted(learned.method, learned.q, config), grid_world.mismatches()
    harmful = differ & (grid_world.value_gaps(_target_values()) > config.threshold)
    return LabRun(
        learned.method, learned.seed, math.nan if steps is None else float(steps), since,
        float(learned.q[grid_world.START].max()), 0.0 if steps is None else GAMMA ** (steps - 1),
        float(keep[differ & ~harmful].mean()), float(keep[harmful].mean()),
    )  # fmt: skip


def _target_values() -> NDArray[np.float64]:
    values: NDArray[np.float64] = grid_world.domain("target").optimal_q().max(axis=1)
    return values


def _table(rows: Sequence[LabRun], config: TabularConfig) -> Table:
    best = _target_values()[grid_world.START]
    title = (
        f"grid world, a layout of ours: {len({row.seed for row in rows})} seeds, {config.steps:,} steps in the source,"
        f" {config.steps // config.updates_per_target_step:,} in the target; value of the start {best:.3f}"
    )
    table = Table(title=title)
    columns = ("method", "reach the goal", "steps to it", "always from step", "Q(start)", "true", "4 doors", "shortcut")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        there = [row for row in mine if not math.isnan(row.steps_to_goal)]
        table.add_row(
            method, f"{len(there)} of {len(mine)}",
            f"{statistics.median(row.steps_to_goal for row in there):g}" if there else "",
            f"{statistics.median(row.solved_from for row in there):,.0f}" if there else "",
            f"{statistics.fmean(row.start_value for row in mine):.3f}",
            f"{statistics.fmean(row.true_value for row in mine):.3f}",
            *(_share(statistics.fmean(getattr(row, what) for row in mine)) for what in
              ("harmless_accepted", "harmful_accepted")),
        )  # fmt: skip
    return table


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"


def _figure(learned: Sequence[TabularRun]) -> GridFigure:
    first = {method: next(one for one in learned if one.method == method) for method in METHODS}
    cells = [CELLS[state] for state, _ in zip(*np.nonzero(grid_world.mismatches()), strict=True)]
    success = {}
    for method in first:
        reached = [[found is not None for found in one.steps_to_goal] for one in learned if one.method == method]
        success[method] = [statistics.fmean(at_once) for at_once in zip(*reached, strict=True)]
    shown = ("DARC", "value filter")
    values = {"V* of the target": _grid(_target_values())}
    values |= {f"max_a Q, {name}": _grid(first[name].q.max(axis=1)) for name in ("mix", *shown)}
    visits = {f"visits in the source, {name}": _grid(_shares(first[name].source_visits)) for name in shown}
    visits["visits in the target, value filter"] = _grid(_shares(first["value filter"].target_visits))
    row, column = grid_world.SHORTCUT
    return GridFigure(
        "Grid world after VGDF's example, in a layout of ours. Dot: start; square: goal; circles: doors that differ;"
        " bar: a shortcut that only the source has",
        CELLS[grid_world.START], CELLS[grid_world.GOAL],
        [cell for cell in cells if cell[0] != row], (row, column), values, visits, learned[0].steps, success,
    )  # fmt: skip


def _shares(visits: NDArray[np.int64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = visits / visits.sum()
    return shares


def _grid(of_states: NDArray[Any]) -> NDArray[np.float64]:
    grid = np.full((len(LAYOUT), len(LAYOUT[0])), np.nan)
    grid[tuple(np.array(CELLS).T)] = of_states
    return grid
