"""The simulated cluster: virtual time, failures, and studies of the real driver on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import driver_cost, scheduler_simulation
from benchmarks.simulation import HOUR, Nodes, Outcome, Scenario, VirtualClock, configuration, ideal_hours, simulate
from orchestrator.spool import last_record
from sweeps.study import Study

SMALL = Scenario(trials=12, nodes=4, seeds=2, runs_per_pack=2, evaluations=4)
ROUGH = replace(
    SMALL, failures_per_node_hour=0.3, checkpoint_minutes=20.0, driver_kills=2, kills_within_hours=3.0, diverging=0.1
)


def test_virtual_time_passes_only_where_somebody_waits():
    clock = VirtualClock()
    assert clock.monotonic() == 0.0
    clock.sleep(90.0)
    assert clock.monotonic() == 90.0


def test_nodes_fail_at_the_rate_stated_and_come_back():
    nodes = Nodes(200, rate=0.5, away=0.5, seed=1)
    for node in range(200):
        nodes.pass_to(node, 40 * HOUR)
        assert nodes.fails_at[node] > 40 * HOUR
    # a cycle is 2 hours up and half an hour away
    assert nodes.failures / 200 == pytest.approx(40 / 2.5, rel=0.1)
    still = Nodes(2, rate=0.0, away=0.5, seed=1)
    still.pass_to(0, 1e9)
    assert (still.failures, still.up_since[0]) == (0, 0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return simulate(SMALL, tmp_path_factory.mktemp("undisturbed"))


def test_slot_time_adds_up_and_nothing_is_lost_without_failures(undisturbed: Outcome):
    spent = undisturbed.slot_seconds
    assert sum(spent.values()) == pytest.approx(undisturbed.hours * HOUR * 4)
    assert (spent["lost"], spent["away"], spent["down"], undisturbed.node_failures) == (0.0, 0.0, 0.0, 0)
    assert spent["waiting"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < ideal_hours(undisturbed) <= undisturbed.hours
    assert undisturbed.results > len(undisturbed.ended) / 2
    assert undisturbed.cpu_seconds > undisturbed.ask_seconds > 0


def test_every_run_ends_once_whatever_fails_and_the_same_seed_gives_the_same(tmp_path: Path):
    first = simulate(ROUGH, tmp_path / "a", marks=[12, 24])
    again = simulate(ROUGH, tmp_path / "b")
    runs = {f"t{trial:04d}-s{seed}" for trial in range(12) for seed in range(2)}
    assert first.ended.keys() == runs
    assert set(first.ended.values()) == {1}
    assert first.node_failures > 0
    assert len(first.resume_seconds) == 2
    assert first.slot_seconds["lost"] > 0
    assert first.slot_seconds["away"] > 0
    assert sum(first.slot_seconds.values()) == pytest.approx(first.hours * HOUR * 4)
    assert [mark.runs for mark in first.marks] == [12, 24]
    assert first.values.keys() == set(range(12))
    assert {"complete", "pruned"} <= first.states.keys()
    assert (first.hours, first.values, first.slot_seconds, first.results) == (
        again.hours, again.values, again.slot_seconds, again.results,
    )  # fmt: skip
    folder = tmp_path / "a" / "studies" / "simulated"
    assert all((last_record(folder / "spool" / f"{key}.jsonl") or {}).get("type") == "end" for key in runs)
    assert [t.state for t in Study.open(folder, read_only=True).trials()] == [
        {"diverged": "complete"}.get(state, state) for state, _ in first.values.values()
    ]


def test_failures_change_when_trials_end_and_not_what_becomes_of_them(tmp_path: Path, undisturbed: Outcome):
    """Without a pruner, whose answers depend on the order in which trials end."""
    calm = simulate(replace(SMALL, pruner="none"), tmp_path / "calm")
    rough = simulate(replace(ROUGH, pruner="none", diverging=SMALL.diverging), tmp_path / "rough")
    assert rough.values == calm.values
    assert rough.hours > calm.hours
    assert undisturbed.hours < calm.hours  # what is pruned takes less


def test_a_study_goes_on_with_more_trials_and_another_sampler(tmp_path: Path):
    simulate(SMALL, tmp_path)
    more = driver_cost.extended(replace(SMALL, trials=16, sampler="tpe"), tmp_path)
    assert set(more.ended) == {f"t{trial:04d}-s{seed}" for trial in range(12, 16) for seed in range(2)}
    assert len(more.values) == 16
    assert len(more.resume_seconds) == 1


def test_the_benchmark_prints_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["--runs", "12", "--nodes", "3", "--seeds", "2", "--folder", str(tmp_path)]
    assert scheduler_simulation.main(words) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["runs"], line["ended_once"], line["ended_twice"], line["nodes"]) == (12, 12, 0, 3)
    assert str(tmp_path) not in line["command"]
    assert sum(line["slot_time"].values()) == pytest.approx(1.0)
    assert line["hottest"]


def test_the_simulated_study_is_one_that_offsweep_would_take(tmp_path: Path):
    config = configuration(SMALL, tmp_path)
    assert (config.method.num_epochs, config.evaluation.every_epochs) == (1000, 250)
