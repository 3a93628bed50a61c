"""Pools' shards from models whose denoiser is known."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.edm_sampler import SamplerConfig
from agents.guidance import GuidanceConfig
from agents.method import RolloutResult, Termination
from agents.randomness import generator
from agents.rollout import tag_steps
from agents.trajectory_diffusion import DiffusionConfig, TrajectoryModel
from agents.trajectory_rollout import TrajectoryJob
from agents.unet import UNet
from tests.agents.trajectory_models import ACT, OBS, GaussianModel, drawn_actor, exact

LENGTH, COUNT = 5, 40
R, D = OBS + ACT, OBS + ACT + 1  # columns of reward and done in a row [s, a, r, d, s']
MEMBERS, SEEDS = (4, 0, 2), (7, 8, 9)
CPU = torch.device("cpu")


def job(kind: str | None = "tanh", guidance: GuidanceConfig | None = None, **changes) -> TrajectoryJob:
    settings: dict[str, Any] = {
        "members": MEMBERS, "seeds": SEEDS, "epoch": 3, "shard": 1, "num_trajectories": COUNT,
        "actor": None if kind is None else drawn_actor(kind, members=3), "coef": torch.tensor([1.0, 0.0, 2.0]),
        "sampler": SamplerConfig(num_steps=16), "guidance": guidance or GuidanceConfig(),
        "termination": Termination("HalfCheetah-v4"), "device": CPU,
    } | changes  # fmt: skip
    return TrajectoryJob(**settings)


def part(whole: TrajectoryJob, member: int) -> TrajectoryJob:
    """The job of one of its members."""
    return dataclasses.replace(
        whole, members=(whole.members[member],), seeds=(whole.seeds[member],), coef=whole.coef[[member]],
        actor=None if whole.actor is None else whole.actor.select([member]),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["tanh", "gaussian", "squashed", None])
@pytest.mark.parametrize("rule", ["code", "score"])
def test_a_member_gathers_the_same_alone_as_in_a_pack(kind, rule):
    whole = job(kind, GuidanceConfig(rule=rule))
    together = whole.run(GaussianModel())
    assert together.members == MEMBERS
    for m in range(3):
        alone = part(whole, m).run(GaussianModel())
        torch.testing.assert_close(together.rows[m], alone.rows[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(together.tags[m], alone.tags[0])
        assert together.statistics[m].survivors == alone.statistics[0].survivors


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_network_makes_the_same_for_a_member_alone_as_in_a_pack(precision):
    config = DiffusionConfig(length=LENGTH, features=16, num_blocks=2)
    network = UNet(OBS + ACT + 2, 16, 2)
    network.initialise(generator(0, "network"))
    model = TrajectoryModel(network.stack.flat, GaussianModel().scaling, dataclasses.asdict(config))
    whole = job(sampler=SamplerConfig(num_steps=16, terminals="none", precision=precision))
    together = whole.run(model)
    for m in range(3):
        alone = part(whole, m).run(model).rows[0]
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if precision == "float32" else {"rtol": 0.05, "atol": 0.1}
        torch.testing.assert_close(together.rows[m], alone, **tolerance)


def test_a_job_is_a_function_of_its_fields_and_can_be_sent():
    whole = job()
    rows = whole.run(GaussianModel()).rows
    again = pickle.loads(pickle.dumps(whole)).run(GaussianModel()).rows
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    for changes in ({"epoch": 4}, {"shard": 2}):
        others = job(**changes).run(GaussianModel()).rows
        assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(rows, others, strict=True))


def test_a_lambda_of_0_is_the_unguided_member_bit_for_bit():
    assert torch.equal(job().run(GaussianModel()).rows[1], job(None).run(GaussianModel()).rows[1])
    off = job(coef=torch.zeros(3)).run(GaussianModel())
    assert all(torch.equal(a, b) for a, b in zip(off.rows, job(None).run(GaussianModel()).rows, strict=True))


@pytest.mark.parametrize("kind", ["tanh", "gaussian", "squashed"])
@pytest.mark.parametrize("rule", ["code", "score"])
def test_actions_get_likelier_with_lambda(kind, rule):
    coef = torch.tensor([0.0, 0.1, 0.5])
    actor = drawn_actor(kind).select([0, 0, 0])  # the same policy three times
    whole = job(kind, GuidanceConfig(rule=rule), coef=coef, actor=actor, seeds=(1, 1, 1), num_trajectories=200)
    trajectories = whole.trajectories(GaussianModel())
    obs, action = (x.flatten(1, 2) for x in (trajectories.observations, trajectories.actions))
    likelihood = actor.log_prob(obs, action.clamp(-0.99, 0.99)).mean(1)
    assert likelihood[0] < likelihood[1] < likelihood[2]


def columns(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, d, s'."""
    return rows[:, :OBS], rows[:, D], rows[:, -OBS:]


