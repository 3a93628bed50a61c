"""Machines that go and come, packs that kill their process, packs that fail: what the driver makes of it."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import faults
from benchmarks.kill_tests import SETTINGS, compare
from benchmarks.simulation import VirtualClock
from envs import files
from envs.errors import UserError
from envs.files import DiskFullError
from orchestrator import workers
from orchestrator.absence import BEGUN_FILE, MOVE_SECONDS, Deaths, begun_from, note_begun
from orchestrator.artifacts import load_tensors, save_tensors
from orchestrator.cluster import InlineSlots, RaySlots
from orchestrator.config import Config
from orchestrator.driver import MAX_DEATHS, Driver
from orchestrator.environment import ROOT
from orchestrator.head import RAY_VARIABLE
from orchestrator.learner import PackSpec
from orchestrator.spool import RunSpool
from orchestrator.workers import WorkersAway
from sweeps.study import Study
from tests.orchestrator.studies import Script, ScriptedSlots, configured, dataset_of, drive, make_pack

ONE_KEY = {"method.eta": {"type": "float", "low": 0.01, "high": 10.0, "log": True}}


def settings(workdir: Path, *overrides: str, **study: Any) -> Config:
    settings = {"sampler": {"name": "random"}, "pruner": {"name": "none"}, "space": ONE_KEY, "num_trials": 4, **study}
    return configured(workdir, "method.num_updates=300", *overrides, **settings)


def dead() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


class Machines(ScriptedSlots):
    """Slots in virtual time, whose machines may be away: a call to such a one fails after two seconds.

    Args:
        away: whether a slot's machine is away at a moment.
    """

    def __init__(
        self, config: Config, clock: VirtualClock, script: Script, size: int = 1,
        away: Callable[[int, float], bool] = lambda slot, now: False,
    ) -> None:  # fmt: skip
        super().__init__(config, script, size)
        self.clock, self.away = clock, away
        self.asked: list[tuple[int, float]] = []
        self.trained: list[tuple[int, str]] = []  # slot and pack of each call that found a process

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        from ray.exceptions import ActorUnavailableError

        self._under_way.append(self._under_way.pop(0))  # first in, first out
        slot, method, args = self._under_way[-1]
        if method == "ready":
            self.asked.append((slot, self.clock.now))
        if self.away(slot, self.clock.now):
            self._under_way.pop()
            self.clock.now += 2.0
            return [(slot, ActorUnavailableError("The actor is restarting.", None))]
        if method == "advance":
            self.trained.append((slot, args[0].pack_id))
        self.clock.now += 1.0
        return super().wait(timeout)


def run(config: Config, slots: Machines, resume: bool = False) -> Study:
    folder = Path(config.workdir) / "studies" / config.study.name
    study = Study.open(folder) if resume else Study.create(folder, config.study_spec())
    with study, RunSpool(folder / "spool", "study") as spool:
        Driver(config, study, dataset_of(config), slots, {}, spool, clock=slots.clock).run()
    return study


def good(trial: int, seed: int, updates: int) -> float:
    return float(updates)


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.trials()]


# Machines


def test_a_pack_goes_on_when_its_machine_is_back_however_often_it_was_asked(workdir: Path):
    config, clock = settings(workdir, num_trials=2), VirtualClock()
    slots = Machines(config, clock, good, away=lambda slot, now: 1.5 < now < 600)
    study = run(config, slots)
    assert states(study) == ["complete", "complete"]
    assert len(slots.asked) > MAX_DEATHS + 1
    # ever more seldom, up to half a minute
    pauses = [later - earlier for (_, earlier), (_, later) in zip(slots.asked, slots.asked[1:], strict=False)]
    assert pauses == sorted(pauses)
    assert 30 <= pauses[-1] <= 33


def test_another_slot_takes_the_pack_of_a_machine_that_stays_away(workdir: Path):
    config, clock = settings(workdir), VirtualClock()
    slots = Machines(config, clock, good, size=2, away=lambda slot, now: slot == 0 and now > 3)
    study = run(config, slots)
    assert states(study) == ["complete"] * 4
    [first] = {pack for slot, pack in slots.trained if slot == 0}
    assert (1, first) in slots.trained
    assert clock.now > MOVE_SECONDS  # a process that is only cut off has ended by then


def test_a_study_without_machines_ends_with_a_sentence_and_is_resumed(workdir: Path):
    config, clock = settings(workdir, "compute.patience_minutes=10"), VirtualClock()
    slots = Machines(config, clock, good, size=2, away=lambda slot, now: now > 5)
    with pytest.raises(
        UserError, match=r"none of the 2 learners has answered for 10 minutes; each needs 1 CPUs.*resume"
    ):
        run(config, slots)
    assert 600 < clock.now < 700
    study = run(config, Machines(config, VirtualClock(), good, size=2), resume=True)
    assert [(trial.state, trial.value) for trial in study.trials()] == [("complete", 300.0)] * 4


def test_others_are_attended_to_while_one_is_away(workdir: Path):
    """No moment of the driver's is spent on waiting for the slot that is away."""
    config, clock = settings(workdir, num_trials=6), VirtualClock()
    slept: list[float] = []
    clock.sleep = slept.append  # type: ignore[assignment]
    slots = Machines(config, clock, good, size=2, away=lambda slot, now: slot == 0 and 2 < now < 12)
    assert states(run(config, slots)) == ["complete"] * 6
    assert not slept


