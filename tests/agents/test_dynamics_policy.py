"""The policy that maps (s, a) to s'."""

import math

import pytest
import torch
from torch.distributions import Normal

from agents.dynamics_policy import DynamicsPolicy
from agents.optim import Adam

S, A, B, C = 2, 1, 8, 3
LOW, HIGH = math.log(0.01), math.log(2.0)


def make_policy() -> DynamicsPolicy:
    policy = DynamicsPolicy(0, (S + A, 16, 2 * S), 0.01)
    policy.network.flat.add_(0.3 * torch.randn(policy.network.flat.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def distribution(policy: DynamicsPolicy, inputs_BY: torch.Tensor) -> tuple[Normal, list[torch.Tensor]]:
    """The same policy recorded by autograd, and its layers' leaves."""
    network = policy.network
    leaves = [t[0].clone().requires_grad_() for pair in zip(network.weights, network.biases, strict=True) for t in pair]
    x = inputs_BY
    for i in range(0, len(leaves), 2):
        x = x @ leaves[i] + leaves[i + 1]
        x = x.relu() if i < len(leaves) - 2 else x
    mean, raw = x.chunk(2, -1)
    return Normal(mean, torch.exp(LOW + (HIGH - LOW) * torch.sigmoid(raw))), leaves


def gradients(policy: DynamicsPolicy) -> list[torch.Tensor]:
    network = policy.network
    return [t[0] for pair in zip(network.weight_grads, network.bias_grads, strict=True) for t in pair]


def test_the_likelihood_step_has_the_gradients_of_autograd():
    policy, draw = make_policy(), torch.Generator().manual_seed(2)
    inputs, change = torch.randn(B, S + A, generator=draw), torch.randn(B, S, generator=draw)
    normal, leaves = distribution(policy, inputs)
    expected = -(normal.log_prob(change) + 0.5 * math.log(2 * math.pi)).mean()
    expected.backward()
    loss = policy.likelihood_step(Adam(policy.network, [0.0]), inputs, change)
    torch.testing.assert_close(loss, expected.detach())
    for mine, leaf in zip(gradients(policy), leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_policy_steps_have_the_gradients_of_the_clipped_objective(passes: int):
    policy, draw = make_policy(), torch.Generator().manual_seed(3)
    inputs, noise = torch.randn(B, S + A, generator=draw), torch.randn(C, B, S, generator=draw)
    reward = torch.randn(C, B, generator=draw)
    change = policy.sample(inputs, noise)
    before = distribution(policy, inputs)[0].log_prob(change).sum(-1).detach()
    others = (reward.sum(0) - reward) / (C - 1)  # the baseline: what the row's other draws have
    advantage = (reward - others) / (reward - others).std()

    rate = 0.02  # so large that ratios leave the clip after the first pass
    reached = policy.copy()
    reached.policy_steps(Adam(reached.network, [rate]), inputs, change, reward, 0.2, passes - 1) if passes > 1 else None
    normal, leaves = distribution(reached, inputs)
    normal = Normal(normal.mean, normal.stddev.detach())  # standard deviations stay
    ratio = torch.exp(normal.log_prob(change).sum(-1) - before)
    clipped = ratio.clamp(0.8, 1.2)
    assert passes == 1 or bool((ratio != clipped).any())
    (-torch.minimum(ratio * advantage, clipped * advantage).mean()).backward()
    policy.policy_steps(Adam(policy.network, [rate]), inputs, change, reward, 0.2, passes)
    for mine, leaf in zip(gradients(policy), leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-3, atol=1e-5)


def test_policy_steps_raise_the_reward_of_a_fixed_judge():
    policy, draw = make_policy(), torch.Generator().manual_seed(4)
    inputs = torch.randn(64, S + A, generator=draw)
    target = inputs[:, :S]  # the judge likes changes that equal the state
    noise = torch.randn(4, 64, S, generator=draw)

    def reward(change: torch.Tensor) -> torch.Tensor:
        return -(change - target).square().sum(-1)

    before = reward(policy.sample(inputs, noise)).mean()
    optimiser = Adam(policy.network, [1e-3])
    for _ in range(200):
        change = policy.sample(inputs, torch.randn(4, 64, S, generator=draw))
        policy.policy_steps(optimiser, inputs, change, reward(change), 0.2, 2)
    assert reward(policy.sample(inputs, noise)).mean() > 0.5 * before


def test_sampling_scales_the_standard_deviation_only():
    policy, inputs = make_policy(), torch.randn(B, S + A, generator=torch.Generator().manual_seed(5))
    noise = torch.ones(B, S)
    plain, wide, mean = (policy.sample(inputs, noise, scale) for scale in (1.0, 3.0, 0.0))
    torch.testing.assert_close(wide - mean, 3 * (plain - mean))
    assert ((plain - mean) >= 0.01).all()
