"""Paper tables: which runs fill which cell, and the published values beside them.

A table is a YAML file (`sweeps/tables/`): rows, which are datasets, columns, which are methods with their settings, the
protocol, and the name of its references (`sweeps/references/`). Nothing is started here: a cell says with which words
`offsweep train` trains its runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from sweeps.errors import TableError, suggestion
from sweeps.table_references import Reference, References, load_references
from sweeps.table_statistics import SELECTIONS

_FOLDER = Path(__file__).parent / "tables"
_REFERENCES = Path(__file__).parent / "references"
_STUDIES = Path(__file__).parent / "studies"
AVERAGED = 10  # evaluations behind the selection `average`

# Settings counted in updates, beside method.num_updates: a reduced table has fewer of them alike. Columns state those
# of their method, since what is not stated here cannot be reduced.
COUNTED_IN_UPDATES = (
    "method.start_gate",
    "method.warm_up",
    "method.source_updates",
    "method.cloning_updates",
    "method.dynamics.patience_decay",
    "method.synthetic.refresh_every",
    "method.diffusion.num_updates",
)
# what the table itself says to `offsweep train`
_OWN = ("seed", "num_seeds", "method.num_updates", "method.updates_per_epoch", "evaluation.every_epochs",
        "evaluation.episodes", "workdir", "tracking_uri")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A dataset, or a pair of domains."""

    name: str  # as in the references
    dataset: str = ""
    values: dict[str, str] = field(default_factory=dict)  # what `{key}` in a column's settings stands for
    lab: str = ""  # its cells are measured by `offsweep lab <lab>`, not trained one by one
    reads: str = ""  # of a lab: what is read of its results
    not_comparable: str = ""  # why its cells cannot be held against the references


@dataclass(frozen=True)
class Column:
    """A method with its settings."""

    name: str  # as in the references
    settings: dict[str, Any] = field(default_factory=dict)  # as `offsweep train` takes them: {configuration key: value}
    updates: int | None = None  # of each run, at scale 1; None: the table's
    updates_per_epoch: int | None = None  # None: the table's
    read_at: int | None = None  # the evaluation that is read, in updates at scale 1; None: as the protocol selects
    study: str = ""  # the settings are searched by this study of `sweeps/studies/`; the runs are its confirmed best
    reads: str = ""  # of a lab: what is read of its results
    reference_only: str = ""  # why no runs fill it here, such as a method that is not implemented
    not_comparable: str = ""


@dataclass(frozen=True)
class Protocol:
    """How runs are trained and which number is taken of each."""

    seeds: int  # runs per cell: seeds first_seed, first_seed + 1, ...
    updates: int  # of each run, at scale 1
    first_seed: int = 0
    updates_per_epoch: int = 1000
    episodes: int = 10  # per evaluation
    evaluations: int = 100  # over a run, evenly, as far as it has epochs; `last` and `average` take the last ones
    selection: str = "last"  # last | average (of the last 10 evaluations) | best (by evaluation: too high)


@dataclass(frozen=True)
class CellOverride:
    """What a single cell has differently."""

    row: str
    column: str
    settings: dict[str, Any] = field(default_factory=dict)
    not_comparable: str = ""


@dataclass(frozen=True)
class Cell:
    """A row's crossing with a column."""

    row: Row
    column: Column
    settings: dict[str, Any]  # as `offsweep train` takes them; none where runs are a lab's or there are none
    updates: int  # of each of its runs, at the table's scale
    read_at: int | None  # updates up to which their evaluations count, at the table's scale; None: all
    reference: Reference
    not_comparable: str  # why it cannot be held against the reference, or empty

    @property
    def trained(self) -> bool:
        """Whether runs of its own fill it."""
        return bool(self.settings)

    @property
    def words(self) -> list[str]:
        """Behind `offsweep train`."""
        return [f"{key}={_text(value)}" for key, value in self.settings.items()]


