"""Fixed policies as plain numpy arrays: what collects datasets and what reference scores are measured with.

A policy file (.npz) holds `kind`, `act` (relu, tanh or none), hidden layers W0, b0, W1, b1, ... (out x in)
and

- squashed: mean Wm, bm and log-std Ws, bs; action = tanh(mean + std * noise), scaled to [action_low,
  action_high];
- tanh: mean Wm, bm and optionally a state-free log_std; action = tanh(mean) + std * noise, clipped to [-1, 1], then
  scaled to [action_low, action_high] (without log_std no noise);
- gauss: mean Wm, bm and a state-free log_std; action = mean + std * noise, clipped to [action_low,
  action_high];
- linear: mean Wm (bm optional), no noise, clipped likewise.

Optional: obs_mean, obs_var, obs_clip, obs_eps (the observation is standardised first), action_low,
action_high (default -1, 1), log_std_min, log_std_max (default -20, 2; squashed only).

Shape suffixes: B batch, S observation, A action.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.errors import UserError, nearest
from envs.files import write_atomically

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"

FloatArray = NDArray[np.float32]


class PolicyError(UserError):
    """A policy file is missing or cannot be used."""


class Policy(Protocol):
    """A policy that acts on a batch."""

    @property
    def observation_dim(self) -> int | None:
        """S, or None if any width will do."""

    @property
    def action_dim(self) -> int:
        """A."""

    def act(self, observations: NDArray[Any], rng: np.random.Generator | None) -> FloatArray:
        """Actions (B, A) for observations (B, S): sampled with `rng`, deterministic when it is None."""

    def describe(self) -> dict[str, Any]:
        """Who this is, for a dataset's provenance: JSON-able."""


