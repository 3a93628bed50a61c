"""The studies that train what a table misses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import UserError
from orchestrator.config import Config, load_config, nested, run_config, settings_hash
from orchestrator.hashing import digest
from orchestrator.table_lookup import CellRuns, Key, slug
from sweeps.tables import Cell, Table

STUDIES = Path(__file__).parent.parent / "sweeps" / "studies"


@dataclass(frozen=True)
class PlannedCell:
    """A cell that runs fill."""

    cell: Cell
    config: Config  # of all of its runs
    runs: CellRuns

    @property
    def key(self) -> Key:
        return self.runs.key


@dataclass(frozen=True)
class TableStudy:
    """A study that trains missing runs: cells of one dataset and method, which share stages and may share packs."""

    config: Config
    seeds: dict[Key, list[int]]
    runs: int  # a search's without those of its confirm stage

    @property
    def name(self) -> str:
        return self.config.study.name


def planned_cells(table: Table, workdir: Path, words: Sequence[str] = ()) -> list[PlannedCell]:
    """The cells that runs fill, each with its configuration.

    Args:
        words: of compute.* and tracking_uri.

    Raises:
        UserError: settings that `offsweep train` would refuse; it names the cell.
    """
    found = []
    for cell in table.cells():
        if not cell.trained:
            continue
        where, hashes, search = {"workdir": str(workdir)}, dict[int, str](), ""
        try:
            if cell.column.study:
                search = f"{_prefix(table, cell)}-{digest([cell.column.study, cell.words])[:6]}"
                confirm = {"study": {"name": search, "confirm": {"num_seeds": table.protocol.seeds}}}
                given = [word for word in cell.words if word.partition("=")[0] not in _SEEDS]
                config = load_config([where, STUDIES / f"{cell.column.study}.yaml", confirm], [*given, *words])
                hashes = dict.fromkeys(range(table.protocol.seeds), "")
            else:
                config = load_config([where], [*cell.words, *words])
                hashes = {seed: settings_hash(run_config(config, {}, seed)) for seed in config.seeds}
        except UserError as error:
            raise UserError(f"{cell.column.name} on {cell.row.name}: {error}") from None
        runs = CellRuns(cell.row.name, cell.column.name, config.dataset, hashes, search)
        found.append(PlannedCell(cell, config, runs))
    return found


def missing_studies(
    table: Table, planned: Sequence[PlannedCell], missing: Mapping[Key, Sequence[int]], workdir: Path,
    words: Sequence[str] = (),
) -> list[TableStudy]:  # fmt: skip
    """The studies that train what is missing, in the order of the table: one for the cells of a dataset and method that
    miss the same seeds and agree in all that trials of a study must agree in; searches by themselves."""
    groups: dict[str, tuple[list[PlannedCell], range]] = {}
    searches = [
        TableStudy(one.config, {one.key: list(missing[one.key])}, one.config.num_seeds * one.config.study.num_trials)
        for one in planned
        if one.runs.search and missing.get(one.key)
    ]
    twins: dict[str, list[Key]] = {}  # cells that are filled by the same runs, such as two readings of them
    for one in planned:
        if one.runs.search or not missing.get(one.key):
            continue
        same = twins.setdefault(digest([one.runs.dataset, one.runs.hashes]), [])
        same.append(one.key)
        if len(same) > 1:
            continue
        for seeds in _ranges(missing.get(one.key, [])):
            method = {k: one.cell.settings.get(f"method.{k}") for k in _COMMON}
            rest = {k: v for k, v in one.cell.settings.items() if not k.startswith("method.") and k not in _SEEDS}
            key = digest([one.config.method_name, method, rest, seeds.start, seeds.stop])
            groups.setdefault(key, ([], seeds))[0].append(one)
    found = []
    for cells, seeds in groups.values():
        for together in (cells, *([one] for one in cells)):
            config = _config(table, together, seeds, workdir, words)
            if config is not None:
                keys = [key for one in together for same in twins.values() if one.key in same for key in same]
                found.append(TableStudy(config, {key: list(seeds) for key in keys}, len(together) * len(seeds)))
                if len(together) == len(cells):
                    break
    return found + searches


# of a method's settings: what the trials of a study agree in
_COMMON = ("variant", "target", "num_updates", "updates_per_epoch")
_SEEDS = ("seed", "num_seeds")


def _config(
    table: Table, cells: Sequence[PlannedCell], seeds: range, workdir: Path, words: Sequence[str]
) -> Config | None:
    """Of a study whose trials are these cells; None where trials would not be what the cells are."""
    first, *others = [one.cell.settings for one in cells]
    common = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    common |= {"seed": seeds.start, "num_seeds": len(seeds)}
    trials = [{k: v for k, v in one.cell.settings.items() if k not in common} for one in cells]
    data = [[one.runs.dataset, one.runs.hashes] for one in cells]
    study: dict[str, Any] = {"name": _free(f"{_prefix(table, cells[0].cell)}-{digest(data)[:6]}", workdir)}
    if others:
        study["trials"] = trials
    try:
        blocks = nested({"method.name" if key == "method" else key: value for key, value in common.items()})
        config = load_config([{"workdir": str(workdir), "study": study, **blocks}], list(words))
        same = all(
            settings_hash(run_config(config, params, seed)) == one.runs.hashes[seed]
            for one, params in zip(cells, trials, strict=True)
            for seed in seeds
        )
    except UserError:
        if not others:
            raise
        return None
    if not same and not others:
        raise UserError(f"{cells[0].cell.column.name} on {cells[0].cell.row.name} cannot be trained by a study")
    return config if same else None


def _prefix(table: Table, cell: Cell) -> str:
    """Of the names of a cell's studies."""
    what = cell.column.name if cell.column.study else cell.settings["method"]
    words = (re.sub("[^A-Za-z0-9._]+", "-", name).strip("-") for name in (cell.row.name, what))
    return "-".join([slug(table), *words])


def _free(name: str, workdir: Path) -> str:
    """A study of a table that failed is begun anew under another name."""
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return next(n for n in names if not (workdir / "studies" / n).exists())


def _ranges(seeds: Sequence[int]) -> Iterator[range]:
    """Seeds as runs of consecutive ones, which is what a study has."""
    start = None
    for seed in sorted(seeds):
        if start is None:
            start = seed
        if seed + 1 not in seeds:
            yield range(start, seed + 1)
            start = None
