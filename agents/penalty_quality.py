"""What penalties on an ensemble's uncertainty are worth: how they go with its true error where a policy leads it.

After the protocol of Lu et al. ("Revisiting Design Choices in Offline Model-Based Reinforcement Learning", ICLR 2022)
as far as its abstract tells it: the model's inputs are not those of a test set but those that a policy reaches *inside
the model*, and correlations by rank and by value stand apart, since a change of setting can keep the order and destroy
the scale. What is measured beside them, and everything in detail, is this project's design.

A policy is rolled out in the ensemble from states of the dataset. The simulator is put into every imagined state and
makes a step with the same action: what the model would have had to predict. The error is e = || s'_model - s'_true ||^2
of the state that the rollout goes on with, in raw units as the penalties are. For each penalty u, over the rollouts
that have not ended:

    spearman, pearson  of u and e
    spearman_mean      of u and the squared distance of the mixture's mean: e without the draw, which favours penalties
                       that know how widely members draw
    auroc              of u for "e is in its top 10 %": 1 if it tells all such steps from the others, 0.5 if none
    ause               area between two curves, the mean error of what is left when the share of steps with the largest
                       u, or with the largest e, is taken away, over the mean error of all: 0 is best
    inside_1, inside_2 share of next observations' columns within 1 and 2 deviations, where u is an interval's width:
                       of the mixture's around its mean (ensemble_std), of the drawn member's around its own
                       (max_aleatoric); of Gaussians 0.683 and 0.954

Shapes: B start, H step, E ensemble member, S observation, A action, X simulator state, D = S + 1 outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.diagnostics import auroc, spearman
from agents.dynamics import Ensemble
from agents.method import TrainingData
from agents.penalties import PENALTIES, EnsemblePenalty, drawn, mixture_variance
from agents.randomness import derived_seed, generator
from agents.rollout import Dynamics, Predictions
from envs.policies import Policy

TOP = 0.1  # share of the largest errors that count as out of the model's distribution
NOMINAL = (math.erf(1 / math.sqrt(2)), math.erf(math.sqrt(2)))  # of a Gaussian within 1 and 2 deviations
_MEASURED_FROM = 20  # steps; fewer say nothing of a correlation


@dataclass(frozen=True)
class Quality:
    """What a penalty is worth over some steps; see the module."""

    spearman: float
    pearson: float
    spearman_mean: float
    auroc: float
    ause: float
    inside_1: float  # not a number of a penalty that is no interval's width
    inside_2: float


@dataclass(frozen=True)
class Judged:
    """Penalties and errors of H steps of B rollouts, float64; not a number where a rollout has ended."""

    error_HB: Tensor
    mean_error_HB: Tensor  # of the mixture's mean
    penalty_HB: dict[str, Tensor]
    inside_HB2: dict[str, Tensor]  # by penalty: share of a step's columns within 1 and within 2 deviations

    def quality(self, name: str, steps: Sequence[int] | None = None) -> Quality:
        """Of a penalty, over some steps (from 1 on) taken together; None: all."""
        chosen = slice(None) if steps is None else [step - 1 for step in steps]
        parts = (self.error_HB, self.mean_error_HB, self.penalty_HB[name])
        error, mean_error, penalty = (part[chosen].flatten() for part in parts)
        known = error.isfinite() & penalty.isfinite()
        inside = [math.nan, math.nan]
        if name in self.inside_HB2:
            inside = self.inside_HB2[name][chosen].flatten(0, -2)[known].mean(0).tolist()
        return Quality(*_statistics(error[known], mean_error[known], penalty[known]), *inside)

    def count(self, steps: Sequence[int] | None = None) -> int:
        """Steps that are known."""
        chosen = slice(None) if steps is None else [step - 1 for step in steps]
        return int(self.error_HB[chosen].isfinite().sum())


def _statistics(error: Tensor, mean_error: Tensor, penalty: Tensor) -> tuple[float, float, float, float, float]:
    if len(error) < _MEASURED_FROM:
        return (math.nan,) * 5
    top = error > float(np.quantile(error.numpy(), 1 - TOP))
    return (
        float(spearman(penalty, error)), pearson(penalty, error), float(spearman(penalty, mean_error)),
        float(auroc(penalty, top, ~top)), ause(error, penalty),
    )  # fmt: skip


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two vectors; not a number where one is constant."""
    return float(torch.corrcoef(torch.stack((x, y)).double())[0, 1])


