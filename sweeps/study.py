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
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from sweeps._optuna import optuna
from sweeps.errors import StudyBusyError, StudyError, StudyExistsError
from sweeps.journal import Journal, mend
from sweeps.pruners import make_pruner
from sweeps.samplers import SLOW_SAMPLERS, GivenSampler, Space, make_sampler
from sweeps.space import Params
from sweeps.spec import PrunerSpec, SamplerSpec, StudySpec
from sweeps.storage import Heartbeat, Ledger, driver_id, new_trial, open_storage

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
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
VOID = "void"  # attribute of a trial that does not count, with the reason


class TrialTakenOver(StudyError):
    """A trial that this driver was silent about for so long that another one does it anew."""


@dataclass(frozen=True)
class TrialTicket:
    """A trial to be run."""

    number: int
    params: Params  # a value for every parameter of the space
    active: Params  # those that apply: what the configuration is to be overridden with
    attrs: dict[str, Any] = field(default_factory=dict)  # kept with the trial before its driver died
    place: int = -1  # how many trials its driver has been given before; its number where there is one driver only


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

    With `spec.storage` the trials are in a database instead, and every driver has a folder of its own. A trial then
    has a `driver` among its attributes; one that does not count (`VOID`) is in none of the answers.
    """

    def __init__(self, folder: Path, spec: StudySpec, lock: int | None, alike: Mapping[str, Any] | None = None) -> None:
        """For `create` and `open`; `lock` is the descriptor of the held lock, None when only reading; `alike` is given
        by `create`."""
        self.folder = folder
        self.spec = spec
        self.space = spec.validate()
        self._distributions = self.space.distributions()
        self._lock = lock
        self._asked: set[int] = set()  # by this driver
        self._ended: dict[int, TrialRecord] = {}  # what never changes again
        self._under_way: dict[int, tuple[FrozenTrial, TrialRecord]] = {}  # as of when it was looked at
        self._shared = spec.storage is not None
        self._heartbeat: Heartbeat | None = None
        self._left: set[int] = set()  # running trials of this driver from before its death
        self.driver = driver_id(folder) if self._shared and lock is not None else None
        self._alike = alike
        try:
            self._load()
        except BaseException:
            self._stop_heartbeat()
            raise

    @classmethod
    def create(cls, folder: Path | str, spec: StudySpec, alike: Mapping[str, Any] | None = None) -> Study:
        """Start a study in `folder`, which is made if need be, and become its driver; with `spec.storage`, become one
        more driver of the study of that name if it is there.

        Args:
            alike: JSON-able; what all drivers of the study must have the same values of, beside the spec.

        Raises:
            StudyError, SpaceError: the spec makes no sense, the folder already holds a study or cannot be
            written; the storage cannot be used, or its study is not this one.
        """
        folder = Path(folder).absolute()
        spec = StudySpec.from_config(spec.to_config())  # a copy that no later change reaches
        spec.validate()
        exists = StudyExistsError(
            f"{folder} already holds a study; continue it with --resume, or choose another study name."
        )
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
            if spec.storage is None:
                return cls(folder, spec, lock)
            try:
                return cls(folder, spec, lock, alike or {})
            except BaseException:
                (folder / SPEC_FILE).unlink()  # it is no study, and may be tried again
                raise
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
        self._stop_heartbeat()
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
            None where `ask` needs no proposal: the sampler is quick, the trial is listed or enqueued, all
            `spec.num_trials` have been asked for, or other drivers ask at the same time.
        """
        self._check_driver()
        if self.spec.sampler.name not in SLOW_SAMPLERS or not self.space.parameters or self._shared:
            return None
        number = self._coming()
        if number is None or number < self._num_trials:
            return None
        trials = self._frozen()
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
        if self._shared:
            return self._ask_shared()
        number = self._coming()
        if number is None:
            return None
        enqueued = number < self._num_trials
        if proposal is None and (choose := self.propose()) is not None:
            proposal = choose()
        if proposal is None or enqueued:
            sampler = self.spec.sampler
            self._study.sampler = make_sampler(sampler.name, sampler.seed, number, self._distributions)
        else:
            self._study.sampler = GivenSampler(proposal.params)
        with self._group():
            trial = self._study.ask(self._distributions) if enqueued else self._new_trial()
            if proposal is not None and not enqueued:
                for key, value in proposal.attrs.items():
                    self._storage.set_trial_system_attr(trial._trial_id, key, value)
        if enqueued:
            self._waiting.popleft()
        else:
            self._num_trials += 1
        self._asked.add(trial.number)
        return self._ticket(self._trial(trial.number))

    def _new_trial(self) -> optuna.Trial:
        """As Optuna's `Study.ask`, which looks through all trials for a waiting one first."""
        self._study._thread_local.cached_all_trials = None
        trial = optuna.Trial(self._study, self._storage.create_new_trial(self._study._study_id))
        for key, distribution in self._distributions.items():
            trial._suggest(key, distribution)
        return trial

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
        if self._shared:
            if values not in self._points():
                self._ledger.add("point", self._me, values)
            return
        if all(trial.system_attrs.get("fixed_params") != values for trial in self._frozen()):
            self._study.enqueue_trial(values)
            self._waiting.append(self._num_trials)
            self._num_trials += 1

    def unfinished(self) -> list[TrialTicket]:
        """The running trials that an earlier driver asked for, to be run on under their numbers, in order."""
        return [
            self._ticket(trial)
            for trial in self._frozen()
            if trial.state.name == "RUNNING" and trial.number not in self._asked
            if not self._shared or (trial.number in self._left and self._is_given(trial))
        ]

    def others_running(self) -> bool:
        """Whether trials are running that other drivers asked for: `ask` may have more to give when they end, or when
        their drivers turn out to be dead."""
        return self._shared and any(
            trial.state.name == "RUNNING" and trial.user_attrs.get("driver") != self.driver for trial in self._frozen()
        )

    def claim(self, task: str) -> bool:
        """Whether this driver is the one to do what has to be done once, such as what follows the last trial.

        The first to claim a task has it, also when it is resumed, until it is dead.
        """
        self._check_driver()
        if not self._shared:
            return True
        while True:
            claims = self._ledger.read(f"claim of {task}")
            holder = next((driver for driver, _ in claims if driver == self._me or not self._is_dead(driver)), None)
            if holder is not None:
                return holder == self._me
            self._ledger.add(f"claim of {task}", self._me, None)

    def extend(self, num_trials: int) -> None:
        """Change the budget: from now on the study has `num_trials` trials in all, past ones included.

        Raises:
            StudyError: not a whole number of at least 1, or more than 1 trial of an empty space.
        """
        self._check_driver()
        spec = replace(self.spec, num_trials=num_trials)
        spec.validate()
        spec.save(self.folder / SPEC_FILE)
        if self._shared:
            self._ledger.add("num_trials", self._me, num_trials)
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
            with self._unless_taken_over(number):
                self._storage.set_trial_intermediate_value(trial._trial_id, int(step), float(value))

    def should_prune(self, number: int) -> bool:
        """Whether the study's pruner would stop this running trial after its last report.

        Raises:
            StudyError: the trial does not exist or is not running.
        """
        study = cast("optuna.Study", _Completed(self._study, self._complete)) if self._counts else self._study
        return self._study.pruner.prune(study, self._running(number))

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
                if not self._is_given(trial):
                    continue
                record = self._record_of(trial)
            records.append(record)
        return records

    def ended_beside(self, known: Collection[int]) -> list[TrialRecord]:
        """The trials that have ended but for those whose numbers are known, all of which have, by number."""
        if not self._counts:
            return [r for r in self.trials() if r.finished is not None and r.number not in known]
        fresh: list[int] = []
        for number in reversed(self._in_order_of_end):  # those known are mostly the ones before
            if len(fresh) + len(known) == len(self._in_order_of_end):
                break
            if number not in known:
                fresh.append(number)
        return [self._ended.get(number) or self._record_of(self._trial(number)) for number in sorted(fresh)]

    def trial(self, number: int) -> TrialRecord:
        """One trial, also one that does not count.

        Raises:
            StudyError: the trial does not exist.
        """
        return self._record(self._trial(number))

    def discarded(self) -> list[TrialRecord]:
        """The trials that do not count, because another one took their place."""
        return [self._record(trial) for trial in self._frozen() if _is_void(trial)]

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
        if self._counts:
            return len(self._in_order_of_end)
        return sum(trial.state.is_finished() and not _is_void(trial) for trial in self._frozen())

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is reported, told or kept inside is written at its end, in one go: a kill leaves all of it or nothing,
        and one write waits for the disk. In a shared storage it is written one by one."""
        with self._group():
            yield

    def set_attr(self, number: int, key: str, value: Any) -> None:
        """Keep a JSON-able value with a running trial, over an earlier one of the same key.

        Raises:
            StudyError: the trial does not exist or is not running, or the value is not JSON-able.
        """
        self._check_driver()
        trial = self._running(number)
        with self._unless_taken_over(number):
            self._storage.set_trial_user_attr(trial._trial_id, key, _jsonable(key, value))

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
        if self._shared:
            self._connect()
        else:
            self._load_journal()
        pruner = PrunerSpec("none") if self.spec.trials or self.spec.pbt else self.spec.pruner
        self._study.pruner = make_pruner(pruner, self.spec.total_steps)
        self._check_space()

    def _load_journal(self) -> None:
        path = self.folder / JOURNAL_FILE
        self._journal = Journal(path)
        self._ended, self._under_way = {}, {}
        try:
            self._storage: BaseStorage = optuna.storages.JournalStorage(self._journal)
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
        self._count()

    def _count(self) -> None:
        """Note what a driver would otherwise look for among all trials again and again; from here on they change by
        this object alone."""
        trials = self._frozen()
        self._num_trials = len(trials)
        self._waiting = deque(trial.number for trial in trials if trial.state.name == "WAITING")
        ended = [trial for trial in trials if trial.state.is_finished()]
        ended.sort(key=lambda trial: (trial.datetime_complete, trial.number))
        self._in_order_of_end = [trial.number for trial in ended]
        self._complete = [trial for trial in ended if trial.state.name == "COMPLETE"]

    @property
    def _counts(self) -> bool:
        """Whether `_count` holds: nobody else can change the trials."""
        return self._lock is not None and not self._shared

    def _check_space(self) -> None:
        """The trials so far must have the parameters of the spec, which a hand may have edited since."""
        for trial in self._frozen():
            if trial.state.name == "WAITING" or not self._is_given(trial):
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
        """Operations that are written whole or not at all; in a shared storage, one by one."""
        if self._shared or self._journal.in_group:
            yield
            return
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
        with self._group(), self._unless_taken_over(number):
            for key, attr in attrs.items():
                self._storage.set_trial_user_attr(trial._trial_id, key, attr)
            told = None if value is None else float(value)
            self._study.tell(number, told, state=optuna.trial.TrialState[state])
            if not self._shared:
                self._in_order_of_end.append(number)
                if state == "COMPLETE":
                    self._complete.append(self._trial(number))

    @contextmanager
    def _unless_taken_over(self, number: int) -> Iterator[None]:
        """Say so if another driver ends the trial between our looking at it and our writing to it."""
        try:
            yield
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            if _is_void(self._trial(number)):
                self._running(number)
            raise

    def _check_driver(self) -> None:
        if self._lock is None:
            raise StudyError(f"The study in {self.folder} is closed or open for reading only; open it to change it.")
        if self._heartbeat is not None and self._heartbeat.doubled:
            raise StudyError(
                f"Two processes work as driver {self.driver}, one of them in a copy of {self.folder}; stop one, and "
                "give every driver a work folder of its own."
            )

    # Several drivers

    @property
    def _me(self) -> str:
        assert self.driver is not None
        return self.driver

    def _connect(self) -> None:
        assert self.spec.storage is not None
        self._storage = open_storage(self.spec.storage)
        name = self.spec.name
        if self._lock is None:
            try:
                self._study = optuna.load_study(study_name=name, storage=self._storage)
            except KeyError:
                raise StudyError(f"There is no study {name} in study.storage={self.spec.storage}.") from None
            self._ledger = Ledger(self._storage, name)
            self._read_budget()
            return
        self._ledger = Ledger(self._storage, name)
        if self._alike is not None:
            self._agree(self._alike)
        self._study = optuna.create_study(
            storage=self._storage, study_name=name, direction=_DIRECTIONS[self.spec.direction], load_if_exists=True
        )
        self._read_budget()
        self._heartbeat = Heartbeat(self._ledger, self._me, self.spec.takeover_minutes)
        self._left = {trial.number for trial in self._mine_running()}
        for trial in self._mine_running():
            if not self._is_given(trial):
                self._discard(trial, "its driver was killed while it asked for it")
            elif "resumed_from" in trial.user_attrs:
                self._replace(trial)
            elif not self._distributions and not self._stands(trial):  # else it has stood: it has parameters
                self._discard(trial, "another one came first")

    def _agree(self, alike: Mapping[str, Any]) -> None:
        """Make sure that the study in the storage, if somebody has created it before, is this one."""
        mine = {f"study.{key}": value for key, value in self.spec.to_config().items()} | dict(alike)
        for key in ("study.storage", "study.takeover_minutes", "study.num_trials"):
            mine.pop(key)
        wanted = self.spec.num_trials
        mine = _jsonable("study", mine)
        _, first = self._ledger.settle("settings", self._me, {"settings": mine, "num_trials": wanted})
        theirs = first["settings"]
        for key in sorted(theirs.keys() | mine.keys()):
            if theirs.get(key) != mine.get(key):
                raise StudyError(
                    f"The study {self.spec.name} in study.storage has {key}={theirs.get(key)}, not {mine.get(key)}: "
                    "all drivers of a study need the same settings; correct it, or choose another study name."
                )
        self._read_budget()
        if self.spec.num_trials != wanted:
            raise StudyError(
                f"The study {self.spec.name} in study.storage has study.num_trials={self.spec.num_trials}, not "
                f"{wanted}; correct it, or choose another study name."
            )

    def _read_budget(self) -> None:
        """The number of trials that the first driver had, or that somebody has extended it to."""
        budgets = [content["num_trials"] for _, content in self._ledger.read("settings")][:1]
        budgets += [content for _, content in self._ledger.read("num_trials")]
        if budgets and budgets[-1] != self.spec.num_trials:
            self.spec = replace(self.spec, num_trials=budgets[-1])

    def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

    def _is_dead(self, driver: str | None) -> bool:
        return driver != self.driver and self._heartbeat is not None and self._heartbeat.is_dead(driver)

    def _is_given(self, trial: FrozenTrial) -> bool:
        """Whether a trial counts and has all its parameters, which are written one by one."""
        if not self._shared:
            return True
        return not _is_void(trial) and trial.params.keys() == self._distributions.keys()

    def _mine_running(self) -> list[FrozenTrial]:
        return [
            trial
            for trial in self._frozen()
            if trial.state.name == "RUNNING" and trial.user_attrs.get("driver") == self.driver
        ]

    def _points(self) -> list[dict[str, Any]]:
        """The settings given by hand, each once, in the order in which trials take them."""
        if self.spec.trials:
            return self.spec.trials
        points: list[dict[str, Any]] = []
        for _, point in self._ledger.read("point"):
            if point not in points:
                points.append(point)
        return points

    def _ask_shared(self) -> TrialTicket | None:
        """As `ask`: what dead drivers have left running, then new trials.

        A new trial is created first and then looked at: it stands if it is within the budget and nobody else's with a
        lower number has taken its point. So two drivers that ask at once never get more than there is, and what a
        kill leaves half-done can be told by everybody.
        """
        known = self._asked | self._left
        for trial in self._mine_running():  # created by a call whose answer was lost
            if trial.number not in known:
                self._discard(trial, "it was created twice")
        for trial in self._frozen():
            if trial.state.name == "RUNNING" and self._is_dead(trial.user_attrs.get("driver")):
                adopted = self._adopt(trial)
                if adopted is not None:
                    return adopted
        while True:
            self._read_budget()
            counting = [trial for trial in self._frozen() if not _is_void(trial)]
            if len(counting) >= self.spec.num_trials:
                return None
            taken = {trial.user_attrs.get("point") for trial in counting}
            points = self._points()
            point = next((index for index in range(len(points)) if index not in taken), None)
            attrs: dict[str, Any] = {"driver": self.driver, "place": self._next_place()}
            if point is not None:
                attrs["point"] = point
            if self.spec.trials and point is None:
                return None
            fixed = None if point is None or self.spec.trials else points[point]
            number = new_trial(self._storage, self._study._study_id, attrs, fixed)
            self._asked.add(number)
            trial = self._trial(number)
            if not self._stands(trial):
                self._discard(trial, "another one came first")
                continue
            self._study.sampler = self._shared_sampler(number)
            suggesting = optuna.trial.Trial(self._study, trial._trial_id)
            for key, distribution in self._distributions.items():
                suggesting._suggest(key, distribution)
            return self._ticket(self._trial(number))

    def _shared_sampler(self, number: int) -> BaseSampler:
        sampler = make_sampler(self.spec.sampler.name, self.spec.sampler.seed, number, self._distributions)
        if isinstance(sampler, optuna.samplers.QMCSampler):
            # it would count in the storage without a lock, and give two drivers the same point
            vars(sampler)["_find_sample_id"] = lambda study, search_space: number
        return sampler

    def _next_place(self) -> int:
        mine = [trial for trial in self._frozen() if trial.user_attrs.get("driver") == self.driver]
        return max((trial.user_attrs["place"] for trial in mine if not _is_void(trial)), default=-1) + 1

    def _stands(self, trial: FrozenTrial) -> bool:
        """Whether a new trial is within the budget and the first with its point; the answer never turns to yes for
        too many, since those it counts are there before it, or stand for one that was."""
        before = [
            other
            for other in self._frozen()
            if not _is_void(other) and (other.number < trial.number or "resumed_from" in other.user_attrs)
        ]
        point = trial.user_attrs.get("point")
        if point is not None and any(other.user_attrs.get("point") == point for other in before):
            return False
        return len(before) < self.spec.num_trials

    def _adopt(self, trial: FrozenTrial) -> TrialTicket | None:
        """Do a dead driver's trial anew, under another number: whatever its driver says later comes too late."""
        if not self._is_given(trial):
            self._discard(trial, "its driver was killed while it asked for it")
            return None
        if "resumed_from" in trial.user_attrs and not self._replace(trial):
            return None
        if "resumed_from" not in trial.user_attrs and not self._distributions and not self._stands(trial):
            self._discard(trial, "another one came first")
            return None
        if self._replacements(trial.number):
            self._end_replaced(trial, self._replacements(trial.number)[0].number)
            return None
        attrs = {"driver": self.driver, "place": self._next_place(), "resumed_from": trial.number}
        if "point" in trial.user_attrs:
            attrs["point"] = trial.user_attrs["point"]
        number = new_trial(
            self._storage, self._study._study_id, attrs, params=trial.params, distributions=trial.distributions
        )
        self._asked.add(number)
        return self._ticket(self._trial(number)) if self._replace(self._trial(number)) else None

    def _replace(self, trial: FrozenTrial) -> bool:
        """Let a trial take the place of the one it was resumed from, if it is the first to do so and that one has not
        ended otherwise; whether it does. May be repeated."""
        old = self._trial(trial.user_attrs["resumed_from"])
        first = self._replacements(old.number)[0]
        if first.number != trial.number:
            self._discard(trial, "another one came first")
            return False
        if not self._end_replaced(old, trial.number):
            self._discard(trial, f"trial {old.number} came to its end after all")
            return False
        return True

    def _replacements(self, number: int) -> list[FrozenTrial]:
        """Of a trial, by number: the first one stands, or has stood until it was replaced itself."""
        return [trial for trial in self._frozen() if trial.user_attrs.get("resumed_from") == number]

    def _end_replaced(self, old: FrozenTrial, number: int) -> bool:
        """End a trial in favour of another; whether it had not ended otherwise. The storage ends it once."""
        if old.state.name == "RUNNING":
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(old._trial_id, "resumed_as", number)
                self._discard(old, f"its driver was silent, and trial {number} took its place")
        return _is_void(self._trial(old.number))

    def _discard(self, trial: FrozenTrial, reason: str) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial._trial_id, VOID, reason)
            self._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)

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

    def _coming(self) -> int | None:
        """Number of the trial that is asked for next: the first waiting one, else a new one; None: all have been."""
        if self._num_trials - len(self._waiting) >= self.spec.num_trials:
            return None
        return self._waiting[0] if self._waiting else self._num_trials

    def _running(self, number: int) -> FrozenTrial:
        trial = self._trial(number)
        if _is_void(trial):
            raise TrialTakenOver(f"Trial {number} does not count any more: {trial.user_attrs[VOID]}.")
        if trial.state.name != "RUNNING":
            raise StudyError(f"Trial {number} is {_STATES[trial.state.name]}; only a running trial can be changed.")
        return trial

    def _params(self, trial: FrozenTrial) -> tuple[Params, Params]:
        """All and the active parameters; of a waiting trial what is known so far, and none."""
        if self.spec.trials:
            listed = self.spec.trials[trial.user_attrs["point"] if self._shared else trial.number]
            return dict(listed), dict(listed)
        if trial.state.name == "WAITING":
            return dict(trial.system_attrs.get("fixed_params", {})), {}
        if trial.params.keys() != self._distributions.keys():  # one that does not count
            return dict(trial.params), {}
        params = {key: trial.params[key] for key in self.space.parameters}
        return params, self.space.active(params)

    def _ticket(self, trial: FrozenTrial) -> TrialTicket:
        params, active = self._params(trial)
        place = trial.user_attrs["place"] if self._shared else trial.number
        return TrialTicket(trial.number, params, active, dict(trial.user_attrs), place)

    def _record_of(self, trial: FrozenTrial) -> TrialRecord:
        """A trial's record, made anew only if the trial has changed: in a journal that gives another object."""
        if trial.state.is_finished():
            self._under_way.pop(trial.number, None)
            return self._ended.setdefault(trial.number, self._record(trial))
        if self._shared:
            return self._record(trial)
        before, record = self._under_way.get(trial.number, (None, None))
        if before is not trial or record is None:
            record = self._record(trial)
            self._under_way[trial.number] = (trial, record)
        return record

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


class _Completed:
    """An Optuna study that has the list of its completed trials at hand, which pruners ask for at every report."""

    def __init__(self, study: optuna.Study, complete: list[FrozenTrial]) -> None:
        self._study, self._complete = study, complete

    def get_trials(self, deepcopy: bool = True, states: Container[Any] | None = None) -> list[FrozenTrial]:
        if not deepcopy and states == (optuna.trial.TrialState.COMPLETE,):
            return self._complete
        return self._study.get_trials(deepcopy, states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


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
        raise StudyBusyError(
            f"The study in {folder} already has a driver ({holder}); wait for it to end or stop it."
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    return descriptor


def _is_void(trial: FrozenTrial) -> bool:
    return trial.state.name == "FAIL" and VOID in trial.user_attrs


def _jsonable(key: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise StudyError(f"The attribute '{key}' must be JSON-able: {error}.") from error


def _utc(moment: datetime | None) -> datetime | None:
    """Optuna's journal gives local time without a zone."""
    return None if moment is None else moment.astimezone(UTC)
