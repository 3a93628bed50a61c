"""`offsweep status`: what a driver leaves, and what is made of it while it works, has ended or was killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator import prometheus, status
from orchestrator.activity import Activity
from orchestrator.cli import main
from orchestrator.learner import PackReport, PackSpec, RunSpec
from orchestrator.node_tracking import NodeBacklog
from orchestrator.prometheus import METRICS, RayMetrics, samples, text_of
from orchestrator.status import STATUS_FILE, StatusFile, read_status, show_status
from orchestrator.tracking import Backlog
from sweeps.study import LOCK_FILE, Study
from tests.orchestrator.test_reading import make_study

ERROR = "connection refused"


class MadeUp:
    """The progress of a driver: one pack at work, one that has died once."""

    stage = None

    def __init__(self, study: Study) -> None:
        self.study, self.activity = study, Activity()
        for number in (2, 3):
            pack = self._pack(number)
            self.activity.began(pack, 1000)
        report = PackReport("p2", 500, False, {}, node="host-a", updates_per_second=250.0, steps_per_second=10.0)
        self.activity.reported(report)
        self.activity.restarted("p3", RuntimeError("\n  the process died\nof something"))

    @staticmethod
    def _pack(number: int) -> PackSpec:
        return PackSpec(f"p{number}", "", (RunSpec(f"t{number:04d}-s0", number, 0, {}, {}),))

    def updates_done(self) -> float:
        return 2500.0

    def updates_planned(self) -> float:
        return 10000.0

    def seconds_left(self) -> float:
        return 75.0


@pytest.fixture
def progress(tmp_path: Path) -> Any:
    make_study(tmp_path, 6, 2)
    folder = tmp_path / "studies" / "made"
    (folder / LOCK_FILE).write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
    return MadeUp(Study.open(folder, read_only=True))


def write(progress: Any, **options: Any) -> StatusFile:
    file = StatusFile(
        progress.study.folder, lambda: Backlog(1, 300, None), lambda: [NodeBacklog("b:/disk", 2, 4000, ERROR)],
        "http://127.0.0.1:8265",
    )  # fmt: skip
    file.write(progress, **options)
    return file


def shown(workdir: Path, **options: Any) -> str:
    text = io.StringIO()
    show_status(workdir, Console(file=text, width=200), **options)
    return text.getvalue()


def test_a_study_at_work(progress: Any, tmp_path: Path):
    write(progress)
    text = shown(tmp_path, name="made")
    assert f"made: running (process {os.getpid()} on" in text
    assert "2 of 6 ended (2 complete" in text
    assert "25% of all that are planned, 1:15 left" in text
    assert "250 updates/s and 10 steps/s in 2 packs" in text
    assert "host-a" in text
    assert "1 of packs, 0 packs failed" in text
    assert "restart of p3: the process died" in text
    assert "4,300 bytes of 3 runs wait: connection refused" in text
    assert "b:/disk: 4,000 bytes of 2 runs wait; connection refused" in text
    assert "dashboard:  http://127.0.0.1:8265" in text
    found = json.loads(shown(tmp_path, name="made", as_json=True))
    assert found["state"] == "running"
    assert [pack["pack"] for pack in found["packs"]] == ["p2", "p3"]
    overview = shown(tmp_path)
    assert "made" in overview
    assert "2/6" in overview
    assert json.loads(shown(tmp_path, as_json=True))[0]["name"] == "made"


def test_states_that_a_driver_leaves(progress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "studies" / "made"
    write(progress)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (folder / LOCK_FILE).write_text(f"process {gone.stdout.strip()} on {os.uname().nodename}\n")
    assert read_status(folder)["state"] == "stopped"
    assert read_status(folder)["updates_per_second"] == 0
    assert "throughput" not in shown(tmp_path, name="made")
    (folder / LOCK_FILE).write_text("process 1 on another-machine\n")
    assert read_status(folder)["state"] == "running"  # it has written a moment ago
    now = time.time()
    monkeypatch.setattr(status.time, "time", lambda: now + 100)
    assert read_status(folder)["state"] == "last driven by process 1 on another-machine"
    write(progress, finished=True)
    assert read_status(folder)["state"] != "finished"  # four trials have not ended
    (folder / STATUS_FILE).unlink()
    before = read_status(folder)  # of a study from before the file was written
    assert (before["ended"], before["updates_per_second"]) == (2, None)
    assert "2 of 6 ended" in shown(tmp_path, name="made")


def test_the_file_is_written_every_few_seconds_only(progress: Any, monkeypatch: pytest.MonkeyPatch):
    file = write(progress)
    before = (progress.study.folder / STATUS_FILE).read_bytes()
    file(progress)
    assert (progress.study.folder / STATUS_FILE).read_bytes() == before
    monkeypatch.setattr(file, "_next", 0.0)
    file(progress)
    assert (progress.study.folder / STATUS_FILE).read_bytes() != before


def test_status_loads_neither_torch_nor_ray_nor_mlflow(progress: Any, tmp_path: Path):
    write(progress)
    code = (
        "import sys; from orchestrator.cli import main; main(['status', '--workdir', sys.argv[1]]);"
        "main(['status', 'made', '--prometheus', '--workdir', sys.argv[1]]);"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_wrong_words(tmp_path: Path, progress: Any, capsys: pytest.CaptureFixture[str]):
    assert main(["status", "maed", "--workdir", str(tmp_path)]) == 2
    assert "it holds: made" in capsys.readouterr().err
    assert main(["status", "--watch", "0", "--workdir", str(tmp_path)]) == 2
    assert main(["status", "--watch", "1", "--json", "--workdir", str(tmp_path)]) == 2
    assert main(["status", "--workdir", str(tmp_path / "empty")]) == 0
    assert "there is no study" in capsys.readouterr().out


def test_prometheus_text(progress: Any, tmp_path: Path):
    write(progress)
    lines = shown(tmp_path, prometheus=True).splitlines()
    assert 'offsweep_updates_per_second{study="made",node="host-a"} 250' in lines
    assert 'offsweep_pack_restarts_total{study="made"} 1' in lines
    assert "# TYPE offsweep_pack_restarts_total counter" in lines
    assert 'offsweep_tracking_failing{study="made",place="b:/disk"} 1' in lines
    assert text_of([]) == ""
    found = list(samples(read_status(tmp_path / "studies" / "made")))
    assert {sample.name for sample in found} == set(METRICS)
    for sample in found:
        assert tuple(sample.labels) == METRICS[sample.name][1]


def test_metrics_in_ray(progress: Any, monkeypatch: pytest.MonkeyPatch):
    values: dict[tuple[str, str], float] = {}

    class Fake:
        def __init__(self, name: str, about: str, labels: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, labels: dict[str, str]) -> None:
            values[self.name, labels.get("node", "")] = value

        def inc(self, value: float, labels: dict[str, str]) -> None:
            values[self.name, ""] = values.get((self.name, ""), 0.0) + value

    monkeypatch.setattr("ray.util.metrics.Gauge", Fake)
    monkeypatch.setattr("ray.util.metrics.Counter", Fake)
    file = write(progress)
    exported = RayMetrics(file)
    exported(progress)
    exported(progress)  # nothing new
    assert values["offsweep_pack_restarts", ""] == 1
    assert values["offsweep_updates_per_second", "host-a"] == 250
    progress.activity.reported(PackReport("p2", 1000, True, {}))
    progress.activity.restarted("p3", "again")
    file.write(progress)
    exported(progress)
    assert values["offsweep_pack_restarts", ""] == 2
    assert values["offsweep_updates_per_second", "host-a"] == 0


def test_nothing_is_exported_without_ray_or_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prometheus.importlib.util, "find_spec", lambda name: None)
    assert not prometheus.is_exported()


def test_the_documented_metrics_are_those_there_are():
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    for name in METRICS:
        assert f"`{name}`" in text
