"""`offsweep table`: what is trained, what is found, what goes on after a stop."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from benchmarks.kill_tests import DATASET
from envs.errors import UserError
from envs.registry import known_hash, load_dataset
from orchestrator import launch
from orchestrator.cli import main
from orchestrator.config import load_config
from orchestrator.driver import Driver
from orchestrator.table_runs import missing_studies, planned_cells
from orchestrator.tables import Wanted, plan_table, run_table, show_table
from orchestrator.tracking import default_tracking_uri
from sweeps.confirm import confirmations
from sweeps.tables import load_table

INLINE = ("compute.num_learners=0", "compute.device=cpu")
TABLE = f"""
title: Two settings
paper: none
metric: score
unit: score
reference: mine
tuning: none
protocol: {{seeds: 2, updates: 40, updates_per_epoch: 20, episodes: 1, evaluations: 2, selection: last}}
rows:
  - {{name: medium, dataset: {DATASET}}}
columns:
  - {{name: cautious, settings: {{method: td3_bc, method.alpha: 1.0, method.hidden: [8, 8], method.batch_size: 16}}}}
  - {{name: bold, settings: {{method: td3_bc, method.alpha: 4.0, method.hidden: [8, 8], method.batch_size: 16}}}}
  - {{name: COMBO, reference_only: no such method here}}
"""
REFERENCES = """table,dataset,method,mean,spread,spread_kind,seeds,source,note
mine,medium,cautious,20,10,std,4,a paper,
mine,medium,COMBO,40,,,,another paper,
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "mine.csv").write_text(REFERENCES)
    path = tmp_path / "mine.yaml"
    path.write_text(TABLE)
    return path


def wanted(table: Path, workdir: Path, **more: Any) -> Wanted:
    return Wanted(str(table), workdir, words=INLINE, **more)


def run(table: Path, workdir: Path, **more: Any) -> tuple[int, str]:
    text = io.StringIO()
    return run_table(wanted(table, workdir, **more), Console(file=text, width=1000)), text.getvalue()


def shown(table: Path, workdir: Path, **more: Any) -> Any:
    text = io.StringIO()
    show_table(wanted(table, workdir), Console(file=text), as_json=True, **more)
    found = json.loads(text.getvalue())
    return {(cell["row"], cell["column"]): cell for cell in found["cells"]} | {"all": found}


def studies(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "studies").glob("*"))


def test_a_table_trains_what_is_missing_and_nothing_else(table: Path, workdir: Path):
    config = planned_cells(load_table(table), workdir, INLINE)[1].config
    config.num_seeds, config.study.name = 1, "elsewhere"  # as somebody else may have trained one of its runs
    launch.start(config, Console(file=io.StringIO()))

    assert run(table, workdir)[0] == 0
    found = shown(table, workdir)
    cautious, bold = found["medium", "cautious"], found["medium", "bold"]
    assert [one["seed"] for one in cautious["runs"]] == [one["seed"] for one in bold["runs"]] == [0, 1]
    assert bold["runs"][0]["study"] == "elsewhere"
    assert bold["runs"][0]["updates"] == [20, 40]
    assert cautious["verdict"]["name"] in ("reproduced", "better", "worse")
    assert found["medium", "COMBO"]["verdict"]["why"] == "no such method here"
    names = studies(workdir)
    assert len(names) == 3  # two columns miss different seeds, so that they cannot be trials of one study

    assert run(table, workdir)[0] == 0
    assert studies(workdir) == names
    for name in ("table.md", "table.tex", "table.csv", "table.json", "table.html"):
        assert (workdir / "tables" / "mine" / name).stat().st_size

    client = MlflowClient(default_tracking_uri(workdir))
    experiment = client.get_experiment_by_name("table mine")
    assert experiment is not None
    logged = client.search_runs([experiment.experiment_id])
    assert len(logged) == 1  # the second time nothing was new
    assert {item.path for item in client.list_artifacts(logged[0].info.run_id)} >= {"table.html", "table.tex"}
    assert logged[0].data.metrics["cells/not_comparable"] == 1
    trained = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], "tags.table = 'mine' and tags.outcome = 'finished'"
    )
    assert len(trained) == 3

    client.delete_run(bold["runs"][0]["run_id"])
    assert [one["seed"] for one in shown(table, workdir)["medium", "bold"]["runs"]] == [1]


