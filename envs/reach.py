"""What is exactly known of edge-of-reach states, for the environments where something is.

Shapes: S observation, A action, X, Y points of a grid along the plane's axes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from envs.toys import EdgeOfReach

EDGE_OF_REACH = "offsweep/EdgeOfReach-v0"


def exact_edge_test(env_id: str) -> Callable[[Tensor, int], Tensor] | None:
    """The test `(observations (..., S), rollout length) -> bool (...)` of an environment, in its own observations.

    It holds for rollouts with the true dynamics from the environment's start states. None where no test is known.
    """
    return EdgeOfReach.edge_of_reach if env_id == EDGE_OF_REACH else None


def optimal_values(
    gamma: float, half_width: float, spacing: float, tolerance: float = 1e-6, horizon: int | None = None
) -> tuple[NDArray[np.float64], int]:
    """V* of `EdgeOfReach` on a grid, by value iteration from V = 0, without entropy:

        V(s) <- r(s) + gamma max_a V(s + a)

    over the points of the grid that lie within an action of s, corners included. The reward does not depend on the
    action, so one step is a maximum over a square of points. A walk that would leave the grid ends on its border.

    Args:
        gamma: discount.
        half_width: the grid spans [-half_width, half_width] along both axes.
        spacing: between points; an action of 1 must be a whole number of spacings.
        tolerance: largest change of a value in the last sweep, so that no value is off by more than gamma /
            (1 - gamma) times as much.
        horizon: steps to be valued; None: infinitely many.

    Returns:
        Values `(X, Y)` and the number of sweeps.
    """
    steps = round(1.0 / spacing)
    if abs(steps * spacing - 1.0) > 1e-9:
        raise ValueError(f"an action of 1 is not a whole number of spacings of {spacing}")
    reward = EdgeOfReach.reward(grid_points(half_width, spacing))
    values, sweeps = np.zeros_like(reward), 0
    while True:
        updated = reward + gamma * _largest_within(_largest_within(values, steps).T, steps).T
        change = np.abs(updated - values).max()
        values, sweeps = updated, sweeps + 1
        if change <= tolerance if horizon is None else sweeps == horizon:
            return values, sweeps


def grid_points(half_width: float, spacing: float) -> NDArray[np.float64]:
    """The points `(X, Y, 2)` of a grid around the origin."""
    axis = np.arange(-round(half_width / spacing), round(half_width / spacing) + 1) * spacing
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)


def toy_constants() -> Mapping[str, Any]:
    """What the toy's optimal values depend on beside the discount, JSON-able."""
    return {name.lower(): np.asarray(getattr(EdgeOfReach, name)).tolist() for name in ("PEAKS", "WIDTHS", "HEIGHTS")}


def _largest_within(values: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """The largest of the entries at most `steps` away along the last axis, on whose ends it is cut off."""
    padded = np.pad(values, ((0, 0), (steps, steps)), constant_values=-np.inf)
    largest: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(padded, 2 * steps + 1, axis=1).max(-1)
    return largest
