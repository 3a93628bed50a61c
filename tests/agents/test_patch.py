"""Patched targets by hand; the oracle's values; who may be patched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.method import TrainingData
from agents.patch import EdgePatch, OptimalValue, oracle_stage
from agents.ravl import RAVL, RAVLConfig
from agents.sac import SAC, SACHyperparameters, SACSettings
from agents.squashed import squashed_sample
from envs.errors import UserError
from envs.toys import EdgeOfReach

GAMMA, LENGTH, BATCH = 0.95, 3, 64
ENV = "offsweep/EdgeOfReach-v0"


def plane(rows: int = 50) -> TrainingData:
    g = torch.Generator().manual_seed(0)
    obs = torch.rand(rows, 2, generator=g) * 4 - 2
    action, zero = torch.rand(rows, 2, generator=g) * 2 - 1, torch.zeros(rows)
    starts = torch.arange(0, rows, 10)
    return TrainingData(ENV, obs, action, zero, obs + action, zero, episode_starts=starts)


@pytest.fixture(scope="module")
def values() -> Tensor:
    artifact = oracle_stage(GAMMA).build(plane(), lambda step, metrics: None)
    stored: Tensor = artifact["values"]
    return stored


def learner(kind: str, values: Tensor, members: int = 2) -> SAC:
    optimal = OptimalValue(values, GAMMA, plane(), torch.device("cpu"))
    patch = EdgePatch(kind, lambda obs: EdgeOfReach.edge_of_reach(obs, LENGTH), optimal, lambda obs: obs)
    settings = SACSettings(num_critics=3, actor_hidden=(8,), critic_hidden=(8,), gamma=GAMMA, alpha=0.3)
    return SAC(range(members), [SACHyperparameters()] * members, settings, 2, 2, hook=patch)


def minibatch(members: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    reward, done = torch.rand(members, BATCH, generator=g), (torch.rand(members, BATCH, generator=g) < 0.1).float()
    next_obs = torch.rand(members, BATCH, 2, generator=g) * 10 - 5
    return reward, done, next_obs, torch.randn(2, members, BATCH, 2, generator=g)


@pytest.mark.parametrize("kind", ["oracle", "random", "variance"])
def test_a_patched_target_by_hand(kind: str, values: Tensor) -> None:
    sac = learner(kind, values)
    reward, done, next_obs, noise = minibatch()
    rows = torch.cat((torch.zeros(2, BATCH, 4), reward.unsqueeze(-1), done.unsqueeze(-1), next_obs), -1)
    target, shown = sac._critic_target(rows, noise)
    patched = shown["patched_share"]
    edge = next_obs.abs().amax(-1)
    edge = (edge > 2 + LENGTH - 1) & (edge <= 2 + LENGTH)
    assert 0 < edge.sum() < edge.numel()
    assert torch.equal(patched.sum(1), edge.sum(1))  # the same share, member by member
    optimal = OptimalValue(values, GAMMA, plane(), torch.device("cpu"))
    for m in range(2):
        out, _ = sac.actor.forward(next_obs)
        action = squashed_sample(out, noise[0])[m]
        q = torch.stack([
            sac.target.forward(torch.cat((next_obs[m], action), -1).expand(6, BATCH, 4))[0][3 * m + i, :, 0]
            for i in range(3)
        ])  # fmt: skip
        if kind == "oracle":
            assert torch.equal(patched[m], edge[m])
        elif kind == "variance":
            variance = q.var(0, correction=0)
            assert variance[patched[m]].min() >= variance[~patched[m]].max()
        else:
            assert torch.equal(patched[m], noise[1, m, :, 0] >= noise[1, m, patched[m], 0].min())
        value = torch.where(patched[m], optimal(next_obs[m], action), q.amin(0))
        log_std = out[m].chunk(2, -1)[1]
        log_prob = -0.5 * noise[0, m] ** 2 - log_std - 0.5 * math.log(2 * math.pi) - torch.log(1 - action**2 + 1e-6)
        by_hand = reward[m] + GAMMA * (1 - done[m]) * (value - 0.3 * log_prob.sum(-1))
        torch.testing.assert_close(target[m], by_hand, atol=1e-5, rtol=1e-5)


def test_the_share_that_is_patched_is_a_metric_and_selected_members_are_patched_too(values: Tensor) -> None:
    sac = learner("oracle", values)
    reward, done, next_obs, noise = minibatch()
    rows = torch.cat((torch.zeros(2, BATCH, 4), reward.unsqueeze(-1), done.unsqueeze(-1), next_obs), -1)
    metrics = sac.update(rows, torch.cat((noise[:1], noise[:1])), with_metrics=True)
    assert metrics is not None
    share = EdgeOfReach.edge_of_reach(next_obs, LENGTH).float().mean(1)
    torch.testing.assert_close(metrics["patched_share"], share)
    one = sac.select([1]).update(rows[1:], noise[:1, 1:].expand(2, 1, BATCH, 2), with_metrics=True)
    assert one is not None
    torch.testing.assert_close(one["patched_share"], share[1:])


def test_the_oracle_is_reward_and_discounted_value_also_for_scaled_rewards(values: Tensor) -> None:
    peak = torch.tensor([[5.0, 5.0]])
    stay = OptimalValue(values, GAMMA, plane(), torch.device("cpu"))(peak, torch.zeros(1, 2))
    assert stay.item() == pytest.approx(float(EdgeOfReach.reward(peak.numpy())[0]) / (1 - GAMMA), rel=1e-3)
    data = plane()
    object.__setattr__(data, "reward_scale", 2.0)
    object.__setattr__(data, "reward_shift", -1.0)
    scaled = OptimalValue(values, GAMMA, data, torch.device("cpu"))(peak, torch.zeros(1, 2))
    assert scaled.item() == pytest.approx(2 * stay.item() - 1 / (1 - GAMMA), rel=1e-5)
    # an action along which the reward falls is worth less, and so is a place farther out
    optimal = OptimalValue(values, GAMMA, plane(), torch.device("cpu"))
    away = optimal(peak, torch.ones(1, 2)).item()
    assert away < stay.item()
    assert optimal(torch.tensor([[11.5, 0.0]]), torch.zeros(1, 2)).item() < away


CONFIG: dict[str, Any] = {
    "hidden": [8],
    "rollout_length": LENGTH,
    "rollout_batch": 20,
    "real_ratio": 0.0,
    "model_quality": 1.0,
}


def test_rollouts_start_where_episodes_do() -> None:
    config = RAVLConfig(**CONFIG, rollout_starts="initial")
    method = RAVL([config], [0], plane(), {}, "cpu")
    starts = torch.cat([job.starts.view(-1, 2) for epoch in range(3) for job in method.rollout_jobs(epoch)])
    allowed = plane().observations[::10]
    assert len(starts.unique(dim=0)) == len(allowed)
    assert all((row == allowed).all(1).any() for row in starts)


def test_a_run_with_a_patch_is_trained(values: Tensor) -> None:
    config = RAVLConfig(
        **CONFIG,
        rollout_starts="initial",
        patch="oracle",
        gamma=GAMMA,
        updates_per_epoch=5,
        num_updates=5,
        batch_size=16,
    )
    assert set(RAVL.stages(config)) == {"optimal_values"}
    method = RAVL([config], [0], plane(), {"optimal_values": {"values": values}}, "cpu")
    method.add_rollouts([job.run(method.dynamics) for job in method.rollout_jobs(0)])
    (metrics,) = method.train_epoch(0)
    assert 0 <= metrics["train/patched_share"] < 1
    with pytest.raises(UserError, match="Hopper-v4, which has no exact test"):
        RAVL.check_environment(config, "Hopper-v4")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch": "oracel"}, "must be one of none, oracle"),
        ({"patch": "oracle"}, "needs method.model_quality=1 and method.rollout_starts=initial"),
        ({"rollout_starts": "first"}, "must be all or initial"),
    ],
)
def test_what_cannot_be_patched(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        RAVLConfig(**changes)
