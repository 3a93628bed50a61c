"""`offsweep compare`: runs, trials and studies beside each other: settings that differ, scores, learning curves.

Everything is read from the work folder, so that neither torch nor MLflow has to be loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from envs.errors import UserError
from orchestrator.pages import Cell, Page, PageTable, Section, page_figure
from orchestrator.reading import open_study, read_about
from orchestrator.report import STATE_FILE
from sweeps.plots import new_figure
from sweeps.statistics import mean_difference, student_interval
from sweeps.summary import short_names, trial_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = re.compile(r"t(\d+)-s(\d+)")
AVERAGED = 10  # last evaluations
# what says how something was computed or called, not what was
NO_SETTINGS = ("seed", "num_seeds", "study", "compute", "workdir", "tracking_uri", "method_name")


@dataclass(frozen=True)
class Evaluated:
    """A run's evaluations in order."""

    updates: list[int]
    values: list[float]  # score, or what the study maximises
    episodes: int  # in all of them


@dataclass(frozen=True)
class Group:
    """What is compared with others: one or more runs of the same settings."""

    name: str
    unit: str
    label: str  # of what scores are normalised with
    settings: Mapping[str, Any]
    runs: Mapping[int, Evaluated]  # seed -> its run, of those evaluated at least once
    chosen_of: int = 1  # complete trials of which it is the best

    def values(self, rule: Callable[[Sequence[float]], float]) -> dict[int, float]:
        """Each run's value by a rule."""
        return {seed: rule(run.values) for seed, run in self.runs.items()}

    @cached_property
    def updates(self) -> list[int]:
        """Ends of the runs."""
        return sorted({run.updates[-1] for run in self.runs.values()})


RULES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda values: values[-1],
    f"mean of the last {AVERAGED}": lambda values: float(np.mean(values[-AVERAGED:])),
    "best evaluation (hindsight)": max,
}


def find_group(word: str, workdir: Path) -> Group:
    """A study (its best trial), `study/3` (a trial), `study/t0003-s1` (a run), or the MLflow id of a run.

    Raises:
        UserError: nothing of that name is there, or it has not been evaluated.
    """
    name, _, rest = word.partition("/")
    if re.fullmatch(r"[0-9a-f]{32}", word):
        name, rest = _by_run_id(word, workdir)
    study, records = open_study(name, workdir)
    chosen_of = 1
    if not rest:
        rows = trial_rows(records, study.spec.direction)
        if not rows or rows[0].rank is None:
            raise UserError(f"study {name!r} has no complete trial yet; name a trial of it, such as {name}/0")
        rest, chosen_of = str(rows[0].number), sum(row.rank is not None for row in rows)
    if found := RUN.fullmatch(rest):
        keys = [rest]
        number = int(found[1])
    elif found := re.fullmatch(r"t?0*(\d+)", rest):
        number = int(found[1])
        keys = sorted(path.name for path in (study.folder / "runs").glob(f"t{number:04d}-s*"))
    else:
        raise UserError(f"{word!r} is no study, STUDY/TRIAL such as {name}/3, or STUDY/RUN such as {name}/t0003-s0")
    folders = [study.folder / "runs" / key for key in keys]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise UserError(f"study {name!r} has no runs {rest!r}; it has trials 0 to {len(records) - 1}")
    runs = {int(RUN.fullmatch(f.name)[2]): _evaluations(f) for f in folders}  # type: ignore[index]
    known = {seed: run for seed, run in sorted(runs.items()) if run.values}
    if not known:
        raise UserError(f"{word!r} has not been evaluated yet")
    about = read_about(study.folder)
    shown = f"{name}/{rest}" if RUN.fullmatch(rest) else f"{name}/{number}"
    return Group(shown, about.unit, about.label, _settings(folders[0] / "config.yaml"), known, chosen_of)


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Settings in which the groups differ, with each one's value; None where it has no such setting."""
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    found = {key: [group.settings.get(key) for group in groups] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def doubts(groups: Sequence[Group]) -> list[str]:
    """Sentences: why the numbers should not be held against each other as they are."""
    said = []
    for what, values in (
        ("datasets", [group.settings.get("dataset") for group in groups]),
        ("units", [(group.unit, group.label) for group in groups]),
        ("numbers of updates", [tuple(group.updates) for group in groups]),
        ("episodes per evaluation", [group.settings.get("evaluation.episodes") for group in groups]),
    ):
        if any(value != values[0] for value in values):
            said.append(f"The {what} differ.")
    said += [
        f"{group.name} is the best of {group.chosen_of} trials, so its scores overstate it; `offsweep sweep show` has "
        "those of fresh seeds, if it was confirmed."
        for group in groups
        if group.chosen_of > 1
    ]
    single = [group.name for group in groups if len(group.runs) == 1]
    if single:
        said.append(f"Of {', '.join(single)} there is one seed: its luck cannot be told from its settings.")
    return said


def compare(words: Sequence[str], workdir: Path, console: Console, as_json: bool, html: Path | None) -> None:
    """Print runs, trials or studies beside each other; differences are to the first.

    Args:
        words: as `find_group` takes them.
        as_json: for machines.
        html: file for a page with learning curves.

    Raises:
        UserError: fewer than two, one that is not there, or a page that cannot be written.
    """
    if len(words) < 2:
        raise UserError("compare takes two or more studies, trials (STUDY/3) or runs (STUDY/t0003-s0, or an MLflow id)")
    groups = [find_group(word, workdir) for word in words]
    if as_json:
        console.file.write(json.dumps(to_json(groups), indent=1) + "\n")
    else:
        table = Table(title="differences are to the first column, with their 95 % intervals")
        head, *rows = lines(groups)
        for column in head:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for sentence in doubts(groups):
            console.print(f"[yellow]{sentence}[/yellow]", highlight=False)
    if html is not None:
        page(groups).save(html)
        if not as_json:
            console.print(f"page: {html}", highlight=False, soft_wrap=True)


def lines(groups: Sequence[Group]) -> list[list[str]]:
    """The table: names, settings that differ, what was trained, and scores by each rule."""
    changed = differences(groups)
    names = short_names(changed)
    rows = [["", *(group.name for group in groups)]]
    rows += [[names[key], *map(_text, values)] for key, values in changed.items()]
    rows.append(["seeds", *(" ".join(map(str, group.runs)) for group in groups)])
    rows.append(["updates", *(" or ".join(f"{n:,}" for n in group.updates) for group in groups)])
    rows.append(["online episodes", *(f"{sum(run.episodes for run in group.runs.values()):,}" for group in groups)])
    for rule, of in RULES.items():
        rows.append([f"{groups[0].unit}: {rule}", *(_spread(list(group.values(of).values())) for group in groups)])
        rows.append(["  difference", "", *(_difference(group, groups[0], of) for group in groups[1:])])
    return rows


def to_json(groups: Sequence[Group]) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "settings": differences(groups),
        "doubts": doubts(groups),
        "groups": [
            {
                "name": group.name, "unit": group.unit, "label": group.label, "updates": group.updates,
                "values": {rule: group.values(of) for rule, of in RULES.items()},
                "differences": {rule: _difference_of(group, groups[0], of) for rule, of in RULES.items()},
                "curves": {seed: {"updates": run.updates, "values": run.values} for seed, run in group.runs.items()},
            }
            for group in groups
        ],
    }  # fmt: skip


