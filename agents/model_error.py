"""How far a learned model, plain or filtered, is from the environment: its rollouts held against the simulator.

From states of the dataset the run's policy is rolled out in the model, and the simulator is stepped with the *same*
actions from the same starts: what the model would have had to predict. Errors are differences of observations,
standardised by the dataset's standard deviation, as root mean squares over columns and rollouts, by step. Beside that
open-loop error, which gathers over the steps, stands the one-step error: the simulator is put into the model's own
state and makes one step (as in MOREC's published diagnostics, polixir/morec be8a641).

With a transition filter (`agents.transition_filter`) there are three arms:

    unfiltered   the plain model
    filtered     candidates are selected by the dynamics reward; the threshold is not heeded
    survivors    those of the filtered rollouts that the threshold has not cut so far

The threshold leaves rollouts out, and so may lower an error without a better prediction: the survivors' error stands
beside the share that survives and beside the unfiltered error from the same starts.

A rollout leaves the sums behind the step at which the environment's rule ends it, in the model or in the simulator, and
before a prediction that is not finite. Unfiltered and filtered errors of a step are of the same starts: those whose
rollouts are in the sums of both.

Everything is drawn by a generator of its own and nothing is changed, so that a run trains the same with and without.

Shapes: M member, B start, H step, S observation, A action, Y = S + A, C candidate, R state whose candidates are ranked,
X simulator state, Z draws of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agents.diagnostics import Standardiser, spearman
from agents.method import Measures, TrainingData
from agents.networks import StackedMLP
from agents.randomness import generator
from agents.rollout import Dynamics
from agents.squashed import squashed_sample
from agents.transition_filter import FilteredDynamics
from envs.environments import specification

NUM_STARTS = 100  # of every member
STEPS = (1, 5, 10, 20, 50, 100)  # at which errors are told, beside the last
_WITH_DYNAMICS = ("gymnasium.envs.mujoco", "envs.toys", "envs.shifted_robots")  # where such environments are made
NUM_RANKED = 20  # states of each of these steps whose candidates are ranked by the dynamics reward
NUM_POINTS = 300  # candidates that are kept for a figure

_NO_ERROR = 1e-24  # squared, instead of 0: far below what float32 shows, and it has a logarithm
REWARDS, LOG_ERRORS = "model/sample_dynamics_reward", "model/sample_log10_error"


class Course(NamedTuple):
    """What was measured of B rollouts of at most H steps; not a number where a rollout is not in the sums."""

    error_HB: Tensor  # mean over columns of the squared standardised error, float64
    one_step_HB: Tensor  # the same of single steps, at the steps told only
    cut_HB: Tensor  # whether the dynamics have cut the rollout at this step
    state_action_RY: Tensor  # some states of the rollouts with their actions
    true_next_RS: Tensor  # where one step of the simulator leads from them


def steps_told(length: int) -> list[int]:
    """Steps 1 to k at which errors are told: those of `STEPS`, and the last."""
    return sorted({step for step in STEPS if step <= length} | {length})


def simulator(data: TrainingData) -> Dynamics | None:
    """The true dynamics of what a run learns from; None where there are none, or none with such observations."""
    spec = specification(data.env_id)
    # no other environment has any, and asking loads MuJoCo
    if spec is None or not str(spec.entry_point).startswith(_WITH_DYNAMICS):
        return None
    from agents.true_dynamics import SimulatedDynamics
    from envs.true_dynamics import TrueDynamics, has_true_dynamics

    if not has_true_dynamics(data.env_id):
        return None
    true = TrueDynamics(data.env_id)
    shown = (true.observation_dim, true.action_dim) == (data.observation_dim, data.action_dim)
    return SimulatedDynamics(data) if shown else None


class ModelError:
    """Measures the errors of a run's model.

    Args:
        data: what the run learns from.
        true: its simulator.
    """

    def __init__(self, data: TrainingData, true: Dynamics) -> None:
        self.data, self.true = data, true
        self._termination = data.termination
        self._standardised = Standardiser(data.observations)

    def __call__(
        self, actor: StackedMLP, dynamics: Dynamics, rows: Tensor | None, seeds: Sequence[int], epoch: int, length: int
    ) -> list[Measures]:
        """Metrics `model/*` of every member, those that are defined, and of a filtered model a sample of candidates
        (lists `REWARDS` and `LOG_ERRORS`).

        Args:
            actor: lead (M,).
            dynamics: the model, filtered or plain.
            rows: numbers of the dataset's rows that rollouts start from; None: all.
            seeds: of the members.
            epoch: of the evaluation, counts the draws.
            length: H, steps.
        """
        members = enumerate(seeds)
        return [self._of_member(actor.select([m]), dynamics, rows, seed, epoch, length) for m, seed in members]

    @torch.inference_mode()
    def _of_member(
        self, actor: StackedMLP, dynamics: Dynamics, rows: Tensor | None, seed: int, epoch: int, length: int
    ) -> Measures:
        device = self.data.observations.device
        source = generator(seed, "model error", epoch, device=device)
        total = len(self.data.observations if rows is None else rows)
        index_B = torch.randint(total, (NUM_STARTS,), generator=source, device=device)
        index_B = index_B if rows is None else rows[index_B]
        noise = torch.randn((length, NUM_STARTS, self.data.action_dim), generator=source, device=device)
        if not isinstance(dynamics, FilteredDynamics):
            return error_metrics(self.follow(actor, dynamics, index_B, noise, source), None)
        plain = self.follow(actor, dynamics.ensemble, index_B, noise, source)
        filtered = self.follow(actor, dynamics, index_B, noise, source)
        return error_metrics(plain, filtered) | self.reward_metrics(dynamics, filtered, source)

    def follow(
        self, actor: StackedMLP, dynamics: Dynamics, index_B: Tensor, action_noise_HBA: Tensor, source: torch.Generator
    ) -> Course:
        """Rollouts in a model and in the simulator with the same actions.

        Args:
            actor: of one member, lead (1,).
            index_B: rows of the dataset that they start from.
            action_noise_HBA: standard normal draws of the policy.
            source: draws what the model takes.
        """
        length, num_starts = action_noise_HBA.shape[:2]
        device, told = index_B.device, steps_told(length)
        noise_HBZ = torch.randn((length, num_starts, dynamics.num_noises), generator=source, device=device)
        which_HB = torch.randint(len(dynamics.choices), (length, num_starts), generator=source, device=device)
        choice_HB = torch.tensor(dynamics.choices, device=device)[which_HB]
        error_HB = torch.full((length, num_starts), math.nan, dtype=torch.float64, device=device)
        one_step_HB, cut_HB = error_HB.clone(), torch.zeros_like(error_HB, dtype=torch.bool)
        ranked: list[tuple[Tensor, Tensor]] = []

        states = self.data.states
        states_1BX = None if states is None else states[index_B.to(states.device)].unsqueeze(0)
        obs, place = self.data.observations[index_B].unsqueeze(0), torch.arange(num_starts, device=device)
        carried, true = dynamics.begin(obs, states_1BX), self.true.begin(obs, states_1BX)
        for t in range(length):
            action = squashed_sample(actor.forward(obs)[0], action_noise_HBA[t, place].unsqueeze(0))
            state_action, predicted = torch.cat((obs, action), -1), torch.empty_like(obs)
            choice = choice_HB[t, place].unsqueeze(0)
            made = dynamics.step(carried, state_action, noise_HBZ[t, place].unsqueeze(0), choice, None, predicted)
            true_next, next_true = self._true_step(true, state_action)
            error = self._error(predicted, true_next)
            finite = predicted.isfinite().all(-1) & made.reward_MB.isfinite() & true_next.isfinite().all(-1)
            error_HB[t, place] = error.where(finite, math.nan)
            if t + 1 in told:
                own_next = true_next  # as far as the first step goes, the model's own state is the simulator's
                if t:
                    own = self.true.begin(obs, None) if carried is None else carried
                    own_next, _ = self._true_step(own, state_action)
                one_step_HB[t, place] = self._error(predicted, own_next).where(finite, math.nan)
                ranked.append((state_action[0, :NUM_RANKED], own_next[0, :NUM_RANKED]))
            ended = self._termination(predicted)
            if made.cut_MB is not None:
                cut_HB[t, place] = made.cut_MB & ~ended
            going_on = (finite & ~ended & ~self._termination(true_next)).squeeze(0)
            obs, carried, true = predicted[:, going_on], _part(made.carried_MBX, going_on), _part(next_true, going_on)
            place = place[going_on]
            if not len(place):
                break
        state_action_RY, true_next_RS = (torch.cat(parts) for parts in zip(*ranked, strict=True))
        return Course(error_HB.cpu(), one_step_HB.cpu(), cut_HB.cpu(), state_action_RY, true_next_RS)

    def _true_step(self, state_1BX: Tensor | None, state_action_1BY: Tensor) -> tuple[Tensor, Tensor | None]:
        """Next observations `(1, B, S)` and states of the simulator."""
        after = state_action_1BY[..., : self.data.observation_dim].clone()
        none = torch.zeros_like(after[..., 0], dtype=torch.int64)
        step = self.true.step(state_1BX, state_action_1BY, after[..., :0], none, None, after)
        return after, step.carried_MBX

    def _error(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Mean over columns of the squared standardised difference, `(..., S)` -> `(...)`, float64."""
        difference = self._standardised(predicted) - self._standardised(true)
        return difference.double().square().mean(-1)

    def reward_metrics(self, dynamics: FilteredDynamics, course: Course, source: torch.Generator) -> Measures:
        """How well the dynamics reward ranks candidates by their one-step error, at states of filtered rollouts."""
        state_action_RY, true_RS = course.state_action_RY, course.true_next_RS
        noise = torch.randn((len(true_RS), dynamics.num_noises), generator=source, device=true_RS.device)
        predicted = dynamics.ensemble.predict_elites(state_action_RY)
        next_RCS = dynamics.candidates(state_action_RY, *predicted, noise)[..., :-1].transpose(0, 1)
        reward_RC = dynamics.reward(state_action_RY, next_RCS).cpu()
        log_error_RC = self._error(next_RCS, true_RS.unsqueeze(1)).cpu().clamp_(min=_NO_ERROR).log10_() / 2
        finite_R = (reward_RC.isfinite() & log_error_RC.isfinite()).all(1)
        reward_RC, log_error_RC = reward_RC[finite_R], log_error_RC[finite_R]
        if not len(reward_RC):
            return {}
        within_R = spearman(reward_RC, log_error_RC)
        whole, within = spearman(reward_RC.flatten(), log_error_RC.flatten()), within_R.nanmean()
        metrics: Measures = {}
        for name, value in (("", whole), ("_within", within)):
            if bool(value.isfinite()):
                metrics[f"model/reward_error_correlation{name}"] = float(value)
        shown = torch.randperm(reward_RC.numel(), generator=torch.Generator().manual_seed(0))[:NUM_POINTS]
        metrics[REWARDS], metrics[LOG_ERRORS] = (x.flatten()[shown].tolist() for x in (reward_RC, log_error_RC))
        return metrics


