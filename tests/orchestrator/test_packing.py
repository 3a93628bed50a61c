"""Which runs share a pack: made-up costs, and what is kept of a choice."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from orchestrator.learner import PackCost, PackSpec, RunSpec
from orchestrator.packing import (
    COSTS_FILE,
    Curve,
    PackCosts,
    Packing,
    PackModel,
    balanced,
    choose_runs_per_pack,
    pack_costs,
    pack_runs,
    schedule,
    study_packs,
)
from tests.orchestrator.studies import configured

GB = 1e9


def model(fixed: float, per_member: float, memory: float = 1.0) -> PackModel:
    """Seconds fixed + per_member * M, memory (gigabytes) per member."""
    sizes = (1, 2, 4, 8)
    return PackModel(
        Curve(tuple((m, fixed + per_member * m) for m in sizes)), Curve(tuple((m, memory * GB * m) for m in sizes)), 8
    )


CPU = model(0.0, 10.0)  # packs do not pay
GPU = model(10.0, 0.5)  # nor do they cost


def test_a_curve_passes_through_what_was_measured_and_goes_on_with_the_fit():
    curve = Curve(((1, 3.0), (2, 4.0), (4, 6.0)))
    assert [curve(m) for m in (1, 2, 3, 4, 10)] == pytest.approx([3.0, 4.0, 5.0, 6.0, 12.0])
    assert curve.fit() == pytest.approx((2.0, 1.0))
    assert Curve(((2, 6.0),))(8) == pytest.approx(24.0)  # of one size nothing is known to be shared
    assert Curve(((1, 1.0), (2, 4.0))).fit()[0] == 0.0  # no negative costs


def test_the_slots_are_filled_one_after_the_other():
    assert schedule([4, 3, 3, 1], 2) == 6  # 4, 1 in one; 3, 3 in the other
    assert schedule([5.0], 8) == 5.0
    assert schedule([], 3) == 0.0


def test_packs_are_balanced():
    assert balanced(10, 4) == [4, 3, 3]
    assert balanced(3, 8) == [3]


def sizes(packs: list[tuple[int, ...]]) -> list[int]:
    return sorted((len(pack) for pack in packs), reverse=True)


def test_one_run_per_core_where_packs_do_not_pay():
    assert sizes(pack_runs(["a"] * 5, {"a": CPU}, 2, 100 * GB)) == [1] * 5


def test_few_large_packs_where_they_pay_one_for_every_gpu():
    assert sizes(pack_runs(["a"] * 16, {"a": GPU}, 2, 100 * GB)) == [8, 8]
    assert sizes(pack_runs(["a"] * 16, {"a": GPU}, 1, 100 * GB)) == [16]


def test_memory_is_never_exceeded():
    packs = pack_runs(["a"] * 16, {"a": GPU}, 1, 3.5 * GB)
    assert max(sizes(packs)) == 3
    with pytest.raises(ValueError, match="needs more than"):
        pack_runs(["a"], {"a": GPU}, 1, 0.5 * GB)


def test_every_run_is_in_one_pack_of_its_own_key():
    keys = ["a", "b", "a", "c", "b", "a", "c", "a"]
    models = {"a": GPU, "b": CPU, "c": model(1.0, 1.0, memory=3.0)}
    packs = pack_runs(keys, models, 3, 8 * GB)
    assert sorted(itertools.chain(*packs)) == list(range(len(keys)))
    for pack in packs:
        assert len({keys[i] for i in pack}) == 1
        assert models[keys[pack[0]]].memory(len(pack)) <= 8 * GB
    assert packs == pack_runs(keys, models, 3, 8 * GB)


def test_no_way_to_divide_a_few_runs_ends_sooner():
    """Against all partitions into even packs, for several slots and costs."""
    for fixed, per_member in ((0.0, 1.0), (1.0, 1.0), (5.0, 1.0), (20.0, 0.1)):
        for slots, count in itertools.product((1, 2, 3), (1, 2, 5, 7)):
            m = model(fixed, per_member)
            best = min(
                schedule([m.seconds(size) for size in balanced(count, limit)], slots) for limit in range(1, count + 1)
            )
            packs = pack_runs(["a"] * count, {"a": m}, slots, 100 * GB)
            assert schedule([m.seconds(len(p)) for p in packs], slots) <= best * 1.04


def test_a_study_asks_for_whole_trials_and_packs_what_has_the_same_key():
    trials = [["a", "a"], ["b", "b"], ["a", "a"], ["a", "a"]]
    assert study_packs(trials, 1, {}) == [(k, 1) for trial in trials for k in trial]
    assert study_packs(trials, 4, {}) == [("a", 2), ("b", 2), ("a", 4)]
    assert study_packs(trials, 4, {"a": 2}) == [("a", 2), ("b", 2), ("a", 2), ("a", 2)]


def test_a_studys_pack_size():
    trials = [["a"] * 2] * 20
    assert choose_runs_per_pack(trials, {"a": CPU}, 2, 100 * GB) == 1
    assert choose_runs_per_pack(trials, {"a": GPU}, 2, 100 * GB) == 20  # all at once
    # a sampler that learns needs rounds: two trials of two seeds for each of two slots, five times
    assert choose_runs_per_pack(trials, {"a": GPU}, 2, 100 * GB, min_rounds=5) == 4
    assert choose_runs_per_pack(trials, {"a": GPU}, 2, 7 * GB) == 6
    # a single trial is divided among the slots
    assert choose_runs_per_pack([["a"] * 8], {"a": GPU}, 1, 100 * GB) == 8
    assert choose_runs_per_pack([["a"] * 8], {"a": model(1.0, 10.0)}, 2, 100 * GB) == 2  # 42 s, not 44 s


def test_a_choice_is_kept_with_what_memory_taught(workdir: Path):
    config = configured(workdir)
    path = workdir / "packing.json"
    packing = Packing(path, 8, "because", 12.0, model_of=lambda c: GPU, memory_limit=5.5 * GB)
    assert packing.limit("k", config) == 5  # as predicted
    packing.lower("k", 3)
    packing.lower("k", 4)  # never up again
    again = Packing.load(path, lambda c: None, 1.0)
    assert (again.runs_per_pack, again.predicted_seconds, again.limit("k", config)) == (8, 12.0, 3)
    assert again.limit("other", config) == 8
    assert again.exceeds("k", 4)
    assert not again.exceeds("k", 3)


def test_predicted_and_actual_of_a_pack_are_kept_once(tmp_path: Path):
    pack = PackSpec("p", str(tmp_path), (RunSpec("t0000-s0", 0, 0, {}, {}),), "k")
    for seconds in (5.0, 6.0):
        PackCosts(tmp_path / COSTS_FILE).add(pack, PackCost(seconds, 4.0, 1000), (7.0, 900.0))
        with (tmp_path / COSTS_FILE).open("a") as file:
            file.write('{"pack": "torn')  # by a kill
    [kept] = pack_costs(tmp_path / COSTS_FILE)
    assert (kept["predicted_seconds"], kept["actual_seconds"], kept["actual_cpu_seconds"]) == (7.0, 6.0, 4.0)
    assert (kept["predicted_bytes"], kept["actual_bytes"]) == (900.0, 1000)
