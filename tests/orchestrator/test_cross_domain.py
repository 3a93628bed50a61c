"""Cross-domain methods in the orchestrator: the same results with any number of workers, after any kill, and with runs
that leave; what is refused; what is recorded."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from agents.cross_domain import CrossDomain
from agents.method import load_method
from envs.errors import UserError
from envs.registry import load_dataset
from orchestrator.artifacts import load_tensors
from orchestrator.calibration import measure, ring_bytes
from orchestrator.cli import main
from orchestrator.config import ComputeConfig, Config, load_config, run_config, to_dict
from orchestrator.launch import check_rows, plan, resume, start
from orchestrator.learner import Learner, PackSpec, RunSpec, training_data
from orchestrator.workers import Workers
from tests.orchestrator.studies import IN_PROCESS, points, quiet, records, same

TARGET = "offsweep/Pendulum-gravity-0.5-v1"
WORDS = (
    "method=online_sac", "method.variant=finetune", "dataset=online/Pendulum-v1", f"method.target={TARGET}",
    "method.hidden=[8]", "method.batch_size=8", "method.num_updates=400", "method.updates_per_epoch=100",
    "method.source_updates=200", "evaluation.every_epochs=2", "evaluation.episodes=1", "method.collect_every=10",
)  # fmt: skip

ONLINE = ("dataset=online/Pendulum-v1",)
VGDF = (
    f"method.target={TARGET}", "method.hidden=[8]", "method.batch_size=8", "method.num_updates=300",
    "method.updates_per_epoch=100", "method.updates_per_target_step=2", "method.start_gate=120",
    "method.dynamics.ensemble_size=2", "method.dynamics.hidden=[8]", "method.dynamics.weight_decay=[0,0]",
    "method.dynamics.refit_every=50", "method.dynamics.batch_size=16", "method.dynamics.schedule=released",
    "method.collect_every=10", "evaluation.every_epochs=3", "evaluation.episodes=1",
)  # fmt: skip


def configured(workdir: Path, *words: str) -> Config:
    return load_config([], [*WORDS, *words, f"workdir={workdir}"])


def make_pack(
    workdir: Path, *words: str, name: str = "p", seeds: Sequence[int] = (0, 1), base: Sequence[str] = WORDS
) -> PackSpec:
    config = load_config([], [*base, *words, f"workdir={workdir}"])
    runs = [RunSpec(f"t{i:04d}-s{s}", i, s, to_dict(run_config(config, {}, s)), {}) for i, s in enumerate(seeds)]
    return PackSpec("pack", str(workdir / "studies" / name), tuple(runs))


def make_learner(pack: PackSpec, workers: Workers | None = None) -> Learner:
    config = load_config([pack.runs[0].config], [])
    return Learner(pack, IN_PROCESS, workers or Workers(), load_dataset(config.dataset, Path(config.workdir)))


def trained(learner: Learner) -> dict[str, Any]:
    """What the pack ends with."""
    while not learner.advance().finished:
        pass
    return load_tensors(learner.checkpoints.newest)


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[Workers]:
    import ray

    workers = Workers(2, 0)
    yield workers
    for actor in workers._rollout_workers:
        ray.kill(actor)


def first_of(pool: Workers) -> Workers:
    workers = Workers()
    workers._rollout_workers = pool._rollout_workers[:1]
    return workers


@pytest.mark.parametrize(
    ("base", "ahead"),
    [
        pytest.param(WORDS, "false", id="online_sac", marks=pytest.mark.slow),
        pytest.param(("method=vgdf", *ONLINE, *VGDF), "true", id="vgdf asynchronous"),
        pytest.param(WORDS, "true", id="online_sac asynchronous", marks=pytest.mark.slow),
        pytest.param(("method=vgdf", *ONLINE, *VGDF), "false", id="vgdf", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_gives_the_same_pack_even_one_that_dies(
    tmp_path: Path, pool: Workers, base: Sequence[str], ahead: str
):
    word = f"method.asynchronous={ahead}"
    here = trained(make_learner(make_pack(tmp_path, word, name="here", base=base)))
    two = make_learner(make_pack(tmp_path, word, name="two", base=base), pool)
    two.advance()
    for pid in pool.pids()["rollout_workers"]:
        os.kill(pid, signal.SIGKILL)
    one = make_learner(make_pack(tmp_path, word, name="one", base=base), first_of(pool))
    for learner in (two, one):
        there = trained(learner)
        assert same(here["method"], there["method"])
        run = "t0000-s0"
        assert points(learner.pack.study_folder, run) == points(tmp_path / "studies" / "here", run)


@pytest.mark.parametrize("ahead", [pytest.param("false", marks=pytest.mark.slow), "true"])
@pytest.mark.parametrize("base", [WORDS, ("method=vgdf", *ONLINE, *VGDF)], ids=["online_sac", "vgdf"])
def test_a_learner_made_anew_goes_on_from_the_checkpoint_with_the_runs_that_are_left(
    tmp_path: Path, base: Sequence[str], ahead: str
):
    word, seeds = f"method.asynchronous={ahead}", (0, 1, 2)
    undisturbed = make_learner(make_pack(tmp_path, word, name="undisturbed", seeds=seeds, base=base))
    undisturbed.advance()
    undisturbed.advance(["t0001-s1"])
    killed = make_learner(make_pack(tmp_path, word, name="killed", seeds=seeds, base=base))
    killed.advance()
    killed._drop(["t0001-s1"], "KILLED", "pruned")
    killed._train_epoch()  # and no checkpoint of it
    resumed = make_learner(PackSpec.from_json(killed.pack.to_json()))
    resumed.advance(["t0001-s1"])
    assert same(load_tensors(resumed.checkpoints.newest), load_tensors(undisturbed.checkpoints.newest))


def test_domains_are_recorded_and_policies_evaluated_in_the_target(tmp_path: Path):
    config = configured(tmp_path, "study.name=s", "compute.num_learners=0", "compute.device=cpu", "num_seeds=2")
    console = Console(file=io.StringIO(), width=200)
    outcome = start(config, console)
    assert outcome.study.best is not None
    folder = tmp_path / "studies" / "s"
    first, *_ = records(folder, "t0000-s0")
    assert (first["tags"]["environment"], first["params"]["method.target"]) == (TARGET, TARGET)
    assert (first["tags"]["source"], first["tags"]["target"]) == ("online/Pendulum-v1", TARGET)
    values = points(folder, "t0000-s0")
    assert values["domain/source_steps", 200] == values["domain/source_steps", 400] == 200
    assert values["domain/target_steps", 400] == 200
    # the episode of 200 steps that ended in either domain
    assert values["domain/source_return", 200] < 0
    assert values["domain/target_return", 400] < 0
    assert {k for k, _ in values if k.startswith("eval/")} == {"eval/return_mean", "eval/return_std"}
    assert f"mean returns in {TARGET}; the source is online/Pendulum-v1" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=sac_n"], "dataset=online/Pendulum-v1 has no rows, which method=sac_n learns from"),
        (["no target"], "method.target is missing"),
        (["method.target=Pendulum-gravity-0.5-v1"], "there is no Gymnasium environment 'Pendulum-gravity-0.5-v1'"),
        (["method.target=offsweep/EdgeOfReach-v0"], "choose a target of the same robot and version"),
        (["method.collect_every=30"], "must divide method.updates_per_epoch=100"),
        (["dataset=online/"], "names no environment; give its Gymnasium id"),
        (["method.num_updates=200", "method.batch_size=150"], "nothing would be learned; raise method.num_updates"),
        (["method.variant=oracle", "dataset=embedded/pendulum-random-v0"], "would ignore the rows of dataset=embedded"),
        (["dataset=online/Pendulum-v7"], "there is no Gymnasium environment 'Pendulum-v7'"),
        (["dataset=online/Pendulum-v1,subsample=0.5"], "asks for rows of an environment that is sampled"),
        (["method.variant=zero-shot", "method.keep_source_rows=true"], "has no effect with method.learn_from=source"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_computed(tmp_path: Path, words: list[str], sentence: str):
    base = [word for word in WORDS if not (words == ["method=sac_n"] and word.startswith("method"))]
    if any("zero-shot" in word or "oracle" in word for word in words):
        base = [word for word in base if not word.startswith("method.source_updates")]
    if words == ["no target"]:
        base, words = [word for word in base if not word.startswith("method.target")], []
    if any("batch_size" in word for word in words):
        base = [word for word in base if "=source_updates" not in word and "batch_size" not in word]
        words = [*words, "method.source_updates=100"]
    with pytest.raises(UserError, match=sentence):
        start(load_config([], [*base, *words, f"workdir={tmp_path}"]), Console(file=io.StringIO()))
    assert not (tmp_path / "studies").exists()


def test_collecting_ahead_of_nothing_is_refused(tmp_path: Path):
    config = configured(tmp_path, "method.asynchronous=true")
    rows = load_dataset("online/Pendulum-v1", tmp_path)
    check_rows(config, rows)
    words = ["method=online_sac", f"method.target={TARGET}", "dataset=embedded/pendulum-random-v0"]
    offline = load_config([], [*words, "method.asynchronous=true"])
    rows = load_dataset(offline.dataset, tmp_path)
    with pytest.raises(UserError, match="no effect where no environment is sampled"):
        check_rows(offline, rows)


def test_a_plan_measures_iterations_with_filled_rings_of_both_domains(tmp_path: Path):
    words = ("method.num_updates=20000", "method.source_updates=10000", "method.updates_per_epoch=1000")
    config = configured(tmp_path, *words)
    dataset = load_dataset(config.dataset, tmp_path)
    row = 4 * 9 + 2  # and its tag
    assert ring_bytes(config, dataset) == row * 20000
    assert ring_bytes(config, load_dataset("embedded/pendulum-random-v0", tmp_path)) == row * 10000
    method = load_method("online_sac")([config.method], [0], training_data(dataset, torch.device("cpu")), {}, "cpu")
    assert isinstance(method, CrossDomain)
    assert method.stand_in(12000, 100 * row) == row * 19800
    assert (method.source.sizes, method.target.sizes) == ([100], [100])
    measured = measure(config, dataset, ComputeConfig(device="cpu"), Workers(), [1, 2], 1.0, 1e11, 0)
    assert [pack.size for pack in measured.packs] == [1, 2]
    assert 1e-5 < measured.packs[0].update_seconds < 0.1
    console = Console(file=io.StringIO(), width=200)
    plan(configured(tmp_path, *words, "compute.num_learners=0", "compute.device=cpu"), console)
    assert "measured for" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [["verify"], ["export"], ["download"]])
def test_commands_about_rows_say_that_there_are_none(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
):
    files = [str(tmp_path / "out.hdf5")] if command == ["export"] else []
    assert main(["data", *command, "online/Pendulum-v1", *files, "--workdir", str(tmp_path)]) == 2
    assert "online/Pendulum-v1 has no rows" in capsys.readouterr().err
    assert main(["data", "info", "online/Pendulum-v1", "--workdir", str(tmp_path)]) == 0
    assert "sampled while learning" in capsys.readouterr().out


def test_a_plan_measures_iterations_that_learn_and_counts_those_that_only_collect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # 64 rows of the target are there from iteration 630 on: not yet in the middle of these
    words = [
        "method.num_updates=1000",
        "method.updates_per_epoch=500",
        f"method.target={TARGET}",
        "method.batch_size=64",
    ]
    config = load_config([], ["method=iw_clip", "dataset=online/Pendulum-v1", *words, f"workdir={tmp_path}"])
    assert [config.method.learns_at(t, 0) for t in (500, 629, 630)] == [False, False, True]
    updates = []  # of every call, and its iterations
    iterate = CrossDomain.iterate

    def counted(self: CrossDomain, first: int, count: int) -> list[dict[str, float]]:
        before = self.updates_done
        metrics = iterate(self, first, count)
        updates.append((self.updates_done - before, count))
        return metrics

    monkeypatch.setattr(CrossDomain, "iterate", counted)
    dataset = load_dataset(config.dataset, tmp_path)
    measured = measure(config, dataset, ComputeConfig(device="cpu"), Workers(), [1], 0.5, 1e11, 0)
    assert updates[:2] == [(0, 1), (0, 100)]
    assert len(updates) > 3
    assert all(done == count for done, count in updates[2:])
    assert measured.packs[0].update_seconds > 0


def train_until_killed(words: list[str]) -> None:
    """In a process of its own, which SIGKILL ends in the middle of the third epoch."""
    epochs = CrossDomain.train_epoch

    def until_the_third(self: CrossDomain, epoch: int) -> list[dict[str, float]]:
        if epoch == 2:
            self.iterate(200, 70)
            os.kill(os.getpid(), signal.SIGKILL)
        return epochs(self, epoch)

    CrossDomain.train_epoch = until_the_third  # type: ignore[method-assign]
    start(load_config([], words), quiet())


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [0.0, 60.0])  # a checkpoint every epoch, and none before the end
@pytest.mark.parametrize(
    "base",
    [["method=vgdf", *ONLINE, "method.asynchronous=true"], ["method=vgdf_bc", "dataset=embedded/pendulum-random-v0"]],
)
def test_a_killed_vgdf_ends_with_the_policies_of_an_undisturbed_one(tmp_path: Path, base: list[str], minutes: float):
    """Past its gate and after refits of its ensemble."""
    common = ["study.name=s", "num_seeds=2", "compute.num_learners=0", "compute.device=cpu", "compute.runs_per_pack=2"]
    words = [*base, *VGDF, *common, f"compute.checkpoint_minutes={minutes}"]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    start(load_config([], [*words, f"workdir={undisturbed}"]), quiet())
    values = points(undisturbed / "studies" / "s", "t0000-s1")
    assert values["train/gate/accepted", 300] == 0.25
    assert values["dynamics/epochs", 200] > 0
    process = get_context("spawn").Process(target=train_until_killed, args=([*words, f"workdir={killed}"],))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(killed.glob("studies/s/runs/*/policy.npz"))
    resume("s", killed, [], quiet())
    for run in ("t0000-s0", "t0000-s1"):
        folders = [workdir / "studies" / "s" for workdir in (killed, undisturbed)]
        here, there = (dict(np.load(folder / "runs" / run / "policy.npz")) for folder in folders)
        assert set(here) == set(there)
        assert all(np.array_equal(here[name], there[name]) for name in there)
        assert points(folders[0], run) == points(folders[1], run)
