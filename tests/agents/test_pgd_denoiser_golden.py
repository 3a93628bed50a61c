"""U-Net, loss, its gradient and training held against numbers of policy-guided diffusion's own code.

`golden/pgd_denoiser.npz` holds what EmptyJackson/policy-guided-diffusion at commit 9da606c computes (jax 0.10.2 on a
CPU, float32, flax 0.12.8, whose GroupNorm does with one trajectory what that of the pinned 0.6.11 does) for the inputs
that `case_inputs` draws with `numpy.random.RandomState`, whose streams are fixed for good. To repeat it:

- `models.diffusion.UNet(64, 3)`, parameters set to those drawn here (one `Dense` of time for each convolution that has
  time added, whose columns lie side by side here), mapped over the trajectories: `forward32`, `forward33`;
- `diffusion.edm.train_step` with `DenoiserHyperparams` as they are, on the four minibatches, keys PRNGKey(100 + u);
  `sigma` and `noise` are what it draws from them. The optimiser is that of
  `diffusion.diffusion.create_denoiser_train_state` for 20 steps of learning rate 2e-3, and after each step the running
  means are `util.jax.ema_update`'s with decay 0.995, every second step.

Kept are the `losses`; of the first gradient, for each parameter, up to 64 entries at equal distances and its norm; and
every 701st of all parameters after the first and the fourth step and of the running means. Tolerances are relative to
the largest entry.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.edm import TrainedDenoiser
from agents.method import TrainingData
from agents.trajectory_diffusion import DiffusionConfig, DiffusionTrainer
from agents.unet import UNet
from agents.unet_inference import InferenceUNet
from tests.agents.golden_values import Array, close

GOLDEN = np.load(Path(__file__).parent / "golden" / "pgd_denoiser.npz")
FEATURES, BLOCKS, OBS, ACT = 64, 3, 11, 3
CHANNELS = OBS + ACT + 2
LENGTH, BATCH, UPDATES, TOTAL = 32, 4, 4, 20
EVERY = 701


def case_inputs() -> tuple[dict[str, Array], dict[int, tuple[Array, Array]], Array]:
    """Parameters by name, (x, c_noise) by length, and minibatches."""
    rng = np.random.RandomState(20261122)
    parameters: dict[str, Array] = {}
    for name, shape in UNet(CHANNELS, FEATURES, BLOCKS).shapes().items():
        if name.endswith("weight"):
            bound = 1.5 / math.sqrt(shape[0])
            drawn = rng.uniform(-bound, bound, shape)
        elif name.endswith("gain"):
            drawn = rng.uniform(0.7, 1.3, shape)
        else:
            drawn = rng.uniform(-0.2, 0.2, shape)
        parameters[name] = drawn.astype(np.float32)
    forward = {}
    for length in (32, 33):
        x = rng.standard_normal((2, length, CHANNELS)).astype(np.float32)
        forward[length] = (x, (rng.standard_normal(2) * 0.3).astype(np.float32))
    return parameters, forward, rng.standard_normal((UPDATES, BATCH, LENGTH, CHANNELS)).astype(np.float32)


def filled(network: UNet) -> UNet:
    for name, values in case_inputs()[0].items():
        network.parameters[name].copy_(torch.from_numpy(values))
    return network


@pytest.mark.parametrize("length", [32, 33])
def test_forward(length):
    network = filled(UNet(CHANNELS, FEATURES, BLOCKS))
    x, c_noise = (torch.from_numpy(v) for v in case_inputs()[1][length])
    close(network(x, c_noise), GOLDEN[f"forward{length}"], 1e-5, "output")
    close(InferenceUNet(network)(x, c_noise), GOLDEN[f"forward{length}"], 2e-5, "output for sampling")


def test_loss_and_gradient():
    network = filled(UNet(CHANNELS, FEATURES, BLOCKS))
    x, sigma, noise = (torch.from_numpy(v) for v in (case_inputs()[2][0], GOLDEN["sigma"][0], GOLDEN["noise"][0]))
    loss = TrainedDenoiser(network).write_gradient(x, sigma, noise)
    close(loss, GOLDEN["losses"][:1], 1e-5, "loss")
    for name, gradient in network.gradients.items():
        expected = GOLDEN[f"gradient/{name}"]
        kept = gradient.reshape(-1)[:: max(1, gradient.numel() // 64)][:64]
        close(kept, expected, 1e-4, name)
        close(gradient.norm(), GOLDEN[f"gradient_norm/{name}"], 1e-4, f"norm of {name}")


def test_four_updates_with_schedule_and_running_means():
    trainer = DiffusionTrainer(
        some_data(), DiffusionConfig(features=FEATURES, num_updates=TOTAL, batch_size=BATCH, ema_every=2)
    )
    filled(trainer.network)
    trainer.averaged.copy_(trainer.network.stack.flat)
    flat, losses = trainer.network.stack.flat, []
    for update, (x, sigma, noise) in enumerate(zip(case_inputs()[2], GOLDEN["sigma"], GOLDEN["noise"], strict=True)):
        level = (torch.from_numpy(sigma).log() + 1.2) / 1.2
        before = float(trainer._loss)
        trainer.step(update, torch.from_numpy(x), level, torch.from_numpy(noise))
        losses.append(float(trainer._loss) - before)
        if update in (0, UPDATES - 1):
            close(flat[::EVERY], GOLDEN[f"parameters{update + 1}"], 1e-4, f"parameters after update {update + 1}")
    close(torch.tensor(losses), GOLDEN["losses"], 1e-4, "losses")
    close(trainer.averaged[::EVERY], GOLDEN["averaged"], 1e-5, "running means")


def some_data() -> TrainingData:
    """Enough for a trainer to be made; its minibatches are not used."""
    n = 400
    return TrainingData(
        "Hopper-v5", torch.zeros(n, OBS), torch.zeros(n, ACT), torch.zeros(n), torch.zeros(n, OBS), torch.zeros(n),
        episode_starts=torch.arange(0, n, 50),
    )  # fmt: skip
