"""What models of the refrigerator (`envs.toys.Refrigerator`) get wrong, on the data they are fitted to and off it, with
and without MOREC's transition filter (Luo et al. 2024: dynamics learned from one controller's data are asked about
others').

In the data power is almost a linear function of temperature, so that the effects of the two can hardly be told apart: a
model fits the data well and is wrong about most other temperatures and powers. The truth is the simulator with its door
shut and no sensor noise (`envs.true_dynamics`). A model fitted to the data knows neither of door nor of noise as such:
it predicts averages over both, and so differs a little from this truth on the data, too.

Temperatures are observations as the dataset has them, which must not be standardised, in °C; powers are in [0, 10].

Shapes: T step, B rollout, G point of the map, R draw at a point, C next temperature asked about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from agents.dynamics import Ensemble
from agents.dynamics_reward import DynamicsReward
from agents.method import TrainingData
from agents.randomness import generator
from agents.rollout import Dynamics
from agents.transition_filter import FilterConfig, FilteredDynamics
from agents.true_dynamics import SimulatedDynamics
from envs.toys import Refrigerator

NUM_ROLLOUTS = 100
LENGTH = 100  # steps
MAP_DRAWS = 8  # at every point
NUM_TEMPERATURES, NUM_POWERS = 36, 26  # of the map
TEMPERATURES, POWERS = (-15.0, 20.0), (0.0, Refrigerator.MAX_POWER)  # first and last
FAR = ((5.0, 8.0), (15.0, 1.0), (-10.0, 4.0), (18.0, 9.0))  # (temperature, power) nowhere near the data
CURVE_HALF_WIDTH, CURVE_POINTS = 6.0, 121  # next temperatures around the true one


@dataclass(frozen=True)
class Controller:
    """Power from temperature: proportional, integral and derivative gains on e_t = T_t - set_point,

        u_t = p e_t + i (e_0 + ... + e_t) + d (e_t - e_{t-1}),   e_{-1} = 0,   within [0, 10]

    The first of `CONTROLLERS` collected the data, but with noise on its power; the others and the set point are those
    that stand beside it in the task's source (polixir/revive 2d69367, examples/task/Refrigerator).
    """

    name: str
    p: float
    i: float = 0.0
    d: float = 0.0
    set_point: float = -3.75  # °C

    def powers(self, error: Tensor, error_sum: Tensor, last_error: Tensor) -> Tensor:
        """`(B,)` from e_t, the sum up to e_t, and e_{t-1}, `(B,)` each."""
        power = self.p * error + self.i * error_sum + self.d * (error - last_error)
        return power.clamp(0.0, Refrigerator.MAX_POWER)


CONTROLLERS = (
    Controller("behaviour", 0.2),
    Controller("P 1.5", 1.5),
    Controller("PID 0.1 / 0.005 / 0.4", 0.1, 0.005, 0.4),
)


class Model:
    """A model of the refrigerator, or the simulator, asked for temperatures.

    Args:
        dynamics: of the rollouts that it is used for.
        data: what it was fitted to; says how actions and powers are related.
        noisy: whether its Gaussians are sampled; else every step is the mean of the model that is drawn.
    """

    def __init__(self, dynamics: Dynamics, data: TrainingData, noisy: bool = True) -> None:
        if not data.env_id.startswith("offsweep/Refrigerator") or data.observation_mean is not None:
            raise ValueError(f"temperatures of a refrigerator in °C are needed, not the observations of {data.env_id}")
        assert data.action_low is not None
        assert data.action_high is not None
        self.dynamics, self.noisy = dynamics, noisy
        self._center = float(data.action_low + data.action_high) / 2
        self._scale = float(data.action_high - data.action_low) / 2

    def state_action(self, temperature: Tensor, power: Tensor) -> Tensor:
        """`(..., 2)`, as learners have it."""
        return torch.stack((temperature, (power - self._center) / self._scale), -1)

    def step(self, temperature_B: Tensor, power_B: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Next temperatures `(B,)`, and which of them dynamics with a threshold would end their rollouts at."""
        dynamics, num = self.dynamics, len(temperature_B)
        noise = torch.zeros(1, num, dynamics.num_noises)
        if self.noisy:
            noise.normal_(generator=source)
        choice = torch.tensor(dynamics.choices)[torch.randint(len(dynamics.choices), (1, num), generator=source)]
        state_action = self.state_action(temperature_B, power_B).unsqueeze(0)
        after = torch.empty(1, num, 1)
        carried = dynamics.begin(state_action[..., :1], None)
        step = dynamics.step(carried, state_action, noise, choice, None, after)
        cut = torch.zeros(num, dtype=torch.bool) if step.cut_MB is None else step.cut_MB[0]
        return after[0, :, 0], cut


# ---- rollouts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """Rollouts under a controller that sees what the model predicts."""

    temperatures_TB: Tensor  # (T + 1, B), from the first one on
    powers_TB: Tensor
    alive_TB: Tensor  # (T, B) bool: not cut up to and with this step


