"""Schedules and populations: stopped anywhere they end as if undisturbed, and a schedule repeats its member."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from agents.model_based import ModelBasedSAC
from envs.errors import UserError
from orchestrator import launch
from orchestrator.artifacts import load_tensors
from orchestrator.cluster import InlineSlots
from orchestrator.config import Config, load_config
from orchestrator.learner import Learner, PackSpec, PendingRollouts
from orchestrator.population import HISTORY_FILE, SCHEDULE_FILE, Population, check_population
from orchestrator.schedule import check_schedule, settings_at
from orchestrator.workers import Workers
from sweeps.pbt import SCHEDULE, replayed_params
from sweeps.study import Study
from tests.orchestrator.studies import (
    configured,
    copied,
    dataset_of,
    drive,
    make_learner,
    make_pack,
    points,
    records,
    same,
    train,
)
from tests.orchestrator.test_learner import Stop, advance_to_the_end, assert_same_end

SPACE = {
    "method.eta": {"type": "float", "low": 0.01, "high": 10.0, "log": True},
    "method.actor_lr": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
}
MEMBERS = [
    ({"method.eta": 0.1, "method.actor_lr": 1e-3}, 3),
    ({"method.eta": 2.0, "method.actor_lr": 1e-2}, 3),
    ({"method.eta": 5.0, "method.actor_lr": 1e-4}, 3),
    ({"method.eta": 1.0, "method.actor_lr": 3e-3}, 3),
]
OFTEN = "evaluation.every_epochs=1"
KEYS = [f"t{trial:04d}-s3" for trial in range(4)]


def population(workdir: Path, **settings: Any) -> PackSpec:
    """A population of four, with a turn after each of its four epochs but the last."""
    pack = make_pack(workdir, MEMBERS, OFTEN)
    spec = {"every_evaluations": 1, "quantile": 0.25, "perturb": [0.5, 2.0], "resample": 0.25, **settings}
    return PackSpec(pack.pack_id, pack.study_folder, pack.runs, population={"spec": spec, "space": SPACE, "seed": 5})


def history(pack: PackSpec) -> dict[str, Any]:
    return json.loads((pack.folder / HISTORY_FILE).read_text())


def policy(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "policy.npz") as arrays:
        return {name: arrays[name] for name in arrays if arrays[name].dtype.kind == "f"}


def assert_same_policy(one: Path, other: Path) -> None:
    """Up to rounding."""
    mine, others = policy(one), policy(other)
    assert mine.keys() == others.keys()
    for name, values in mine.items():
        np.testing.assert_allclose(values, others[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> PackSpec:
    pack = population(copied(base, tmp_path_factory))
    report = train(pack)
    assert (report.updates, report.finished, report.diverged) == (200, True, {})
    return pack


# ---- schedules ------------------------------------------------------------------------------------------------------


def test_a_schedule_holds_from_its_updates_on(workdir: Path) -> None:
    steps = [{"updates": 50, "method.eta": 3.0}, {"updates": 150, "method.eta": 1.0, "method.actor_lr": 1e-4}]
    assert settings_at(steps, 0) == {}
    assert settings_at(steps, 149) == {"method.eta": 3.0}
    assert settings_at(steps, 150) == {"method.eta": 1.0, "method.actor_lr": 1e-4}
    pack = make_pack(workdir, [({"schedule": steps}, 0), ({}, 1)])
    learner = make_learner(pack)
    seen: list[tuple[int, float, float]] = []

    def train_epoch(self: ModelBasedSAC, epoch: int) -> Any:
        rates = [self.sac.actor_optim.learning_rates[m] for m in range(2)]
        seen.append((epoch, self.sac.hyperparameters[0].eta, rates[0]))
        assert (self.sac.hyperparameters[1].eta, rates[1]) == (0.1, 3e-4)  # the other run has no schedule
        return untouched(self, epoch)

    untouched = ModelBasedSAC.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelBasedSAC, "train_epoch", train_epoch)
        advance_to_the_end(learner)
    assert seen == [(0, 0.1, 3e-4), (1, 3.0, 3e-4), (2, 3.0, 3e-4), (3, 1.0, 1e-4)]
    logged = points(pack.study_folder, "t0000-s0")
    assert {key: value for key, value in logged.items() if key[0].startswith("schedule/")} == {
        ("schedule/eta", 0): 0.1, ("schedule/actor_lr", 0): 3e-4, ("schedule/eta", 50): 3.0,
        ("schedule/actor_lr", 50): 3e-4, ("schedule/eta", 150): 1.0, ("schedule/actor_lr", 150): 1e-4,
    }  # fmt: skip
    assert not [name for name, _ in points(pack.study_folder, "t0001-s1") if name.startswith("schedule/")]


@pytest.mark.slow
def test_a_run_with_a_schedule_stopped_anywhere_ends_like_an_undisturbed_one(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps = [{"updates": 50, "method.eta": 3.0}, {"updates": 100, "method.actor_lr": 1e-2}]
    members: Any = [({"schedule": steps}, 0), ({}, 0)]
    whole = make_pack(copied(base, tmp_path_factory), members)
    train(whole)
    folders = [Path(whole.study_folder) / "runs" / run.run_key for run in whole.runs]
    one, other = (np.concatenate([x.ravel() for x in policy(folder).values()]) for folder in folders)
    assert np.abs(one - other).max() > 1e-2
    for epoch in (1, 2, 3):
        stopped = make_pack(copied(base, tmp_path_factory), members)
        learner = make_learner(stopped)
        stop_in_epoch(epoch, partial(advance_to_the_end, learner))
        train(stopped)
        assert_same_end(whole, stopped)


def stop_in_epoch(epoch: int, run: Callable[[], Any]) -> None:
    """Have what runs die in the middle of an epoch."""
    train_epoch = ModelBasedSAC.train_epoch

    def dying(self: ModelBasedSAC, number: int) -> Any:
        if number == epoch:
            raise Stop
        return train_epoch(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelBasedSAC, "train_epoch", dying)
        with pytest.raises((Stop, RuntimeError)):  # the latter is the driver's
            run()


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"method.eta": 1.0}, r"must be of the form \{updates: 5000"),
        ({"updates": 50}, r"must be of the form \{updates: 5000"),
        ({"updates": 60, "method.eta": 1.0}, r"updates=60 must be a multiple of method\.updates_per_epoch=50"),
        ({"updates": 200, "method.eta": 1.0}, r"less than method\.num_updates=200"),
        ({"updates": 0, "method.eta": 1.0}, r"updates=0 comes after updates=0; put"),
        ({"updates": 50, "method.batch_size": 8}, r"batch_size decides how updates are computed .* what can is method"),
        ({"updates": 50, "method.eat": 1.0}, r"did you mean method\.eta"),
        ({"updates": 50, "method.eta": 0.0}, r"cannot change from or to 0 while a run trains, as from 0\.1 to 0\.0"),
        ({"updates": 50, "seed": 3}, r"schedule: seed decides how updates are computed"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(tmp_path: Path, entry: Any, sentence: str) -> None:
    config = configured(tmp_path)
    config.schedule = [{"updates": 0, "method.eta": 0.5}, entry] if "updates" in entry else [entry]
    with pytest.raises(UserError, match=sentence):
        check_schedule(config)


# ---- populations ----------------------------------------------------------------------------------------------------


def test_the_worst_take_over_what_the_best_have_learned(workdir: Path) -> None:
    pack = population(workdir)
    learner = make_learner(pack)
    learner.advance()
    values = {key: learner.evaluations[key][-1].value or 0.0 for key in KEYS}
    worst, best = min(values, key=lambda k: values[k]), max(values, key=lambda k: values[k])
    states = {key: learner.method.select([m]).state_dict() for m, key in enumerate(KEYS)}
    learner._change_settings()
    for m, key in enumerate(KEYS):
        assert same(learner.method.select([m]).state_dict(), states[best if key == worst else key])
    assert learner.population is not None
    [turn] = learner.population.turns
    assert (turn["updates"], turn["run"], turn["parent"]) == (50, worst, best)
    assert (turn["value"], turn["parent_value"]) == (values[worst], values[best])
    sac = learner.method.sac  # type: ignore[attr-defined]
    assert sac.hyperparameters[KEYS.index(worst)].eta == turn["settings"]["method.eta"]
    assert sac.actor_optim.learning_rates[KEYS.index(worst)] == turn["settings"]["method.actor_lr"]
    before = MEMBERS[KEYS.index(best)][0]
    assert turn["settings"].keys() == before.keys()
    assert turn["settings"] != before


def test_nobody_becomes_the_double_of_another() -> None:
    """At a bound a factor changes nothing, and of two factors two members would often get the same."""
    space = {"method.actor_lr": {"type": "float", "low": 1e-4, "high": 1e-3}}
    spec = {"quantile": 0.4, "perturb": [0.5, 0.8, 2.0], "resample": 0.0}
    for seed in range(10):
        told = Population({"spec": spec, "space": space, "seed": seed}, {k: {"method.actor_lr": 1e-3} for k in "abcde"})
        parents = told.turn(50, {"a": 1.0, "b": 0.0, "c": 0.0, "d": None, "e": None})
        settings = {key: told.settings[key]["method.actor_lr"] for key in "abcde"}
        for parent in set(parents.values()):
            family = [settings[key] for key in "abcde" if parents[key] == parent]
            assert len(set(family)) == len(family)


@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_population_stopped_anywhere_ends_like_an_undisturbed_one(
    workdir: Path, undisturbed: PackSpec, epoch: int
) -> None:
    pack = population(workdir)
    stop_in_epoch(epoch, partial(advance_to_the_end, make_learner(pack)))
    train(pack)
    assert history(pack) == history(undisturbed)
    assert [turn["updates"] for turn in history(pack)["turns"]] == [50, 100, 150]
    assert_same_end(undisturbed, pack)


def test_evaluators_do_not_change_a_population(workdir: Path, undisturbed: PackSpec) -> None:
    """However late evaluations come in: turns wait for them."""

    class Elsewhere(Workers):
        @property
        def evaluates_elsewhere(self) -> bool:
            return True

    pack = population(workdir)
    train(pack, workers=Elsewhere())
    assert history(pack) == history(undisturbed)
    assert_same_end(undisturbed, pack)


def test_a_schedule_repeats_its_member(workdir: Path, undisturbed: PackSpec) -> None:
    """With the same seed it ends with the same policy: the schedule is all that made it.

    In a pack of as many: these learning rates magnify the rounding of packs of another size.
    """
    told = history(undisturbed)
    run = told["turns"][-1]["run"]  # of a state that has been another run's
    assert len(told["histories"][run]) > 1
    folder = Path(undisturbed.study_folder) / "runs" / run
    config = load_config([folder / SCHEDULE_FILE], [])
    assert config.schedule == [{"updates": s["updates"], **s["settings"]} for s in told["histories"][run][1:]]
    check_schedule(config)
    params = {**told["histories"][run][0]["settings"], "schedule": config.schedule}
    replay = make_pack(workdir, [(params, 3), *MEMBERS[1:]], OFTEN, name="replay")
    train(replay)
    assert_same_policy(Path(replay.study_folder) / "runs" / "t0000-s3", folder)


def test_what_is_recorded_of_a_member(undisturbed: PackSpec) -> None:
    told = history(undisturbed)
    turn = told["turns"][0]
    logged = points(undisturbed.study_folder, turn["run"])
    initial = MEMBERS[KEYS.index(turn["run"])][0]
    assert (logged["pbt/eta", 0], logged["pbt/actor_lr", 0]) == tuple(initial.values())
    assert logged["pbt/eta", turn["updates"]] == turn["settings"]["method.eta"]
    tags = [r["tags"] for r in records(undisturbed.study_folder, turn["run"]) if "parent" in r.get("tags", {})]
    assert tags[0] == {"parent": f"t{KEYS.index(turn['parent']):03d}-s3"}


def spoil(learner: Learner, member: int, epoch: int) -> None:
    """Make a member's policy not a number at the end of an epoch."""
    train_epoch = learner.method.train_epoch

    def spoiling(number: int) -> Any:
        metrics = train_epoch(number)
        if number == epoch:
            actor = learner.method.sac.actor  # type: ignore[attr-defined]
            actor.blocks(actor.flat)[0][member] = math.nan
        return metrics

    learner.method.train_epoch = spoiling  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("kill", [False, True])
