from pathlib import Path

import numpy as np
import pytest

from envs.errors import UserError
from envs.policies import load_policy
from orchestrator.actor_training import train_actor

WORDS = ["env_id=Pendulum-v1", "steps=20", "hidden=[8,8]", "random_steps=10", "snapshot_every=10"]


def test_training_stops_at_the_score_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_actor(WORDS, tmp_path / "low", until=-200) == 0  # an untrained actor has more
    assert "after 0 steps" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "low").iterdir()}
    assert files == {"training.json", "learning_curve.csv", "0000000.npz", "actor.npz"}
    observations = np.random.default_rng(0).normal(size=(5, 3))
    kept, snapshot = (load_policy(tmp_path / "low" / name) for name in ("actor.npz", "0000000.npz"))
    np.testing.assert_array_equal(kept.act(observations, None), snapshot.act(observations, None))


def test_a_score_that_is_not_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_actor(WORDS, tmp_path / "high", until=500) == 1
    assert "no snapshot reached score 500" in capsys.readouterr().out
    assert not (tmp_path / "high" / "actor.npz").exists()
    assert len((tmp_path / "high" / "learning_curve.csv").read_text().splitlines()) == 4


def test_a_score_needs_a_reference_pair(tmp_path: Path):
    with pytest.raises(UserError, match="no reference pair is known for MountainCarContinuous-v0"):
        train_actor(["env_id=MountainCarContinuous-v0"], tmp_path / "x", until=10)
    assert not (tmp_path / "x").exists()
