"""The refrigerator laboratory: from stages to tables and figure, and through the command line."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from agents.method import TrainingData, load_method
from agents.refrigerator import DRAW, FILTERED, MEAN, NEAREST, SURVIVORS
from benchmarks.refrigerator import lines
from envs.recipes import EMBEDDED
from envs.registry import load_dataset
from orchestrator import labs
from orchestrator.artifacts import ArtifactStore, stage_key
from orchestrator.cli import main
from orchestrator.config import apply_params, load_config, pack_key, to_yaml
from orchestrator.labs.common import read_rows
from orchestrator.labs.refrigerator import FIGURE_FILE, MAP_FILE, LabRow, MapRow, options, ratios, show, show_ratio
from sweeps.statistics import paired_ratio
from tests.agents.test_refrigerator import knowing_reward, linear_ensemble

DATASET = "embedded/refrigerator-shut-v0"
STUDY = labs.STUDIES / "refrigerator.yaml"


class Spool:
    def __init__(self) -> None:
        self.artifacts: list[str] = []

    def artifact(self, path: Path, folder: str = "") -> None:
        self.artifacts.append(path.name)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, DATASET, replace(EMBEDDED[DATASET], rows=2000))


def test_stages_become_rows_tables_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config([{"workdir": str(tmp_path)}, STUDY, options(3, None)], [f"dataset={DATASET}"])
    dataset = load_dataset(DATASET, tmp_path)
    data = TrainingData.from_dataset(dataset, np.zeros(1, np.float32), np.full(1, 10.0, np.float32))
    store = ArtifactStore(tmp_path / "artifacts")
    trials = [apply_params(config, params) for params in config.study.trials]
    contents = {
        "dynamics": linear_ensemble((0.5, -0.5, 0.1), 0.4).state_dict(),
        "dynamics_reward": {**knowing_reward(data).state_dict(), "snapshot_updates": [1]},
    }
    for i, trial in enumerate(trials):
        for name, stage in load_method("mopo").stages(trial.method).items():
            if name == "dynamics" and i == 0:
                continue  # of the first repetition one stage could not be built

            def build(missing: list[Any], name: str = name) -> list[Any]:
                return [SimpleNamespace(content=contents[name], description={})]

            store.build_missing({stage_key(stage, dataset.content_hash): stage}, build)
    folder = tmp_path / "studies" / "refrigerator"
    folder.mkdir(parents=True)
    config.method.filter.num_discriminators = 1
    (folder / "config.yaml").write_text(to_yaml(config))
    records = [SimpleNamespace(active=params) for params in config.study.trials]
    study, spool = SimpleNamespace(folder=folder, trials=lambda: records), Spool()
    rows = show(config, study, spool, Console(width=250))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "1 repetitions have no stages" in out
    assert "highest +0.0, +0.0 °C from the true" in out
    assert spool.artifacts == ["lab.csv", MAP_FILE, FIGURE_FILE]
    assert (folder / FIGURE_FILE).stat().st_size > 20_000
    assert {(row.seed, row.way) for row in rows} == {
        (seed, way) for seed in (2, 3) for way in (DRAW, MEAN, FILTERED, NEAREST, SURVIVORS)
    }
    again = read_rows(folder, LabRow)
    assert [row.rmse for row in again] == [row.rmse for row in rows]
    assert len(again[0].rmse_by_step) == 100
    for ratio in ratios(rows, FILTERED, DRAW).values():
        assert ratio.mean < 0.5  # a reward that knows helps under every controller
    assert all(m.without_data > 0 for m in read_rows(folder, MapRow, MAP_FILE))
    made = list(lines(folder, "again"))
    assert {(line["seed"], line["controller"], line["filtered"]) for line in made if "controller" in line} == {
        (seed, row.controller, filtered) for seed in (2, 3) for row in rows for filtered in (True, False)
    }
    by_case = {line["case"]: line for line in made}
    assert by_case["P 1.5, random draw, seed 2"]["ratio"] == 1.0
    assert by_case["P 1.5, filtered, seed 2"]["ratio"] < 0.5
    assert len(by_case["P 1.5, filtered, seed 2"]["rmse_by_step"]) == 100


def test_ratios_pair_repetitions_and_say_where_nothing_is_gained() -> None:
    def rows(way: str, values: list[float]) -> list[LabRow]:
        return [LabRow(seed, "P", way, value, 1.0, (value,), (1.0,)) for seed, value in enumerate(values)]

    both = [*rows(DRAW, [1.0, 2.0, 4.0]), *reversed(rows(FILTERED, [0.5, 1.0, 2.0]))]
    (ratio,) = ratios(both, FILTERED, DRAW).values()
    assert (ratio.mean, ratio.student) == (pytest.approx(0.5), pytest.approx((0.5, 0.5)))
    assert "no gain" not in show_ratio(ratio)
    assert "no gain" in show_ratio(paired_ratio([1.0, 2.0, 4.0], [1.0, 4.0, 2.0]))


def test_every_repetition_has_an_ensemble_and_a_reward_of_its_own() -> None:
    config = load_config([STUDY], [])
    trials = [apply_params(config, params) for params in config.study.trials]
    assert len(trials) == 5
    for name in ("dynamics", "dynamics_reward"):
        keys = {stage_key(load_method("mopo").stages(t.method)[name], "data") for t in trials}
        assert len(keys) == 5
    assert len({pack_key(t) for t in trials}) == 5
    assert load_config([STUDY, options(5, None)], []).study.trials == config.study.trials
    assert load_config([STUDY, options(2, 50)], []).method.num_updates == 50
    assert all(t.method.filtered for t in trials)


def test_numbers_that_make_no_sense(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, sentence in ((["--seeds", "0"], "--seeds 0"), (["--updates", "0"], "--updates 0")):
        assert main(["lab", "refrigerator", *words, "--workdir", str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert f"{sentence} must be at least 1" in captured.err
        assert len(captured.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_lab_is_trained_tabulated_and_drawn_and_then_only_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = yaml.safe_load(STUDY.read_text())
    study["dataset"] = DATASET
    study["method"] |= {
        "hidden": [8], "rollout_batch": 5, "batch_size": 16, "filter": {"num_discriminators": 2},
        "dynamics": {"hidden": [8], "weight_decay": [0.0, 0.0], "max_epochs": 1},
        "dynamics_reward": {"max_epochs": 2, "num_snapshots": 2, "pretraining_epochs": 1},
    }  # fmt: skip
    study["compute"] = {"num_learners": 0}
    (tmp_path / "refrigerator.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setattr(labs, "STUDIES", tmp_path)
    work = tmp_path / "work"
    words = ["lab", "refrigerator", "--seeds", "2", "--updates", "20", "--workdir", str(work)]
    assert main(words) == 0
    assert "RMSE in °C against the simulator" in capsys.readouterr().out
    folder = work / "studies" / "refrigerator"
    with (folder / "lab.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 2 * 3 * 5
    journal, figure = (folder / "journal.log").read_bytes(), folder / FIGURE_FILE
    figure.unlink()
    assert main(words) == 0
    assert figure.exists()
    assert (folder / "journal.log").read_bytes() == journal  # nothing was trained again
