"""What a user sees while a study runs, and at its end."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

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
from orchestrator.reading import TOP, about_study, duration, print_study, show_params
from sweeps.objectives import SCORE
from sweeps.study import Study

REFRESHES = 4  # of the live table, per second


class Display:
    """Live table on a terminal, one line per finished trial elsewhere; use it in a `with` statement.

    Args:
        console: where.
        unit: what a trial's value is called.
        numbers: what the study's trials are shown as, by number, if not by that: a confirm stage repeats the search's.
    """

    def __init__(self, console: Console, unit: str, numbers: Sequence[int] = ()) -> None:
        self._console, self._unit, self._numbers = console, unit, numbers
        live = Live(console=console, refresh_per_second=REFRESHES, transient=True)
        self._live = live if console.is_terminal else None
        self._told: set[int] = set()
        self._rendered = -math.inf
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
            if time.monotonic() - self._rendered >= 1 / REFRESHES:
                self._rendered = time.monotonic()
                self._live.update(self._render(progress))
        elif progress.stage != self._stage:
            self._stage = progress.stage
            if self._stage:
                self._console.print(f"building {self._stage}")
        for record in progress.study.ended_beside(self._told):
            self._told.add(record.number)
            state = "diverged" if record.diverged else record.state
            value = "" if record.value is None else f" {self._unit} {record.value:.1f}"
            left = _duration(progress.seconds_left())
            self._console.print(
                f"trial {self._shown(record.number):>3} {state:<9}{value}  {show_params(record.active)}  "
                f"({progress.study.num_finished}/{progress.study.spec.num_trials}, {left} left)",
                highlight=False,
            )

    def _shown(self, number: int) -> int:
        return self._numbers[number] if self._numbers else number

    def _render(self, progress: Progress) -> RenderableType:
        done, planned = progress.updates_done(), progress.updates_planned()
        bar = Table.grid(padding=(0, 1))
        elapsed = _duration(time.monotonic() - progress.started)
        best = progress.study.best
        best_text = (
            f"best {self._unit} {best.value:.1f} (trial {self._shown(best.number)})"
            if best and best.value is not None
            else ""
        )
        bar.add_row(
            f"{progress.study.num_finished}/{progress.study.spec.num_trials} trials",
            ProgressBar(total=max(planned, 1), completed=done, width=30),
            f"{elapsed} elapsed, {_duration(progress.seconds_left())} left", best_text,
        )  # fmt: skip
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("trial", "updates", self._unit, "hyperparameters"):
            table.add_column(column, justify="right" if column != "hyperparameters" else "left")
        room = max(1, self._console.height - 6)
        for trial in itertools.islice(progress.running.values(), room):
            steps = trial.common_steps()
            value = f"{trial.value_at(steps[-1]):.1f}" if steps else "-"
            done = min((trial.updates.get(key, 0) for key in trial.run_keys), default=0)
            updates = f"{done}/{progress.config.method.num_updates}"
            table.add_row(str(self._shown(trial.number)), updates, value, show_params(trial.active))
        parts: list[RenderableType] = [bar, table]
        if len(progress.running) > room:
            parts.append(Text(f"and {len(progress.running) - room} more trials that are running", style="dim"))
        if progress.stage:
            parts.append(Text(f"building {progress.stage} (once, shared by all runs that need it)", style="dim"))
        return Group(*parts)


def _duration(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds)


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
    """What a study that has ended here found."""
    print_study(console, study, study.trials(), about_study(config, dataset, store), TOP)
