"""The model-free methods: their updates against plain torch, packs, checkpoints, and what CUDA graphs ask for."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agents import bc, optim, pack_networks, rebrac
from agents.bc import BC, BCConfig, BCUpdater
from agents.chunk import OwnNoiseUpdater
from agents.cql import CQL, CQLConfig, CQLUpdater
from agents.edac import EDAC, EDACConfig
from agents.iql import IQL, IQLConfig, IQLUpdater
from agents.method import TrainingData
from agents.model_free import ModelFree
from agents.networks import StackedMLP
from agents.rebrac import ReBRAC, ReBRACConfig, ReBRACUpdater
from agents.sac import SAC
from agents.sac_n import SACN, SACNConfig
from agents.synthetic import SyntheticConfig
from agents.td3_bc import TD3BC, TD3BCConfig, TD3BCUpdater
from envs.errors import UserError
from envs.policies import NetworkPolicy

OBS, ACT, BATCH, ROWS = 4, 2, 32, 300
W = 2 * OBS + ACT + 2
SEEDS = [5, 6, 7, 8]
SMALL: dict[str, Any] = {"hidden": [16, 16], "batch_size": BATCH, "updates_per_epoch": 15, "num_updates": 60}


def td3_bc_configs(**changes: Any) -> list[TD3BCConfig]:
    own = [
        (2.5, 0.2, 0.5, 1e-3, 1e-3),
        (0.0, 0.5, 0.3, 1e-3, 2e-3),
        (5.0, 0.0, 0.0, 2e-3, 1e-3),
        (1.0, 1.0, 0.2, 1e-3, 1e-3),
    ]
    return [
        TD3BCConfig(alpha=a, policy_noise=n, noise_clip=c, actor_lr=al, critic_lr=cl, **{**SMALL, **changes})
        for a, n, c, al, cl in own
    ]


PGD_TD3_BC = {"policy_freq": 1, "critic_updates": 2, "update_order": "actor-first", "lambda_eps": 0.1, "adam_eps": 1e-5}
PGD_IQL = {"update_order": "simultaneous", "critic_loss": "mean", "log_std_min": -20.0, "adam_eps": 1e-5}


def iql_configs(**changes: Any) -> list[IQLConfig]:
    own = [
        (0.7, 3.0, 1e-3, 1e-3, 1e-3),
        (0.9, 10.0, 2e-3, 1e-3, 1e-3),
        (0.5, 0.5, 1e-3, 2e-3, 1e-3),
        (0.7, 3.0, 1e-3, 1e-3, 3e-3),
    ]
    return [
        IQLConfig(expectile=e, beta=b, actor_lr=al, critic_lr=cl, value_lr=vl, **{**SMALL, **changes})
        for e, b, al, cl, vl in own
    ]


def sac_n_configs() -> list[SACNConfig]:
    return [SACNConfig(num_critics=3, actor_lr=lr, **SMALL) for lr in (1e-3, 2e-3, 1e-3, 5e-4)]


def edac_configs() -> list[EDACConfig]:
    return [EDACConfig(num_critics=3, eta=eta, critic_lr=1e-3, **SMALL) for eta in (1.0, 5.0, 0.5, 1.0)]


def bc_configs() -> list[BCConfig]:
    return [BCConfig(actor_lr=lr, top_fraction=0.5, **SMALL) for lr in (1e-3, 2e-3, 1e-3, 5e-4)]


def cql_configs(**changes: Any) -> list[CQLConfig]:
    own = [(10.0, 1e-3, 1.0, 5.0), (1.0, 2e-3, 2.0, 5.0), (0.0, 1e-3, 1.0, 1.0), (5.0, 1e-3, 0.5, -1.0)]
    rest = {"num_actions": 3, "critic_lr": 1e-3, "alpha_lr": 1e-3, **SMALL, **changes}
    return [CQLConfig(cql_alpha=w, actor_lr=lr, cql_temperature=t, target_action_gap=g, **rest) for w, lr, t, g in own]


CQL_OPTIONS: dict[str, Any] = {
    "lagrange": True, "max_target_backup": True, "entropy_in_target": True, "importance_sampling": False,
    "cloning_updates": 15, "reward_scale": "return-range",
}  # fmt: skip


def rebrac_configs() -> list[ReBRACConfig]:
    own = [(0.01, 0.1, 0.2), (0.1, 0.0, 0.5), (0.0, 0.01, 0.0), (1.0, 1.0, 0.2)]
    return [ReBRACConfig(actor_bc_coef=a, critic_bc_coef=c, policy_noise=n, **SMALL) for a, c, n in own]


METHODS: dict[str, tuple[type[ModelFree], list[Any]]] = {
    "td3_bc": (TD3BC, td3_bc_configs()),
    "td3_bc pgd-code": (TD3BC, td3_bc_configs(initialisation="lecun", **PGD_TD3_BC)),
    "iql": (IQL, iql_configs()),
    "iql pgd-code": (IQL, iql_configs(initialisation="lecun", actor_lr_schedule="constant", **PGD_IQL)),
    "sac_n": (SACN, sac_n_configs()),
    "edac": (EDAC, edac_configs()),
    "bc": (BC, bc_configs()),
    "cql": (CQL, cql_configs()),
    "cql options": (CQL, cql_configs(**CQL_OPTIONS)),
    "rebrac": (ReBRAC, rebrac_configs()),
}
every_method = pytest.mark.parametrize("name", METHODS)


@cache
def data() -> TrainingData:
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(ROWS, OBS, generator=g) * torch.tensor([1.0, 3.0, 0.2, 1.0]) + 0.5
    action = (0.5 * obs[:, :ACT] + 0.3 * torch.randn(ROWS, ACT, generator=g)).tanh()
    reward = -action.square().sum(1) + obs[:, 0]
    terminal = (torch.rand(ROWS, generator=g) < 0.1).float()
    next_obs = obs + 0.1 * torch.randn(ROWS, OBS, generator=g)
    starts = torch.arange(0, ROWS, 10)
    return TrainingData("Hopper-v4", obs, action, reward, next_obs, terminal, None, None, 50.0, episode_starts=starts)


def learner(name: str, members: Sequence[int] = range(4)) -> ModelFree:
    cls, configs = METHODS[name]
    return cls([configs[m] for m in members], [SEEDS[m] for m in members], data(), {})


def minibatch(number: int, num_noises: int, members: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows and noise of an update; a member's are the same in every pack."""
    g = torch.Generator().manual_seed(number)
    d, pick = data(), torch.randint(ROWS, (4, BATCH), generator=g)
    columns = (d.observations, d.actions, d.rewards.unsqueeze(1), d.terminals.unsqueeze(1), d.next_observations)
    noise = torch.randn(num_noises, 4, BATCH, ACT, generator=g)
    return torch.cat([c[pick] for c in columns], -1)[list(members)], noise[:, list(members)]


