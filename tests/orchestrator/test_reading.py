"""What is shown of a study: empty, running, stopped, finished, made before now; for people and for machines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from envs.errors import UserError
from orchestrator import reading
from orchestrator.cli import main
from orchestrator.config import check_space, load_config
from orchestrator.reading import About
from sweeps.spec import StudySpec
from sweeps.study import LOCK_FILE, Study
from tests.sweeps.test_plots_study import Again

ABOUT = About(
    "ravl", "tiny", "score", "whose pair", "mean return 3.0", 5, "/work", "sqlite:///x.db", price_per_hour=2.0
)
SPACE = {
    "method.eta": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
    "method.kind": {"type": "categorical", "choices": ["a", "b"]},
}


def make_study(workdir: Path, trials: int, finished: int) -> Path:
    """The folder of a study of `trials` trials with values 0, 1, ..., of which the last is pruned."""
    folder = workdir / "studies" / "made"
    with Study.create(folder, StudySpec("made", SPACE, num_trials=trials, seeds_per_trial=2, total_steps=10)) as study:
        ABOUT.save(folder)
        for number in range(min(trials, finished + 1)):
            ticket = study.ask()
            assert ticket is not None
            study.report(number, 5, float(number))
            study.set_attr(number, "run_returns", {f"t{number:04d}-s0": 10.0 * number})
            study.set_attr(number, "run_values", {f"t{number:04d}-s0": float(number)})
            if number == trials - 1:
                study.tell_pruned(number)
            elif number < finished:
                study.tell(number, float(number))
    return folder


def shown(workdir: Path, name: str = "made", **options: Any) -> str:
    text = io.StringIO()
    reading.show(name, workdir, Console(file=text, width=200), **options)
    return text.getvalue()


def test_a_finished_study(tmp_path: Path):
    make_study(tmp_path, 24, 24)
    text = shown(tmp_path, top=3)
    assert "and 21 more trials; --top 24 shows them" in text
    assert "study:      finished, 24 of 24 trials ended (23 complete, 1 pruned)" in text
    assert "best trial: mean return 220.0 (score 22.0) over 1 seeds x 5 episodes; trial 22: eta=" in text
    assert "best score 0.0 after 1" in text
    assert "22.0 after 23 of 23 results" in text
    assert "importance" in text
    assert "0.1 to 10.0" in text
    # 24 trials x 2 seeds x 5 updates, of which the pruned one was to make 5 more of each seed
    assert "about 240 updates (stopping early saved 4%), about 240 online episodes" in text
    assert "hours of packs, 0.00 at 2 an hour" in text
    assert shown(tmp_path).count("complete") == 24  # 23 rows, and their number


def test_running_stopped_and_empty_studies(tmp_path: Path):
    folder = make_study(tmp_path, 6, 2)
    assert "running, 2 of 6" in shown(tmp_path)  # this process was its driver
    assert "under way:  trial 2: 50% of its updates, score 2.0, asked for 0:0" in shown(tmp_path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (folder / LOCK_FILE).write_text(f"process {gone.stdout.strip()} on {os.uname().nodename}\n")
    text = shown(tmp_path)
    assert "stopped, 2 of 6" in text
    assert "offsweep resume made --workdir /work" in text
    (folder / LOCK_FILE).write_text("process 1 on another-machine\n")
    assert "last driven by process 1 on another-machine" in shown(tmp_path)
    with Study.create(tmp_path / "studies" / "empty", StudySpec("empty", SPACE, num_trials=3)):
        ABOUT.save(tmp_path / "studies" / "empty")
    empty = shown(tmp_path, name="empty")
    assert "0 of 3 trials ended" in empty
    assert json.loads(shown(tmp_path, name="empty", as_json=True))["best"] is None


def test_failures_and_confirmations_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_study(tmp_path, 6, 2)
    with Study.open(folder) as study:
        study.tell_failed(2, "no room")
    confirmed = [Again(1, 1.0, (0.5, 0.25), (-1.25, 2.0)), Again(0, 0.0, (-3.0,), diverged=True)]
    monkeypatch.setattr(reading, "confirmations", lambda _: confirmed)
    text = shown(tmp_path)
    assert "failed:     trial 2: no room" in text
    line = "confirmed:  trial 1: searched 1.0 / confirmed 0.4 (-1.2 to 2.0) score, 2 fresh seeds: 0.5 0.2"
    assert line in text
    assert "confirmed:  trial 0: searched 0.0 / confirmed -3.0 score, 1 fresh seed: -3.0, diverged" in text
    machine = json.loads(shown(tmp_path, as_json=True))
    assert machine["failures"] == [{"reason": "no room", "trials": [2]}]
    assert machine["confirmed"][0] == {
        "trial": 1, "searched": 1.0, "mean": 0.375, "values": [0.5, 0.25], "interval": [-1.25, 2.0], "diverged": False,
    }  # fmt: skip
    assert machine["confirmed"][1]["interval"] is None


def test_machines_get_everything(tmp_path: Path):
    folder = make_study(tmp_path, 24, 24)
    machine = json.loads(shown(tmp_path, as_json=True))
    assert (machine["state"], machine["counts"]) == ("finished", {"complete": 23, "pruned": 1})
    assert (machine["best"]["trial"], machine["best"]["value"]) == (22, 22.0)
    assert machine["history"][5] == {"trial": 5, "value": 5.0, "best": 5.0}
    assert sum(machine["importances"].values()) == pytest.approx(1.0)
    assert machine["cost"]["updates_saved"] == 10
    assert len(machine["trials"]) == 24
    assert machine["trials"][0]["intermediate"] == {"5": 22.0}
    (folder / "importances.json").write_text('{"method.kind": 0.8, "method.eta": 0.2}')  # kept at its end
    assert json.loads(shown(tmp_path, as_json=True))["importances"] == {"method.kind": 0.8, "method.eta": 0.2}
    assert [row["number"] for row in json.loads(shown(tmp_path, as_json=True, top=2))["trials"]] == [22, 21]


def test_figures_go_where_they_are_wanted(tmp_path: Path):
    make_study(tmp_path, 24, 24)
    text = shown(tmp_path, figures=tmp_path / "new" / "figures")
    names = sorted(path.name for path in (tmp_path / "new" / "figures").iterdir())
    assert names == ["curves.png", "history.png", "importances.png", "pair.png", "parallel.png", "slices.png"]
    assert "parallel.png" in text
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write figures to"):
        shown(tmp_path, figures=tmp_path / "file")


def test_the_command_line_shows_a_study_in_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_study(tmp_path, 3, 3)
    options = ["made", "--workdir", str(tmp_path), "--top", "1"]
    assert main(["show", *options]) == 0
    once = capsys.readouterr().out
    assert "and 2 more trials" in once
    assert main(["sweep", "show", *options]) == 0
    assert capsys.readouterr().out == once
    assert main(["sweep", "show", "nothing", "--workdir", str(tmp_path)]) == 2
    assert "it holds: made" in capsys.readouterr().err
    assert main(["show", "made", "--workdir", str(tmp_path), "--top", "0"]) == 2
    assert "--top 0 must be at least 1" in capsys.readouterr().err


def test_reading_loads_none_of_what_takes_long(tmp_path: Path):
    make_study(tmp_path, 3, 3)
    code = (
        "import sys; from orchestrator.cli import main; "
        f"assert main(['sweep', 'show', 'made', '--workdir', {str(tmp_path)!r}]) == 0; "
        "print([name for name in ('torch', 'ray', 'mlflow', 'gymnasium', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_shipped_study_is_found_by_its_name(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from orchestrator import launch

    started: list[Any] = []
    monkeypatch.setattr(launch, "start", lambda config, console: started.append(config))
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "edge-of-reach", "--workdir", str(workdir)]) == 0
    assert started[0].study.name == "edge-of-reach"
    assert main(["sweep", "demo", "study.num_trials=2", "--workdir", str(workdir)]) == 0
    assert (started[1].study.name, started[1].study.num_trials) == ("demo", 2)
    # a file of that name comes first
    Path("demo").write_text(yaml.safe_dump({"method": "ravl", "dataset": "tiny"}))
    assert main(["sweep", "demo", "--workdir", str(workdir)]) == 0
    assert started[2].dataset == "tiny"
    capsys.readouterr()
    assert main(["sweep", "dmeo", "--workdir", str(workdir)]) == 2
    line = capsys.readouterr().err
    assert "no such study comes with offsweep; known: demo, edge-of-reach" in line


def test_the_study_of_the_docs_can_be_run():
    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    block = text.split("```yaml\n# study.yaml\n")[1].split("```")[0]
    config = load_config([yaml.safe_load(block)], [])
    spec = check_space(config)
    assert (spec.name, spec.num_trials, len(spec.space)) == ("first-study", 24, 3)
