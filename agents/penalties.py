"""Penalties on a dynamics ensemble's uncertainty, and the weight they get: the six that "Revisiting Design Choices in
Offline Model-Based Reinforcement Learning" (Lu et al., ICLR 2022, arXiv 2110.04135) compares.

An ensemble's members i = 1..N predict N(mu_i, diag sigma_i^2) of D outputs in raw units, the change of the observation
and the reward; mu_bar = mean_i mu_i. A rollout's reward becomes r - lambda u(s, a):

    max_aleatoric      u = max_i || sigma_i ||_2                                        MOPO (official fake_env.py)
    max_pairwise       u = max_{i,j} || mu_i - mu_j ||_2                                MOReL's discrepancy, as a weight
    ensemble_std       u = reduced over d of sigma*_d,   sigma*^2 = mean_i sigma_i^2 + mean_i (mu_i - mu_bar)^2
    ensemble_variance  u = reduced over d of sigma*_d^2
    loo_kl             u = KL( N(mu_i, sigma_i^2) || N(mu_-i, sigma_-i^2) ),  i the member drawn (as in M2AC)
    ll_variance        u = var_i log N(y; mu_i, sigma_i^2),  y the outputs drawn

mu_-i and sigma_-i^2 are the moments of the mixture of the N - 1 others, and the KL of diagonal Gaussians is

    sum_d [ log(sigma_-i / sigma_i) + (sigma_i^2 + (mu_i - mu_-i)^2) / (2 sigma_-i^2) - 1/2 ]

The paper itself could not be read when this was written. The first three forms and the KL are those of public code that
cites it or the method named; that MOReL's discrepancy is used as a soft penalty, ensemble_variance and ll_variance are
unverified readings. Unresolved too, hence settings: how ensemble_std is reduced over outputs (`penalty_reduction`), and
whether penalties are of all members or of the elites (`penalty_members`).

Two traps: the distance of max_pairwise is between two members, not of a member to the mean, which some code calls by
the same name; and ensemble_std has the aleatoric part too.

Shapes: M member of a pack, E member of the ensemble, B row, D = S + 1 outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.dynamics import Ensemble
from agents.method import TrainingData
from agents.networks import StackedScalar
from agents.optim import Adam
from agents.randomness import generator
from agents.rollout import Predictions
from envs.errors import UserError

REDUCTIONS = ("rms", "mean", "norm")  # over outputs: sqrt(mean_d x_d^2), mean_d x_d, sqrt(sum_d x_d^2)
MEMBERS = ("all", "elites")
# what penalties are divided by: nothing, their mean over the dataset, or that over the mean of max_aleatoric there
SCALES = ("raw", "dataset", "max_aleatoric")

_SCALE_ROWS = 4096  # of the dataset, whose mean penalty is the scale
_CHUNK = 1024  # of them that are predicted at once
_LARGEST_EXCESS = 1e9  # of lambda u over its target


# ---- the six --------------------------------------------------------------------------------------------------------


def max_aleatoric(made: Predictions) -> Tensor:
    """max over members of the Euclidean norm of the standard deviations, `(B,)`."""
    return torch.linalg.vector_norm(made.std_EBD, dim=-1).amax(0)


def max_pairwise(made: Predictions) -> Tensor:
    """The largest Euclidean distance between the means of two members, `(B,)`."""
    mean_EBD = made.mean_EBD
    squared = [(mean_EBD[i + 1 :] - mean_EBD[i]).square_().sum(-1).amax(0) for i in range(len(mean_EBD) - 1)]
    return torch.stack(squared).amax(0).sqrt_()


def mixture_variance(made: Predictions) -> Tensor:
    """sigma*^2 `(B, D)`: the variance of the members' Gaussians taken as one mixture."""
    # var(0) takes four times as long on a CPU
    return made.std_EBD.square().mean(0).add_((made.mean_EBD - made.mean_EBD.mean(0)).square_().mean(0))


def ensemble_std(made: Predictions, reduction: str = "rms") -> Tensor:
    """sigma* reduced over outputs, `(B,)`."""
    variance_BD = mixture_variance(made)
    if reduction == "mean":
        return variance_BD.sqrt_().mean(-1)
    return (variance_BD.mean(-1) if reduction == "rms" else variance_BD.sum(-1)).sqrt_()


def ensemble_variance(made: Predictions, reduction: str = "rms") -> Tensor:
    """sigma*^2 reduced over outputs, `(B,)`: the sum for `norm`, else the mean, so that with `rms` and `norm` it is
    the square of `ensemble_std`."""
    variance_BD = mixture_variance(made)
    return variance_BD.sum(-1) if reduction == "norm" else variance_BD.mean(-1)


