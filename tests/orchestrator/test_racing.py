"""Adaptive seeds in the driver: who gets further runs, in which packs, and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from orchestrator.config import check_space
from orchestrator.learner import PackSpec
from orchestrator.packing import Packing
from sweeps.study import Study
from tests.orchestrator.studies import Killed, ScriptedSlots, configured, drive, dying

VALUES = [[10.0, 11.0, 12.0], [1.0, 2.0, 3.0], [10.0, 8.0, 1.0], [10.5, 11.5, 12.5]]  # by trial and seed


def value(trial: int, seed: int, updates: int) -> float:
    return VALUES[trial][seed] + (updates - 300) / 1000


def race(workdir: Path, resume: bool = False, runs_per_pack: int = 1, **study: Any) -> tuple[Study, ScriptedSlots]:
    enqueue = [{"method.eta": eta, "method.rollout_length": 1} for eta in (0.1, 0.2, 0.3, 0.4)]
    config = configured(
        workdir, "method.num_updates=300", "evaluation.every_epochs=2", "num_seeds=3",
        **{"name": "r", "num_trials": 4, "racing": {"first_seeds": 1}, "pruner": {"name": "none"},
           "enqueue": enqueue, **study},
    )  # fmt: skip
    slots = ScriptedSlots(config, value)
    return drive(config, slots, resume, Packing(None, runs_per_pack)), slots


def shown(study: Study) -> list[Any]:
    return [(t.number, t.state, t.value, t.intermediate, t.attrs["seeds"], t.attrs["updates"]) for t in study.trials()]


def test_only_contenders_get_further_seeds(workdir: Path):
    study, slots = race(workdir)
    trials = study.trials()
    # the first has nobody to be compared with; of the second t = 8.7 with 2 degrees; of the third 0.87, and 1.90 with 3
    # degrees after another run (the upper 10 % begin at 1.64); the last is as good as the first
    assert [t.attrs["seeds"] for t in trials] == [[0, 1, 2], [0], [0, 1], [0, 1, 2]]
    assert [t.value for t in trials] == [11.0, 1.0, 9.0, 11.5]
    assert [t.attrs["updates"] for t in trials] == [900, 300, 600, 900]
    assert trials[2].attrs["run_values"] == {"t0002-s0": 10.0, "t0002-s1": 8.0}
    assert trials[2].intermediate == pytest.approx({100: 9.8, 200: 9.9, 300: 10.0})  # of the first seed
    assert len({pack for _, pack in slots.calls}) == 9


def test_trials_that_are_decided_on_together_share_packs(workdir: Path):
    study, _ = race(workdir, runs_per_pack=12)
    packs = [PackSpec.load(study.folder, path.parent.name) for path in study.folder.glob("packs/*/pack.json")]
    runs = sorted([run.run_key for run in pack.runs] for pack in packs)
    # no variance is known of single runs, so that all get a second one; then t = 2.1 and more of two, with 4 degrees
    assert runs == [
        [f"t{trial:04d}-s0" for trial in range(4)],
        [f"t{trial:04d}-s1" for trial in range(4)],
        ["t0000-s2", "t0003-s2"],
    ]  # fmt: skip
    assert [t.attrs["seeds"] for t in study.trials()] == [[0, 1, 2], [0, 1], [0, 1], [0, 1, 2]]


# four trials have their packs noted, are then given seeds, and have the packs of these noted
@pytest.mark.parametrize(("owner", "moment", "call", "runs_per_pack"), [
    ("study", "set_attr", 6, 12), pytest.param("study", "set_attr", 10, 12, marks=pytest.mark.slow),
    ("pack", "save", 2, 1), pytest.param("study", "tell", 1, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_driver_killed_anywhere_decides_the_same(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, owner: str, moment: str, call: int, runs_per_pack: int
):
    wanted, _ = race(workdir, name="undisturbed", runs_per_pack=runs_per_pack)
    target: Any = Study if owner == "study" else PackSpec
    with monkeypatch.context() as patch:
        patch.setattr(target, moment, dying(getattr(target, moment), call))
        with pytest.raises(Killed):
            race(workdir, runs_per_pack=runs_per_pack)
    study, _ = race(workdir, resume=True, runs_per_pack=runs_per_pack)
    assert shown(study) == shown(wanted)
    packs = [sorted(p.parent.name for p in s.folder.glob("packs/*/pack.json")) for s in (study, wanted)]
    assert packs[0] == packs[1]


def test_racing_without_a_search_is_refused(workdir: Path):
    config = configured(workdir, num_trials=1, racing={"first_seeds": 1})
    with pytest.raises(UserError, match=r"study\.racing compares the trials of a search"):
        check_space(config)