# ---- updates against plain torch ------------------------------------------------------------------------------------


class Network:
    """One network of a stack as leaf tensors, for autograd."""

    def __init__(self, stack: StackedMLP, index: int) -> None:
        pairs = zip(stack.weights, stack.biases, strict=True)
        self.layers = [(w[index].clone().requires_grad_(), b[index, 0].clone().requires_grad_()) for w, b in pairs]

    def __call__(self, x: Tensor) -> Tensor:
        for w, b in self.layers[:-1]:
            x = torch.relu(x @ w + b)
        return x @ self.layers[-1][0] + self.layers[-1][1]

    def parameters(self) -> Iterator[Tensor]:
        return (t for pair in self.layers for t in pair)

    def follow(self, other: Network, tau: float) -> None:
        with torch.no_grad():
            for mine, its in zip(self.parameters(), other.parameters(), strict=True):
                mine.lerp_(its, tau)

    def assert_equals(self, stack: StackedMLP, index: int) -> None:
        for (w, b), weight, bias in zip(self.layers, stack.weights, stack.biases, strict=True):
            torch.testing.assert_close(w.detach(), weight[index], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b.detach(), bias[index, 0], rtol=1e-4, atol=1e-5)


def adam(learning_rate: float, *networks: Network, eps: float = 1e-8) -> torch.optim.Adam:
    return torch.optim.Adam([p for network in networks for p in network.parameters()], lr=learning_rate, eps=eps)


def step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def columns(row_BW: Tensor) -> tuple[Tensor, ...]:
    obs, action, reward, done, next_obs = row_BW.split((OBS, ACT, 1, 1, OBS), dim=-1)
    return obs, action, reward.squeeze(-1), done.squeeze(-1), next_obs


