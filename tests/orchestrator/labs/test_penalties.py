"""The penalties laboratory: from ensembles and policies to rows, tables and a figure, and through the command line."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from agents.method import TrainingData, load_method
from agents.penalties import PENALTIES
from agents.penalty_quality import Judged
from benchmarks.penalty_quality import lines
from envs.recipes import EMBEDDED
from envs.registry import load_dataset
from orchestrator import labs
from orchestrator.artifacts import ArtifactStore, stage_key
from orchestrator.cli import main
from orchestrator.config import apply_params, check_space, load_config, pack_key, to_yaml
from orchestrator.labs import penalties as lab
from orchestrator.labs.common import read_rows
from orchestrator.learner import action_bounds

STUDIES = [labs.STUDIES / f"{name}.yaml" for name in ("penalties", "penalties_halfcheetah")]
SETS = {kind: f"embedded/hopper-{kind}-v0" for kind in ("medium-snapshots", "random", "expert")}


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETS.values():
        monkeypatch.setitem(EMBEDDED, name, replace(EMBEDDED[name], rows=500))
    monkeypatch.setattr(lab, "NUM_STARTS", 40)
    monkeypatch.setattr(lab, "LENGTH", 5)


def small(workdir: Path) -> dict[str, Any]:
    """The study with networks that take no time."""
    study = yaml.safe_load(STUDIES[0].read_text())
    study["dataset"] = SETS["medium-snapshots"]
    study["method"] |= {
        "hidden": [8], "batch_size": 16, "rollout_batch": 5, "updates_per_epoch": 10, "num_updates": 20,
        "dynamics": {"ensemble_size": 3, "num_elites": 2, "hidden": [8], "weight_decay": [0.0, 0.0], "max_epochs": 2},
    }  # fmt: skip
    return {**study, "workdir": str(workdir)}


class Spool:
    def __init__(self) -> None:
        self.artifacts: list[str] = []

    def artifact(self, path: Path, folder: str = "") -> None:
        self.artifacts.append(path.name)


def test_ensembles_become_rows_tables_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], few_rows: None
) -> None:
    """Of three repetitions two have an ensemble; no policy of MOPO's is there."""
    config = load_config([small(tmp_path), lab.options(3, None)], [])
    dataset = load_dataset(config.dataset, tmp_path)
    data = TrainingData.from_dataset(dataset, *action_bounds(dataset.env_id))
    store = ArtifactStore(tmp_path / "artifacts")
    for params in config.study.trials[:2]:
        stage = load_method("mopo").stages(apply_params(config, params).method)["dynamics"]

        def build(missing: list[Any]) -> list[Any]:
            content = missing[0].build(data, lambda *_: None)
            return [SimpleNamespace(content=content, description={})]

        store.build_missing({stage_key(stage, dataset.content_hash): stage}, build)
    folder = tmp_path / "studies" / "penalties"
    folder.mkdir(parents=True)
    records = [SimpleNamespace(active=params, number=n) for n, params in enumerate(config.study.trials)]
    study, spool = SimpleNamespace(folder=folder, trials=lambda: records), Spool()
    rows = lab.show(config, study, spool, Console(width=250))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "1 repetitions have no ensemble" in out
    assert spool.artifacts == ["lab.csv", lab.FIGURE_FILE]
    assert (folder / lab.FIGURE_FILE).stat().st_size > 20_000
    policies = ("behaviour's last", "expert", "random actions")
    assert {row.scenario for row in rows} == {*policies, "data: its own", "data: random", "data: expert"}
    assert {(row.seed, row.members, row.penalty) for row in rows} == {
        (seed, size, penalty) for seed in (0, 1) for size in (2, 3) for penalty in PENALTIES
    }
    assert {row.step for row in rows if row.imagined} == {0, 1, 5}
    assert {row.step for row in rows if not row.imagined} == {0}
    for row in rows:
        if row.step == 0 and not row.imagined:
            assert row.states == 200
        if row.states:
            assert math.isnan(row.inside_1) == (row.penalty not in ("max_aleatoric", "ensemble_std"))
    again = read_rows(folder, lab.LabRow)
    np.testing.assert_array_equal([row.spearman for row in again], [row.spearman for row in rows])
    (folder / "config.yaml").write_text(to_yaml(config))
    made = {line["case"]: line for line in lines(folder, "again")}
    assert set(made) == {f"hopper/{penalty}/N{size}" for size in (2, 3) for penalty in PENALTIES}
    line, mine = made["hopper/loo_kl/N3"], [row for row in rows if (row.penalty, row.members) == ("loo_kl", 3)]
    imagined = [row.spearman for row in mine if row.step == 0 and row.imagined and not math.isnan(row.spearman)]
    assert line["value"] == pytest.approx(np.mean(imagined), rel=1e-4)
    assert line["reference"] == made["hopper/max_aleatoric/N3"]["value"]


def test_rows_take_steps_apart_and_together() -> None:
    error = torch.rand(5, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    penalty = error.clone()
    penalty[4] = -error[4]  # at the last step the larger the error, the smaller
    rows = lab.lab_rows(0, "expert", True, 7, Judged(error, error, dict.fromkeys(PENALTIES, penalty), {}))
    found = {row.step: row.spearman for row in rows if row.penalty == "loo_kl"}
    assert (found[1], found[5]) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert -1 < found[0] < 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_repetition_has_an_ensemble_of_its_own(path: Path) -> None:
    config = load_config([path], [])
    check_space(config)
    trials = [apply_params(config, params) for params in config.study.trials]
    assert len({stage_key(load_method("mopo").stages(t.method)["dynamics"], "data") for t in trials}) == 2
    assert len({pack_key(t) for t in trials}) == 2
    assert load_config([path, lab.options(2, None)], []).study.trials == config.study.trials
    assert load_config([path, lab.options(None, 500)], []).method.num_updates == 500


@pytest.mark.slow
def test_the_lab_is_trained_tabulated_and_drawn_and_then_only_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], few_rows: None
) -> None:
    study = small(tmp_path)
    del study["workdir"]
    (tmp_path / "penalties.yaml").write_text(yaml.safe_dump({**study, "compute": {"num_learners": 0}}))
    monkeypatch.setattr(labs, "STUDIES", tmp_path)
    work = tmp_path / "work"
    words = ["lab", "penalties", "--seeds", "1", "--workdir", str(work)]
    assert main(words) == 0
    assert "MOPO's own" in capsys.readouterr().out
    folder = work / "studies" / "penalties"
    with (folder / "lab.csv").open() as file:
        # 4 policies of 2 steps and the whole, 3 datasets; 2 sizes
        assert len(list(csv.reader(file))) == 1 + (4 * 3 + 3) * 2 * len(PENALTIES)
    journal, figure = (folder / "journal.log").read_bytes(), folder / lab.FIGURE_FILE
    figure.unlink()
    assert main(words) == 0
    assert figure.exists()
    assert (folder / "journal.log").read_bytes() == journal  # nothing was trained again
