"""Termination rules of the simulators, for rollouts in learned models.

Shapes: (..., S) next observations -> (...) done flags. Sources: Gymnasium's hopper_v5.py, walker2d_v5.py and
ant_v5.py (`is_healthy`), the same limits since v2; polixir/NeoRL a4b6c57, Hopper-v3_done.py and Walker2d-v3_done.py.
HalfCheetah, Pendulum and the toy tasks never terminate. A shifted environment has the rule of its source. A next
observation that is not finite always ends a rollout, since nothing can follow it.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.errors import UserError, nearest
from envs.shifts import ids, parse

TerminationRule = Callable[[Tensor], Tensor]


def _all_below(x: Tensor, bound: float) -> Tensor:
    """Whether every |x| of the last axis is below a bound, as none that is not a number is.

    By the maximum, which is NaN where one is: on a CPU that takes a third of the time of comparing all.
    """
    return x.abs().amax(-1) < bound


def hopper_done(next_obs: Tensor) -> Tensor:
    """Done unless all finite, every |s'[1:]| < 100, height s'[0] > 0.7 and |angle s'[1]| < 0.2."""
    healthy = (
        _all_below(next_obs[..., 1:], 100.0)
        & (next_obs[..., 0] > 0.7)
        & (next_obs[..., 0] < math.inf)
        & (next_obs[..., 1].abs() < 0.2)
    )
    return ~healthy


def walker2d_done(next_obs: Tensor) -> Tensor:
    """Done unless all finite, height 0.8 < s'[0] < 2.0 and angle -1 < s'[1] < 1."""
    height, angle = next_obs[..., 0], next_obs[..., 1]
    healthy = _all_below(next_obs, math.inf) & (height > 0.8) & (height < 2.0) & (angle.abs() < 1.0)
    return ~healthy


def ant_done(next_obs: Tensor) -> Tensor:
    """Done unless all finite and height 0.2 <= s'[0] <= 1.0."""
    height = next_obs[..., 0]
    return ~(_all_below(next_obs, math.inf) & (height >= 0.2) & (height <= 1.0))


def never_done(next_obs: Tensor) -> Tensor:
    """Done only where a value is not finite."""
    return ~_all_below(next_obs, math.inf)


def neorl_hopper_done(next_obs: Tensor) -> Tensor:
    """Hopper's rule behind the x position s'[0], which may have any finite value."""
    return hopper_done(next_obs[..., 1:]) | ~torch.isfinite(next_obs[..., 0])


def neorl_walker2d_done(next_obs: Tensor) -> Tensor:
    """Walker2d's rule behind the x position s'[0], and every |s'[3:]| < 100.

    The simulator has no such bound, NeoRL's rule for learned models has; simulated states do not come near it.
    """
    return walker2d_done(next_obs[..., 1:]) | ~torch.isfinite(next_obs[..., 0]) | ~_all_below(next_obs[..., 3:], 100.0)


_GYM = range(2, 6)
_RULES: dict[str, tuple[TerminationRule, range]] = {
    "Hopper": (hopper_done, _GYM),
    "Walker2d": (walker2d_done, _GYM),
    "HalfCheetah": (never_done, _GYM),
    "Ant": (ant_done, _GYM),
    "d4rl/Ant": (ant_done, range(4, 5)),
    "neorl/Hopper": (neorl_hopper_done, range(4, 5)),
    "neorl/Walker2d": (neorl_walker2d_done, range(4, 5)),
    "neorl/HalfCheetah": (never_done, range(4, 5)),
    "offsweep/EdgeOfReach": (never_done, range(0, 1)),
    "offsweep/Refrigerator": (never_done, range(0, 1)),
    "offsweep/RefrigeratorShut": (never_done, range(0, 1)),
    "Pendulum": (never_done, range(0, 2)),
}


def termination_rule(env_id: str) -> TerminationRule:
    """The rule of a Gymnasium environment: (..., S) float tensor -> (...) bool tensor, on the same device.

    The rules are plain module functions, so they can be pickled, compiled and captured.

    Raises:
        UserError: there is no rule for this environment.
    """
    shift = parse(env_id)
    match = re.fullmatch(r"(.+)-v(\d+)", env_id if shift is None else f"{shift.robot}-v{shift.version}")
    rule, versions = _RULES.get(match[1], (None, range(0))) if match else (None, range(0))
    if rule is None or match is None or int(match[2]) not in versions:
        known = [f"{name}-v{version}" for name, (_, versions) in _RULES.items() for version in versions]
        raise UserError(
            f"no termination rule for environment '{env_id}': model rollouts need one; known are"
            f" {', '.join(known)} and the shifted ones{nearest(env_id, [*known, *ids()])}."
        )
    return rule


def terminated(env_id: str, next_observations: NDArray[Any]) -> NDArray[np.bool_]:
    """The same for arrays: (..., S) -> (...).

    Raises:
        UserError: there is no rule for this environment.
    """
    done: NDArray[np.bool_] = termination_rule(env_id)(torch.from_numpy(np.asarray(next_observations))).numpy()
    return done
