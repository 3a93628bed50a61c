"""Pools of synthetic rows: every source, alone and in a pack, before and after a checkpoint, early and late."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.bc import BC, BCConfig
from agents.cql import CQL, CQLConfig
from agents.dynamics import DynamicsConfig, train_ensemble
from agents.iql import IQL, IQLConfig
from agents.method import RolloutResult, TrainingData, common_settings, effective_settings
from agents.model_free import ModelFree, ModelFreeConfig
from agents.replay import Replay, transition_rows
from agents.rollout import RolloutStatistics
from agents.sac_n import SACN, SACNConfig
from agents.synthetic import SyntheticConfig, mapped_rows
from agents.td3_bc import TD3BC, TD3BCConfig
from agents.trajectory_diffusion import DiffusionConfig, train_trajectory_diffusion
from envs.dataset import Dataset
from envs.errors import UserError

S, A, LENGTH, TRAJECTORIES = 3, 1, 4, 70
ENSEMBLE = DynamicsConfig(2, 1, [8], weight_decay=[0.0, 0.0], max_epochs=1)
DIFFUSION = DiffusionConfig(length=LENGTH + 1, features=16, num_blocks=2, num_updates=10, batch_size=8)
METHODS: dict[str, tuple[type[ModelFree], type[ModelFreeConfig]]] = {
    "td3_bc": (TD3BC, TD3BCConfig), "iql": (IQL, IQLConfig), "sac_n": (SACN, SACNConfig),
    "bc": (BC, BCConfig), "cql": (CQL, CQLConfig),
}  # fmt: skip
sources = pytest.mark.parametrize("source", ["ensemble", "diffusion"])
Tree = Any


def dataset(episodes: int = 12, length: int = 20) -> Dataset:
    """Random walks of the pendulum's shapes, with rewards far from 0."""
    rng, n = np.random.default_rng(0), episodes * length
    path = rng.normal(size=(episodes, length + 1, S)).cumsum(1).astype(np.float32) * 0.1 + 2.0
    obs, after = path[:, :-1].reshape(n, S), path[:, 1:].reshape(n, S)
    actions = rng.uniform(-2, 2, size=(n, A)).astype(np.float32)
    timeouts = np.arange(n) % length == length - 1
    rewards = (actions[:, 0] - 5.0).astype(np.float32)
    return Dataset("walk", "Pendulum-v1", obs, actions, rewards, after, np.zeros(n, bool), timeouts)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return TrainingData.from_dataset(dataset(), np.full(A, -2.0, np.float32), np.full(A, 2.0, np.float32))


@pytest.fixture(scope="module")
def artifacts(data: TrainingData) -> dict[str, dict[str, Any]]:
    columns = data.observations, data.actions, data.rewards, data.next_observations
    ensemble = train_ensemble(*columns, ENSEMBLE).state_dict()
    return {"dynamics": ensemble, "trajectories": train_trajectory_diffusion(data, DIFFUSION)}


def configured(name: str = "td3_bc", source: str = "ensemble", **changes: Any) -> Any:
    """A refresh every second epoch of 6."""
    synthetic: dict[str, Any] = {
        "num_trajectories": TRAJECTORIES,
        "refresh_every": 20,
        "real_ratio": 0.25,
        "synchronous": True,
    }
    synthetic |= {key: changes.pop(key) for key in list(changes) if key in vars(SyntheticConfig())}
    coef = changes.pop("coef", 1.0)
    base = METHODS[name][1](
        hidden=[8], batch_size=16, num_updates=60, updates_per_epoch=10, dynamics=ENSEMBLE, diffusion=DIFFUSION,
        synthetic=SyntheticConfig(source, **synthetic), **changes,
    )  # fmt: skip
    if source != "diffusion":
        return base
    sampler = dataclasses.replace(base.sampler, num_steps=16)
    return dataclasses.replace(base, sampler=sampler, guidance=dataclasses.replace(base.guidance, coef=coef))


def make(
    configs: Sequence[Any], seeds: Sequence[int], data: TrainingData, artifacts: dict[str, Any], name: str = "td3_bc"
) -> ModelFree:
    return METHODS[name][0](configs, seeds, data, artifacts)


def step(method: ModelFree, epoch: int) -> list[dict[str, float]]:
    """An epoch as the learner runs it."""
    results = [job.run(method.rollout_model) for job in method.rollout_jobs(epoch)]
    ahead = method.jobs_ahead
    if ahead is not None and ahead.due == epoch:
        results += [job.run(method.rollout_model) for job in ahead.jobs]
    taken = method.add_rollouts(results)
    method.ask_ahead(epoch)
    return [{**a, **b} for a, b in zip(taken, method.train_epoch(epoch), strict=True)]


def train(method: ModelFree, epochs: Sequence[int] = range(6)) -> list[list[dict[str, float]]]:
    return [step(method, epoch) for epoch in epochs]


