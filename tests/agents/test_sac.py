"""The written-out gradients against autograd, and members of a pack against the same runs alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agents.networks import StackedMLP
from agents.sac import SAC, SACHyperparameters, SACSettings

OBS, ACT, BATCH = 5, 2, 32


def make(num_members: int = 1, eta: float = 0.7, num_critics: int = 4) -> SAC:
    fixed = SACSettings(num_critics=num_critics, actor_hidden=(16, 16), critic_hidden=(16, 16, 16))
    hyper = [SACHyperparameters(eta=eta, actor_lr=1e-3 * (m + 1)) for m in range(num_members)]
    return SAC(list(range(num_members)), hyper, fixed, OBS, ACT)


def batch(num_members: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_members, BATCH, 2 * OBS + ACT + 2, generator=g)
    rows[..., OBS : OBS + ACT].tanh_()
    rows[..., OBS + ACT + 1] = (torch.rand(num_members, BATCH, generator=g) < 0.2).float()
    noise = torch.randn(2, num_members, BATCH, ACT, generator=g)
    return rows, noise


def layers(network: StackedMLP) -> tuple[list[Tensor], list[Tensor]]:
    weights, biases = ([t.clone().requires_grad_() for t in group] for group in (network.weights, network.biases))
    return weights, biases


def mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.relu(x @ w + b)
    return x @ weights[-1] + biases[-1]


def policy(obs: Tensor, noise: Tensor, parameters: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor]:
    mean, log_std = mlp(obs, *parameters).split(ACT, dim=-1)
    log_std = log_std.clamp(-5.0, 2.0)
    action = torch.tanh(mean + log_std.exp() * noise)
    gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    return action, (gaussian - torch.log(1 - action**2 + 1e-6)).sum(-1)


def as_tensor(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def flat_gradient(parameters: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    return torch.cat([as_tensor(t.grad).reshape(-1) for pair in zip(*parameters, strict=True) for t in pair])


def critic_reference(sac: SAC, rows: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Gradient of sum_i mean_b (Q_i - y)^2 + eta * ES as An et al. (2021) write it, recorded by autograd."""
    parameters = layers(sac.critic)
    n, eta = sac.num_critics, sac.hyperparameters[0].eta
    obs = rows[0, :, :OBS].expand(n, BATCH, OBS)
    action = rows[0, :, OBS : OBS + ACT].expand(n, BATCH, ACT).clone().requires_grad_()
    q = mlp(torch.cat((obs, action), -1), *parameters).squeeze(-1)
    loss = ((q - target) ** 2).mean(1).sum()
    (g,) = torch.autograd.grad(q.sum(), action, create_graph=True)
    g = g / (g.norm(dim=-1, keepdim=True) + 1e-10)
    similarity = torch.einsum("iba,jba->bij", g, g) * (1 - torch.eye(n))
    diversity = similarity.sum((1, 2)).mean() / (n - 1)
    (loss + eta * diversity).backward()
    return flat_gradient(parameters), diversity.item()


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_critic_gradient_is_autograds(eta: float) -> None:
    sac = make(eta=eta)
    rows, _ = batch(1)
    target = torch.randn(1, BATCH)
    expected, diversity = critic_reference(sac, rows, target)
    _, measured = sac._update_critic(rows[..., : OBS + ACT], target, BATCH, with_metrics=True)
    torch.testing.assert_close(sac.critic.grad, expected, rtol=1e-4, atol=1e-6)
    if eta:
        assert measured is not None
        assert float(measured) == pytest.approx(diversity, rel=1e-4)


