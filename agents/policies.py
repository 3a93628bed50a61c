"""Learned policies as the arrays of a policy file (`envs.policies`), weights as (out, in)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from agents.networks import StackedMLP
from agents.squashed import LOG_STD_MAX, LOG_STD_MIN


def squashed_arrays(
    actor: StackedMLP, member: int, log_std_min: float = LOG_STD_MIN, log_std_max: float = LOG_STD_MAX
) -> dict[str, np.ndarray]:
    """One member's tanh-Gaussian actor, outputs `(mean, log std)` of width 2A, for actions in [-1, 1]."""
    arrays, weight, bias = _layers(actor, member)
    action_dim = len(bias) // 2
    arrays["kind"] = np.array("squashed")
    arrays["Wm"], arrays["bm"] = weight[:action_dim], bias[:action_dim]
    arrays["Ws"], arrays["bs"] = weight[action_dim:], bias[action_dim:]
    arrays["log_std_min"], arrays["log_std_max"] = np.array(log_std_min, np.float32), np.array(log_std_max, np.float32)
    return arrays


def tanh_arrays(actor: StackedMLP, member: int, log_std_A: Tensor | None = None) -> dict[str, np.ndarray]:
    """One member's actor tanh(mean), outputs of width A, for actions in [-1, 1]; with noise of a state-free standard
    deviation if a log is given."""
    arrays, weight, bias = _layers(actor, member)
    arrays["kind"], arrays["Wm"], arrays["bm"] = np.array("tanh"), weight, bias
    if log_std_A is not None:
        arrays["log_std"] = log_std_A.cpu().numpy().copy()
    return arrays


def _layers(actor: StackedMLP, member: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The hidden layers as arrays, and the last layer's weight and bias."""
    weights = [w[member].T.cpu().numpy().copy() for w in actor.weights]
    biases = [b[member, 0].cpu().numpy().copy() for b in actor.biases]
    arrays: dict[str, np.ndarray] = {"act": np.array("relu")}
    for layer, (w, b) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        arrays[f"W{layer}"], arrays[f"b{layer}"] = w, b
    return arrays, weights[-1], biases[-1]


def with_standardisation(
    arrays: Mapping[str, np.ndarray], mean_S: np.ndarray, std_S: np.ndarray
) -> dict[str, np.ndarray]:
    """A policy of (s - mean) / std made one of s."""
    return {**arrays, "obs_mean": mean_S, "obs_var": std_S**2, "obs_eps": np.array(0.0, np.float32)}


def in_environment(
    arrays: Mapping[str, np.ndarray],
    action_low: np.ndarray,
    action_high: np.ndarray,
    observation_mean: np.ndarray | None = None,
    observation_std: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """A policy for actions in [-1, 1] made one of an environment.

    Args:
        arrays: of `squashed_arrays` or `tanh_arrays`.
        action_low, action_high: `(A,)` the environment's bounds.
        observation_mean, observation_std: `(S,)` if the policy has learned from a dataset of standardised observations.
    """
    bounds = {"action_low": action_low.astype(np.float32), "action_high": action_high.astype(np.float32)}
    if observation_mean is not None and observation_std is not None:
        arrays = with_standardisation(arrays, observation_mean, observation_std)
    return {**arrays, **bounds}
