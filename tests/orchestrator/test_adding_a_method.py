"""docs/adding_a_method.md by its word: its three files put into place, trained with, and its tests run."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import agents
from agents.method import settings_file
from envs.policies import load_policy
from orchestrator.cli import main
from orchestrator.config import load_config, pack_key

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
FILES = ("agents/cloning.py", "agents/cloning.yaml", "tests/agents/test_cloning.py")
SHORT = ["method.num_updates=40", "method.updates_per_epoch=20", "evaluation.episodes=1", "compute.num_learners=0"]


def block(path: str) -> str:
    """What the page prints as this file: the first block of code after its name."""
    found = re.search(rf"`{re.escape(path)}`.*?\n```\w+\n(.*?)\n```\n", PAGE.read_text(), re.DOTALL)
    assert found, path
    return found[1] + "\n"


@pytest.fixture
def in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The method's two files in a folder that is part of the package `agents` for the length of a test."""
    folder = tmp_path / "more" / "agents"
    folder.mkdir(parents=True)
    for path in FILES[:2]:
        (folder / Path(path).name).write_text(block(path))
    monkeypatch.setattr(agents, "__path__", [*agents.__path__, str(folder)])
    importlib.invalidate_caches()
    settings_file.cache_clear()
    yield folder
    sys.modules.pop("agents.cloning", None)
    vars(agents).pop("cloning", None)
    settings_file.cache_clear()


@pytest.mark.usefixtures("in_place")
def test_the_method_is_trained_from_the_command_line(workdir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "cloning Behaviour cloning, as small as a method gets. variants: plain (default), fast" in listed
    words = [
        "train",
        "method=cloning",
        "dataset=tiny",
        "num_seeds=2",
        "study.name=cloning",
        *SHORT,
        "method.hidden=[16]",
    ]
    assert main([*words, "--workdir", str(workdir)]) == 0
    for seed in (0, 1):
        run = workdir / "studies" / "cloning" / "runs" / f"t0000-s{seed}"
        (evaluation,) = json.loads((run / "evaluations.json").read_text())[-1:]
        assert evaluation["updates"] == 40
        assert load_policy(run / "policy.npz").observation_dim == 3


@pytest.mark.usefixtures("in_place")
def test_its_settings_and_packs_are_those_of_its_dataclass(workdir: Path):
    def resolved(*words: str, dataset: str = "embedded/pendulum-medium-v0"):
        return load_config([], ["method=cloning", f"dataset={dataset}", *words])

    assert resolved().method.hidden == [64, 64]
    assert resolved("method.variant=fast", dataset="hopper-medium-v2").method.actor_lr == 1e-3
    assert pack_key(resolved()) == pack_key(resolved("method.actor_lr=0.1", "seed=3"))
    assert pack_key(resolved()) != pack_key(resolved("method.hidden=[8]"))
    with pytest.raises(ValueError, match=r"method\.actor_lr=0"):
        resolved("method.actor_lr=0")


@pytest.mark.usefixtures("in_place")
def test_its_tests_pass():
    module = ModuleType("test_cloning")
    exec(compile(block(FILES[2]), FILES[2], "exec"), vars(module))
    tests = [function for name, function in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()
