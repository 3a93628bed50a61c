"""The edge-of-reach laboratory through the command line, and studies whose trials are listed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.edge_of_reach import lines
from envs.errors import UserError
from orchestrator import labs
from orchestrator.cli import main
from orchestrator.config import apply_params, load_config, pack_key
from orchestrator.driver import run_key
from orchestrator.labs.common import read_rows
from orchestrator.labs.edge_of_reach import LabRun, method_name
from tests.orchestrator.studies import ScriptedSlots, configured, drive, points, quiet

DATASET = "embedded/edge-of-reach-random-v0"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which the dataset has been collected."""
    from envs.registry import load_dataset

    folder: Path = tmp_path_factory.mktemp("lab") / "work"
    load_dataset(DATASET, folder)
    return folder


def small(folder: Path, monkeypatch: pytest.MonkeyPatch, trials: list[dict[str, Any]], **method: Any) -> None:
    """Let the lab be a small one, in this process."""
    study = yaml.safe_load((labs.STUDIES / "edge_of_reach.yaml").read_text())
    study["study"]["trials"] = trials
    study["method"] |= method
    study["evaluation"]["episodes"] = 2
    study["compute"]["num_learners"] = 0
    (folder / "edge_of_reach.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setattr(labs, "STUDIES", folder)


TINY = {"hidden": [8], "rollout_batch": 20, "batch_size": 16}


@pytest.mark.slow
def test_the_lab_is_trained_tabulated_and_drawn_and_then_only_drawn_again(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials: list[dict[str, Any]] = [
        {"method.num_critics": 3},
        {"method.num_critics": 2},
        {"method.num_critics": 2, "method.patch": "oracle"},
        {"method.num_critics": 2, "method.rollout_length": 1},
    ]
    small(tmp_path, monkeypatch, trials, **TINY)
    words = ["lab", "edge-of-reach", "--seeds", "2", "--updates", "20", "--workdir", str(collected)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Base-OraclePatch" in out
    assert "a reconstruction" in out
    folder = collected / "studies" / "edge-of-reach"
    runs = read_rows(folder, LabRun)
    assert [(r.method, r.k, r.seed) for r in runs] == [
        (name, k, seed)
        for name, k in (("RAVL", 10), ("Base", 10), ("Base-OraclePatch", 10), ("Base", 1))
        for seed in (0, 1)
    ]
    assert all(0 <= r.penalty_auroc <= 1 and 0 <= r.edge_share <= 1 for r in runs)
    # with one step about half of the square's states can only be ended in; in ten a new policy gets there hardly ever
    assert runs[-1].edge_share > 0.1 > runs[2].edge_share
    logged = points(folder, run_key(2, 0))
    assert ("train/patched_share", 20) in logged
    assert runs[4].mean_q == logged["reach/q_mean", 20]
    figure = folder / "edge_of_reach.png"
    assert figure.stat().st_size > 20_000
    assert len(list(lines(folder, "again"))) == len(runs)
    figure.unlink()
    journal = (folder / "journal.log").read_bytes()
    assert main(words) == 0
    assert figure.exists()
    assert (folder / "journal.log").read_bytes() == journal  # nothing was trained again
    assert main([*words[:3], "3", *words[4:]]) == 2  # another study than the one that is there
    assert "num_seeds was 2 and is 3" in capsys.readouterr().err


def test_labs_are_listed_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["lab"]) == 0
    assert "edge-of-reach" in capsys.readouterr().out
    for words, sentence in (
        (
            ["edge-of-reech"],
            "unknown lab 'edge-of-reech'; known: edge-of-reach, grid-world, penalties, penalties-halfcheetah, ref",
        ),
        (["edge-of-reach", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["edge-of-reach", "--updates", "-5"], "--updates -5 must be at least 1"),
    ):
        assert main(["lab", *words, "--workdir", str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert sentence in captured.err
        assert len(captured.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="run `offsweep lab` first"):
        read_rows(tmp_path, LabRun)


def test_base_and_ravl_share_all_settings_but_the_critics_and_rollout_lengths_need_packs_of_their_own() -> None:
    config = load_config([labs.STUDIES / "edge_of_reach.yaml"], [])
    trials = [apply_params(config, params) for params in config.study.trials]
    named = {(method_name(t), t.method.rollout_length): t for t in trials}
    assert set(named) >= {("Base", k) for k in (1, 2, 3, 5, 10, 20, 30)} | {("RAVL", 10), ("Base-OraclePatch", 10)}
    base, ravl = vars(named["Base", 10].method), vars(named["RAVL", 10].method)
    assert {key for key in base if base[key] != ravl[key]} == {"num_critics"}
    assert len({pack_key(t) for t in trials}) == len(trials)
    assert ravl["gamma"] < 1
    assert ravl["model_quality"] == 1
    assert ravl["real_ratio"] == 0


# ---- listed trials --------------------------------------------------------------------------------------------------


def test_listed_trials_are_run_as_listed(workdir: Path) -> None:
    trials = [{"method.eta": 0.5}, {"method.num_critics": 3}, {}]
    config = configured(workdir, "num_seeds=2", name="listed", trials=trials, num_trials=3)
    config.study.space = {}
    study = drive(config, ScriptedSlots(config, lambda trial, seed, updates: float(trial)))
    records = study.trials()
    assert [(r.number, r.active, r.state, r.value) for r in records] == [
        (i, trial, "complete", float(i)) for i, trial in enumerate(trials)
    ]
    assert [len(r.attrs["run_values"]) for r in records] == [2, 2, 2]


@pytest.mark.parametrize(
    ("study", "sentence"),
    [
        ({"trials": [{"method.num_critic": 3}]}, "unknown key method.num_critic; did you mean method.num_critics"),
        ({"trials": [{"method.num_critics": "many"}]}, "method.num_critics"),
        ({"trials": [{"seed": 3}]}, "'seed' cannot differ"),
        ({"trials": [{"method.eta": 1.0}], "enqueue": [{"method.eta": 2.0}]}, "leave out study.enqueue"),
        ({"trials": [{"method.eta": 1.0}, {"method.eta": 2.0}], "num_trials": 3}, "lists 2"),
    ],
)
def test_a_list_of_trials_that_makes_no_sense(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], study: dict[str, Any], sentence: str
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"method": "ravl", "dataset": "tiny", "study": {"name": "bad", **study}}))
    assert main(["sweep", str(file), "--workdir", str(workdir)]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (workdir / "studies" / "bad").exists()


@pytest.mark.slow
def test_values_explode_without_ravls_critics_and_do_not_with_them(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few minutes: the paper's claim, for two seeds and half of the lab's updates. No policy is worth more than the
    highest reward forever."""
    small(tmp_path, monkeypatch, [{"method.num_critics": 20}, {"method.num_critics": 2}])
    work = tmp_path / "work"
    runs = labs.run_lab("edge-of-reach", str(work), 2, 5000, quiet())
    by_method = {name: [r for r in runs if r.method == name] for name in ("RAVL", "Base")}
    largest = 1 / (1 - load_config([labs.STUDIES / "edge_of_reach.yaml"], []).method.gamma)
    assert all(r.mean_q < largest for r in by_method["RAVL"])
    assert all(r.mean_q > 3 * largest for r in by_method["Base"])
    assert not any(r.success for r in by_method["Base"])
    with (work / "studies" / "edge-of-reach" / "lab.csv").open() as file:
        assert len(list(csv.reader(file))) == 5