def ause(error: Tensor, penalty: Tensor) -> float:
    """Area under the sparsification error, over all numbers of steps that can be taken away (none, one, ..., all but
    one); steps of equal penalty count as in random order.

    Args:
        error, penalty: `(n,)`, errors 0 or greater and not all of them 0.
    """
    error = error.double()
    # of equal penalties each step has the mean error of all
    _, which, counts = penalty.unique(return_inverse=True, return_counts=True)
    shared = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, which, error) / counts
    left = torch.arange(1, len(error) + 1)
    by_penalty = shared[which][penalty.argsort()].cumsum(0) / left
    by_error = error.sort().values.cumsum(0) / left
    return float((by_penalty - by_error).mean() / error.mean())


# ---- where penalties are looked at ----------------------------------------------------------------------------------


@torch.inference_mode()
def imagine(
    policy: Policy, ensemble: Ensemble, data: TrainingData, true: Dynamics, num_starts: int, length: int, seed: int
) -> Judged:
    """Rollouts of a policy in the ensemble from states of its dataset, held against the simulator step by step.

    Args:
        policy: acts in the environment's units; its actions are sampled.
        data: what the ensemble has learned from.
        true: its simulator (`agents.model_error.simulator`).
        num_starts, length: B, H.
        seed: of all draws. Starts and the noise of a step are the same for every ensemble and policy.
    """
    source, rng = generator(seed, "penalty quality"), np.random.default_rng(derived_seed(seed, "penalty quality"))
    obs_BS = data.observations[torch.randint(len(data.observations), (num_starts,), generator=source)]
    noise_HBD = torch.randn((length, num_starts, ensemble.num_outputs), generator=source)
    choice_HB = torch.rand((length, num_starts), generator=source)
    courses, place_B, termination = _Courses(length, num_starts), torch.arange(num_starts), data.termination
    for t in range(length):
        action_BA = _actions(policy, obs_BS, data, rng)
        made = _predict(ensemble, obs_BS, action_BA, choice_HB[t, place_B], noise_HBD[t, place_B])
        true_next_BS = _true_step(true, obs_BS, action_BA)
        courses.keep(t, place_B, made, obs_BS, true_next_BS)
        obs_BS = obs_BS + made.sample_BD[:, :-1]
        going_on = obs_BS.isfinite().all(-1) & true_next_BS.isfinite().all(-1)
        going_on &= ~termination(obs_BS)
        obs_BS, place_B = obs_BS[going_on], place_B[going_on]
        if not len(place_B):
            break
    return courses.judged()


@torch.inference_mode()
def transfer(ensemble: Ensemble, other: TrainingData, num_rows: int, seed: int) -> Judged:
    """Single steps of another dataset of the same environment, such as a better or a worse policy's.

    Args:
        num_rows: how many of its rows, drawn at random.
    """
    source = generator(seed, "penalty transfer")
    index_B = torch.randint(len(other.observations), (num_rows,), generator=source)
    noise_BD, choice_B = (
        torch.randn((num_rows, ensemble.num_outputs), generator=source), torch.rand(num_rows, generator=source)
    )  # fmt: skip
    obs_BS = other.observations[index_B]
    made = _predict(ensemble, obs_BS, other.actions[index_B], choice_B, noise_BD)
    courses = _Courses(1, num_rows)
    courses.keep(0, torch.arange(num_rows), made, obs_BS, other.next_observations[index_B])
    return courses.judged()


