"""What the tests against numbers of other code share: drawn parameters, and how close is close."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.networks import StackedLayerNormMLP, StackedMLP

Array = NDArray[np.float32]
Layers = list[Array]  # weight (..., in, out), bias (..., 1, out), weight, bias, ...


def drawn_layers(rng: np.random.RandomState, lead: tuple[int, ...], sizes: Sequence[int], last: float) -> Layers:
    """Weights and biases, layer after layer, of networks with the leading axes `lead`."""
    layers: Layers = []
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        bound = (last if i == len(sizes) - 2 else 1.5) / np.sqrt(n_in)
        layers.append(rng.uniform(-bound, bound, (*lead, n_in, n_out)).astype(np.float32))
        layers.append(rng.uniform(-0.2, 0.2, (*lead, 1, n_out)).astype(np.float32))
    return layers


def fill(network: StackedMLP, layers: Layers) -> None:
    for target, values in zip(parameter_blocks(network), layers, strict=True):
        target.copy_(torch.from_numpy(values))


def parameter_blocks(network: StackedMLP) -> list[Tensor]:
    """Weight, bias, weight, ..., then scale, shift, scale, ... of normalised layers; views."""
    blocks = [block for pair in zip(network.weights, network.biases, strict=True) for block in pair]
    if isinstance(network, StackedLayerNormMLP):
        blocks += [block for pair in zip(network.scales, network.shifts, strict=True) for block in pair]
    return blocks


def close(mine: Tensor, theirs: Array, tolerance: float, what: str) -> None:
    """Largest difference relative to the largest entry."""
    expected = torch.from_numpy(theirs).reshape(-1).double()
    error = (mine.reshape(-1).double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert float(error) <= tolerance, f"{what}: {float(error):.2e} of the largest entry"


def assert_moved_alike(network: StackedMLP, before: Layers, theirs: Sequence[Array], what: str) -> None:
    """Every tensor's change to 1e-4 of its largest, beside the rounding of the parameters."""
    for i, (mine, start, end) in enumerate(zip(parameter_blocks(network), before, theirs, strict=True)):
        assert_change(mine, start, end, f"{what}.{i}")


def assert_change(mine: Tensor, start: Array, end: Array, what: str) -> None:
    now, then = mine.reshape(-1).double().numpy(), end.reshape(-1).astype(np.float64)
    rounding, change = 5e-7 * np.abs(then).max(), np.abs(then - start.reshape(-1)).max()
    error = np.abs(now - then).max()
    assert error <= 1e-4 * change + rounding, f"{what}: {error:.1e} after a change of {change:.1e}"
