"""A trained U-Net for sampling: the function of `agents.unet`, with what does not change computed once.

A norm whose statistics are over channels takes their mean off what a convolution makes. The mean is linear in the
convolution's weights, so here it is taken off these, once; the same goes for biases and the time embedding's weights.
On a CPU in mixed precision weights and activations are bfloat16 throughout, and a batch is computed in parts that stay
in a core's cache.

Shapes: B trajectory, H row, C channel, N = B H, T = sum of the widths that time is added to, G group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.unet import NORM_EPS, NUM_GROUPS, UNet, columns, groups, nearest_rows, pool

_PART_BYTES = 768 * 1024  # of what the first block's second convolution multiplies


class InferenceUNet:
    """What a network with the norm "step" computes, for parameters that stay as they are.

    Results differ from the network's by rounding. Products are in the precision that is set where it is called
    (`agents.chunk.matrix_precision`).
    """

    def __init__(self, network: UNet) -> None:
        if network.norm != "step":
            raise ValueError("what is taken off beforehand are means over channels, not over time")
        self.network, self.device = network, network.device
        p, timed = network.parameters, [conv for conv in network.convs if conv.time is not None]
        self._time_weight = torch.cat([_centred(p["time.weight"][:, conv.time]) for conv in timed], 1)
        self._time_bias = torch.cat([_centred(p["time.bias"][conv.time]) for conv in timed])
        self._float32: dict[str, Tensor] = {name: p[name] for name in ("head.weight", "head.bias")}
        for conv in network.convs:
            to_groups, to_channels = groups(conv.outputs, str(self.device))
            for part in ("weight", "bias"):
                self._float32[f"{conv.name}.{part}"] = _centred(p[f"{conv.name}.{part}"])
            self._float32[f"{conv.name}.gain"] = to_channels * p[f"{conv.name}.gain"]
            self._float32[f"{conv.name}.shift"] = p[f"{conv.name}.shift"]
            self._float32[f"{conv.name}.groups"] = to_groups
        self._bfloat16: dict[str, Tensor] = {}

    def __call__(self, x_BHC: Tensor, c_noise: Tensor) -> Tensor:
        """The output `(B, H, C)`, float32, at noise levels `c_noise`, `(B,)` or `()`."""
        weights = self._weights()
        embedding = self.network.time_embedding(c_noise.reshape(-1))
        time_BT = torch.addmm(self._time_bias, embedding, self._time_weight)
        size = len(x_BHC)
        if self.device.type == "cpu":
            row_bytes = 3 * self.network.features * weights["head.bias"].element_size()
            size = max(1, _PART_BYTES // (row_bytes * x_BHC.shape[1]))
        if len(x_BHC) <= size:
            return self._part(weights, x_BHC, time_BT)
        times = time_BT.split(size) if len(time_BT) > 1 else [time_BT] * -(-len(x_BHC) // size)
        return torch.cat([self._part(weights, x, t) for x, t in zip(x_BHC.split(size), times, strict=True)])

    def _weights(self) -> dict[str, Tensor]:
        products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        if self.device.type != "cpu" or products.fp32_precision != "bf16":
            return self._float32
        if not self._bfloat16:
            self._bfloat16 = {name: value.bfloat16() for name, value in self._float32.items()}
        return self._bfloat16

    def _part(self, weights: dict[str, Tensor], x_BHC: Tensor, time_BT: Tensor) -> Tensor:
        blocks = self.network.num_blocks
        x, time_BT = (t.to(weights["head.bias"].dtype) for t in (x_BHC, time_BT))
        skips: list[Tensor] = []
        for i in range(blocks):
            if i:
                x = pool(skips[-1])
            x = self._conv(weights, f"down{i}.0", (x,), time_BT)
            skips.append(self._conv(weights, f"down{i}.1", (x,), time_BT))
        x = skips[-1]
        for i in range(blocks - 2, -1, -1):
            x = self._upsampled(weights, f"up{i}.0", x, skips[i].shape[1], time_BT)
            x = self._conv(weights, f"up{i}.1", (x, skips[i]), time_BT)
            x = self._conv(weights, f"up{i}.2", (x,), time_BT)
        out = torch.addmm(weights["head.bias"], x.view(-1, x.shape[-1]), weights["head.weight"])
        return out.view(x_BHC.shape).float()

    def _conv(self, weights: dict[str, Tensor], name: str, parts: tuple[Tensor, ...], time_BT: Tensor) -> Tensor:
        b, h = parts[0].shape[:2]
        bias_BC = self._bias(weights, name, time_BT)
        if len(bias_BC) == 1:  # one noise level for all
            y_NC = torch.addmm(bias_BC, columns(parts), weights[f"{name}.weight"])
        else:
            y_NC = torch.mm(columns(parts), weights[f"{name}.weight"])
            y_NC.view(b, h, -1).add_(bias_BC.unsqueeze(1))
        return _normed(weights, name, y_NC).view(b, h, -1)

    def _upsampled(self, weights: dict[str, Tensor], name: str, x_BhC: Tensor, length: int, time_BT: Tensor) -> Tensor:
        b, before, inputs = x_BhC.shape
        rows = x_BhC.reshape(-1, inputs)
        halves = weights[f"{name}.weight"].split(inputs)
        own, following = (torch.mm(rows, w).view(b, before, -1) for w in halves)
        nearest = nearest_rows(before, length, str(self.device))
        y = own.index_select(1, nearest)
        y[:, :-1].add_(following.index_select(1, nearest[1:]))
        y.add_(self._bias(weights, name, time_BT).unsqueeze(1))
        return _normed(weights, name, y.view(b * length, -1)).view(b, length, -1)

    def _bias(self, weights: dict[str, Tensor], name: str, time_BT: Tensor) -> Tensor:
        """A convolution's bias with the time embedding's part, `(B or 1, C)`."""
        time, bias = self.network.time_of(name), weights[f"{name}.bias"]
        return bias.unsqueeze(0) if time is None else time_BT[:, time] + bias


def _normed(weights: dict[str, Tensor], name: str, y_NC: Tensor) -> Tensor:
    """Norm and ReLU of what has no mean over the channels of a group."""
    rate_NG = torch.mm(y_NC * y_NC, weights[f"{name}.groups"]).add_(NORM_EPS).rsqrt_()
    return torch.addcmul(weights[f"{name}.shift"], y_NC, torch.mm(rate_NG, weights[f"{name}.gain"])).relu_()


def _centred(weight: Tensor) -> Tensor:
    """Less its mean over the channels `(..., C)` of each group."""
    grouped = weight.reshape(*weight.shape[:-1], NUM_GROUPS, -1)
    return (grouped - grouped.mean(-1, keepdim=True)).reshape(weight.shape)
