"""MOPO: Model-based Offline Policy Optimization (Yu et al., NeurIPS 2020, arXiv 2005.13239).

Soft actor-critic on model rollouts whose reward is lowered by the ensemble's uncertainty u,

    r~(s, a) = r(s, a) - penalty_coef * u(s, a),    u(s, a) = max_e || sigma_e(s, a) ||_2

with the maximum over all ensemble members, not only the elites, and the norm over state change and reward (official
`fake_env.py`; OfflineRL-Kit `np.amax(np.linalg.norm(std, axis=2), axis=0)`).

`penalty` takes another u of `agents.penalties`, where also `penalty_scale` and the automatic penalty_coef
(`penalty_target`) are explained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agents.checks import check_choice, check_not_negative, check_positive
from agents.method import per_member
from agents.model_based import ModelBasedConfig, ModelBasedSAC
from agents.penalties import MEMBERS, PENALTIES, REDUCTIONS, SCALES, PenaltyWeights, make_penalty
from agents.rollout import Penalty
from envs.errors import UserError


@dataclass
class MOPOConfig(ModelBasedConfig):
    """MOPO's hyperparameters; per-dataset values in agents/mopo.yaml."""

    penalty_coef: float = per_member(1.0)  # lambda; with a penalty_target what it begins with
    # max_aleatoric | max_pairwise | ensemble_std | ensemble_variance | loo_kl | ll_variance
    penalty: str = "max_aleatoric"
    penalty_members: str = "all"  # all | elites: whose predictions it is made of
    penalty_reduction: str = "rms"  # rms | mean | norm: over outputs, of ensemble_std and ensemble_variance
    # raw | dataset: divided by its mean over the dataset | max_aleatoric: as large there, on average, as max_aleatoric
    penalty_scale: str = "raw"
    # in units of the reward: penalty_coef is tuned so that the rollouts' mean of penalty_coef * u is this
    penalty_target: float | None = per_member(None)
    penalty_lr: float = per_member(0.01)  # of log penalty_coef, a step an epoch, with a penalty_target

    @property
    def initial_settings(self) -> tuple[str, ...]:
        """What counts at the beginning only (see `agents.method.changeable_settings`)."""
        # whether the weight is tuned is settled when training begins
        return ("penalty_target", "penalty_lr") if self.penalty_target is None else ("penalty_coef",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "penalty_coef")
        check_choice(self, "penalty", PENALTIES)
        check_choice(self, "penalty_members", MEMBERS)
        check_choice(self, "penalty_reduction", REDUCTIONS)
        check_choice(self, "penalty_scale", SCALES)
        check_positive(self, "penalty_lr")
        self._check_members()
        if self.penalty_target is not None:
            self._check_target(self.penalty_target)

    def _check_members(self) -> None:
        dynamics = self.dynamics
        counted = dynamics.members_used if self.penalty_members == "all" else dynamics.elites_used
        if counted < 2 and self.penalty != "max_aleatoric":
            who = "member" if self.penalty_members == "all" else "elite"
            raise UserError(
                f"method.penalty={self.penalty} needs an ensemble of 2 or more {who}s, which it compares; this one has "
                f"1: raise it, or set method.penalty=max_aleatoric"
            )

    def _check_target(self, target: float) -> None:
        if not 0 < target < math.inf:
            raise UserError(f"method.penalty_target={target} must be greater than 0 and finite, or null")
        if not self.penalty_coef > 0:
            raise UserError(
                f"method.penalty_coef={self.penalty_coef} must be greater than 0 with method.penalty_target: its "
                "logarithm is tuned, from there on"
            )
        if self.model_quality == 1:
            raise UserError(
                "method.penalty_target cannot be reached with method.model_quality=1: the true dynamics have no penalty"
            )


class MOPO(ModelBasedSAC):
    """A pack of MOPO runs."""

    Config = MOPOConfig
    shared: MOPOConfig
    configs: list[MOPOConfig]  # type: ignore[assignment]

    def make_penalty(self) -> Penalty:
        cfg = self.shared
        return make_penalty(
            cfg.penalty, cfg.penalty_reduction, cfg.penalty_members, cfg.penalty_scale, self.ensemble, self.data
        )

    def make_penalty_weights(self) -> PenaltyWeights:
        return PenaltyWeights(
            [c.penalty_coef for c in self.configs], [c.penalty_target for c in self.configs],
            [c.penalty_lr for c in self.configs],
        )  # fmt: skip


METHOD = MOPO
