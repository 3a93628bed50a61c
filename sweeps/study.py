"""A study: its budget, the trials so far, and the question what to run next.

A study lives in a folder and survives its driver. It starts nothing: the driver asks for trials, runs them
where it likes, reports their values, and tells the study how each ended.

    with Study.create(folder, spec) as study:
        while (trial := study.ask()) is not None:
            study.tell(trial.number, run(trial.active))

After a kill at any moment, `Study.open` continues: the trials that were running come back from `unfinished`,
with the same numbers and parameters, and everything that had been reported and told is there.
"""

from __future__ import annotations

import copy
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from sweeps._optuna import optuna
from sweeps.errors import StudyError
from sweeps.journal import Journal, mend
from sweeps.pruners import make_pruner
from sweeps.samplers import SLOW_SAMPLERS, GivenSampler, Space, make_sampler
from sweeps.space import Params
from sweeps.spec import PrunerSpec, SamplerSpec, StudySpec

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

State = Literal["waiting", "running", "complete", "pruned", "failed"]

_STATES: dict[str, State] = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
}
_DIRECTIONS = {
    "maximize": optuna.study.StudyDirection.MAXIMIZE,
    "minimize": optuna.study.StudyDirection.MINIMIZE,
}
SPEC_FILE = "study.yaml"
JOURNAL_FILE = "journal.log"
LOCK_FILE = "driver.lock"
BASIS = "offsweep:basis"  # with the study: which trials were running when the sampler began to choose trial `number`


@dataclass(frozen=True)
class TrialTicket:
    """A trial to be run."""

    number: int
    params: Params  # a value for every parameter of the space
    active: Params  # those that apply: what the configuration is to be overridden with
    attrs: dict[str, Any] = field(default_factory=dict)  # kept with the trial before its driver died


