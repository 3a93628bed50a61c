"""The command line: wrong input ends with one sentence and exit code 2, before anything is computed or left behind."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.kill_tests import SETTINGS
from orchestrator import launch
from orchestrator.cli import main

TRAIN = ["train", "method=ravl", "dataset=tiny"]


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main([*words]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("offsweep: ")
    assert captured.out == ""
    return lines[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=rvl"], "unknown method 'rvl'; did you mean 'ravl'?"),
        (["dataset=tinny"], "there is no dataset 'tinny'"),
        (["dataset=embedded/pendulum-medum-v0"], "embedded/pendulum-medium-v0"),
        (["dataset=hopper-medium-replay-v2"], "'hopper-medium-replay-v2' is not on this machine"),
        (["dataset=nowhere/set.hdf5"], "nowhere/set.hdf5"),
        (["method.num_critic=3"], "did you mean method.num_critics?"),
        (["seed=one"], "seed: Value 'one'"),
        (["method.hidden=16"], "method.hidden"),
        (["method.gamma=2"], "method.gamma=2.0 must lie in (0, 1)"),
        (["num_seeds"], "'num_seeds' is not of the form key=value"),
        (["evaluation.env_id=Pendulun-v1"], "there is no Gymnasium environment 'Pendulun-v1'"),
        (["evaluation.env_id=Hopper-v5"], "environment 'Hopper-v5' has (11,) and (3,)"),
        (["tracking_uri=ftp://example.org"], "ftp"),
        (["tracking_uri=sqlite://"], "does not name a file"),
        (["study.sampler.name=tpee"], "Unknown sampler 'tpee'"),
        (["study.num_trials=2"], "study.space varies nothing"),
        (["study.name=a/b"], "a/b"),
    ],
)
def test_a_wrong_override(
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    sentence: str,
):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(workdir / "d4rl"))
    assert sentence in fails(capsys, *TRAIN, "--workdir", str(workdir), *overrides)
    assert not (workdir / "studies").exists()


def test_a_gpu_that_is_not_there(workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = fails(capsys, *TRAIN, "--workdir", str(workdir), "compute.device=cuda")
    assert "torch sees no GPU" in line
    assert not (workdir / "studies").exists()


def test_a_server_that_does_not_answer(workdir: Path, capsys: pytest.CaptureFixture[str]):
    line = fails(capsys, *TRAIN, "--workdir", str(workdir), f"tracking_uri=http://127.0.0.1:{free_port()}")
    assert "No MLflow server answers" in line
    assert not (workdir / "studies").exists()


def test_a_work_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("not a folder")
    line = fails(capsys, *TRAIN, "dataset=embedded/pendulum-medium-v0", "--workdir", str(tmp_path / "file" / "work"))
    assert "cannot be written" in line


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "No such file"),
        ("method: [ravl\n", "is not valid YAML"),
        ("- ravl\n", "must hold a mapping"),
        ("dataset: tiny\n", "no method given"),
        ("method: ravl\ndataset: tiny\nstudy: {trails: 3}\n", "unknown key study.trails; did you mean study.trials?"),
        ("method: ravl\ndataset: tiny\nstudy: {trials: 3}\n", "the number of trials is study.num_trials"),
        ("method: ravl\ndataset: tiny\nstudy: {num_trials: 2, space: {method.eta: {type: float, low: 1}}}\n", "'high'"),
        ("method: ravl\ndataset: tiny\nstudy: {num_trials: 2, space: {method.etta: {type: float, low: 1, high: 2}}}\n",
         "did you mean method.eta?"),
    ],
)  # fmt: skip
def test_a_wrong_study_file(workdir: Path, capsys: pytest.CaptureFixture[str], text: str | None, sentence: str):
    file = workdir / "study.yaml"
    if text is not None:
        file.write_text(text)
    assert sentence in fails(capsys, "sweep", str(file), "--workdir", str(workdir))
    assert not (workdir / "studies").exists()


def test_studies_that_are_there_or_not(workdir: Path, capsys: pytest.CaptureFixture[str]):
    from orchestrator.config import to_yaml
    from sweeps.study import Study
    from tests.orchestrator.studies import configured

    config = configured(workdir, name="mine")
    folder = workdir / "studies" / "mine"
    Study.create(folder, config.study_spec()).close()
    (folder / "config.yaml").write_text(to_yaml(config))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    option = ["--workdir", str(workdir)]
    assert "already holds a study" in fails(capsys, *TRAIN, *option, "study.name=mine")
    assert "there is no study 'other'" in fails(capsys, "resume", "other", *option)
    assert "it holds: mine" in fails(capsys, "resume", "other", *option)
    assert "cannot change while a study is resumed" in fails(capsys, "resume", "mine", *option, "seed=7")
    assert "did you mean compute.threads?" in fails(capsys, "resume", "mine", *option, "compute.thread=2")
    assert "no study" in fails(capsys, "show", "other", *option)
    with Study.open(folder):
        assert "driver" in fails(capsys, "resume", "mine", *option)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not (workdir / "studies" / "other").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--env", "Pendulun-v1"], "there is no Gymnasium environment 'Pendulun-v1'"),
        (["--policy", "pendulum-medum"], "pendulum-medium"),
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--name", "../b"], "must be a plain name"),
        (["--name", "b.hdf5"], "must be a plain name"),
        (["--name", "hopper-medium-v2"], "is the name of a dataset already"),
        (["--workers", "-1"], "must not be negative"),
        (["--name", "tiny"], "exists already"),
    ],
)
def test_a_wrong_collection(workdir: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str):
    words = {"--env": "Pendulum-v1", "--policy": "pendulum-medium", "--rows": "100", "--name": "new"}
    words |= {options[0]: options[1]}
    line = fails(capsys, "data", "collect", *[w for pair in words.items() for w in pair], "--workdir", str(workdir))
    assert sentence in line
    assert [path.name for path in (workdir / "datasets").iterdir()] == ["tiny.hdf5"]


@pytest.mark.parametrize("words", [["data", "info", "tinny"], ["data", "train-actor", "--out", "x", "step=3"]])
def test_other_wrong_data_commands(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("OFFSWEEP_WORKDIR", str(workdir))
    fails(capsys, *words)
    assert not Path("x").exists()


@pytest.mark.parametrize("words", [[], ["trian"], ["sweep"], ["train", "--wrkdir", "x"], ["methods", "seed=1"]])
def test_words_that_are_no_command(capsys: pytest.CaptureFixture[str], words: list[str]):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "offsweep" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that a command would have run."""
    configs: list[Any] = []
    monkeypatch.setattr(launch, "start", lambda config, console: configs.append(config))
    return configs


