"""Preconditioning, noise levels and loss of EDM."""

import math

import pytest
import torch

from agents.edm import Preconditioning, TrainedDenoiser, noise_levels
from agents.unet import UNet


def test_preconditioning_keeps_unit_variance():
    """With data of deviation sd the network's input and its target have variance 1 at every noise level."""
    sigma, sd = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64), 0.7
    f = Preconditioning.at(sigma, sd)
    assert torch.allclose(f.input**2 * (sd**2 + sigma**2), torch.ones(4, dtype=torch.float64))
    target = ((1 - f.skip) * sd) ** 2 + (f.skip * sigma) ** 2  # of x - c_skip (x + sigma n), over c_out^2
    assert torch.allclose(target / f.out**2, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(f.noise.exp() ** 4, sigma)


def test_noise_levels():
    levels = noise_levels(4)
    inverse = [80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in range(4)]
    assert levels.tolist() == pytest.approx([x**7 for x in inverse] + [0.0], rel=1e-5)
    assert len(noise_levels(256)) == 257
    churned = noise_levels(256)[:-1]
    assert int(((churned >= 0.05) & (churned <= 50)).sum()) == 191  # as the released code's sampler counts them


def made() -> tuple[UNet, TrainedDenoiser]:
    network = UNet(4, 32, 2)
    network.initialise(torch.Generator().manual_seed(0))
    return network, TrainedDenoiser(network, sigma_data=0.8)


def test_the_written_gradient_is_that_of_the_loss():
    (network, denoiser), draw = made(), torch.Generator().manual_seed(1)
    x, noise = (torch.randn(5, 6, 4, generator=draw) for _ in range(2))
    sigma = (1.2 * torch.randn(5, generator=draw) - 1.2).exp()
    loss = denoiser.write_gradient(x, sigma, noise)
    assert float(loss) == pytest.approx(float(denoiser.loss(x, sigma, noise).mean()), rel=1e-5)
    flat, grad = network.stack.flat, network.stack.grad
    along = torch.nn.functional.normalize(grad + 0.01 * torch.randn(flat.shape, generator=draw), dim=0)
    slope = float(grad @ along)
    before, step = flat.clone(), 1e-3
    ends = []
    for sign in (1, -1):
        flat.copy_(before + sign * step * along)
        ends.append(float(denoiser.loss(x, sigma, noise).double().mean()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_the_loss_is_the_papers():
    (network, denoiser), draw = made(), torch.Generator().manual_seed(2)
    x, noise = (torch.randn(2, 6, 4, generator=draw) for _ in range(2))
    sigma, sd = torch.tensor([0.3, 2.0]), 0.8
    expected = []
    for b, s in enumerate(sigma.tolist()):
        noisy = x[b] + s * noise[b]
        out = network((noisy / math.sqrt(s * s + sd * sd)).unsqueeze(0), torch.tensor([math.log(s) / 4]))[0]
        d = sd * sd / (s * s + sd * sd) * noisy + s * sd / math.sqrt(s * s + sd * sd) * out
        expected.append((s * s + sd * sd) / (s * sd) ** 2 * (d - x[b]) ** 2)
        assert torch.allclose(denoiser((x + sigma.view(-1, 1, 1) * noise), sigma)[b], d, atol=1e-5)
    assert torch.allclose(denoiser.loss(x, sigma, noise), torch.stack(expected), rtol=1e-3, atol=1e-5)
