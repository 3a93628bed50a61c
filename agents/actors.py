"""Stacked policies as rollouts and policy guidance use them: sampling, log density and its gradient with respect to the
action, for all members at once.

    TanhActor              pi(s) = tanh f(s), deterministic; as a density N(pi(s), 1), the convention of policy-guided
                           diffusion (Jackson et al. 2024; the released diffusion/edm.py:155-159)
    GaussianActor          N(tanh f(s), sigma^2) with a state-free sigma (or N(f(s), sigma^2)), samples clipped to the
                           bounds; the density is that of the Gaussian before clipping
    SquashedGaussianActor  tanh of N(mu(s), sigma(s)^2)

Actions are the environment's mapped to [-1, 1], as learners have them. Gradients are written out: nothing is recorded
and no gradient of a network is needed, since the states are held fixed.

Shapes: M member, B row, S observation, A action, X any width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from agents.networks import StackedMLP
from agents.squashed import LARGEST_ACTION, LOG_STD_MAX, LOG_STD_MIN, squashed_log_density, squashed_sample
from envs.errors import UserError

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Actor(Protocol):
    """Policies of M members; plain data that can be pickled."""

    @property
    def observation_dim(self) -> int: ...

    @property
    def action_dim(self) -> int: ...

    @property
    def num_members(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def widest_layer(self) -> int:
        """Floats of the widest layer's output for a row."""

    def sample(self, obs_MBS: Tensor, noise_MBA: Tensor) -> Tensor:
        """Actions `(M, B, A)` in [-1, 1], as the environment would get them, for standard normal draws."""

    def log_prob(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        """Natural logarithm of the density of actions in [-1, 1], `(M, B)`."""

    def log_prob_gradient(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        """d log pi(a|s) / d a, `(M, B, A)`."""

    def select(self, members: Sequence[int]) -> Self:
        """The policies of some members, copied."""

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""

    def tensors(self) -> dict[str, Tensor]:
        """What learning changes, copied, for a checkpoint."""

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same kind of policies with other `tensors`."""


@dataclass(frozen=True)
class _NetworkActor:
    """Policies computed by one network each.

    Args:
        network: lead `(M,)`.
        observation_mean, observation_std: `(S,)`, or `(M, 1, S)` where members have their own, if the networks take
            (s - mean) / std of the observations that are handed in; else None.
        observation_clip: standard deviations that standardised observations are clipped to, if they are.
        activation: of the hidden layers, "relu" or "tanh".
    """

    network: StackedMLP
    observation_mean: Tensor | None = None
    observation_std: Tensor | None = None
    observation_clip: float | None = None
    activation: str = "relu"

    @property
    def observation_dim(self) -> int:
        return self.network.sizes[0]

    @property
    def action_dim(self) -> int:
        return self.network.sizes[-1]

    @property
    def num_members(self) -> int:
        return self.network.num_stacked

    @property
    def device(self) -> torch.device:
        return self.network.flat.device

    @property
    def widest_layer(self) -> int:
        return max(self.network.sizes)

    def outputs(self, obs_MBS: Tensor) -> Tensor:
        """What the networks make of observations, `(M, B, X)`."""
        if self.observation_mean is not None and self.observation_std is not None:
            obs_MBS = (obs_MBS - self.observation_mean) / self.observation_std
            if self.observation_clip is not None:
                obs_MBS = obs_MBS.clamp_(-self.observation_clip, self.observation_clip)
        if self.activation == "relu":
            return self.network.forward(obs_MBS)[0]
        x = obs_MBS
        for weight, bias in zip(self.network.weights[:-1], self.network.biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight).tanh_()
        return torch.baddbmm(self.network.biases[-1], x, self.network.weights[-1])

    def to(self, device: torch.device | str) -> Self:
        parts: dict[str, Any] = {"network": self.network.to(device)}
        for name in ("observation_mean", "observation_std", "log_std"):
            if (tensor := getattr(self, name, None)) is not None:
                parts[name] = tensor.to(device)
        return replace(self, **parts)

    def select(self, members: Sequence[int]) -> Self:
        parts: dict[str, Any] = {"network": self.network.select(members)}
        for name in ("observation_mean", "observation_std"):
            moment = getattr(self, name)
            parts[name] = moment[list(members)] if moment is not None and moment.ndim == 3 else moment
        return replace(self, **parts)

    def tensors(self) -> dict[str, Tensor]:
        return {"network": self.network.flat.clone()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        network = self.network.clone()
        network.flat.copy_(tensors["network"])
        return replace(self, network=network)


@dataclass(frozen=True)
class TanhActor(_NetworkActor):
    """Deterministic policies; see the module."""

    def sample(self, obs_MBS: Tensor, noise_MBA: Tensor) -> Tensor:
        return self.outputs(obs_MBS).tanh_()

    def log_prob(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        return _normal_log_prob(action_MBA - self.outputs(obs_MBS).tanh_()).sub_(self.action_dim * _HALF_LOG_2PI)

    def log_prob_gradient(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        return self.outputs(obs_MBS).tanh_().sub_(action_MBA)


@dataclass(frozen=True)
class GaussianActor(_NetworkActor):
    """Gaussian policies whose standard deviations do not depend on the state; see the module.

    Args:
        log_std: `(M, 1, A)`, as it is used: what bounds it has are the method's.
        bounded: whether the mean is a tanh of the network's output.
    """

    log_std: Tensor = field(kw_only=True)
    bounded: bool = True

    def _mean(self, obs_MBS: Tensor) -> Tensor:
        out = self.outputs(obs_MBS)
        return out.tanh_() if self.bounded else out

    def sample(self, obs_MBS: Tensor, noise_MBA: Tensor) -> Tensor:
        return torch.addcmul(self._mean(obs_MBS), self.log_std.exp(), noise_MBA).clamp_(-1.0, 1.0)

    def log_prob(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        z = (action_MBA - self._mean(obs_MBS)).mul_((-self.log_std).exp())
        return _normal_log_prob(z).sub_(self.log_std.sum(-1)).sub_(self.action_dim * _HALF_LOG_2PI)

    def log_prob_gradient(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        return self._mean(obs_MBS).sub_(action_MBA).mul_((self.log_std * -2.0).exp())

    def select(self, members: Sequence[int]) -> Self:
        return replace(super().select(members), log_std=self.log_std[list(members)])

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "log_std": self.log_std.clone()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        return replace(super().with_tensors(tensors), log_std=tensors["log_std"])


@dataclass(frozen=True)
class SquashedGaussianActor(_NetworkActor):
    """Policies whose networks give a mean and a log standard deviation, `(M, B, 2 A)`; see the module.

    The density and its gradient at an action closer to a bound than 1e-6 are those at that distance from it.
    """

    log_std_min: float = LOG_STD_MIN
    log_std_max: float = LOG_STD_MAX

    @property
    def action_dim(self) -> int:
        return self.network.sizes[-1] // 2

    def sample(self, obs_MBS: Tensor, noise_MBA: Tensor) -> Tensor:
        return squashed_sample(self.outputs(obs_MBS), noise_MBA, self.log_std_min, self.log_std_max)

    def _moments(self, obs_MBS: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.outputs(obs_MBS).chunk(2, dim=-1)
        return mean, log_std.clamp(self.log_std_min, self.log_std_max)

    def log_prob(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        mean, log_std = self._moments(obs_MBS)
        u = action_MBA.clamp(-LARGEST_ACTION, LARGEST_ACTION).atanh_()
        return squashed_log_density((u - mean).mul_((-log_std).exp()), log_std, u)

    def log_prob_gradient(self, obs_MBS: Tensor, action_MBA: Tensor) -> Tensor:
        mean, log_std = self._moments(obs_MBS)
        action = action_MBA.clamp(-LARGEST_ACTION, LARGEST_ACTION)
        of_normal = (mean - action.atanh()).mul_((log_std * -2.0).exp())  # d log N(u) / du
        # du / da = 1 / (1 - a^2), and d/da of -log(1 - a^2) is 2a / (1 - a^2)
        return of_normal.add_(action, alpha=2.0).div_(1.0 - action.square())


def _normal_log_prob(z_MBA: Tensor) -> Tensor:
    """Of standard normals, `(M, B)`, without the constant."""
    return z_MBA.square().sum(-1).mul_(-0.5)


# ---- frozen policies ------------------------------------------------------------------------------------------------


def actor_from_arrays(
    policies: Sequence[Mapping[str, np.ndarray]],
    observation_mean: Tensor | None = None,
    observation_std: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> TanhActor | GaussianActor | SquashedGaussianActor:
    """The policies of policy files (`envs.policies`) as an actor; one member each.

    Args:
        policies: the files' arrays, of the same kind and the same layers' widths. Their action bounds must be the
            environment's.
        observation_mean, observation_std: `(S,)` if the observations that the actor gets are the environment's,
            standardised, as those of a `TrainingData` may be.

    Raises:
        UserError: the policies differ in their kind or their widths, or have no hidden layer.
    """
    first = policies[0]
    if any(_form(p) != _form(first) for p in policies):
        raise UserError("policies that are used together must be of one kind and have layers of the same widths")
    kind = str(first["kind"])
    if kind == "linear" or "W0" not in first:
        raise UserError(f"a policy of kind {kind} without hidden layers cannot be used here; take one with a network")
    members = [_layers(p) for p in policies]
    sizes = [len(members[0][0][0]), *(weight.shape[1] for weight, _ in members[0])]
    network = StackedMLP((len(policies),), sizes)
    for m, layers in enumerate(members):
        for layer, (weight, bias) in enumerate(layers):
            network.weights[layer][m] = torch.from_numpy(weight)
            network.biases[layer][m, 0] = torch.from_numpy(bias)
    inputs = _inputs(policies, observation_mean, observation_std, device)
    inputs["activation"] = str(first["act"])
    network = network.to(device)
    if kind == "squashed":
        bounds = (float(first.get(name, default)) for name, default in (("log_std_min", -20.0), ("log_std_max", 2.0)))
        low, high = bounds
        return SquashedGaussianActor(network, **inputs, log_std_min=low, log_std_max=high)
    if "log_std" in first:
        action_dim = sizes[-1]
        log_stds = [np.broadcast_to(np.float32(p["log_std"]), action_dim) for p in policies]
        if kind == "gauss":
            log_stds = [x - np.log(_bounds(p)[1]) for x, p in zip(log_stds, policies, strict=True)]
        stacked = torch.from_numpy(np.stack(log_stds).astype(np.float32)).unsqueeze(1).to(device)
        return GaussianActor(network, **inputs, log_std=stacked, bounded=kind == "tanh")
    return TanhActor(network, **inputs)


def _form(policy: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    widths = {k: v.shape for k, v in policy.items() if k[0] == "W"}
    scalars = [float(policy.get(k, math.nan)) for k in ("log_std_min", "log_std_max", "obs_clip")]
    return str(policy["kind"]), str(policy["act"]), widths, "log_std" in policy, "obs_mean" in policy, str(scalars)


def _bounds(policy: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width of the action bounds."""
    low, high = (np.asarray(policy.get(k, d), np.float32) for k, d in (("action_low", -1.0), ("action_high", 1.0)))
    return (high + low) / 2, (high - low) / 2


def _layers(policy: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights `(in, out)` and biases of a policy's layers, the mean (and the log standard deviation) last."""
    hidden = sum(1 for k in policy if k[0] == "W" and k[1:].isdigit())
    layers = [(policy[f"W{i}"].T, policy[f"b{i}"]) for i in range(hidden)]
    weight, bias = policy["Wm"].T, policy["bm"]
    if str(policy["kind"]) == "squashed":
        weight, bias = np.concatenate((weight, policy["Ws"].T), 1), np.concatenate((bias, policy["bs"]))
    elif str(policy["kind"]) == "gauss":  # acts in the environment's units
        center, scale = _bounds(policy)
        weight, bias = weight / scale, (bias - center) / scale
    return [(w.astype(np.float32), b.astype(np.float32)) for w, b in [*layers, (weight, bias)]]


def _inputs(
    policies: Sequence[Mapping[str, np.ndarray]],
    observation_mean: Tensor | None,
    observation_std: Tensor | None,
    device: torch.device | str,
) -> dict[str, Any]:
    """How observations are standardised: as the files say, after the data's standardisation is undone."""
    mean, std = observation_mean, observation_std
    if "obs_mean" not in policies[0]:
        if mean is None or std is None:
            return {}
        # s * std + mean is (s - m) / d with d = 1 / std and m = -mean / std
        return {"observation_mean": (-mean / std).to(device), "observation_std": (1.0 / std).to(device)}
    own_mean = torch.from_numpy(np.stack([np.float32(p["obs_mean"]) for p in policies]))
    var = [np.float32(p["obs_var"]) + np.float32(p.get("obs_eps", 1e-8)) for p in policies]
    own_std = torch.from_numpy(np.sqrt(np.stack(var)))
    if mean is not None and std is not None:
        own_mean, own_std = (own_mean - mean.cpu()) / std.cpu(), own_std / std.cpu()
    clip = float(policies[0]["obs_clip"]) if "obs_clip" in policies[0] else None
    return {
        "observation_mean": own_mean.unsqueeze(1).to(device), "observation_std": own_std.unsqueeze(1).to(device),
        "observation_clip": clip,
    }  # fmt: skip
