"""The learner that cross-domain methods share: gradients against autograd, packs, clipping, what moves when."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agents.domain_sac import DomainBatch, DomainSAC, DomainSACConfig, DomainSACHyperparameters, DomainSACSettings
from agents.networks import StackedMLP
from envs.errors import UserError

OBS, ACT, SOURCE, TARGET = 5, 2, 12, 8
BATCH = SOURCE + TARGET
SETTINGS = DomainSACSettings(hidden=(16, 16), actor_every=2, optimistic=True, initialisation="vgdf")


def make(num_members: int = 1, **changes: object) -> DomainSAC:
    hyper = [DomainSACHyperparameters(actor_lr=1e-3 * (m + 1), alpha=0.2 + 0.1 * m) for m in range(num_members)]
    return DomainSAC(range(num_members), hyper, replace(SETTINGS, **changes), OBS, ACT)  # type: ignore[arg-type]


def draw(num_members: int, num_noises: int = 3, seed: int = 0) -> tuple[DomainBatch, Tensor]:
    parts = []
    for m in range(num_members):
        g = torch.Generator().manual_seed(100 * seed + m)
        rows = torch.randn(BATCH, 2 * OBS + ACT + 2, generator=g)
        rows[..., OBS : OBS + ACT].tanh_()
        rows[..., OBS + ACT + 1] = (torch.rand(BATCH, generator=g) < 0.2).float()
        parts.append((rows, torch.rand(BATCH, generator=g), torch.randn(num_noises, BATCH, ACT, generator=g)))
    rows_MBW, weight_MB, noise_MKBA = (torch.stack(part) for part in zip(*parts, strict=True))
    return DomainBatch(rows_MBW, SOURCE, weight_MB), noise_MKBA.transpose(0, 1)


def recorded(network: StackedMLP) -> tuple[list[Tensor], list[Tensor]]:
    weights, biases = ([t.clone().requires_grad_() for t in group] for group in (network.weights, network.biases))
    return weights, biases


def flat(gradients: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    return torch.cat([t.grad.reshape(-1) for pair in zip(*gradients, strict=True) for t in pair])  # type: ignore[union-attr]


def mlp(x: Tensor, parameters: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    weights, biases = parameters
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.relu(x @ w + b)
    return x @ weights[-1] + biases[-1]


def sampled(obs: Tensor, noise: Tensor, parameters: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Of torch's own distributions."""
    mean, log_std = mlp(obs, parameters).chunk(2, -1)
    std = log_std.clamp(-10.0, 2.0).exp()
    u = mean + std * noise
    action = u.tanh()
    log_prob = torch.distributions.Normal(mean, std).log_prob(u).sum(-1)
    return action, log_prob - torch.log(1 - action**2 + 1e-6).sum(-1)


def test_critic_gradient_is_autograds_with_every_row_weighted():
    sac = make()
    batch, noise = draw(1)
    rows, actor, target = batch.rows_MBW[0], recorded(sac.actor), recorded(sac.target)
    s, a = OBS, ACT
    action, log_prob = sampled(rows[:, s + a + 2 :], noise[0][0], ([w[0] for w in actor[0]], [b[0] for b in actor[1]]))
    value = mlp(torch.cat((rows[:, s + a + 2 :], action), -1).expand(2, -1, -1), target)[..., 0].min(0).values
    y = (rows[:, s + a] + 0.99 * (1 - rows[:, s + a + 1]) * (value - 0.2 * log_prob)).detach()
    critic = recorded(sac.critic)
    q = mlp(rows[:, : s + a].expand(2, -1, -1), critic)[..., 0]
    loss = (batch.weight_MB[0] * (q - y).square()).sum()
    loss.backward()
    made = sac.targets(batch.rows_MBW, noise[0])
    torch.testing.assert_close(made.target_MB[0], y)
    torch.testing.assert_close(made.value_MB[0], value.detach())
    metrics = sac.update(batch, noise, 1, with_metrics=True)
    assert metrics is not None
    torch.testing.assert_close(sac.critic.grad, flat(critic), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["critic_loss"][0], loss.detach())