def same(a: Tree, b: Tree, tolerance: float = 0.0) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) if not tolerance else torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@sources
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_learns_from_every_source(
    name: str, source: str, data: TrainingData, artifacts: dict[str, Any]
) -> None:
    method = make([configured(name, source)], [0], data, artifacts, name)
    metrics = train(method, range(3))
    rows = metrics[2][0]["synthetic/transitions"]
    assert 0 < rows == method.replay.sizes[0] <= TRAJECTORIES * LENGTH
    assert ["synthetic/transitions" in m[0] for m in metrics] == [True, False, True]
    assert metrics[2][0]["synthetic/mean_length"] == rows / TRAJECTORIES
    without = dataclasses.replace(configured(name, source), synthetic=SyntheticConfig())
    plain = METHODS[name][0]([without], [0], data, {})
    train(plain, range(3))
    assert not same(plain.updater.state_dict(), method.updater.state_dict())
    assert (plain.pools, plain.replay.capacity, sorted(plain.state_dict())) == (None, 0, ["updater"])


@pytest.mark.parametrize("synchronous", [True, False])
@sources
def test_a_member_of_a_pack_is_as_it_is_alone(
    source: str, synchronous: bool, data: TrainingData, artifacts: dict[str, Any]
) -> None:
    configs = [configured(source=source, synchronous=synchronous, alpha=2.5 + m, coef=1.0 + m) for m in range(2)]
    pack = make(configs, [3, 7], data, artifacts)
    alone = make(configs[1:], [7], data, artifacts)
    together, single = train(pack), train(alone)
    for row, own in zip(together, single, strict=True):
        assert row[1] == pytest.approx(own[0], rel=1e-3, abs=1e-4)
    assert same(pack.select([1]).state_dict(), alone.state_dict(), 1e-3)


@sources
def test_pools_are_made_by_the_policies_of_fixed_updates(
    source: str, data: TrainingData, artifacts: dict[str, Any]
) -> None:
    """Staleness at the ends of six epochs of 10 updates with a refresh every 20."""
    first = [10.0, 20.0] if source == "ensemble" else [None, None]  # a diffusion model's first pool has no policy
    expected = {True: [*first, 10.0, 20.0, 10.0, 20.0], False: [*first, *([30.0, 40.0] if first[0] else [None] * 2)]}
    expected[False] += [30.0, 40.0]  # of the policies of update 20, taken in at update 40
    for synchronous, stale in expected.items():
        method = make([configured(source=source, synchronous=synchronous)], [0], data, artifacts)
        seen, actors, pools = [], [], []
        for epoch in range(6):
            actors.append(method.actor().tensors()["network"])
            ahead = method.jobs_ahead
            if ahead is not None and ahead.due == epoch:
                assert same(ahead.jobs[0].actor.tensors()["network"], actors[epoch - 2])  # type: ignore[attr-defined]
            seen.append(step(method, epoch)[0].get("synthetic/staleness_updates"))
            pools.append(method.replay.member_rows(0).clone())
        assert seen == stale
        assert method.jobs_ahead is None  # nothing would learn from another
        changes = [not same(a, b) for a, b in pairwise(pools)]
        assert changes == [False, synchronous, False, True, False]


@pytest.mark.parametrize("synchronous", [True, False])
@sources
def test_a_resumed_run_is_the_undisturbed_one(
    source: str, synchronous: bool, data: TrainingData, artifacts: dict[str, Any]
) -> None:
    """From every epoch boundary: before the first pool, with one under way, before one is taken in, at the end."""
    configs = [configured(source=source, synchronous=synchronous)]
    whole = make(configs, [5], data, artifacts)
    states, under_way = [], []
    for epoch in range(6):
        states.append(torch.load(saved(whole.state_dict()), weights_only=True))
        under_way.append(whole.jobs_ahead is not None)
        step(whole, epoch)
    assert under_way == [False] * 3 + [not synchronous] * 2 + [False]
    for epoch in range(1, 6):
        again = make(configs, [5], data, artifacts)
        again.load_state_dict(states[epoch])
        train(again, range(epoch, 6))
        assert same(again.state_dict(), whole.state_dict()), epoch


def saved(state: Tree) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_member_that_leaves_takes_its_pool_along(data: TrainingData, artifacts: dict[str, Any]) -> None:
    configs = [configured(source="diffusion", synchronous=False, coef=1.0 + m) for m in range(3)]
    pack, alone = make(configs, [1, 2, 3], data, artifacts), make(configs[2:], [3], data, artifacts)
    train(pack, range(3))
    assert pack.jobs_ahead is not None
    pack = pack.select([0, 2])
    assert pack.jobs_ahead is not None
    assert {job.members for job in pack.jobs_ahead.jobs} == {(0,), (1,)}
    train(pack, range(3, 6))
    train(alone)
    assert same(pack.select([1]).state_dict(), alone.state_dict(), 1e-3)


def test_more_than_one_pool_is_kept(data: TrainingData, artifacts: dict[str, Any]) -> None:
    method = make([configured(pools_retained=2)], [0], data, artifacts)
    pools = []
    for epoch in range(6):
        train(method, [epoch])
        if epoch % 2 == 0:
            pools.append(method.replay.member_rows(0)[-TRAJECTORIES * LENGTH :].clone())
    assert same(method.replay.member_rows(0), torch.cat(pools[1:]))