@pytest.mark.parametrize("changes", [{}, PGD_TD3_BC, {"update_order": "actor-first", "critic_updates": 3}])
@pytest.mark.parametrize("member", range(4))
def test_td3_bc_is_the_papers_update(member: int, changes: dict[str, Any]) -> None:
    """Seven updates of one member written with autograd and torch's Adam, in the order of sfujim/TD3_BC and in that of
    policy-guided diffusion's code."""
    c = td3_bc_configs(**changes)[member]
    updater = TD3BCUpdater([c], [SEEDS[member]], OBS, ACT)
    actor, target_actor = Network(updater.actor, 0), Network(updater.actor, 0)
    critics, targets = ([Network(updater.critic, i) for i in range(2)] for _ in range(2))
    actor_optim = adam(c.actor_lr, actor, eps=c.adam_eps)
    critic_optim = adam(c.critic_lr, *critics, eps=c.adam_eps)
    start = updater.actor.flat.clone()
    for i in range(7):
        rows, noise = minibatch(i, c.critic_updates, [member])
        turn = i % c.policy_freq
        metrics = updater.update(rows, noise, turn, with_metrics=True)
        obs, action, reward, done, next_obs = columns(rows[0])

        parts = ["critics", "policy"] if c.update_order == "critics-first" else ["policy", "critics"]
        for part in parts:
            if part == "policy":
                pi = torch.tanh(actor(obs))
                q_pi = critics[0](torch.cat((obs, pi), -1))
                weight = c.alpha / (q_pi.abs().mean().detach() + c.lambda_eps)
                actor_loss = -weight * q_pi.mean() + torch.nn.functional.mse_loss(pi, action)
                if turn == c.policy_freq - 1:
                    step(actor_optim, actor_loss)
                continue
            for eps in noise[:, 0]:
                with torch.no_grad():
                    smoothing = (eps * c.policy_noise).clamp(-c.noise_clip, c.noise_clip)
                    next_action = (torch.tanh(target_actor(next_obs)) + smoothing).clamp(-1, 1)
                    next_q = torch.minimum(*(q(torch.cat((next_obs, next_action), -1)) for q in targets)).squeeze(-1)
                    y = reward + 0.99 * (1 - done) * next_q
                values = [q(torch.cat((obs, action), -1)).squeeze(-1) for q in critics]
                critic_loss = torch.stack([(q - y).square().mean() for q in values]).sum()
                step(critic_optim, critic_loss)
        if turn == c.policy_freq - 1:
            for target, source in zip([*targets, target_actor], [*critics, actor], strict=True):
                target.follow(source, c.tau)
        assert metrics is not None
        assert float(metrics["critic_loss"]) == pytest.approx(critic_loss.item(), rel=1e-4)
        assert float(metrics["actor_loss"]) == pytest.approx(actor_loss.item(), rel=1e-4, abs=1e-5)
        assert float(metrics["target_q"]) == pytest.approx(float(y.mean()), rel=1e-4)
    actor.assert_equals(updater.actor, 0)
    target_actor.assert_equals(updater.target_actor, 0)
    for i in range(2):
        critics[i].assert_equals(updater.critic, i)
        targets[i].assert_equals(updater.target_critic, i)
    assert (updater.actor.flat - start).abs().max() > 1e-3  # far beyond the tolerance


@pytest.mark.parametrize("changes", [{}, PGD_IQL])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("member", range(4))
def test_iql_is_the_papers_update(member: int, deterministic: bool, changes: dict[str, Any]) -> None:
    """Six updates of one member written with autograd, torch's distributions and Adam, in the order of
    ikostrikov/implicit_q_learning and in that of policy-guided diffusion's code; one log standard deviation lies beyond
    its bound, where it has no gradient."""
    schedule = "constant" if member == 3 else "cosine"
    c = iql_configs(deterministic=deterministic, actor_lr_schedule=schedule, **changes)[member]
    updater = IQLUpdater([c], [SEEDS[member]], OBS, ACT)
    updater.log_std.flat.copy_(torch.tensor([-0.5, 2.5]))
    actor, value = Network(updater.actor, 0), Network(updater.value, 0)
    critics, targets = ([Network(updater.critic, i) for i in range(2)] for _ in range(2))
    log_std = updater.log_std.flat.clone().requires_grad_()
    actor_optim = torch.optim.Adam([*actor.parameters(), log_std], lr=c.actor_lr, eps=c.adam_eps)
    value_optim, critic_optim = adam(c.value_lr, value, eps=c.adam_eps), adam(c.critic_lr, *critics, eps=c.adam_eps)
    for i in range(6):
        rows, noise = minibatch(i, 0, [member])
        metrics = updater.update(rows, noise, 0, with_metrics=True)
        obs, action, reward, done, next_obs = columns(rows[0])
        state_action = torch.cat((obs, action), -1)
        with torch.no_grad():
            q_data = torch.minimum(*(q(state_action) for q in targets)).squeeze(-1)
        u = q_data - value(obs).squeeze(-1)
        value_loss = (torch.where(u > 0, c.expectile, 1 - c.expectile) * u.square()).mean()
        next_v = value(next_obs).squeeze(-1).detach()
        step(value_optim, value_loss)
        with torch.no_grad():
            if c.update_order == "sequential":
                u, next_v = q_data - value(obs).squeeze(-1), value(next_obs).squeeze(-1)
            weight = torch.exp(c.beta * u.detach()).clamp(max=100.0)
            y = reward + 0.99 * (1 - done) * next_v
        mean = torch.tanh(actor(obs))
        if deterministic:
            loss = (weight * (mean - action).square().sum(-1)).mean()
        else:
            log_prob = torch.distributions.Normal(mean, log_std.clamp(c.log_std_min, 2).exp()).log_prob(action).sum(-1)
            loss = -(weight * log_prob).mean()
        if schedule == "cosine":
            actor_optim.param_groups[0]["lr"] = c.actor_lr * 0.5 * (1 + math.cos(math.pi * i / c.num_updates))
        step(actor_optim, loss)
        values = [q(state_action).squeeze(-1) for q in critics]
        errors = torch.stack([(q - y).square().mean() for q in values])
        critic_loss = errors.mean() if c.critic_loss == "mean" else errors.sum()
        step(critic_optim, critic_loss)
        for target, source in zip(targets, critics, strict=True):
            target.follow(source, c.tau)
        assert metrics is not None
        assert float(metrics["value_loss"]) == pytest.approx(value_loss.item(), rel=1e-4)
        assert float(metrics["critic_loss"]) == pytest.approx(critic_loss.item(), rel=1e-4)
        assert float(metrics["weight"]) == pytest.approx(float(weight.mean()), rel=1e-3)
    actor.assert_equals(updater.actor, 0)
    value.assert_equals(updater.value, 0)
    for i in range(2):
        critics[i].assert_equals(updater.critic, i)
        targets[i].assert_equals(updater.target_critic, i)
    torch.testing.assert_close(updater.log_std.flat, log_std.detach(), rtol=1e-4, atol=1e-6)
    assert log_std[1].item() == 2.5
    assert (log_std[0].item() == -0.5) == deterministic


