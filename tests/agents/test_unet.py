"""The U-Net against the same network made of torch's own layers, with recorded gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from agents.unet import Tape, UNet

CHANNELS, FEATURES = 7, 32


def reference(net: UNet, p: dict[str, Tensor], x: Tensor, c_noise: Tensor) -> Tensor:
    """The network, op by op as agents/unet.py's page has it, of channels-first tensors."""
    half = FEATURES // 8
    angles = c_noise[:, None] * torch.exp(-torch.arange(half) * torch.log(torch.tensor(1e4)) / (half - 1))
    waves = torch.cat((angles.sin(), angles.cos()), 1)
    t = functional.silu(waves @ p["time1.weight"] + p["time1.bias"]) @ p["time2.weight"] + p["time2.bias"]
    times = functional.silu(t) @ p["time.weight"] + p["time.bias"]
    by_name = {conv.name: conv for conv in net.convs}

    def block(name: str, x: Tensor) -> Tensor:
        conv = by_name[name]
        kernel = p[f"{name}.weight"].view(conv.width, conv.inputs, conv.outputs).permute(2, 1, 0)
        y = functional.conv1d(functional.pad(x, (conv.width - 2, 1)), kernel, p[f"{name}.bias"])
        if conv.time is not None:
            y = y + times[:, conv.time, None]
        if net.norm == "step":
            rows = y.transpose(1, 2).reshape(-1, conv.outputs)
            rows = functional.group_norm(rows, 8, p[f"{name}.gain"], p[f"{name}.shift"], 1e-6)
            y = rows.view(len(y), -1, conv.outputs).transpose(1, 2)
        else:
            y = functional.group_norm(y, 8, p[f"{name}.gain"], p[f"{name}.shift"], 1e-6)
        return y.relu()

    skips: list[Tensor] = []
    x = x.transpose(1, 2)
    for i in range(net.num_blocks):
        skips.append(block(f"down{i}.1", block(f"down{i}.0", x)))
        x = functional.max_pool1d(skips[-1], 2) if i + 1 < net.num_blocks else skips[-1]
    for i in range(net.num_blocks - 2, -1, -1):
        x = block(f"up{i}.0", functional.interpolate(x, skips[i].shape[-1], mode="nearest-exact"))
        x = block(f"up{i}.2", block(f"up{i}.1", torch.cat((x, skips[i]), 1)))
    return x.transpose(1, 2) @ p["head.weight"] + p["head.bias"]


def made(norm: str = "step", num_blocks: int = 3) -> UNet:
    net = UNet(CHANNELS, FEATURES, num_blocks, norm)
    draw = torch.Generator().manual_seed(0)
    net.initialise(draw)
    net.stack.flat.add_(torch.randn(net.stack.flat.shape, generator=draw), alpha=0.05)  # gains, shifts, biases too
    return net


@pytest.mark.parametrize("norm", ["step", "trajectory"])
@pytest.mark.parametrize(("length", "num_blocks"), [(16, 3), (13, 3), (5, 2), (9, 1)])
def test_outputs_and_gradients(norm, length, num_blocks):
    net = made(norm, num_blocks)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, length, CHANNELS, generator=draw)
    c_noise, direction = torch.randn(3, generator=draw), torch.randn(3, length, CHANNELS, generator=draw)
    flat = net.stack.flat.clone().requires_grad_()
    expected = reference(net, net._views(flat), x, c_noise)
    (expected * direction).sum().backward()
    tape = Tape()
    out = net.forward(x, c_noise, tape)
    assert torch.allclose(out, expected, atol=2e-5)
    assert torch.allclose(out, net(x, c_noise), atol=1e-6)
    net.backward(tape, direction)
    assert flat.grad is not None
    wrong = (net.stack.grad - flat.grad).abs().max() / flat.grad.abs().max()
    assert wrong < 2e-5


def test_one_noise_level_for_all():
    net = made()
    x, c_noise = torch.randn(4, 8, CHANNELS), torch.tensor(-0.3)
    assert torch.allclose(net(x, c_noise), net(x, c_noise.expand(4)), atol=1e-4)


def test_a_step_is_normed_by_itself():
    """Far enough apart, rows do not know of one another: the usual group norm would carry what one row has to all."""
    net = made(num_blocks=1)
    x = torch.randn(1, 12, CHANNELS)
    other = x.clone()
    other[:, 0] = 10
    difference = (net(x, torch.zeros(1)) - net(other, torch.zeros(1))).abs().amax(-1)[0]
    assert difference[:3].min() > 1e-3
    assert difference[3:].max() < 1e-5
    usual = made("trajectory", num_blocks=1)
    assert (usual(x, torch.zeros(1)) - usual(other, torch.zeros(1))).abs().amax(-1)[0].min() > 1e-4


def test_initial_weights_are_flaxs():
    net = UNet(CHANNELS, 64, 3)
    net.initialise(torch.Generator().manual_seed(0))
    for name, parameter in net.parameters.items():
        if name.endswith("weight"):
            n_in = len(parameter)
            std = n_in**-0.5
            assert parameter.std() == pytest.approx(std, rel=6 / parameter.numel() ** 0.5)
            assert parameter.abs().max() <= 2 * std / 0.8796256 * (1 + 1e-6)
        else:
            assert (parameter == (1.0 if name.endswith("gain") else 0.0)).all()


def test_mixed_precision_rounds_the_products_only():
    exact, mixed = made(), made()
    mixed.precision = "mixed"
    draw = torch.Generator().manual_seed(2)
    x, c_noise = torch.randn(8, 16, CHANNELS, generator=draw), torch.randn(8, generator=draw)
    assert (exact(x, c_noise) - mixed(x, c_noise)).std() < 0.03 * exact(x, c_noise).std()