def test_actor_gradient_is_autograds() -> None:
    sac = make()
    sac.actor.biases[-1][..., ACT] = 3.0  # one log std beyond its clamp: no gradient there
    rows, noise = batch(1)
    parameters = layers(sac.actor)
    obs = rows[0, :, :OBS]
    action, log_prob = policy(obs, noise[0][0], ([t[0] for t in parameters[0]], [t[0] for t in parameters[1]]))
    q = mlp(torch.cat((obs, action), -1).expand(sac.num_critics, -1, -1), sac.critic.weights, sac.critic.biases)
    alpha = float(sac.alpha_M1)
    (alpha * log_prob - q.squeeze(-1).min(0).values).mean().backward()
    expected = flat_gradient(parameters)
    sac._update_actor(rows[..., :OBS], sac._policy(rows[..., :OBS], noise[0]), BATCH)
    torch.testing.assert_close(sac.actor.grad, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-4


def test_target_and_temperature_follow_the_equations() -> None:
    sac = make()
    rows, noise = batch(1)
    next_obs, reward, done = rows[..., OBS + ACT + 2 :], rows[..., OBS + ACT], rows[..., OBS + ACT + 1]
    group = ([t[0] for t in sac.actor.weights], [t[0] for t in sac.actor.biases])
    action, log_prob = policy(next_obs[0], noise[1][0], group)
    x = torch.cat((next_obs[0], action), -1).expand(sac.num_critics, -1, -1)
    value = mlp(x, sac.target.weights, sac.target.biases).squeeze(-1).min(0).values - sac.alpha_M1[0] * log_prob
    expected = reward[0] + 0.99 * (1 - done[0]) * value
    torch.testing.assert_close(sac._critic_target(rows, noise[1:])[0][0], expected)

    sac.step_alpha(log_prob.unsqueeze(0))
    torch.testing.assert_close(sac.log_alpha.grad, -(log_prob.mean() - ACT).view(1))
    assert float(sac.alpha_M1) != 1.0


def test_target_networks_move_by_tau() -> None:
    sac = make()
    before = sac.target.flat.clone()
    sac.update(*batch(1))
    torch.testing.assert_close(sac.target.flat, 0.995 * before + 0.005 * sac.critic.flat)


def run(sac: SAC, updates: int, members: list[int]) -> SAC:
    for i in range(updates):
        rows, noise = batch(4, seed=i)
        sac.update(rows[members], noise[:, members])
    return sac


def test_a_member_ends_as_it_does_alone() -> None:
    """Tolerance 1e-5 relative after 50 updates: the batched product may sum in another order than the single one."""
    pack = run(make(num_members=4), 50, [0, 1, 2, 3])
    fixed = pack.settings
    for m in range(4):
        alone = run(SAC([m], [pack.hyperparameters[m]], fixed, OBS, ACT), 50, [m])
        member = pack.select([m])
        for name in ("actor", "critic", "target", "log_alpha"):
            torch.testing.assert_close(getattr(member, name).flat, getattr(alone, name).flat, rtol=1e-5, atol=1e-5)


def test_selecting_members_continues_them_undisturbed() -> None:
    whole = run(make(num_members=4), 20, [0, 1, 2, 3])
    part = run(make(num_members=4), 10, [0, 1, 2, 3]).select([1, 3])
    for i in range(10, 20):
        rows, noise = batch(4, seed=i)
        part.update(rows[[1, 3]], noise[:, [1, 3]])
    expected = whole.select([1, 3])
    torch.testing.assert_close(part.critic.flat, expected.critic.flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.critic_optim.second, expected.critic_optim.second, rtol=1e-4, atol=1e-8)


def test_state_dict_restores_every_bit() -> None:
    straight = run(make(num_members=2), 6, [0, 1])
    first = run(make(num_members=2), 3, [0, 1])
    resumed = make(num_members=2)
    resumed.load_state_dict(first.state_dict())
    for i in range(3, 6):
        rows, noise = batch(4, seed=i)
        resumed.update(rows[[0, 1]], noise[:, [0, 1]])
    for name in ("actor", "critic", "target", "log_alpha"):
        assert torch.equal(getattr(resumed, name).flat, getattr(straight, name).flat)


def test_diversity_needs_two_critics() -> None:
    with pytest.raises(ValueError, match="num_critics >= 2"):
        make(num_critics=1)