def test_the_weight_of_an_action_is_bounded() -> None:
    c = IQLConfig(beta=1e6, **SMALL)
    updater = IQLUpdater([c], [0], OBS, ACT)
    metrics = updater.update(*minibatch(0, 0, [0]), 0, with_metrics=True)
    assert metrics is not None
    assert 0 < float(metrics["weight_at_bound"]) < 1
    assert float(metrics["weight"]) <= 100.0
    assert torch.isfinite(updater.actor.flat).all()


def test_a_policy_moves_at_the_last_turn_only() -> None:
    updater = TD3BCUpdater([TD3BCConfig(**{**SMALL, "policy_freq": 3})], [0], OBS, ACT)
    assert updater.period == 3
    for turn in range(3):
        actor, targets = updater.actor.flat.clone(), updater.target_critic.flat.clone()
        updater.update(*minibatch(turn, 1, [0]), turn)
        assert torch.equal(actor, updater.actor.flat) == (turn < 2)
        assert torch.equal(targets, updater.target_critic.flat) == (turn < 2)


# ---- packs, checkpoints, survivors ----------------------------------------------------------------------------------


def tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    else:
        yield torch.as_tensor(state, dtype=torch.float64)


def assert_same(first: ModelFree, second: ModelFree, tolerance: float = 0.0) -> None:
    pairs = list(zip(tensors(first.state_dict()), tensors(second.state_dict()), strict=True))
    assert len(pairs) >= 4
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@every_method
def test_a_member_of_a_pack_ends_as_it_does_alone(name: str) -> None:
    """Three epochs of an odd number of updates, so that the turns of TD3+BC are not those of the epoch."""
    pack, before = learner(name), learner(name)
    seen = [pack.train_epoch(epoch) for epoch in range(3)]
    for m in range(4):
        alone = learner(name, [m])
        metrics = [alone.train_epoch(epoch) for epoch in range(3)]
        assert_same(pack.select([m]), alone, tolerance=1e-4)
        for mine, other in zip(metrics, seen, strict=True):
            assert mine[0] == pytest.approx(other[m], rel=1e-3, abs=1e-4)
            assert all(math.isfinite(v) for v in mine[0].values())
        moved = zip(tensors(before.select([m]).state_dict()), tensors(alone.state_dict()), strict=True)
        assert max(float((a - b).abs().max()) for a, b in moved) > 1e-2


@every_method
def test_a_restored_pack_goes_on_bitwise(name: str) -> None:
    straight, first = learner(name), learner(name)
    expected = [straight.train_epoch(epoch) for epoch in range(3)]
    first.train_epoch(0)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = learner(name)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(3)  # the global generator has no part in it
    assert [resumed.train_epoch(epoch) for epoch in (1, 2)] == expected[1:]
    assert_same(resumed, straight)


@every_method
def test_survivors_go_on_as_in_the_whole_pack(name: str) -> None:
    whole, part = learner(name), learner(name)
    whole.train_epoch(0)
    part.train_epoch(0)
    survivors = part.select([1, 3])
    untouched = [t.clone() for t in tensors(part.state_dict())]
    seen, expected = survivors.train_epoch(1), whole.train_epoch(1)
    for new, old in enumerate([1, 3]):
        assert seen[new] == pytest.approx(expected[old], rel=1e-3, abs=1e-4)
    assert_same(survivors, whole.select([1, 3]), tolerance=1e-4)
    # what was selected shares nothing with the pack that it comes from
    assert all(torch.equal(a, b) for a, b in zip(untouched, tensors(part.state_dict()), strict=True))


