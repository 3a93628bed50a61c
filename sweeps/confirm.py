"""The confirm stage: the best settings of a search are trained again with fresh seeds, and only that is believed.

The best of many noisy values is too good: it was chosen for its luck as well (measured here on made-up objectives, the
best of 100 trials promised 3 to 12 points more than its settings were worth). So a search ends with a study of listed
trials in the folder `confirm` of its own, whose seeds, episodes and, if wanted, stages nothing was chosen by.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.errors import StudyError
from sweeps.pbt import replayed_params
from sweeps.space import Params

if TYPE_CHECKING:
    from sweeps.study import TrialRecord

FOLDER = "confirm"  # of a study's folder
CANDIDATES_FILE = "candidates.json"  # in it: what is trained again
FINAL_VALUES = "final_values"  # what a trial keeps: run key -> the run's value, whose mean is the trial's


@dataclass
class ConfirmSpec:
    """How a search ends: its best settings are trained again."""

    top: int = 3  # so many of them; 0: none
    enqueued: int = 0  # and so many of the trials that it began with (warm starts, enqueued ones), however they did
    num_seeds: int = 3  # for each, none of which the search has used
    fresh_stages: bool = True  # their ensembles and other stages are built with other seeds, too

    def validate(self) -> None:
        """Raises:
        StudyError: a number that makes no sense.
        """
        for name, least in (("top", 0), ("enqueued", 0), ("num_seeds", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise StudyError(f"study.confirm.{name} must be a whole number of at least {least}, not {value!r}.")
        if self.enqueued and not self.top:
            raise StudyError("study.confirm.enqueued is given, but top is 0, which leaves the confirm stage out.")


@dataclass(frozen=True)
class Candidate:
    """Settings that are to be trained again."""

    number: int  # the trial of the search
    searched: float  # its value there; of a pruned one its last report
    params: Params  # the active ones, without those that the confirm stage sets itself; of a population its schedule


@dataclass(frozen=True)
class Confirmation:
    """What came of a candidate."""

    number: int  # trial of the search
    searched: float  # its value there
    values: tuple[float, ...]  # of each fresh seed; of a diverged one the bad value that stands for it
    diverged: bool = False

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % for the mean over seeds, by Student's t; not a number with a single seed."""
        if len(self.values) < 2:
            return math.nan, math.nan
        from sweeps.statistics import student_interval

        return student_interval(self.values)


def candidates(
    records: Sequence[TrialRecord],
    ranked: Sequence[int],
    top: int,
    ignored: Collection[str] = (),
    enqueued: Sequence[int] = (),
) -> list[Candidate]:
    """The first of a search's ranked settings and those of some given trials, no two alike.

    Args:
        records: of the search.
        ranked: numbers of complete trials, best first (see `sweeps.selection.chosen_trials`).
        top: how many of those, at most.
        ignored: parameters that the confirm stage sets itself.
        enqueued: numbers of trials that are candidates whatever has come of them, unless they failed.
    """
    by_number = {record.number: record for record in records}
    chosen: list[Candidate] = []

    def choose(number: int) -> None:
        record = by_number[number]
        params = {key: setting for key, setting in replayed_params(record).items() if key not in ignored}
        if record.value is not None and all(params != one.params for one in chosen):
            chosen.append(Candidate(number, record.value, params))

    for number in ranked:
        if len(chosen) < top:
            choose(number)
    for number in enqueued:
        choose(number)
    return chosen


def save_candidates(folder: Path, chosen: Sequence[Candidate]) -> None:
    """Write down, atomically and before anything is trained, what a confirm stage in `folder` trains."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{CANDIDATES_FILE}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump([asdict(candidate) for candidate in chosen], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / CANDIDATES_FILE)


def load_candidates(folder: Path) -> list[Candidate]:
    """What `save_candidates` wrote, in the order of the confirm study's trials; [] where nothing is."""
    path = folder / CANDIDATES_FILE
    if not path.exists():
        return []
    content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [Candidate(**candidate) for candidate in content]


def confirmations(study_folder: Path) -> list[Confirmation]:
    """What the confirm stage of a study has found so far: best mean first, diverged ones last; [] while there is
    nothing.

    Args:
        study_folder: of the search; its confirm stage may be running.
    """
    from sweeps.study import JOURNAL_FILE, SPEC_FILE, Study

    folder = study_folder / FOLDER
    chosen = load_candidates(folder)
    if not chosen or not (folder / SPEC_FILE).exists() or not (folder / JOURNAL_FILE).exists():
        return []
    study = Study.open(folder, read_only=True)
    found = []
    for candidate, record in zip(chosen, study.trials(), strict=False):
        if record.state == "complete" and record.value is not None:
            values = [record.value] if record.diverged else record.attrs.get(FINAL_VALUES, {}).values()
            found.append(Confirmation(candidate.number, candidate.searched, tuple(values), record.diverged))
    sign = -1.0 if study.spec.direction == "maximize" else 1.0
    return sorted(found, key=lambda one: (one.diverged, sign * one.mean, one.number))
