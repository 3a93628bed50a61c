"""RAVL and MOPO end to end on made-up data: packs, checkpoints, survivors, rollouts and settings."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agents.actors import SquashedGaussianActor
from agents.dynamics import DynamicsConfig, Ensemble
from agents.dynamics_reward_training import DynamicsRewardConfig
from agents.method import RolloutResult, TrainingData
from agents.mobile import MOBILE, BellmanInconsistency, MOBILEConfig
from agents.model_based import FILTERED_SHARD_ROWS, ModelBasedConfig, ModelBasedSAC
from agents.mopo import MOPO, MOPOConfig
from agents.ravl import RAVL, RAVLConfig
from agents.replay import transition_rows
from agents.rollout import SHARD_ROWS, Rollout
from agents.transition_filter import FilterConfig, FilteredDynamics
from envs.errors import UserError
from tests.agents.filters import random_reward

OBS, ACT, ROWS = 3, 2, 400
R, D = OBS + ACT, OBS + ACT + 1  # columns of reward and done in a row [s, a, r, d, s']
SEEDS = [10, 11, 12, 13]
NETWORKS = ("actor", "critic", "target", "log_alpha")
Metrics = list[list[dict[str, float]]]  # per call, per member


@cache
def data() -> TrainingData:
    """A drifting point scored by Hopper's rule of termination: height s[0] > 0.7, |s[1]| < 0.2."""
    g = torch.Generator().manual_seed(0)
    obs = torch.rand(ROWS, OBS, generator=g) * torch.tensor([0.6, 0.38, 2.0]) + torch.tensor([0.71, -0.19, -1.0])
    action = torch.rand(ROWS, ACT, generator=g) * 2 - 1
    change = 0.04 * torch.cat((action, obs[:, :1]), 1) + 0.03 * torch.randn(ROWS, OBS, generator=g)
    reward = obs[:, 0] - action.square().sum(1) + 0.1 * torch.randn(ROWS, generator=g)
    terminal = torch.rand(ROWS, generator=g) < 0.1
    return TrainingData("Hopper-v4", obs, action, reward, obs + change, terminal.float())


DYNAMICS = DynamicsConfig(
    ensemble_size=3,
    num_elites=2,
    hidden=[16],
    weight_decay=[0.0, 0.0],
    batch_size=32,
    learning_rate=1e-2,
    max_epochs=20,
)


@cache
def artifacts() -> dict[str, dict[str, Any]]:
    def report(step: int, metrics: object) -> None: ...

    stages = RAVL.stages(RAVLConfig(dynamics=DYNAMICS))
    built = {name: stage.build(data(), report) for name, stage in stages.items()}
    return {**built, "dynamics_reward": random_reward(6, OBS, ACT)}


SMALL: dict[str, Any] = {
    "hidden": [16, 16], "initialisation": "torch", "batch_size": 32, "real_ratio": 0.25, "rollout_length": 3,
    "rollout_batch": 60, "rollout_epochs_retained": 2, "updates_per_epoch": 30, "num_updates": 60,
    "dynamics": DYNAMICS,
}  # fmt: skip


def ravl_configs(**changes: Any) -> list[RAVLConfig]:
    own = [(1.0, 1e-3, 1e-3, 1e-3), (0.0, 1e-3, 2e-3, 1e-3), (5.0, 3e-4, 1e-3, 3e-3), (1.0, 1e-3, 1e-3, 1e-4)]
    return [
        RAVLConfig(num_critics=3, eta=eta, actor_lr=a, critic_lr=c, alpha_lr=t, **{**SMALL, **changes})
        for eta, a, c, t in own
    ]


def mopo_configs(**changes: Any) -> list[MOPOConfig]:
    own = [(0.0, 1e-3, 1e-3), (1.0, 1e-3, 1e-3), (3.0, 3e-4, 1e-3), (1.0, 1e-3, 3e-3)]
    settings = {**SMALL, "actor_lr_schedule": "cosine", "max_alpha": 1.0, **changes}
    return [MOPOConfig(penalty_coef=p, actor_lr=a, critic_lr=c, **settings) for p, a, c in own]