@every_method
def test_nothing_is_built_or_rolled_out(name: str) -> None:
    method = learner(name)
    assert METHODS[name][0].stages(METHODS[name][1][0]) == {}
    assert (method.rollout_jobs(0), method.add_rollouts([])) == ([], [{}] * 4)
    with pytest.raises(ValueError, match="nothing is generated"):
        method.rollout_model  # noqa: B018


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


def fake_item(tensor: Tensor, index: Any) -> Tensor:
    """Indexing by numbers and slices; by a mask or by row numbers it is no part of an update."""
    places = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in places:
        at = places.index(Ellipsis)
        places[at : at + 1] = [slice(None)] * (tensor.ndim - len(places) + 1)
    dim = 0
    for place in places:
        if isinstance(place, int):
            tensor = tensor.select(dim, place)
        else:
            assert isinstance(place, slice), place
            tensor, dim = torch.ops.aten.slice(tensor, dim, place.start, place.stop, place.step or 1), dim + 1
    return tensor


def fake_copy(tensor: Tensor, other: Tensor) -> Tensor:
    """An update copies on its device only."""
    assert tensor.device == other.device
    return tensor


UPDATERS: dict[str, Any] = {
    "td3_bc": TD3BCUpdater, "iql": IQLUpdater, "bc": BCUpdater, "cql": CQLUpdater, "rebrac": ReBRACUpdater,
}  # fmt: skip
CAPTURED = {name: METHODS[name][1] for name in METHODS if name.split()[0] in UPDATERS}
CAPTURED["iql deterministic"] = iql_configs(deterministic=True)


