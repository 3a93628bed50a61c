"""Adam over a stack against torch's own, and its members against the same members alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from agents.networks import StackedMLP, StackedScalar
from agents.optim import Adam

SIZES = (4, 6, 2)


def stack(num_members: int) -> StackedMLP:
    network = StackedMLP((num_members,), SIZES)
    network.flat.normal_(generator=torch.Generator().manual_seed(1))
    return network


def descend(network: StackedMLP, optim: Adam, steps: Sequence[int], members: Sequence[int]) -> None:
    """Gradients that depend on the step and on the member's number in a pack of 4."""
    for step in steps:
        for block in network.blocks(network.grad):
            g = torch.Generator().manual_seed(1000 * step + block.shape[-1])
            block.copy_(torch.randn(4, block.shape[-1], generator=g)[list(members)])
        optim.step()


def torch_adam(num_steps: int, rates: Sequence[float]) -> Tensor:
    """What torch.optim.Adam makes of the same gradients, one parameter group per member."""
    network = stack(4)
    blocks = [[b[m].clone().requires_grad_() for b in network.blocks(network.flat)] for m in range(4)]
    optim = torch.optim.Adam([{"params": p, "lr": lr} for p, lr in zip(blocks, rates, strict=True)])
    for step in range(num_steps):
        for m, params in enumerate(blocks):
            for p in params:
                g = torch.Generator().manual_seed(1000 * step + len(p))
                p.grad = torch.randn(4, len(p), generator=g)[m]
        optim.step()
    for m, params in enumerate(blocks):
        for block, p in zip(network.blocks(network.flat), params, strict=True):
            block[m] = p.detach()
    return network.flat


@pytest.mark.parametrize("rates", [[1e-2] * 4, [1e-2, 1e-3, 1e-2, 3e-4]], ids=["one rate", "own rates"])
def test_steps_are_torchs(rates: list[float]) -> None:
    network = stack(4)
    descend(network, Adam(network, rates), range(7), range(4))
    torch.testing.assert_close(network.flat, torch_adam(7, rates), rtol=1e-6, atol=1e-7)


def test_a_members_bits_do_not_depend_on_the_others_rates() -> None:
    equal, mixed = stack(4), stack(4)
    descend(equal, Adam(equal, [1e-2] * 4), range(7), range(4))
    descend(mixed, Adam(mixed, [1e-3, 1e-2, 1e-2, 3e-4]), range(7), range(4))
    assert torch.equal(equal.select([1, 2]).flat, mixed.select([1, 2]).flat)
    assert not torch.equal(equal.select([0]).flat, mixed.select([0]).flat)


def test_scale_multiplies_every_rate() -> None:
    scaled, plain = stack(4), stack(4)
    optim = Adam(scaled, [1e-2, 1e-3, 1e-2, 4e-3])
    optim.scale_rates(0.5)
    descend(scaled, optim, range(3), range(4))
    descend(plain, Adam(plain, [5e-3, 5e-4, 5e-3, 2e-3]), range(3), range(4))
    torch.testing.assert_close(scaled.flat, plain.flat, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rates", [[1e-2] * 4, [1e-2, 1e-3, 5e-3, 3e-4]], ids=["one rate", "own rates"])
def test_selected_members_go_on_with_their_moments(rates: list[float]) -> None:
    whole, part = stack(4), stack(4)
    optims = Adam(whole, rates), Adam(part, rates)
    for optim in optims:
        optim.scale_rates(0.5)
    descend(whole, optims[0], range(6), range(4))
    descend(part, optims[1], range(3), range(4))
    survivors = part.select([3, 1])
    descend(survivors, optims[1].select(survivors, [3, 1]), range(3, 6), [3, 1])
    assert torch.equal(survivors.flat, whole.select([3, 1]).flat)


@pytest.mark.parametrize("rates", [[1e-2] * 4, [1e-2, 1e-3, 5e-3, 3e-4]], ids=["one rate", "own rates"])
def test_a_restored_optimiser_goes_on_bitwise(rates: list[float]) -> None:
    straight, first = stack(4), stack(4)
    descend(straight, Adam(straight, rates), range(6), range(4))
    optim = Adam(first, rates)
    descend(first, optim, range(3), range(4))
    resumed = first.clone()
    restored = Adam(resumed, rates)
    restored.load_state_dict(optim.state_dict())
    descend(resumed, restored, range(3, 6), range(4))
    assert torch.equal(resumed.flat, straight.flat)


def test_one_scalar_per_member() -> None:
    scalar = StackedScalar(2, 0.0)
    optim = Adam(scalar, [1e-2, 1e-3])
    scalar.grad.copy_(torch.tensor([5.0, -2.0]))
    optim.step()
    torch.testing.assert_close(scalar.flat, torch.tensor([-1e-2, 1e-3]))  # Adam's first step is lr * sign(gradient)