@dataclass(frozen=True)
class Table:
    """A paper's results table."""

    name: str
    title: str
    paper: str
    metric: str  # what a cell holds: score (D4RL-normalised), return, or words
    unit: str
    rows: list[Row]
    columns: list[Column]
    protocol: Protocol
    references: References
    cells_differ: dict[tuple[str, str], CellOverride] = field(default_factory=dict)
    higher_is_better: bool = True
    note: str = ""  # what is to be known before its numbers are believed
    tuning: str = ""  # how the settings were found: part of the caption
    scale: float = 1.0  # share of the updates that is trained

    @property
    def watermark(self) -> str:
        """What every output of a reduced table must say; empty for a whole one."""
        if self.scale == 1:
            return ""
        return f"REDUCED: {self.scale:g} of the updates; not to be read beside the published values"

    def updates(self, column: Column) -> int:
        """Updates of a run: whole epochs, at least one, and all that are counted in them shrink alike."""
        return self._shrunk(self._full_updates(column), self._epoch(column))

    def cell(self, row_name: str, column_name: str) -> Cell:
        """A cell by the names of its row and column.

        Raises:
            TableError: there is no such row or column.
        """
        row = _named(self.rows, row_name, "row", self.name)
        column = _named(self.columns, column_name, "column", self.name)
        override = self.cells_differ.get((row.name, column.name), CellOverride(row.name, column.name))
        reference = self.references.get((row.name, column.name), Reference(note="no reference is given"))
        reasons = (self.watermark, override.not_comparable, row.not_comparable, column.not_comparable)
        settings = {}
        if not (row.lab or column.reference_only):
            settings = self._settings(row, column, override)
        why = next((reason for reason in reasons if reason), "")
        read_at = None if column.read_at is None else self._shrunk(column.read_at, self._epoch(column))
        return Cell(row, column, settings, self.updates(column), read_at, reference, why)

    def cells(self) -> Iterator[Cell]:
        """All cells, row by row."""
        for row in self.rows:
            for column in self.columns:
                yield self.cell(row.name, column.name)

    def _full_updates(self, column: Column) -> int:
        return column.updates or self.protocol.updates

    def _epoch(self, column: Column) -> int:
        return column.updates_per_epoch or self.protocol.updates_per_epoch

    def _shrunk(self, count: int, unit: int) -> int:
        """At the table's scale, in multiples of a unit of which the count is one."""
        if self.scale == 1 or not count:
            return count
        unit = unit if count % unit == 0 else 1
        return unit * max(1, round(count * self.scale / unit))

    def _settings(self, row: Row, column: Column, override: CellOverride) -> dict[str, Any]:
        epoch, p = self._epoch(column), self.protocol
        updates = self.updates(column)
        settings = {"dataset": row.dataset, **column.settings, **override.settings}
        for key in COUNTED_IN_UPDATES:
            if key in settings:
                settings[key] = self._shrunk(settings[key], epoch)
        settings |= {
            "method.num_updates": updates, "method.updates_per_epoch": epoch, "seed": p.first_seed,
            "num_seeds": p.seeds, "evaluation.episodes": p.episodes,
            "evaluation.every_epochs": max(1, updates // epoch // p.evaluations),
        }  # fmt: skip
        return {key: _filled(value, row, column) for key, value in settings.items()}


def known_tables() -> list[str]:
    """The names of the tables that are shipped."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_table(name_or_path: str | Path) -> Table:
    """A shipped table by its name, or one from a YAML file, whose references lie beside it or are shipped.

    Raises:
        TableError: there is none, or the first thing in it or in its references that makes no sense.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if str(name_or_path) not in known_tables():
            raise TableError(
                f"Unknown table '{name_or_path}'; {suggestion(str(name_or_path), known_tables())}. A table of your own "
                "is given by its file, TABLE.yaml."
            )
        path = _FOLDER / f"{name_or_path}.yaml"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise TableError(f"Cannot read the table in {path}: {error.strerror}.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise TableError(f"Cannot read the table in {path}: {' '.join(str(error).split())}.") from None
    return _table(content, path)


def scaled(table: Table, scale: float) -> Table:
    """The same table with a share of its updates, and of what is counted in updates; its outputs say so.

    Args:
        scale: above 0, at most 1, of the table's full updates whatever its scale was before.

    Raises:
        TableError: another scale, or one that leaves fewer evaluations than the table averages.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 1:
        raise TableError(f"The scale of a table must be above 0 and at most 1, not {scale!r}.")
    smaller = replace(table, scale=float(scale))
    if table.protocol.selection == "average":
        for column in table.columns:
            epochs = smaller.updates(column) // smaller._epoch(column)
            if not column.reference_only and min(epochs, table.protocol.evaluations) < AVERAGED:
                raise TableError(
                    f"Table {table.name} averages the last {AVERAGED} evaluations, but at the scale {scale:g} "
                    f"{column.name} has only {epochs} epochs to evaluate; choose a greater scale."
                )
    return smaller


def with_references(table: Table, references: References) -> Table:
    """The table with more references, which go over those that it has.

    Raises:
        TableError: one is of no cell of the table.
    """
    _check_references(table.name, table.rows, table.columns, references, "the references")
    return replace(table, references={**table.references, **references})


def search_trials(study: str) -> int:
    """How many trials a shipped search has."""
    content: dict[str, Any] = yaml.safe_load((_STUDIES / f"{study}.yaml").read_text(encoding="utf-8"))
    return int(content.get("study", {}).get("num_trials", 1))


class _Loader(yaml.SafeLoader):
    """Refuses keys that stand twice in a block, of which YAML keeps the last without a word."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice in a block", node.start_mark)
    return dict(zip(keys, [loader.construct_object(v, deep=True) for _, v in node.value], strict=True))  # type: ignore[no-untyped-call]


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)

