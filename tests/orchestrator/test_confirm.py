"""The confirm stage: the best settings of a search, with seeds, episodes and stages that nothing was chosen by."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.errors import UserError
from orchestrator import launch
from orchestrator.config import Config, load_config
from orchestrator.confirm import confirm_config
from sweeps.confirm import FOLDER, Confirmation, confirmations, load_candidates
from sweeps.study import Study
from tests.orchestrator.studies import Killed, ScriptedSlots, configured, dying, quiet, records

STUDY: dict[str, Any] = {
    "name": "found", "num_trials": 4, "confirm": {"top": 2, "num_seeds": 3}, "pruner": {"name": "none"},
    "enqueue": [{"method.eta": eta, "method.rollout_length": 1} for eta in (0.1, 0.2, 0.3, 0.4)],
}  # fmt: skip
SEARCHED = [1.0, 8.0, 9.0, 2.0]


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedSlots]:
    """Learners that train nothing: in the search trials have the values `SEARCHED`, with fresh seeds 4 and 6."""
    made: list[ScriptedSlots] = []

    @contextlib.contextmanager
    def open_slots(compute: Any, dataset: Any) -> Any:
        yield made[-1]

    started = launch._run

    def value(trial: int, seed: int, updates: int) -> float:
        return SEARCHED[trial] if seed < 2 else [4.0, 6.0][trial] + seed - 3

    def run(config: Config, *args: Any) -> Any:
        made.append(ScriptedSlots(config, value))
        return started(config, *args)

    monkeypatch.setattr(launch, "open_slots", open_slots)
    monkeypatch.setattr(launch, "_run", run)
    return made


def tags_in_mlflow(workdir: Path) -> dict[str, dict[str, str]]:
    """Tags by the name of the run."""
    with contextlib.closing(sqlite3.connect(workdir / "mlflow.db")) as store:
        rows = store.execute(
            "SELECT r.name, t.key, t.value FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid"
            " JOIN experiments e ON e.experiment_id = r.experiment_id AND e.name = 'found'"
        ).fetchall()
    tags: dict[str, dict[str, str]] = {}
    for name, key, value in rows:
        assert key not in tags.setdefault(name, {}), "a run exists twice"
        tags[name][key] = value
    return tags


def test_the_best_are_trained_again_with_what_the_search_has_not_used(workdir: Path, slots: list[ScriptedSlots]):
    outcome = launch.start(configured(workdir, **STUDY), quiet())
    folder = workdir / "studies" / "found"
    # searched 9 and 8, in truth 4 and 6
    assert outcome.confirmed == [Confirmation(1, 8.0, (5.0, 6.0, 7.0)), Confirmation(2, 9.0, (3.0, 4.0, 5.0))]
    assert confirmations(folder) == outcome.confirmed
    config = load_config([folder / FOLDER / "config.yaml"], [])
    assert config.seeds == [2, 3, 4]
    assert config.evaluation.first_seed == 10_000 + config.evaluation.episodes
    assert config.method.dynamics.seed == 1
    assert config.study.trials == [
        {"method.eta": 0.3, "method.rollout_length": 1}, {"method.eta": 0.2, "method.rollout_length": 1},
    ]  # fmt: skip
    # its ensemble is another one, built once for both
    assert slots[0].built == [1]
    assert [call for call in slots[0].calls if call[0] == "build_stages"] == [("build_stages", "dynamics")]
    tags = tags_in_mlflow(workdir)["study found"]
    told = {key: tags[key] for key in ("best_trial", "best_value", "confirmed_trial", "confirmed_value")}
    assert told == {"best_trial": "2", "best_value": "9.0", "confirmed_trial": "1", "confirmed_value": "6.0"}
    assert tags["searched_value"] == "8.0"
    assert tags["confirmed_interval"] == "3.516 to 8.484 (95 %)"  # 6 -+ 4.303 / sqrt(3)
    logged = [r["values"] for r in records(folder, "study") if "confirm/trial" in r.get("values", {})]
    assert [values["confirm/confirmed"] for values in logged] == [6.0, 4.0]


def test_what_a_search_began_with_is_trained_again_beside_its_best(workdir: Path, slots: list[ScriptedSlots]):
    asked = {**STUDY, "enqueue": STUDY["enqueue"][:1], "confirm": {"top": 1, "enqueued": 2, "num_seeds": 3}}
    with pytest.raises(UserError, match=r"study\.confirm\.enqueued is 2, but the study begins with 1 given trials"):
        launch.start(configured(workdir, **asked), quiet())
    assert not (workdir / "studies" / "found").exists()
    asked["confirm"]["enqueued"] = 1
    outcome = launch.start(configured(workdir, **asked), quiet())
    # the first of the stage is the search's best, trial 2, the second what it began with, its worst
    assert [(one.number, one.searched, one.mean) for one in outcome.confirmed] == [(0, 1.0, 6.0), (2, 9.0, 4.0)]


def test_without_fresh_stages_the_search_s_are_used(workdir: Path):
    config = configured(workdir, **{**STUDY, "confirm": {"fresh_stages": False}})
    assert confirm_config(config, [{"method.eta": 1.0}]).method.dynamics.seed == config.method.dynamics.seed
    # a seed that was searched is beyond all that could be chosen
    space = {"method.dynamics.seed": {"type": "int", "low": 0, "high": 5}}
    config = configured(workdir, **{**STUDY, "space": space, "enqueue": []})
    assert confirm_config(config, [{}]).method.dynamics.seed == 6


@pytest.mark.parametrize(("owner", "moment", "call"), [
    pytest.param("orchestrator.confirm", "save_candidates", 1, marks=pytest.mark.slow),
    pytest.param("study", "create", 2, marks=pytest.mark.slow), ("study", "tell", 5),
])  # fmt: skip
def test_a_driver_killed_in_the_confirm_stage_goes_on_to_the_same_numbers(
    workdir: Path, slots: list[ScriptedSlots], monkeypatch: pytest.MonkeyPatch, owner: str, moment: str, call: int
):
    target: Any = Study if owner == "study" else __import__(owner, fromlist=["x"])
    last = Study.close if moment == "create" else None
    with monkeypatch.context() as patch:
        patch.setattr(target, moment, dying(getattr(target, moment), call, last))
        with pytest.raises(Killed):
            launch.start(configured(workdir, **STUDY), quiet())
    outcome = launch.resume("found", workdir, [], quiet())
    assert outcome.confirmed == [Confirmation(1, 8.0, (5.0, 6.0, 7.0)), Confirmation(2, 9.0, (3.0, 4.0, 5.0))]


@pytest.mark.slow
def test_a_finished_search_can_be_confirmed_later_and_only_as_begun(workdir: Path, slots: list[ScriptedSlots]):
    outcome = launch.start(configured(workdir, **{**STUDY, "confirm": {"top": 0}}), quiet())
    assert outcome.confirmed == []
    outcome = launch.resume("found", workdir, ["study.confirm.top=1"], quiet())
    assert [one.number for one in outcome.confirmed] == [2]
    assert len(load_candidates(workdir / "studies" / "found" / FOLDER)) == 1
    with pytest.raises(UserError, match=r"study\.confirm\.top was 0 and is 2"):
        launch.resume("found", workdir, ["study.confirm.top=2"], quiet())
    assert launch.resume("found", workdir, [], quiet()).confirmed == outcome.confirmed


@pytest.mark.slow
def test_trainings_listed_trials_and_older_studies_are_not_confirmed(workdir: Path, slots: list[ScriptedSlots]):
    config = configured(workdir, **STUDY)
    config.study.space, config.study.enqueue, config.study.name = {}, [], "listed"
    config.study.trials, config.study.num_trials = [{"method.eta": 0.1}, {"method.eta": 0.2}], 2
    assert launch.start(config, quiet()).confirmed == []
    # begun before there was such a stage
    launch.start(configured(workdir, **{**STUDY, "confirm": {"top": 0}}), quiet())
    file = workdir / "studies" / "found" / "config.yaml"
    begun = yaml.safe_load(file.read_text())
    del begun["study"]["confirm"]
    file.write_text(yaml.safe_dump(begun, sort_keys=False))
    assert launch.resume("found", workdir, [], quiet()).confirmed == []


@pytest.mark.slow
def test_its_runs_are_beside_those_of_the_search_and_have_an_ensemble_of_their_own(workdir: Path):
    """Real trainings."""
    confirm = {"top": 1, "num_seeds": 1}
    outcome = launch.start(configured(workdir, "num_seeds=1", name="found", num_trials=2, confirm=confirm), quiet())
    [best] = outcome.confirmed
    folder = workdir / "studies" / "found"
    assert outcome.study.best is not None
    assert (best.number, best.searched) == (outcome.study.best.number, outcome.study.best.value)
    tags = tags_in_mlflow(workdir)
    name = f"c{best.number:03d}-s1"
    assert set(tags) == {"study found", "confirm found", "t000-s0", "t001-s0", name}
    assert {key: tags[name][key] for key in ("stage", "trial", "seed", "study")} == {
        "stage": "confirm", "trial": str(best.number), "seed": "1", "study": "found",
    }  # fmt: skip
    assert tags["t000-s0"]["stage"] == "search"
    made = load_config([folder / FOLDER / "runs" / f"c{best.number:04d}-s1" / "config.yaml"], [])
    of_search = load_config([folder / "runs" / f"t{best.number:04d}-s0" / "config.yaml"], [])
    assert made.method.eta == of_search.method.eta
    assert (made.method.dynamics.seed, of_search.method.dynamics.seed) == (1, 0)
    assert len([*(workdir / "artifacts").rglob("content.pt")]) == 2
    assert (folder / FOLDER / "runs" / f"c{best.number:04d}-s1" / "policy.npz").exists()
