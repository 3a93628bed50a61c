"""Online training on Pendulum for a few hundred steps, and its snapshots as policies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.online import OnlineSACConfig, Snapshot, train_online
from agents.replay import transition_rows
from envs.episodes import make_env
from envs.policies import load_policy


def short(seed: int = 0, steps: int = 300) -> list[Snapshot]:
    config = OnlineSACConfig(
        steps=steps, seed=seed, hidden=(16, 16), batch_size=32, random_steps=100, snapshot_every=100
    )
    return list(train_online(config))


def same(first: Snapshot, second: Snapshot) -> bool:
    return all(np.array_equal(first.arrays[k], second.arrays[k]) for k in first.arrays)


def test_a_training_is_decided_by_its_seed() -> None:
    first, other = short(), short(seed=1)
    torch.manual_seed(3)  # the global generators have no part in it
    np.random.seed(3)
    again = short()
    assert [s.step for s in first] == [0, 100, 200, 300]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert same(first[0], first[1])  # random actions, no updates yet
    assert not same(first[1], first[2])
    assert not same(first[2], first[3])


def test_steps_are_counted() -> None:
    seen: list[int] = []
    config = OnlineSACConfig(steps=30, hidden=(8, 8), batch_size=4, random_steps=10, snapshot_every=20)
    assert [s.step for s in train_online(config, seen.append)] == [0, 20]
    assert seen == list(range(1, 31))


def test_episodes_end_at_the_time_limit_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pendulum is cut at 200 steps; the value of its last state goes on."""
    seen: list[tuple[Tensor, ...]] = []

    def spy(*columns: Tensor) -> Tensor:
        seen.append(columns)
        return transition_rows(*columns)

    monkeypatch.setattr("agents.online.transition_rows", spy)
    short(seed=4, steps=450)
    obs, action, reward, done, next_obs = (torch.cat(column) for column in zip(*seen, strict=True))
    assert len(obs) == 450
    assert done.sum() == 0
    assert obs[0].tolist() == make_env("Pendulum-v1").reset(seed=4)[0].tolist()
    follows = (next_obs[:-1] == obs[1:]).all(1)
    assert (~follows).nonzero().flatten().tolist() == [199, 399]
    assert -1 <= action.min() < action.max() <= 1  # as the learner sees them, not in units of torque
    angle, torque = torch.atan2(obs[:, 1], obs[:, 0]), 2.0 * action[:, 0]
    cost = angle**2 + 0.1 * obs[:, 2] ** 2 + 0.001 * torque**2  # gymnasium's pendulum.py
    torch.testing.assert_close(reward, -cost, rtol=1e-3, atol=1e-3)


def test_a_snapshot_is_a_policy_file(tmp_path: Path) -> None:
    arrays = short()[-1].arrays
    np.savez(tmp_path / "actor.npz", **arrays)  # type: ignore[arg-type]
    policy = load_policy(tmp_path / "actor.npz")
    assert (policy.kind, policy.observation_dim, policy.action_dim) == ("squashed", 3, 1)
    obs = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    x = obs
    for i in range(2):
        x = np.maximum(x @ arrays[f"W{i}"].T + arrays[f"b{i}"], 0)
    expected = 2.0 * np.tanh(x @ arrays["Wm"].T + arrays["bm"])  # Pendulum's torque lies in [-2, 2]
    np.testing.assert_allclose(policy.act(obs, None), expected, rtol=1e-4, atol=1e-5)
    sampled = policy.act(obs, np.random.default_rng(0))
    assert np.abs(sampled).max() <= 2.0
    assert np.abs(sampled - expected).max() > 0.1
