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

from agents.products import affine, product, write_weight_gradient

_LAYER_NORM_EPS = 1e-6  # flax's, under the square root
_PART_BYTES = 512 * 1024  # activations of one layer of a part, so that a part's pass stays in a core's cache


def relu_gradient_(gradient: Tensor, activation: Tensor) -> Tensor:
    """Zero a gradient, in place, where the ReLU's output was zero."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0, grad_input=gradient)


class StackedMLP:
    """G independent ReLU networks with the same sizes, stored in one flat vector.

    Every layer is a contiguous block `(G, in, out)` of `flat`, so an optimiser step or a Polyak average is one pass
    over one vector, and a layer of all G networks is one `baddbmm`.

    Args:
        lead: the leading axes, e.g. `(M,)` for actors or `(M, N)` for critics; G is their product.
        sizes: input width, hidden widths, output width.
        device: where the parameters live.
        dtype: of parameters and gradients.
    """

    def __init__(
        self, lead: Sequence[int], sizes: Sequence[int], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        if len(sizes) < 3:
            raise ValueError(f"a StackedMLP needs at least one hidden layer, got sizes {tuple(sizes)}")
        self.lead = tuple(lead)
        self.sizes = tuple(sizes)
        self.num_stacked = math.prod(self.lead)
        self.flat = torch.zeros(self._size(), device=device, dtype=dtype)
        self.grad = torch.zeros_like(self.flat)
        self._set_layers(*self._views(self.flat), *self._views(self.grad))

    def _set_layers(
        self, weights: list[Tensor], biases: list[Tensor], weight_grads: list[Tensor], bias_grads: list[Tensor]
    ) -> None:
        self.weights, self.biases = weights, biases
        self.weight_grads, self.bias_grads = weight_grads, bias_grads
        # views are made once: a small update is bound by the number of calls
        self._transposed = [w.mT for w in weights]
        self._zero = torch.zeros((), device=weights[0].device)
        self._hidden_layers = list(zip(weights[:-1], biases[:-1], strict=True))
        self._input_columns: dict[tuple[int, int], Tensor] = {}
        self._parts: dict[int, list[tuple[slice, StackedMLP]]] = {}

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
        return _rebuild(type(self), self.lead, self.sizes, self.flat, device)

    def select(self, members: Sequence[int]) -> StackedMLP:
        """The networks of some members (indices into the first leading axis), copied."""
        other = type(self)((len(members), *self.lead[1:]), self.sizes, self.flat.device, self.flat.dtype)
        gather_members(self, self.flat, other, other.flat, members)
        return other

    def __reduce__(self) -> tuple[object, ...]:
        # pickled as a whole, every view would carry the whole storage again
        return _rebuild, (type(self), self.lead, self.sizes, self.flat)

    def parts(self, batch: int) -> list[tuple[slice, StackedMLP]]:
        """The stack in parts that share its storage, with their places in it.

        On a CPU a part is small enough that what one layer leaves for the next is still in the cache; elsewhere, and
        for small networks, the stack is one part.
        """
        if batch not in self._parts:
            size = self.num_stacked
            if self.flat.device.type == "cpu":
                size = max(1, _PART_BYTES // (4 * batch * max(self.sizes)))
            places = [slice(i, min(i + size, self.num_stacked)) for i in range(0, self.num_stacked, size)]
            self._parts[batch] = [(p, self._part(p)) for p in places] if len(places) > 1 else [(places[0], self)]
        return self._parts[batch]

    def of_each_member(self, index: int) -> StackedMLP:
        """Network `index` of every member, `(M,)`, sharing this stack's storage."""
        return self._part(slice(index, self.num_stacked, self.num_stacked // self.lead[0]))

    def _part(self, place: slice) -> StackedMLP:
        part = type(self).__new__(type(self))
        part.num_stacked = len(range(*place.indices(self.num_stacked)))
        part.sizes, part.lead = self.sizes, (part.num_stacked,)
        layers = (self.weights, self.biases, self.weight_grads, self.bias_grads)
        part._set_layers(*([t[place] for t in tensors] for tensors in layers))
        return part

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs and what the gradients need.

        Args:
            x: `(G, B, in)`.

        Returns:
            `(G, B, out)` and the list of inputs of every layer (`x`, then the hidden activations).
        """
        inputs = [x]
        for weight, bias in self._hidden_layers:
            x = affine(bias, x, weight, relu=True)
            inputs.append(x)
        return affine(self.biases[-1], x, self.weights[-1], relu=False), inputs

    def spread(self, x_MBX: Tensor) -> Tensor:
        """(M, B, X) -> (G, B, X): every network of a member sees the member's rows."""
        m, b, x = x_MBX.shape
        each = self.num_stacked // m
        if m == 1:
            return x_MBX.expand(each, b, x)
        return x_MBX.unsqueeze(1).expand(m, each, b, x).reshape(self.num_stacked, b, x)

    def values(self, x_MBX: Tensor) -> Tensor:
        """What the networks of every member, which have one output, make of the member's rows: `(M, G / M, B)`."""
        x_GBX = self.spread(x_MBX)
        outputs = [part.forward(x_GBX[place])[0] for place, part in self.parts(x_MBX.shape[1])]
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).view(len(x_MBX), -1, x_MBX.shape[1])

    def hidden_gradients(self, inputs: list[Tensor], grad_out: Tensor) -> list[Tensor]:
        """d(loss)/d(pre-activation) of every hidden layer, first to last, given d(loss)/d(output) `(G, B, out)`."""
        # with one output an outer product, which is cheaper than a matrix product
        first = torch.mul if grad_out.shape[-1] == 1 else torch.bmm
        deltas = [relu_gradient_(first(grad_out, self._transposed[-1]), inputs[-1])]
        for layer in range(len(self.weights) - 2, 0, -1):
            deltas.append(relu_gradient_(product(deltas[-1], self._transposed[layer]), inputs[layer]))
        return deltas[::-1]

    def input_weights(self, start: int, stop: int) -> Tensor:
        """The first layer's weights of some input columns, `(G, stop - start, H)`."""
        if (start, stop) not in self._input_columns:
            self._input_columns[start, stop] = self.weights[0][:, start:stop]
        return self._input_columns[start, stop]

    def input_gradient(self, first_delta: Tensor, start: int, stop: int) -> Tensor:
        """d(loss)/d(input) of some input columns, from the first entry of `hidden_gradients`."""
        return torch.bmm(first_delta, self.input_weights(start, stop).mT)

    def row_gradient(self, g: int, inputs: list[Tensor], rows: Tensor, start: int, stop: int) -> Tensor:
        """d(output)/d(input) of some input columns, for some rows of network `g` with one output.

        Args:
            inputs: that network's layers' inputs, `(B, width)` each.
            rows: `(n,)` row numbers.

        Returns:
            `(n, stop - start)`.
        """
        delta = self._transposed[-1][g].expand(len(rows), -1)
        for layer in range(len(self.weights) - 2, -1, -1):
            delta = torch.where(inputs[layer + 1].index_select(0, rows) > 0, delta, self._zero)
            if layer:
                delta = torch.mm(delta, self._transposed[layer][g])
        return torch.mm(delta, self.input_weights(start, stop)[g].T)

    def write_gradients(self, inputs: list[Tensor], deltas: list[Tensor], grad_out: Tensor) -> None:
        """Fill `grad` from the layers' inputs and the gradients of their outputs."""
        for layer, (x, delta) in enumerate(zip(inputs, [*deltas, grad_out], strict=True)):
            write_weight_gradient(x, delta, self.weight_grads[layer])
            torch.sum(delta, dim=1, keepdim=True, out=self.bias_grads[layer])


def _rebuild(
    kind: type[StackedMLP], lead: tuple[int, ...], sizes: tuple[int, ...], flat: Tensor,
    device: torch.device | str | None = None,
) -> StackedMLP:  # fmt: skip
    network = kind(lead, sizes, flat.device if device is None else device, flat.dtype)
    network.flat.copy_(flat)
    return network


class StackedLayerNormMLP(StackedMLP):
    """A `StackedMLP` with layer normalisation (Ba et al. 2016, arXiv 1607.06450) behind every ReLU:

        h_l = scale_l (u - mean u) / sqrt(var u + 1e-6) + shift_l,    u = relu(h_{l-1} W_l + b_l)

    with mean and variance over a row's hidden units. Scales start as 1 and shifts as 0. What `forward` returns beside
    the outputs, and `hidden_gradients`, hold more than the base class's, behind what that has.
    """

    def __init__(
        self, lead: Sequence[int], sizes: Sequence[int], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(lead, sizes, device, dtype)
        self.scales, self.shifts = self._norm_views(self.flat)
        self._scale_grads, self._shift_grads = self._norm_views(self.grad)
        for scale in self.scales:
            scale.fill_(1.0)

    def _size(self) -> int:
        return super()._size() + 2 * self.num_stacked * sum(self.sizes[1:-1])

    def _norm_views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Scales and shifts `(G, 1, H)` of every hidden layer; they lie behind the weights and biases."""
        widths = [width for width in self.sizes[1:-1] for _ in range(2)]
        pieces = flat[super()._size() :].split([self.num_stacked * width for width in widths])
        views = [piece.view(self.num_stacked, 1, width) for piece, width in zip(pieces, widths, strict=True)]
        return views[::2], views[1::2]

    def blocks(self, flat: Tensor) -> list[Tensor]:
        pairs = zip(*self._norm_views(flat), strict=True)
        return [*super().blocks(flat), *(t.view(*self.lead, -1) for pair in pairs for t in pair)]

    def _part(self, place: slice) -> StackedLayerNormMLP:
        part = super()._part(place)
        assert isinstance(part, StackedLayerNormMLP)
        for name in ("scales", "shifts", "_scale_grads", "_shift_grads"):
            setattr(part, name, [t[place] for t in getattr(self, name)])
        return part

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        inputs, norms = [x], []
        for (weight, bias), scale, shift in zip(self._hidden_layers, self.scales, self.shifts, strict=True):
            u = affine(bias, x, weight, relu=True)
            unit, mean, inverse_std = torch.native_layer_norm(u, u.shape[-1:], None, None, _LAYER_NORM_EPS)
            x = torch.addcmul(shift, unit, scale)
            inputs.append(x)
            norms += [u, unit, mean, inverse_std]
        return affine(self.biases[-1], x, self.weights[-1], relu=False), inputs + norms

    def hidden_gradients(self, inputs: list[Tensor], grad_out: Tensor) -> list[Tensor]:
        first = torch.mul if grad_out.shape[-1] == 1 else torch.bmm
        grad_h, num_hidden = first(grad_out, self._transposed[-1]), len(self.scales)
        deltas, grads_h = [], []
        for layer in range(num_hidden - 1, -1, -1):
            u, _, mean, inverse_std = inputs[num_hidden + 1 + 4 * layer : num_hidden + 5 + 4 * layer]
            grad_u = torch.ops.aten.native_layer_norm_backward(
                grad_h * self.scales[layer], u, u.shape[-1:], mean, inverse_std, None, None, [True, False, False]
            )[0]
            deltas.append(relu_gradient_(grad_u, u))
            grads_h.append(grad_h)
            if layer:
                grad_h = product(deltas[-1], self._transposed[layer])
        return deltas[::-1] + grads_h[::-1]

    def row_gradient(self, g: int, inputs: list[Tensor], rows: Tensor, start: int, stop: int) -> Tensor:
        raise NotImplementedError("rows of a normalised network: take hidden_gradients and input_gradient")

    def write_gradients(self, inputs: list[Tensor], deltas: list[Tensor], grad_out: Tensor) -> None:
        num_hidden = len(self.scales)
        super().write_gradients(inputs[: num_hidden + 1], deltas[:num_hidden], grad_out)
        for layer, grad_h in enumerate(deltas[num_hidden:]):
            unit = inputs[num_hidden + 2 + 4 * layer]
            torch.sum(grad_h * unit, dim=1, keepdim=True, out=self._scale_grads[layer])
            torch.sum(grad_h, dim=1, keepdim=True, out=self._shift_grads[layer])


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


class StackedVector:
    """One vector per member (a state-free log standard deviation), likewise."""

    def __init__(self, num_members: int, width: int, value: float, device: torch.device | str = "cpu") -> None:
        self.lead, self.width = (num_members,), width
        self.flat = torch.full((num_members * width,), value, device=device)
        self.grad = torch.zeros_like(self.flat)

    def blocks(self, flat: Tensor) -> list[Tensor]:
        return [flat.view(-1, self.width)]

    def select(self, members: Sequence[int]) -> StackedVector:
        other = StackedVector(len(members), self.width, 0.0, self.flat.device)
        gather_members(self, self.flat, other, other.flat, members)
        return other


ParameterStack = StackedMLP | StackedScalar | StackedVector


def gather_members(
    source: ParameterStack, from_: Tensor, target: ParameterStack, to: Tensor, members: Sequence[int]
) -> None:
    """Copy the blocks of some members from a vector laid out like `source` to one laid out like `target`."""
    index = torch.as_tensor(list(members), device=from_.device)
    for src, dst in zip(source.blocks(from_), target.blocks(to), strict=True):
        dst.copy_(src.index_select(0, index))


INITIALISATIONS = ("edac", "edac-fan-in", "torch", "orthogonal", "lecun", "vgdf")
_CUT_NORMAL_STD = 0.87962566103423978  # of a standard normal distribution cut at two standard deviations


def lecun_normal(shape: Sequence[int], num_inputs: int, generator: torch.Generator) -> Tensor:
    """Weights of variance 1/inputs from a normal distribution cut at two of its standard deviations (LeCun et al.
    1998), flax's default; on the CPU."""
    std = 1.0 / (_CUT_NORMAL_STD * math.sqrt(num_inputs))
    return torch.nn.init.trunc_normal_(torch.empty(*shape), 0.0, std, -2.0 * std, 2.0 * std, generator)


def initialise(network: StackedMLP, generators: Sequence[torch.Generator], *, scheme: str, last_bound: float) -> None:
    """Draw a network's parameters, one generator per member: a member starts the same in every pack.

    Args:
        scheme: "torch": weights and biases of every layer uniform in +-1/sqrt(in), torch's default.
            "edac-fan-in": hidden weights likewise, hidden biases 0.1, last layer uniform in +-`last_bound`.
            "edac": the same but +-1/sqrt(out) for the hidden weights, as the critics of the released RAVL and of CORL's
            EDAC have it (their `(in, out)` weights go to an initialiser that expects `(out, in)`; actors are as above).
            "orthogonal": orthogonal weights times sqrt(2) in every layer, no biases, as jaxrl and IQL have it.
            "lecun": `lecun_normal`, no biases.
            "vgdf": hidden weights uniform in +-sqrt(6 / (in + out)) (Glorot and Bengio 2010), those of the last layer
            normal with variance 2/in (He et al. 2015), no biases, as the released VGDF has it.
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
        if scheme == "orthogonal":
            for m, generator in enumerate(generators):
                for g in range(m * per_member, (m + 1) * per_member):
                    drawn = torch.nn.init.orthogonal_(torch.empty(n_in, n_out), math.sqrt(2.0), generator)
                    weight[g].copy_(drawn)
            bias.zero_()
            continue
        if scheme in ("lecun", "vgdf"):
            for m, generator in enumerate(generators):
                shape = (per_member, n_in, n_out)
                if scheme == "lecun":
                    drawn = lecun_normal(shape, n_in, generator)
                elif last:
                    drawn = torch.empty(shape).normal_(0.0, math.sqrt(2.0 / n_in), generator=generator)
                else:
                    limit = math.sqrt(6.0 / (n_in + n_out))
                    drawn = torch.empty(shape).uniform_(-limit, limit, generator=generator)
                weight[m * per_member : (m + 1) * per_member] = drawn
            bias.zero_()
            continue
        for m, generator in enumerate(generators):
            block = slice(m * per_member, (m + 1) * per_member)
            weight[block] = torch.empty(per_member, n_in, n_out).uniform_(-bound, bound, generator=generator)
            if last or scheme == "torch":
                bias[block] = torch.empty(per_member, 1, n_out).uniform_(-bound, bound, generator=generator)
            else:
                bias[block] = 0.1