def test_cells_of_a_dataset_share_a_study(table: Path, workdir: Path):
    table.write_text(TABLE.replace("seeds: 2", "seeds: 4"))
    planned = planned_cells(load_table(table), workdir, INLINE)
    missing = {one.key: [0, 1, 3] for one in planned}
    made = missing_studies(load_table(table), planned, missing, workdir, INLINE)
    assert [study.runs for study in made] == [4, 2]  # seeds of a study are consecutive
    assert made[0].config.study.trials == [{"method.alpha": 1.0}, {"method.alpha": 4.0}]
    assert made[0].seeds == {("medium", "cautious"): [0, 1], ("medium", "bold"): [0, 1]}
    assert made[1].config.seeds == [3]


def test_a_column_is_searched(table: Path, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny.yaml").write_text(
        "method: {name: td3_bc, hidden: [8, 8], batch_size: 16}\n"
        "study: {num_trials: 2, sampler: {name: random}, space: {method.alpha: {type: float, low: 1, high: 4}}}\n"
    )
    for module in ("sweeps.tables._STUDIES", "orchestrator.table_runs.STUDIES"):
        monkeypatch.setattr(module, tmp_path)
    searched = "settings: {method: td3_bc}, study: tiny}"
    table.write_text(TABLE.replace("settings: {method: td3_bc, method.alpha: 4.0, method.hidden: [8, 8], "
                                   "method.batch_size: 16}}", searched))  # fmt: skip
    assert run(table, workdir, columns=["bold"])[0] == 0
    found = shown(table, workdir)["medium", "bold"]
    (name,) = studies(workdir)
    assert [one["study"] for one in found["runs"]] == [name, name]
    assert [one["seed"] for one in found["runs"]] == [1, 2]  # that the search has not used
    best = confirmations(workdir / "studies" / name)[0]
    assert [one["values"][-1] for one in found["runs"]] == pytest.approx(best.values)
    assert shown(table, workdir)["all"]["caption"]["tuning budget"].endswith(
        "bold: searched by 2 trials (study tiny), confirmed with 2 fresh seeds"
    )
    assert run(table, workdir, columns=["bold"])[0] == 0
    assert studies(workdir) == [name]
    assert "| not run" in (workdir / "tables" / "mine" / "table.md").read_text()  # the whole table is written


def test_two_readings_of_the_same_runs_train_them_once(table: Path, workdir: Path):
    text = TABLE.replace("name: bold, settings: {method: td3_bc, method.alpha: 4.0,",
                         "name: bold, read_at: 20, settings: {method: td3_bc, method.alpha: 1.0,")  # fmt: skip
    table.write_text(text)
    planned = planned_cells(load_table(table), workdir, INLINE)
    (study,) = missing_studies(load_table(table), planned, {one.key: [0, 1] for one in planned}, workdir, INLINE)
    assert study.runs == 2
    assert not study.config.study.trials
    assert study.seeds == {("medium", "cautious"): [0, 1], ("medium", "bold"): [0, 1]}


def test_a_stopped_table_goes_on_with_its_studies(table: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    def dies(driver: Driver) -> None:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "run", dies)
        code, text = run(table, workdir)
    assert code == 1
    assert "no luck" in text
    begun = studies(workdir)
    code, text = run(table, workdir)
    assert code == 0
    assert f"going on with {begun[0]}" in text
    assert studies(workdir) == begun


@pytest.mark.slow
def test_a_table_whose_processes_are_killed_is_that_of_an_undisturbed_one(table: Path, workdir: Path, tmp_path: Path):
    table.write_text(TABLE.replace("updates: 40", "updates: 4000"))
    other = Path(shutil.copytree(workdir, tmp_path / "other"))
    command = [sys.executable, "-m", "orchestrator", "table", "run", str(table), "--workdir", str(workdir), *INLINE]
    for _ in range(2):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        before = trained(workdir)
        wait_for(lambda before=before: trained(workdir) > before + 10, process)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run(table, workdir)[0] == 0
    assert len(studies(workdir)) == 1
    assert run(table, other)[0] == 0
    found, undisturbed = shown(table, workdir), shown(table, other)
    for column in ("cautious", "bold"):
        runs, same = found["medium", column]["runs"], undisturbed["medium", column]["runs"]
        assert [one["values"] for one in runs] == [one["values"] for one in same]