def test_a_member_that_diverges_is_replaced_at_the_next_turn(workdir: Path, kill: bool) -> None:
    pack = population(workdir)
    learner = make_learner(pack)
    spoil(learner, 2, 0)
    report = learner.advance()
    assert (learner.alive, learner.lost, report.diverged) == ([*KEYS[:2], KEYS[3]], {KEYS[2]: 50}, {})
    if kill:
        learner = make_learner(pack)
        assert learner.lost == {KEYS[2]: 50}
    learner.advance()
    assert (learner.alive, learner.lost) == (KEYS, {})
    [turn] = [turn for turn in learner.population.turns if turn["updates"] == 50]  # type: ignore[union-attr]
    assert (turn["run"], turn["value"]) == (KEYS[2], None)
    assert [e.updates for e in learner.evaluations[KEYS[2]]] == [100]
    advance_to_the_end(learner)
    assert records(pack.study_folder, KEYS[2])[-1]["status"] == "FINISHED"


def test_a_member_that_diverges_behind_the_last_turn_has_diverged(workdir: Path) -> None:
    pack = population(workdir, every_evaluations=2)  # one turn, after 100 updates
    learner = make_learner(pack)
    for _ in range(3):
        learner.advance()
    spoil(learner, 0, 3)
    report = learner.advance()
    assert (report.finished, report.diverged) == (True, {KEYS[0]: 200})
    assert {turn["updates"] for turn in history(pack)["turns"]} == {100}
    statuses = [records(pack.study_folder, key)[-1]["status"] for key in KEYS]
    assert statuses == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]


