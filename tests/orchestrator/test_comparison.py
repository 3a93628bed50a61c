"""Runs, trials and studies beside each other."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from scipy.stats import t, ttest_ind

from orchestrator.cli import main
from orchestrator.comparison import compare, differences, doubts, find_group
from tests.orchestrator.test_reading import make_study


def add_run(workdir: Path, trial: int, seed: int, values: list[float], **settings: Any) -> None:
    folder = workdir / "studies" / "made" / "runs" / f"t{trial:04d}-s{seed}"
    folder.mkdir(parents=True)
    method = {"name": "ravl", "eta": 1.0, "dynamics": {"hidden": [8]}, **settings}
    config = {"dataset": "tiny", "seed": seed, "method": method, "evaluation": {"episodes": 2}, "workdir": str(workdir)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    content = [
        {"updates": 10 * i, "value": value, "returns": [value, value], "offline": {}}
        for i, value in enumerate(values, 1)
    ]
    (folder / "evaluations.json").write_text(json.dumps(content))


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    make_study(tmp_path, 5, 5)
    for seed, last in enumerate((1.0, 2.0, 6.0)):
        add_run(tmp_path, 0, seed, [9.0, last])
        add_run(tmp_path, 3, seed, [0.0, last + 1.0 + seed], eta=3.0, dynamics={"hidden": [8], "seed": 1})
    add_run(tmp_path, 1, 7, [4.0, 5.0])
    add_run(tmp_path, 1, 8, [4.0, 7.0])
    return tmp_path


def as_json(workdir: Path, *words: str) -> Any:
    text = io.StringIO()
    compare(words, workdir, Console(file=text), True, None)
    return json.loads(text.getvalue())


def test_a_study_stands_for_its_best_trial_and_seeds_are_paired(workdir: Path):
    found = as_json(workdir, "made/0", "made")
    assert found["settings"] == {"method.eta": [1.0, 3.0], "method.dynamics.seed": [None, 1]}
    first, best = found["groups"]
    assert (first["name"], best["name"]) == ("made/0", "made/3")
    assert best["values"]["last"] == {"0": 2.0, "1": 4.0, "2": 9.0}
    assert best["values"]["mean of the last 10"]["2"] == 4.5
    assert first["values"]["best evaluation (hindsight)"] == {"0": 9.0, "1": 9.0, "2": 9.0}
    assert first["differences"]["last"] is None
    difference = best["differences"]["last"]  # of pairs: 1, 2, 3
    half = float(t.ppf(0.975, 2)) * 1.0 / 3**0.5
    assert difference["mean"] == pytest.approx(2.0)
    assert difference["interval"] == pytest.approx([2.0 - half, 2.0 + half])
    assert difference["paired"]
    assert "made/3 is the best of 4 trials" in found["doubts"][0]


def test_other_seeds_are_compared_by_welch(workdir: Path):
    (_, other) = as_json(workdir, "made/t0000", "made/1")["groups"]
    low, high = ttest_ind([5.0, 7.0], [1.0, 2.0, 6.0], equal_var=False).confidence_interval()
    assert other["differences"]["last"] == {"mean": 3.0, "interval": pytest.approx([low, high]), "paired": False}


def test_what_speaks_against_comparing_is_said(workdir: Path):
    add_run(workdir, 2, 0, [1.0, 2.0, 3.0])
    groups = [find_group(word, workdir) for word in ("made/0", "made/t0002-s0")]
    assert doubts(groups) == [
        "The numbers of updates differ.",
        "Of made/t0002-s0 there is one seed: its luck cannot be told from its settings.",
    ]
    assert differences(groups) == {}


def test_a_run_is_found_by_its_id_in_mlflow_and_a_page_is_written(workdir: Path, capsys: pytest.CaptureFixture[str]):
    runs = {"t0001-s8": {"run_id": "ab" * 16}, "study": {"run_id": "cd" * 16}}
    (workdir / "studies" / "made" / "tracker.json").write_text(json.dumps({"runs": runs}))
    where, page = ["--workdir", str(workdir)], workdir / "page.html"
    assert main(["compare", "made/0", "ab" * 16, *where, "--html", str(page)]) == 0
    assert "made/t0001-s8" in capsys.readouterr().out
    assert "data:image/png;base64," in page.read_text()
    assert "made/t0001-s8" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["made"], "compare takes two or more"),
        (["made", "mode"], "there is no study 'mode'"),
        (["made", "made/9"], "study 'made' has no runs '9'; it has trials 0 to 4"),
        (["made", "made/x"], "'made/x' is no study, STUDY/TRIAL such as made/3"),
        (["made", "ef" * 16], "has sent a run to MLflow as efef"),
        (["made", "made/4"], "'made/4' has not been evaluated yet"),
    ],
)
def test_wrong_input(workdir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    (workdir / "studies" / "made" / "runs" / "t0004-s0").mkdir()
    assert main(["compare", *words, "--workdir", str(workdir)]) == 2
    assert message in capsys.readouterr().err