_TABLE_KEYS = ("title", "paper", "metric", "unit", "rows", "columns", "cells", "protocol", "reference",
               "higher_is_better", "note", "tuning", "scale")  # fmt: skip


def _table(content: Any, path: Path) -> Table:
    where = str(path)
    block = _block(content, _TABLE_KEYS, where)
    for key in ("title", "paper", "metric", "unit", "rows", "columns", "protocol", "reference"):
        if key not in block:
            raise TableError(f"{where} has no {key}; a table needs it.")
    for key in ("title", "paper", "metric", "unit", "reference", "note", "tuning"):
        _typed(block.get(key, ""), str, f"{where}: {key}")
    _typed(block.get("higher_is_better", True), bool, f"{where}: higher_is_better")
    protocol: Protocol = _built(Protocol, block["protocol"], f"{where}: protocol")
    rows: list[Row] = _list(Row, block["rows"], f"{where}: rows")
    columns: list[Column] = _list(Column, block["columns"], f"{where}: columns")
    differ: list[CellOverride] = _list(CellOverride, block.get("cells", []), f"{where}: cells", least=0)
    _check_protocol(protocol, where)
    for row in rows:
        _check_row(row, f"{where}: row '{row.name}'")
    for column in columns:
        _check_column(column, rows, protocol, f"{where}: column '{column.name}'")
    for cell in differ:
        _named(rows, cell.row, "row", f"{path.stem} (its cells)")
        _named(columns, cell.column, "column", f"{path.stem} (its cells)")
        _check_settings(cell.settings, f"{where}: the cell of {cell.column} on {cell.row}")
    references = _references_of(block["reference"], path)
    _check_references(path.stem, rows, columns, references, f"{where}: its references")
    table = Table(
        path.stem, block["title"], block["paper"], block["metric"], block["unit"], rows, columns, protocol, references,
        {(cell.row, cell.column): cell for cell in differ}, block.get("higher_is_better", True),
        block.get("note", ""), block.get("tuning", ""),
    )  # fmt: skip
    for _ in table.cells():  # fills every `{key}`
        pass
    return scaled(table, block.get("scale", 1.0))


def _references_of(name: str, path: Path) -> References:
    for folder in (path.parent, _REFERENCES):
        if (folder / f"{name}.csv").exists():
            found = load_references(folder / f"{name}.csv")
            if name not in found or len(found) > 1:
                other = sorted(set(found) - {name})
                raise TableError(
                    f"{folder / f'{name}.csv'}: its rows must be of the table '{name}', not "
                    f"{', '.join(other) if other else 'missing'}."
                )
            return found[name]
    known = [file.stem for file in _REFERENCES.glob("*.csv")]
    raise TableError(f"{path}: there are no references '{name}' ({name}.csv) beside it; {suggestion(name, known)}.")


def _check_protocol(p: Protocol, where: str) -> None:
    for name, least in (
        ("seeds", 1), ("updates", 1), ("first_seed", 0), ("updates_per_epoch", 1), ("episodes", 1), ("evaluations", 1),
    ):  # fmt: skip
        if getattr(p, name) < least:
            raise TableError(f"{where}: protocol.{name} must be at least {least}, not {getattr(p, name)}.")
    if p.selection not in SELECTIONS:
        raise TableError(f"{where}: unknown protocol.selection '{p.selection}'; {suggestion(p.selection, SELECTIONS)}.")


def _check_row(row: Row, where: str) -> None:
    if not row.dataset and not row.lab:
        raise TableError(f"{where} has no dataset; give it one, or the lab that measures it.")
    for key, value in row.values.items():
        if not isinstance(value, str):
            raise TableError(f"{where}: values.{key} must be words, not {value!r}.")


