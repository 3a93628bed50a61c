"""The transition filter: rollouts that go on with the most real of several predictions, and end where none is real
(MOREC, Luo, Xu, Cao and Yu, ICLR 2024, arXiv 2310.05422; released code: polixir/morec be8a641,
offlinerlkit/dynamics/ensemble_dynamics.py).

At every step each elite's Gaussian is drawn `draws` times. Each of these candidates is a next observation with its task
reward, cut to +-clip, and has a dynamics reward r_D(s, a, s') (`agents.dynamics_reward`). One is taken,

    softmax:  candidate c with probability  exp(r_D_c / temperature) / sum_j exp(r_D_j / temperature)
    argmax:   the one with the largest r_D

and the rollout is cut where the taken one has r_D < threshold, unless the environment's own rule ends it there. What
becomes of that last transition is `cut`:

    terminal: kept with d = 1, so that nothing is bootstrapped from it (what was released)
    truncate: kept with d = 0: its next state is bootstrapped, though no rollout goes on from it
    drop:     not kept

Penalties on the ensemble are of what all its members predict; one that needs the member or the outputs drawn gets those
of the candidate taken.

Shapes: M member, B row, S observation, A action, Y = S + A, D = S + 1 outputs, E elite, C = draws * E candidate,
Z standard normal draws of a step, X simulator state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.checks import check_choice, check_positive
from agents.dynamics import Ensemble
from agents.dynamics_reward import SCORER_PRECISIONS, SCORERS, DynamicsReward
from agents.rollout import CUTS, Penalty, Predictions, Step
from envs.errors import UserError

SELECTIONS = ("softmax", "argmax")


@dataclass
class FilterConfig:
    """The transition filter's settings; the defaults are those of the released code (polixir/morec be8a641)."""

    draws: int = 2  # of every elite: 10 candidates with 5 elites
    selection: str = "softmax"  # softmax | argmax
    temperature: float = 0.1  # of the softmax
    threshold: float = 0.6  # r_D below which a rollout is cut; r_D lies in 0.3133..1.3133, so that 0 cuts nothing
    cut: str = "terminal"  # terminal | truncate | drop: what becomes of the transition that a rollout is cut at
    clip: float = 25.0  # candidates' observations and rewards, in the dataset's units; the release takes 1e6 for NeoRL
    num_discriminators: int = 40  # taken evenly from the stored snapshots
    scorer: str = "discriminators"  # discriminators | distilled (one network; not exact)
    precision: str = "float32"  # float32 | bfloat16 (not exact), of the discriminators' matrix products

    def __post_init__(self) -> None:
        part = "method.filter"
        check_positive(self, "draws", "num_discriminators", "temperature", "clip", part=part)
        if not 0 <= self.threshold < math.inf:
            raise UserError(f"method.filter.threshold={self.threshold} must be 0 (nothing is cut) or greater")
        for name, choices in (
            ("selection", SELECTIONS), ("cut", CUTS), ("scorer", SCORERS), ("precision", SCORER_PRECISIONS),
        ):  # fmt: skip
            check_choice(self, name, choices, part)


def filtering_reward(state: Mapping[str, Any], config: FilterConfig) -> DynamicsReward:
    """The scorer that a filter's settings ask for, of a dynamics reward as its stage stores it.

    Raises:
        UserError: the stage does not hold what they ask for.
    """
    return DynamicsReward.from_state_dict(
        state, num_discriminators=config.num_discriminators, scorer=config.scorer, precision=config.precision
    )