class UniformPolicy:
    """Actions drawn uniformly from [low, high] whatever the observation: D4RL's "random".

    Args:
        low, high: (A,) bounds in the environment's units.
    """

    observation_dim: int | None = None

    def __init__(self, low: ArrayLike, high: ArrayLike) -> None:
        self._low = np.atleast_1d(np.asarray(low, dtype=np.float32))
        self._high = np.atleast_1d(np.asarray(high, dtype=np.float32))
        if self._low.shape != self._high.shape or not np.isfinite(self._high - self._low).all():
            raise PolicyError("uniform actions need finite lower and upper bounds of the same shape.")

    @property
    def action_dim(self) -> int:
        return len(self._low)

    def act(self, observations: NDArray[Any], rng: np.random.Generator | None) -> FloatArray:
        """Uniform actions (B, A); without `rng` the middle of the range."""
        shape = (len(observations), len(self._low))
        if rng is None:
            return np.broadcast_to((self._low + self._high) / 2, shape).astype(np.float32)
        return self._low + (self._high - self._low) * rng.random(shape, dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        return {"kind": "uniform", "low": self._low.tolist(), "high": self._high.tolist()}


class NetworkPolicy:
    """A policy from a file: see the module's text for the arrays.

    Args:
        arrays: the file's arrays by key.
        name: how messages and provenance call it.
        sha256: hash of the file's bytes.

    Raises:
        PolicyError: an array is missing, has the wrong shape or holds a value that is not finite.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], name: str, sha256: str) -> None:
        self.name, self.sha256 = name, sha256
        self._arrays = arrays
        self.kind = self._text("kind", ("squashed", "tanh", "gauss", "linear"))
        act = self._text("act", ("relu", "tanh", "none"))
        hidden = 0
        self._hidden: list[tuple[FloatArray, FloatArray]] = []
        width: int | None = None
        while f"W{hidden}" in arrays:
            self._hidden.append(self._layer(f"W{hidden}", f"b{hidden}", width))
            width = self._hidden[-1][0].shape[1]
            hidden += 1
        if hidden and act == "none":
            raise PolicyError(f"policy {name}: 'act' is none but there are hidden layers; it must be relu or tanh.")
        self._tanh = act == "tanh"
        self._mean = self._layer("Wm", "bm", width, bias_optional=self.kind == "linear")
        self.observation_dim: int | None = (self._hidden[0] if self._hidden else self._mean)[0].shape[0]
        self.action_dim = self._mean[0].shape[1]
        self._log_std: tuple[FloatArray, FloatArray] | None = None
        self._std: FloatArray | None = None
        if self.kind == "squashed":
            self._log_std = self._layer("Ws", "bs", width, out=self.action_dim)
            self._log_std_min = float(self._vector("log_std_min", 1, -20.0)[0])
            self._log_std_max = float(self._vector("log_std_max", 1, 2.0)[0])
        elif self.kind == "gauss" or (self.kind == "tanh" and "log_std" in arrays):
            self._std = np.exp(self._vector("log_std", self.action_dim))
        self._low = self._vector("action_low", self.action_dim, -1.0)
        self._high = self._vector("action_high", self.action_dim, 1.0)
        if not (self._low < self._high).all():
            raise PolicyError(f"policy {name}: action_low must be below action_high everywhere.")
        self._obs_mean: FloatArray | None = None
        if "obs_mean" in arrays:
            self._obs_mean = self._vector("obs_mean", self.observation_dim)
            var = self._vector("obs_var", self.observation_dim)
            self._obs_scale = 1.0 / np.sqrt(var + self._vector("obs_eps", 1, 1e-8))
            self._obs_clip = float(self._vector("obs_clip", 1, float(np.finfo(np.float32).max))[0])

    def act(self, observations: NDArray[Any], rng: np.random.Generator | None) -> FloatArray:
        """Actions (B, A) float32 for observations (B, S): sampled with `rng`, deterministic if None."""
        x = np.asarray(observations, dtype=np.float32)
        if self._obs_mean is not None:
            x = (x - self._obs_mean) * self._obs_scale
            np.clip(x, -self._obs_clip, self._obs_clip, out=x)
        for weight, bias in self._hidden:
            x = x @ weight
            x += bias
            if self._tanh:
                np.tanh(x, out=x)
            else:
                np.maximum(x, 0.0, out=x)
        action = x @ self._mean[0]
        action += self._mean[1]
        if self.kind == "tanh":
            np.tanh(action, out=action)
        if rng is not None and (self._std is not None or self._log_std is not None):
            noise = rng.standard_normal(action.shape, dtype=np.float32)
            action += noise * (self._std if self._std is not None else self._state_std(x))
        if self.kind in ("gauss", "linear"):
            return np.clip(action, self._low, self._high, out=action)
        if self.kind == "squashed":
            np.tanh(action, out=action)
        else:
            np.clip(action, -1.0, 1.0, out=action)
        return self._low + (action + 1.0) * (0.5 * (self._high - self._low))

    def _state_std(self, features: FloatArray) -> FloatArray:
        assert self._log_std is not None
        log_std = features @ self._log_std[0]
        log_std += self._log_std[1]
        return cast(FloatArray, np.exp(np.clip(log_std, self._log_std_min, self._log_std_max)))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "sha256": self.sha256}

    def _text(self, key: str, choices: Sequence[str]) -> str:
        value = str(self._arrays[key]) if key in self._arrays else "missing"
        if value not in choices:
            raise PolicyError(f"policy {self.name}: '{key}' is {value}, it must be one of {', '.join(choices)}.")
        return value

    def _array(self, key: str) -> FloatArray:
        if key not in self._arrays:
            raise PolicyError(
                f"policy {self.name}: array '{key}' is missing (a {self.kind} policy needs it); present are"
                f" {', '.join(sorted(self._arrays))}."
            )
        try:
            value = np.asarray(self._arrays[key], dtype=np.float32)
        except (TypeError, ValueError):
            raise PolicyError(f"policy {self.name}: array '{key}' does not hold numbers.") from None
        if not np.isfinite(value).all():
            raise PolicyError(f"policy {self.name}: array '{key}' holds a value that is not finite.")
        return value

    def _layer(
        self,
        weight_key: str,
        bias_key: str,
        width: int | None,
        out: int | None = None,
        bias_optional: bool = False,
    ) -> tuple[FloatArray, FloatArray]:
        """(in, out) weight and (out,) bias; the file has (out, in)."""
        weight = self._array(weight_key)
        if weight.ndim != 2 or (width or weight.shape[1], out or weight.shape[0]) != weight.shape[::-1]:
            raise PolicyError(
                f"policy {self.name}: '{weight_key}' has shape {weight.shape}, it does not follow the layer before."
            )
        missing = bias_optional and bias_key not in self._arrays
        bias = np.zeros(len(weight), np.float32) if missing else self._vector(bias_key, len(weight))
        return np.ascontiguousarray(weight.T), bias

    def _vector(self, key: str, size: int | None, default: float | None = None) -> FloatArray:
        value = self._array(key) if default is None or key in self._arrays else np.float32(default)
        value = np.asarray(value, dtype=np.float32)
        if value.ndim == 0 and default is not None:
            value = np.full(size or 1, value, dtype=np.float32)
        if value.shape != (size,):
            raise PolicyError(f"policy {self.name}: '{key}' has shape {value.shape}, it must be ({size},).")
        return value


def embedded_actors() -> list[str]:
    """Names of the actors that come with the package."""
    return sorted(path.stem for path in EMBEDDED_FOLDER.glob("*.npz"))


def load_policy(path_or_embedded_name: str | Path) -> NetworkPolicy:
    """A policy from a .npz file, or one that comes with the package by its name (`pendulum-expert`).

    Raises:
        PolicyError: there is no such file or actor, or it cannot be used.
    """
    text = str(path_or_embedded_name)
    path = Path(text)
    if path.suffix != ".npz" and path.name == text:
        path = EMBEDDED_FOLDER / f"{text}.npz"
        if not path.is_file():
            known = embedded_actors()
            raise PolicyError(
                f"there is no embedded actor '{text}'{nearest(text, known)}; give one of"
                f" {', '.join(known) or '(none installed)'} or the path of a .npz file."
            )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"cannot read policy file {path}: {error.strerror or error}.") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError, KeyError) as error:
        raise PolicyError(f"{path} is not a usable .npz policy file ({error}); it may be cut short.") from error
    return NetworkPolicy(arrays, name=path.stem, sha256=hashlib.sha256(content).hexdigest())


def save_policy(
    path: str | Path,
    hidden: Sequence[tuple[ArrayLike, ArrayLike]],
    mean: tuple[ArrayLike, ArrayLike],
    log_std: tuple[ArrayLike, ArrayLike],
    *,
    act: str = "relu",
    action_low: ArrayLike = -1.0,
    action_high: ArrayLike = 1.0,
    log_std_min: float = -20.0,
    log_std_max: float = 2.0,
    obs_mean: ArrayLike | None = None,
    obs_std: ArrayLike | None = None,
) -> str:
    """Write a squashed (tanh-Gaussian) actor, atomically.

    Args:
        path: target, ending in .npz.
        hidden: (weight (out, in), bias (out,)) of every hidden layer, in order.
        mean, log_std: likewise for the two heads.
        act: relu or tanh.
        action_low, action_high: number or (A,), environment's units.
        log_std_min, log_std_max: the log-std head is clipped to them.
        obs_mean, obs_std: (S,) if the network sees (obs - mean) / std.

    Returns:
        SHA-256 (hex) of the file's bytes.

    Raises:
        PolicyError: the arrays do not form a policy, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise PolicyError(f"a policy file must end in .npz, not '{path.name}'.")
    arrays: dict[str, Any] = {"kind": "squashed", "act": act}
    for i, (weight, bias) in enumerate(hidden):
        arrays[f"W{i}"], arrays[f"b{i}"] = weight, bias
    arrays["Wm"], arrays["bm"] = mean
    arrays["Ws"], arrays["bs"] = log_std
    arrays |= {"action_low": action_low, "action_high": action_high}
    arrays |= {"log_std_min": log_std_min, "log_std_max": log_std_max}
    if (obs_mean is None) != (obs_std is None):
        raise PolicyError("obs_mean and obs_std must be given together.")
    if obs_mean is not None and obs_std is not None:
        # The file keeps a variance and an epsilon, as the training libraries that it is shared with do.
        arrays |= {
            "obs_mean": obs_mean,
            "obs_var": np.square(np.asarray(obs_std, np.float64)),
            "obs_eps": 0.0,
        }
    stored = {
        key: np.asarray(value) if isinstance(value, str) else np.asarray(value, dtype=np.float32)
        for key, value in arrays.items()
    }
    NetworkPolicy(stored, name=path.stem, sha256="")  # refuse to write what could not be read
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **stored)  # type: ignore[arg-type]
    content = buffer.getvalue()
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise PolicyError(f"cannot write policy file {path}: {error.strerror or error}.") from error
    return hashlib.sha256(content).hexdigest()