def _part(carried: Tensor | None, chosen_B: Tensor) -> Tensor | None:
    return None if carried is None else carried[:, chosen_B.to(carried.device)]


def error_metrics(plain: Course, filtered: Course | None) -> Measures:
    """Metrics `model/*` of a model's rollouts and of the filtered ones from the same starts, those that are defined."""
    length = len(plain.error_HB)
    arms = {"": plain} if filtered is None else {"": plain, "_filtered": filtered}
    common_HB = torch.stack([~course.error_HB.isnan() for course in arms.values()]).all(0)
    told = [step - 1 for step in steps_told(length)]
    metrics: dict[str, Tensor] = {}
    for name, course in arms.items():
        metrics[f"one_step_error{name}"] = _rms(course.one_step_HB[told], common_HB[told])
    for t in told:
        common_B = common_HB[t]
        for name, course in arms.items():
            metrics[f"rmse{name}_step_{t + 1}"] = _rms(course.error_HB[t], common_B)
            metrics[f"one_step_error{name}_step_{t + 1}"] = _rms(course.one_step_HB[t], common_B)
        metrics[f"alive_share_step_{t + 1}"] = common_B.double().mean()
        if filtered is not None:
            survivor_B = common_B & ~filtered.cut_HB[: t + 1].any(0)
            metrics[f"survivor_share_step_{t + 1}"] = survivor_B.sum() / common_B.sum().double()
            metrics[f"rmse_survivors_step_{t + 1}"] = _rms(filtered.error_HB[t], survivor_B)
            metrics[f"rmse_survivors_unfiltered_step_{t + 1}"] = _rms(plain.error_HB[t], survivor_B)
    return {f"model/{name}": float(x) for name, x in metrics.items() if bool(x.isfinite())}


def _rms(squares: Tensor, chosen: Tensor) -> Tensor:
    """Root of the mean of the chosen squares; not a number where there are none."""
    return torch.where(chosen, squares, 0.0).sum().div(chosen.sum()).sqrt()