def test_overrides_may_stand_before_and_behind_options(tmp_path: Path, started: list[Any]):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    assert main(["sweep", str(file), "seed=3", "--workdir", str(tmp_path), "num_seeds=4", "method.tau=0.5"]) == 0
    [config] = started
    assert (config.seed, config.num_seeds, config.method.tau, config.workdir) == (3, 4, 0.5, str(tmp_path))


def test_a_profile_is_asked_for_by_an_option(tmp_path: Path, started: list[Any]):
    assert main([*TRAIN, "--workdir", str(tmp_path)]) == 0
    assert main(["train", "--profile", *TRAIN[1:], "--workdir", str(tmp_path)]) == 0
    assert [config.compute.profile for config in started] == [False, True]


def test_the_work_folder_comes_from_the_environment(
    tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OFFSWEEP_WORKDIR", str(tmp_path / "mine"))
    assert main(TRAIN) == 0
    assert main([*TRAIN, "--workdir", str(tmp_path / "other")]) == 0
    assert [config.workdir for config in started] == [str(tmp_path / "mine"), str(tmp_path / "other")]


def test_the_demo_can_be_run_again(tmp_path: Path, started: list[Any]):
    (tmp_path / "studies" / "demo").mkdir(parents=True)
    assert main(["demo", "--workdir", str(tmp_path), "study.num_trials=2"]) == 0
    assert (started[0].study.name, started[0].study.num_trials) == ("demo-2", 2)


def test_a_study_takes_the_name_of_its_file(tmp_path: Path, started: list[Any]):
    file = tmp_path / "my-study.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, "study": {k: v for k, v in SETTINGS["study"].items() if k != "name"}}))
    assert main(["sweep", str(file), "--workdir", str(tmp_path)]) == 0
    assert started[0].study.name == "my-study"


def test_shifted_environments_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "environments"]) == 0
    text = capsys.readouterr().out
    assert "offsweep/HalfCheetah-kinematic-v{4,5}" in text
    assert "offsweep/Ant-kinematic-hips-{easy,medium,hard}-v{4,5}" in text
    assert "offsweep/Walker2d-friction-FACTOR-v{4,5}" in text
    assert "torso 0.8 to 0.2 m long instead of 1 m" in text
    assert main(["data", "environments", "Ant-kinematic-hips", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows[:2]] == [f"offsweep/Ant-kinematic-hips-easy-v{v}" for v in (4, 5)]
    assert len(rows) == 6
    assert rows[0]["source_id"] == "offsweep/Ant-v4"
    assert main(["data", "environments", "Antelope"]) == 2
    assert "no shifted environment is called like 'Antelope'" in capsys.readouterr().err


def test_methods_and_datasets_are_listed(workdir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    assert "code (default), code-patience, code-fan-in, edac-grid" in capsys.readouterr().out
    assert main(["data", "list", "--workdir", str(workdir)]) == 0
    assert {"tiny", "embedded/pendulum-medium-v0", "hopper-medium-v2"} <= set(capsys.readouterr().out.split())
    assert main(["data", "list", "pendulum-med*", "--json", "--workdir", str(workdir)]) == 2
    assert main(["data", "list", "pendulum-med", "--json", "--workdir", str(workdir)]) == 0
    names = [entry["name"] for entry in yaml.safe_load(capsys.readouterr().out)]
    assert names == ["embedded/pendulum-medium-v0", "embedded/pendulum-medium-snapshots-v0"]


def test_a_collected_dataset_can_be_looked_at(workdir: Path, capsys: pytest.CaptureFixture[str]):
    words = ["data", "collect", "--env", "Pendulum-v1", "--policy", "random", "--policy", "pendulum-medium"]
    assert main([*words, "--rows", "250", "--name", "mixed", "--workdir", str(workdir)]) == 0
    assert "train on it with dataset=mixed" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "info", "mixed", "--json", "--workdir", str(workdir)]) == 0
    summary = yaml.safe_load(capsys.readouterr().out)
    assert (summary["rows"], summary["name"]) == (250, "mixed")
