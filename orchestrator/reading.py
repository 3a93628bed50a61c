"""What is read of a study on a terminal and by machines: `offsweep sweep show`, and the end of `offsweep sweep`.

Everything comes from the study's journal and from `about.json`, which the driver leaves beside it, so that neither the
dataset nor torch, Ray and MLflow have to be loaded to look at a study.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from envs.errors import UserError
from envs.files import write_atomically
from sweeps.confirm import FOLDER as CONFIRM_FOLDER
from sweeps.confirm import Confirmation, confirmations
from sweeps.plots_study import study_figures
from sweeps.selection import SelectionReport, report_lines
from sweeps.study import JOURNAL_FILE, LOCK_FILE, SPEC_FILE, Study, TrialRecord
from sweeps.summary import (
    Cost,
    TrialRow,
    collapse_sentences,
    collapsing_runs,
    failures,
    history,
    importance_spreads,
    parameter_importances,
    results,
    running_trials,
    short_names,
    state_counts,
    study_cost,
    trial_rows,
)

if TYPE_CHECKING:
    from envs.dataset import Dataset
    from orchestrator.config import Config

ABOUT_FILE = "about.json"
IMPORTANCES_FILE = "importances.json"
TOP = 30  # rows of the table, unless asked otherwise
_NAMED = 8  # trials that a sentence names
IMPORTANCE = "importance"  # a column


@dataclass(frozen=True)
class About:
    """What is said of a study beside its trials."""

    method: str
    dataset: str
    unit: str  # what a trial's value is called
    label: str  # whose reference pair scores are normalised with, and where they were measured
    data: str  # mean return of the dataset; "": it has no whole episode
    episodes: int  # of an evaluation
    workdir: str
    store: str  # of MLflow
    episode_unit: str = "score"  # what the value of a policy's episodes is called
    price_per_hour: float | None = None  # of a pack, in any currency

    def save(self, folder: Path) -> None:
        """Leave it in the study's folder."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_atomically(folder / ABOUT_FILE, lambda path: path.write_text(text))


def about_study(config: Config, dataset: Dataset, store: str, on_gpu: bool | None = None) -> About:
    """What is said of a study of this configuration.

    Args:
        store: of MLflow.
        on_gpu: whether its packs are; None: not known, and so there is no price.
    """
    from orchestrator.display import episode_unit, score_label, value_unit
    from orchestrator.learner import evaluation_env

    data, summary = "", dataset.summary()
    if summary["return_mean"] is not None:
        other = evaluation_env(config, dataset) != dataset.env_id
        label = f": {summary['score_source']}" if other else ""
        score = "" if summary["score"] is None else f" (score {summary['score']:.1f}{label})"
        data = f"mean return {summary['return_mean']:.1f}{score} over {summary['complete_episodes']} episodes"
    compute, price = config.compute, None
    if on_gpu:
        price = compute.price_per_gpu_hour
    elif on_gpu is False and compute.price_per_cpu_hour is not None:
        price = compute.price_per_cpu_hour * compute.cpus_per_learner
    return About(
        config.method_name, config.dataset, value_unit(config, dataset), score_label(config, dataset), data,
        config.evaluation.episodes, config.workdir, store, episode_unit(config, dataset), price,
    )  # fmt: skip


def show(
    name: str, workdir: Path, console: Console, top: int | None = None, as_json: bool = False,
    figures: Path | None = None,
) -> None:  # fmt: skip
    """Print what is known of a study, running, stopped or finished.

    Args:
        top: rows of the table of trials; None: 30 of them, or all as JSON.
        as_json: for machines.
        figures: folder for the study's figures.

    Raises:
        UserError: there is no such study, or the folder cannot be written.
    """
    if top is not None and top < 1:
        raise UserError(f"--top {top} must be at least 1")
    study, records = open_study(name, workdir)
    about = read_about(study.folder)
    if as_json:
        console.file.write(json.dumps(to_json(study, records, about, top), indent=1) + "\n")
    else:
        print_study(console, study, records, about, top or TOP)
    if figures is not None:
        drawn = save_figures(study, records, about.unit, figures)
        if not as_json:
            console.print(f"figures: {', '.join(map(str, drawn)) or 'none yet'}", highlight=False, soft_wrap=True)


