"""The learner that a dynamics reward is trained against: a policy whose state is (s, a) and whose action is s' (MOREC,
Luo et al. 2024, which sees the environment's transition function as an agent).

    pi(y | s, a) = N(mu(s, a), diag sigma(s, a)^2),   y the standardised change of the (scaled) observation

It is fitted by likelihood and then improved by policy gradients on one-step episodes from the data's (s, a), as PPO
does it (Schulman et al. 2017) with the mean reward of a row's other draws as the baseline:

    maximise mean min(rho A, clip(rho, 1 - c, 1 + c) A),   rho = pi(y | s, a) / pi_before(y | s, a)

with respect to mu only. MOREC's own learner is not public. Gradients are written out;
`tests/agents/test_dynamics_policy.py` holds them against autograd.

Shapes: C draw of a row, B batch, S observation, A action, Y = S + A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agents.networks import StackedMLP, initialise
from agents.optim import Adam
from agents.randomness import generator

_LARGEST_STD = 2.0  # of a standardised change: wider than any that likelihood asks for


class Moments:
    """A policy's Gaussians for a batch of rows, and what their gradients need."""

    def __init__(self, out_B2S: Tensor, inputs: list[Tensor], low: float) -> None:
        self.mean_BS, raw_BS = out_B2S.chunk(2, dim=-1)
        share, span = torch.sigmoid(raw_BS), math.log(_LARGEST_STD) - low
        self.log_std_BS = low + span * share
        self.slope_BS = span * share * (1 - share)  # d log_std / d raw
        self.inputs = inputs

    def z(self, change: Tensor) -> Tensor:
        """Standardised draws `(..., B, S)`."""
        return (change - self.mean_BS) * torch.exp(-self.log_std_BS)

    def log_prob(self, z: Tensor) -> Tensor:
        """Of draws by their `z`, `(..., B)`, without the constant."""
        return (-0.5 * z.square() - self.log_std_BS).sum(-1)


class DynamicsPolicy:
    """See the module.

    Args:
        seed: of the first weights.
        sizes: Y, hidden widths, and 2 S.
        min_std: lower bound of sigma.
        device: where it lives.
    """

    def __init__(self, seed: int, sizes: Sequence[int], min_std: float, device: torch.device | str = "cpu") -> None:
        self.network = StackedMLP((1,), sizes)
        initialise(self.network, [generator(seed, "init dynamics policy")], scheme="torch", last_bound=0.01)
        self.network = self.network.to(device)
        self.observation_dim = sizes[-1] // 2
        self._low = math.log(min_std)

    def copy(self) -> DynamicsPolicy:
        """The same policy with parameters of its own."""
        other = DynamicsPolicy.__new__(DynamicsPolicy)
        other.network, other.observation_dim, other._low = self.network.clone(), self.observation_dim, self._low
        return other

    def moments(self, inputs_BY: Tensor) -> Moments:
        """The Gaussians of standardised `[s, a]`."""
        out, inputs = self.network.forward(inputs_BY.unsqueeze(0))
        return Moments(out.squeeze(0), inputs, self._low)

    def sample(self, inputs_BY: Tensor, noise: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Standardised changes `(..., B, S)` for standard normal draws of that shape.

        Args:
            scale: of the standard deviations, broadcast.
        """
        moments = self.moments(inputs_BY)
        return moments.mean_BS + scale * torch.exp(moments.log_std_BS) * noise

    def _step(self, optimiser: Adam, moments: Moments, mean_BS: Tensor, log_std_BS: Tensor) -> None:
        """One step of Adam, given the loss's gradients with respect to means and log standard deviations."""
        grad = torch.cat((mean_BS, log_std_BS * moments.slope_BS), dim=-1).unsqueeze(0)
        self.network.write_gradients(moments.inputs, self.network.hidden_gradients(moments.inputs, grad), grad)
        optimiser.step()

    def likelihood_step(self, optimiser: Adam, inputs_BY: Tensor, change_BS: Tensor) -> Tensor:
        """A step towards greater likelihood of real changes; returns the loss before it, `()`: the mean over rows and
        columns of z^2 / 2 + log sigma."""
        moments = self.moments(inputs_BY)
        z = moments.z(change_BS)
        loss = -moments.log_prob(z).mean() / z.shape[1]
        self._step(optimiser, moments, -z * torch.exp(-moments.log_std_BS) / z.numel(), (1 - z.square()) / z.numel())
        return loss

    def policy_steps(
        self, optimiser: Adam, inputs_BY: Tensor, change_CBS: Tensor, reward_CB: Tensor, clip: float, passes: int
    ) -> None:
        """Steps of the means towards greater reward of this policy's own draws.

        Standard deviations stay as likelihood has fitted them: a reward that peaks at one next state would shrink them
        to nothing, and a discriminator of such draws learns that the peak is not real (docs/morec.md).

        Args:
            inputs_BY: standardised `[s, a]`.
            change_CBS: C > 1 draws of each row from this policy.
            reward_CB: their rewards.
            clip: c of the module docstring.
            passes: steps on these draws.
        """
        draws = len(change_CBS)
        advantage_CB = (reward_CB - reward_CB.mean(0)) * (draws / (draws - 1))
        advantage_CB = advantage_CB / (advantage_CB.std() + 1e-6)
        before_CB = None
        for _ in range(passes):
            moments = self.moments(inputs_BY)
            z = moments.z(change_CBS)
            log_prob_CB = moments.log_prob(z)
            before_CB = log_prob_CB if before_CB is None else before_CB
            ratio_CB = torch.exp(log_prob_CB - before_CB)
            # the smaller term is constant where the ratio has gone beyond the clip in the direction of the advantage
            beyond = ratio_CB.sub(1).mul(torch.sign(advantage_CB)) > clip
            grad_CB = torch.where(beyond, 0.0, -advantage_CB * ratio_CB / advantage_CB.numel())
            grad_mean_BS = (grad_CB.unsqueeze(-1) * z).mul(torch.exp(-moments.log_std_BS)).sum(0)
            self._step(optimiser, moments, grad_mean_BS, torch.zeros_like(grad_mean_BS))