@dataclass(frozen=True)
class Proposal:
    """What the sampler has chosen for a coming trial."""

    params: Params  # a value for every parameter of the space
    attrs: dict[str, Any]  # what it keeps with the trial, for the next time


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the study knows it."""

    number: int
    state: State
    value: float | None  # of a complete trial; the last report of a pruned one
    params: Params
    active: Params
    attrs: dict[str, Any]
    intermediate: dict[int, float]  # step -> reported value, by step
    started: datetime | None  # UTC
    finished: datetime | None  # UTC

    @property
    def diverged(self) -> bool:
        """Whether it was told as diverged; its value is then a stand-in."""
        return bool(self.attrs.get("diverged", False))


class Study:
    """A study in a folder, opened by its one driver, or by anybody for reading.

    Use `Study.create` and `Study.open`; close it, or use it in a `with` statement.
    """

    def __init__(self, folder: Path, spec: StudySpec, lock: int | None) -> None:
        """For `create` and `open`; `lock` is the descriptor of the held lock, None when only reading."""
        self.folder = folder
        self.spec = spec
        self.space = spec.validate()
        self._distributions = self.space.distributions()
        self._lock = lock
        self._asked: set[int] = set()  # by this driver
        self._ended: dict[int, TrialRecord] = {}  # what never changes again
        self._load()

    @classmethod
    def create(cls, folder: Path | str, spec: StudySpec) -> Study:
        """Start a study in `folder`, which is made if need be, and become its driver.

        Raises:
            StudyError, SpaceError: the spec makes no sense, the folder already holds a study or cannot be
            written.
        """
        folder = Path(folder).absolute()
        spec = StudySpec.from_config(spec.to_config())  # a copy that no later change reaches
        spec.validate()
        exists = StudyError(f"{folder} already holds a study; continue it with --resume, or choose another study name.")
        if (folder / SPEC_FILE).exists():
            raise exists
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _acquire(folder)
        except OSError as error:
            raise StudyError(f"Cannot create a study in {folder}: {error.strerror}; choose another folder.") from error
        try:
            if (folder / SPEC_FILE).exists():
                raise exists
            if (folder / JOURNAL_FILE).exists():
                raise StudyError(
                    f"{folder} holds {JOURNAL_FILE} of a study whose {SPEC_FILE} is gone; restore it, or "
                    "choose another study name."
                )
            # First the spec, then the journal: from here on the study exists and `open` makes up what is
            # missing.
            spec.save(folder / SPEC_FILE)
            return cls(folder, spec, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def open(cls, folder: Path | str, *, read_only: bool = False) -> Study:
        """Continue the study in `folder` as its driver, or look at it.

        What a killed driver left unfinished at the journal's end is cut. With `read_only`, the study may have
        a driver meanwhile, whose progress is seen at every call; nothing can be changed.

        Raises:
            StudyError: there is no study, it has another driver, or its files are damaged.
        """
        folder = Path(folder).absolute()
        if not (folder / SPEC_FILE).exists():
            raise StudyError(f"There is no study in {folder}; check the study name and the work folder.")
        if read_only:
            return cls(folder, StudySpec.load(folder / SPEC_FILE), None)
        try:
            lock = _acquire(folder)
        except OSError as error:
            raise StudyError(f"Cannot open the study in {folder} for writing: {error.strerror}.") from error
        try:
            spec = StudySpec.load(folder / SPEC_FILE)
            mend(folder / JOURNAL_FILE)
            return cls(folder, spec, lock)
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Let another driver take over; further changes are refused. Running trials stay running."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What to run

    def propose(self) -> Callable[[], Proposal] | None:
        """What chooses the parameters of the coming trial, for a sampler that takes its time over them.

        It works on a copy of the trials as they are now, and so may be called in another thread while this study is
        told how others end. `ask` takes what it returns.

        Which trials had ended when the sampler began is written down: where a driver was killed before it asked, the
        next one's sampler knows no more of them, and chooses the same parameters.

        Returns:
            None where `ask` needs no proposal: the sampler is quick, the trial is listed or enqueued, or all
            `spec.num_trials` have been asked for.
        """
        self._check_driver()
        if self.spec.sampler.name not in SLOW_SAMPLERS or not self.space.parameters:
            return None
        trials = self._frozen()
        number = self._coming(trials)
        if number is None or number < len(trials):
            return None
        basis = self._storage.get_study_system_attrs(self._study._study_id).get(BASIS, {})
        if basis.get("number") != number:
            basis = {"number": number, "running": [t.number for t in trials if t.state.name == "RUNNING"]}
            self._storage.set_study_system_attr(self._study._study_id, BASIS, basis)
        running = set(basis["running"])
        snapshot = [_as_running(trial) if trial.number in running else trial for trial in trials]
        return lambda: _choose(self.spec.sampler, self.spec.direction, self._distributions, snapshot)

    def ask(self, proposal: Proposal | None = None) -> TrialTicket | None:
        """The next trial to run, or None when all `spec.num_trials` have been asked for.

        Listed trials come in their order, enqueued ones before those of the sampler. Depends on nothing but the spec
        and the journal: the same results told in the same order lead to the same trials, whether or not the study was
        resumed between. With `propose`, these are the results that were told before it.

        Args:
            proposal: of what `propose` has returned; None: it is worked out here, if the sampler needs one. One that
                an enqueued trial has come before is left aside.
        """
        self._check_driver()
        trials = self._frozen()
        number = self._coming(trials)
        if number is None:
            return None
        enqueued = number < len(trials)
        if proposal is None and (choose := self.propose()) is not None:
            proposal = choose()
        if proposal is None or enqueued:
            sampler = self.spec.sampler
            self._study.sampler = make_sampler(sampler.name, sampler.seed, number, self._distributions)
        else:
            self._study.sampler = GivenSampler(proposal.params)
        with self._group():
            trial = self._study.ask(self._distributions)
            if proposal is not None and not enqueued:
                for key, value in proposal.attrs.items():
                    self._storage.set_trial_system_attr(trial._trial_id, key, value)
        self._asked.add(trial.number)
        return self._ticket(self._trial(trial.number))

    def enqueue(self, params: Mapping[str, Any]) -> None:
        """Make `params` a coming trial, before any that the sampler chooses; part of `spec.num_trials`.

        Args:
            params: known-good values; the sampler chooses those that are left out. The same values are not
                taken twice, so a resumed driver may enqueue them again.

        Raises:
            SpaceError: a parameter or value that is not of the space.
            StudyError: the study's trials are listed.
        """
        self._check_driver()
        if self.spec.trials:
            raise StudyError("The study's trials are listed, none can be enqueued; put it into study.trials.")
        self.space.check(params)
        values = {key: params[key] for key in self.space.parameters if key in params}
        if all(trial.system_attrs.get("fixed_params") != values for trial in self._frozen()):
            self._study.enqueue_trial(values)

    def unfinished(self) -> list[TrialTicket]:
        """The running trials that an earlier driver asked for, to be run on under their numbers, in order."""
        return [
            self._ticket(trial)
            for trial in self._frozen()
            if trial.state.name == "RUNNING" and trial.number not in self._asked
        ]

    def extend(self, num_trials: int) -> None:
        """Change the budget: from now on the study has `num_trials` trials in all, past ones included.

        Raises:
            StudyError: not a whole number of at least 1, or more than 1 trial of an empty space.
        """
        self._check_driver()
        spec = replace(self.spec, num_trials=num_trials)
        spec.validate()
        spec.save(self.folder / SPEC_FILE)
        self.spec = spec

    # How it goes

    def report(self, number: int, step: int, value: float) -> None:
        """Keep an intermediate value of a running trial; a step that is already known is ignored.

        A trial that continues from a checkpoint repeats some steps; what was first reported stands.

        Args:
            number: of the trial.
            step: progress, >= 0, in the unit of `spec.total_steps`.
            value: in the unit of the trial's value; finite.

        Raises:
            StudyError: the trial does not exist or is not running, or the step or value makes no sense.
        """
        self._check_driver()
        trial = self._running(number)
        if isinstance(step, bool) or step != int(step) or step < 0:
            raise StudyError(f"A step is a whole number of at least 0, not {step!r}.")
        if not math.isfinite(value):
            raise StudyError(f"Trial {number} reported {value} at step {step}; tell it as diverged instead.")
        if int(step) not in trial.intermediate_values:
            self._storage.set_trial_intermediate_value(trial._trial_id, int(step), float(value))

    def should_prune(self, number: int) -> bool:
        """Whether the study's pruner would stop this running trial after its last report.

        Raises:
            StudyError: the trial does not exist or is not running.
        """
        return self._study.pruner.prune(self._study, self._running(number))

    def tell(self, number: int, value: float) -> None:
        """The trial ended with this value.

        Raises:
            StudyError: the trial does not exist or is not running, or the value is not finite.
        """
        self._finish(number, value, "COMPLETE", {})

    def tell_pruned(self, number: int) -> None:
        """The trial was stopped early; its last report becomes its value.

        Raises:
            StudyError: the trial does not exist or is not running.
        """
        self._finish(number, None, "PRUNED", {})

    def tell_diverged(self, number: int, value_finite: float) -> None:
        """The trial diverged.

        Args:
            number: of the trial.
            value_finite: a bad value that keeps the sampler away, such as the score of a random policy;
                samplers ignore failed trials and would return. The trial is marked `diverged` and is the best
                one only where all have diverged.

        Raises:
            StudyError: the trial does not exist or is not running, or the value is not finite.
        """
        self._finish(number, value_finite, "COMPLETE", {"diverged": True})

    def tell_failed(self, number: int, reason: str) -> None:
        """The trial could not be run, for a reason that says nothing about its parameters; samplers ignore
        it.

        Raises:
            StudyError: the trial does not exist or is not running.
        """
        self._finish(number, None, "FAIL", {"failure": reason})

    # What is known

    def trials(self) -> list[TrialRecord]:
        """All trials by number, waiting and running ones included."""
        records = []
        for trial in self._frozen():
            record = self._ended.get(trial.number)
            if record is None:
                record = self._record(trial)
                if trial.state.is_finished():
                    self._ended[trial.number] = record
            records.append(record)
        return records

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the best value, first of equals: a diverged one only if all did."""
        complete = [record for record in self.trials() if record.state == "complete"]
        candidates = [record for record in complete if not record.diverged] or complete
        sign = -1.0 if self.spec.direction == "maximize" else 1.0
        return min(candidates, key=lambda record: sign * (record.value or 0.0), default=None)

    @property
    def num_finished(self) -> int:
        """Number of trials that have ended, however they did."""
        return sum(trial.state.is_finished() for trial in self._frozen())

    def set_attr(self, number: int, key: str, value: Any) -> None:
        """Keep a JSON-able value with a running trial, over an earlier one of the same key.

        Raises:
            StudyError: the trial does not exist or is not running, or the value is not JSON-able.
        """
        self._check_driver()
        self._storage.set_trial_user_attr(self._running(number)._trial_id, key, _jsonable(key, value))

    def attrs(self, number: int) -> dict[str, Any]:
        """What is kept with a trial.

        Raises:
            StudyError: the trial does not exist.
        """
        return dict(self._trial(number).user_attrs)

    def set_study_attr(self, key: str, value: Any) -> None:
        """Keep a JSON-able value with the study, over an earlier one of the same key.

        Raises:
            StudyError: the value is not JSON-able.
        """
        self._check_driver()
        self._study.set_user_attr(key, _jsonable(key, value))

    @property
    def study_attrs(self) -> dict[str, Any]:
        """What is kept with the study."""
        return dict(self._study.user_attrs)

    # Inside

    def _load(self) -> None:
        path = self.folder / JOURNAL_FILE
        self._journal = Journal(path)
        self._ended = {}
        try:
            self._storage = optuna.storages.JournalStorage(self._journal)
            studies = self._storage.get_all_studies()
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"{path} is not the journal of a study; restore the file from a copy.") from error
        # Not `load_if_exists`, which appends to the journal before it looks.
        if not studies:
            if self._lock is None:
                raise StudyError(f"The study in {self.folder} is only being created; look again in a moment.")
            self._study = optuna.create_study(
                storage=self._storage, study_name=self.spec.name, direction=_DIRECTIONS[self.spec.direction]
            )
        else:
            self._study = optuna.load_study(study_name=studies[0].study_name, storage=self._storage)
        pruner = PrunerSpec("none") if self.spec.trials else self.spec.pruner
        self._study.pruner = make_pruner(pruner, self.spec.total_steps)
        self._check_space()

    def _check_space(self) -> None:
        """The trials so far must have the parameters of the spec, which a hand may have edited since."""
        for trial in self._frozen():
            if trial.state.name == "WAITING":
                continue
            same = trial.distributions.keys() == self._distributions.keys()
            if same:
                try:
                    for key, distribution in self._distributions.items():
                        optuna.distributions.check_distribution_compatibility(trial.distributions[key], distribution)
                except ValueError:
                    same = False
            if not same:
                raise StudyError(
                    f"The space in {self.folder / SPEC_FILE} is not the one that trial {trial.number} came "
                    "from; restore it, or start a new study (with these trials enqueued, if they are of use)."
                )

    @contextmanager
    def _group(self) -> Iterator[None]:
        """Operations that are written whole or not at all."""
        try:
            with self._journal.group():
                yield
        except BaseException:
            # Optuna has seen operations that were never written: back to what the file says.
            self._load()
            raise

    def _finish(self, number: int, value: float | None, state: str, attrs: Mapping[str, Any]) -> None:
        self._check_driver()
        trial = self._running(number)
        if value is not None and not math.isfinite(value):
            raise StudyError(f"Trial {number} cannot end with {value}; tell it as diverged, with a finite value.")
        with self._group():
            for key, attr in attrs.items():
                self._storage.set_trial_user_attr(trial._trial_id, key, attr)
            told = None if value is None else float(value)
            self._study.tell(number, told, state=optuna.trial.TrialState[state])

    def _check_driver(self) -> None:
        if self._lock is None:
            raise StudyError(f"The study in {self.folder} is closed or open for reading only; open it to change it.")

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        try:
            if number < 0:
                raise KeyError(number)
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
            return self._storage.get_trial(trial_id)
        except KeyError:
            raise StudyError(f"There is no trial {number}; the study has {len(self._frozen())}.") from None

    def _coming(self, trials: Sequence[FrozenTrial]) -> int | None:
        """Number of the trial that is asked for next: the first waiting one, else a new one; None: all have been."""
        waiting = [trial.number for trial in trials if trial.state.name == "WAITING"]
        if len(trials) - len(waiting) >= self.spec.num_trials:
            return None
        return waiting[0] if waiting else len(trials)

    def _running(self, number: int) -> FrozenTrial:
        trial = self._trial(number)
        if trial.state.name != "RUNNING":
            raise StudyError(f"Trial {number} is {_STATES[trial.state.name]}; only a running trial can be changed.")
        return trial

    def _params(self, trial: FrozenTrial) -> tuple[Params, Params]:
        """All and the active parameters; of a waiting trial what is known so far, and none."""
        if self.spec.trials:
            listed = self.spec.trials[trial.number]
            return dict(listed), dict(listed)
        if trial.state.name == "WAITING":
            return dict(trial.system_attrs.get("fixed_params", {})), {}
        params = {key: trial.params[key] for key in self.space.parameters}
        return params, self.space.active(params)

    def _ticket(self, trial: FrozenTrial) -> TrialTicket:
        params, active = self._params(trial)
        return TrialTicket(trial.number, params, active, dict(trial.user_attrs))

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        params, active = self._params(trial)
        return TrialRecord(
            number=trial.number,
            state=_STATES[trial.state.name],
            value=trial.value,
            params=params,
            active=active,
            attrs=dict(trial.user_attrs),
            intermediate=dict(sorted(trial.intermediate_values.items())),
            started=_utc(None if trial.state.name == "WAITING" else trial.datetime_start),
            finished=_utc(trial.datetime_complete),
        )