def _predict(ensemble: Ensemble, obs_BS: Tensor, action_BA: Tensor, choice_B: Tensor, noise_BD: Tensor) -> Predictions:
    """Args: choice_B: in [0, 1), of the elite."""
    elites = torch.tensor(ensemble.elites)
    member_B = elites[(choice_B * len(elites)).long()]
    return drawn(*ensemble.predict_all(torch.cat((obs_BS, action_BA), -1)), member_B, noise_BD)


def _actions(policy: Policy, obs_BS: Tensor, data: TrainingData, rng: np.random.Generator) -> Tensor:
    """Actions in [-1, 1]."""
    if data.observation_mean is not None and data.observation_std is not None:
        obs_BS = obs_BS * data.observation_std + data.observation_mean
    action_BA = torch.from_numpy(policy.act(obs_BS.numpy(), rng)).float()
    if data.action_low is None or data.action_high is None:
        return action_BA
    center, scale = (data.action_high + data.action_low) / 2, (data.action_high - data.action_low) / 2
    return (action_BA - center) / scale


def _true_step(true: Dynamics, obs_BS: Tensor, action_BA: Tensor) -> Tensor:
    """Where the simulator's step leads from what observations show, `(B, S)`; not a number where that is nowhere."""
    obs_1BS, next_1BS = obs_BS.unsqueeze(0), torch.empty_like(obs_BS.unsqueeze(0))
    none_1B = torch.zeros(next_1BS.shape[:-1], dtype=torch.int64)
    state_action = torch.cat((obs_1BS, action_BA.unsqueeze(0)), -1)
    step = true.step(true.begin(obs_1BS, None), state_action, next_1BS[..., :0], none_1B, None, next_1BS)
    return torch.where(step.reward_MB.isfinite().unsqueeze(-1), next_1BS, math.nan).squeeze(0)


class _Courses:
    """A `Judged` that is being written."""

    def __init__(self, length: int, num_starts: int) -> None:
        self._error_HB = torch.full((length, num_starts), math.nan, dtype=torch.float64)
        self._mean_error_HB = self._error_HB.clone()
        self._penalty_HB = {name: self._error_HB.clone() for name in PENALTIES}
        unknown_HB2 = self._error_HB.unsqueeze(-1).repeat(1, 1, 2)
        self._inside_HB2 = {name: unknown_HB2.clone() for name in ("max_aleatoric", "ensemble_std")}

    def keep(self, t: int, place_B: Tensor, made: Predictions, obs_BS: Tensor, true_next_BS: Tensor) -> None:
        change_BS, row = true_next_BS - obs_BS, torch.arange(len(place_B))
        self._error_HB[t, place_B] = (made.sample_BD[:, :-1] - change_BS).double().square().sum(-1)
        mean_BS = made.mean_EBD.mean(0)[:, :-1]
        self._mean_error_HB[t, place_B] = (mean_BS - change_BS).double().square().sum(-1)
        for name, kept_HB in self._penalty_HB.items():
            kept_HB[t, place_B] = EnsemblePenalty(name)(made).double()
        widths = {
            "max_aleatoric": (made.mean_EBD[made.member_B, row], made.std_EBD[made.member_B, row]),
            "ensemble_std": (made.mean_EBD.mean(0), mixture_variance(made).sqrt()),
        }
        for name, (mean_BD, std_BD) in widths.items():
            off_BS = (change_BS - mean_BD[:, :-1]).abs() / std_BD[:, :-1]
            inside_B2 = torch.stack([(off_BS <= deviations).double().mean(-1) for deviations in (1, 2)], -1)
            self._inside_HB2[name][t, place_B] = inside_B2

    def judged(self) -> Judged:
        return Judged(self._error_HB, self._mean_error_HB, self._penalty_HB, self._inside_HB2)
