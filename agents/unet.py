"""The 1-D U-Net of policy-guided diffusion, with written-out gradients.

Jackson et al. (RLC 2024); the architecture is that of EmptyJackson/policy-guided-diffusion at commit 9da606c,
models/diffusion.py, with blocks counted from 0 and F features:

    time      angles c_noise exp(-k ln(10000) / (F/8 - 1)), k < F/8 -> [sin | cos] -> linear F -> SiLU -> linear F
              -> SiLU
    encoder   block i, width F 2^i: conv 3, + linear(time), norm, ReLU, conv 3, norm, ReLU -> skip z_i -> max pool 2
    decoder   from the last skip, i = blocks - 2 .. 0, width F 2^i: upsample to z_i's length, conv 2, + linear(time),
              norm, ReLU, concatenate z_i, conv 3, norm, ReLU, conv 3, norm, ReLU
    head      conv 1

Convolutions keep the length: those of width 3 see one row on either side, those of width 2 the row itself and the next,
with zeros beyond the ends. The norm is a GroupNorm of 8 groups; as the released code calls it (flax takes the rows of
one trajectory for a batch) its statistics are over the C/8 channels of a group at one time step. `norm="trajectory"` is
the usual GroupNorm, over all steps of a trajectory.

On a CPU this is made of matrix products alone: a convolution is one product with the rows' neighbourhoods, the norm's
sums over groups and what it multiplies with are products with thin matrices (measured at 0.14 ms for 1,024 x 64, where
torch's layer norm takes 0.39 ms and its group norm 0.66 ms), and a convolution of width 2 after upsampling is computed
before it, which is half the work.

Shapes: B trajectory, H row, C channel, N = B H, F features, T = sum of the widths that time is added to, G group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from agents.chunk import matrix_precision
from agents.networks import StackedVector, relu_gradient_

NUM_GROUPS = 8
NORMS = ("step", "trajectory")
NORM_EPS = 1e-6  # flax's, not torch's 1e-5
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal that is cut at -2 and 2


@dataclass(frozen=True)
class _Conv:
    """A convolution, its norm, and where the time embedding that is added to it lies, if one is."""

    name: str
    width: int  # rows it sees
    inputs: int
    outputs: int
    time: slice | None = None


@dataclass
class _Taped:
    """What the gradient of one convolution with norm and ReLU needs."""

    columns: Tensor  # (N, width * inputs), or the rows before upsampling (n, inputs)
    y_NC: Tensor  # before the norm
    mean_NG: Tensor
    rate_NG: Tensor  # 1 / standard deviation
    scale_NC: Tensor
    out_NC: Tensor


class UNet:
    """The network; all parameters in one vector.

    Args:
        channels: C, of the input and the output.
        features: F, a multiple of 16.
        num_blocks: of the encoder; an input needs at least 2^(num_blocks - 1) rows.
        norm: one of `NORMS`.
        precision: of the convolutions' products, see `agents.chunk.matrix_precision`; None: what is set where it is
            called.

    Attributes:
        stack: the parameters and their gradients, for `agents.optim.Adam`.
        parameters, gradients: of the stack, by name (`shapes`).
    """

    def __init__(
        self, channels: int, features: int, num_blocks: int, norm: str = "step",
        precision: str | None = "float32",
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.channels, self.features, self.num_blocks, self.norm = channels, features, num_blocks, norm
        self.precision, self.device = precision, torch.device(device)
        self.convs = list(_convolutions(channels, features, num_blocks))
        self._by_name = {conv.name: conv for conv in self.convs}
        self.num_time = sum(conv.outputs for conv in self.convs if conv.time is not None)
        size = sum(math.prod(shape) for shape in self.shapes().values())
        self.stack = StackedVector(1, size, 0.0, device)
        self.parameters, self.gradients = (self._views(v) for v in (self.stack.flat, self.stack.grad))
        half = features // 8
        self._frequencies = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1))).to(device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters by name. Weights are `(in, out)`, those of a convolution `(width x in, out)`."""
        f, t = self.features, self.num_time
        shapes: dict[str, tuple[int, ...]] = {
            "time1.weight": (2 * (f // 8), f), "time1.bias": (f,), "time2.weight": (f, f), "time2.bias": (f,),
            "time.weight": (f, t), "time.bias": (t,),
        }  # fmt: skip
        for conv in self.convs:
            shapes[f"{conv.name}.weight"] = (conv.width * conv.inputs, conv.outputs)
            shapes |= {f"{conv.name}.{part}": (conv.outputs,) for part in ("bias", "gain", "shift")}
        return shapes | {"head.weight": (f, self.channels), "head.bias": (self.channels,)}

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        views, offset = {}, 0
        for name, shape in self.shapes().items():
            views[name] = flat[offset : offset + math.prod(shape)].view(shape)
            offset += math.prod(shape)
        return views

    def initialise(self, generator: torch.Generator) -> None:
        """Weights from a normal distribution of variance 1 / inputs that is cut at two deviations, as flax has them."""
        for name, parameter in self.parameters.items():
            if name.endswith("weight"):
                drawn = torch.empty(parameter.shape)
                std = 1 / math.sqrt(len(drawn)) / _TRUNCATED_STD
                parameter.copy_(torch.nn.init.trunc_normal_(drawn, 0.0, std, -2 * std, 2 * std, generator=generator))
            else:
                parameter.fill_(1.0 if name.endswith("gain") else 0.0)

    def _products(self) -> AbstractContextManager[None]:
        return nullcontext() if self.precision is None else matrix_precision(self.precision)

    # ---- forward --------------------------------------------------------------------------------------------------

    def __call__(self, x_BHC: Tensor, c_noise: Tensor) -> Tensor:
        """The output `(B, H, C)` at noise levels `c_noise`, `(B,)` or `()`."""
        return self.forward(x_BHC, c_noise, None)

    def forward(self, x_BHC: Tensor, c_noise: Tensor, tape: Tape | None) -> Tensor:
        """The same; with a tape, `backward` can follow."""
        p, last = self.parameters, self.num_blocks - 1
        time_BT = self._time(c_noise.reshape(-1), tape)
        skips: list[Tensor] = []
        x = x_BHC
        for i in range(self.num_blocks):
            if i:
                x = pool(skips[-1])
            x = self._conv(f"down{i}.0", (x,), time_BT, tape)
            skips.append(self._conv(f"down{i}.1", (x,), time_BT, tape))
        x = skips[last]
        for i in range(last - 1, -1, -1):
            x = self._upsampled(f"up{i}.0", x, skips[i].shape[1], time_BT, tape)
            x = self._conv(f"up{i}.1", (x, skips[i]), time_BT, tape)
            x = self._conv(f"up{i}.2", (x,), time_BT, tape)
        rows_NF = x.view(-1, self.features)
        if tape is not None:
            tape.skips, tape.rows_NF = skips, rows_NF
        with self._products():
            return torch.addmm(p["head.bias"], rows_NF, p["head.weight"]).view(x_BHC.shape)

    def _time(self, c_noise_B: Tensor, tape: Tape | None) -> Tensor:
        """What is added to the convolutions, all of them side by side, `(B, T)`."""
        embedding = self.time_embedding(c_noise_B, tape)
        return torch.addmm(self.parameters["time.bias"], embedding, self.parameters["time.weight"])

    def time_embedding(self, c_noise_B: Tensor, tape: Tape | None = None) -> Tensor:
        """Of noise levels, `(B, F)`."""
        p = self.parameters
        angles = c_noise_B.unsqueeze(1) * self._frequencies
        waves = torch.cat((angles.sin(), angles.cos()), 1)
        first = torch.addmm(p["time1.bias"], waves, p["time1.weight"])
        hidden = torch.nn.functional.silu(first)
        second = torch.addmm(p["time2.bias"], hidden, p["time2.weight"])
        embedding = torch.nn.functional.silu(second)
        if tape is not None:
            tape.time = (waves, first, hidden, second, embedding)
        return embedding

    def time_of(self, name: str) -> slice | None:
        """Which of the columns T are added to a convolution."""
        return self._by_name[name].time

    def _conv(self, name: str, parts: tuple[Tensor, ...], time_BT: Tensor, tape: Tape | None) -> Tensor:
        """A convolution of width 3 over inputs that lie side by side, norm and ReLU: `(B, H, outputs)`."""
        conv, p = self._by_name[name], self.parameters
        b, h = parts[0].shape[:2]
        rows = columns(parts)
        with self._products():
            y_NC = torch.addmm(p[f"{name}.bias"], rows, p[f"{name}.weight"])
        if conv.time is not None:
            y_NC.view(b, h, -1).add_(time_BT[:, conv.time].unsqueeze(1))
        return self._normed(name, rows, y_NC, h, tape).view(b, h, -1)

    def _upsampled(self, name: str, x_BhC: Tensor, length: int, time_BT: Tensor, tape: Tape | None) -> Tensor:
        """A convolution of width 2 of the nearest rows for `length` rows, norm and ReLU: `(B, H, outputs)`."""
        conv, p = self._by_name[name], self.parameters
        b, before = x_BhC.shape[:2]
        rows = x_BhC.reshape(-1, conv.inputs)
        weight = p[f"{name}.weight"]
        with self._products():
            own, following = (torch.mm(rows, w).view(b, before, -1) for w in weight.split(conv.inputs))
        nearest = nearest_rows(before, length, str(self.device))
        # the row itself and the one behind it; behind the last there is nothing
        y = own.index_select(1, nearest)
        y[:, :-1].add_(following.index_select(1, nearest[1:]))
        y.add_((time_BT[:, conv.time] + p[f"{name}.bias"]).unsqueeze(1))
        return self._normed(name, rows, y.view(b * length, -1), length, tape).view(b, length, -1)

    def _normed(self, name: str, columns: Tensor, y_NC: Tensor, length: int, tape: Tape | None) -> Tensor:
        """Group norm and ReLU of what a convolution has made."""
        gain, shift = self.parameters[f"{name}.gain"], self.parameters[f"{name}.shift"]
        to_groups, to_channels = groups(y_NC.shape[1], str(self.device))
        mean_NG = self._over_steps(torch.mm(y_NC, to_groups), length)
        square_NG = self._over_steps(torch.mm(y_NC * y_NC, to_groups), length)
        rate_NG = (square_NG - mean_NG * mean_NG).clamp_min_(0.0).add_(NORM_EPS).rsqrt_()
        spread_GC = to_channels * gain
        scale_NC = torch.mm(rate_NG, spread_GC)
        offset_NC = torch.addmm(shift, mean_NG * rate_NG, spread_GC, alpha=-1)
        out_NC = offset_NC.addcmul_(y_NC, scale_NC).relu_()
        if tape is not None:
            tape.convs[name] = _Taped(columns, y_NC, mean_NG, rate_NG, scale_NC, out_NC)
        return out_NC

    def _over_steps(self, mean_NG: Tensor, length: int) -> Tensor:
        """Means over the channels of groups, as the norm has them: also over time, if it is over trajectories."""
        if self.norm == "step":
            return mean_NG
        return mean_NG.view(-1, length, NUM_GROUPS).mean(1).repeat_interleave(length, 0)

    # ---- gradients ------------------------------------------------------------------------------------------------

    def backward(self, tape: Tape, grad_BHC: Tensor) -> None:
        """Fill `stack.grad` from the gradient of the output `(B, H, C)` of the `forward` that wrote the tape."""
        p, g, last = self.parameters, self.gradients, self.num_blocks - 1
        b, grad_NC = len(grad_BHC), grad_BHC.reshape(-1, self.channels)
        grad_time_BT = grad_BHC.new_empty((b, self.num_time))
        with self._products():
            torch.mm(tape.rows_NF.t(), grad_NC, out=g["head.weight"])
            grad_x = torch.mm(grad_NC, p["head.weight"].t())
        torch.sum(grad_NC, 0, out=g["head.bias"])
        grad_skips: dict[int, Tensor] = {}
        for i in range(last):
            length = tape.skips[i].shape[1]
            grad_x = self._conv_gradient(f"up{i}.2", tape, grad_x, length, grad_time_BT)
            both = self._conv_gradient(f"up{i}.1", tape, grad_x, length, grad_time_BT).view(b, length, -1)
            ahead, grad_skips[i] = both.chunk(2, -1)
            grad_x = self._upsampled_gradient(f"up{i}.0", tape, ahead, tape.skips[i + 1].shape[1], grad_time_BT)
        for i in range(last, -1, -1):
            skip = tape.skips[i]
            if i < last:
                grad_x = _pool_gradient(skip, grad_x.view(b, skip.shape[1] // 2, -1), grad_skips[i])
            grad_x = self._conv_gradient(f"down{i}.1", tape, grad_x, skip.shape[1], grad_time_BT)
            grad_x = self._conv_gradient(f"down{i}.0", tape, grad_x, skip.shape[1], grad_time_BT, needed=i > 0)
        self._time_gradient(tape, grad_time_BT)

    def _conv_gradient(
        self, name: str, tape: Tape, grad_out: Tensor, length: int, grad_time_BT: Tensor, needed: bool = True
    ) -> Tensor:
        """Write a convolution's gradients; returns that of its input, `(N, inputs)`, if it is needed."""
        conv = self._by_name[name]
        grad_NC, columns = self._normed_gradient(name, tape, grad_out, length, grad_time_BT)
        with self._products():
            torch.mm(columns.t(), grad_NC, out=self.gradients[f"{name}.weight"])
            if not needed:
                return grad_NC
            grad_columns = torch.mm(grad_NC, self.parameters[f"{name}.weight"].t())
        before, own, behind = grad_columns.view(-1, length, 3, conv.inputs).unbind(2)
        grad_x = own.contiguous()
        grad_x[:, :-1].add_(before[:, 1:])
        grad_x[:, 1:].add_(behind[:, :-1])
        return grad_x.view(-1, conv.inputs)

    def _upsampled_gradient(self, name: str, tape: Tape, grad_out: Tensor, before: int, grad_time_BT: Tensor) -> Tensor:
        """The same of a convolution of width 2 after upsampling from `before` rows: `(n, inputs)`."""
        conv, length = self._by_name[name], grad_out.shape[1]
        grad_NC, rows = self._normed_gradient(name, tape, grad_out, length, grad_time_BT)
        grad_BHC = grad_NC.view(-1, length, conv.outputs)
        own_hH, following_hH = _gathers(before, length, str(self.device))
        grad_x = None
        for w, g, gather_hH in zip(
            self.parameters[f"{name}.weight"].split(conv.inputs), self.gradients[f"{name}.weight"].split(conv.inputs),
            (own_hH, following_hH), strict=True,
        ):  # fmt: skip
            grad_rows = torch.matmul(gather_hH, grad_BHC).view(-1, conv.outputs)
            with self._products():
                torch.mm(rows.t(), grad_rows, out=g)
                grad_x = torch.mm(grad_rows, w.t()) if grad_x is None else grad_x.addmm_(grad_rows, w.t())
        assert grad_x is not None
        return grad_x

    def _normed_gradient(
        self, name: str, tape: Tape, grad_out: Tensor, length: int, grad_time_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the gradients of norm, bias and time; returns that of the product `(N, C)`, and what was multiplied."""
        conv, taped, g = self._by_name[name], tape.convs.pop(name), self.gradients
        y_NC, mean_NG, rate_NG = taped.y_NC, taped.mean_NG, taped.rate_NG
        to_groups, to_channels = groups(conv.outputs, str(self.device))
        gain = self.parameters[f"{name}.gain"]
        grad_NC = relu_gradient_(grad_out.reshape(-1, conv.outputs), taped.out_NC)
        torch.sum(grad_NC, 0, out=g[f"{name}.shift"])
        grad_y_NC = grad_NC * y_NC
        # of normed = (y - mean) rate, of which out = gain normed + shift
        of_groups_GC = torch.mm(rate_NG.t(), grad_y_NC).sub_(torch.mm((mean_NG * rate_NG).t(), grad_NC))
        torch.sum(of_groups_GC * to_channels, 0, out=g[f"{name}.gain"])
        gained = to_groups * gain.unsqueeze(1)
        grad_mean_NG = self._over_steps(torch.mm(grad_NC, gained), length)
        aligned_NG = self._over_steps(torch.mm(grad_y_NC, gained), length).sub_(mean_NG * grad_mean_NG)
        slope_NG = aligned_NG.mul_(rate_NG * rate_NG * rate_NG)
        constant_NG = (slope_NG * mean_NG).sub_(rate_NG * grad_mean_NG)
        grad = grad_NC.mul_(taped.scale_NC).addcmul_(y_NC, torch.mm(slope_NG, to_channels), value=-1)
        grad.addmm_(constant_NG, to_channels)
        grad_bias = g[f"{name}.bias"]
        if conv.time is None:
            torch.sum(grad, 0, out=grad_bias)
        else:
            of_time_BC = grad.view(-1, length, conv.outputs).sum(1)
            grad_time_BT[:, conv.time] = of_time_BC
            torch.sum(of_time_BC, 0, out=grad_bias)
        return grad, taped.columns

    def _time_gradient(self, tape: Tape, grad_BT: Tensor) -> None:
        p, g = self.parameters, self.gradients
        waves, first, hidden, second, embedding = tape.time
        torch.mm(embedding.t(), grad_BT, out=g["time.weight"])
        torch.sum(grad_BT, 0, out=g["time.bias"])
        grad = torch.ops.aten.silu_backward(torch.mm(grad_BT, p["time.weight"].t()), second)
        torch.mm(hidden.t(), grad, out=g["time2.weight"])
        torch.sum(grad, 0, out=g["time2.bias"])
        grad = torch.ops.aten.silu_backward(torch.mm(grad, p["time2.weight"].t()), first)
        torch.mm(waves.t(), grad, out=g["time1.weight"])
        torch.sum(grad, 0, out=g["time1.bias"])


class Tape:
    """What a forward pass leaves for the backward pass; good for one."""

    def __init__(self) -> None:
        self.convs: dict[str, _Taped] = {}
        self.time: tuple[Tensor, ...] = ()
        self.skips: list[Tensor] = []
        self.rows_NF = torch.empty(0)


def _convolutions(channels: int, features: int, num_blocks: int) -> Iterator[_Conv]:
    """All but the head, in the order in which they are computed."""
    inputs, offset = channels, 0

    def with_time(outputs: int) -> slice:
        nonlocal offset
        offset += outputs
        return slice(offset - outputs, offset)

    for i in range(num_blocks):
        width = features * 2**i
        yield _Conv(f"down{i}.0", 3, inputs, width, with_time(width))
        yield _Conv(f"down{i}.1", 3, width, width)
        inputs = width
    for i in range(num_blocks - 2, -1, -1):
        width = features * 2**i
        yield _Conv(f"up{i}.0", 2, 2 * width, width, with_time(width))
        yield _Conv(f"up{i}.1", 3, 2 * width, width)
        yield _Conv(f"up{i}.2", 3, width, width)


def columns(parts: tuple[Tensor, ...]) -> Tensor:
    """Each row between its neighbours, `(N, 3 C)`, of inputs `(B, H, .)` side by side, with zeros beyond the ends."""
    b, h = parts[0].shape[:2]
    c = sum(part.shape[2] for part in parts)
    padded = parts[0].new_zeros((b, h + 2, c))
    torch.cat(parts, 2, out=padded[:, 1:-1]) if len(parts) > 1 else padded[:, 1:-1].copy_(parts[0])
    return padded.as_strided((b, h, 3 * c), ((h + 2) * c, c, 1)).reshape(b * h, 3 * c)


def pool(x_BHC: Tensor) -> Tensor:
    """The greater of each two rows; of an odd number the last is left out."""
    half = x_BHC.shape[1] // 2
    return torch.maximum(x_BHC[:, 0 : 2 * half : 2], x_BHC[:, 1 : 2 * half : 2])


def _pool_gradient(x_BHC: Tensor, grad_BhC: Tensor, onto_BHC: Tensor) -> Tensor:
    """The gradient of `pool` with respect to its input, added to another."""
    grad, half = onto_BHC.contiguous(), grad_BhC.shape[1]
    even, odd = (slice(first, 2 * half, 2) for first in (0, 1))
    is_even = x_BHC[:, even] >= x_BHC[:, odd]
    of_even = grad_BhC * is_even
    grad[:, even].add_(of_even)
    grad[:, odd].add_(grad_BhC - of_even)
    return grad


@cache
def groups(channels: int, device: str) -> tuple[Tensor, Tensor]:
    """What takes channels to the means of their groups, `(C, G)`, and groups to channels, `(G, C)`."""
    size = channels // NUM_GROUPS
    to_channels = torch.eye(NUM_GROUPS).repeat_interleave(size, 1)
    return (to_channels.t() / size).contiguous().to(device), to_channels.to(device)


@cache
def nearest_rows(before: int, after: int, device: str) -> Tensor:
    """For each of `after` rows the number of the nearest of `before` rows, by their middles (jax.image.resize)."""
    rows = torch.arange(after, dtype=torch.float64)
    return ((rows + 0.5) * before / after).floor().long().to(device)


@cache
def _gathers(before: int, after: int, device: str) -> tuple[Tensor, Tensor]:
    """What adds up, for each of `before` rows, the `after` rows that it is the nearest of, and those that come before
    one of these; both `(before, after)`."""
    own = torch.nn.functional.one_hot(nearest_rows(before, after, "cpu"), before).t().float()
    following = torch.zeros_like(own)
    following[:, :-1] = own[:, 1:]
    return own.to(device), following.to(device)
