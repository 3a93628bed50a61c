"""A prepared work folder: a small dataset, its dynamics ensemble and an empty MLflow store, made once (10 s)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.kill_tests import SETTINGS, prepare
from envs.registry import load_dataset
from orchestrator.config import ComputeConfig, load_config, to_dict
from orchestrator.learner import LearnerProcess


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prepared") / "work"
    prepare(folder)
    config = load_config([SETTINGS, {"workdir": str(folder)}], [])
    dataset = load_dataset(config.dataset, folder)
    LearnerProcess(ComputeConfig(device="cpu")).build_stages([to_dict(config)], "dynamics", dataset)
    return folder


@pytest.fixture
def workdir(base: Path, tmp_path: Path) -> Path:
    """A copy of the prepared work folder."""
    return Path(shutil.copytree(base, tmp_path / "work"))
