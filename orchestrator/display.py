"""What a user sees while a study runs, and at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from envs.dataset import Dataset
from envs.scores import reference_scores
from orchestrator.config import Config
from orchestrator.driver import Progress
from orchestrator.learner import evaluation_env, target_of
from sweeps.objectives import SCORE
from sweeps.study import Study
from sweeps.summary import collapse_sentences, collapsing_runs, trial_rows


class Display:
    """Live table on a terminal, one line per finished trial elsewhere; use it in a `with` statement."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._told: set[int] = set()
        self._stage: str | None = None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._live:
            self._live.update(self._render(progress))
        elif progress.stage != self._stage:
            self._stage = progress.stage
            if self._stage:
                self._console.print(f"building {self._stage}")
        for record in progress.study.trials():
            if record.finished is None or record.number in self._told:
                continue
            self._told.add(record.number)
            state = "diverged" if record.diverged else record.state
            value = "" if record.value is None else f" {self._unit} {record.value:.1f}"
            left = _duration(_seconds_left(progress))
            self._console.print(
                f"trial {record.number:>3} {state:<9}{value}  {show_params(record.active)}  "
                f"({progress.study.num_finished}/{progress.study.spec.num_trials}, {left} left)",
                highlight=False,
            )

    def _render(self, progress: Progress) -> RenderableType:
        done, planned = progress.updates_done(), progress.updates_planned()
        bar = Table.grid(padding=(0, 1))
        elapsed = _duration(time.monotonic() - progress.started)
        best = progress.study.best
        best_text = (
            f"best {self._unit} {best.value:.1f} (trial {best.number})" if best and best.value is not None else ""
        )
        bar.add_row(
            f"{progress.study.num_finished}/{progress.study.spec.num_trials} trials",
            ProgressBar(total=max(planned, 1), completed=done, width=30),
            f"{elapsed} elapsed, {_duration(_seconds_left(progress))} left", best_text,
        )  # fmt: skip
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("trial", "updates", self._unit, "hyperparameters"):
            table.add_column(column, justify="right" if column != "hyperparameters" else "left")
        for trial in progress.running.values():
            steps = trial.common_steps()
            value = f"{trial.value_at(steps[-1]):.1f}" if steps else "-"
            done = min((trial.updates.get(key, 0) for key in trial.run_keys), default=0)
            updates = f"{done}/{progress.config.method.num_updates}"
            table.add_row(str(trial.number), updates, value, show_params(trial.active))
        parts: list[RenderableType] = [bar, table]
        if progress.stage:
            parts.append(Text(f"building {progress.stage} (once, shared by all runs that need it)", style="dim"))
        return Group(*parts)


def _seconds_left(progress: Progress) -> float | None:
    done = progress.updates_done() - progress.done_at_start
    if done <= 0:
        return None
    elapsed = time.monotonic() - progress.started
    return elapsed / done * (progress.updates_planned() - progress.updates_done())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show_params(params: Mapping[str, Any]) -> str:
    """Hyperparameters on one line, without the common prefix."""
    values = {k.removeprefix("method."): f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in params.items()}
    return " ".join(f"{k}={v}" for k, v in values.items())


def value_unit(config: Config, dataset: Dataset) -> str:
    """What a trial's value is called."""
    if config.study.objective.metric != SCORE:
        return config.study.objective.metric
    return episode_unit(config, dataset)


def episode_unit(config: Config, dataset: Dataset) -> str:
    """What the value of a policy's episodes is called."""
    return "return" if reference_scores(evaluation_env(config, dataset)) is None else "score"


def score_label(config: Config, dataset: Dataset) -> str:
    """Whose reference pair the scores of a study are normalised with, and where they were measured."""
    env_id = evaluation_env(config, dataset)
    reference = reference_scores(env_id)
    label = f"mean returns in {env_id}" if reference is None else reference.label
    if env_id == dataset.env_id:
        return label
    return f"{label}; " + (
        f"the source is {config.dataset}" if target_of(config) else f"the data is of {dataset.env_id}"
    )


def print_summary(console: Console, study: Study, config: Config, dataset: Dataset, store: str) -> None:
    """The table of trials, the best configuration beside the data it learned from, and what to open next."""
    unit = value_unit(config, dataset)
    table = Table(title=f"study {study.spec.name}: {config.method_name} on {config.dataset}")
    for column in ("rank", "trial", "state", unit, "mean return", "time"):
        table.add_column(column, justify="left" if column == "state" else "right")
    table.add_column("hyperparameters")
    records = {record.number: record for record in study.trials()}
    for row in trial_rows(list(records.values()), study.spec.direction):
        returns = records[row.number].attrs.get("run_returns", {}).values()
        state, collapsing = "diverged" if row.diverged else row.state, len(collapsing_runs(records[row.number]))
        table.add_row(
            str(row.rank or ""), str(row.number), f"{state}, {collapsing} collapsing" if collapsing else state,
            "" if row.value is None else f"{row.value:.1f}",
            f"{sum(returns) / len(returns):.1f}" if returns else "",
            _duration(row.duration), show_params(row.params),
        )  # fmt: skip
    console.print(table)
    for sentence in collapse_sentences(list(records.values())):
        console.print(f"[yellow]{sentence}[/yellow]", highlight=False)
    console.print(f"{unit + ':':<12}{score_label(config, dataset)}")
    best = study.best
    summary = dataset.summary()
    if summary["return_mean"] is not None:
        other = evaluation_env(config, dataset) != dataset.env_id
        label = f": {summary['score_source']}" if other else ""
        score = "" if summary["score"] is None else f" (score {summary['score']:.1f}{label})"
        console.print(
            f"data:       mean return {summary['return_mean']:.1f}{score} over {summary['complete_episodes']} episodes"
        )
    if best is not None and best.value is not None:
        returns = list(best.attrs.get("run_returns", {}).values())
        mean = f"mean return {sum(returns) / len(returns):.1f} " if returns else ""
        runs, episodes = len(best.attrs.get("run_values", {})), config.evaluation.episodes
        console.print(
            f"best trial: {mean}({unit} {best.value:.1f}) over {runs} seeds x {episodes} episodes; "
            f"trial {best.number}: {show_params(best.active) or 'as configured'}"
        )
    folder = study.folder
    run = next(iter(best.attrs.get("run_values", {})), None) if best else None
    console.print("next:")
    console.print(
        f"  offsweep ui --workdir {config.workdir}    # MLflow: experiment {study.spec.name!r}", highlight=False
    )
    if run:
        config_file = folder / "runs" / run / "config.yaml"
        console.print(f"  offsweep train --config {config_file}    # the best trial's first run again", highlight=False)
    console.print(f"store: {store}", highlight=False)