def controlled(model: Model, controller: Controller, seed: int, num: int, length: int) -> Course:
    """Roll a model out from the temperature at which episodes start.

    A rollout that is cut goes on all the same, so that those which are not can be compared with all.
    """
    source = generator(seed, "refrigerator rollouts")
    temperature = torch.full((num,), Refrigerator.START)
    error_sum, last_error, alive = torch.zeros(num), torch.zeros(num), torch.ones(num, dtype=torch.bool)
    temperatures, powers, survivors = [temperature], [], []
    for _ in range(length):
        error = temperature - controller.set_point
        error_sum = error_sum + error
        power = controller.powers(error, error_sum, last_error)
        temperature, cut = model.step(temperature, power, source)
        last_error, alive = error, alive & ~cut
        temperatures.append(temperature)
        powers.append(power)
        survivors.append(alive)
    return Course(torch.stack(temperatures), torch.stack(powers), torch.stack(survivors))


@dataclass(frozen=True)
class Errors:
    """How far a model's temperatures are from the simulator's, by step, in °C."""

    rmse_T: Tensor
    share_T: Tensor  # of the rollouts that it is the error of

    @property
    def rmse(self) -> float:
        """Over all steps and rollouts; every step counts by the share of its rollouts."""
        known = self.share_T > 0
        squared = (self.share_T * self.rmse_T.square())[known].sum() / self.share_T.sum()
        return float(squared.sqrt())


def rollout_errors(course: Course, truth_T: Tensor, survivors: bool = False) -> Errors:
    """Root mean square over the rollouts, `(T,)`.

    Args:
        truth_T: (T + 1,) the simulator's temperatures under the same controller.
        survivors: of those rollouts alone that were not cut; not a number where none is left.
    """
    squared_TB = (course.temperatures_TB[1:] - truth_T[1:, None]).square()
    counted_TB = course.alive_TB if survivors else torch.ones_like(course.alive_TB)
    mean_T = squared_TB.where(counted_TB, 0.0).sum(1) / counted_TB.sum(1)
    return Errors(mean_T.sqrt(), counted_TB.float().mean(1))


# ---- the plane of temperatures and powers ---------------------------------------------------------------------------


def grid() -> tuple[Tensor, Tensor]:
    """Temperatures `(NUM_TEMPERATURES,)` and powers `(NUM_POWERS,)` of the map."""
    return torch.linspace(*TEMPERATURES, NUM_TEMPERATURES), torch.linspace(*POWERS, NUM_POWERS)


def support(model: Model, data: TrainingData) -> Tensor:
    """How many rows of the dataset are nearest to each point of the map, `(NUM_TEMPERATURES, NUM_POWERS)`; rows outside
    of it are left out."""
    powers = model._center + model._scale * data.actions[:, 0]
    places = []
    for values, axis in ((data.observations[:, 0], grid()[0]), (powers, grid()[1])):
        places.append(((values - axis[0]) / (axis[1] - axis[0])).round().long())
    inside = (places[0] >= 0) & (places[0] < NUM_TEMPERATURES) & (places[1] >= 0) & (places[1] < NUM_POWERS)
    flat = (places[0] * NUM_POWERS + places[1])[inside]
    return torch.bincount(flat, minlength=NUM_TEMPERATURES * NUM_POWERS).view(NUM_TEMPERATURES, NUM_POWERS)


def one_step_errors(model: Model, truth: Model, seed: int, draws: int = MAP_DRAWS) -> Tensor:
    """Mean |next temperature - the simulator's| at the points of the map, `(NUM_TEMPERATURES, NUM_POWERS)`, in °C."""
    source = generator(seed, "refrigerator map")
    temperature_G, power_G = (x.flatten() for x in torch.meshgrid(*grid(), indexing="ij"))
    true_G, _ = truth.step(temperature_G, power_G, source)
    made, _ = model.step(temperature_G.repeat(draws), power_G.repeat(draws), source)
    errors_RG = (made.view(draws, -1) - true_G).abs()
    return errors_RG.mean(0).view(NUM_TEMPERATURES, NUM_POWERS)


@dataclass(frozen=True)
class RewardMap:
    """The dynamics reward over the plane, `(NUM_TEMPERATURES, NUM_POWERS)` each."""

    of_truth: Tensor  # of the simulator's next temperature
    of_model: Tensor  # mean over draws of the model


def reward_map(reward: DynamicsReward, model: Model, truth: Model, seed: int, draws: int = MAP_DRAWS) -> RewardMap:
    """What the reward makes of true transitions and of a model's."""
    source = generator(seed, "refrigerator rewards")
    temperature_G, power_G = (x.flatten() for x in torch.meshgrid(*grid(), indexing="ij"))
    true_G, _ = truth.step(temperature_G, power_G, source)
    made, _ = model.step(temperature_G.repeat(draws), power_G.repeat(draws), source)
    asked_GC = torch.cat((true_G[:, None], made.view(draws, -1).T), 1)
    rewards_GC = reward(model.state_action(temperature_G, power_G), asked_GC.unsqueeze(-1))
    means = rewards_GC[:, 0], rewards_GC[:, 1:].mean(1)
    return RewardMap(*(x.view(NUM_TEMPERATURES, NUM_POWERS) for x in means))


