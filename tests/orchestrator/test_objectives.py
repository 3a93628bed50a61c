"""Objectives in real trainings: offline metrics of packs, episodes counted and kept, and the bandit behind a search."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from orchestrator import launch
from orchestrator.cluster import InlineSlots
from orchestrator.config import load_config, pack_key, run_config, stages_of, to_dict
from orchestrator.learner import LearnerProcess, PackSpec, RunSpec
from orchestrator.selection import play_bandit
from orchestrator.spool import RunSpool
from orchestrator.workers import Workers
from sweeps.selection import PULLS_FILE, chosen_trials, read_pulls, selection_report
from sweeps.study import Study
from tests.orchestrator.studies import (
    IN_PROCESS,
    ScriptedSlots,
    configured,
    dataset_of,
    drive,
    make_learner,
    make_pack,
    points,
    quiet,
    records,
    train,
)

SHORT = ("method.num_updates=50", "evaluation.every_epochs=1")
TWO = [({"method.eta": 0.1}, 0), ({"method.eta": 3.0}, 1)]


def offline(metric: str, *more: str) -> list[str]:
    settings = f"study.objective={{kind: offline, metric: {metric}, fqe_updates: 30, horizon: 5}}"
    return [settings, *more]


def metric_of(pack: PackSpec, run: int, metric: str) -> list[float]:
    path = Path(pack.study_folder) / "runs" / pack.runs[run].run_key / "evaluations.json"
    return [e["offline"][metric] for e in json.loads(path.read_text())]


@pytest.mark.parametrize("metric", ["fqe", "model_return", pytest.param("initial_value", marks=pytest.mark.slow)])
def test_a_metric_is_the_same_alone_and_after_a_kill(workdir: Path, metric: str) -> None:
    settings = offline(metric, "evaluation.episodes=0")
    pack = make_pack(workdir, TWO, *settings, name="pack")
    report = train(pack)
    values = [metric_of(pack, run, metric) for run in range(2)]
    assert all(len(v) == 2 and all(map(math.isfinite, v)) for v in values)
    assert values[0] != values[1]
    for run, evaluations in zip(pack.runs, report.evaluations.values(), strict=True):
        assert [(e.value, e.returns) for e in evaluations] == [(None, [])] * 2
        assert [e.objective(metric) for e in evaluations] == [e.offline[metric] for e in evaluations]
        logged = points(pack.study_folder, run.run_key)
        assert [logged[f"offline/{metric}", step] for step in (100, 200)] == [e.offline[metric] for e in evaluations]
        assert ("eval/score", 200) not in logged
    alone = make_pack(workdir, [({}, 9), TWO[1]][1:], *settings, name="alone")
    train(alone)
    assert metric_of(alone, 0, metric) == pytest.approx(values[1], rel=1e-4)
    killed = make_pack(workdir, TWO, *settings, name="killed")
    make_learner(killed).advance()  # up to its first evaluation, and no further
    train(killed)
    assert [metric_of(killed, run, metric) for run in range(2)] == values


def test_episodes_are_played_and_kept_beside_an_offline_metric(workdir: Path) -> None:
    pack = make_pack(workdir, TWO[:1], *offline("initial_value", "evaluation.episodes=2"))
    learner = make_learner(pack)
    learner.advance()
    path = Path(pack.study_folder) / "runs" / pack.runs[0].run_key / "evaluations.json"
    first = json.loads(path.read_text())  # at once, not at the run's end
    assert [len(e["returns"]) for e in first] == [2]
    assert set(first[0]["offline"]) == {"initial_value"}
    learner.advance(dropped=[pack.runs[0].run_key])
    assert json.loads(path.read_text()) == first  # a run that is stopped keeps them


def test_metrics_wait_with_the_episodes_of_evaluators(workdir: Path) -> None:
    class Elsewhere(Workers):
        evaluates_elsewhere = True

    at_once = make_pack(workdir, TWO, *offline("fqe"), name="at-once")
    train(at_once)
    pending = make_pack(workdir, TWO, *offline("fqe"), name="pending")
    learner = make_learner(pending, workers=Elsewhere())
    assert not learner.advance().evaluations["t0000-s0"]
    del learner  # killed while the evaluation was under way
    train(pending, workers=Elsewhere())
    for run in range(2):
        assert metric_of(pending, run, "fqe") == metric_of(at_once, run, "fqe")


def test_a_method_without_a_model_gets_an_ensemble_for_its_objective(workdir: Path) -> None:
    block = configured(workdir).method.dynamics
    settings = {
        "method": {"name": "td3_bc", "hidden": [16], "batch_size": 32, "num_updates": 50, "updates_per_epoch": 50,
                   "dynamics": vars(block)},
        "dataset": configured(workdir).dataset, "workdir": str(workdir), "evaluation": {"episodes": 0},
        "study": {"objective": {"kind": "offline", "metric": "model_return", "horizon": 3}},
    }  # fmt: skip
    config = load_config([settings], [])
    (name,) = stages_of(config)
    run = run_config(config, {}, 0)
    process = LearnerProcess(IN_PROCESS)
    assert process.build_stages([to_dict(run)], name, dataset_of(config)) == [None]
    pack = PackSpec("p", str(workdir / "studies" / "m"), (RunSpec("t0000-s0", 0, 0, to_dict(run), {}),))
    train(pack)
    assert all(map(math.isfinite, metric_of(pack, 0, "model_return")))
    # another ensemble is another objective: such runs cannot share a pack
    settings["method"]["dynamics"] = {**vars(block), "seed": 5}  # type: ignore[index]
    assert pack_key(load_config([settings], [])) != pack_key(config)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluation.episodes=0"], "must be at least 1 where trials are judged by their scores"),
        (["study.objective={kind: offline}"], "metric=score is not there"),
        (["study.objective={kind: hybrid, metric: fqe}"], "study.objective.pulls"),
        (["study.objective.kind=offlin"], "did you mean"),
        (offline("fqe", "study.space={method.gamma: {type: float, low: 0.9, high: 0.99}}"), "method.gamma"),
    ],
)
def test_objectives_are_refused_before_anything_is_computed(
    tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        configured(tmp_path, *overrides)


def test_methods_without_what_a_metric_needs_are_refused() -> None:
    words = ["dataset=embedded/pendulum-medium-v0", "study.objective={kind: offline, metric: initial_value}"]
    with pytest.raises(UserError, match="method=bc has none"):
        load_config([], ["method=bc", *words])
    load_config([], ["method=td3_bc", *words])
    with pytest.raises(UserError, match="of another domain"):
        load_config([], ["method=vgdf", *words])
    # what an ensemble of the objective is like can be said, though the method has no use for it
    words[1] = "study.objective={kind: offline, metric: model_return}"
    assert load_config([], ["method=bc", *words, "method.dynamics.seed=3"]).method.dynamics.seed == 3


def test_every_episode_is_counted_whatever_became_of_its_trial(workdir: Path) -> None:
    script: dict[int, list[Any]] = {0: [9.0, 9.0], 1: [8.0, 8.0], 2: [7.0, "diverged"], 3: [1.0, 1.0]}
    config = configured(
        workdir, "study.num_trials=4", "study.pruner={startup_trials: 1, warmup_fraction: 0}", name="counted"
    )
    study = drive(config, ScriptedSlots(config, lambda trial, seed, updates: script[trial][updates // 100 - 1]))
    trials = study.trials()
    assert [t.state for t in trials] == ["complete", "pruned", "pruned", "pruned"] or trials[2].diverged
    # one episode of each of two runs at every evaluation that was made
    expected = [2 * len(t.intermediate) for t in trials]
    assert [t.attrs["online_episodes"] for t in trials] == expected
    assert expected[0] == 4
    assert expected[3] == 2
    report = selection_report(study.folder, trials)
    assert report is not None
    assert report.search_episodes == sum(expected)


def test_a_bandit_plays_on_after_a_kill_as_if_undisturbed(workdir: Path) -> None:
    objective = "study.objective={kind: hybrid, metric: initial_value, top: 3, pulls: 8}"
    config = configured(workdir, objective, "evaluation.episodes=0", *SHORT, name="hybrid")
    dataset, folder = dataset_of(config), workdir / "studies" / "hybrid"
    drive(config, InlineSlots(config.compute, dataset))
    study = Study.open(folder, read_only=True)
    trials = study.trials()
    assert all(t.attrs["online_episodes"] == 0 and t.value is not None for t in trials)
    with RunSpool(folder / "spool", "study") as spool:
        play_bandit(config, study, dataset, spool)
        pulls = read_pulls(folder)
        assert len(pulls) == 8
        assert [p.trial for p in pulls[:3]] == sorted(range(3), key=lambda n: -(trials[n].value or 0.0))
        # a trial's runs take turns, and the first episodes of all trials begin alike
        assert {p.seed for p in pulls[:3]} == {config.evaluation.first_seed + 1_000_000}
        assert {p.run[-3:] for p in pulls[:3]} == {"-s0"}
        whole = (folder / PULLS_FILE).read_bytes()
        cut = whole.splitlines(keepends=True)
        (folder / PULLS_FILE).write_bytes(b"".join(cut[:4]) + cut[4][:17])
        play_bandit(config, study, dataset, spool)
        assert (folder / PULLS_FILE).read_bytes() == whole
    report = selection_report(folder, trials)
    assert report is not None
    assert (report.search_episodes, report.pulls, report.num_policies) == (0, 8, 0)
    assert report.chosen == chosen_trials(folder, trials, 1)[0]


@pytest.mark.slow
def test_a_whole_hybrid_study_tells_mlflow_what_its_episodes_buy(workdir: Path) -> None:
    objective = "study.objective={kind: hybrid, metric: initial_value, top: 3, pulls: 8}"
    config = configured(workdir, objective, *SHORT, name="whole")
    launch.start(config, quiet())
    folder = workdir / "studies" / "whole"
    content = json.loads((folder / "online_budget.json").read_text())
    assert content["search_episodes"] == 3 * 2 * config.evaluation.episodes  # trials, seeds; one evaluation
    assert not content["seen_by_search"]
    assert (content["pulls"], content["num_policies"], content["bandit"]["num_arms"]) == (8, 6, 6)
    assert (folder / "online_budget.png").stat().st_size > 1000
    kept = [r["path"] for r in records(folder, "study") if r["type"] == "artifact"]
    assert {"online_budget.png", "online_budget.json", PULLS_FILE} <= {Path(path).name for path in kept}