@pytest.mark.parametrize("name", CAPTURED)
def test_an_update_could_be_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under fake tensors of a GPU whatever needs a value on the host, or mixes devices, raises; and no state of an
    update is a tensor that the next one would find at another address."""
    monkeypatch.setattr(optim, "_fused_adam", lambda *_args, **_kwargs: None)  # has no fake kernel for a tensor's rate
    # a torch built without CUDA has neither for a GPU's fake tensors
    monkeypatch.setattr(Tensor, "__getitem__", fake_item)
    monkeypatch.setattr(Tensor, "copy_", fake_copy)
    monkeypatch.setattr(pack_networks, "initialise", lambda *_args, **_kwargs: None)
    with FakeTensorMode():
        updater: Any = UPDATERS[name.split()[0]](CAPTURED[name], SEEDS, OBS, ACT, "cuda")
        width = W + ACT if name == "rebrac" else W
        rows = torch.empty(4, BATCH, width, device="cuda")
        noise = torch.empty(updater.num_noises, 4, BATCH, ACT, device="cuda")
        own = {}
        if isinstance(updater, OwnNoiseUpdater):
            own["own_noise_MZ"] = torch.empty(4, updater.num_own_noises, device="cuda")
        for turn in range(updater.period):
            before = {k: id(v) for k, v in vars(updater).items()}
            metrics = updater.update(rows, noise, turn, with_metrics=True, **own)
            assert {k: id(v) for k, v in vars(updater).items()} == before
            assert metrics is not None
            assert all(v.device.type == "cuda" and v.shape == (4,) for v in metrics.values())


# ---- policies and data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardised_by", ["method", "dataset", "nobody"])
def test_a_td3_bc_policy_takes_the_observations_that_the_learner_was_given(standardised_by: str) -> None:
    plain = data()
    given = plain.standardised() if standardised_by == "dataset" else plain
    c = TD3BCConfig(**{**SMALL, "normalize_observations": standardised_by != "nobody"})
    method = TD3BC([c], [0], given, {})
    if standardised_by != "nobody":
        torch.testing.assert_close(method.data.observations.mean(0), torch.zeros(OBS), atol=1e-4, rtol=0)
    policy = NetworkPolicy(method.policy(0), "policy", "")
    assert policy.kind == "tanh"
    expected = method.updater.actor.forward(method.data.observations.unsqueeze(0))[0][0].tanh()
    actual = policy.act(given.observations.numpy(), np.random.default_rng(0))
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-4)


def test_an_iql_policy_has_its_gaussian_and_its_scaled_rewards() -> None:
    (c,) = iql_configs(reward_scale="return-range", normalize_observations=True)[:1]
    method = IQL([c], [0], data(), {})
    torch.testing.assert_close(method.data.rewards, data().rewards * 20.0)  # 1000 / 50
    method.updater.log_std.flat.copy_(torch.tensor([-0.5, -9.0]))
    policy, obs = NetworkPolicy(method.policy(0), "policy", ""), data().observations.numpy()
    mean = policy.act(obs, None)
    np.testing.assert_allclose(
        mean, method.updater.actor.forward(method.data.observations.unsqueeze(0))[0][0].tanh(), atol=1e-4
    )
    noise = np.random.default_rng(2).standard_normal(mean.shape, dtype=np.float32)
    expected = np.clip(mean + noise * np.exp(np.array([-0.5, -5.0], np.float32)), -1, 1)
    np.testing.assert_allclose(policy.act(obs, np.random.default_rng(2)), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["sac_n", "edac"])
def test_a_sac_policy_is_squashed(name: str) -> None:
    method = learner(name)
    policy = NetworkPolicy(method.policy(2), "policy", "")
    assert policy.kind == "squashed"
    sac = method.updater
    assert isinstance(sac, SAC)
    out = sac.actor.select([2]).forward(data().observations.unsqueeze(0))[0][0]
    np.testing.assert_allclose(policy.act(data().observations.numpy(), None), out[:, :ACT].tanh().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "changes", "sentence"),
    [
        (TD3BCConfig, {"alpha": -1.0}, r"method\.alpha=-1\.0 must be 0 or greater"),
        (TD3BCConfig, {"policy_freq": 0}, r"method\.policy_freq=0 must be greater than 0"),
        (TD3BCConfig, {"noise_clip": math.nan}, r"method\.noise_clip=nan must be 0 or greater"),
        (TD3BCConfig, {"tau": 0.0}, r"method\.tau=0\.0 must lie in \(0, 1\]"),
        (IQLConfig, {"expectile": 1.0}, r"method\.expectile=1\.0 must lie in \(0, 1\)"),
        (IQLConfig, {"beta": -1.0}, r"method\.beta=-1\.0 must be 0 or greater"),
        (IQLConfig, {"reward_scale": "range"}, r"method\.reward_scale='range' must be none or return-range"),
        (
            IQLConfig,
            {"initialisation": "edac"},
            r"method\.initialisation='edac' must be one of orthogonal, torch, lecun",
        ),
        (IQLConfig, {"update_order": "x"}, r"method\.update_order='x' must be sequential or simultaneous"),
        (IQLConfig, {"log_std_min": 2.0}, r"method\.log_std_min=2\.0 must be finite and less than 2\.0"),
        (TD3BCConfig, {"update_order": "x"}, r"method\.update_order='x' must be actor-first or critics-first"),
        (TD3BCConfig, {"critic_updates": 0}, r"method\.critic_updates=0 must be greater than 0"),
        (IQLConfig, {"actor_lr_schedule": "x"}, r"method\.actor_lr_schedule='x' must be constant or cosine"),
        (BCConfig, {"top_fraction": 0.0}, r"method\.top_fraction=0\.0 must lie in \(0, 1\]"),
        (CQLConfig, {"num_actions": 0}, r"method\.num_actions=0 must be greater than 0"),
        (CQLConfig, {"min_gap": 2.0, "max_gap": 1.0}, r"method\.min_gap=2\.0 must be less than method\.max_gap=1\.0"),
        (CQLConfig, {"cloning_updates": 500}, r"method\.cloning_updates=500 must be a multiple of method\.updates_per"),
        (CQLConfig, {"initialisation": "edac"}, r"method\.initialisation='edac' must be orthogonal or torch"),
        (ReBRACConfig, {"critic_bc_coef": -1.0}, r"method\.critic_bc_coef=-1\.0 must be 0 or greater"),
        (
            ReBRACConfig,
            {"synthetic": SyntheticConfig(source="ensemble")},
            r"method\.synthetic\.source=ensemble cannot be with method=rebrac",
        ),
        (SACNConfig, {"num_critics": 0}, r"method\.num_critics=0 must be greater than 0"),
        (EDACConfig, {"num_critics": 1}, r"method\.eta=1\.0 must be 0, or greater with method\.num_critics"),
    ],
)
def test_a_bad_setting_is_named(cls: type, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        cls(**changes)


# ---- what they learn ------------------------------------------------------------------------------------------------


def bandit(num_rows: int = 2000) -> TrainingData:
    """One step: reward -(a - 0.5 s)^2 of actions uniform around -0.3 of the best. Cloning misses the best by 0.3."""
    g = torch.Generator().manual_seed(1)
    obs = torch.rand(num_rows, 1, generator=g) * 2 - 1
    action = 0.5 * obs - 0.3 + (torch.rand(num_rows, 1, generator=g) - 0.5)
    reward = -(action - 0.5 * obs).square().squeeze(1)
    return TrainingData("Pendulum-v1", obs, action.clamp(-1, 1), reward, obs, torch.ones(num_rows))


def distance_to_best(method: ModelFree, epochs: int) -> float:
    for epoch in range(epochs):
        method.train_epoch(epoch)
    obs = np.linspace(-1, 1, 41, dtype=np.float32)[:, None]
    return float(np.abs(NetworkPolicy(method.policy(0), "policy", "").act(obs, None) - 0.5 * obs).mean())


FAST: dict[str, Any] = {
    "hidden": [32, 32], "batch_size": 128, "updates_per_epoch": 500, "num_updates": 1000, "actor_lr": 2e-3,
    "critic_lr": 2e-3,
}  # fmt: skip
FEWER_ROWS = {"batch_size": 64, "updates_per_epoch": 250, "num_updates": 500}


def test_td3_bc_goes_beyond_cloning_as_far_as_its_weight_lets_it() -> None:
    cloned, weighed = (
        distance_to_best(TD3BC([TD3BCConfig(alpha=a, **FAST)], [0], bandit(), {}), 2) for a in (0.0, 2.5)
    )
    assert cloned == pytest.approx(0.3, abs=0.06)
    assert weighed < 0.15


def test_iql_prefers_the_better_actions_of_the_data() -> None:
    cloned, weighed = (
        distance_to_best(IQL([IQLConfig(beta=b, expectile=0.8, value_lr=2e-3, **FAST)], [0], bandit(), {}), 2)
        for b in (0.0, 20.0)
    )
    assert cloned == pytest.approx(0.3, abs=0.06)
    assert weighed < 0.15


def test_cql_values_what_the_data_hold() -> None:
    """With a weight the critics' values of actions that the data do not have fall far below those of the data's; and
    the policy goes beyond cloning all the same."""
    gaps = []
    for weight in (0.0, 0.05):
        c = CQLConfig(cql_alpha=weight, num_actions=2, alpha=0.01, auto_alpha=False, **{**FAST, **FEWER_ROWS})
        method = CQL([c], [0], bandit(), {})
        distance = distance_to_best(method, 2)
        obs = method.data.observations[:200]
        values = [
            method.updater.critic.values(torch.cat((obs, action), -1).unsqueeze(0)).mean()
            for action in (method.data.actions[:200], torch.ones(200, 1))
        ]
        gaps.append(float(values[0] - values[1]))
    assert gaps[0] < 0.5
    assert gaps[1] > 5.0
    assert distance < 0.15


def test_rebrac_goes_beyond_cloning_as_far_as_its_weight_lets_it() -> None:
    cloned, weighed = (
        distance_to_best(
            ReBRAC([ReBRACConfig(actor_bc_coef=w, **{**FAST, **FEWER_ROWS})], [0], every_row_an_episode(), {}), 2
        )
        for w in (100.0, 0.1)
    )
    assert cloned == pytest.approx(0.3, abs=0.06)
    assert weighed < 0.15


def every_row_an_episode() -> TrainingData:
    plain = bandit()
    return dataclasses.replace(plain, episode_starts=torch.arange(len(plain.rewards)))


# ---- what only one of them has ---------------------------------------------------------------------------------------


def episodes() -> TrainingData:
    """Four episodes of 2, 3, 1 and 2 rows; a, s and s' count the rows; the second and the third end in a terminal."""
    rows = torch.arange(8.0)
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 0.0])
    terminals = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    starts = torch.tensor([0, 2, 5, 6])
    return TrainingData(
        "Hopper-v4", rows[:, None], rows[:, None] / 10, 2.0 * rewards - 5.0, rows[:, None] + 1, terminals,
        reward_scale=2.0, reward_shift=-5.0, states=rows[:, None].double(), episode_starts=starts,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fraction", "discount", "rows", "starts"),
    [
        (0.25, 1.0, [2, 3, 4], [0]),  # returns 2, 3, 2, 2
        (0.2, 1.0, [2, 3, 4], [0]),  # at least one
        (0.5, 0.5, [5, 6, 7], [0, 1]),  # 1.5, 0.75, 2, 2
        (0.75, 0.5, [0, 1, 5, 6, 7], [0, 2, 3]),
    ],
)
def test_the_best_episodes_are_those_of_the_environments_returns(
    fraction: float, discount: float, rows: list[int], starts: list[int]
) -> None:
    """Not of the shifted rewards, by which the longest episode has the lowest return."""
    best = bc.best_episodes(episodes(), fraction, discount)
    assert best.observations[:, 0].tolist() == rows
    assert best.next_observations[:, 0].tolist() == [r + 1 for r in rows]
    assert best.states is not None
    assert best.episode_starts is not None
    assert (best.states[:, 0].tolist(), best.episode_starts.tolist()) == (rows, starts)