def open_study(name: str, workdir: Path) -> tuple[Study, list[TrialRecord]]:
    """A study to be read, and its trials.

    Raises:
        UserError: there is no such study.
    """
    folder = workdir.absolute() / "studies" / name
    if not (folder / SPEC_FILE).exists():
        known = sorted(p.parent.name for p in folder.parent.glob(f"*/{SPEC_FILE}"))
        raise UserError(f"there is no study {name!r} in {folder.parent}; it holds: {', '.join(known) or 'none'}")
    # everything that reading a journal makes is kept, and looking for rubbish in it takes a fifth of the time
    collecting = gc.isenabled()
    gc.disable()
    try:
        study = Study.open(folder, read_only=True)
        return study, study.trials()
    finally:
        if collecting:
            gc.enable()


def read_about(folder: Path) -> About:
    """What the driver left; of a study made before it did, or killed before, what its configuration says."""
    try:
        return About(**json.loads((folder / ABOUT_FILE).read_text()))
    except FileNotFoundError:
        from envs.registry import load_dataset
        from orchestrator.config import load_config
        from orchestrator.tracking import default_tracking_uri

        if not (folder / "config.yaml").exists():
            raise UserError(
                f"{folder} is of a study that was killed before it began; remove it and start the study anew"
            ) from None
        config = load_config([folder / "config.yaml"], [])
        store = config.tracking_uri or default_tracking_uri(config.workdir)
        return about_study(config, load_dataset(config.dataset, Path(config.workdir)), store)


def save_figures(study: Study, records: Sequence[TrialRecord], unit: str, folder: Path) -> list[Path]:
    """Draw a study's figures as PNG files into a folder, which is made if need be.

    Raises:
        UserError: the folder cannot be written.
    """
    direction, space = study.spec.direction, study.space
    importances = importance_spreads(records, space, direction) if space.parameters else None
    drawn = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in study_figures(
            records, space, direction, unit, study.spec.total_steps, importances, confirmations(study.folder)
        ).items():
            write_atomically(folder / name, partial(draw().savefig, format="png", dpi=120))
            drawn.append(folder / name)
    except OSError as error:
        raise UserError(f"cannot write figures to {folder}: {error.strerror}; choose another folder") from error
    return drawn


def study_state(study: Study, records: Sequence[TrialRecord]) -> str:
    """finished, running, confirming (all trials have ended, and the best are trained again) or stopped."""
    ended = sum(record.finished is not None for record in records) >= study.spec.num_trials
    confirm = _confirm_study(study.folder)
    if ended and (confirm is None or confirm.num_finished >= confirm.spec.num_trials):
        return "finished"
    state = driver_state(study.folder)
    return "confirming" if ended and state == "running" else state


def driver_state(folder: Path) -> str:
    """Of the driver of a study's folder: running or stopped, or `last driven by ...` where it was on another
    machine."""
    try:
        holder = (folder / LOCK_FILE).read_text()
    except OSError:
        return "stopped"
    found = re.fullmatch(r"process (\d+) on (.*)\n?", holder)
    if found is None or found[2] != os.uname().nodename:
        return f"last driven by {holder.strip() or 'an unknown process'}"
    # taking the lock to see whether it is held would keep a driver out that starts just then
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return "stopped"
    except PermissionError:  # another user's
        pass
    return "running"


def _confirm_study(folder: Path) -> Study | None:
    """The study in which the best trials are trained again, if it has begun."""
    confirm = folder / CONFIRM_FOLDER
    return Study.open(confirm, read_only=True) if (confirm / JOURNAL_FILE).exists() else None


