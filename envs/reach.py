"""Exact tests for edge-of-reach states, for the environments that have one."""

from collections.abc import Callable

from torch import Tensor

from envs.toys import EdgeOfReach


def exact_edge_test(env_id: str) -> Callable[[Tensor, int], Tensor] | None:
    """The test `(observations (..., S), rollout length) -> bool (...)` of an environment, in its own observations.

    It holds for rollouts with the true dynamics from the environment's start states. None where no test is known.
    """
    return _in_the_plane if env_id == "offsweep/EdgeOfReach-v0" else None


def _in_the_plane(states: Tensor, rollout_length: int) -> Tensor:
    reach = states.abs().amax(-1) - EdgeOfReach.START
    return (reach > rollout_length - 1) & (reach <= rollout_length)
