"""Products by oneDNN beside torch's own."""

from __future__ import annotations

import pytest
import torch

from agents import products
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


def test_a_build_without_the_operator_takes_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_linear", missing)
    products.onednn_is_faster.cache_clear()
    assert not products.onednn_is_faster()
    products.onednn_is_faster.cache_clear()