def test_a_population_of_which_nobody_is_left_ends(workdir: Path) -> None:
    learner = make_learner(population(workdir))
    train_epoch = learner.method.train_epoch

    def spoiling(number: int) -> Any:
        metrics = train_epoch(number)
        learner.method.sac.actor.flat.fill_(math.nan)  # type: ignore[attr-defined]
        return metrics

    learner.method.train_epoch = spoiling  # type: ignore[method-assign, assignment]
    report = learner.advance()
    assert (report.finished, report.diverged) == (True, dict.fromkeys(KEYS, 50))


# ---- studies --------------------------------------------------------------------------------------------------------


def study_of(workdir: Path, *overrides: str, **study: Any) -> Config:
    settings: dict[str, Any] = {"num_trials": 4, "sampler": {"name": "random"}, "pbt": {}, **study}
    config = configured(workdir, OFTEN, "num_seeds=1", *overrides, **settings)
    config.study.space = dict(SPACE)
    return config


def test_a_study_of_a_population(workdir: Path) -> None:
    config = study_of(workdir, name="pbt")
    outcome = launch.start(config, Console(file=io.StringIO(), width=160))
    study, folder = outcome.study, workdir / "studies" / "pbt"
    [pack] = {pack for record in study.trials() for pack in record.attrs["packs"]}
    told = json.loads((folder / "packs" / pack / HISTORY_FILE).read_text())
    for record in study.trials():
        assert record.state == "complete"
        last = json.loads((folder / "runs" / f"t{record.number:04d}-s0" / "evaluations.json").read_text())[-1]
        assert record.value == last["value"]
        steps = told["histories"][f"t{record.number:04d}-s0"]
        assert record.attrs[SCHEDULE] == [{"updates": s["updates"], **s["settings"]} for s in steps]
    assert json.loads((folder / "lineage.json").read_text())["turns"] == told["turns"]
    assert (folder / "schedule.png").exists()
    # what was found is trained again, with other seeds
    best = max((r for r in study.trials()), key=lambda r: len(r.attrs[SCHEDULE]))
    again = configured(workdir, OFTEN, "num_seeds=2", "seed=5", name="again", num_trials=1)
    again.study.space, again.study.trials = {}, [replayed_params(best)]
    assert launch.start(again, Console(file=io.StringIO(), width=160)).study.trials()[0].state == "complete"
    for seed in (5, 6):
        logged = points(workdir / "studies" / "again", f"t0000-s{seed}")
        told = {(key, step): value for (key, step), value in logged.items() if key.startswith("schedule/")}
        assert told == {
            (f"schedule/{key.removeprefix('method.')}", step["updates"]): value
            for step in best.attrs[SCHEDULE] for key, value in step.items() if key != "updates"
        }  # fmt: skip


