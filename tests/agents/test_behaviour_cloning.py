"""The cloning term against autograd, and that it draws a policy to the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agents.behaviour_cloning import CLONED_ACTIONS, SCALES, BehaviourCloning
from agents.domain_sac import DomainBatch, DomainSAC, DomainSACHyperparameters, DomainSACSettings
from agents.replay import transition_rows

S, A, NUM_SOURCE, NUM_TARGET = 3, 2, 6, 4
B = NUM_SOURCE + NUM_TARGET


def learner(members: int = 1) -> DomainSAC:
    settings = DomainSACSettings(hidden=(16,), log_std_min=-0.2, log_std_max=0.2)
    fast = DomainSACHyperparameters(actor_lr=1e-2, critic_lr=1e-2)
    return DomainSAC(list(range(members)), [fast] * members, settings, S, A)


def batch(seed: int, members: int = 1) -> DomainBatch:
    draw = torch.Generator().manual_seed(seed)
    obs, next_obs = (torch.randn(members, B, S, generator=draw) for _ in range(2))
    action = torch.randn(members, B, A, generator=draw).tanh()
    reward = torch.randn(members, B, generator=draw)
    rows = transition_rows(obs, action, reward, torch.zeros(members, B), next_obs)
    return DomainBatch(rows, NUM_SOURCE, torch.full((members, B), 1.0 / B))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("action", CLONED_ACTIONS)
def test_gradient(scale: str, action: str) -> None:
    sac, rows, penalty = learner(2), batch(1, 2), BehaviourCloning([2.5, 5.0], scale, action)
    out = (0.5 * torch.randn(2, B, 2 * A)).requires_grad_()  # some log standard deviations are beyond the bounds
    value, noise = torch.randn(2, B), torch.randn(penalty.num_noises, 2, B, A)
    mean, log_std = out.split(A, -1)
    u = mean
    if action == "sample":
        u = mean + log_std.clamp(-0.2, 0.2).exp() * noise[0]
    loss = (u.tanh() - rows.rows_MBW[..., S : S + A])[:, :NUM_SOURCE].square().mean((1, 2))
    (expected,) = torch.autograd.grad(loss.sum(), out)
    weight, added, metrics = penalty(sac, rows, out.detach(), value, noise)
    torch.testing.assert_close(added, expected)
    assert torch.equal(added[:, NUM_SOURCE:], torch.zeros(2, NUM_TARGET, 2 * A))
    torch.testing.assert_close(metrics["cloning_loss"], loss.detach())
    of_value = value.abs().mean(1) if scale == "value" else torch.ones(2)
    torch.testing.assert_close(weight.view(-1), torch.tensor([2.5, 5.0]) / of_value)


def distance(sac: DomainSAC, rows: Tensor) -> float:
    error = sac.sample_actions(rows[..., :S], None) - rows[..., S : S + A]
    return float(error[:, :NUM_SOURCE].square().mean())


def test_policy_is_drawn_to_the_source_actions() -> None:
    rows, ends = batch(2), []
    for coef in (0.01, 100.0):
        sac, draw = learner(), torch.Generator().manual_seed(3)
        penalty, start = BehaviourCloning([coef]), distance(learner(), rows.rows_MBW)
        for _ in range(200):
            sac.update(rows, torch.randn(3, 1, B, A, generator=draw), actor_penalty=penalty)
        ends.append(distance(sac, rows.rows_MBW))
    assert ends[0] < 0.35 * start
    assert ends[1] > 3 * ends[0]


def test_member_of_a_pack_as_alone() -> None:
    rows, penalty, draw = batch(4, 2), BehaviourCloning([0.1, 5.0]), torch.Generator().manual_seed(5)
    pack = learner(2)
    alone, own = pack.select([1]), BehaviourCloning([5.0])
    for _ in range(10):
        noise = torch.randn(3, 2, B, A, generator=draw)
        pack.update(rows, noise, actor_penalty=penalty)
        part = DomainBatch(rows.rows_MBW[1:], NUM_SOURCE, rows.weight_MB[1:])
        alone.update(part, noise[:, 1:], actor_penalty=own)
    torch.testing.assert_close(pack.select([1]).actor.flat, alone.actor.flat, rtol=0, atol=1e-6)