def test_workers_without_a_machine_are_no_fault_of_the_pack(workdir: Path):
    times = 0

    def script(trial: int, seed: int, updates: int) -> float | Exception:
        nonlocal times
        times += 1
        return WorkersAway("no machine") if times < 3 * MAX_DEATHS else 1.0

    config = settings(workdir, num_trials=2)
    assert states(run(config, Machines(config, VirtualClock(), script))) == ["complete", "complete"]


def test_a_stage_whose_builder_dies_is_built_again(workdir: Path):
    config, clock = settings(workdir, "method.dynamics.max_epochs=3", num_trials=1), VirtualClock()
    slots = Machines(config, clock, good)
    build, deaths = slots.build_stages, [dead(), dead()]

    def dying(configs: Any, name: str) -> Any:
        if deaths:
            raise deaths.pop()
        return build(configs, name)

    slots.build_stages = dying  # type: ignore[method-assign]
    assert states(run(config, slots)) == ["complete"]
    assert len(slots.built) == 3
    deaths[:] = [dead() for _ in range(MAX_DEATHS + 1)]
    config = settings(workdir, "method.dynamics.max_epochs=4", name="other")
    other = Machines(config, VirtualClock(), good)
    other.build_stages = dying  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=f"killed the process that built it {MAX_DEATHS + 1} times"):
        run(config, other)


# Packs that kill their process


def test_a_pack_that_kills_its_process_fails_alone(workdir: Path):
    """Although nothing has finished before it."""
    config = settings(workdir, num_trials=4)
    slots = Machines(config, VirtualClock(), lambda trial, seed, updates: dead() if trial == 0 else 1.0)
    study = run(config, slots)
    assert states(study) == ["failed", "complete", "complete", "complete"]
    assert f"killed its process {MAX_DEATHS + 1} times" in study.trials()[0].attrs["failure"]
    poison = slots.trained[0][1]
    assert sum(pack == poison for _, pack in slots.trained) == MAX_DEATHS + 1


