"""Dynamics of any quality, from an untrained model over the learned one to the environment itself (RAVL, Sims et al.
2024, Figure 1): what a penalty on model uncertainty is worth as the model gets better.

    quality q in [-1, 1]:   s' = (1 - |q|) s'_learned + |q| s'_other,   r likewise
    other: the true dynamics for q > 0, an untrained ensemble for q < 0

Shapes: M member, B start, S observation, A action, X simulator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.dynamics import DEFAULT_INITIAL_CUT, Ensemble
from agents.method import TrainingData
from agents.rollout import Dynamics, Penalty, Step
from envs.errors import UserError


def check_quality(quality: float, env_id: str) -> None:
    """Make sure that dynamics of this quality can be had.

    Raises:
        UserError: they need the environment's own, of which there are none.
    """
    if quality <= 0:
        return
    from envs.true_dynamics import TrueDynamics, TrueDynamicsError  # loads MuJoCo, which only this needs

    try:
        TrueDynamics(env_id)
    except TrueDynamicsError as error:
        raise UserError(f"method.model_quality={quality} must be 0 or less here: {error}") from None


def dynamics_of_quality(
    quality: float, learned: Ensemble | None, seed: int, data: TrainingData, initial_cut: float = DEFAULT_INITIAL_CUT
) -> Dynamics:
    """Dynamics for rollouts.

    Args:
        quality: see above.
        learned: the learned ensemble; not needed at 1.
        seed, initial_cut: of the learned ensemble; the untrained one has the weights that its training began with.
        data: what the ensemble learned from.

    Raises:
        UserError: the environment has no true dynamics, which a positive quality needs.
    """
    if quality > 0:
        from agents.true_dynamics import SimulatedDynamics  # loads MuJoCo, which only this needs

        true = SimulatedDynamics(data)
        if quality == 1:
            return true
    if learned is None:
        raise ValueError("there is no learned ensemble")
    if quality == 0:
        return learned
    other = true if quality > 0 else learned.untrained(seed, initial_cut)
    return other if quality == -1 else InterpolatedDynamics(learned, other, abs(quality))


class InterpolatedDynamics:
    """A `Dynamics` (see `agents.rollout`) between a learned ensemble and other dynamics.

    Both make a step from the same state; next observation, reward and penalty are interpolated, and so is what the
    other carries: between the state it came to and the state that shows what the ensemble predicted. Two ensembles
    predict with the same elite's number and the same noise, so that the noise is interpolated, not averaged away.

    Args:
        learned: carries nothing.
        other: takes no more noise and no other choices than `learned`.
        weight: of `other`, in [0, 1].
    """

    def __init__(self, learned: Ensemble, other: Dynamics, weight: float) -> None:
        self.learned, self.other, self.weight = learned, other, weight
        self.observation_dim, self.num_noises = learned.observation_dim, learned.num_noises
        self.choices = learned.choices
        self.floats_per_row = learned.floats_per_row + other.floats_per_row

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> Tensor | None:
        return self.other.begin(obs_MBS, states_MBX)

    def step(
        self, carried_MBX: Tensor | None, state_action_MBY: Tensor, noise_MBZ: Tensor, choice_MB: Tensor,
        penalty: Penalty | None, next_obs_MBS: Tensor,
    ) -> Step:  # fmt: skip
        predicted = torch.empty_like(next_obs_MBS)
        guess = self.learned.step(None, state_action_MBY, noise_MBZ, choice_MB, penalty, predicted)
        reward, cost = guess.reward_MB, guess.penalty_MB
        noise_MBZ = noise_MBZ[..., : self.other.num_noises]
        other = self.other.step(carried_MBX, state_action_MBY, noise_MBZ, choice_MB, penalty, next_obs_MBS)
        carried = other.carried_MBX
        if carried is not None:
            shown = self.other.begin(predicted, None)
            assert shown is not None
            carried = torch.lerp(shown, carried, self.weight)
        torch.lerp(predicted, next_obs_MBS, self.weight, out=next_obs_MBS)
        if cost is not None and other.penalty_MB is not None:
            cost = torch.lerp(cost, other.penalty_MB, self.weight)
        return Step(torch.lerp(reward, other.reward_MB, self.weight), cost, carried)
