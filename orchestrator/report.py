"""`offsweep report STUDY`: what `offsweep sweep show` says, with figures and links to MLflow, as one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.pages import Cell, Page, PageTable, Section, page_figure, pages_address
from orchestrator.reading import (
    IMPORTANCE,
    About,
    duration,
    expenses,
    failure_sentences,
    findings,
    open_study,
    parameter_rows,
    read_about,
    show_params,
    study_state,
)
from sweeps.confirm import FINAL_VALUES, confirmations
from sweeps.plots_study import study_figures
from sweeps.study import Study, TrialRecord
from sweeps.summary import collapse_sentences, collapsing_runs, importance_spreads, short_names, trial_rows

STATE_FILE = "tracker.json"  # of the tracker, whose module loads MLflow
TOP = 1000  # trials in the page's table
TITLES = {
    "history.png": "Course of the search",
    "slices.png": "Values by parameter",
    "curves.png": "Learning curves",
    "parallel.png": "Parallel coordinates",
    "importances.png": "Importance",
    "pair.png": "The two most important parameters",
    "confirmed.png": "Confirmed with fresh seeds",
}


def report(name: str, workdir: Path, file: Path | None = None, mlflow: str | None = None) -> Path:
    """Write a study's page.

    Args:
        file: to be written; None: `report.html` in the study's folder.
        mlflow: address at which MLflow's pages are looked at, for links; None: the study's store if that is a server,
            else where `offsweep ui` serves them.

    Returns:
        The file.

    Raises:
        UserError: there is no such study, the file cannot be written, or the address is none.
    """
    study, records = open_study(name, workdir)
    about = read_about(study.folder)
    path = study.folder / "report.html" if file is None else file
    study_page(study, records, about, pages_address(about.store, mlflow)).save(path)
    return path


def study_page(study: Study, records: Sequence[TrialRecord], about: About, mlflow: str) -> Page:
    """The page of a study, running, stopped or finished.

    Args:
        mlflow: address of MLflow's pages.
    """
    spec, state = study.spec, study_state(study, records)
    runs = run_links(study.folder, mlflow)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    subtitle = f"{about.method} on {about.dataset}; {spec.sampler.name} sampler; written {written}"
    found = [*findings(study, records, about, state), *expenses(study, records, about)]
    sections = [
        Section("Result", [(label, text) for label, text in found if label != "confirmed"])
    ]  # a table of theirs
    if confirmed := _confirmed(study, records, about):
        sections.append(Section("Confirmed with fresh seeds", table=confirmed))
    if decided := parameter_rows(study, records, state):
        rows = [
            [
                Cell(row.name),
                *([] if row.importance is None else [Cell(f"{row.importance:.0%}", order=row.importance)]),
                Cell(row.searched), Cell(row.in_best),
            ]
            for row in decided[1]
        ]  # fmt: skip
        how = "importance by PED-ANOVA" if IMPORTANCE in decided[0] else ""
        sections.append(Section("What decided", table=PageTable(decided[0], rows, how)))
    importances = importance_spreads(records, study.space, spec.direction) if study.space.parameters else None
    drawn = study_figures(
        records, study.space, spec.direction, about.unit, spec.total_steps, importances, confirmations(study.folder)
    )
    sections.append(Section("Figures", figures=[page_figure(TITLES[key], draw()) for key, draw in drawn.items()]))
    sections.append(Section("Trials", table=_trials(study, records, about, runs)))
    config = study.folder / "config.yaml"
    if config.exists():
        sections.append(Section("Configuration", listing=config.read_text(), folded=True))
    again = [
        ("the study", f"offsweep sweep show {spec.name} --workdir {about.workdir}"),
        ("its runs in MLflow", f"offsweep ui --workdir {about.workdir}"),
        ("store", about.store),
    ]
    sections.append(Section("Where it is", again))
    warnings = [*collapse_sentences(records), *(f"Failed: {text}" for text in failure_sentences(records))]
    return Page(f"Study {spec.name}", subtitle, [s for s in sections if s != Section(s.title)], warnings)


def run_links(study_folder: Path, mlflow: str) -> dict[str, str]:
    """Run key -> address of its page, of the runs that the driver's tracker has sent."""
    try:
        runs = json.loads((study_folder / STATE_FILE).read_bytes())["runs"]
    except (OSError, ValueError, KeyError):
        return {}
    return {key: f"{mlflow.rstrip('/')}/#/runs/{run['run_id']}" for key, run in runs.items() if run["run_id"]}


def _confirmed(study: Study, records: Sequence[TrialRecord], about: About) -> PageTable | None:
    params = {record.number: record.active for record in records}
    unit = about.episode_unit if about.episodes else about.unit
    rows = []
    for one in confirmations(study.folder):
        low, high = one.interval
        rows.append([
            Cell(str(one.number), order=one.number), Cell(f"{one.searched:.1f}", order=one.searched),
            Cell(f"{one.mean:.1f}", order=one.mean), Cell(f"{low:.1f} to {high:.1f}" if low == low else ""),
            Cell(" ".join(f"{value:.1f}" for value in one.values)),
            Cell(show_params(params.get(one.number, {})) or "as configured"),
        ])  # fmt: skip
    if not rows:
        return None
    columns = ["trial", f"searched ({about.unit})", f"fresh seeds ({unit})", "95 % interval", "each", "hyperparameters"]
    return PageTable(columns, rows, "What the search chose was chosen for its luck, too; fresh seeds have none of it.")


def _trials(study: Study, records: Sequence[TrialRecord], about: About, runs: Mapping[str, str]) -> PageTable | None:
    by_number = {record.number: record for record in records}
    ranked = trial_rows(records, study.spec.direction)
    names = short_names(study.space.parameters)
    rows = []
    for row in ranked[:TOP]:
        attrs = by_number[row.number].attrs
        values: Mapping[str, float] = attrs.get(FINAL_VALUES) or attrs.get("run_values", {})
        link = next((runs[key] for key in values if key in runs), None)
        state = "diverged" if row.diverged else row.state
        mark = "muted" if row.rank is None else "best" if row.rank == 1 else ""
        rows.append([
            Cell(str(row.rank or ""), order=row.rank or len(records) + 1), Cell(str(row.number), link, row.number),
            Cell(f"{state}, collapsing" if collapsing_runs(by_number[row.number]) else state, mark=mark),
            Cell("" if row.value is None else f"{row.value:.1f}", order=row.value, mark=mark),
            Cell(" ".join(f"{value:.1f}" for value in values.values())),
            Cell("" if row.duration is None else duration(row.duration), order=row.duration),
            *([_parameter(row.params[key]) if key in row.params else Cell("") for key in names] if names
              else [Cell(show_params(row.params))]),
        ])  # fmt: skip
    if not rows:
        return None
    more = f"the best {TOP} of {len(ranked)}; " if len(ranked) > TOP else ""
    columns = ["rank", "trial", "state", about.unit, "each seed", "time", *(names.values() or ["hyperparameters"])]
    caption = (
        f"{more}a trial's number leads to its first run in MLflow; seeds of trials that did not end: last evaluation"
    )
    return PageTable(columns, rows, caption)


def _parameter(value: Any) -> Cell:
    if isinstance(value, float):
        return Cell(f"{value:.3g}", order=value)
    return Cell(str(value))
