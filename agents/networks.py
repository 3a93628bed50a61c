"""Stacks of multi-layer perceptrons that compute with one batched matrix product per layer.

Shape suffixes used in this package: M member of a pack, N critic, E ensemble member, G = all leading axes of a
stack flattened (M*N or M*E), B batch row, S observation, A action, H hidden unit.

Gradients are written out instead of recorded. The networks here are small, so on a CPU the bookkeeping of a recorded
graph costs as much as the arithmetic, and writing them out leaves away the gradients nobody uses (critic weights in the
actor's pass, the input gradient in the critics' pass). `tests/agents/test_networks.py` holds every one of them
against autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

_relu_backward = torch.ops.aten.threshold_backward


class StackedMLP:
    """G independent ReLU networks with the same sizes, stored in one flat vector.

    Every layer is a contiguous block `(G, in, out)` of `flat`, so an optimiser step or a Polyak average is one pass
    over one vector, and a layer of all G networks is one `baddbmm`.

    Args:
        lead: the leading axes, e.g. `(M,)` for actors or `(M, N)` for critics; G is their product.
        sizes: input width, hidden widths, output width.
        device: where the parameters live.
    """

    def __init__(self, lead: Sequence[int], sizes: Sequence[int], device: torch.device | str = "cpu") -> None:
        if len(sizes) < 3:
            raise ValueError(f"a StackedMLP needs at least one hidden layer, got sizes {tuple(sizes)}")
        self.lead = tuple(lead)
        self.sizes = tuple(sizes)
        self.num_stacked = math.prod(self.lead)
        self.flat = torch.zeros(self._size(), device=device)
        self.grad = torch.zeros_like(self.flat)
        self.weights, self.biases = self._views(self.flat)
        self.weight_grads, self.bias_grads = self._views(self.grad)

    def _size(self) -> int:
        return self.num_stacked * sum((i + 1) * o for i, o in pairwise(self.sizes))

    def _views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        weights, biases, offset, g = [], [], 0, self.num_stacked
        for n_in, n_out in pairwise(self.sizes):
            weights.append(flat[offset : offset + g * n_in * n_out].view(g, n_in, n_out))
            offset += g * n_in * n_out
            biases.append(flat[offset : offset + g * n_out].view(g, 1, n_out))
            offset += g * n_out
        return weights, biases

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """The layers of a vector laid out like `flat`, each as `(*lead, -1)`: weight, bias, weight, bias, ..."""
        weights, biases = self._views(flat)
        return [t.view(*self.lead, -1) for pair in zip(weights, biases, strict=True) for t in pair]

    def clone(self) -> StackedMLP:
        """A copy with its own parameters (a target network)."""
        return self.to(self.flat.device)

    def to(self, device: torch.device | str) -> StackedMLP:
        """A copy on another device."""
        other = StackedMLP(self.lead, self.sizes, device)
        other.flat.copy_(self.flat)
        return other

    def select(self, members: Sequence[int]) -> StackedMLP:
        """The networks of some members (indices into the first leading axis), copied."""
        other = StackedMLP((len(members), *self.lead[1:]), self.sizes, self.flat.device)
        gather_members(self, self.flat, other, other.flat, members)
        return other

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs and what `backward` needs.

        Args:
            x: `(G, B, in)`.

        Returns:
            `(G, B, out)` and the list of inputs of every layer (`x`, then the hidden activations).
        """
        inputs = [x]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight).relu_()
            inputs.append(x)
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]), inputs

    def hidden_gradients(self, inputs: list[Tensor], grad_out: Tensor) -> list[Tensor]:
        """d(loss)/d(pre-activation) of every hidden layer, first to last, given d(loss)/d(output) `(G, B, out)`."""
        if grad_out.shape[-1] == 1:  # one output: an outer product, cheaper than a matrix product
            delta = grad_out * self.weights[-1].mT
        else:
            delta = torch.bmm(grad_out, self.weights[-1].mT)
        deltas = [_relu_backward(delta, inputs[-1], 0)]
        for layer in range(len(self.weights) - 2, 0, -1):
            deltas.append(_relu_backward(torch.bmm(deltas[-1], self.weights[layer].mT), inputs[layer], 0))
        return deltas[::-1]

    def input_gradient(self, first_delta: Tensor, columns: slice) -> Tensor:
        """d(loss)/d(input) for some input columns, from the first entry of `hidden_gradients`."""
        return torch.bmm(first_delta, self.weights[0][:, columns].mT)

    def write_gradients(self, inputs: list[Tensor], deltas: list[Tensor], grad_out: Tensor) -> None:
        """Fill `grad` from the layers' inputs and the gradients of their outputs."""
        for layer, (x, delta) in enumerate(zip(inputs, [*deltas, grad_out], strict=True)):
            torch.bmm(x.mT, delta, out=self.weight_grads[layer])
            torch.sum(delta, dim=1, keepdim=True, out=self.bias_grads[layer])


class StackedScalar:
    """One scalar per member (log alpha), with the same interface towards the optimiser as a `StackedMLP`."""

    def __init__(self, num_members: int, value: float, device: torch.device | str = "cpu") -> None:
        self.lead = (num_members,)
        self.flat = torch.full((num_members,), value, device=device)
        self.grad = torch.zeros_like(self.flat)

    def blocks(self, flat: Tensor) -> list[Tensor]:
        return [flat.view(-1, 1)]

    def select(self, members: Sequence[int]) -> StackedScalar:
        other = StackedScalar(len(members), 0.0, self.flat.device)
        other.flat.copy_(self.flat[list(members)])
        return other


ParameterStack = StackedMLP | StackedScalar


def gather_members(
    source: ParameterStack, from_: Tensor, target: ParameterStack, to: Tensor, members: Sequence[int]
) -> None:
    """Copy the blocks of some members from a vector laid out like `source` to one laid out like `target`."""
    index = torch.as_tensor(list(members), device=from_.device)
    for src, dst in zip(source.blocks(from_), target.blocks(to), strict=True):
        dst.copy_(src.index_select(0, index))


INITIALISATIONS = ("edac", "edac-fan-in", "torch")


def initialise(network: StackedMLP, generators: Sequence[torch.Generator], *, scheme: str, last_bound: float) -> None:
    """Draw a network's parameters, one generator per member: a member starts the same in every pack.

    Args:
        scheme: "torch": weights and biases of every layer uniform in +-1/sqrt(in), torch's default.
            "edac-fan-in": hidden weights likewise, hidden biases 0.1, last layer uniform in +-`last_bound`.
            "edac": the same but +-1/sqrt(out) for the hidden weights, as the released RAVL and CORL's EDAC have it
            (their `(in, out)` weights go to an initialiser that expects `(out, in)`).
    """
    if scheme not in INITIALISATIONS:
        raise ValueError(f"unknown initialisation {scheme!r}; one of {', '.join(INITIALISATIONS)}")
    per_member = network.num_stacked // network.lead[0]
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        last = layer == len(network.weights) - 1
        _, n_in, n_out = weight.shape
        bound = 1.0 / math.sqrt(n_out if scheme == "edac" else n_in)
        if last and scheme != "torch":
            bound = last_bound
        for m, generator in enumerate(generators):
            block = slice(m * per_member, (m + 1) * per_member)
            weight[block] = torch.empty(per_member, n_in, n_out).uniform_(-bound, bound, generator=generator)
            if last or scheme == "torch":
                bias[block] = torch.empty(per_member, 1, n_out).uniform_(-bound, bound, generator=generator)
            else:
                bias[block] = 0.1
