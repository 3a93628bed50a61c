"""A trained U-Net for sampling: the function of `agents.unet`, with what does not change computed once.

A norm whose statistics are over channels takes their mean off what a convolution makes. The mean is linear in the
convolution's weights, so here it is taken off these, once; the same goes for biases and the time embedding's weights.
On a CPU in mixed precision weights and activations are bfloat16 throughout, and a batch is computed in parts that stay
in a core's cache.

Shapes: B trajectory, H row, C channel, N = B H, F features, T = sum of the widths that time is added to, G group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.chunk import matrix_precision
from agents.unet import NORM_EPS, NUM_GROUPS, UNet, columns, groups, nearest_rows, pool

_PART_BYTES = 768 * 1024  # of what a convolution of width 3 multiplies, at the full length


class InferenceUNet:
    """What a network computes, for a network whose parameters stay as they are.

    Only for the norm "step". Its results differ from the network's by rounding, in mixed precision of bfloat16.
    """

    def __init__(self, network: UNet) -> None:
        if network.norm != "step":
            raise ValueError("what is taken off beforehand are means over channels, not over time")
        self.network, self.device = network, network.device
        on_cpu = self.device.type == "cpu"
        self.dtype = torch.bfloat16 if on_cpu and network.precision == "mixed" else torch.float32
        p = network.parameters
        head = (p["head.weight"], p["head.bias"])
        self._head_weight, self._head_bias = (x.to(self.dtype) for x in head)
        self._weights, self._biases, self._time = {}, {}, []
        self._gains, self._shifts = {}, {}
        for conv in network.convs:
            weight, bias = (_centred(p[f"{conv.name}.{part}"]) for part in ("weight", "bias"))
            self._weights[conv.name] = weight.to(self.dtype)
            self._biases[conv.name] = bias
            self._gains[conv.name] = (groups(conv.outputs, str(self.device))[1] * p[f"{conv.name}.gain"]).to(self.dtype)
            self._shifts[conv.name] = p[f"{conv.name}.shift"].to(self.dtype)
            if conv.time is not None:
                self._time.append((_centred(p["time.weight"][:, conv.time]), _centred(p["time.bias"][conv.time])))
        self._time_weight = torch.cat([weight for weight, _ in self._time], 1)
        self._time_bias = torch.cat([bias for _, bias in self._time])
        self._to_groups = {
            conv.outputs: groups(conv.outputs, str(self.device))[0].to(self.dtype) for conv in network.convs
        }

    def __call__(self, x_BHC: Tensor, c_noise: Tensor) -> Tensor:
        """The output `(B, H, C)`, float32, at noise levels `c_noise`, `(B,)` or `()`."""
        embedding = self.network.time_embedding(c_noise.reshape(-1))
        time_BT = torch.addmm(self._time_bias, embedding, self._time_weight)
        size = len(x_BHC)
        if self.device.type == "cpu":
            widest = 3 * self.network.features * x_BHC.shape[1] * self._head_bias.element_size()
            size = max(1, _PART_BYTES // widest)
        if len(x_BHC) <= size:
            return self._part(x_BHC, time_BT)
        times = time_BT.split(size) if len(time_BT) > 1 else [time_BT] * -(-len(x_BHC) // size)
        return torch.cat([self._part(x, t) for x, t in zip(x_BHC.split(size), times, strict=True)])

    def _part(self, x_BHC: Tensor, time_BT: Tensor) -> Tensor:
        last = self.network.num_blocks - 1
        with matrix_precision(self.network.precision if self.device.type != "cpu" else "float32"):
            x, skips = x_BHC.to(self.dtype), []
            for i in range(self.network.num_blocks):
                if i:
                    x = pool(skips[-1])
                x = self._conv(f"down{i}.0", (x,), time_BT)
                skips.append(self._conv(f"down{i}.1", (x,), time_BT))
            x = skips[last]
            for i in range(last - 1, -1, -1):
                x = self._upsampled(f"up{i}.0", x, skips[i].shape[1], time_BT)
                x = self._conv(f"up{i}.1", (x, skips[i]), time_BT)
                x = self._conv(f"up{i}.2", (x,), time_BT)
            out = torch.addmm(self._head_bias, x.view(-1, x.shape[-1]), self._head_weight)
        return out.view(x_BHC.shape).float()

    def _conv(self, name: str, parts: tuple[Tensor, ...], time_BT: Tensor) -> Tensor:
        b, h = parts[0].shape[:2]
        bias_BC = self._bias(name, time_BT)
        if len(bias_BC) == 1:  # one noise level for all
            y_NC = torch.addmm(bias_BC, columns(parts), self._weights[name])
        else:
            y_NC = torch.mm(columns(parts), self._weights[name])
            y_NC.view(b, h, -1).add_(bias_BC.unsqueeze(1))
        return self._normed(name, y_NC).view(b, h, -1)

    def _upsampled(self, name: str, x_BhC: Tensor, length: int, time_BT: Tensor) -> Tensor:
        b, before, inputs = x_BhC.shape
        rows = x_BhC.reshape(-1, inputs)
        own, following = (torch.mm(rows, w).view(b, before, -1) for w in self._weights[name].split(inputs))
        nearest = nearest_rows(before, length, str(self.device))
        y = own.index_select(1, nearest)
        y[:, :-1].add_(following.index_select(1, nearest[1:]))
        y.add_(self._bias(name, time_BT).unsqueeze(1))
        return self._normed(name, y.view(b * length, -1)).view(b, length, -1)

    def _bias(self, name: str, time_BT: Tensor) -> Tensor:
        """A convolution's bias with the time embedding's part, `(B or 1, C)`."""
        time, bias = self.network.time_of(name), self._biases[name]
        return (bias.unsqueeze(0) if time is None else time_BT[:, time] + bias).to(self.dtype)

    def _normed(self, name: str, y_NC: Tensor) -> Tensor:
        """Norm and ReLU of what has no mean over the channels of a group."""
        rate_NG = torch.mm(y_NC * y_NC, self._to_groups[y_NC.shape[1]]).add_(NORM_EPS).rsqrt_()
        return torch.addcmul(self._shifts[name], y_NC, torch.mm(rate_NG, self._gains[name])).relu_()


def _centred(weight: Tensor) -> Tensor:
    """Less its mean over the channels `(..., C)` of each group."""
    grouped = weight.reshape(*weight.shape[:-1], NUM_GROUPS, -1)
    return (grouped - grouped.mean(-1, keepdim=True)).reshape(weight.shape)