def to_json(study: Study, records: Sequence[TrialRecord], about: About, top: int | None = None) -> dict[str, Any]:
    """What is known of a study as plain values; times in seconds.

    Args:
        top: trials at most, best first; None: all.
    """
    spec = study.spec
    by_number = {record.number: record for record in records}
    course = history(records, spec.direction)
    rows = trial_rows(records, spec.direction)
    best, state = _best(study, records, rows), study_state(study, records)
    confirm = _confirm_study(study.folder)
    return {
        "name": spec.name,
        "method": about.method,
        "dataset": about.dataset,
        "unit": about.unit,
        "label": about.label,
        "data": about.data,
        "state": state,
        "num_trials": spec.num_trials,
        "seeds_per_trial": spec.seeds_per_trial,
        "counts": state_counts(records),
        "best": None if best is None else {
            "trial": best.number, "value": best.value, "params": best.active,
            "run_values": best.attrs.get("run_values", {}), "run_returns": best.attrs.get("run_returns", {}),
        },
        "confirmed": [
            {"trial": one.number, "searched": one.searched, "mean": one.mean, "values": list(one.values),
             "interval": None if math.isnan(one.interval[0]) else list(one.interval), "diverged": one.diverged}
            for one in confirmations(study.folder)
        ],
        "importances": _importances(study, records, state),
        "history": [
            {"trial": int(number), "value": float(value), "best": float(least)}
            for number, value, least in zip(course.numbers, course.values, course.best, strict=True)
        ],
        "cost": {**asdict(cost := _cost(study, records, about)), "money": _money(cost, about)},
        "selection": None if (kept := SelectionReport.load(study.folder)) is None else kept.to_json(),
        "confirm_cost": None if confirm is None else asdict(_cost(confirm, confirm.trials(), about)),
        "running": [asdict(trial) for trial in running_trials(records, spec.total_steps)],
        "failures": [{"reason": reason, "trials": numbers} for reason, numbers in failures(records).items()],
        "trials": [
            {**asdict(row), "collapsing": collapsing_runs(by_number[row.number]),
             "intermediate": by_number[row.number].intermediate}
            for row in rows[:top]
        ],
    }  # fmt: skip


def print_study(console: Console, study: Study, records: Sequence[TrialRecord], about: About, top: int) -> None:
    """The table of trials, the best setting beside the data it learned from, what decided, what it took, and what to
    open next."""
    spec, state = study.spec, study_state(study, records)
    rows = trial_rows(records, spec.direction)
    best = _best(study, records, rows)
    if rows:
        console.print(_table(rows[:top], {record.number: record for record in records}, about, spec.name))
        if len(rows) > top:
            console.print(f"and {len(rows) - top} more trials; --top {len(rows)} shows them", highlight=False)
    for sentence in collapse_sentences(records):
        console.print(f"[yellow]{sentence}[/yellow]", highlight=False)
    for label, text in findings(study, records, about, state):
        _say(console, label, text)
    for text in failure_sentences(records):
        console.print(f"[yellow]failed:[/yellow]     {text}", highlight=False, markup=True)
    if found := parameter_rows(study, records, state):
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in found[0]:
            table.add_column(column, justify="right" if column == IMPORTANCE else "left")
            if column == IMPORTANCE:
                table.add_column("")
        for row in found[1]:
            share = row.importance
            shown: list[Any] = [] if share is None else [f"{share:.0%}", Bar(1.0, 0.0, share, width=16)]
            table.add_row(row.name, *shown, row.searched, row.in_best)
        console.print(table)
    for label, text in expenses(study, records, about):
        _say(console, label, text)
    _print_next(console, study, about, best, state)


def findings(study: Study, records: Sequence[TrialRecord], about: About, state: str) -> Iterator[tuple[str, str]]:
    """Labels and sentences: how the study stands, what was found, beside the data that was learned from."""
    spec, unit = study.spec, about.unit
    counts = ", ".join(f"{count} {name}" for name, count in state_counts(records).items())
    ended = sum(record.finished is not None for record in records)
    best = _best(study, records, trial_rows(records, spec.direction))
    yield "study", f"{state}, {ended} of {spec.num_trials} trials ended{f' ({counts})' if counts else ''}"
    yield unit, about.label
    if about.data:
        yield "data", about.data
    if best is not None and best.value is not None:
        returns = list(best.attrs.get("run_returns", {}).values())
        mean = f"mean return {sum(returns) / len(returns):.1f} " if returns else ""
        yield (
            "best trial",
            f"{mean}({unit} {best.value:.1f}) over {len(best.attrs.get('run_values', {}))} seeds x {about.episodes} "
            f"episodes; trial {best.number}: {show_params(best.active) or 'as configured'}",
        )
    for one in confirmations(study.folder):
        yield "confirmed", _confirmed(one, unit, about.episode_unit if about.episodes else unit)
    yield from _history(records, spec.direction, unit)
    yield from _running(study, records, unit, state)