def loo_kl(made: Predictions) -> Tensor:
    """KL of the drawn member's Gaussian from the mixture of the others taken as one Gaussian, `(B,)`."""
    mean_EBD, std_EBD, member_B = made.mean_EBD, made.std_EBD, made.member_B
    row = torch.arange(len(member_B), device=member_B.device)
    others_EB1 = (torch.arange(len(mean_EBD), device=member_B.device).unsqueeze(1) != member_B).unsqueeze(-1)
    count = len(mean_EBD) - 1
    mean_BD, std_BD = mean_EBD[member_B, row], std_EBD[member_B, row]
    rest_BD = torch.where(others_EB1, mean_EBD, 0.0).sum(0) / count
    # around the others' mean: differences of sums of squares of raw numbers would cancel
    squares_EBD = (mean_EBD - rest_BD).square_().addcmul_(std_EBD, std_EBD)
    variance_BD = torch.where(others_EB1, squares_EBD, 0.0).sum(0) / count
    ratio_BD = (std_BD.square() + (mean_BD - rest_BD).square_()) / variance_BD
    return (variance_BD.log() - 2.0 * std_BD.log() + ratio_BD - 1.0).sum(-1).mul_(0.5)


def ll_variance(made: Predictions) -> Tensor:
    """Variance over members of the log-likelihood that each gives to the outputs drawn, `(B,)`."""
    z_EBD = (made.sample_BD - made.mean_EBD) / made.std_EBD
    log_likelihood_EB = z_EBD.square_().mul_(-0.5).sub_(made.std_EBD.log()).sum(-1)  # without the constant
    return log_likelihood_EB.var(0, correction=0)


_FORMS: dict[str, Callable[[Predictions], Tensor]] = {
    "max_aleatoric": max_aleatoric, "max_pairwise": max_pairwise, "loo_kl": loo_kl, "ll_variance": ll_variance,
}  # fmt: skip
_REDUCED: dict[str, Callable[[Predictions, str], Tensor]] = {
    "ensemble_std": ensemble_std, "ensemble_variance": ensemble_variance,
}  # fmt: skip
PENALTIES = ("max_aleatoric", "max_pairwise", "ensemble_std", "ensemble_variance", "loo_kl", "ll_variance")


@dataclass(frozen=True)
class EnsemblePenalty:
    """A penalty by its name, as rollouts take it; plain data that can be sent to their workers.

    Args:
        name: one of `PENALTIES`.
        members: numbers of the ensemble's members that count, ascending; a drawn one must be among them. None: all.
        reduction: one of `REDUCTIONS`, for ensemble_std and ensemble_variance.
        factor: what the penalty is multiplied with.
    """

    name: str
    members: tuple[int, ...] | None = None
    reduction: str = "rms"
    factor: float = 1.0

    def __call__(self, made: Predictions) -> Tensor:
        if self.members is not None:
            made = _of_members(made, self.members)
        penalty_B = _REDUCED[self.name](made, self.reduction) if self.name in _REDUCED else _FORMS[self.name](made)
        return penalty_B if self.factor == 1.0 else penalty_B * self.factor


def _of_members(made: Predictions, members: Sequence[int]) -> Predictions:
    mean_KBD, std_KBD = (torch.stack([x[e] for e in members]) for x in (made.mean_EBD, made.std_EBD))
    place_B = sum(((made.member_B > e).to(torch.int64) for e in members), torch.zeros_like(made.member_B))
    return Predictions(mean_KBD, std_KBD, place_B, made.sample_BD)


# ---- how large a penalty is on the dataset --------------------------------------------------------------------------


def dataset_means(ensemble: Ensemble, data: TrainingData, penalties: Sequence[EnsemblePenalty]) -> list[float]:
    """The mean of some penalties over at most 4,096 rows of the dataset, evenly spaced.

    Elites and outputs are drawn by a generator of their own, the same for every run.
    """
    total = len(data.observations)
    at = torch.arange(min(total, _SCALE_ROWS)) * total // min(total, _SCALE_ROWS)
    source = generator(0, "penalty scale")
    elites = torch.tensor(ensemble.elites)
    member_B = elites[torch.randint(len(elites), at.shape, generator=source)]
    noise_BD = torch.randn((len(at), ensemble.num_outputs), generator=source)
    device, sums = data.observations.device, [0.0] * len(penalties)
    with torch.inference_mode():
        for index, member, noise in zip(at.split(_CHUNK), member_B.split(_CHUNK), noise_BD.split(_CHUNK), strict=True):
            index = index.to(device)
            made = drawn(
                *ensemble.predict_all(torch.cat((data.observations[index], data.actions[index]), -1)),
                member.to(device), noise.to(device),
            )  # fmt: skip
            sums = [s + float(p(made).sum(dtype=torch.float64)) for s, p in zip(sums, penalties, strict=True)]
    return [s / len(at) for s in sums]


