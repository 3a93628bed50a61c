"""The refrigerator laboratory: does MOREC's transition filter (Luo et al. 2024) mend what a model never saw?

Every trial of the study is one repetition with an ensemble and a dynamics reward of its own. What they are worth is
measured against the simulator by `agents.refrigerator`; the policies that are trained on the way, for a few updates,
are a by-product. docs/morec.md says what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from agents.dynamics import Ensemble
from agents.dynamics_reward import DynamicsReward
from agents.dynamics_stage import ensemble_of
from agents.method import TrainingData, load_method
from agents.refrigerator import (
    CONTROLLERS,
    DRAW,
    FILTERED,
    MEAN,
    NEAREST,
    SURVIVORS,
    Measured,
    grid,
    measure,
)
from agents.transition_filter import filtering_reward
from envs.dataset import Dataset
from envs.registry import load_dataset
from orchestrator.artifacts import ArtifactStore, stage_keys
from orchestrator.config import Config, run_config
from orchestrator.labs.common import keep_figure, keep_rows, read_rows
from orchestrator.learner import action_bounds
from orchestrator.spool import RunSpool
from sweeps.plots_refrigerator import ControllerCourse, Curve, Plane, RefrigeratorFigure, draw_refrigerator
from sweeps.statistics import Ratio, paired_ratio
from sweeps.study import Study

ABOUT = "whether choosing among a model's predictions by a dynamics reward mends what it never saw (MOREC's toy task)"
FIGURE_FILE, MAP_FILE = "refrigerator.png", "map.csv"
FIRST_SEED = 6  # those before it are the ones that settings were chosen with
WAYS = (DRAW, MEAN, FILTERED, NEAREST)


@dataclass(frozen=True)
class LabRow:
    """Rollouts of one repetition under one controller, stepped in one way (see `agents.refrigerator.measure`)."""

    seed: int
    controller: str
    way: str
    rmse: float  # °C, over all steps and rollouts
    share: float  # of the rollouts that are left at the last step
    rmse_by_step: tuple[float, ...]
    share_by_step: tuple[float, ...]


@dataclass(frozen=True)
class MapRow:
    """One-step errors of one repetition, stepped in one way."""

    seed: int
    way: str
    with_data: float  # mean |error| in °C over the points of the map that have rows of the dataset
    without_data: float  # over the others


def options(seeds: int | None, updates: int | None) -> dict[str, Any]:
    """What changes of the study (see `orchestrator.labs`)."""
    changed: dict[str, Any] = {}
    if seeds is not None:
        drawn = range(FIRST_SEED, FIRST_SEED + seeds)
        trials = [{"method.dynamics.seed": seed, "method.dynamics_reward.seed": seed} for seed in drawn]
        changed["study"] = {"trials": trials}
    if updates is not None:
        changed["method"] = {"num_updates": updates, "updates_per_epoch": math.gcd(updates, 100)}
    return changed


def show(config: Config, study: Study, spool: RunSpool, console: Console) -> list[LabRow]:
    """The tables, also as lab.csv and map.csv, and the figure of a study whose trials have ended; all become artifacts.

    Repetitions whose stages could not be built are left out, and counted in a line of their own.
    """
    dataset = load_dataset(config.dataset, Path(config.workdir))
    data = TrainingData.from_dataset(dataset, *action_bounds(dataset.env_id))
    found: dict[int, Measured] = {}
    missing = 0
    for record in study.trials():
        one = run_config(config, record.active, config.seed)
        stages = _stages(one, dataset)
        if stages is None:
            missing += 1
            continue
        seed = one.method.dynamics.seed
        console.print(f"measuring repetition {seed}", highlight=False)
        ensemble, reward = stages
        found[seed] = measure(ensemble, reward, one.method.filter, data, seed)
    rows = [row for seed, measured in found.items() for row in lab_rows(seed, measured)]
    maps = [
        MapRow(seed, way, measured.map_error(way, True), measured.map_error(way, False))
        for seed, measured in found.items()
        for way in WAYS
    ]
    keep_rows(study.folder, rows, LabRow, spool)
    keep_rows(study.folder, maps, MapRow, spool, MAP_FILE)
    if missing:
        console.print(f"[yellow]{missing} repetitions have no stages and are left out[/yellow]", highlight=False)
    if found:
        _print_tables(console, rows, maps, found, config)
        figure = draw_refrigerator(_figure(found, config))
        keep_figure(study.folder / FIGURE_FILE, figure, spool, console)
    return rows


def lab_rows(seed: int, measured: Measured) -> list[LabRow]:
    """A repetition's rows of lab.csv."""
    return [
        LabRow(
            seed, controller, way, errors.rmse, float(errors.share_T[-1]), tuple(errors.rmse_T.tolist()),
            tuple(errors.share_T.tolist()),
        )
        for (controller, way), errors in measured.errors.items()
    ]  # fmt: skip