def mopo_tuned_configs(**changes: Any) -> list[MOPOConfig]:
    """Of one the weight is fixed, of the others tuned, fast and slowly."""
    settings = {"penalty": "loo_kl", "penalty_scale": "dataset", "penalty_members": "elites", **changes}
    own = [(0.5, 0.3), (None, 0.3), (2.0, 0.3), (2.0, 0.01)]
    return [
        dataclasses.replace(one, penalty_coef=1.0, penalty_target=target, penalty_lr=rate)
        for one, (target, rate) in zip(mopo_configs(**settings), own, strict=True)
    ]


def mobile_configs(**changes: Any) -> list[MOBILEConfig]:
    own = [(0.0, 1e-3, 1e-3), (1.0, 1e-3, 1e-3), (3.0, 3e-4, 1e-3), (1.0, 1e-3, 3e-3)]
    settings = {**SMALL, "penalty_draws": 3, "entropy_in_target": True, "actor_critics": "target", **changes}
    return [MOBILEConfig(penalty_coef=p, actor_lr=a, critic_lr=c, **settings) for p, a, c in own]


def filtered(configs: Sequence[ModelBasedConfig], **settings: Any) -> list[Any]:
    """The same with rollouts through filtered predictions, some of which are cut."""
    config = FilterConfig(**{"num_discriminators": 3, "threshold": 0.75, **settings})
    dynamics = dataclasses.replace(DYNAMICS, filter="morec")
    return [dataclasses.replace(c, dynamics=dynamics, filter=config) for c in configs]


def learner(configs: Sequence[ModelBasedConfig], seeds: Sequence[int]) -> ModelBasedSAC:
    method = {MOPOConfig: MOPO, MOBILEConfig: MOBILE, RAVLConfig: RAVL}[type(configs[0])]
    return method(configs, seeds, data(), artifacts())


PACKS: dict[str, Sequence[ModelBasedConfig]] = {
    "ravl": ravl_configs(), "mopo": mopo_configs(), "mobile": mobile_configs(),
    "mopo tuned": mopo_tuned_configs(), "mopo filtered": filtered(mopo_configs(), cut="truncate"),
    "mopo tuned and filtered": filtered(mopo_tuned_configs(penalty="ll_variance"), cut="drop"),
    "ravl filtered": filtered(ravl_configs()),
    "mobile filtered": filtered(mobile_configs(target_floor=None), cut="drop"),
}  # fmt: skip


def train(method: ModelBasedSAC, epochs: Sequence[int]) -> Metrics:
    seen: Metrics = []
    for epoch in epochs:
        results = [job.run(method.dynamics) for job in method.rollout_jobs(epoch)]
        seen.append(method.add_rollouts(results))
        seen.append(method.train_epoch(epoch))
    return seen


def networks(method: ModelBasedSAC, member: int) -> Tensor:
    one = method.sac.select([member])
    return torch.cat([getattr(one, name).flat for name in NETWORKS])


