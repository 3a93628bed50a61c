"""The papers' toy tasks as Gymnasium environments; `envs.environments` registers them.

Both are rebuilt from what is public about them; their docstrings say what is not known.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class EdgeOfReach(gymnasium.Env[FloatArray, FloatArray]):
    """A walk in the plane, for errors at states that model rollouts only ever end in (RAVL, Sims et al. 2024).

        s' = s + a,   a in [-1, 1]^2,   s_0 ~ U([-START, START]^2),   r = sum of two Gaussian bumps at s

    Episodes last 30 steps and never terminate. With true dynamics and rollouts of k steps from the start states, a
    state can be reached at step k and not before exactly where START + k - 1 < |s|_inf <= START + k.

    A reconstruction: of the paper's task the plane, the rollout length 10 and the 30 steps are known from its reviews;
    start states, step size and bumps are chosen here. Both bumps lie well within reach of 10 steps: nothing in the task
    calls for going to the edge. `offsweep lab edge-of-reach` trains on it (docs/edge_of_reach.md).
    """

    START = 2.0
    PEAKS = np.array([[5.0, 5.0], [-4.0, -4.0]])
    WIDTHS = np.array([3.0, 2.0])
    HEIGHTS = np.array([1.0, 0.5])

    def __init__(self) -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self._state = np.zeros(2)

    @classmethod
    def reward(cls, states: NDArray[Any]) -> NDArray[np.float64]:
        """The bumps' sum at states (..., 2) -> (...)."""
        squared = np.square(np.asarray(states, np.float64)[..., None, :] - cls.PEAKS).sum(-1)
        bumps: NDArray[np.float64] = cls.HEIGHTS * np.exp(-0.5 * squared / np.square(cls.WIDTHS))
        return np.asarray(bumps.sum(-1))

    @classmethod
    def edge_of_reach(cls, states: Any, rollout_length: int) -> Any:
        """Which states rollouts of `rollout_length` steps from the start states can end in, but not pass through.

        Args:
            states: `(..., 2)`, an array or a tensor.

        Returns:
            bool `(...)` of the same kind.
        """
        distance = abs(states)
        # a tensor's; torch itself is not loaded for this: the workers that collect data do without
        farthest = distance.amax(-1) if hasattr(distance, "amax") else distance.max(-1)
        return (farthest > cls.START + rollout_length - 1) & (farthest <= cls.START + rollout_length)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = self.np_random.uniform(-self.START, self.START, size=2)
        return self._state.astype(np.float32), {}

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        reward = float(self.reward(self._state))
        self._state = self._state + np.clip(action, -1.0, 1.0)
        return self._state.astype(np.float32), reward, False, False, {}


class Refrigerator(gymnasium.Env[FloatArray, FloatArray]):
    """Hold a refrigerator at -2 °C (MOREC's toy task; Luo et al. 2024).

        T <- T - u;   T <- T - (T - 15) c,   c = 0.02, or 0.08 while the door is open;   observation = T + N(0, 0.1^2)

    The action u in [0, 10] is the cooling power, the reward -|next observation + 2|. The policy does not see the door.
    Every 200 steps a coin decides whether it may open, once for 20 steps; once it came up, the door opens in every
    interval that follows. Episodes start at 10 °C, last 2000 steps and never terminate.

    Rules and numbers are those of the task in polixir/revive 2d69367, examples/task/Refrigerator. That it is the
    paper's is likely (its code names that simulator and logs of 2000 steps) but not confirmed.

    Args:
        door: whether there is one. Where it opens, temperatures rise that a model of observations alone takes for its
            dynamics; the source shows the door to its models, and MOREC's code splits episodes where a binary factor
            changes. offsweep/RefrigeratorShut-v0 is without.

    `info`: temperature (°C, without noise) and door_open, after the step.
    """

    TARGET = -2.0
    START = 10.0
    OUTSIDE = 15.0
    LEAK_SHUT, LEAK_OPEN = 0.02, 0.08  # share of the difference to outside that comes in per step
    NOISE = 0.1
    MAX_POWER = 10.0
    INTERVAL, OPEN_STEPS, OPEN_PROBABILITY = 200, 20, 0.5

    def __init__(self, door: bool = True) -> None:
        self._door_exists = door
        self.observation_space = Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = Box(0.0, self.MAX_POWER, (1,), np.float32)
        self._temperature = self.START
        self._steps = self._opens_at = 0
        self._may_open = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        super().reset(seed=seed)
        self._temperature, self._steps, self._may_open = self.START, 0, False
        return self._observation(), self._info(door_open=False)

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        door_open = self._door()
        self._temperature -= float(np.clip(action[0], 0.0, self.MAX_POWER))
        self._temperature -= (self._temperature - self.OUTSIDE) * (self.LEAK_OPEN if door_open else self.LEAK_SHUT)
        observation = self._observation()
        return observation, -abs(float(observation[0]) - self.TARGET), False, False, self._info(door_open)

    def _door(self) -> bool:
        within = self._steps % self.INTERVAL
        self._steps += 1
        if within == 0:
            self._may_open |= bool(self.np_random.random() < self.OPEN_PROBABILITY)
            self._opens_at = int(self.np_random.integers(self.INTERVAL - self.OPEN_STEPS + 1))
        return self._door_exists and self._may_open and self._opens_at <= within < self._opens_at + self.OPEN_STEPS

    def _observation(self) -> FloatArray:
        return np.array([self._temperature + self.NOISE * self.np_random.standard_normal()], dtype=np.float32)

    def _info(self, door_open: bool) -> dict[str, Any]:
        return {"temperature": self._temperature, "door_open": door_open}


@dataclass(frozen=True)
class ProportionalController:
    """What collects the refrigerator's data: u = max(0, gain (observation - set_point) + N(0, noise^2)).

    A `Policy` (`envs.policies`). The defaults are the controller of the source above: with its set point of -3.75 the
    loop settles near -2 °C. Another gain gives the test policies that visit other states.
    """

    gain: float = 0.2  # power per °C
    set_point: float = -3.75  # °C
    noise: float = 0.1  # power
    observation_dim: int | None = 1
    action_dim: int = 1

    def act(self, observations: NDArray[Any], rng: np.random.Generator | None) -> FloatArray:
        """Power (B, 1) for temperatures (B, 1); without `rng` no noise."""
        power = self.gain * (np.asarray(observations, np.float32) - np.float32(self.set_point))
        if rng is not None:
            power = power + self.noise * rng.standard_normal(power.shape, dtype=np.float32)
        return np.clip(power, 0.0, Refrigerator.MAX_POWER).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {"kind": "proportional", "gain": self.gain, "set_point": self.set_point, "noise": self.noise}
