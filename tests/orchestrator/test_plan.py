"""Plans: measured on the small study of the other tests, or from made-up measurements."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from agents.chunk import OWN_NOISE_BYTES
from agents.dynamics_reward_training import DynamicsRewardConfig, reward_stage
from agents.method import Stage, TrainingData, load_method
from agents.trajectory_diffusion import DiffusionConfig, TrajectoryModel, diffusion_stage
from benchmarks.kill_tests import SETTINGS
from envs.errors import UserError
from orchestrator import calibration, memory, plan
from orchestrator.artifacts import ArtifactStore, save_json
from orchestrator.calibration import Calibrations, median_of, ring_bytes, update_work
from orchestrator.cli import main
from orchestrator.cluster import InlineSlots
from orchestrator.config import Config, load_config, to_dict
from orchestrator.learner import training_data
from orchestrator.packing import PACKING_FILE
from orchestrator.plan import Estimator, choose_packing, expected_epochs, make_plan
from tests.orchestrator.studies import KIND, ScriptedSlots, configured, dataset_of, made_up_calibration


class MadeUpSlots:
    """Slots that measure what they are told."""

    on_gpu = False

    def __init__(self, size: int, fixed: float, per_member: float, memory_limit: float = 1e9) -> None:
        self.size, self.fixed, self.per_member, self.memory_limit = size, fixed, per_member, memory_limit
        self.measured: list[tuple[int, ...]] = []
        self._under_way: list[tuple[int, str, tuple[Any, ...]]] = []

    def submit(self, slot: int, method: str, *args: Any) -> None:
        self._under_way.append((slot, method, args))

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        slot, method, args = self._under_way.pop()
        if method == "machine":
            return [(slot, ({**KIND, "busy": args[0]}, self.memory_limit))]
        config = load_config([args[0]], [])
        self.measured.append(args[1])
        made = made_up_calibration(config, self.fixed, self.per_member, max(args[1]))
        return [(slot, made.to_json())]


def choose(config: Config, slots: MadeUpSlots, folder: Path) -> Any:
    return choose_packing(config, config.study_spec(), dataset_of(config), slots, folder)


LONG = "method.num_updates=1000000"


def test_a_long_study_is_given_the_packs_that_end_it_soonest_and_keeps_them(workdir: Path, tmp_path: Path):
    config = configured(workdir, LONG, "num_seeds=4", num_trials=1, space={})
    for fixed, per_member, size in ((0.0, 1e-3, 1), (1e-3, 1e-5, 2)):
        shutil.rmtree(workdir / "calibrations", ignore_errors=True)
        folder = tmp_path / f"s{size}"
        packing = choose(config, MadeUpSlots(2, fixed, per_member), folder)
        assert packing.runs_per_pack == size
        # updates one after the other, and the ensemble is there already
        packs_a_slot = 4 // size // 2
        assert packing.predicted_seconds == pytest.approx(packs_a_slot * 1e6 * (fixed + per_member * size), rel=0.01)
        again = MadeUpSlots(2, 99.0, 99.0)
        assert choose(config, again, folder).runs_per_pack == size
        assert again.measured == []


def test_a_short_study_is_looked_at_once_and_packs_the_seeds_of_a_trial(workdir: Path, tmp_path: Path):
    config = configured(workdir, "num_seeds=2", num_trials=3)
    slots = MadeUpSlots(1, 1e-3, 1e-3)
    packing = choose(config, slots, tmp_path)
    assert (packing.runs_per_pack, slots.measured) == (2, [(1,)])
    assert json.loads((tmp_path / PACKING_FILE).read_text())["runs_per_pack"] == 2


def test_no_slot_stays_idle_for_a_pack_of_all_seeds(workdir: Path, tmp_path: Path):
    config = configured(workdir, "num_seeds=4", num_trials=1, space={})
    assert choose(config, MadeUpSlots(4, 1e-3, 1e-3), tmp_path).runs_per_pack == 1


def test_memory_bounds_the_packs_and_a_run_that_does_not_fit_is_refused(workdir: Path, tmp_path: Path):
    config = configured(workdir, LONG, "num_seeds=8", num_trials=1, space={})
    slots = MadeUpSlots(1, 1.0, 1e-6, memory_limit=3.5e6)
    packing = choose(config, slots, tmp_path / "a")
    assert packing.runs_per_pack == 3
    with pytest.raises(UserError, match=r"needs about 0.00 GB of memory .* lower method.rollout_batch"):
        choose(config, MadeUpSlots(1, 1.0, 1e-6, memory_limit=0.5e6), tmp_path / "b")


def test_work_that_was_not_measured_is_scaled_from_what_was(workdir: Path):
    one, four, other = (configured(workdir, f"method.num_critics={n}") for n in (2, 4, 3))
    estimator = Estimator(dataset_of(one), Calibrations(workdir, KIND), 1e9)
    assert estimator.model(other) is None
    estimator.add(made_up_calibration(one, per_member=2e-3, largest=4))
    estimator.add(made_up_calibration(four, per_member=4e-3))
    known, estimated = estimator.model(one), estimator.model(other)
    assert known is not None
    assert estimated is not None
    updates = one.method.num_updates
    assert known.seconds(1) == pytest.approx(updates * 2e-3)
    assert estimated.seconds(1) == pytest.approx(updates * 3e-3, rel=0.1)  # between the two by its work
    assert (known.measured, estimated.measured) == (4, 0)
    # of a shape measured alone, packs are as much dearer as those of the nearest shape
    alone = estimator.model(four)
    assert alone is not None
    assert alone.seconds(4) == pytest.approx(4 * alone.seconds(1))


def test_measurements_of_several_slots_become_one_and_survive_the_disk(workdir: Path):
    config = configured(workdir)
    several = [made_up_calibration(config, per_member=s, largest=2) for s in (1e-3, 2e-3, 9e-3)]
    middle = median_of(several)
    assert [pack.update_seconds for pack in middle.packs] == [2e-3, 4e-3]
    kept = Calibrations(workdir, KIND)
    kept.add(middle)
    kept.add(made_up_calibration(config, per_member=5e-3))  # of one, later
    found = Calibrations(workdir, KIND).get(middle.key)
    assert found is not None
    assert [pack.update_seconds for pack in found.packs] == [5e-3, 4e-3]
    assert Calibrations(workdir, {**KIND, "cpu": "another"}).get(middle.key) is None


def test_a_stage_is_taken_to_need_as_many_epochs_as_before(workdir: Path, tmp_path: Path):
    config = configured(workdir, *(f"method.dynamics.{x}" for x in ("max_epochs=1000", "min_epochs=0", "patience=7")))
    stage = load_method("ravl").stages(config.method)["dynamics"]
    store = ArtifactStore(tmp_path)
    assert expected_epochs(stage, store, "hash")[0] == plan.EPOCHS_PER_PATIENCE * 7
    for key, dataset_hash, seed, epochs in (("a", "other", 0, 50), ("b", "hash", 5, 30)):
        content = {"settings": {**stage.settings, "seed": seed}, "dataset_hash": dataset_hash, "history": [0] * epochs}
        save_json(store.folder(stage.kind, key) / "stage.json", content)
    assert expected_epochs(stage, store, "hash") == (30, "as one built with another seed")
    assert expected_epochs(stage, store, "third") == (40, "as one built on another dataset")
    # one that knows no patience never ends early
    always = reward_stage(DynamicsRewardConfig(max_epochs=70))
    assert expected_epochs(always, store, "hash") == (70, "all of max_epochs")
    # nor does one that is counted in updates
    counted = diffusion_stage(DiffusionConfig(num_updates=1_010))
    assert counted.epoch_updates == 20
    assert expected_epochs(counted, store, "hash") == (51, "settled by its updates")


def test_a_stage_that_takes_its_time_after_the_last_epoch_is_timed_by_an_epoch(workdir: Path):
    clock = iter((0.0, 5.0, 7.0, 100.0))  # begin, two epochs, and what comes after them

    def build(data, report):
        for step in range(3):
            report(step, {})
        return {}

    nothing = cast(TrainingData, None)  # which this stage does not look at
    assert calibration._stand_in(Stage("made", {}, build), nothing, lambda: next(clock)) == ({}, 2.0)


def test_a_stage_that_is_counted_in_updates_is_timed_by_an_update(workdir: Path):
    small = {"length": 4, "features": 16, "num_blocks": 1, "num_updates": 5_000, "batch_size": 4}
    words = (*(f"method.diffusion.{key}={value}" for key, value in small.items()), "method.synthetic.source=diffusion")
    plain = {"workdir": str(workdir), "dataset": configured(workdir).dataset}
    config = load_config([plain], ["method=td3_bc", *words])
    dataset = dataset_of(config)
    data = training_data(dataset, torch.device("cpu"))
    artifacts, measured = calibration._artifacts(config, dataset, data, time.perf_counter)
    assert TrajectoryModel.from_state_dict(artifacts["trajectories"]).length == 4
    # 20 of its 5,000 updates are made, and 100 of them are an epoch
    assert 1e-5 < measured["trajectories"].epoch_seconds / 100 < 0.1


def test_the_predictions_of_mobiles_penalty_count_as_work(workdir: Path):
    """And as memory no more than a piece of their noise, where an epoch's would be hundreds of megabytes."""
    mobile = ["method=mobile", "method.dynamics.num_elites=2", "method.hidden=[64,64]", "method.batch_size=256"]
    config = configured(workdir, *mobile)
    dataset = dataset_of(config)

    def work(*words: str) -> float:
        changed = configured(workdir, *words)
        changed.method.num_critics = 2
        return update_work(changed, dataset)

    plain = work("method=mopo", *mobile[1:])
    ten, twenty = (work(*mobile, f"method.penalty_draws={draws}") for draws in (10, 20))
    num_model = 256 - int(0.05 * 256)
    assert ten / plain == pytest.approx(1 + 2 * 10 * num_model / 256 / 3)
    assert twenty - ten == pytest.approx(ten - plain)

    per_update = 4 * config.method.own_noises(dataset.observation_dim, dataset.action_dim)
    bench = calibration._Bench.__new__(calibration._Bench)
    bench.config, bench.dataset, bench._shards = config, dataset, 1.0
    config.method.updates_per_epoch = 10_000
    drawn = bench._epoch_bytes([], 3, 5)
    config.method.real_ratio = 1.0  # no model rows, no penalty
    without = bench._epoch_bytes([], 3, 5)
    assert drawn - without == pytest.approx(OWN_NOISE_BYTES - 5 * 3 * per_update, rel=0.01)


