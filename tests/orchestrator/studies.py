"""Small studies, packs and scripted learners that the tests of this folder share."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from agents.method import load_method
from benchmarks.kill_tests import SETTINGS
from envs.dataset import Dataset
from envs.errors import UserError
from envs.registry import load_dataset
from orchestrator.artifacts import ArtifactStore, Built, stage_key
from orchestrator.calibration import (
    Calibration,
    PackMeasurement,
    StageMeasurement,
    ring_bytes,
    update_work,
    work_key,
)
from orchestrator.config import ComputeConfig, Config, load_config, run_config, to_dict
from orchestrator.driver import Driver
from orchestrator.learner import Evaluation, Learner, PackReport, PackSpec, RunSpec
from orchestrator.packing import Packing
from orchestrator.spool import RunSpool, read_records
from orchestrator.workers import Workers
from sweeps.study import Study

IN_PROCESS = ComputeConfig(device="cpu", checkpoint_minutes=0.0)


def copied(base: Path, factory: pytest.TempPathFactory) -> Path:
    """A copy of the prepared work folder, for fixtures of a module."""
    return Path(shutil.copytree(base, factory.mktemp("copy") / "work"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def configured(workdir: Path, *overrides: str, **study: Any) -> Config:
    """The settings of the kill tests, with overrides of the command line and keys of `study`."""
    return load_config([SETTINGS, {"workdir": str(workdir), "study": study}], list(overrides))


def make_pack(
    workdir: Path, members: Sequence[tuple[Mapping[str, Any], int]], *overrides: str, name: str = "p"
) -> PackSpec:
    """A pack whose run i is of trial i, from (parameters, seed) each; every pack has a study folder of its own."""
    config = configured(workdir, *overrides)
    runs = []
    for trial, (params, seed) in enumerate(members):
        run = run_config(config, params, seed)
        runs.append(RunSpec(f"t{trial:04d}-s{seed}", trial, seed, to_dict(run), {"study": name}))
    return PackSpec("pack", str(workdir / "studies" / name), tuple(runs))


def dataset_of(config: Config) -> Dataset:
    return load_dataset(config.dataset, Path(config.workdir))


def make_learner(pack: PackSpec, compute: ComputeConfig = IN_PROCESS, workers: Workers | None = None) -> Learner:
    """A learner of a pack, on the dataset that its runs name."""
    return Learner(pack, compute, workers or Workers(), dataset_of(load_config([pack.runs[0].config], [])))


def train(pack: PackSpec, compute: ComputeConfig = IN_PROCESS, workers: Workers | None = None) -> PackReport:
    """Train a pack to its end."""
    learner = make_learner(pack, compute, workers)
    while not (report := learner.advance()).finished:
        pass
    return report


def records(study_folder: str | Path, run_key: str) -> list[dict[str, Any]]:
    return [r for r, _ in read_records(Path(study_folder) / "spool" / f"{run_key}.jsonl") if r]


def points(study_folder: str | Path, run_key: str) -> dict[tuple[str, int], Any]:
    """(metric, step) -> value as logged first, without times; a step logged again must repeat its value."""
    values: dict[tuple[str, int], Any] = {}
    for record in records(study_folder, run_key):
        for key, value in record.get("values", {}).items():
            if not key.startswith("time/"):
                assert values.setdefault((key, record["step"]), value) == value, (run_key, key, record["step"])
    return values


def same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


Script = Callable[[int, int, int], float | str | Exception]
"""(trial, seed, updates) -> the value of that evaluation, "diverged", or what the call raises."""


KIND = {"cpu": "made up", "device": "cpu"}


def made_up_calibration(config: Config, fixed: float = 0.0, per_member: float = 1e-3, largest: int = 1) -> Calibration:
    """Updates of fixed + per_member * M seconds; a megabyte per member; nothing else takes time."""
    dataset = dataset_of(config)
    packs = tuple(
        PackMeasurement(m, 0.0, 0.0, fixed + per_member * m, m * 1_000_000) for m in (1, 2, 4, 8) if m <= largest
    )
    return Calibration(
        work_key(config, dataset), config.method_name, update_work(config, dataset), ring_bytes(config, dataset), packs,
        0.0, 0.0, {"dynamics": StageMeasurement(2.0)}, 1.0, largest,
    )  # fmt: skip


class ScriptedSlots:
    """Slots whose learners train nothing: they follow a script, through the same reports and spool files.

    Args:
        config: of the study.
        script: what every evaluation gives.
        size: number of slots; calls are answered last in, first out, so that packs overtake each other.
        on_gpu: what the slots say of themselves.
    """

    def __init__(self, config: Config, script: Script, size: int = 1, on_gpu: bool = False) -> None:
        self.config, self.script, self.size, self.on_gpu = config, script, size, on_gpu
        self.calls: list[tuple[str, Any]] = []
        self.dropped: list[set[str]] = []
        self.built: list[int] = []  # stages of each call that built some
        self._under_way: list[tuple[int, str, tuple[Any, ...]]] = []
        self._epochs: dict[str, int] = {}
        self._reports: dict[str, PackReport] = {}

    def submit(self, slot: int, method: str, *args: Any) -> None:
        self._under_way.append((slot, method, args))
        if method == "build_stages":
            self.built.append(len(args[0]))
        if method in ("advance", "build_stages"):
            self.calls.append((method, args[0].pack_id if method == "advance" else args[1]))

    def wait(self, timeout: float) -> list[tuple[int, Any]]:
        slot, method, args = self._under_way.pop()
        try:
            return [(slot, getattr(self, method)(*args))]
        except Exception as error:
            return [(slot, error)]

    def build_stages(self, configs: Sequence[dict[str, Any]], name: str) -> list[UserError | None]:
        resolved = [load_config([config], []) for config in configs]
        dataset = dataset_of(resolved[0])
        stages = [load_method(config.method_name).stages(config.method)[name] for config in resolved]
        store = ArtifactStore(Path(resolved[0].workdir) / "artifacts")
        keys = [stage_key(stage, dataset.content_hash) for stage in stages]
        history = [[step, {"train_loss": float(step)}] for step in range(3)]
        built = Built({"w": torch.zeros(1)}, {"history": history})
        failures = store.build_missing(dict(zip(keys, stages, strict=True)), lambda missing: [built for _ in missing])
        return [failures.get(key) for key in keys]

    def ready(self) -> None:
        """Somebody is there."""

    def machine(self, busy: int) -> tuple[dict[str, Any], float]:
        return {**KIND, "busy": busy}, 1e9

    def calibrate(
        self, config: dict[str, Any], sizes: Sequence[int], seconds: float, memory_limit: float
    ) -> dict[str, Any]:
        return made_up_calibration(load_config([config], []), 0.0, 1e-3, max(sizes)).to_json()

    def advance(self, pack: PackSpec, dropped: Sequence[str]) -> PackReport:
        self.dropped.append(set(dropped))
        keys = [run.run_key for run in pack.runs]
        report = self._reports.get(pack.pack_id) or PackReport(pack.pack_id, 0, False, {key: [] for key in keys})
        alive = [run for run in pack.runs if run.run_key not in dropped and run.run_key not in report.diverged]
        method = self.config.method
        updates = report.updates + self.config.evaluation.every_epochs * method.updates_per_epoch if alive else 0
        for run in alive:
            value = self.script(run.trial, run.seed, updates)
            if isinstance(value, Exception):
                raise value
            if isinstance(value, str):
                report.diverged[run.run_key] = updates
            else:
                report.evaluations[run.run_key].append(Evaluation(updates, value, [value]))
        report = PackReport(
            pack.pack_id, updates, not alive or updates == method.num_updates, report.evaluations, report.diverged
        )
        self._reports[pack.pack_id] = report
        return report


class Killed(BaseException):
    """Stands for a SIGKILL."""


def dying(original: Callable[..., Any], call: int, last: Callable[[Any], object] | None = None) -> Callable[..., Any]:
    """A function after whose n-th call the driver is killed.

    Args:
        last: what is done with that call's result before.
    """
    calls = 0

    def function(*args: Any) -> Any:
        nonlocal calls
        result = original(*args)
        calls += 1
        if calls == call:
            if last is not None:
                last(result)
            raise Killed
        return result

    return function


def drive(config: Config, slots: Any, resume: bool = False, packing: Packing | None = None) -> Study:
    """Run a study's driver without a tracker; returns the study, closed (its records can be read)."""
    folder = Path(config.workdir) / "studies" / config.study.name
    study = Study.open(folder) if resume else Study.create(folder, config.study_spec())
    dataset = dataset_of(config)
    with study, RunSpool(folder / "spool", "study") as spool:
        Driver(config, study, dataset, slots, {}, spool, packing=packing).run()
    return study