def _choose(sampler: SamplerSpec, direction: str, space: Space, trials: Sequence[FrozenTrial]) -> Proposal:
    """What a sampler makes of these trials."""
    study = optuna.create_study(direction=_DIRECTIONS[direction])
    for trial in trials:
        study._storage.create_new_trial(study._study_id, template_trial=trial)
    study.sampler = make_sampler(sampler.name, sampler.seed, len(trials), space)
    chosen = study.ask(dict(space))
    return Proposal(chosen.params, study._storage.get_trial_system_attrs(chosen._trial_id))


def _as_running(trial: FrozenTrial) -> FrozenTrial:
    """A trial as it was before it ended, for samplers."""
    trial = copy.copy(trial)
    trial.state, trial.values, trial.datetime_complete = optuna.trial.TrialState.RUNNING, None, None
    return trial


def _acquire(folder: Path) -> int:
    """Lock the folder for one driver, and return the descriptor that holds the lock.

    The lock is the system's, on an open file: it goes with the process however that ends, and no stale file
    can keep the next driver out.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown process"
        os.close(descriptor)
        raise StudyError(
            f"The study in {folder} already has a driver ({holder}); wait for it to end or stop it."
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    return descriptor


def _jsonable(key: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise StudyError(f"The attribute '{key}' must be JSON-able: {error}.") from error


def _utc(moment: datetime | None) -> datetime | None:
    """Optuna's journal gives local time without a zone."""
    return None if moment is None else moment.astimezone(UTC)
