"""Patches of the bootstrap value at edge-of-reach states: an oracle's and its controls (RAVL, Sims et al. 2024, section
on Base-OraclePatch; the controls are those that reviewers of it asked for).

    y = r + gamma (1 - d) [ q - alpha log pi(a~'|s') ],    q = Q*(s', a~') if s' is patched, else min_i Qbar_i(s', a~')

- oracle: patched is every edge-of-reach state, by the exact test;
- random: as many rows of the minibatch as the exact test finds in it, drawn at random;
- variance: as many again, those whose critics have the highest variance.

Q*(s, a) = r(s) + gamma V*(s + a) of `EdgeOfReach`, by value iteration without entropy, infinite horizon: the learner's
targets have no terminals either. V* between the grid's points is interpolated linearly along both axes.

Shapes: M member, N critic, B batch, S observation, A action, X, Y grid points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from agents.method import Stage, TrainingData
from agents.sac import SAC, TargetHook, TargetTerms
from envs.reach import EDGE_OF_REACH, optimal_values, toy_constants
from envs.toys import EdgeOfReach

PATCHES = ("none", "oracle", "random", "variance")

_HALF_WIDTH, _SPACING = 24.0, 0.125  # of V*'s grid; optimal walks from edge-of-reach states lead inwards


def oracle_stage(gamma: float) -> Stage:
    """V* of the toy as a stage; the artifact holds `values` (X, Y), float32, in the environment's rewards."""

    def build(data: TrainingData, report: Callable[[int, Mapping[str, float]], None]) -> dict[str, Any]:
        values, sweeps = optimal_values(gamma, _HALF_WIDTH, _SPACING)
        report(sweeps, {"value_max": float(values.max()), "value_min": float(values.min())})
        return {"values": torch.tensor(values, dtype=torch.float32)}

    grid = {"gamma": gamma, "half_width": _HALF_WIDTH, "spacing": _SPACING}
    return Stage("optimal_values", {"env_id": EDGE_OF_REACH, **toy_constants(), **grid}, build)


class OptimalValue:
    """Q* of the toy for a learner's observations, actions and rewards.

    Args:
        values_XY: of the stage.
        gamma: the discount that they were made with.
        data: says how the learner's numbers differ from the environment's.
        device: where it is asked.
    """

    def __init__(self, values_XY: Tensor, gamma: float, data: TrainingData, device: torch.device) -> None:
        self._flat = values_XY.flatten().to(device)
        self._size, self._gamma = values_XY.shape[0], gamma
        self._scale, self._shift = data.reward_scale, data.reward_shift / (1.0 - gamma)
        self._peaks, self._widths, self._heights = (
            torch.tensor(x, dtype=torch.float32, device=device)
            for x in (EdgeOfReach.PEAKS, EdgeOfReach.WIDTHS, EdgeOfReach.HEIGHTS)
        )

    def __call__(self, states_S: Tensor, actions_A: Tensor) -> Tensor:
        """Q* `(...)` in the learner's rewards, of states `(..., 2)` in the environment's units and actions `(..., 2)`
        in [-1, 1]. States beyond the grid are valued as its border."""
        squared = (states_S.unsqueeze(-2) - self._peaks).square().sum(-1)
        reward = (self._heights * torch.exp(-0.5 * squared / self._widths.square())).sum(-1)
        return (reward + self._gamma * self._value(states_S + actions_A)) * self._scale + self._shift

    def _value(self, states_S: Tensor) -> Tensor:
        place = ((states_S + _HALF_WIDTH) / _SPACING).clamp(0.0, self._size - 1.001)
        corner = place.floor()
        right = place - corner
        x, y = corner.long().unbind(-1)
        at = x * self._size + y
        wx, wy = right.unbind(-1)
        low = torch.lerp(self._flat[at], self._flat[at + 1], wy)
        high = torch.lerp(self._flat[at + self._size], self._flat[at + self._size + 1], wy)
        return torch.lerp(low, high, wx)


class EdgePatch(TargetHook):
    """One of `PATCHES` but none, for minibatches of the toy.

    Args:
        kind: which.
        edge_test: observations (..., S) -> bool (...), exact.
        optimal: Q*.
        in_environment: the learner's observations in the environment's units.
    """

    def __init__(
        self, kind: str, edge_test: Callable[[Tensor], Tensor], optimal: OptimalValue,
        in_environment: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.kind, self.num_noises = kind, int(kind == "random")
        self._edge_test, self._optimal, self._in_environment = edge_test, optimal, in_environment

    def __call__(
        self, sac: SAC, terms: TargetTerms, noise_KMBA: Tensor, own_noise_MZ: Tensor | None
    ) -> tuple[TargetTerms, Mapping[str, Tensor]]:
        patched_MB = self._edge_test(terms.next_obs_MBS)
        if self.kind != "oracle":
            score_MB = noise_KMBA[0, ..., 0] if self.kind == "random" else terms.values_MNB.var(1, correction=0)
            # rank 0 is the highest; no row is asked for its value, so that a GPU need not be waited for
            rank_MB = score_MB.argsort(1, descending=True).argsort(1)
            patched_MB = rank_MB < patched_MB.sum(1, keepdim=True)
        optimal_MB = self._optimal(self._in_environment(terms.next_obs_MBS), terms.next_action_MBA)
        value_MB = torch.where(patched_MB, optimal_MB, terms.value_MB)
        return terms._replace(value_MB=value_MB), {"patched_share": patched_MB}