# ---- measured -------------------------------------------------------------------------------------------------------


def study_file(workdir: Path) -> str:
    path = workdir / "study.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", "--json", *words]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_plan_from_the_command_line(workdir: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(workdir / "artifacts")
    words = [study_file(workdir), "--workdir", str(workdir), "method.rollout_batch=60"]
    first = planned(capsys, *words, "compute.price_per_cpu_hour=7200")
    assert sum(row["size"] * row["packs"] for row in first["packs"]) == 6  # three trials of two seeds
    assert {row["size"] for row in first["packs"]} <= {1, 2}
    assert first["wall_seconds"] > sum(row["seconds"] * row["packs"] for row in first["packs"]) > 0
    assert first["money"] == pytest.approx(7200 * first["wall_seconds"] / 3600)
    assert [(stage["name"], stage["epochs"]) for stage in first["stages"]] == [("dynamics", 2)]
    assert all(0 < row["memory"] < first["memory_limit"] for row in first["packs"])
    assert not (workdir / "studies").exists()
    assert not (workdir / "artifacts").exists()
    # what was measured is not measured again
    files = {path: path.stat().st_mtime_ns for path in (workdir / "calibrations").rglob("*.json")}
    second = planned(capsys, *words, "--cpus", "3")
    assert {path: path.stat().st_mtime_ns for path in (workdir / "calibrations").rglob("*.json")} == files
    assert second["slots"] == 3
    assert second["wall_seconds"] < first["wall_seconds"]
    assert second["money"] is None
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    assert "no price given: compute.price_per_gpu_hour=" in text
    assert "drawn at random" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["missing.yaml"], "No such file"),
        (["method=ravl", "dataset=tiny", "method.num_critic=3"], "did you mean method.num_critics?"),
        (["method=ravl", "dataset=tinny"], "there is no dataset 'tinny'"),
        (["method=ravl", "dataset=tiny", "compute.num_learners=0", "--gpus", "2"], "nothing can be measured here"),
        (["method=ravl", "dataset=tiny", "--cpus", "0"], "--cpus 0 must be at least 1"),
        (["method=ravl", "dataset=tiny", "compute.price_per_gpu_hour=-1"], "must be at least 0"),
    ],
)
def test_a_plan_of_something_wrong(workdir: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str):
    before = set(workdir.rglob("*"))
    capsys.readouterr()
    assert main(["plan", *words, "--workdir", str(workdir), "compute.device=cpu"]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.splitlines()) == 1
    assert {p for p in set(workdir.rglob("*")) - before if "cache" not in p.parts} == set()


