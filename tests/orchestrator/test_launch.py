"""Starting, resuming and showing studies: what is checked first, and what may change in between."""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from benchmarks.kill_tests import SETTINGS, Remains
from envs.errors import UserError
from orchestrator import launch, reading
from orchestrator.cli import main
from orchestrator.config import Config, load_config, to_dict
from orchestrator.environment import ROOT
from orchestrator.spool import read_records
from orchestrator.status import read_status
from orchestrator.tracking import default_tracking_uri
from sweeps.study import Study
from tests.orchestrator.studies import ScriptedSlots, configured, quiet

ONE = ("study.space={}", "study.num_trials=1", "num_seeds=1")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners that train nothing."""
    import contextlib

    slots: list[ScriptedSlots] = []

    class Lazy(ScriptedSlots):
        def __init__(self) -> None: ...

    @contextlib.contextmanager
    def open_slots(compute: Any, dataset: Any) -> Any:
        yield slots[-1]

    started = launch._run

    def run(config: Config, *args: Any) -> Any:
        slots.append(ScriptedSlots(config, lambda trial, seed, updates: float(trial)))
        return started(config, *args)

    monkeypatch.setattr(launch, "open_slots", open_slots)
    monkeypatch.setattr(launch, "_run", run)


def without_space(config: Config) -> Config:
    config.study.space, config.study.num_trials = {}, 1
    return config


@pytest.mark.usefixtures("scripted")
def test_a_study_without_a_name_gets_one_that_says_what_it_is(workdir: Path):
    config = without_space(configured(workdir, "study.name=''"))
    outcome = launch.start(config, quiet())
    assert outcome.experiment.startswith("ravl-tiny-2")
    assert (workdir / "studies" / outcome.experiment / "config.yaml").exists()


@pytest.mark.usefixtures("scripted")
def test_a_resumed_study_may_change_where_it_runs_and_nothing_else(workdir: Path):
    launch.start(configured(workdir), quiet())
    before = Remains.of(workdir, "killed")
    launch.resume("killed", workdir, ["compute.threads=2", "seed=0"], quiet())  # seed=0 is no change
    assert Remains.of(workdir, "killed").trials == before.trials
    for override, key in (
        ("seed=1", "seed"), ("method.tau=0.5", "method.tau"), ("study.num_trials=9", "study.num_trials"),
        ("evaluation.episodes=1", "evaluation.episodes"), ("workdir=/elsewhere", "workdir"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^{key} was .* cannot change while a study is resumed"):
            launch.resume("killed", workdir, [override], quiet())


@pytest.mark.usefixtures("scripted")
def test_sweep_resume_refuses_a_file_that_has_changed_since(workdir: Path, capsys: pytest.CaptureFixture[str]):
    file = workdir / "study.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    options = ["--workdir", str(workdir)]
    assert main(["sweep", str(file), *options, "method.tau=0.01"]) == 0
    assert main(["sweep", str(file), *options, "method.tau=0.01", "compute.threads=2", "--resume"]) == 0
    capsys.readouterr()
    assert main(["sweep", str(file), *options, "--resume"]) == 2
    assert "method.tau was 0.01 and is 0.005" in capsys.readouterr().err
    assert main(["sweep", str(file), *options]) == 2
    assert "already holds a study" in capsys.readouterr().err


@pytest.mark.usefixtures("scripted")
def test_a_study_is_shown_while_it_has_a_driver(workdir: Path):
    outcome = launch.start(configured(workdir), quiet())
    text = io.StringIO()
    with Study.open(outcome.study.folder):
        reading.show("killed", workdir, Console(file=text, width=200))
    assert "best trial:" in text.getvalue()
    assert "3.0" not in text.getvalue()  # three trials: 0, 1, 2


@pytest.mark.usefixtures("scripted")
def test_a_study_that_has_ended_leaves_what_reading_it_needs(workdir: Path):
    folder = launch.start(configured(workdir, "compute.price_per_cpu_hour=3"), quiet()).study.folder
    assert sorted(path.name for path in (folder / "plots").iterdir())[:3] == [
        "curves.png",
        "history.png",
        "parallel.png",
    ]
    logged = [one for one, _ in read_records(folder / "spool" / "study.jsonl") if one]
    tags = {key: value for one in logged if one["type"] == "tags" for key, value in one["tags"].items()}
    assert (tags["best_trial"], tags["trials"]) == ("2", "3 complete")
    assert "eta=" in tags["best_params"]
    sent = [Path(one["path"]).name for one in logged if one["type"] == "artifact" and one["artifact_path"] == "plots"]
    assert "parallel.png" in sent
    # neither the dataset nor the configuration is read again
    (folder / "config.yaml").unlink()
    text = io.StringIO()
    reading.show("killed", workdir, Console(file=text, width=200))
    assert "best trial:" in text.getvalue()
    assert "at 3 an hour" in text.getvalue()


def check_documented_searches(workdir: Path, study: str) -> None:
    """Each is understood by MLflow, and finds what it is for where the study has it."""
    from mlflow import MlflowClient

    text = (ROOT / "docs" / "tracking.md").read_text()
    searches = text.partition("```mlflow\n")[2].partition("```")[0].splitlines()
    client = MlflowClient(default_tracking_uri(workdir))
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == study]
    found = {search: client.search_runs([experiment], search) for search in searches}
    assert len(found) == 9
    assert len(client.search_runs([experiment], "tags.trial = '1' and tags.seed = '3'")) == 1
    assert {run.data.tags["trial"] for run in found["attributes.run_name LIKE 't000-%'"]} == {"0"}
    known = {
        key for run in client.search_runs([experiment]) for key in (*run.data.tags, *run.data.params, *run.data.metrics)
    }
    named = {name.strip("`") for search in searches for name in re.findall(r"(?:tags|params|metrics)\.(\S+)", search)}
    assert named - known <= {"collapsing", "stage"}


def test_a_study_that_was_killed_before_it_began_says_so(workdir: Path):
    config = configured(workdir)
    with Study.create(workdir / "studies" / "killed", config.study_spec()):
        pass
    with pytest.raises(UserError, match="was killed before it began; remove it"):
        launch.resume("killed", workdir, [], quiet())


@pytest.mark.usefixtures("scripted")
def test_the_file_names_the_work_folder_unless_the_command_line_does(workdir: Path, tmp_path: Path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, "workdir": str(workdir)}))
    assert main(["sweep", str(file), "study.name=a"]) == 0
    assert (workdir / "studies" / "a").exists()
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    assert main(["sweep", str(file), "study.name=b", "--workdir", str(other)]) == 0
    assert (other / "studies" / "b").exists()
    assert not (workdir / "studies" / "b").exists()


def test_the_stored_configuration_of_a_run_trains_that_run_again(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    launch.start(configured(workdir, "seed=3", "num_seeds=1", num_trials=2, name="first"), quiet())
    stored = workdir / "studies" / "first" / "runs" / "t0001-s3"
    monkeypatch.chdir(workdir.parent)  # away from the work folder, which the file names
    assert main(["train", "--config", str(stored / "config.yaml"), "study.name=again"]) == 0
    again = workdir / "studies" / "again"
    assert (again / "runs" / "t0000-s3" / "policy.npz").read_bytes() == (stored / "policy.npz").read_bytes()
    assert load_config([stored / "config.yaml"], []).method == load_config([again / "config.yaml"], []).method
    check_documented_searches(workdir, "first")
    assert read_status(workdir / "studies" / "first")["tracking"]["runs"] == 0  # all was sent at its end


@pytest.mark.usefixtures("scripted")
def test_artifacts_of_a_shared_store_are_where_the_store_keeps_them(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    """Not in this machine's work folder, where the users of the store would not find them."""
    store = workdir.parent / "shared"
    store.mkdir()
    shutil.move(workdir / "mlflow.db", store / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    launch.start(configured(workdir), quiet())
    assert [*store.rglob("trials.csv")]
    assert not (workdir / "mlartifacts").exists()
    assert not (workdir / "mlflow.db").exists()


def test_a_plain_configuration_is_not_changed_by_reading_it(workdir: Path):
    config = configured(workdir)
    assert to_dict(load_config([to_dict(config)], [])) == to_dict(config)
    assert os.path.isabs(config.workdir)


@pytest.mark.usefixtures("scripted")
def test_a_second_driver_joins_a_shared_study_if_its_settings_are_the_same(workdir: Path, tmp_path: Path):
    other = Path(shutil.copytree(workdir, tmp_path / "other"))
    study = {"storage": f"sqlite:///{tmp_path}/studies.db"}
    outcome = launch.start(configured(workdir, **study), quiet())
    with pytest.raises(UserError, match=r"has method.tau=0.005, not 0.1"):
        launch.start(configured(other, "method.tau=0.1", **study), quiet())
    text = io.StringIO()
    joined = launch.start(configured(other, "compute.threads=2", **study), Console(file=text, width=200))
    assert "another driver of this study confirms its best trials and draws its plots" in text.getvalue()
    assert [trial.value for trial in joined.study.trials()] == [trial.value for trial in outcome.study.trials()]
    assert (outcome.study.folder / "plots" / "history.png").exists()
    assert not (joined.study.folder / "plots" / "history.png").exists()
    launch.resume("killed", other, [], quiet())
    reading.show("killed", other, Console(file=text, width=200))
    assert "best trial:" in text.getvalue().partition("draws its plots")[2]
    with pytest.raises(UserError, match=r"^study.storage was sqlite.* cannot change while a study is resumed"):
        launch.resume("killed", other, [f"study.storage=sqlite:///{tmp_path}/elsewhere.db"], quiet())
    with pytest.raises(UserError, match=r"study.storage needs a study.name"):
        launch.start(configured(other, name="", **study), quiet())
    with pytest.raises(UserError, match="holds a password"):
        launch.start(configured(other, storage="postgresql://me:secret@host/db", name="new"), quiet())
    assert not (other / "studies" / "new").exists()