def test_bc_standardises_over_the_episodes_that_it_learns_from() -> None:
    method = BC([BCConfig(top_fraction=0.25, **SMALL)], [0], episodes(), {})
    assert method.replay.num_real == 3
    assert method.data.observation_mean is not None
    assert method.data.observation_mean.tolist() == [3.0]
    assert "obs_mean" in method.policy(0)


def test_rebracs_rows_hold_the_action_that_follows() -> None:
    """Rows 1 and 7 end episodes without a terminal and are left out."""
    rows = rebrac.rows_with_next_actions(episodes())
    assert rows[:, 0].tolist() == [0, 2, 3, 4, 5, 6]
    torch.testing.assert_close(rows[:, -1], torch.tensor([0.1, 0.3, 0.4, 0.0, 0.0, 0.7]))
    method = ReBRAC(rebrac_configs()[:1], [0], data(), {})
    assert method.replay.width == W + ACT
    with pytest.raises(UserError, match="says where its episodes begin"):
        rebrac.rows_with_next_actions(bandit())


def test_rebracs_policy_moves_at_the_first_turn_and_its_target_follows_what_it_was() -> None:
    updater = ReBRACUpdater([ReBRACConfig(**{**SMALL, "policy_freq": 3})], [0], OBS, ACT)
    updater.target_actor.flat.zero_()
    for turn in range(3):
        actor, targets = updater.actor.flat.clone(), updater.target_critic.flat.clone()
        rows, noise = minibatch(turn, 1, [0])
        updater.update(torch.cat((rows, rows[..., :ACT]), -1), noise, turn)
        assert torch.equal(actor, updater.actor.flat) == (turn > 0)
        assert torch.equal(targets, updater.target_critic.flat) == (turn > 0)
        if turn == 0:
            torch.testing.assert_close(updater.target_actor.flat, 0.005 * actor)