def test_a_pack_that_gets_on_between_deaths_is_never_given_up(workdir: Path):
    config, clock = settings(workdir, num_trials=1), VirtualClock()
    slots = Machines(config, clock, good)
    advance, deaths = slots.advance, 0

    def dying(pack: PackSpec, dropped: Any) -> Any:
        nonlocal deaths
        note_begun(pack.folder, deaths // 4)  # a checkpoint after every fourth death
        deaths += 1
        if deaths < 5 * MAX_DEATHS:
            raise dead()
        return advance(pack, dropped)

    slots.advance = dying  # type: ignore[method-assign]
    assert states(run(config, slots)) == ["complete"]


def test_deaths_are_counted_from_the_last_checkpoint_on(tmp_path: Path):
    assert begun_from(tmp_path) is None
    note_begun(tmp_path, 7)
    assert (begun_from(tmp_path), json.loads((tmp_path / BEGUN_FILE).read_text())) == (7, {"epoch": 7})
    deaths = Deaths()
    counts = []
    for epoch in (None, None, 0, 0, 0, 5, 5):
        deaths.add(epoch)
        counts.append(deaths.count)
    assert counts == [1, 2, 1, 2, 3, 1, 2]


# Packs that fail


def failing(*trials: int) -> Script:
    return lambda trial, seed, updates: RuntimeError(f"trial {trial} broke") if trial in trials else 1.0


def test_first_packs_that_fail_do_not_end_a_study_in_which_others_work(workdir: Path):
    config = settings(workdir)
    study = run(config, Machines(config, VirtualClock(), failing(0, 1, 3)))
    assert states(study) == ["failed", "failed", "complete", "failed"]
    assert "trial 1 broke" in study.trials()[1].attrs["failure"]


def test_a_short_study_in_which_every_pack_fails_can_be_resumed(workdir: Path):
    config = settings(workdir, num_trials=2)
    with pytest.raises(RuntimeError, match=r"every pack failed; .*trial 1 broke"):
        run(config, Machines(config, VirtualClock(), failing(0, 1)))
    assert states(run(config, Machines(config, VirtualClock(), good), resume=True)) == ["complete", "complete"]


def test_a_training_that_fails_ends_at_once(workdir: Path):
    config = settings(workdir, num_trials=1, space={})
    with pytest.raises(RuntimeError, match=r"^pack .* failed: .*trial 0 broke"):
        run(config, Machines(config, VirtualClock(), failing(0)))


def test_an_error_of_the_users_ends_the_study_at_once(workdir: Path):
    config = settings(workdir)
    slots = Machines(config, VirtualClock(), lambda trial, seed, updates: UserError("no such thing"))
    with pytest.raises(UserError, match=r"^no such thing$"):
        run(config, slots)
    assert len(slots.trained) == 1


def test_a_process_that_cannot_start_is_not_waited_for(workdir: Path):
    from ray.exceptions import RayActorError

    config = settings(workdir)
    slots = Machines(config, VirtualClock(), lambda *_: RayActorError(error_msg="no torch\n", actor_init_failed=True))
    with pytest.raises(UserError, match=r"a learner's process cannot start \(no torch\)"):
        run(config, slots)


# The head


def test_a_driver_leaves_when_the_head_has_been_silent_for_too_long(monkeypatch: pytest.MonkeyPatch):
    from orchestrator import head

    now, left = [0.0], list[float]()
    context = SimpleNamespace()
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(head, "leave", lambda: left.append(now[0]))
    monkeypatch.setattr(head.time, "monotonic", lambda: now[0])
    monkeypatch.delenv(head.RAY_VARIABLE, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        context.gcs_address = f"127.0.0.1:{port}"
        watch = head.Head()
        for now[0] in range(0, 100, 5):
            watch.check()
    for now[0] in range(100, 126, 5):  # silent since 95 s
        watch.check()
    now[0] = 130.0
    with pytest.raises(head.HeadLost, match=f"the head .*{port}.* for 35 s. Nothing is lost: .* `offsweep resume"):
        watch.check()
    assert left == [130.0]
    # one that cannot be reached from here in the first place is left alone
    unseen = head.Head()
    now[0] = 1000.0
    unseen.check()


# Disks


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoint.pt"
    save_tensors(path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr("envs.files.os.fsync", full)
        with pytest.raises(DiskFullError, match=r"cannot write .*checkpoint.pt \(No space left on device\)"):
            save_tensors(path, {"epoch": 2})
    assert load_tensors(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    # torch itself says what is wrong
    monkeypatch.setattr("envs.files.tempfile.mkstemp", lambda **_: (os.open("/dev/null", os.O_RDONLY), "/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(DiskFullError):
        save_tensors(path, {"epoch": torch.zeros(100_000)})


def test_a_full_disk_ends_a_study_that_can_be_resumed(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    config, write = configured(workdir, num_trials=2), files._write_atomically

    def until_full(path: Path, fill: Callable[[Path], object]) -> None:
        if path.name.startswith("checkpoint-") and path.parent.name.startswith("t0001"):  # in the second trial
            full()
        write(path, fill)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_atomically", until_full)
        with pytest.raises(DiskFullError, match="resume NAME"):
            drive(config, InlineSlots(config.compute, dataset_of(config)))
    study = drive(config, InlineSlots(config.compute, dataset_of(config)), resume=True)
    assert states(study) == ["complete", "complete"]


# Workers


class FakeWorker:
    """An actor whose calls give these answers in turn, the last one for ever; an exception is raised by `ray.get`."""

    def __init__(self, *answers: Any, there: Sequence[Any] = (1,)) -> None:
        self.answers, self.there = list(answers), list(there)
        self.__ray_call__ = SimpleNamespace(remote=lambda function: self._next(self.there))

    @staticmethod
    def _next(answers: list[Any]) -> Any:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def run(self) -> Any:
        return self._next(self.answers)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A Ray whose references are the answers themselves, in virtual time; the pauses made."""
    pauses: list[float] = []

    def get(references: Any, timeout: float | None = None) -> Any:
        for reference in references if isinstance(references, list) else [references]:
            if isinstance(reference, Exception):
                raise reference
        return references

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(workers.time, "sleep", pauses.append)
    monkeypatch.setattr(workers.time, "monotonic", lambda: sum(pauses))
    return pauses


def test_a_worker_that_is_away_is_waited_for(slept: list[float]):
    """And only then asked again, so that it counts as one death however long it was away."""
    worker = FakeWorker(dead(), "rows", there=[*[dead()] * 9, 1])
    assert workers._start_all([(worker, worker.run), (worker, lambda: "others")])() == ["rows", "others"]
    assert slept == [0.5, 1, 2, 4, 8, 10, 10, 10, 10, 10]
    gone = FakeWorker(dead(), there=[dead()])
    with pytest.raises(WorkersAway, match="has had no machine for 120 s"):
        workers._start_all([(gone, gone.run)])()


def test_work_that_kills_every_worker_is_given_up(slept: list[float]):
    worker = FakeWorker(dead())
    with pytest.raises(RuntimeError, match=f"died {workers.MAX_TRIES + 1} times of the same work"):
        workers._start_all([(worker, worker.run)])()
    assert len(slept) == workers.MAX_TRIES


# With Ray


def test_a_pack_in_ray_goes_on_without_a_member_that_diverges(workdir: Path, ray_cluster: None):
    pack = make_pack(workdir, [({}, 0), ({"method.actor_lr": 1e6, "method.critic_lr": 1e6}, 1)], name="in-ray")
    config = configured(workdir)
    reports: list[Any] = []
    slots = RaySlots(config.compute, dataset_of(config), 1, 0)
    try:
        while not reports or not reports[-1].finished:
            slots.submit(0, "advance", pack, [])
            while not (answers := slots.wait(10.0)):
                pass
            reports += [result for _, result in answers]
    finally:
        slots.close()
    assert list(reports[-1].diverged) == ["t0001-s1"]
    assert reports[-1].evaluations["t0000-s0"][-1].updates == config.method.num_updates
    assert [path.parent.name for path in Path(pack.study_folder).glob("runs/*/policy.npz")] == ["t0000-s0"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raylet", "cluster"])
def test_a_study_on_real_nodes_ends_as_if_nothing_had_happened(
    workdir: Path, fault: str, no_ray: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(RAY_VARIABLE, faults.GCS_S)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nodes = faults.Nodes(2)
    try:
        wanted, points = faults.undisturbed(workdir, nodes, faults.SINGLE, SETTINGS)
        played = faults.play_until_struck(fault, workdir, nodes, points, random.Random(0))
    finally:
        nodes.close()
    result = compare(wanted, played.remains)
    assert result.equal, result