def drawn(mean_EBD: Tensor, std_EBD: Tensor, member_B: Tensor, noise_BD: Tensor) -> Predictions:
    """What an ensemble predicts, with the outputs of the drawn members for standard normal draws."""
    row = torch.arange(len(member_B), device=member_B.device)
    sample_BD = torch.addcmul(mean_EBD[member_B, row], std_EBD[member_B, row], noise_BD)
    return Predictions(mean_EBD, std_EBD, member_B, sample_BD)


def make_penalty(
    name: str, reduction: str, members: str, scale: str, ensemble: Ensemble | None, data: TrainingData
) -> EnsemblePenalty:
    """A penalty by its settings.

    Args:
        scale: one of `SCALES`.
        ensemble: None where rollouts step the simulator, whose penalty is 0.

    Raises:
        UserError: the mean over the dataset, which the scale is made of, is not a positive number.
    """
    if ensemble is None:
        return EnsemblePenalty(name, reduction=reduction)
    elites = tuple(sorted(ensemble.elites)) if members == "elites" else None
    plain = EnsemblePenalty(name, elites, reduction)
    if scale == "raw" or (scale == name and elites is None):
        return plain
    mean, reference = dataset_means(ensemble, data, [plain, EnsemblePenalty("max_aleatoric")])
    if not 0 < mean < math.inf:
        raise UserError(
            f"the mean of method.penalty={name} over the dataset is {mean:g}, by which nothing can be divided; set "
            "method.penalty_scale=raw or take another penalty"
        )
    return EnsemblePenalty(name, elites, reduction, (1.0 if scale == "dataset" else reference) / mean)


# ---- the weight -----------------------------------------------------------------------------------------------------


class PenaltyWeights:
    """lambda of every member: fixed, or tuned so that the mean penalty of the rollouts is held at a target.

    After every rollout phase a tuned one makes a step of Adam on log lambda that lowers

        log lambda * stopgrad( lambda mean(u) - target )

    so it shrinks while lambda mean(u) is above the target and grows while it is below. Everything is on the host, where
    the rollouts' sums are read anyway.

    Args:
        coefs: lambda of each member, to begin with.
        targets: in units of the reward; None: lambda stays as it is.
        learning_rates: of log lambda.
    """

    def __init__(
        self, coefs: Sequence[float], targets: Sequence[float | None], learning_rates: Sequence[float]
    ) -> None:
        self._coefs, self._targets, self._rates = list(coefs), list(targets), list(learning_rates)
        self.tuned = any(target is not None for target in targets)
        if self.tuned:
            self._log_coef = StackedScalar(len(self._coefs), 0.0)
            begin = [1.0 if target is None else coef for coef, target in zip(coefs, targets, strict=True)]
            self._log_coef.flat.copy_(torch.tensor(begin).log())
            self._adam = Adam(self._log_coef, self._rates)

    @property
    def values(self) -> list[float]:
        """lambda of each member, for the next rollouts."""
        if not self.tuned:
            return self._coefs
        now = self._log_coef.flat.exp().tolist()
        return [
            coef if target is None else tuned
            for coef, target, tuned in zip(self._coefs, self._targets, now, strict=True)
        ]

    def step(self, means: Sequence[float]) -> None:
        """Take in the mean penalties of a rollout phase, one per member; not a number: it had no rows."""
        if not self.tuned:
            return
        excess = [
            0.0 if target is None or math.isnan(mean) else coef * mean - target
            for coef, mean, target in zip(self.values, means, self._targets, strict=True)
        ]
        # Adam heeds how excesses compare, and the square of one must be finite in float32
        self._log_coef.grad.copy_(torch.tensor(excess).clamp_(max=_LARGEST_EXCESS))
        self._adam.step()

    def select(self, members: Sequence[int]) -> PenaltyWeights:
        """Those of some members, as they are."""
        coefs, targets, rates = self._coefs, self._targets, self._rates
        other = PenaltyWeights([coefs[m] for m in members], [targets[m] for m in members], [rates[m] for m in members])
        if self.tuned and other.tuned:
            other._log_coef = self._log_coef.select(members)
            other._adam = self._adam.select(other._log_coef, members)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Empty where nothing is tuned."""
        return {"log_coef": self._log_coef.flat, "adam": self._adam.state_dict()} if self.tuned else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.tuned:
            self._log_coef.flat.copy_(state["log_coef"])
            self._adam.load_state_dict(state["adam"])
