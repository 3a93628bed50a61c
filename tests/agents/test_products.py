"""Products by oneDNN, and of rounded inputs, beside torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from agents import products
from agents.chunk import matrix_precision
from agents.networks import StackedMLP


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        products._linear(torch.ones(2, 2), torch.ones(2, 2), None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        pytest.skip("this build of torch has no oneDNN linear")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def test_forward_and_gradients_are_the_same_up_to_rounding(by_onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    network = StackedMLP((3,), (14, 160, 160, 1))
    network.flat.copy_(0.1 * torch.randn(network.flat.shape, generator=draw))
    x, grad_out = torch.randn(3, 40, 14, generator=draw), torch.randn(3, 40, 1, generator=draw)

    def passes() -> list[torch.Tensor]:
        out, inputs = network.forward(x)
        return [out, *network.hidden_gradients(inputs, grad_out)]

    linear, calls = products._linear, []

    def counted(*args: object) -> torch.Tensor:
        calls.append(args)
        return linear(*args)

    monkeypatch.setattr(products, "_linear", counted)
    onednn = passes()
    assert len(calls) == 9  # three networks: two products forward, one back
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    for mine, torchs in zip(onednn, passes(), strict=True):
        torch.testing.assert_close(mine, torchs)


def test_rounding_by_hand_gives_the_products_of_rounded_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back, in wide layers and in mixed precision."""
    draw = torch.Generator().manual_seed(0)
    network = StackedMLP((3,), (14, 160, 160, 1))
    network.flat.copy_(0.1 * torch.randn(network.flat.shape, generator=draw))
    x, grad_out = torch.randn(3, 40, 14, generator=draw), torch.randn(3, 40, 1, generator=draw)

    def passes() -> list[torch.Tensor]:
        out, inputs = network.forward(x)
        deltas = network.hidden_gradients(inputs, grad_out)
        network.write_gradients(inputs, deltas, grad_out)
        return [out, *inputs[1:], *deltas, *(gradient.clone() for gradient in network.weight_grads)]

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().double()

    monkeypatch.setattr(products, "rounding_is_faster", lambda: True)
    plain = passes()
    with matrix_precision("mixed"):
        mixed = passes()
    out, first, second, delta_first, delta_second, of_first, of_second, of_last = mixed
    near = partial(torch.testing.assert_close, rtol=2**-7, atol=1e-5)  # of what a product gives
    before = torch.bmm(rounded(first), rounded(network.weights[1])) + network.biases[1].double()
    torch.testing.assert_close(second.double(), before.relu(), rtol=2**-7, atol=2e-2)
    back = torch.bmm(rounded(delta_second), rounded(network.weights[1]).mT)
    near(delta_first.double(), back.where(first > 0, 0.0))
    near(of_second.double(), torch.bmm(rounded(first).mT, rounded(delta_second)))
    narrow = partial(torch.testing.assert_close, rtol=2**-6, atol=3e-2)  # torch rounds on some CPUs
    narrow(first, plain[1])
    narrow(out, torch.baddbmm(network.biases[2], second, network.weights[2]))
    narrow(of_first, torch.bmm(x.mT, delta_first))
    narrow(of_last, torch.bmm(second.mT, grad_out))


def test_rounding_is_for_mixed_precision_and_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "rounding_is_faster", lambda: True)
    wide, narrow = torch.zeros(1, 128, 128), torch.zeros(1, 128, 127)
    assert not products._by_rounding(wide)
    with matrix_precision("mixed"):
        assert products._by_rounding(wide)
        assert not products._by_rounding(narrow)
        assert not products._by_rounding(wide.bfloat16())


def test_a_build_without_the_operator_takes_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_linear", missing)
    products.onednn_is_faster.cache_clear()
    assert not products.onednn_is_faster()
    products.onednn_is_faster.cache_clear()