def table_values(folder: Path, row: str, column: str) -> dict[int, float]:
    """Errors in °C of the rollouts under a controller (row), stepped in one way (column)."""
    rows = read_rows(folder, LabRow)
    return {one.seed: one.rmse for one in rows if (one.controller, one.way) == (row, column)}


def ratios(rows: Sequence[LabRow], way: str, reference: str) -> dict[str, Ratio]:
    """The error of one way of stepping over another's, paired by repetition, by controller. Of the survivors of the
    filter no ratio is made: they are other rollouts."""
    found = {}
    for controller in dict.fromkeys(row.controller for row in rows):
        mine, others = (
            {row.seed: row.rmse for row in rows if (row.controller, row.way) == (controller, w)}
            for w in (way, reference)
        )
        found[controller] = paired_ratio(list(mine.values()), [others[seed] for seed in mine])
    return found


def _stages(config: Config, dataset: Dataset) -> tuple[Ensemble, DynamicsReward] | None:
    """The ensemble and the dynamics reward of a run; None if one was not built."""
    store = ArtifactStore(Path(config.workdir) / "artifacts")
    stages = load_method(config.method_name).stages(config.method)
    keys = stage_keys(stages, dataset.content_hash)
    if not all(store.exists(stage.kind, keys[name]) for name, stage in stages.items()):
        return None
    ensemble, reward = (store.load(stages[name].kind, keys[name]) for name in ("dynamics", "dynamics_reward"))
    return ensemble_of(ensemble, config.method.dynamics), filtering_reward(reward, config.method.filter)


# ---- how it is shown --------------------------------------------------------------------------------------------


def _print_tables(
    console: Console, rows: Sequence[LabRow], maps: Sequence[MapRow], found: Mapping[int, Measured], config: Config
) -> None:
    console.print(_rollout_table(rows, config))
    console.print(_map_table(maps))
    for place, curve in enumerate(next(iter(found.values())).curves):
        offsets = [round(measured.curves[place].peak, 1) + 0.0 for measured in found.values()]
        peaks = ", ".join(f"{offset:+.1f}" for offset in offsets)
        console.print(
            f"dynamics reward at {curve.temperature:g} °C and power {curve.power:g}, far from the data: highest "
            f"{peaks} °C from the true next temperature (by repetition)", highlight=False, soft_wrap=True,
        )  # fmt: skip