def assert_equal(first: ModelBasedSAC, second: ModelBasedSAC, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Parameters, optimisers and rings of all members; bitwise without a tolerance."""
    assert first.num_members == second.num_members
    state, expected = first.sac.state_dict(), second.sac.state_dict()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)
    for member in range(first.num_members):
        mine, other = first.replay.member_rows(member), second.replay.member_rows(member)
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)
        assert torch.equal(first.replay.member_tags(member), second.replay.member_tags(member))


@pytest.mark.parametrize("configs", PACKS.values(), ids=PACKS)
def test_a_member_of_a_pack_ends_as_it_does_alone(configs: list[ModelBasedConfig]) -> None:
    """Two epochs, each with rollouts of the policy learned so far. Tolerance 1e-4: a batched product may sum in
    another order than a single one, and every update and rollout builds on the one before."""
    pack, before = learner(configs, SEEDS), learner(configs, SEEDS)
    in_pack = train(pack, [0, 1])
    for m, (config, seed) in enumerate(zip(configs, SEEDS, strict=True)):
        alone = learner([config], [seed])
        metrics = train(alone, [0, 1])
        assert_equal(pack.select([m]), alone, rtol=1e-4, atol=1e-4)
        for mine, other in zip(metrics, in_pack, strict=True):
            assert mine[0] == pytest.approx({k: other[m][k] for k in mine[0]}, rel=1e-3, abs=1e-4)
        assert (networks(alone, 0) - networks(before, m)).abs().max() > 1e-2  # far beyond the tolerance
    for m in range(3):
        assert (networks(pack, m) - networks(pack, m + 1)).abs().max() > 1e-2


@pytest.mark.parametrize("configs", PACKS.values(), ids=PACKS)
def test_a_training_repeats_bitwise(configs: list[ModelBasedConfig]) -> None:
    first, again = learner(configs, SEEDS), learner(configs, SEEDS)
    seen = train(first, [0, 1])
    torch.manual_seed(1)
    assert train(again, [0, 1]) == seen
    assert_equal(first, again)
    assert all(math.isfinite(v) for metrics in seen for member in metrics for v in member.values())


def test_equal_runs_with_other_seeds_differ() -> None:
    pack = learner([ravl_configs()[0]] * 2, [1, 2])
    train(pack, [0])
    assert not torch.equal(networks(pack, 0), networks(pack, 1))
    assert not torch.equal(pack.replay.member_rows(0)[:60, :OBS], pack.replay.member_rows(1)[:60, :OBS])


@pytest.mark.parametrize("configs", PACKS.values(), ids=PACKS)
def test_a_restored_pack_goes_on_bitwise(configs: list[ModelBasedConfig]) -> None:
    straight, first = learner(configs, SEEDS), learner(configs, SEEDS)
    expected = train(straight, [0, 1])
    train(first, [0])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = learner(configs, SEEDS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert train(resumed, [1]) == expected[2:]
    assert_equal(resumed, straight)


@pytest.mark.parametrize("configs", PACKS.values(), ids=PACKS)
def test_survivors_go_on_as_in_the_whole_pack(configs: list[ModelBasedConfig]) -> None:
    whole, part = learner(configs, SEEDS), learner(configs, SEEDS)
    expected = train(whole, [0, 1])
    train(part, [0])
    survivors = part.select([1, 3])
    seen = train(survivors, [1])
    assert_equal(survivors, whole.select([1, 3]), rtol=1e-4, atol=1e-4)
    assert [set(m) for m in seen[1]] == [set(seen[1][0])] * 2
    for new, old in enumerate([1, 3]):
        for mine, other in zip(seen, expected[2:], strict=True):
            assert mine[new] == pytest.approx({k: other[old][k] for k in mine[new]}, rel=1e-3, abs=1e-4)


def test_a_restored_selection_goes_on_bitwise() -> None:
    """A pack that has lost members is checkpointed as what is left of it."""
    part = learner(ravl_configs(), SEEDS)
    train(part, [0])
    survivors = part.select([2, 3])
    resumed = learner(ravl_configs()[2:], SEEDS[2:])
    resumed.load_state_dict(survivors.state_dict())
    train(survivors, [1])
    train(resumed, [1])
    assert_equal(survivors, resumed)


def test_mobiles_penalty_is_of_the_plain_elites_whatever_filters_the_rollouts() -> None:
    method = learner(filtered(mobile_configs(target_floor=None)), SEEDS)
    assert isinstance(method.dynamics, FilteredDynamics)
    assert isinstance(method.sac.hook, BellmanInconsistency)
    assert method.sac.hook.ensemble is method.ensemble
    assert set(MOBILE.stages(method.shared)) == {"dynamics", "dynamics_reward"}


# ---- what is learned from -------------------------------------------------------------------------------------------


def run_jobs(method: ModelBasedSAC, epoch: int) -> list[RolloutResult]:
    return [job.run(method.dynamics) for job in method.rollout_jobs(epoch)]


def test_a_batch_holds_the_truncated_share_of_real_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """real_ratio 0.05 of 256 is 12 rows, the rest the member's own (RAVL train_ravl_agent.py:204)."""
    method = learner(ravl_configs(real_ratio=0.05, batch_size=256, updates_per_epoch=20, num_updates=20), SEEDS)
    method.add_rollouts(run_jobs(method, 0))
    batches: list[Tensor] = []
    update = method.sac.update

    def spy(rows: Tensor, *others: Any) -> Any:
        batches.append(rows.clone())
        return update(rows, *others)

    monkeypatch.setattr(method.sac, "update", spy)
    method.train_epoch(0)
    assert len(batches) == 20
    d = data()
    real = set(
        map(tuple, transition_rows(d.observations, d.actions, d.rewards, d.terminals, d.next_observations).tolist())
    )
    rings = [set(map(tuple, method.replay.member_rows(m).tolist())) for m in range(4)]
    for batch in batches:
        assert tuple(batch.shape) == (4, 256, 2 * OBS + ACT + 2)
        for m in range(4):
            rows = list(map(tuple, batch[m].tolist()))
            assert sum(row in real for row in rows) == 12
            assert sum(row in rings[m] for row in rows) == 244


def test_real_rows_alone_need_no_rollouts() -> None:
    method = learner(ravl_configs(real_ratio=1.0), SEEDS)
    assert method.rollout_jobs(0) == []
    assert method.add_rollouts([]) == [{}] * 4
    metrics = method.train_epoch(0)
    assert all(math.isfinite(v) for member in metrics for v in member.values())


def test_starts_are_states_of_the_dataset_without_replacement_where_there_are_enough() -> None:
    states = set(map(tuple, data().observations.tolist()))
    method = learner(ravl_configs(rollout_batch=ROWS), SEEDS)
    first, second = (method.rollout_jobs(epoch)[0].starts[0] for epoch in (0, 1))
    assert set(map(tuple, first.tolist())) == states  # each once
    assert len(first) == ROWS
    assert not torch.equal(first, second)
    more = learner(ravl_configs(rollout_batch=ROWS + 100), SEEDS).rollout_jobs(0)[0].starts[0]
    assert len(more) == ROWS + 100
    assert set(map(tuple, more.tolist())) < states


def test_jobs_cover_every_member_in_shards() -> None:
    method = learner(ravl_configs(rollout_batch=2 * SHARD_ROWS + 7), SEEDS)
    jobs = method.rollout_jobs(4)
    assert [(j.members, j.seeds, j.epoch, j.shard) for j in jobs] == [
        ((m,), (seed,), 4, shard) for m, seed in enumerate(SEEDS) for shard in range(3)
    ]
    assert [tuple(j.starts.shape) for j in jobs[:3]] == [(1, n, OBS) for n in (SHARD_ROWS, SHARD_ROWS, 7)]
    for job in jobs:
        assert isinstance(job.actor, SquashedGaussianActor)
        assert torch.equal(job.actor.network.flat, method.sac.actor.select([job.members[0]]).flat)
        assert (job.length, job.termination.env_id) == (3, "Hopper-v4")


def on_gpu(monkeypatch: pytest.MonkeyPatch, members: int, rows: int) -> None:
    """Let jobs be of several members and take the form for a GPU."""
    monkeypatch.setattr("agents.synthetic.shard_size", lambda *_: (members, rows))
    monkeypatch.setattr(Rollout, "__call__", torch.inference_mode()(Rollout.masked))


def test_on_a_gpu_a_job_has_several_members(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [learner([config], [seed]) for config, seed in zip(mopo_configs(), SEEDS, strict=True)]
    on_gpu(monkeypatch, 3, 25)
    pack = learner(mopo_configs(), SEEDS)
    jobs = pack.rollout_jobs(1)
    assert [(j.members, j.shard, tuple(j.starts.shape)) for j in jobs] == [
        (members, shard, (len(members), n, OBS))
        for members in ((0, 1, 2), (3,))
        for shard, n in enumerate((25, 25, 10))
    ]
    assert [j.penalty_coef.tolist() for j in jobs[::3]] == [[0.0, 1.0, 3.0], [1.0]]
    metrics = pack.add_rollouts([job.run(pack.dynamics) for job in jobs])
    for m, method in enumerate(alone):
        own = method.add_rollouts(run_jobs(method, 1))
        torch.testing.assert_close(pack.replay.member_rows(m), method.replay.member_rows(0))
        assert metrics[m] == pytest.approx(own[0], rel=1e-5)


def test_a_rollout_phase_on_a_gpu_reads_one_thing_per_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the draw of the starts to the rings; fake tensors refuse whatever else needs a value (device "meta": see
    test_rollout.py)."""
    there, reads = artifacts()["dynamics"], []

    def read(totals: Tensor) -> list[list[float]]:
        reads.append(tuple(totals.shape))
        return [[50.0 + m, 3.0, 2.0, 1.0, 4.0, 0.0, 0.0, 30.0, 20.0, m] for m in range(len(totals))]

    monkeypatch.setattr("agents.rollout._read", read)
    for module in ("rollout", "synthetic"):  # there is no generator for this device
        monkeypatch.setattr(f"agents.{module}.generator", lambda *_, device: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        obs, action, reward, next_obs, done = (
            torch.empty(x.shape, device="meta") for x in list(vars(data()).values())[1:6]
        )
        tensors = {k: torch.empty(v.shape, device="meta") for k, v in there["tensors"].items()}
        mean, std = torch.empty(OBS), torch.empty(OBS)  # on the CPU, as they are read
        method = MOPO(
            mopo_configs(), SEEDS, TrainingData("Hopper-v4", obs, action, reward, next_obs, done, mean, std),
            {"dynamics": {**there, "tensors": tensors}}, "meta",
        )  # fmt: skip
        for epoch in range(8):  # the rings wrap
            metrics = method.add_rollouts([job.run(method.dynamics) for job in method.rollout_jobs(epoch)])
    assert reads == [(4, 7 + 3)] * 8
    assert [m["rollout/transitions"] for m in metrics] == [50.0, 51.0, 52.0, 53.0]
    assert method.replay.sizes == [2 * 60 * 3] * 4


@pytest.mark.parametrize("configs", PACKS.values(), ids=PACKS)
def test_what_is_trained_as_on_a_gpu_is_as_on_a_cpu(
    configs: list[ModelBasedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both draw the same numbers: on a real GPU those are others."""
    first, second = learner(configs, SEEDS), learner(configs, SEEDS)
    train(first, [0, 1])
    on_gpu(monkeypatch, 2, SHARD_ROWS)
    train(second, [0, 1])
    assert_equal(second, first, rtol=1e-4, atol=1e-4)


def test_a_job_keeps_the_policy_it_was_made_with() -> None:
    method = learner(ravl_configs(), SEEDS)
    job = method.rollout_jobs(0)[0]
    before = job.run(method.dynamics).rows[0]
    method.add_rollouts(run_jobs(method, 0))
    method.train_epoch(0)
    assert torch.equal(job.run(method.dynamics).rows[0], before)
    assert not torch.equal(method.rollout_jobs(0)[0].run(method.dynamics).rows[0][:60], before[:60])


def lengths_by_hand(tags: Tensor, starts: int) -> dict[str, float]:
    made = [starts, *(int((tags.abs() == step).sum()) for step in (1, 2, 3)), 0]  # rollouts at least so long
    lengths = np.repeat([0, 1, 2, 3], -np.diff(made))
    percentiles = np.percentile(lengths, [10, 50, 90], method="inverted_cdf")
    return {f"rollout/length_p{p}": float(n) for p, n in zip((10, 50, 90), percentiles, strict=True)}


@pytest.mark.parametrize("starts", [60, SHARD_ROWS + 60], ids=["one shard", "two shards"])
def test_rollout_metrics_are_those_of_the_rows(starts: int) -> None:
    configs = mopo_configs(rollout_batch=starts)
    method = learner(configs, SEEDS)
    results = run_jobs(method, 0)
    metrics = method.add_rollouts(results)
    for m in range(4):
        rows = torch.cat([r.rows[0] for r in results if r.members == (m,)])
        assert torch.equal(method.replay.member_rows(m), rows)
        tags = torch.cat([r.tags[0] for r in results if r.members == (m,)])
        assert torch.equal(method.replay.member_tags(m), tags)
        assert sorted(tags.abs().unique().tolist()) == [1, 2, 3]
        assert metrics[m] == pytest.approx({
            "rollout/transitions": len(rows), "rollout/mean_length": len(rows) / starts,
            "rollout/terminal_share": float(rows[:, D].mean()), "rollout/reward_mean": float(rows[:, R].mean()),
            "rollout/dropped": 0.0, "rollout/penalty_mean": metrics[m]["rollout/penalty_mean"],
            "rollout/penalty_coef": configs[m].penalty_coef, "rollout/epochs_held": 1.0,
            **lengths_by_hand(tags, starts),
        }, rel=1e-5)  # fmt: skip
        assert 0 < rows[:, D].mean() < 1
        assert starts < len(rows) < 3 * starts


def test_filtered_rollouts_are_filtered_and_measured() -> None:
    """Shards of at most so many starts, the plain ensemble beside the filter, and cuts in the metrics."""
    configs = filtered(mopo_configs(rollout_batch=FILTERED_SHARD_ROWS + 60), cut="drop")
    method = learner(configs, SEEDS)
    assert isinstance(method.dynamics, FilteredDynamics)
    assert method.dynamics.ensemble is method.ensemble
    assert method.dynamics.reward.num_discriminators == 3
    jobs = method.rollout_jobs(0)
    assert {job.starts.shape[1] for job in jobs} == {FILTERED_SHARD_ROWS, 60}
    results = [job.run(method.dynamics) for job in jobs]
    metrics = method.add_rollouts(results)
    for m in range(4):
        mine = [r.statistics[0] for r in results if r.members == (m,)]
        cut, made = sum(s.cut for s in mine), sum(s.transitions for s in mine)
        assert 0 < cut < FILTERED_SHARD_ROWS
        assert metrics[m]["rollout/cut_share"] == cut / (FILTERED_SHARD_ROWS + 60)
        mean = sum(s.dynamics_reward_sum for s in mine) / (made + cut)
        assert metrics[m]["rollout/dynamics_reward_mean"] == pytest.approx(mean)
        assert 0.3133 < mean < 1.3133
        rows = method.replay.member_rows(m)
        rows = rows[rows[:, D] == 0]  # terminals are kept, whatever their reward
        reward = method.dynamics.reward(rows[:, : OBS + ACT], rows[:, None, D + 1 :])
        assert float(reward.min()) >= 0.75 - 1e-5  # the threshold
    plain = learner(mopo_configs(), SEEDS)
    assert plain.dynamics is plain.ensemble


def test_a_ring_forgets_the_oldest_epochs() -> None:
    method = learner(ravl_configs(), SEEDS)
    by_epoch = []
    for epoch in range(6):
        results = run_jobs(method, epoch)
        method.add_rollouts(results)
        by_epoch.append(set(map(tuple, results[0].rows[0].tolist())))
    kept = set(map(tuple, method.replay.member_rows(0).tolist()))
    assert len(kept) == 2 * 60 * 3  # rows of 2 epochs of full length
    assert by_epoch[5] | by_epoch[4] <= kept
    assert not by_epoch[0] & kept


# ---- the methods ----------------------------------------------------------------------------------------------------


def test_mopo_lowers_rewards_by_the_penalty_and_ravl_has_none() -> None:
    config = MOPOConfig(penalty_coef=2.0, **SMALL)
    free = MOPOConfig(penalty_coef=0.0, **SMALL)
    penalised, plain = (learner([c], [3]) for c in (config, free))
    with_penalty, without = penalised.rollout_jobs(0)[0], plain.rollout_jobs(0)[0]
    result = with_penalty.run(penalised.dynamics)
    mine, other = result.rows[0], without.run(plain.dynamics).rows[0]
    assert isinstance(penalised.dynamics, Ensemble)
    _, std = penalised.dynamics.predict_all(mine[:, : OBS + ACT])
    norm = std.square().sum(-1).sqrt().max(0).values  # over all 3 members, 2 are elites
    torch.testing.assert_close(mine[:, R], other[:, R] - 2.0 * norm, rtol=1e-4, atol=1e-5)
    assert norm.min() > 0.01
    metrics = penalised.add_rollouts([result])[0]
    assert metrics["rollout/penalty_mean"] == pytest.approx(float(norm.mean()), rel=1e-4)

    ravl = learner([RAVLConfig(num_critics=2, **SMALL)], [3])
    job = ravl.rollout_jobs(0)[0]
    assert job.penalty is None
    (rows,) = job.run(ravl.dynamics).rows
    torch.testing.assert_close(rows[:60, R], other[:60, R], rtol=1e-4, atol=1e-5)
    assert "rollout/penalty_mean" not in ravl.add_rollouts(run_jobs(ravl, 0))[0]


def test_the_penalty_reaches_the_values() -> None:
    configs = [MOPOConfig(penalty_coef=p, **{**SMALL, "real_ratio": 0.0}) for p in (0.0, 5.0)]
    pack = learner(configs, [3, 3])
    q = [m["train/target_q"] for m in train(pack, [0, 1])[-1]]
    assert isinstance(pack.dynamics, Ensemble)
    _, std = pack.dynamics.predict_all(torch.cat((data().observations, data().actions), 1))
    assert q[1] < q[0] - 2.5 * float(std.norm(dim=-1).amax(0).mean())


def test_a_cosine_schedule_lowers_the_actors_rate_alone() -> None:
    """Epoch e of E: 0.5 * (1 + cos(pi e / E)) of the rate, as OfflineRL-Kit's scheduler steps once per epoch. After
    epoch 0 of 3 a run with 0.75 of the actor's rate and no schedule goes on the same way."""
    settings = {**SMALL, "num_updates": 90}
    cosine = learner([RAVLConfig(num_critics=2, actor_lr=1e-3, actor_lr_schedule="cosine", **settings)], [1])
    constant = learner([RAVLConfig(num_critics=2, actor_lr=1e-3, **settings)], [1])
    train(cosine, [0])
    train(constant, [0])
    assert_equal(cosine, constant)
    lower = learner([RAVLConfig(num_critics=2, actor_lr=0.75e-3, **settings)], [1])
    lower.load_state_dict(cosine.state_dict())
    for method in (cosine, constant, lower):
        train(method, [1])
    assert_equal(cosine, lower, rtol=1e-5, atol=1e-6)
    assert (networks(cosine, 0) - networks(constant, 0)).abs().max() > 1e-3


def test_the_temperature_is_bounded_where_a_bound_is_set() -> None:
    pack = learner([MOPOConfig(max_alpha=0.5, **SMALL)], [0])
    assert train(pack, [0])[-1][0]["train/alpha"] == 0.5
    free = learner([MOPOConfig(**SMALL)], [0])
    assert train(free, [0])[-1][0]["train/alpha"] > 0.5


# ---- the stage ------------------------------------------------------------------------------------------------------


def test_the_ensemble_is_a_stage_that_reports() -> None:
    reports: list[tuple[int, dict[str, float]]] = []
    stages = RAVL.stages(RAVLConfig(dynamics=DYNAMICS))
    assert list(stages) == ["dynamics"]
    state = stages["dynamics"].build(data(), lambda step, metrics: reports.append((step, dict(metrics))))
    assert [step for step, _ in reports] == list(range(20))
    assert set(reports[0][1]) == {"train_loss", "holdout_mse_best", "holdout_mse_mean", "learning_rate"}
    errors = [metrics["holdout_mse_best"] for _, metrics in reports]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = Ensemble.from_state_dict(torch.load(file, weights_only=True))
    for name, tensor in artifacts()["dynamics"]["tensors"].items():
        assert torch.equal(again.tensors[name], tensor)


def test_the_stage_names_every_setting_it_depends_on() -> None:
    """Two runs share an ensemble exactly if their dynamics settings agree, whatever else differs."""
    one = RAVL.stages(RAVLConfig(dynamics=DYNAMICS))["dynamics"]
    other_method = MOPO.stages(MOPOConfig(dynamics=DYNAMICS, penalty_coef=3.0))["dynamics"]
    assert (one.kind, one.settings) == (other_method.kind, other_method.settings)
    for name, value in {"seed": 1, "max_epochs": 9, "ensemble_size": 4, "holdout_fraction": 0.3}.items():
        changed = DynamicsConfig(**{**vars(DYNAMICS), name: value})
        assert RAVL.stages(RAVLConfig(dynamics=changed))["dynamics"].settings != one.settings, name


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_critics": 0}, r"method\.num_critics=0 must be greater than 0"),
        ({"batch_size": 0}, r"method\.batch_size=0 must be greater than 0"),
        ({"num_updates": 0}, r"method\.num_updates=0 must be greater than 0"),
        ({"updates_per_epoch": -1}, r"method\.updates_per_epoch=-1 must be greater than 0"),
        ({"rollout_length": 0}, r"method\.rollout_length=0 must be greater than 0"),
        ({"rollout_batch": 0}, r"method\.rollout_batch=0 must be greater than 0"),
        ({"rollout_epochs_retained": 0}, r"method\.rollout_epochs_retained=0 must be greater than 0"),
        ({"actor_lr": 0.0}, r"method\.actor_lr=0\.0 must be greater than 0"),
        ({"critic_lr": -1e-3}, r"method\.critic_lr=-0\.001 must be greater than 0"),
        ({"alpha_lr": float("nan")}, r"method\.alpha_lr=nan must be greater than 0"),
        ({"alpha": 0.0}, r"method\.alpha=0\.0 must be greater than 0"),
        ({"real_ratio": 1.1}, r"method\.real_ratio=1\.1 must lie in \[0, 1\]"),
        ({"real_ratio": -0.1}, r"method\.real_ratio=-0\.1 must lie in \[0, 1\]"),
        ({"rollout_length": 128}, r"method\.rollout_length=128 must be at most 127"),
        ({"gamma": 1.0}, r"method\.gamma=1\.0 must lie in \(0, 1\)"),
        ({"tau": 0.0}, r"method\.tau=0\.0 must lie in \(0, 1\]"),
        ({"eta": -1.0}, r"method\.eta=-1\.0 must be 0, or greater"),
        ({"eta": 1.0, "num_critics": 1}, r"method\.eta=1\.0 must be 0, or greater with method\.num_critics"),
        ({"initialisation": "xavier"}, r"method\.initialisation='xavier' must be one of edac, edac-fan-in, torch"),
        ({"actor_lr_schedule": "linear"}, r"method\.actor_lr_schedule='linear' must be constant or cosine"),
        ({"num_updates": 1500}, r"method\.num_updates=1500 must be a multiple of method\.updates_per_epoch=1000"),
        ({"hidden": []}, r"method\.hidden=\[\] needs one or more widths"),
        ({"hidden": [0]}, r"method\.hidden=\[0\] needs one or more widths"),
        ({"eta": math.nan}, r"method\.eta=nan must be 0"),
        ({"max_alpha": 0.0}, r"method\.max_alpha=0\.0 must be greater than 0"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        ModelBasedConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_quality": 0.5}, r"method\.dynamics\.filter=morec needs method\.model_quality=0, not 0\.5: what is"),
        (
            {"filter": FilterConfig(num_discriminators=41)},
            r"method\.filter\.num_discriminators=41 is more than the 40 ",
        ),
        (
            {"filter": FilterConfig(scorer="distilled"), "dynamics_reward": DynamicsRewardConfig(distil_epochs=0)},
            r"method\.filter\.scorer=distilled needs a dynamics reward with a distilled network",
        ),
    ],
)
def test_a_filter_that_cannot_be_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        ModelBasedConfig(dynamics=DynamicsConfig(filter="morec"), **changes)
    ModelBasedConfig(**changes)  # which is nothing to one without a filter


def test_an_unknown_filter_is_named() -> None:
    with pytest.raises(UserError, match=r"^method\.dynamics\.filter='best' must be none or morec$"):
        DynamicsConfig(filter="best")


def test_a_negative_penalty_is_named() -> None:
    with pytest.raises(UserError, match=r"^method\.penalty_coef=-0\.5 must be 0 or greater, and finite$"):
        MOPOConfig(penalty_coef=-0.5)
    with pytest.raises(UserError, match=r"method\.gamma=2"):
        MOPOConfig(gamma=2.0)  # what all methods check


def test_epochs_follow_from_updates() -> None:
    assert ModelBasedConfig(num_updates=6000, updates_per_epoch=1500).num_epochs == 4