def test_a_replay_keeps_the_newest_rows() -> None:
    replay = Replay(torch.zeros(1, 2), 2, 5)
    for i in range(7):
        replay.add(1, torch.full((1, 2), float(i)), torch.tensor([i], dtype=torch.int16))
    replay.keep_newest(1, 3)
    assert (replay.member_rows(1)[:, 0].tolist(), replay.member_tags(1).tolist()) == ([4, 5, 6], [4, 5, 6])
    replay.add(1, torch.full((2, 2), 9.0))
    assert replay.member_rows(1)[:, 0].tolist() == [4, 5, 6, 9, 9]
    replay.keep_newest(1, 0)
    assert replay.sizes == [0, 0]


def test_rows_are_mapped_to_what_the_method_learns_from(data: TrainingData) -> None:
    learned = data.standardised().with_return_range(10.0) if data.return_range else data.standardised()
    learned = dataclasses.replace(learned, rewards=learned.rewards * 3 + 1, reward_scale=3.0, reward_shift=1.0)
    shifted = dataclasses.replace(data, rewards=data.rewards * 2 - 4, reward_scale=2.0, reward_shift=-4.0)
    columns = [
        transition_rows(d.observations, d.actions, d.rewards, d.terminals, d.next_observations)
        for d in (shifted, dataclasses.replace(learned, rewards=data.rewards * 3 + 1))
    ]
    torch.testing.assert_close(mapped_rows(shifted, learned)(columns[0]), columns[1], rtol=1e-4, atol=1e-4)
    assert mapped_rows(data, data)(columns[0]) is columns[0]


def test_sources_do_not_know_what_a_method_standardises(data: TrainingData, artifacts: dict[str, Any]) -> None:
    """TD3+BC standardises observations by itself: its actor is of the data as it was given, and so are a job's rows."""
    method = make([configured()], [0], data, artifacts)
    assert isinstance(method, TD3BC)
    obs = method.data.observations[:50].unsqueeze(0)
    pi = method.updater.actor.forward(obs)[0].tanh()
    acted = method.actor().sample(data.observations[:50].unsqueeze(0), torch.zeros(1, 50, A))
    torch.testing.assert_close(acted, pi, rtol=1e-4, atol=1e-5)
    results = [job.run(method.rollout_model) for job in method.rollout_jobs(0)]
    method.add_rollouts(results)
    rows, mean, std = results[0].rows[0], method.data.observation_mean, method.data.observation_std
    assert mean is not None
    assert std is not None
    learned = torch.cat(((rows[:, :S] - mean) / std, rows[:, S : S + A + 2], (rows[:, -S:] - mean) / std), 1)
    torch.testing.assert_close(method.replay.member_rows(0)[: len(rows)], learned, rtol=1e-4, atol=1e-4)


def test_a_pool_without_rows_ends_the_run(data: TrainingData, artifacts: dict[str, Any]) -> None:
    method = make([configured()], [0], data, artifacts)
    none = RolloutStatistics(0, 0, 9, 0.0, 0.0, survivors=(0,) * LENGTH)
    empty = torch.empty(0, 2 * S + A + 2), torch.empty(0, dtype=torch.int16)
    (metrics,) = method.add_rollouts([RolloutResult((0,), (empty[0],), (empty[1],), (none,))])
    assert math.isnan(metrics["synthetic/reward_mean"])
    assert metrics["synthetic/dropped"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "gan"}, r"method\.synthetic\.source='gan' must be one of none, diffusion, ensemble"),
        ({"real_ratio": 1.0}, r"real_ratio=1\.0 .* method\.synthetic\.source=none"),
        ({"refresh_every": 25}, r"refresh_every=25 must be a multiple of method\.updates_per_epoch=10"),
        ({"num_trajectories": 0}, r"num_trajectories=0 must be greater than 0"),
        ({"pools_retained": 0}, r"pools_retained=0 must be greater than 0"),
        ({"source": "diffusion", "length": 7}, r"length=7 must be one less than method\.diffusion\.length=5"),
        ({"length": 200}, r"length=200 must lie between 1 and 127"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured(**changes)


def test_what_runs_can_share_and_what_they_depend_on() -> None:
    """A source's own settings count, those of other sources do not; lambda differs inside a pack."""
    assert not {"synthetic", "diffusion", "sampler", "guidance", "dynamics"} & set(effective_settings(TD3BCConfig()))
    plain = TD3BCConfig(dynamics=DynamicsConfig(max_epochs=3))
    assert effective_settings(plain) == effective_settings(TD3BCConfig())
    ensemble, diffusion = configured(), configured(source="diffusion")
    assert {"synthetic", "dynamics"} <= set(effective_settings(ensemble))
    assert "diffusion" not in effective_settings(ensemble)
    assert {"synthetic", "diffusion", "sampler", "guidance"} <= set(effective_settings(diffusion))
    assert common_settings(diffusion) == common_settings(configured(source="diffusion", coef=2.0))
    assert common_settings(diffusion) != common_settings(configured(source="diffusion", num_trajectories=71))