def _rollout_table(rows: Sequence[LabRow], config: Config) -> Table:
    steps = len(rows[0].rmse_by_step)
    table = Table(
        title=f"refrigerator: RMSE in °C against the simulator over rollouts of {steps} steps, mean of "
        f"{len({row.seed for row in rows})} repetitions, and the filtered error over each of the two without a filter; "
        "intervals of 95 % over the repetitions, in square brackets the bootstrap's, in round ones Student's"
    )
    columns = (*WAYS, f"over {DRAW}", f"over {MEAN}", SURVIVORS, "left at the end")
    for column in ("controller", *columns):
        table.add_column(column, justify="left" if column == "controller" else "right")
    against = [ratios(rows, FILTERED, reference) for reference in (DRAW, MEAN)]
    for controller in dict.fromkeys(row.controller for row in rows):
        by_way = {w: [r for r in rows if (r.controller, r.way) == (controller, w)] for w in (*WAYS, SURVIVORS)}
        known = {w: [r.rmse for r in mine if math.isfinite(r.rmse)] for w, mine in by_way.items()}
        means = {w: sum(values) / len(values) if values else math.nan for w, values in known.items()}
        left = sum(r.share for r in by_way[SURVIVORS]) / len(by_way[SURVIVORS])
        table.add_row(
            controller, *(f"{means[w]:.3f}" for w in WAYS), *(show_ratio(r[controller]) for r in against),
            "" if math.isnan(means[SURVIVORS]) else f"{means[SURVIVORS]:.3f}", f"{100 * left:.0f} %",
        )  # fmt: skip
    return table


def _map_table(maps: Sequence[MapRow]) -> Table:
    temperatures, powers = grid()
    table = Table(
        title=f"mean |one-step error| in °C, {temperatures[0]:g} to {temperatures[-1]:g} °C and powers {powers[0]:g} "
        f"to {powers[-1]:g}, and over {DRAW}'s"
    )
    for column in ("way", "where there is data", "where there is none", "ratio with data", "ratio without"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in dict.fromkeys(row.way for row in maps):
        mine, drawn = ([row for row in maps if row.way == w] for w in (way, DRAW))
        cells = []
        for where in ("with_data", "without_data"):
            values, references = ([getattr(row, where) for row in group] for group in (mine, drawn))
            cells.append((sum(values) / len(values), paired_ratio(values, references)))
        shown = ["" if way == DRAW else show_ratio(ratio) for _, ratio in cells]
        table.add_row(way, *(f"{mean:.3f}" for mean, _ in cells), *shown)
    return table


def show_ratio(ratio: Ratio) -> str:
    """A ratio with both intervals; says so where the wider one does not lie below 1."""
    if math.isnan(ratio.student[0]):
        return f"{ratio.mean:.2f}"
    (low, high), (wide_low, wide_high) = ratio.bootstrap, ratio.student
    words = "" if ratio.below_one else " no gain"
    return f"{ratio.mean:.2f}{words}\n[{low:.2f}, {high:.2f}]\n({wide_low:.2f}, {wide_high:.2f})"


def _figure(found: Mapping[int, Measured], config: Config) -> RefrigeratorFigure:
    every = list(found.values())
    first = every[0]
    temperatures, powers = grid()

    def mean(values: Sequence[Any]) -> Any:
        return np.mean([v.numpy() for v in values], 0)

    plane = Plane(
        temperatures.tolist(), powers.tolist(), first.support.numpy(),
        {way: mean([m.maps[way] for m in every]) for way in WAYS},
        mean([m.rewards.of_truth for m in every]), mean([m.rewards.of_model for m in every]),
    )  # fmt: skip
    courses = []
    for controller in CONTROLLERS:
        truth, name = first.truths[controller.name], controller.name
        errors = {w: np.stack([m.errors[name, w].rmse_T.numpy() for m in every]) for w in (*WAYS, SURVIVORS)}
        share = np.stack([m.errors[name, SURVIVORS].share_T.numpy() for m in every])
        visited = truth.temperatures_TB[:-1, 0].tolist(), truth.powers_TB[:, 0].tolist()
        totals = {w: [m.errors[name, w].rmse for m in every] for w in errors}
        courses.append(ControllerCourse(name, visited, errors, totals, share))
    curves = [
        Curve(
            f"{curve.temperature:g} °C, power {curve.power:g}", curve.offsets_C.tolist(),
            np.stack([m.curves[i].rewards_C.numpy() for m in every]),
        )
        for i, curve in enumerate(first.curves)
    ]  # fmt: skip
    title = f"A refrigerator's model off its data, with and without MOREC's filter ({len(every)} repetitions)"
    return RefrigeratorFigure(title, (DRAW, FILTERED), plane, courses, curves, config.method.filter.threshold)