class FilteredDynamics:
    """A `Dynamics` (see `agents.rollout`) of an ensemble whose predictions are filtered; it carries nothing.

    Args:
        ensemble: what predicts.
        reward: what tells predictions apart, on the ensemble's device.
    """

    choices = (0,)  # every elite predicts

    def __init__(self, ensemble: Ensemble, reward: DynamicsReward, config: FilterConfig) -> None:
        self.ensemble, self.reward, self.config = ensemble, reward, config
        self.observation_dim = ensemble.observation_dim

    @property
    def num_candidates(self) -> int:
        return self.config.draws * len(self.ensemble.elites)

    @property
    def num_noises(self) -> int:
        """The Gaussians' draws, and one for the softmax."""
        return self.num_candidates * self.ensemble.num_outputs + (self.config.selection == "softmax")

    @property
    def floats_per_row(self) -> int:
        per_candidate = 3 * self.ensemble.num_outputs + self.reward.floats_per_candidate
        return self.ensemble.floats_per_row + self.num_candidates * per_candidate

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> None:
        return None

    def step(
        self, carried_MBX: Tensor | None, state_action_MBY: Tensor, noise_MBZ: Tensor, choice_MB: Tensor,
        penalty: Penalty | None, next_obs_MBS: Tensor,
    ) -> Step:  # fmt: skip
        m, b, _ = state_action_MBY.shape
        state_action_BY, noise_BZ = (x.reshape(m * b, -1) for x in (state_action_MBY, noise_MBZ))
        if penalty is None:
            mean_EBD, std_EBD = self.ensemble.predict_elites(state_action_BY)
        else:
            everyone = self.ensemble.predict_all(state_action_BY)
            mean_EBD, std_EBD = (self.ensemble.of_elites(x) for x in everyone)
        candidates_CBD = self.candidates(state_action_BY, mean_EBD, std_EBD, noise_BZ)
        scores_BC = self.reward(state_action_BY, candidates_CBD[..., :-1].transpose(0, 1))
        index_B1 = self.choose(scores_BC, noise_BZ[:, -1]).unsqueeze(1)
        at_1BD = index_B1.unsqueeze(0).expand(-1, -1, self.ensemble.num_outputs)
        chosen_MBD = candidates_CBD.gather(0, at_1BD).view(m, b, -1)
        next_obs_MBS.copy_(chosen_MBD[..., :-1])
        score_MB = scores_BC.gather(1, index_B1).view(m, b)
        cost_MB = None
        if penalty is not None:
            member_B = self.ensemble.elite_numbers[index_B1.squeeze(1) % len(self.ensemble.elites)]
            sample_BD = chosen_MBD.reshape(m * b, -1).clone()
            sample_BD[:, :-1] -= state_action_BY[:, : self.observation_dim]
            cost_MB = penalty(Predictions(*everyone, member_B, sample_BD)).view(m, b)
        return Step(chosen_MBD[..., -1], cost_MB, None, score_MB, score_MB < self.config.threshold)

    def candidates(self, state_action_BY: Tensor, mean_EBD: Tensor, std_EBD: Tensor, noise_BZ: Tensor) -> Tensor:
        """Next observations and task rewards `(C, B, D)`: every elite's first draw, then every one's second, and so on.

        Args:
            mean_EBD, std_EBD: the elites' predictions of the change of the observation and of the reward.
            noise_BZ: as many standard normal draws as there are numbers in the result; further ones are left alone.
        """
        e, b, d = mean_EBD.shape
        noise_BZ = noise_BZ[:, : self.num_candidates * d]
        noise_FEBD = noise_BZ.reshape(b, self.config.draws, e, d).permute(1, 2, 0, 3)
        candidates_CBD = torch.addcmul(mean_EBD, std_EBD, noise_FEBD).reshape(-1, b, d)
        candidates_CBD[..., :-1] += state_action_BY[:, : self.observation_dim]
        return candidates_CBD.clamp_(-self.config.clip, self.config.clip)

    def choose(self, scores_BC: Tensor, normal_B: Tensor) -> Tensor:
        """Which candidate every row takes, `(B,)`. One whose r_D is not a number is only taken where all are so.

        Args:
            scores_BC: r_D.
            normal_B: a standard normal draw for every row, which the softmax is sampled with.
        """
        scores_BC = scores_BC.nan_to_num(nan=-_NEVER)
        if self.config.selection == "argmax":
            return scores_BC.argmax(1)
        cumulated_BC = torch.softmax(scores_BC / self.config.temperature, 1).cumsum(1)
        uniform_B1 = torch.special.ndtr(normal_B).clamp_max_(_BELOW_ONE).unsqueeze(1)
        return (cumulated_BC <= uniform_B1 * cumulated_BC[:, -1:]).sum(1)


_NEVER = 1e6  # below every r_D, and finite however small the temperature
_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1
