"""Matrix products of stacked networks: torch's own, oneDNN's where those are faster, or in mixed precision bfloat16's.

torch's float32 products on a CPU are MKL's, which keeps to AVX2 on processors of other makers: on an AMD processor with
AVX-512 they were measured at half the rate of oneDNN's, on an Intel one oneDNN's are some 10 % slower.

In mixed precision (`agents.chunk.matrix_precision`) torch rounds a product's inputs to bfloat16 by itself on CPUs with
AMX, and leaves float32 products as they are on others. Some of those have AVX-512's bfloat16 products: there rounding
by hand was measured at 1.5 to 1.9 times the rate of float32 with weights of 256 x 256, everything included. What such a
product gives is rounded, too; its sums, what is added to it, and narrow layers (first and last ones) are float32's.

What a process takes is decided by trials of some milliseconds, with a margin so wide that the same machine always
decides alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_MARGIN = 1.3  # how much faster it must be than torch's
_SIZE, _CALLS, _TRIALS = 256, 4, 5
_WIDE = 128  # smaller products are bound by the number of calls, or by memory


def affine(bias_G1O: Tensor, x_GBI: Tensor, weight_GIO: Tensor, relu: bool) -> Tensor:
    """x W + b of every network, with or without ReLU: `(G, B, O)`."""
    if _by_rounding(weight_GIO):
        out = _rounded(x_GBI, weight_GIO).add_(bias_G1O)
        return out.relu_() if relu else out
    if _by_onednn(x_GBI):
        return torch.stack([
            _linear(x, weight.t(), bias.view(-1), "relu" if relu else "none", [], "")
            for x, weight, bias in zip(x_GBI.unbind(), weight_GIO.unbind(), bias_G1O.unbind(), strict=True)
        ])  # fmt: skip
    out = torch.baddbmm(bias_G1O, x_GBI, weight_GIO)
    return out.relu_() if relu else out


def product(x_GBI: Tensor, weight_GIO: Tensor) -> Tensor:
    """x W of every network: `(G, B, O)`."""
    if _by_rounding(weight_GIO):
        return _rounded(x_GBI, weight_GIO)
    if _by_onednn(x_GBI):
        pairs = zip(x_GBI.unbind(), weight_GIO.unbind(), strict=True)
        return torch.stack([_linear(x, weight.t(), None, "none", [], "") for x, weight in pairs])
    return torch.bmm(x_GBI, weight_GIO)


def write_weight_gradient(x_GBI: Tensor, delta_GBO: Tensor, out_GIO: Tensor) -> None:
    """x^T delta of every network."""
    if _by_rounding(out_GIO):
        out_GIO.copy_(torch.bmm(x_GBI.bfloat16().mT, delta_GBO.bfloat16()))
    else:
        torch.bmm(x_GBI.mT, delta_GBO, out=out_GIO)


def linear(x_BI: Tensor, weight_IO: Tensor, bias_O: Tensor, relu: bool) -> Tensor:
    """x W + b of one network, with or without ReLU: `(B, O)`, in float32 or in bfloat16, where sums are float32's.

    In bfloat16 oneDNN's product that also adds and cuts was measured at 1.3 to 1.8 times the rate of torch's.
    """
    if x_BI.dtype == torch.bfloat16 and x_BI.device.type == "cpu" and _onednn_has_bfloat16():
        return _linear(x_BI, weight_IO.t(), bias_O, "relu" if relu else "none", [], "")
    if x_BI.dtype == torch.float32 and _by_onednn(x_BI):
        return _linear(x_BI, weight_IO.t(), bias_O, "relu" if relu else "none", [], "")
    out = torch.addmm(bias_O, x_BI, weight_IO)
    return out.relu_() if relu else out


def _rounded(x_GBI: Tensor, weight_GIO: Tensor) -> Tensor:
    return torch.bmm(x_GBI.bfloat16(), weight_GIO.bfloat16()).float()


def _by_rounding(weight_GIO: Tensor) -> bool:
    # a GPU has TF32 in mixed precision; what is bfloat16 already need not be rounded
    if min(weight_GIO.shape[-2:]) < _WIDE or weight_GIO.device.type != "cpu" or weight_GIO.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16" and rounding_is_faster()  # type: ignore[attr-defined]


@cache
def rounding_is_faster() -> bool:
    """Whether this machine computes a product of 256 x 256 x 256 faster with inputs rounded to bfloat16 by hand than
    torch does in the precision that is set."""
    x, weight = torch.rand(1, _SIZE, _SIZE), torch.rand(1, _SIZE, _SIZE)
    of_torch = _shortest(lambda: torch.bmm(x, weight))
    return of_torch > _MARGIN * _shortest(lambda: _rounded(x, weight))


def _by_onednn(x_GBI: Tensor) -> bool:
    # a GPU has its own, and in bfloat16 torch calls oneDNN by itself
    if x_GBI.shape[-1] < _WIDE or x_GBI.device.type != "cpu" or x_GBI.dtype != torch.float32:
        return False
    return onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Whether this machine computes a product of 256 x 256 x 256 in float32 faster by oneDNN, on one thread."""
    x, weight = torch.rand(_SIZE, _SIZE), torch.rand(_SIZE, _SIZE)
    try:
        _linear(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False  # not in this build of torch, or not for this processor
    of_torch = _shortest(lambda: torch.mm(x, weight))
    of_onednn = _shortest(lambda: _linear(x, weight, None, "none", [], ""))
    return of_torch > _MARGIN * of_onednn


@cache
def _onednn_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 here."""
    x = torch.zeros((16, 16), dtype=torch.bfloat16)
    try:
        _linear(x, x, x[0], "relu", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False  # not in this build of torch, or not for this processor
    return True


def _shortest(work: Callable[[], object]) -> float:
    """Processor seconds of the best of some trials."""
    times = []
    for _ in range(_TRIALS):
        started = time.process_time()
        for _ in range(_CALLS):
            work()
        times.append(time.process_time() - started)
    return min(times)


def _linear(*args: object) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(*args)
    return out