def test_a_run_that_no_memory_holds_is_said_before_anything_is_built(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "free", lambda device: 2_000_000_000)
    words = [study_file(workdir), "--workdir", str(workdir), "method.rollout_batch=50000000"]
    assert main(["plan", *words]) == 2
    line = capsys.readouterr().err
    # rollout_batch x 1 or 2 steps x 5 epochs of rows of 2 x 3 + 1 + 2 floats
    assert "needs about" in line
    assert "may take 1.60 GB; lower method.rollout_batch" in line
    assert not (workdir / "calibrations").exists()


def test_packs_are_measured_at_growing_sizes_with_a_stand_in_for_the_stage(workdir: Path):
    shutil.rmtree(workdir / "artifacts")
    config = configured(workdir, "num_seeds=2", num_trials=1, space={}, name="x")
    dataset = dataset_of(config)
    slots = InlineSlots(config.compute, dataset)
    made = make_plan(config, config.study_spec(), dataset, slots, seconds=2.0)
    [row] = made.packs
    assert row.measured
    kept = [json.loads(path.read_text()) for path in (workdir / "calibrations").rglob("*.json")]
    packs = {pack["size"]: pack for content in kept for pack in content["measured"]["packs"]}
    assert set(packs) >= {1, 2}
    assert 0 < packs[1]["update_seconds"] < 10 * packs[2]["update_seconds"]  # other work may have disturbed either
    assert all(pack["memory"] > ring_bytes(config, dataset) * size for size, pack in packs.items())
    assert kept[0]["measured"]["stages"]["dynamics"]["epoch_seconds"] > 0
    assert to_dict(config)["method"]["num_updates"] == 200  # the configuration is left as it was


def test_a_plan_counts_the_runs_and_stages_of_the_confirm_stage(workdir: Path):
    plans = []
    for top in (0, 2):
        config = configured(workdir, num_trials=5, name="x", confirm={"top": top, "num_seeds": 3})
        slots = ScriptedSlots(config, lambda trial, seed, updates: 1.0)
        plans.append(make_plan(config, config.study_spec(), dataset_of(config), slots, seconds=1.0))
    without, confirmed = plans
    assert sum(row.runs for row in without.packs) == 10
    assert sum(row.runs for row in confirmed.packs if not row.confirm) == 10
    assert sum(row.runs for row in confirmed.packs if row.confirm) == 6
    assert (len(without.stages), len(confirmed.stages)) == (0, 1)  # the search's ensemble is there, a fresh one is not
    extra = sum(row.seconds * row.packs for row in confirmed.packs if row.confirm) + confirmed.stages[0].seconds
    assert confirmed.wall_seconds == pytest.approx(without.wall_seconds + extra)
    assert any(note.startswith("confirm: ") for note in confirmed.notes)