def trained(workdir: Path) -> int:
    """Lines that its runs have logged."""
    return sum(len(path.read_bytes().splitlines()) for path in workdir.glob("studies/*/spool/t*.jsonl"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def test_another_process_is_left_alone(table: Path, workdir: Path):
    planned = planned_cells(load_table(table), workdir, INLINE)
    (study,) = missing_studies(load_table(table), planned, {one.key: [0, 1] for one in planned}, workdir, INLINE)
    from orchestrator.tables import _begin
    from sweeps.study import Study

    folder = workdir / "studies" / study.name
    _begin(workdir / "tables" / "mine", study)
    with Study.create(folder, study.config.study_spec()):
        (folder / "config.yaml").write_text(launch.to_yaml(study.config))
        code, text = run(table, workdir)
    assert code == 1
    assert f"another process is at {study.name}" in text
    assert studies(workdir) == [study.name]


def test_a_reduced_table_is_another_one_and_says_so(table: Path, workdir: Path):
    text = io.StringIO()
    plan_table(wanted(table, workdir, scale=0.5), Console(file=text, width=1000))
    assert "REDUCED: 0.5 of the updates" in text.getvalue()
    assert "mine-scale0.5-medium-td3_bc-" in text.getvalue()
    assert "4 to train in 1 studies, 80 updates" in text.getvalue()


def test_runs_of_another_version_of_the_data_do_not_count(table: Path, workdir: Path):
    run(table, workdir)
    assert shown(table, workdir)["medium", "bold"]["runs"]
    index = next((workdir / "mlflow-index").glob("*[0-9a-f].json"))
    content = json.loads(index.read_text())
    for one in content["runs"]:
        one["dataset_hash"] = "0" * 16
    index.write_text(json.dumps(content))
    found = shown(table, workdir)
    assert not found["medium", "bold"]["runs"]
    assert found["all"]["doubts"] == [f"4 runs learnt from another version of {DATASET} and are left out."]
    assert shown(table, workdir, anew=True)["medium", "bold"]["runs"]


def test_imported_values_are_shown(table: Path, workdir: Path, capsys: pytest.CaptureFixture[str]):
    file = workdir / "more.csv"
    file.write_text(
        "table,dataset,method,mean,spread,spread_kind,seeds,source,note\n"
        "edge-of-reach,edge of reach,RAVL,25,1,std,6,read by hand,\n"
    )
    assert main(["table", "import", str(file), "--workdir", str(workdir)]) == 0
    assert main(["table", "show", "edge-of-reach", "--cells", "--workdir", str(workdir)]) == 0
    assert "published: 25.0 ± 1.0 (read by hand)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "ravl-tabel-2"], "did you mean 'ravl-table-2'"),
        (["show", "edge-of-reach", "--scale", "0"], "must be above 0 and at most 1"),
        (["show", "refrigerator", "--scale", "0.5"], "have no scale"),
        (["show", "edge-of-reach", "--rows", "hopper-*"], "has no row 'hopper-*'"),
        (["run", "edge-of-reach", "method.eta=1"], "cannot be given to a table"),
        (["run", "edge-of-reach", "compute.num_lerners=1"], "did you mean compute.num_learners?"),
        (["show", "edge-of-reach", "tracking_uri=mysqll://x"], "MLflow cannot keep runs"),
        (["import", "nowhere.csv"], "Cannot read the references"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["table", words[0], *words[1:2], "--workdir", str(tmp_path), *words[2:]]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("studies/*"))


def test_the_hash_of_data_that_were_never_used_is_not_known(workdir: Path):
    assert known_hash(DATASET, workdir) is None
    dataset = load_dataset(DATASET, workdir)
    assert known_hash(DATASET, workdir) == dataset.content_hash
    assert known_hash("hopper-medium-v2,first=17", workdir) is None
    with pytest.raises(UserError):
        known_hash(f"{DATASET},frist=17", workdir)


def test_settings_hash_leaves_the_data_out(workdir: Path):
    from orchestrator.config import settings_hash

    words = ["method=td3_bc", "dataset=embedded/pendulum-medium-v0"]
    other = load_config([], [*words[:1], "dataset=embedded/pendulum-medium-snapshots-v0"])
    assert settings_hash(load_config([], words)) == settings_hash(other)
    assert settings_hash(load_config([], [*words, "seed=1"])) != settings_hash(other)
