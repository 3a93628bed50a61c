"""Diffusion after Karras, Aittala, Aila and Laine (NeurIPS 2022, "EDM"): preconditioning, noise and loss.

With a data deviation sd and a network F, a denoiser is

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)
    c_skip = sd^2 / (sigma^2 + sd^2)           c_out   = sigma sd / sqrt(sigma^2 + sd^2)
    c_in   = 1 / sqrt(sigma^2 + sd^2)          c_noise = ln(sigma) / 4

(table 1 of the paper). It is trained with ln(sigma) ~ N(p_mean, p_std^2), one sigma per trajectory, on

    mean over all elements of (sigma^2 + sd^2) / (sigma sd)^2 (D(x + sigma n; sigma) - x)^2.

Policy-guided diffusion standardises its data and takes sd = 1 (EmptyJackson/policy-guided-diffusion, diffusion/edm.py).

Shapes: B trajectory, H row, C channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.unet import Tape, UNet

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D: noisy sub-trajectories `(B, H, C)` and noise levels `()` or `(B,)` above 0 -> their mean without noise."""


@dataclass(frozen=True)
class Preconditioning:
    """The four factors at some noise levels, each shaped like them."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor

    @classmethod
    def at(cls, sigma: Tensor, sigma_data: float) -> Preconditioning:
        """For noise levels above 0."""
        total = sigma**2 + sigma_data**2
        return cls(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)


def noise_levels(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """The noise levels of a sampler, `(num_steps + 1,)`: from `sigma_max` down to `sigma_min`, then 0.

    sigma_i = (sigma_max^(1/rho) + i / (num_steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho (equation 5).
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    share = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    levels = (high + share * (low - high)) ** rho
    return torch.cat((levels, torch.zeros(1, dtype=torch.float64))).float().to(device)


class Denoiser:
    """D of a network, F(x; c_noise) of inputs `(B, H, C)` and noise levels `()` or `(B,)`."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], sigma_data: float = 1.0) -> None:
        self.network, self.sigma_data = network, sigma_data

    def __call__(self, x_BHC: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma), `(B, H, C)`, for noise levels `()` or `(B,)` above 0."""
        factors = Preconditioning.at(sigma, self.sigma_data)
        out = self.network(x_BHC * _column(factors.input), factors.noise)
        return out.mul_(_column(factors.out)).addcmul_(x_BHC, _column(factors.skip).expand_as(x_BHC))

    def loss(self, x_BHC: Tensor, sigma_B: Tensor, noise_BHC: Tensor) -> Tensor:
        """The loss of each element, `(B, H, C)`, with noise of unit variance."""
        noisy = torch.addcmul(x_BHC, _column(sigma_B), noise_BHC)
        weight_B = 1 / Preconditioning.at(sigma_B, self.sigma_data).out ** 2
        return (self(noisy, sigma_B) - x_BHC).square_().mul_(_column(weight_B))


class TrainedDenoiser(Denoiser):
    """D of a network that is being trained."""

    def __init__(self, network: UNet, sigma_data: float = 1.0) -> None:
        super().__init__(network, sigma_data)
        self._unet = network

    def write_gradient(self, x_BHC: Tensor, sigma_B: Tensor, noise_BHC: Tensor) -> Tensor:
        """The mean loss `()`; its gradient goes to the network's."""
        factors, tape = Preconditioning.at(sigma_B, self.sigma_data), Tape()
        noisy = torch.addcmul(x_BHC, _column(sigma_B), noise_BHC)
        out = self._unet.forward(noisy * _column(factors.input), factors.noise, tape)
        # the loss's weight is 1 / c_out^2, so its root times D - x is F less what F should have been
        error = out.sub_((x_BHC - _column(factors.skip) * noisy) / _column(factors.out))
        loss = error.square().mean()
        self._unet.backward(tape, error.mul_(2 / error.numel()))
        return loss


def _column(factor: Tensor) -> Tensor:
    """Of noise levels `(B,)`, or `()`, for all rows and channels."""
    return factor.view(-1, 1, 1)
