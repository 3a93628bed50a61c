"""Adam over the flat parameters of a stack, with one learning rate per member."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.networks import ParameterStack, gather_members

# what torch.optim.Adam(fused=True) calls: that class adds 50 us of bookkeeping to each of three steps an update
_fused_adam = torch._fused_adam_


@dataclass
class _Group:
    """What one call of the kernel updates."""

    learning_rate: float
    rate: float | Tensor  # learning rate times scale; on a GPU a tensor, which a captured graph reads
    params: list[Tensor]
    grads: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    step: Tensor  # count of updates


class Adam:
    """Adam (Kingma & Ba 2015) with torch's fused kernel.

    Members that share a learning rate are updated by one call; others by one call each. The kernel is elementwise, so
    a member ends with the same bits either way.

    Args:
        network: what is optimised; its `grad` holds the gradient when `step` is called.
        learning_rates: one per member.
    """

    def __init__(self, network: ParameterStack, learning_rates: Sequence[float], eps: float = 1e-8) -> None:
        self.network = network
        self.learning_rates = [float(lr) for lr in learning_rates]
        self.eps = eps
        self.first = torch.zeros_like(network.flat)
        self.second = torch.zeros_like(network.flat)
        self._one = torch.ones((), device=network.flat.device)
        self._groups = self._make_groups()
        self._followed: Tensor | None = None
        self.scale_rates(1.0)

    def _make_groups(self) -> list[_Group]:
        vectors = (self.network.flat, self.network.grad, self.first, self.second)

        def group(learning_rate: float, split: list[list[Tensor]]) -> _Group:
            (params, grads, first, second), device = split, self.first.device
            rate = torch.tensor(learning_rate, device=device) if device.type != "cpu" else learning_rate
            return _Group(learning_rate, rate, params, grads, first, second, torch.zeros((), device=device))

        if len(set(self.learning_rates)) == 1:
            return [group(self.learning_rates[0], [[v] for v in vectors])]
        return [
            group(lr, [[block[m] for block in self.network.blocks(v)] for v in vectors])
            for m, lr in enumerate(self.learning_rates)
        ]

    def scale_rates(self, scale: float) -> None:
        """Multiply every member's learning rate with the value of a schedule."""
        self.scale = scale
        for g in self._groups:
            if isinstance(g.rate, Tensor):
                g.rate.fill_(g.learning_rate * scale)
            else:
                g.rate = g.learning_rate * scale

    def follow(self, scale: Tensor) -> None:
        """Multiply every member's learning rate with what a tensor `()` holds at each step: for a schedule by updates,
        which a captured graph could not be told otherwise."""
        self._followed = scale
        for g in self._groups:
            g.rate = torch.full_like(scale, g.learning_rate)

    def step(self) -> None:
        """One update of every member from `network.grad`."""
        for g in self._groups:
            g.step.add_(self._one)
            if self._followed is not None and isinstance(g.rate, Tensor):
                torch.mul(self._followed, g.learning_rate, out=g.rate)
            _fused_adam(
                g.params, g.grads, g.first, g.second, [], [g.step] * len(g.params), amsgrad=False,
                lr=g.rate, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=self.eps, maximize=False,
            )  # fmt: skip

    def select(self, network: ParameterStack, members: Sequence[int]) -> Adam:
        """The optimiser of `network = self.network.select(members)`, with its moments."""
        other = Adam(network, [self.learning_rates[m] for m in members], self.eps)
        gather_members(self.network, self.first, network, other.first, members)
        gather_members(self.network, self.second, network, other.second, members)
        other.scale_rates(self.scale)
        other._set_steps(self._num_steps())
        return other

    def _num_steps(self) -> float:
        return float(self._groups[0].step)

    def _set_steps(self, value: float) -> None:
        for group in self._groups:
            group.step.fill_(value)

    def state_dict(self) -> dict[str, Tensor | float]:
        return {"first": self.first, "second": self.second, "steps": self._num_steps()}

    def load_state_dict(self, state: dict[str, Tensor | float]) -> None:
        self.first.copy_(torch.as_tensor(state["first"]))
        self.second.copy_(torch.as_tensor(state["second"]))
        self._set_steps(float(state["steps"]))


def half_cosine(done: float) -> float:
    """What a learning rate that falls to 0 along a half cosine is multiplied with after a share of all updates."""
    return 0.5 * (1 + math.cos(math.pi * done))