@pytest.mark.slow
def test_a_driver_that_was_killed_goes_on_with_the_population(workdir: Path) -> None:
    def run(name: str, resume: bool = False) -> Study:
        config = study_of(workdir, name=name)
        return drive(config, InlineSlots(config.compute, dataset_of(config)), resume=resume)

    whole = run("whole")
    with pytest.MonkeyPatch.context() as patch:
        asked = 0

        def ask(self: Study, proposal: Any = None) -> Any:
            nonlocal asked
            asked += 1
            if asked == 3:
                raise Stop
            return untouched(self, proposal)

        untouched = Study.ask
        patch.setattr(Study, "ask", ask)
        with pytest.raises(Stop):
            run("killed")
    stop_in_epoch(2, lambda: run("killed", resume=True))
    killed = run("killed", resume=True)
    assert [(r.params, r.value, r.attrs[SCHEDULE]) for r in killed.trials()] == [
        (r.params, r.value, r.attrs[SCHEDULE]) for r in whole.trials()
    ]
    for trial in range(4):
        folders = [workdir / "studies" / name / "runs" / f"t{trial:04d}-s0" for name in ("whole", "killed")]
        assert same(*(load_tensors(folder / "checkpoint.pt") for folder in folders))


@pytest.mark.parametrize(
    ("overrides", "space", "sentence"),
    [
        (
            [],
            {"method.batch_size": {"type": "int", "low": 8, "high": 32}},
            r"study\.pbt: method\.batch_size decides how",
        ),
        ([], {"method.eta": {"type": "float", "low": 0.0, "high": 1.0}}, r"cannot change from or to 0"),
        (["study.objective_evaluations=2"], SPACE, r"objective_evaluations=2 must be 1 with study\.pbt"),
        (["compute.runs_per_pack=2"], SPACE, r"runs_per_pack=2 is less than the population"),
        (
            ["study.pbt.every_evaluations=4"],
            SPACE,
            r"would never replace a member: the first turn comes after 4 epochs",
        ),
        (["schedule=[{updates: 50, method.eta: 1.0}]"], SPACE, r"leave out schedule or study\.pbt"),
    ],
)
def test_what_can_be_no_population_is_refused(tmp_path: Path, overrides: list[str], space: Any, sentence: str) -> None:
    config = study_of(tmp_path, *overrides)
    config.study.space = space
    with pytest.raises(UserError, match=sentence):
        check_population(config)


def test_a_population_that_does_not_fit_one_pack_is_refused(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: ModelBasedSAC, epoch: int) -> Any:
        raise MemoryError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ModelBasedSAC, "train_epoch", failing)
    config = study_of(workdir, name="large")
    with pytest.raises(UserError, match="does not fit the memory in one pack"):
        drive(config, InlineSlots(config.compute, dataset_of(config)))


def test_a_pool_asked_for_ahead_is_asked_for_anew(workdir: Path) -> None:
    """What rollout workers have begun with the settings of before is not taken in."""
    learner = make_learner(population(workdir))
    learner.advance()
    learner._rollouts_ahead = PendingRollouts(tuple(KEYS), lambda: pytest.fail("nobody wants it"))
    learner._change_settings()
    assert learner._rollouts_ahead is None
