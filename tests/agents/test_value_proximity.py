"""Fictitious values and the gate against hand computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agents.cross_domain import joined
from agents.domain_sac import DomainSAC, DomainSACHyperparameters, DomainSACSettings
from agents.source_filters import Accepted, accept
from agents.value_proximity import (
    Proximity,
    ValueGate,
    fictitious_values,
    gate_metrics,
    num_fictitious_noises,
    proximity,
)
from envs.termination import never_done

S, A, E, B = 3, 2, 4, 8


def learner(members: int = 1) -> DomainSAC:
    settings = DomainSACSettings(hidden=(16, 16), initialisation="vgdf")
    return DomainSAC(range(members), [DomainSACHyperparameters()] * members, settings, S, A)


def predictions(members: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = [torch.Generator().manual_seed(seed + m) for m in range(members)]
    mean = torch.stack([torch.randn(E, B, 1 + S, generator=g) for g in drawn])
    return mean, torch.stack([torch.rand(E, B, 1 + S, generator=g) for g in drawn])


def low(states: Tensor) -> Tensor:
    return states[..., 0] < -0.5


def test_values_of_the_released_code_by_hand():
    sac, (mean, variance) = learner(), predictions(1)
    obs = torch.randn(1, B, S)
    made = fictitious_values(sac, obs, (mean, variance), low, "code", torch.empty(0))
    ended = 0
    for e in range(E):
        for b in range(B):
            reward = mean[0, e, b, 0] + variance[0, e, b, 0]
            state = obs[0, b] + mean[0, e, b, 1:] + variance[0, e, b, 1:]
            mode = sac.actor.forward(state.view(1, 1, S))[0][..., :A].tanh()
            q = sac.target.values(torch.cat((state.view(1, 1, S), mode), -1)).min()
            ended += int(state[0] < -0.5)
            expected = reward + (0.0 if state[0] < -0.5 else 0.99 * q)
            torch.testing.assert_close(made[0, e, b], expected, rtol=1e-4, atol=1e-5)
    assert 0 < ended < E * B


def test_values_of_the_paper_are_of_states_and_actions_that_are_drawn():
    sac, (mean, variance) = learner(), predictions(1)
    obs = torch.randn(1, B, S)
    batch = 2 * B
    count = num_fictitious_noises("paper", E, B, batch, S, A)
    assert (count - 1) * batch * A < E * B * (S + A) <= count * batch * A
    noise = torch.randn(count, 1, batch, A)
    made = fictitious_values(sac, obs, (mean, variance), low, "paper", noise)
    numbers = noise.reshape(-1)
    of_state, of_action = numbers[: E * B * S].view(E, B, S), numbers[E * B * S :][: E * B * A].view(E, B, A)
    states = obs + mean[0, ..., 1:] + variance[0, ..., 1:].sqrt() * of_state
    out = sac.actor.forward(states.view(1, -1, S))[0]
    action = (out[..., :A] + out[..., A:].clamp(-10, 2).exp() * of_action.view(1, -1, A)).tanh()
    q = sac.target.values(torch.cat((states.view(1, -1, S), action), -1)).amin(1).view(E, B)
    torch.testing.assert_close(made[0], torch.where(low(states), 0.0, q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_member_of_a_pack_has_the_values_it_has_alone(form: str):
    pack, (mean, variance) = learner(3), predictions(3)
    obs = torch.randn(3, B, S)
    noise = torch.randn(max(1, num_fictitious_noises(form, E, B, B, S, A)), 3, B, A)
    together = fictitious_values(pack, obs, (mean, variance), low, form, noise)
    alone = fictitious_values(pack.select([2]), obs[2:], (mean[2:], variance[2:]), low, form, noise[:, 2:])
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-5)


def test_proximity_is_torchs_normal_density():
    value, fictitious = torch.randn(2, B), torch.randn(2, E, B)
    near = proximity(value, fictitious)
    expected = torch.distributions.Normal(fictitious.mean(1), fictitious.std(1) + 1e-8).log_prob(value)
    torch.testing.assert_close(near.log_density, expected)


def test_a_row_without_numbers_never_passes():
    fictitious = torch.randn(1, E, B)
    fictitious[0, 1, 3] = math.nan
    near = proximity(torch.zeros(1, B), fictitious)
    passes_MB = accept(near.log_density, 0.5, "topk").passes_MB
    assert passes_MB[0, 3] == 0
    assert passes_MB.sum() == 4


def test_as_many_rows_as_asked_for_pass_where_densities_are_zero():
    log_density = torch.linspace(-400.0, -200.0, B).unsqueeze(0)  # every density is 0 in float32
    ranked = accept(log_density, 0.25, "topk")
    assert ranked.passes_MB[0].tolist() == [0] * 6 + [1] * 2
    assert ranked.threshold_M[0] == log_density[0, 6]
    released = accept(log_density, 0.25, "quantile")
    assert released.passes_MB.sum() == 0
    assert torch.isfinite(released.threshold_M).all()
    assert torch.equal(accept(log_density / 100, 0.25, "quantile").passes_MB, ranked.passes_MB)


@pytest.mark.parametrize(("loss_weight", "of_accepted"), [("batch", 1 / B), ("accepted", 1 / 2)])
def test_accepted_rows_weigh_and_others_do_not(loss_weight: str, of_accepted: float):
    sac, prediction = learner(), predictions(1)
    rows, noise = torch.randn(1, B + 5, 2 * S + A + 2), torch.randn(1, 1, B + 5, A)
    rows[..., S + A + 1] = 0.0
    targets = sac.targets(rows, noise[0])
    gate = ValueGate("code", "topk", 0.25, loss_weight, never_done)
    batch, shown = gate(sac, lambda _: prediction, joined(rows[:, :B], rows[:, B:]), targets, noise, True)
    weight = batch.weight_MB
    reward, value = rows[0, :B, S + A], targets.value_MB[0, :B]
    fictitious = fictitious_values(sac, rows[:, :B, :S], prediction, never_done, "code", noise)
    best = proximity((reward + 0.99 * value).unsqueeze(0), fictitious).log_density[0].topk(2).indices
    expected = torch.zeros(B)
    expected[best] = of_accepted
    torch.testing.assert_close(weight[0, :B], expected)
    torch.testing.assert_close(weight[0, B:], torch.full((5,), 0.2))
    assert float(shown["gate/accepted"][0]) == 0.25
    assert batch.learned_MR is not None
    assert sorted(batch.learned_MR[0].tolist()) == weight[0].nonzero().flatten().tolist()


def test_the_gate_says_how_much_it_prefers_agreement():
    std = torch.tensor([[0.1, 0.2, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    near = Proximity(torch.zeros(1, B), torch.zeros(1, B), std, torch.ones(1, B))
    passes = torch.tensor([[1.0, 0, 0, 0, 0, 1, 1, 1]])
    shown = gate_metrics(near, Accepted(passes, torch.zeros(1), 4, None))
    assert float(shown["gate/small_spread_share"][0]) == 0.25
    assert float(shown["gate/value_gap"][0]) == 1.0
    assert float(shown["gate/fictitious_std"][0]) == pytest.approx(float(std.mean()))