def test_rows_are_the_transitions_of_trajectories_with_their_steps():
    whole = job(sampler=SamplerConfig(num_steps=16, terminals="none"))
    result, model = whole.run(GaussianModel()), GaussianModel()
    trajectories = whole.trajectories(model)
    assert trajectories.observations.shape == (3, COUNT, LENGTH, OBS)
    for m in range(3):
        rows, tags = result.rows[m], result.tags[m]
        assert rows.shape == (COUNT * (LENGTH - 1), 2 * OBS + ACT + 2)
        steps = tag_steps(tags)
        for k in range(1, LENGTH):
            here = rows[steps == k]
            assert torch.equal(here[:, :OBS], trajectories.observations[m, :, k - 1])
            assert torch.equal(here[:, OBS:R], trajectories.actions[m, :, k - 1])
            assert torch.equal(here[:, R], trajectories.rewards[m, :, k - 1])
            assert torch.equal(here[:, -OBS:], trajectories.observations[m, :, k])
            assert torch.equal(tags[steps == k].sign(), 1 - 2 * (torch.arange(COUNT) % 2))
        assert tags.dtype == torch.int16
        assert rows[:, OBS:R].abs().max() <= 1
        statistics = result.statistics[m]
        assert statistics.transitions == len(rows)
        assert statistics.survivors == (COUNT,) * (LENGTH - 1)
        assert (statistics.terminals, statistics.dropped, statistics.penalty_sum) == (0, 0, 0.0)
        assert statistics.reward_sum == pytest.approx(float(rows[:, R].double().sum()))


def ended_at(result: RolloutResult, m: int) -> list[int]:
    """Steps of a member's terminals, by trajectory where it has one."""
    return tag_steps(result.tags[m])[result.rows[m][:, D] == 1].tolist()


def test_generated_terminals_end_trajectories():
    whole = job()
    result, trajectories = whole.run(GaussianModel()), whole.trajectories(GaussianModel())
    for m in range(3):
        done = trajectories.terminals[m, :, : LENGTH - 1].bool()
        first = [next((k for k in range(LENGTH - 1) if row[k]), LENGTH - 2) for row in done.tolist()]
        statistics = result.statistics[m]
        assert statistics.survivors == tuple(sum(f >= k for f in first) for k in range(LENGTH - 1))
        assert statistics.terminals == int(done.any(1).sum()) == len(ended_at(result, m))
        assert statistics.terminals > 10  # every other number is above the threshold here
        assert statistics.transitions == len(result.rows[m]) == sum(f + 1 for f in first)


def test_a_rare_terminal_is_rarely_generated():
    model = GaussianModel(terminal_mean=0.0, terminal_std=0.2)  # above 0.5 in 1 of 160
    statistics = job(num_trajectories=200).run(model).statistics
    assert all(0 < s.terminals < 20 for s in statistics)


def test_the_environments_rule_ends_trajectories_at_the_next_state():
    termination = Termination("Hopper-v4", torch.tensor([1.5, 0.0, 0.0]), torch.tensor([0.3, 0.12, 1.0]))
    whole = job(sampler=SamplerConfig(num_steps=16, terminals="rule"), termination=termination)
    result = whole.run(GaussianModel())
    for m in range(3):
        state, done, following = columns(result.rows[m])
        assert torch.equal(done.bool(), termination(following))
        assert 0 < result.statistics[m].terminals < COUNT
        later = tag_steps(result.tags[m]) > 1
        assert not termination(state[later]).any()


def test_rows_that_are_not_finite_are_dropped_and_counted():
    def faulty(x: Tensor, sigma: Tensor) -> Tensor:
        """Spoils a state in the middle of the first trajectory of every member."""
        out = exact(x, sigma)
        out[::COUNT, 2, 0] = math.nan
        return out

    sampler = SamplerConfig(num_steps=16, terminals="none")
    result = job(None, sampler=sampler).run(GaussianModel(denoiser=faulty))
    for m in range(3):
        assert result.rows[m].isfinite().all()
        statistics = result.statistics[m]
        assert statistics.dropped == 2  # the transitions into that state and out of it
        assert statistics.transitions == COUNT * (LENGTH - 1) - 2
        assert statistics.survivors == (COUNT, COUNT - 1, COUNT - 1, COUNT)
        assert math.isfinite(statistics.reward_sum)


def test_policies_of_other_spaces_are_refused():
    with pytest.raises(ValueError, match="cannot guide a model"):
        job().run(GaussianModel(observation_dim=4))
    with pytest.raises(ValueError, match="cannot guide a model"):
        job(actor=drawn_actor("tanh")).run(GaussianModel())


@pytest.mark.parametrize("rule", ["code", "score"])
@pytest.mark.parametrize("terminals", ["generated", "rule", "none"])
def test_a_device_is_waited_for_once_at_the_end(rule, terminals, monkeypatch):
    """On device "meta" there are no values: whatever asks for one raises."""
    monkeypatch.setattr("agents.edm_sampler.generator", lambda *_, device: None)  # there is none for this device
    read: list[Tensor] = []

    def made_up(totals: Tensor) -> list[list[float]]:
        read.append(totals)
        return [[1.0, 0.0, 2.0, 9.0, 8.0, 0.0, 0.0], [0.0] * 7, [0.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]]

    monkeypatch.setattr("agents.trajectory_rollout._read", made_up)
    device = torch.device("meta")
    here = drawn_actor("squashed", members=3)
    moments = (torch.empty(OBS, device=device), torch.empty(OBS, device=device))
    whole = job(
        guidance=GuidanceConfig(rule=rule), device=device, termination=Termination("Hopper-v4", *moments),
        actor=dataclasses.replace(here, network=here.network.to(device)),
        sampler=SamplerConfig(num_steps=16, terminals=terminals),
    )  # fmt: skip
    result = whole.run(GaussianModel(device="meta"))
    assert [tuple(totals.shape) for totals in read] == [(3, 3 + LENGTH - 1)]
    assert [len(rows) for rows in result.rows] == [17, 0, 4]
    assert {x.device.type for x in (*result.rows, *result.tags)} == {"meta"}
    assert (result.statistics[0].terminals, result.statistics[2].dropped) == (1, 3)
