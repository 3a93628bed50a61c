"""A trained U-Net for sampling computes what the network does."""

import pytest
import torch

from agents.chunk import matrix_precision
from agents.unet import Tape, UNet
from agents.unet_inference import InferenceUNet
from tests.agents.devices import no_host


def made() -> UNet:
    network = UNet(7, 64, 3)
    draw = torch.Generator().manual_seed(0)
    network.initialise(draw)
    network.stack.flat.add_(torch.randn(network.stack.flat.shape, generator=draw), alpha=0.05)
    return network


@pytest.mark.parametrize("num", [3, 100])  # in one part, in several
@pytest.mark.parametrize("levels", ["one", "each"])
def test_it_computes_what_the_network_does(num, levels):
    network, draw = made(), torch.Generator().manual_seed(1)
    x = torch.randn(num, 31, 7, generator=draw)
    c_noise = torch.randn((), generator=draw) if levels == "one" else torch.randn(num, generator=draw)
    assert torch.allclose(InferenceUNet(network)(x, c_noise), network(x, c_noise), atol=1e-4)


def test_mixed_precision_stays_near():
    draw = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(40, 32, 7, generator=draw), torch.tensor(-0.5)
    network = InferenceUNet(made())
    exact = network(x, c_noise)
    with matrix_precision("mixed"):
        mixed = network(x, c_noise)
    assert torch.equal(exact, network(x, c_noise))
    assert mixed.dtype == torch.float32
    assert 0 < (exact - mixed).std() < 0.05 * exact.std()


def test_a_norm_over_time_is_refused():
    with pytest.raises(ValueError, match="over time"):
        InferenceUNet(UNet(7, 64, 3, "trajectory"))


def test_nothing_is_read_from_a_device_or_taken_from_the_host(monkeypatch):
    network = UNet(7, 64, 3, device="meta")
    sampled, tape = InferenceUNet(network), Tape()
    x, one, each = (torch.empty(shape, device="meta") for shape in ((5, 13, 7), (), (5,)))
    sampled(x, one)  # what depends on the length is made at the first call
    warm = Tape()
    out = network.forward(x, each, warm)
    network.backward(warm, out)
    with no_host(monkeypatch):
        assert sampled(x, one).shape == x.shape
        assert sampled(x, each).shape == x.shape
        out = network.forward(x, each, tape)
        network.backward(tape, out)