def _check_column(column: Column, rows: list[Row], protocol: Protocol, where: str) -> None:
    _check_settings(column.settings, where)
    updates = protocol.updates if column.updates is None else column.updates
    epoch = protocol.updates_per_epoch if column.updates_per_epoch is None else column.updates_per_epoch
    if updates < 1 or epoch < 1 or updates % epoch:
        raise TableError(f"{where}: its {updates} updates must be a multiple of its {epoch} updates_per_epoch.")
    if column.read_at is not None and not (0 < column.read_at < updates and column.read_at % epoch == 0):
        raise TableError(
            f"{where}: read_at must be a multiple of {epoch} below its {updates} updates, not {column.read_at}."
        )
    if column.study and not (_STUDIES / f"{column.study}.yaml").exists():
        known = [file.stem for file in _STUDIES.glob("*.yaml")]
        raise TableError(f"{where}: unknown study '{column.study}'; {suggestion(column.study, known)}.")
    trained = any(not row.lab for row in rows) and not column.reference_only
    if trained and "method" not in column.settings:
        raise TableError(f"{where} has no method; add settings.method, or say in reference_only why it is not trained.")
    if column.reference_only and column.settings:
        raise TableError(f"{where} has settings and reference_only; leave one of them out.")


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    for key, value in settings.items():
        if not isinstance(key, str) or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
            raise TableError(f"{where}: settings.{key} must be a configuration key, such as method.num_critics.")
        if key in _OWN:
            raise TableError(f"{where}: settings.{key} is the protocol's (seeds, updates, evaluations); leave it out.")
        if isinstance(value, Mapping):
            raise TableError(f"{where}: settings.{key} is a block; write its keys with dots, such as {key}.KEY.")
        if key in COUNTED_IN_UPDATES and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise TableError(f"{where}: settings.{key} must be a whole number of updates, not {value!r}.")


def _check_references(name: str, rows: list[Row], columns: list[Column], references: References, where: str) -> None:
    for dataset, method in references:
        for word, known, what in ((dataset, rows, "row"), (method, columns, "column")):
            names = [item.name for item in known]  # type: ignore[attr-defined]
            if word not in names:
                raise TableError(f"{where}: table {name} has no {what} '{word}'; {suggestion(word, names)}.")


def _named(items: list[Any], name: str, what: str, table: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise TableError(f"Table {table} has no {what} '{name}'; {suggestion(name, [item.name for item in items])}.")


def _list(block: type, content: Any, where: str, least: int = 1) -> list[Any]:
    if not isinstance(content, list) or len(content) < least:
        raise TableError(f"{where} must be a list of blocks, not {content!r}.")
    items = [_built(block, item, f"{where}[{number}]") for number, item in enumerate(content)]
    keys = [(item.row, item.column) if isinstance(item, CellOverride) else item.name for item in items]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise TableError(f"{where}: '{key}' is listed twice; leave one of them out.")
    return items


_KINDS = {"str": str, "int": int, "int | None": int, "bool": bool}


def _built(block: type, content: Any, where: str) -> Any:
    """A dataclass from a block of YAML, with the types that its fields say."""
    known = {item.name: item for item in fields(block)}
    given = _block(content, known, where)
    for name, item in known.items():
        kind = str(item.type)
        if name not in given:
            if item.default is item.default_factory:  # both missing
                raise TableError(f"{where} has no {name}; it needs it.")
        elif kind.startswith("dict"):
            if not isinstance(given[name], Mapping):
                raise TableError(f"{where}.{name} must be a block of settings, not {given[name]!r}.")
        else:
            _typed(given[name], _KINDS[kind], f"{where}.{name}")
    return block(**given)


def _block(content: Any, known: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise TableError(f"{where} must be a block of settings, not {content!r}.")
    for name in content:
        if name not in known:
            raise TableError(f"{where}: unknown key '{name}'; {suggestion(str(name), known)}.")
    return content


def _typed(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "words (put numbers into quotes)", int: "a whole number", bool: "true or false"}
        raise TableError(f"{where} must be {words[kind]}, not {value!r}.")


def _filled(value: Any, row: Row, column: Column) -> Any:
    if not isinstance(value, str):
        return value

    def of(found: re.Match[str]) -> str:
        if found[1] not in row.values:
            raise TableError(
                f"Column '{column.name}' needs values.{found[1]} of row '{row.name}'; "
                f"{suggestion(found[1], row.values)}."
            )
        return row.values[found[1]]

    return re.sub(r"\{([a-z_]+)\}", of, value)


def _text(value: Any) -> str:
    """A value as a word of a command line."""
    return value if isinstance(value, str) else json.dumps(value)
