"""Small dynamics rewards for tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def linear_reward(
    weights: Sequence[Sequence[float]], obs_dim: int, act_dim: int, *, delta_input: bool = False,
    learner: Sequence[float] | None = None, expert: Sequence[float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The state of a dynamics reward whose k-th discriminator has the logit weights[k] . [s, a, s'] of unscaled inputs;
    its bounds are such that scaled inputs are 0.8 times observations and 1 times actions."""
    k = len(weights)
    scale = torch.tensor([0.8] * obs_dim + [1.0] * act_dim + [0.8] * obs_dim)
    first = torch.tensor(weights) / scale
    w0 = torch.stack((first, -first), -1)  # relu(x) - relu(-x) = x
    tensors = {
        "W0": w0, "b0": torch.zeros(k, 1, 2), "W1": torch.tensor([[1.0], [-1.0]]).repeat(k, 1, 1),
        "b1": torch.zeros(k, 1, 1),
        "learner_logit": torch.tensor([-1.0] * k if learner is None else learner),
        "expert_logit": torch.tensor([1.0] * k if expert is None else expert),
    }  # fmt: skip
    return _state(tensors, obs_dim, act_dim, delta_input)


def random_reward(
    num_discriminators: int, obs_dim: int, act_dim: int, *, hidden: Sequence[int] = (16, 32, 16), seed: int = 0,
    delta_input: bool = False, distilled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The state of a dynamics reward with random weights, whose r_D differ among candidates."""
    source = torch.Generator().manual_seed(seed)
    sizes = (2 * obs_dim + act_dim, *hidden, 1)
    tensors = _random_layers(num_discriminators, sizes, source)
    h = 1.6 * torch.rand(200, sizes[0], generator=source) - 0.8
    for i in range(len(sizes) - 1):
        h = h @ tensors[f"W{i}"] + tensors[f"b{i}"]
        h = h.relu() if i < len(sizes) - 2 else h
    ends = torch.tensor([0.2, 0.8])  # some logits of every network lie beyond its means
    tensors["learner_logit"], tensors["expert_logit"] = h.squeeze(-1).quantile(ends, dim=1)
    state = _state(tensors, obs_dim, act_dim, delta_input)
    if distilled:
        state["distilled"] = _random_layers(1, sizes, source)
    return state


def _random_layers(count: int, sizes: Sequence[int], source: torch.Generator) -> dict[str, Tensor]:
    layers = {}
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        layers[f"W{i}"] = torch.randn(count, n_in, n_out, generator=source) * (2 / n_in) ** 0.5
        layers[f"b{i}"] = 0.1 * torch.randn(count, 1, n_out, generator=source)
    return layers


def _state(tensors: dict[str, Tensor], obs_dim: int, act_dim: int, delta_input: bool) -> dict[str, Any]:
    for name, width in (("observation", obs_dim), ("action", act_dim)):
        tensors[f"{name}_low"], tensors[f"{name}_high"] = -torch.ones(width), torch.ones(width)
    return {
        "tensors": tensors, "delta_input": delta_input, "observation_dim": obs_dim,
        "snapshot_updates": [100 * (k + 1) for k in range(len(tensors["learner_logit"]))], "distilled": None,
    }  # fmt: skip