def page(groups: Sequence[Group]) -> Page:
    """The same as a page, with learning curves."""
    head, *rows = lines(groups)
    table = PageTable(head, [[Cell(text) for text in row] for row in rows], "differences with their 95 % intervals")
    sections = [
        Section("Side by side", table=table),
        Section("Learning curves", figures=[page_figure("mean over seeds; faint: each seed", curves(groups))]),
    ]
    return Page(" and ".join(group.name for group in groups), "compared with the first", sections, doubts(groups))


def curves(groups: Sequence[Group]) -> Figure:
    """Every run's evaluations, and the mean of each group at the updates that all of its runs have."""
    figure = new_figure(8.0, 4.6)
    axes = figure.add_subplot()
    for number, group in enumerate(groups):
        color = f"C{number % 10}"
        for run in group.runs.values():
            axes.plot(run.updates, run.values, color=color, alpha=0.3, linewidth=0.9)
        common = sorted(set.intersection(*(set(run.updates) for run in group.runs.values())))
        at = [[run.values[run.updates.index(step)] for run in group.runs.values()] for step in common]
        axes.plot(common, [float(np.mean(values)) for values in at], color=color, linewidth=2, label=group.name)
    axes.set_xlabel("updates")
    axes.set_ylabel(groups[0].unit)
    axes.legend(fontsize="small")
    return figure


def _difference_of(group: Group, first: Group, rule: Callable[[Sequence[float]], float]) -> dict[str, Any] | None:
    if group is first:
        return None
    difference = mean_difference(group.values(rule), first.values(rule))
    interval = None if math.isnan(difference.interval[0]) else list(difference.interval)
    return {"mean": difference.mean, "interval": interval, "paired": difference.paired}


def _difference(group: Group, first: Group, rule: Callable[[Sequence[float]], float]) -> str:
    found = _difference_of(group, first, rule)
    if found is None:
        return ""
    if found["interval"] is None:
        return f"{found['mean']:+.1f}"
    low, high = found["interval"]
    return f"{found['mean']:+.1f} ({low:+.1f} to {high:+.1f}){' paired by seed' * found['paired']}"


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    if len(values) < 2:
        return mean
    low, high = student_interval(values)
    return f"{mean} ± {np.std(values, ddof=1):.1f} ({low:.1f} to {high:.1f})"


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _evaluations(folder: Path) -> Evaluated:
    try:
        content = json.loads((folder / "evaluations.json").read_text())
    except FileNotFoundError:
        content = []
    episodes = sum(len(one["returns"]) for one in content)
    return Evaluated([one["updates"] for one in content], [one["value"] for one in content], episodes)


def _settings(file: Path) -> dict[str, Any]:
    """What a run's configuration says, one key per value."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(file.read_text(), loader)
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    add("", {key: value for key, value in content.items() if key not in NO_SETTINGS})
    return flat


def _by_run_id(run_id: str, workdir: Path) -> tuple[str, str]:
    for file in sorted((workdir.absolute() / "studies").glob(f"*/{STATE_FILE}")):
        runs = json.loads(file.read_bytes())["runs"]
        for key, run in runs.items():
            if run["run_id"] == run_id and RUN.fullmatch(key):
                return file.parent.name, key
    raise UserError(f"no study in {workdir.absolute() / 'studies'} has sent a run to MLflow as {run_id}")
