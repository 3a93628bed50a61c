"""Stacked policies: their densities against torch.distributions, gradients against autograd, policy files."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from agents.actors import Actor, GaussianActor, SquashedGaussianActor, TanhActor, actor_from_arrays
from agents.networks import StackedMLP
from agents.policies import squashed_arrays, tanh_arrays
from agents.squashed import squashed_sample
from envs.errors import UserError
from envs.policies import NetworkPolicy

M, B, S, A = 3, 40, 4, 2


def network(outputs: int, seed: int = 0) -> StackedMLP:
    net = StackedMLP((M,), (S, 8, 8, outputs))
    net.flat.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed))
    return net


MEAN, STD = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.5, 2.0, 3.0, 1.0])
LOG_STD = torch.tensor([[[-1.0, 0.5]], [[0.0, -2.0]], [[0.3, 0.1]]])
TANH = TanhActor(network(A), MEAN, STD)
GAUSSIAN = GaussianActor(network(A), MEAN, STD, log_std=LOG_STD)
SQUASHED = SquashedGaussianActor(network(2 * A), MEAN, STD)
Distribution = Callable[[Tensor], Independent]


def recorded(actor: TanhActor | GaussianActor | SquashedGaussianActor, obs: Tensor) -> Independent:
    """The density by torch.distributions."""
    out = actor.network.forward((obs - MEAN) / STD)[0]
    if isinstance(actor, TanhActor):
        return Independent(Normal(out.tanh(), 1.0), 1)
    if isinstance(actor, GaussianActor):
        return Independent(Normal(out.tanh(), LOG_STD.exp()), 1)
    mean, log_std = out.chunk(2, -1)
    inner = Normal(mean, log_std.clamp(-5, 2).exp())
    return Independent(TransformedDistribution(inner, [TanhTransform()]), 1)  # type: ignore[arg-type]


def draws() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(M, B, S, generator=source), torch.rand(M, B, A, generator=source) * 1.96 - 0.98


@pytest.mark.parametrize("actor", [TANH, GAUSSIAN, SQUASHED], ids=lambda a: type(a).__name__)
def test_density_and_gradient_are_those_of_the_distribution(
    actor: TanhActor | GaussianActor | SquashedGaussianActor,
) -> None:
    obs, action = draws()
    action.requires_grad_()
    expected = recorded(actor, obs).log_prob(action)
    (gradient,) = torch.autograd.grad(expected.sum(), action)
    torch.testing.assert_close(actor.log_prob(obs, action.detach()), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actor.log_prob_gradient(obs, action.detach()), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bound", [-1.0, 1.0])
def test_a_squashed_density_is_finite_at_the_bounds(bound: float) -> None:
    obs, action = draws()[0], torch.full((M, B, A), bound)
    assert SQUASHED.log_prob(obs, action).isfinite().all()
    assert SQUASHED.log_prob_gradient(obs, action).isfinite().all()


def test_samples_are_what_the_environment_gets() -> None:
    obs, _ = draws()
    noise = torch.randn(M, B, A, generator=torch.Generator().manual_seed(2))
    x = (obs - MEAN) / STD
    torch.testing.assert_close(TANH.sample(obs, noise), TANH.network.forward(x)[0].tanh())
    clipped = (GAUSSIAN.network.forward(x)[0].tanh() + LOG_STD.exp() * noise).clamp(-1, 1)
    assert (clipped.abs() == 1).any()
    torch.testing.assert_close(GAUSSIAN.sample(obs, noise), clipped)
    plain = replace(SQUASHED, observation_mean=None, observation_std=None)
    assert torch.equal(plain.sample(obs, noise), squashed_sample(plain.network.forward(obs)[0], noise))


@pytest.mark.parametrize("actor", [TANH, GAUSSIAN, SQUASHED], ids=lambda a: type(a).__name__)
def test_members_pickling_and_tensors(actor: Actor) -> None:
    obs, action = draws()
    assert (actor.observation_dim, actor.action_dim, actor.num_members) == (S, A, M)
    whole = actor.log_prob(obs, action)
    part = actor.select([2, 0])
    assert part.num_members == 2
    torch.testing.assert_close(part.log_prob(obs[[2, 0]], action[[2, 0]]), whole[[2, 0]])
    shipped = pickle.loads(pickle.dumps(actor))
    assert torch.equal(shipped.log_prob(obs, action), whole)
    kept = actor.tensors()
    other = actor.with_tensors({name: torch.zeros_like(value) for name, value in kept.items()})
    assert not torch.equal(other.log_prob(obs, action), whole)
    assert torch.equal(other.with_tensors(kept).log_prob(obs, action), whole)


def file_arrays(kind: str, member: int) -> dict[str, np.ndarray]:
    """A policy file's arrays."""
    if kind == "squashed":
        return squashed_arrays(network(2 * A), member)
    arrays = tanh_arrays(network(A), member, LOG_STD[member, 0] if kind != "deterministic" else None)
    if kind == "gauss":
        arrays |= {"kind": np.array("gauss"), "act": np.array("tanh"), "obs_clip": np.array(1.5, np.float32)}
        arrays |= {"action_low": np.array([-2.0, 0.0]), "action_high": np.array([2.0, 10.0])}
    if kind != "deterministic":
        arrays |= {"obs_mean": MEAN.numpy() * (1 + member), "obs_var": STD.numpy() ** 2}
    return arrays


@pytest.mark.parametrize("kind", ["squashed", "deterministic", "tanh", "gauss"])
@pytest.mark.parametrize("standardised", [False, True])
def test_policy_files_act_as_their_actor(kind: str, standardised: bool) -> None:
    mean, std = (torch.tensor([0.3, 0.1, -0.2, 0.0]), torch.tensor([2.0, 1.0, 0.7, 1.5])) if standardised else (0, 1)
    files = [file_arrays(kind, m) for m in range(M)]
    moments = (mean, std) if isinstance(mean, Tensor) and isinstance(std, Tensor) else (None, None)
    actor, obs = actor_from_arrays(files, *moments), draws()[0]
    rng = np.random.default_rng(3)
    noise = torch.tensor(rng.standard_normal((B, A), dtype=np.float32))
    sampled = actor.sample(obs, noise.expand(M, B, A))
    for m, arrays in enumerate(files):
        policy = NetworkPolicy(arrays, "file", "")
        acted = policy.act((obs[m] * std + mean).numpy(), np.random.default_rng(3))
        low, high = arrays.get("action_low", -1.0), arrays.get("action_high", 1.0)
        np.testing.assert_allclose(sampled[m], (acted - low) / (high - low) * 2 - 1, atol=1e-4)
        np.testing.assert_allclose(actor.select([m]).sample(obs[m : m + 1], noise[None])[0], sampled[m], atol=1e-6)


def test_policies_of_several_kinds_do_not_stack() -> None:
    with pytest.raises(UserError, match="one kind"):
        actor_from_arrays([file_arrays("tanh", 0), file_arrays("deterministic", 1)])
    linear = {"kind": np.array("linear"), "act": np.array("none"), "Wm": np.zeros((A, S), np.float32)}
    with pytest.raises(UserError, match="hidden"):
        actor_from_arrays([linear])