def failure_sentences(records: Sequence[TrialRecord]) -> list[str]:
    """A sentence for every reason why trials failed."""
    return [
        f"trial{'s' * (len(numbers) > 1)} {_some(numbers)}: {reason}" for reason, numbers in failures(records).items()
    ]


def expenses(study: Study, records: Sequence[TrialRecord], about: About) -> Iterator[tuple[str, str]]:
    """Labels and sentences: what the study took, and what was found by how many episodes."""
    if records:
        yield "cost", _cost_sentence(_cost(study, records, about), about)
        if (confirm := _confirm_study(study.folder)) is not None:
            yield "confirming", _cost_sentence(_cost(confirm, confirm.trials(), about), about)
    selection = SelectionReport.load(study.folder)
    for sentence in [] if selection is None else report_lines(selection, about.episode_unit):
        yield "selection", sentence


def _table(rows: Sequence[TrialRow], records: Mapping[int, TrialRecord], about: About, name: str) -> Table:
    table = Table(title=f"study {name}: {about.method} on {about.dataset}")
    for column in ("rank", "trial", "state", about.unit, "mean return", "time"):
        table.add_column(column, justify="left" if column == "state" else "right")
    table.add_column("hyperparameters")
    for row in rows:
        returns = records[row.number].attrs.get("run_returns", {}).values()
        state, collapsing = "diverged" if row.diverged else row.state, len(collapsing_runs(records[row.number]))
        table.add_row(
            str(row.rank or ""), str(row.number), f"{state}, {collapsing} collapsing" if collapsing else state,
            "" if row.value is None else f"{row.value:.1f}",
            f"{sum(returns) / len(returns):.1f}" if returns else "",
            "" if row.duration is None else duration(row.duration), show_params(row.params),
        )  # fmt: skip
    return table


def _confirmed(one: Confirmation, unit: str, fresh_unit: str) -> str:
    searched_unit = "" if unit == fresh_unit else f" {unit}"
    low, high = one.interval
    interval = f" ({low:.1f} to {high:.1f})" if low == low else ""
    values = " ".join(f"{value:.1f}" for value in one.values)
    seeds = f"{len(one.values)} fresh seed{'s' * (len(one.values) > 1)}"
    return (
        f"trial {one.number}: searched {one.searched:.1f}{searched_unit} / confirmed {one.mean:.1f}{interval} "
        f"{fresh_unit}, {seeds}: {values}{', diverged' * one.diverged}"
    )


def _history(records: Sequence[TrialRecord], direction: str, unit: str) -> Iterator[tuple[str, str]]:
    """The improvements, each with the number of results until then."""
    course = history(records, direction)
    steps = [i for i in range(len(course.best)) if i == 0 or course.best[i] != course.best[i - 1]]
    if steps:
        shown = steps if len(steps) <= _NAMED else [steps[0], *steps[1 - _NAMED :]]
        text = ", ".join(f"{course.best[i]:.1f} after {i + 1}" for i in shown)
        yield "history", f"best {unit} {text} of {len(course.best)} results"


def _running(study: Study, records: Sequence[TrialRecord], unit: str, state: str) -> Iterator[tuple[str, str]]:
    under_way = running_trials(records, study.spec.total_steps)
    for trial in under_way[:_NAMED]:
        value = "" if trial.value is None else f", {unit} {trial.value:.1f}"
        text = f"trial {trial.number}: {trial.share:.0%} of its updates{value}, asked for {duration(trial.age)} ago; "
        yield "under way" if state != "stopped" else "stopped", text + show_params(trial.params)
    if len(under_way) > _NAMED:
        yield "", f"and {len(under_way) - _NAMED} more"


def _best(study: Study, records: Sequence[TrialRecord], rows: Sequence[TrialRow]) -> TrialRecord | None:
    ranked = rows[0].number if rows and rows[0].rank else None
    return study.best if ranked is None else next(record for record in records if record.number == ranked)


def _importances(study: Study, records: Sequence[TrialRecord], state: str) -> dict[str, float] | None:
    """Those that a finished study has kept: what works them out takes seconds to load."""
    kept = study.folder / IMPORTANCES_FILE
    if state in ("finished", "confirming") and kept.exists():
        found: dict[str, float] = json.loads(kept.read_text())
        return found
    return parameter_importances(records, study.space, study.spec.direction) if study.space.parameters else None