def test_cql_clones_at_first() -> None:
    """The actor's gradient while it clones against autograd's, and that cloning ends with its epochs."""
    (c,) = cql_configs(**CQL_OPTIONS)[:1]
    updater = CQLUpdater([c], [0], OBS, ACT)
    updater.cloning = True
    g = torch.Generator().manual_seed(3)
    updater.actor.weights[-1].normal_(generator=g).mul_(0.5)
    actor, scale, offset = Network(updater.actor, 0), torch.ones(1, requires_grad=True), -torch.ones(1)
    offset.requires_grad_()
    rows, noise = minibatch(0, updater.num_noises, [0])
    rows[0, 0, OBS] = 1.0  # an action at its bound has a finite density
    updater.update(rows, noise, 0, False, torch.randn(1, updater.num_own_noises, generator=g))
    obs, action, *_ = columns(rows[0])
    mean, raw = actor(obs).chunk(2, -1)
    gaussian = torch.distributions.Normal(mean, (raw * scale + offset).clamp(-20, 2).exp())
    density = torch.distributions.TransformedDistribution(gaussian, torch.distributions.TanhTransform(cache_size=1))
    drawn = torch.tanh(mean + gaussian.scale * noise[0, 0])
    u = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))
    log_jacobian = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    of_data = gaussian.log_prob(u) - log_jacobian
    loss = (density.log_prob(drawn).sum(-1) - of_data.sum(-1)).mean()  # the temperature is 1
    loss.backward()
    for mine, (weight, _) in zip(updater.actor.weight_grads, actor.layers, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(mine[0], weight.grad, rtol=1e-3, atol=1e-4)
    assert scale.grad is not None
    assert offset.grad is not None
    torch.testing.assert_close(updater.log_std_scale.grad, scale.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(updater.log_std_offset.grad, offset.grad, rtol=1e-3, atol=1e-4)
    method = learner("cql options", [0])
    assert isinstance(method.updater, CQLUpdater)
    cloned = []
    for epoch in range(2):
        method.train_epoch(epoch)
        cloned.append(method.updater.cloning)
    assert cloned == [True, False]


def test_a_cql_policy_holds_what_scales_its_standard_deviation() -> None:
    method = learner("cql")
    method.train_epoch(0)
    updater = method.updater
    assert isinstance(updater, CQLUpdater)
    policy = NetworkPolicy(method.policy(2), "policy", "")
    obs, noise = data().observations, np.random.default_rng(5).standard_normal((ROWS, ACT), dtype=np.float32)
    made = updater._policy(method.data.observations.expand(4, -1, -1))
    expected = torch.tanh(made.mean_MBA + made.log_std_MBA.exp() * torch.from_numpy(noise))[2]
    np.testing.assert_allclose(policy.act(obs.numpy(), np.random.default_rng(5)), expected, atol=1e-4)
    actor = method.actor()
    torch.testing.assert_close(
        actor.sample(obs.expand(4, -1, -1), torch.from_numpy(noise))[2], expected, atol=1e-4, rtol=0
    )


def test_cql_takes_the_noise_that_its_configuration_names() -> None:
    for changes in ({}, CQL_OPTIONS):
        c = cql_configs(**changes)[0]
        assert c.own_noises(OBS, ACT) == CQLUpdater([c], [0], OBS, ACT).num_own_noises
