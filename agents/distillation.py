"""One network in place of a mixture of discriminators: a regression of the mixture's p on its inputs.

    minimise mean cross-entropy between t = (p - LOWEST) / (HIGHEST - LOWEST) and sigmoid(output)

with LOWEST and HIGHEST the ends of p's range (`agents.dynamics_reward`).

Shapes: N examples, B batch, X inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.dynamics_reward import HIGHEST, LOWEST
from agents.networks import StackedMLP, initialise
from agents.optim import Adam, half_cosine
from agents.randomness import generator

_LEARNING_RATE, _BATCH_SIZE = 1e-3, 512


def distil(inputs_NX: Tensor, probability_N: Tensor, hidden: Sequence[int], epochs: int, seed: int) -> StackedMLP:
    """Fit a ReLU network, lead `(1,)`, whose output `agents.dynamics_reward.distilled_probability` turns into p.

    Args:
        inputs_NX: standardised inputs of the discriminators, on the device to train on.
        probability_N: what the mixture makes of them.
        hidden: hidden widths.
        epochs: passes over the examples; the learning rate falls to 0 along a half cosine.
        seed: of the first weights and of the order.
    """
    device, num = inputs_NX.device, len(inputs_NX)
    network = StackedMLP((1,), (inputs_NX.shape[1], *hidden, 1))
    initialise(network, [generator(seed, "init distillation")], scheme="torch", last_bound=0.01)
    network = network.to(device)
    optimiser = Adam(network, [_LEARNING_RATE])
    target_N = (probability_N - LOWEST) / (HIGHEST - LOWEST)
    batch = min(_BATCH_SIZE, num)
    steps = num // batch
    for epoch in range(epochs):
        order = torch.randperm(
            num, generator=generator(seed, "distillation order", epoch, device=device), device=device
        )
        for i, rows in enumerate(order[: steps * batch].split(batch)):
            out, inputs = network.forward(inputs_NX[rows].unsqueeze(0))
            grad = (torch.sigmoid(out) - target_N[rows].view(1, -1, 1)) / batch
            network.write_gradients(inputs, network.hidden_gradients(inputs, grad), grad)
            optimiser.scale_rates(half_cosine((epoch * steps + i) / (epochs * steps)))
            optimiser.step()
    return network
