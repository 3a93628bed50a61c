"""The profile of an epoch: it says where the time went, once for a pack, and changes nothing."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from orchestrator import launch
from orchestrator.config import ComputeConfig
from orchestrator.profiling import EPOCH, PHASES, Share, Span, self_times, table_lines
from tests.orchestrator.studies import IN_PROCESS, make_learner, make_pack, quiet, records, train
from tests.orchestrator.test_learner import TWO, assert_same_end

CPU, OTHER, GPU = ("cpu", 1), ("cpu", 2), ("device", 0)
PROFILED: ComputeConfig = dataclasses.replace(IN_PROCESS, profile=True)


def test_time_of_its_own_is_what_is_left_by_the_spans_inside():
    spans = [
        Span("inner", 20, 30, CPU, flops=7),
        Span("outer", 0, 100, CPU),
        Span("inner", 60, 20, CPU, flops=7),
        Span("inmost", 25, 5, CPU),
        Span("outer", 100, 10, CPU),  # begins when the first one ends
        Span("inner", 0, 1000, OTHER),  # at the same time on another thread
    ]
    shares = self_times(spans)
    assert shares["outer"] == Share(2, pytest.approx(60e-9), 0)
    assert shares["inner"] == Share(3, pytest.approx(1045e-9), 14)
    assert shares["inmost"] == Share(1, pytest.approx(5e-9), 0)


def test_spans_that_begin_together_are_inside_the_longer_one():
    shares = self_times([Span("b", 0, 10, CPU), Span("a", 0, 30, CPU), Span("c", 0, 5, CPU)])
    assert [round(shares[name].seconds * 1e9) for name in "abc"] == [20, 5, 5]


def test_the_table_of_an_epoch_with_a_gpu():
    second = 10**9
    spans = [
        Span(EPOCH, 0, 10 * second, CPU, annotation=True),
        Span("updates", 2 * second, 5 * second, CPU, annotation=True),
        Span("batch drawing", 2 * second, second, CPU, annotation=True),
        Span("optimiser's own range", 4 * second, second, CPU, annotation=True),
        Span("aten::bmm", 5 * second, second, CPU, flops=3 * 10**9),
        Span("updates", 2 * second, 5 * second, GPU, annotation=True),
        Span("gemm_kernel", 5 * second, 2 * second, GPU),
    ]
    rows = {line[:16].strip(): line[16:].split() for line in table_lines(spans)[1:9]}
    assert rows["updates"] == ["4.000", "40.0%"]
    assert rows["batch drawing"] == ["1.000", "10.0%"]
    assert rows["rollouts"] == ["0.000", "0.0%"]
    assert rows["anything else"] == ["5.000", "50.0%"]
    assert rows["the epoch"] == ["10.000", "100.0%"]
    text = "\n".join(table_lines(spans))
    assert ["aten::bmm", "1.000", "10.0%", "1", "3.000"] in [line.split() for line in text.splitlines()]
    assert ["gemm_kernel", "2.000", "20.0%", "1", "-"] in [line.split() for line in text.splitlines()]
    assert text.count("\nupdates") == 1


def test_a_profiled_pack_ends_as_without_and_says_where_the_time_went(workdir: Path):
    plain, profiled = (make_pack(workdir, TWO, name=name) for name in ("plain", "profiled"))
    train(plain)
    train(profiled, PROFILED)
    assert_same_end(plain, profiled)
    assert not (plain.folder / "profile").exists()
    folder = profiled.folder / "profile"
    assert {path.name for path in folder.iterdir()} == {"trace.json.gz", "table.txt"}

    lines = (folder / "table.txt").read_text().splitlines()
    # the first epoch that is evaluated is the second one: two epochs make an evaluation
    assert lines[0].startswith("Epoch 2 of 4 of pack pack: 2 runs, 50 updates")
    seconds = {line[:16].strip(): float(line[16:].split()[0]) for line in lines if line[:16].strip() in PHASES}
    total = next(float(line.split()[2]) for line in lines if line.startswith("the epoch"))
    assert set(seconds) == set(PHASES)
    assert all(seconds[name] > 0.0 for name in ("rollouts", "updates", "evaluation", "checkpoint"))
    assert 0.5 * total < sum(seconds.values()) <= total + 0.005
    operators = [line.split() for line in lines if line.startswith("aten::")]
    assert len(operators) == 25
    assert all(int(calls) > 0 for *_, calls, _ in operators)
    assert any(name == "aten::bmm" and float(flops) > 0 for name, *_, flops in operators)

    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {*PHASES, EPOCH, "aten::bmm"} <= {event.get("name") for event in events}
    sent = [
        (Path(r["path"]).name, r["artifact_path"])
        for r in records(profiled.study_folder, "t0000-s0")
        if r["type"] == "artifact"
    ]
    assert {("trace.json.gz", "profile"), ("table.txt", "profile")} <= set(sent)
    assert not any(r.get("artifact_path") == "profile" for r in records(profiled.study_folder, "t0001-s1"))


def test_a_pack_is_profiled_once_and_not_while_it_warms_up(workdir: Path):
    pack = make_pack(workdir, TWO, "evaluation.every_epochs=1")
    learner = make_learner(pack, PROFILED)
    table = pack.folder / "profile" / "table.txt"
    learner.advance()
    assert not table.exists()
    learner.advance()
    assert table.read_text().startswith("Epoch 2 of 4")
    written = table.stat().st_mtime_ns
    again = make_learner(pack, PROFILED)
    while not again.advance().finished:
        pass
    assert table.stat().st_mtime_ns == written


def test_a_study_says_where_its_profiles_are(tmp_path: Path):
    for i in range(4):
        (tmp_path / f"pack{i}" / "profile").mkdir(parents=True)
    console = quiet()
    launch._show_profiles(console, tmp_path)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    for i in range(4):
        (tmp_path / f"pack{i}" / "profile" / "table.txt").touch()
    launch._show_profiles(console, tmp_path)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 4
    assert str(tmp_path / "pack0" / "profile" / "table.txt") in lines[0]
    assert lines[3] == f"profiles of all 4 packs: {tmp_path}/*/profile/"


def test_a_pack_of_one_epoch_is_profiled_in_it(workdir: Path):
    pack = make_pack(workdir, TWO[:1], "method.num_updates=50")
    train(pack, PROFILED)
    assert (pack.folder / "profile" / "table.txt").read_text().startswith("Epoch 1 of 1 of pack pack: 1 runs")
