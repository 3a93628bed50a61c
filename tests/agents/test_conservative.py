"""CQL's term on the source rows of two domains' minibatches, against autograd and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from agents.conservative import SourcePenalty, conservative_term, uniform_actions
from agents.domain_sac import DomainBatch, DomainSAC, DomainSACHyperparameters, DomainSACSettings
from agents.squashed import squashed_log_density

S, A, N, NUM_SOURCE, NUM_TARGET = 3, 2, 4, 5, 6
B, W = NUM_SOURCE + NUM_TARGET, 2 * S + A + 2


def test_soft_maximum_by_hand() -> None:
    q = torch.tensor([[[1.0], [2.0], [4.0]]])  # own action, then two drawn ones with log densities 0 and 2
    gap, grad = conservative_term(q, torch.tensor([[[0.0], [2.0]]]), torch.ones(1, 1, 1), torch.tensor([[3.0]]))
    assert float(gap) == pytest.approx(math.log(2 * math.e**2) - 1)
    torch.testing.assert_close(grad.flatten(), torch.tensor([-3.0, 1.5, 1.5]))
    gap, grad = conservative_term(q, None, torch.full((1, 1, 1), 2.0), torch.tensor([[1.0]]))
    exps = [math.exp(x / 2) for x in (1, 2, 4)]
    assert float(gap) == pytest.approx(2 * math.log(sum(exps)) - 1)
    expected = torch.tensor([x / sum(exps) for x in exps]) - torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(grad.flatten(), expected)
    gap, grad = conservative_term(q, None, torch.ones(1, 1, 1), torch.tensor([[1.0]]), (None, 0.5))
    assert float(gap) == 0.5
    assert not grad.any()


def test_densities() -> None:
    mean, log_std, z = torch.randn(7, A), torch.randn(7, A), torch.randn(7, A)
    u = mean + log_std.exp() * z
    policy = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    torch.testing.assert_close(
        squashed_log_density(z, log_std, u), policy.log_prob(u.double().tanh().float()).sum(-1), rtol=1e-3, atol=1e-3
    )
    uniform = uniform_actions(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    quantiles = uniform.quantile(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([-0.8, 0.0, 0.8]), rtol=0, atol=0.01)


def learner(members: int) -> DomainSAC:
    settings = DomainSACSettings(hidden=(16, 16), log_std_min=-20.0)
    return DomainSAC(
        [3 + m for m in range(members)], [DomainSACHyperparameters(critic_lr=3e-3)] * members, settings, S, A
    )


def batch(members: int) -> DomainBatch:
    rows = torch.randn(members, B, W, generator=torch.Generator().manual_seed(1))
    rows[..., S : S + A].tanh_()
    return DomainBatch(rows, NUM_SOURCE, torch.rand(members, B))


def penalty_of(members: int, weight: Tensor, importance_sampling: bool) -> SourcePenalty:
    size = SourcePenalty.noise_size(N, NUM_SOURCE, A)
    noise = torch.randn(members, size, generator=torch.Generator().manual_seed(2))
    temperature = torch.tensor([1.0, 2.0])[:members].view(-1, 1, 1)
    return SourcePenalty(weight, temperature, noise, N, importance_sampling)


def values(sac: DomainSAC, m: int, x: Tensor, leaves: list[Tensor]) -> Tensor:
    """(2, rows) of the leaves [w, b, w, b, w, b] of a member's critics."""
    w1, b1, w2, b2, w3, b3 = leaves
    return ((((x @ w1 + b1).relu() @ w2 + b2).relu()) @ w3 + b3)[..., 0]


@pytest.mark.parametrize("importance_sampling", [True, False])
def test_critics_gradient(importance_sampling: bool) -> None:
    sac, rows, weight = learner(2), batch(2), 5.0 * torch.rand(2, NUM_SOURCE)
    penalty = penalty_of(2, weight, importance_sampling)
    noise = torch.randn(2, 2, B, A)
    before = sac.select([0, 1])
    targets = sac.targets(rows.rows_MBW, noise[0]).target_MB
    metrics = sac.update(rows, noise, with_metrics=True, penalty=penalty)
    assert metrics is not None
    for m in range(2):
        critic, obs = before.critic, rows.rows_MBW[m, :NUM_SOURCE, :S]
        pairs = zip(critic.weights, critic.biases, strict=True)
        leaves = [t[2 * m : 2 * m + 2].clone().requires_grad_() for pair in pairs for t in pair]
        error = values(before, m, rows.rows_MBW[m, :, : S + A], leaves) - targets[m]
        loss = (rows.weight_MB[m] * error.square()).sum()
        draws = penalty.noise_MZ[m].view(3, N, NUM_SOURCE, A)
        scores = []
        for kind, states in enumerate((None, obs, rows.rows_MBW[m, :NUM_SOURCE, S + A + 2 :])):
            action, log_p = uniform_actions(draws[kind]), torch.full((N, NUM_SOURCE), -A * math.log(2))
            if states is not None:
                out, _ = before.actor.forward(states.expand(2, -1, -1))
                mean, log_std = out[m].split(A, -1)
                u = mean + log_std.exp() * draws[kind]
                action, log_p = u.tanh(), squashed_log_density(draws[kind], log_std, u)
            q = values(before, m, torch.cat((obs.expand(N, -1, -1), action), -1).view(-1, S + A), leaves)
            scores.append(q.view(2, N, NUM_SOURCE) - (log_p if importance_sampling else 0.0))
        own = values(before, m, rows.rows_MBW[m, :NUM_SOURCE, : S + A], leaves)
        if not importance_sampling:
            scores.append(own.unsqueeze(1))
        tau = float(penalty.temperature_M11[m])
        gap = tau * torch.logsumexp(torch.cat(scores, 1) / tau, 1) - own
        assert float(metrics["conservative_gap"][m]) == pytest.approx(float(gap.detach().mean()), rel=1e-5)
        (loss + (weight[m] * gap).sum()).backward()
        pairs = zip(sac.critic.weight_grads, sac.critic.bias_grads, strict=True)
        mine = [t[2 * m : 2 * m + 2] for pair in pairs for t in pair]
        for got, leaf in zip(mine, leaves, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)


def test_values_of_other_actions_fall() -> None:
    falls = []
    for strength in (0.0, 10.0):
        sac, rows = learner(1), batch(1)
        draw = torch.Generator().manual_seed(4)
        for _ in range(150):
            penalty = penalty_of(1, torch.full((1, NUM_SOURCE), strength / NUM_SOURCE), True)
            penalty.noise_MZ = torch.randn(penalty.noise_MZ.shape, generator=draw)
            sac.update(rows, torch.randn(2, 1, B, A, generator=draw), penalty=penalty)
        x = rows.rows_MBW[:, :NUM_SOURCE, : S + A]
        other = torch.cat((x[..., :S], -x[..., S:]), -1)
        falls.append(float((sac.critic.values(x) - sac.critic.values(other)).mean()))
    assert falls[1] > falls[0] + 0.1