@pytest.mark.parametrize(("name", "extreme", "which"), [("actor", "amin", 1), ("source_actor", "amax", 2)])
def test_policies_gradients_are_autograds_toward_least_and_greatest_value(name: str, extreme: str, which: int):
    sac = make()
    network = getattr(sac, name)
    network.biases[-1][..., ACT] = 30.0  # one log standard deviation beyond its bound: no gradient there
    batch, noise = draw(1)
    sac.critic_optim.scale_rates(0.0)  # the policies see the critics after their step
    parameters = recorded(network)
    obs = batch.rows_MBW[0, :, :OBS]
    action, log_prob = sampled(obs, noise[which][0], ([w[0] for w in parameters[0]], [b[0] for b in parameters[1]]))
    q = mlp(torch.cat((obs, action), -1).expand(2, -1, -1), (sac.critic.weights, sac.critic.biases))[..., 0]
    (0.2 * log_prob - getattr(q, extreme)(0)).mean().backward()
    sac.update(batch, noise, 0)
    expected = flat(parameters)
    torch.testing.assert_close(network.grad, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-4


def test_a_member_of_a_pack_learns_as_alone():
    pack, alone = make(3, auto_alpha=True, max_grad_norm=0.05), make(3, auto_alpha=True, max_grad_norm=0.05).select([1])
    for step in range(4):
        batch, noise = draw(3, seed=step)
        pack.update(batch, noise, step % 2)
        own = DomainBatch(batch.rows_MBW[1:2], SOURCE, batch.weight_MB[1:2])
        alone.update(own, noise[:, 1:2], step % 2)
    kept = pack.select([1])
    for name, value in alone.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(kept.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_policies_and_temperature_move_in_the_first_of_every_few_updates():
    sac = make(auto_alpha=True)
    batch, noise = draw(1)
    before = {name: value.clone() for name, value in sac.state_dict().items() if isinstance(value, Tensor)}
    sac.update(batch, noise, 1, with_metrics=True)
    moved = {name: not torch.equal(value, sac.state_dict()[name]) for name, value in before.items()}
    assert moved == {"actor": False, "source_actor": False, "critic": True, "target": True, "log_alpha": False}
    sac.update(batch, noise, 0)
    assert all(not torch.equal(value, sac.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("members", [1, 3])
def test_each_member_is_clipped_by_its_own_norm(members: int):
    sac, free = make(members, max_grad_norm=0.5), make(members)
    batch, noise = draw(members)
    batch.weight_MB[0] *= 1e-4  # the first member's gradient is below the bound
    metrics = sac.update(batch, noise, 1, with_metrics=True)
    free.update(batch, noise, 1)
    assert metrics is not None
    for m in range(members):
        ours, theirs = (x.critic.select([m]) for x in (sac, free))
        pieces = [torch.cat([b[m].reshape(-1) for b in x.critic.blocks(x.critic.grad)]) for x in (sac, free)]
        norm = pieces[1].norm()
        torch.testing.assert_close(metrics["critic_grad_norm"][m], norm)
        torch.testing.assert_close(pieces[0], pieces[1] * min(1.0, 0.5 / float(norm)), rtol=1e-4, atol=1e-7)
        assert (float(norm) < 0.5) == (m == 0)
        assert torch.isfinite(ours.flat - theirs.flat).all()


def test_state_is_restored_bit_for_bit():
    sac = make(2, auto_alpha=True)
    batch, noise = draw(2)
    sac.update(batch, noise)
    kept = copy.deepcopy(sac.state_dict())
    sac.update(batch, noise)
    other = make(2, auto_alpha=True)
    other.load_state_dict(kept)
    other.update(batch, noise)
    assert all(
        torch.equal(getattr(sac, name).flat, getattr(other, name).flat)
        for name in ("actor", "source_actor", "critic", "target", "log_alpha")
    )


class RaiseFirstAction:
    """Adds 0.3 sum_k Q_k of the rows and 0.5 mean over X of Q_k^2 at zero actions to the loss."""

    def rows(self, sac: DomainSAC, batch: DomainBatch, noise_KMBA: Tensor) -> Tensor:
        obs = batch.rows_MBW[..., :OBS]
        return torch.cat((obs, torch.zeros_like(noise_KMBA[0])), -1)

    def gradient(self, q_MNB: Tensor, q_MNX: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return torch.full_like(q_MNB, 0.3), q_MNX / q_MNX.shape[-1], {"shown": q_MNX.mean((1, 2))}


def test_a_penalty_of_the_critics_adds_its_gradient():
    sac = make()
    batch, noise = draw(1, num_noises=4)
    rows = batch.rows_MBW[0, :, : OBS + ACT]
    y = sac.targets(batch.rows_MBW, noise[0]).target_MB[0].clone()
    critic = recorded(sac.critic)
    q = mlp(rows.expand(2, -1, -1), critic)[..., 0]
    still = torch.cat((rows[:, :OBS], torch.zeros(BATCH, ACT)), -1)
    extra = mlp(still.expand(2, -1, -1), critic)[..., 0]
    squared = (batch.weight_MB[0] * (q - y).square()).sum()
    (squared + 0.3 * q.sum() + 0.5 * extra.square().mean(1).sum()).backward()
    metrics = sac.update(batch, noise, 1, True, RaiseFirstAction())
    torch.testing.assert_close(sac.critic.grad, flat(critic), rtol=1e-4, atol=1e-6)
    assert metrics is not None
    torch.testing.assert_close(metrics["shown"][0], extra.mean().detach())


def test_entropy_may_be_left_out_of_the_targets():
    batch, noise = draw(1)
    sac = make(entropy_in_target=False)
    made = sac.targets(batch.rows_MBW, noise[0])
    rows = batch.rows_MBW
    expected = rows[..., OBS + ACT] + 0.99 * (1 - rows[..., OBS + ACT + 1]) * made.value_MB
    torch.testing.assert_close(made.target_MB, expected)


def test_the_released_initialisation():
    actor = DomainSAC([0], [DomainSACHyperparameters()], DomainSACSettings(initialisation="vgdf"), OBS, ACT).actor
    first, _, last = actor.weights
    assert float(first.abs().max()) <= (6 / (OBS + 256)) ** 0.5
    assert float(first.std()) == pytest.approx((2 / (OBS + 256)) ** 0.5, rel=0.05)
    assert float(last.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert all(not b.any() for b in actor.biases)


@pytest.mark.parametrize(
    "changes", [{"log_std_min": 2.0}, {"max_grad_norm": 0.0}, {"actor_every": 0}, {"alpha": 0.0, "auto_alpha": True}]
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, float]):
    with pytest.raises(UserError, match=f"method.{next(iter(changes))}"):
        DomainSACConfig(**changes)  # type: ignore[arg-type]