@dataclass(frozen=True)
class RewardCurve:
    """The dynamics reward of next temperatures around the true one, at one temperature and power."""

    temperature: float
    power: float
    offsets_C: Tensor  # from the true next temperature, °C
    rewards_C: Tensor

    @property
    def peak(self) -> float:
        """Where it is highest, in °C from the truth."""
        return float(self.offsets_C[self.rewards_C.argmax()])


def reward_curves(reward: DynamicsReward, truth: Model, points: Sequence[tuple[float, float]]) -> list[RewardCurve]:
    """One for each (temperature, power)."""
    temperature_G, power_G = torch.tensor(points).unbind(1)
    true_G, _ = truth.step(temperature_G, power_G, torch.Generator())
    offsets_C = torch.linspace(-CURVE_HALF_WIDTH, CURVE_HALF_WIDTH, CURVE_POINTS)
    asked_GCS = (true_G[:, None] + offsets_C).unsqueeze(-1)
    rewards_GC = reward(truth.state_action(temperature_G, power_G), asked_GCS)
    return [RewardCurve(*point, offsets_C, rewards) for point, rewards in zip(points, rewards_GC, strict=True)]


# ---- all of it ------------------------------------------------------------------------------------------------------

# ways of stepping, as they are called in tables
DRAW, MEAN, FILTERED, SURVIVORS = "random draw", "random mean", "filtered", "filtered, not cut"
NEAREST = "nearest candidate"


class NearestReward:
    """In a dynamics reward's place: highest for the candidate nearest to the simulator's next temperature, which no
    filter can know."""

    floats_per_candidate = 1

    def __init__(self, truth: Model) -> None:
        self.truth = truth

    def __call__(self, state_action_BY: Tensor, next_obs_BCS: Tensor) -> Tensor:
        true_1BS = torch.empty(1, len(state_action_BY), 1)
        dynamics, state_action_1BY = self.truth.dynamics, state_action_BY.unsqueeze(0)
        carried, nothing = dynamics.begin(state_action_1BY[..., :1], None), torch.empty(1, len(state_action_BY), 0)
        dynamics.step(carried, state_action_1BY, nothing, nothing[..., :1].sum(-1), None, true_1BS)
        return 1 / (1 + (next_obs_BCS - true_1BS.transpose(0, 1)).abs().squeeze(-1))


@dataclass(frozen=True)
class Measured:
    """What one ensemble and one dynamics reward are worth."""

    errors: Mapping[tuple[str, str], Errors]  # (controller, way)
    courses: Mapping[tuple[str, str], Course]  # likewise, without the survivors
    truths: Mapping[str, Course]  # by controller
    maps: Mapping[str, Tensor]  # mean one-step error by way
    support: Tensor
    rewards: RewardMap
    curves: Sequence[RewardCurve]

    def map_error(self, way: str, supported: bool) -> float:
        """Mean of the map's points with data, or of those without."""
        chosen = (self.support > 0) == supported
        return float(self.maps[way][chosen].mean())


@torch.inference_mode()
def measure(
    ensemble: Ensemble, reward: DynamicsReward, config: FilterConfig, data: TrainingData, seed: int,
    num_rollouts: int = NUM_ROLLOUTS, length: int = LENGTH,
) -> Measured:  # fmt: skip
    """Compare ways of stepping through one ensemble with the simulator.

    `random draw` is what rollouts do without a filter: a sample of a random elite's Gaussian; `random mean` is that
    Gaussian's mean, which tells what of the filter's gain is no more than less noise. `filtered` is the filter's choice
    with nothing cut; `filtered, not cut` are those of the same rollouts that its threshold would not have ended.
    `nearest candidate` knows the truth and takes the filter's candidate that is nearest to it: what selection alone
    could do with this ensemble, whatever its reward.
    """
    truth = Model(SimulatedDynamics(data), data)
    plain, filtered = Model(ensemble, data), Model(FilteredDynamics(ensemble, reward, config), data)
    knowing = cast(DynamicsReward, NearestReward(truth))
    nearest = Model(FilteredDynamics(ensemble, knowing, dataclasses.replace(config, selection="argmax")), data)
    models = {DRAW: plain, MEAN: Model(ensemble, data, noisy=False), FILTERED: filtered, NEAREST: nearest}
    courses, errors, truths = {}, {}, {}
    for controller in CONTROLLERS:
        true = truths[controller.name] = controlled(truth, controller, seed, 1, length)
        for way, model in models.items():
            course = courses[controller.name, way] = controlled(model, controller, seed, num_rollouts, length)
            errors[controller.name, way] = rollout_errors(course, true.temperatures_TB[:, 0])
        course = courses[controller.name, FILTERED]
        errors[controller.name, SURVIVORS] = rollout_errors(course, true.temperatures_TB[:, 0], survivors=True)
    maps = {way: one_step_errors(model, truth, seed) for way, model in models.items()}
    return Measured(
        errors, courses, truths, maps, support(plain, data), reward_map(reward, plain, truth, seed),
        reward_curves(reward, truth, FAR),
    )  # fmt: skip
