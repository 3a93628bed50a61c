"""Several drivers on one study: each in a work folder of its own, with a storage between them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import driver as driver_module
from orchestrator.config import Config
from orchestrator.driver import Driver
from orchestrator.spool import RunSpool
from sweeps.study import Study
from tests.orchestrator.studies import ScriptedSlots, configured, dataset_of, records


class Killed(Exception):
    """Stands for the end of the driver's process."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "POLL_SECONDS", 0.1)


def shared(workdir: Path, name: str, **study: Any) -> Config:
    """The configuration of one driver, with a copy of the work folder."""
    folder = Path(shutil.copytree(workdir, workdir.parent / name))
    storage = f"sqlite:///{workdir.parent}/studies.db"
    return configured(folder, storage=storage, **{"takeover_minutes": 0.05, "num_trials": 6, **study})


def script(trial: int, seed: int, updates: int) -> float:
    return trial + updates / 1000


def study_of(config: Config, resume: bool = False) -> Study:
    folder = Path(config.workdir) / "studies" / config.study.name
    return Study.open(folder) if resume else Study.create(folder, config.study_spec())


def drive(config: Config, study: Study, slots: ScriptedSlots, looks: int = 10**9) -> None:
    """Run a driver, or kill it when it has shown its progress so many times."""
    seen = 0

    def on_change(progress: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > looks:
            raise Killed

    with study, RunSpool(study.folder / "spool", "study") as spool:
        Driver(config, study, dataset_of(config), slots, {}, spool, on_change).run()


@pytest.mark.slow
def test_two_drivers_share_the_trials_of_a_study(workdir: Path):
    configs = [shared(workdir, name) for name in ("a", "b")]
    studies = [study_of(config) for config in configs]
    slots = [ScriptedSlots(config, script) for config in configs]
    threads = [threading.Thread(target=drive, args=each) for each in zip(configs, studies, slots, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    trials = Study.open(studies[0].folder, read_only=True).trials()
    assert [trial.state for trial in trials] == ["complete"] * 6
    assert [trial.value for trial in trials] == pytest.approx([script(t.number, 0, 200) for t in trials])
    trained = [{run for _, pack in each.calls if "-x" in pack for run in [pack[:5]]} for each in slots]
    assert trained[0].isdisjoint(trained[1])
    assert trained[0] | trained[1] == {f"t{trial.number:04d}" for trial in trials}
    for config, study in zip(configs, studies, strict=True):  # each logs the values of its own, in steps without gaps
        mine = [trial for trial in trials if trial.attrs["driver"] == study.driver]
        logged = [r for r in records(study.folder, "study") if "trial/value" in r.get("values", {})]
        assert [record["step"] for record in logged] == list(range(len(mine))), config.workdir


def test_a_driver_resumes_its_own_trials_and_another_does_those_of_a_dead_one(workdir: Path):
    a, b = shared(workdir, "a", takeover_minutes=60), shared(workdir, "b", takeover_minutes=60)
    study = study_of(a)
    with pytest.raises(Killed):
        drive(a, study, ScriptedSlots(a, script), looks=3)
    left = [r.number for r in Study.open(study.folder, read_only=True).trials() if r.state == "running"]
    assert left
    study = study_of(a, resume=True)
    with pytest.raises(Killed):
        drive(a, study, ScriptedSlots(a, script), looks=3)  # the same ones again
    before = Study.open(study.folder, read_only=True).trials()
    assert all(before[number].number == number for number in left)
    running = [r for r in before if r.state == "running"]
    assert running
    other = study_of(b)
    assert other._heartbeat is not None
    other._heartbeat.is_dead = lambda driver: driver == study.driver  # type: ignore[method-assign]
    drive(b, other, ScriptedSlots(b, script))
    trials = Study.open(study.folder, read_only=True).trials()
    assert [trial.state for trial in trials] == ["complete"] * 6
    anew = {trial.attrs["resumed_from"]: trial for trial in trials if "resumed_from" in trial.attrs}
    assert {old: trial.params for old, trial in anew.items()} == {trial.number: trial.params for trial in running}
    drive(a, study_of(a, resume=True), slots := ScriptedSlots(a, script))  # comes back: everything has been done
    assert slots.calls == []


def test_a_driver_that_was_taken_for_dead_lets_go(workdir: Path):
    a, b = shared(workdir, "a", num_trials=2), shared(workdir, "b", num_trials=2)
    mine, theirs = study_of(a), study_of(b)
    assert theirs._heartbeat is not None
    theirs._heartbeat.is_dead = lambda driver: driver == mine.driver  # type: ignore[method-assign]
    taken: list[int] = []

    def meanwhile(trial: int, seed: int, updates: int) -> float:
        if not taken and updates > 100:
            ticket = theirs.ask()
            assert ticket is not None
            assert ticket.attrs["resumed_from"] == trial
            theirs.tell(ticket.number, 7.0)
            taken.append(trial)
        return script(trial, seed, updates)

    with theirs:
        drive(a, mine, ScriptedSlots(a, meanwhile))
    trials = Study.open(mine.folder, read_only=True).trials()
    assert len(taken) == 1
    assert taken[0] not in [trial.number for trial in trials]
    assert [trial.state for trial in trials] == ["complete"] * 2
    assert 7.0 in [trial.value for trial in trials]