@dataclass(frozen=True)
class ParameterRow:
    """What is said of a parameter that was searched."""

    name: str
    importance: float | None  # share; None: too few trials
    searched: str
    in_best: str  # values of the best trials


def parameter_rows(
    study: Study, records: Sequence[TrialRecord], state: str
) -> tuple[list[str], list[ParameterRow]] | None:
    """Names of columns, and what decided and what the best trials have in common; None before there are 3 results."""
    direction, space = study.spec.direction, study.space
    done = results(records)
    if not space.parameters or len(done) < 3:
        return None
    importances = _importances(study, records, state)
    order = list(importances or space.parameters)
    sign = -1.0 if direction == "maximize" else 1.0
    best = sorted(done, key=lambda record: sign * (record.value or 0.0))[: max(3, min(10, len(done) // 10))]
    names = short_names(order)
    rows = []
    for key in order:
        parameter = space.parameters[key]
        values = [record.active[key] for record in best if key in record.active]
        found = _ends(values)
        if parameter.type == "categorical":
            found = [str(choice) for choice in parameter.choices if choice in values]
        share = importances[key] if importances else None
        rows.append(ParameterRow(names[key], share, parameter.describe(), ", ".join(found) or "-"))
    columns = ["parameter", *([IMPORTANCE] if importances else []), "searched", f"in the best {len(best)}"]
    return columns, rows


def _ends(values: Sequence[Any]) -> list[str]:
    """From the least to the largest, where they are numbers."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers:
        return []
    low, high = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
    return [low if low == high else f"{low} to {high}"]


def _cost_sentence(cost: Cost, about: About) -> str:
    about_text = "" if cost.exact else "about "
    saved = cost.updates_saved / max(1, cost.updates + cost.updates_saved)
    stopping = f" (stopping early saved {saved:.0%})" if cost.updates_saved else ""
    money, price = _money(cost, about), ""
    if money is not None:
        price = f", {money:.2f} at {about.price_per_hour:g} an hour"
    return (
        f"{duration(cost.wall_seconds)} from first to last, {cost.pack_seconds / 3600:.2f} hours of packs{price}; "
        f"{about_text}{cost.updates:,} updates{stopping}, {about_text}{cost.online_episodes:,} online episodes"
    )


def _print_next(console: Console, study: Study, about: About, best: TrialRecord | None, state: str) -> None:
    # Optuna's pages get a copy: what is pressed in them is written to the file that they have open
    journal, copy = study.folder / JOURNAL_FILE, f"{study.spec.name}.log"
    console.print("next:")
    for line in (
        *([f"offsweep resume {study.spec.name} --workdir {about.workdir}"] if state == "stopped" else []),
        f"offsweep ui --workdir {about.workdir}    # MLflow: experiment {study.spec.name!r}",
        *([f"cp {journal} {copy} && optuna-dashboard {copy}"] if journal.exists() else []),
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    run = next(iter(best.attrs.get("run_values", {})), None) if best else None
    if run:
        file = study.folder / "runs" / run / "config.yaml"
        console.print(f"  offsweep train --config {file}    # the best trial's first run again", highlight=False)
    console.print(f"store: {about.store}", highlight=False)


def _say(console: Console, label: str, text: str) -> None:
    console.print(f"{f'{label}:' if label else '':<12}{text}", highlight=False, markup=False, soft_wrap=True)


def _some(numbers: Sequence[int]) -> str:
    shown = " ".join(map(str, numbers[:_NAMED]))
    return shown if len(numbers) <= _NAMED else f"{shown} and {len(numbers) - _NAMED} more"


def _cost(study: Study, records: Sequence[TrialRecord], about: About) -> Cost:
    return study_cost(records, study.spec.seeds_per_trial, study.spec.total_steps, about.episodes)


def _money(cost: Cost, about: About) -> float | None:
    return None if about.price_per_hour is None else about.price_per_hour * cost.pack_seconds / 3600


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show_params(params: Mapping[str, Any]) -> str:
    """Hyperparameters on one line, without the common prefix."""
    names = short_names(params)
    return " ".join(f"{names[k]}={f'{v:.3g}' if isinstance(v, float) else v}" for k, v in params.items())
