"""What the runs of a table found: every cell's numbers, held against each other and against what was published."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from sweeps import table_statistics as ts
from sweeps.selection import expected_online_performance
from sweeps.statistics import student_interval
from sweeps.table_statistics import Array, Estimate, Verdict, score_matrix, stratified_bootstrap, verdict
from sweeps.tables import AVERAGED, Cell, Table, search_trials

GAP_TARGET = 100.0  # of the optimality gap of normalised scores
RESAMPLES = 2000  # of the intervals of aggregates
OFFLINE = "offline"  # the selection by a metric of the data alone, such as `offline:fqe`
_MEANINGS = {
    "last": "the last policy's",
    "average": f"mean of the last {AVERAGED} evaluations",
    "best": "the best evaluation, chosen by what it is judged by: too high",
}


@dataclass(frozen=True)
class RunScores:
    """A run that fills a cell, as it was recorded."""

    seed: int
    updates: list[int]  # of its evaluations, ascending
    values: list[float]  # at them, in the table's unit
    run_id: str = ""  # MLflow's; empty for what a laboratory measured
    experiment_id: str = ""
    study: str = ""
    outcome: str = "finished"  # or diverged
    dataset_hash: str = ""
    offline: Mapping[str, Sequence[float]] = field(default_factory=dict)  # metric of the data alone -> at `updates`

    def value(self, selection: str) -> float:
        """The one number that a selection takes: last | average | best | offline:METRIC (of the policy that the metric
        puts first); not a number of a run that diverged.

        Raises:
            UserError: too few evaluations to average.
            KeyError: the metric was not measured.
        """
        if self.outcome == "diverged":
            return math.nan
        if selection.startswith(f"{OFFLINE}:"):
            metric = self.offline[selection.partition(":")[2]]
            return self.values[max(range(len(metric)), key=metric.__getitem__)]
        return ts.select(self.values, selection, AVERAGED)

    def up_to(self, updates: int) -> RunScores:
        """The same run as it was at so many updates; without evaluations where it had none by then."""
        n = sum(u <= updates for u in self.updates)
        offline = {name: values[:n] for name, values in self.offline.items()}
        return replace(self, updates=self.updates[:n], values=self.values[:n], offline=offline)


@dataclass(frozen=True)
class CellResult:
    """A cell with its runs."""

    cell: Cell
    runs: Sequence[RunScores]  # by seed
    wanted: int  # runs that the protocol asks for
    selection: str  # the table's
    verdict: Verdict
    is_best: bool = False  # of its row: the best mean, or one that cannot be told apart from it

    @property
    def values(self) -> list[float]:
        """One per run, by the table's selection; not a number of runs that diverged."""
        return [run.value(self.selection) for run in self.runs]

    @property
    def diverged(self) -> int:
        return sum(run.outcome == "diverged" for run in self.runs)

    @property
    def mean(self) -> float | None:
        """None where there is no run, or one that diverged."""
        return None if not self.runs or self.diverged else statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample's (denominator runs - 1); None where it has none."""
        return None if self.mean is None or len(self.runs) < 2 else statistics.stdev(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % for the mean, by Student's t."""
        return None if self.std is None else student_interval(self.values)

    @cached_property
    def by_selection(self) -> dict[str, list[float]]:
        """One number per run by every selection that its evaluations allow."""
        metrics = set.intersection(*(set(run.offline) for run in self.runs)) if self.runs else set()
        found = {}
        for selection in (*ts.SELECTIONS, *(f"{OFFLINE}:{metric}" for metric in sorted(metrics))):
            if selection != "average" or all(len(run.values) >= AVERAGED for run in self.runs):
                found[selection] = [run.value(selection) for run in self.runs]
        return found if self.runs else {}

    @property
    def state(self) -> str:
        """In words: how many of its runs there are, and how many of them diverged; empty where all is well."""
        parts = [f"{len(self.runs)} of {self.wanted} runs"] if 0 < len(self.runs) < self.wanted else []
        return ", ".join([*parts, f"{self.diverged} diverged"] if self.diverged else parts)


@dataclass(frozen=True)
class Aggregate:
    """A column over the rows that all columns have whole; each with its stratified bootstrap interval."""

    column: str
    iqm: Estimate
    median: Estimate
    mean: Estimate
    optimality_gap: Estimate | None  # of normalised scores
    improvement: Estimate | None  # probability that the table's last column is better; of the others
    profile: Array  # at `Aggregates.thresholds`


@dataclass(frozen=True)
class Aggregates:
    """What is said of columns over several rows."""

    columns: list[Aggregate]
    rows: list[str]  # behind them
    thresholds: list[float]  # of the performance profiles
    why_none: str = ""  # where there are none


@dataclass(frozen=True)
class TableResult:
    """A table as far as it has been filled."""

    table: Table
    cells: Mapping[tuple[str, str], CellResult]  # by row and column
    doubts: Sequence[str] = ()  # about its runs, such as two datasets of one name

    def cell(self, row: str, column: str) -> CellResult:
        return self.cells[row, column]

    @property
    def counts(self) -> dict[str, int]:
        """How many cells that can be filled have which verdict."""
        names = [c.verdict.name for c in self.cells.values() if not c.cell.column.reference_only]
        return {name: names.count(name) for name in ts.VERDICTS if name in names}

    @cached_property
    def aggregates(self) -> Aggregates:
        """Of the columns that have runs, over the rows that all of them have whole."""
        table = self.table
        columns = [c.name for c in table.columns if any(self.cells[r.name, c.name].runs for r in table.rows)]
        rows = [r.name for r in table.rows if all(self._whole(r.name, name) for name in columns)]
        if not columns:
            return Aggregates([], [], [], "no run has ended")
        if table.metric != "score" and len(table.rows) > 1:
            return Aggregates([], [], [], "values that are not normalised are not put together over rows")
        if not rows:
            return Aggregates([], [], [], f"no row has all runs of {', '.join(columns)}")
        scores = {name: score_matrix([self.cells[row, name].values for row in rows], name) for name in columns}
        low, high = min(map(_low, scores.values())), max(float(s.max()) for s in scores.values())
        thresholds = [low + (high - low) * i / 50 for i in range(51)]
        last, normalised = columns[-1], table.metric == "score"
        return Aggregates(
            [
                Aggregate(
                    name, _bootstrap(ts.iqm, s), _bootstrap(ts.median, s), _bootstrap(ts.mean, s),
                    _bootstrap(_gap, s) if normalised else None,
                    None if name == last else _bootstrap(ts.probability_of_improvement, scores[last], s),
                    ts.performance_profile(s, thresholds),
                )
                for name, s in scores.items()
            ],
            rows, thresholds,
        )  # fmt: skip

    @cached_property
    def budget_curves(self) -> dict[str, list[tuple[int, float]]]:
        """Expected best score of k policies tried in the environment (EOP, Kurenkov and Kolesnikov 2022) by column: the
        policies are a cell's runs; mean over the rows that the aggregates are of. With `all columns` the policies are
        those of the whole row."""
        rows, names = self.aggregates.rows, [a.column for a in self.aggregates.columns]
        curves: dict[str, list[list[float]]] = {}
        sign = 1 if self.table.higher_is_better else -1
        for row in rows:
            values = {name: self.cells[row, name].values for name in names}
            if len(names) > 1:
                values["all columns"] = [v for name in names for v in self.cells[row, name].values]
            for name, found in values.items():
                signed = expected_online_performance([sign * v for v in found], range(1, len(found) + 1))
                curves.setdefault(name, []).append([sign * v for v in signed])
        return {
            name: [(k + 1, statistics.fmean(values)) for k, values in enumerate(zip(*of_rows, strict=True))]
            for name, of_rows in curves.items()
        }

    def _whole(self, row: str, column: str) -> bool:
        cell = self.cells[row, column]
        return len(cell.runs) == cell.wanted and not cell.diverged

    def caption(self) -> list[tuple[str, str]]:
        """What is to be known before the numbers are believed, as (label, sentence)."""
        table, p = self.table, self.table.protocol
        trained = any(not row.lab for row in table.rows)
        which = f"{_meaning(p.selection)}; " if trained else ""
        said = [("paper", table.paper), ("values", f"{table.unit}; {which}mean ± std over runs")]
        if trained:
            updates = sorted({table.updates(column) for column in table.columns if not column.reference_only})
            every = " or ".join(f"{n:,}" for n in updates)
            said.append(("protocol", f"{p.seeds} runs per cell, {every} updates, {p.episodes} episodes per evaluation"))
        budgets = [table.tuning] if table.tuning else []
        budgets += [
            f"{column.name}: searched by {search_trials(column.study)} trials (study {column.study}), confirmed with "
            f"{p.seeds} fresh seeds"
            for column in table.columns
            if column.study
        ]
        if budgets:
            said.append(("tuning budget", "; ".join(budgets)))
        if table.note:
            said.append(("note", table.note))
        if sources := dict.fromkeys(s for c in self.cells.values() if (s := c.cell.reference.source)):
            said.append(("published values", "; ".join(sources)))
        verdicts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        said.append(("verdicts", verdicts or "no cell can be filled here"))
        return said


def table_result(
    table: Table, runs: Mapping[tuple[str, str], Sequence[RunScores]], doubts: Sequence[str] = ()
) -> TableResult:
    """Hold a table's runs against each other and against what was published.

    Args:
        runs: by row and column; a missing one has none.
    """
    cells = {}
    for cell in table.cells():
        key = cell.row.name, cell.column.name
        found = sorted(runs.get(key, []), key=lambda run: run.seed)
        if cell.read_at is not None:
            found = [run for run in (run.up_to(cell.read_at) for run in found) if run.values]
        values = [run.value(table.protocol.selection) for run in found]
        r = cell.reference
        why = cell.not_comparable or ("" if r.mean is not None else r.note)
        said = verdict(values, r.mean, r.std, r.seeds, not_comparable=why, higher_is_better=table.higher_is_better)
        if cell.column.reference_only:
            said = Verdict("not run", cell.column.reference_only)
        cells[key] = CellResult(cell, found, table.protocol.seeds, table.protocol.selection, said)
    best = {key for row in table.rows for key in _best_of(row.name, cells, table)}
    marked = {key: replace(cell, is_best=key in best) for key, cell in cells.items()}
    return TableResult(table, marked, tuple(doubts))


def _best_of(row: str, cells: Mapping[tuple[str, str], CellResult], table: Table) -> list[tuple[str, str]]:
    """The cells of a row with the best mean, and those that Welch's test cannot tell apart from it at 5 %."""
    keys = [(row, column.name) for column in table.columns]
    mean = {key: m for key in keys if (m := cells[key].mean) is not None}
    if len(mean) < 2:
        return []
    best = cells[(max if table.higher_is_better else min)(mean, key=mean.__getitem__)]
    held = {key: verdict(cells[key].values, best.mean, best.std, len(best.runs)).name for key in mean}
    return [key for key in mean if cells[key] is best or held[key] == "reproduced"]


def _bootstrap(statistic: Callable[..., Array], *scores: Array) -> Estimate:
    return stratified_bootstrap(statistic, *scores, resamples=RESAMPLES)


def _gap(scores: Array) -> Array:
    return ts.optimality_gap(scores, GAP_TARGET)


def _low(scores: Array) -> float:
    return float(scores.min())


def _meaning(selection: str) -> str:
    return _MEANINGS[selection]
