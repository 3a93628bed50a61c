"""What synthetic transitions are worth: would the policy act like that, would the environment answer like that, and
which part of the data do they cover.

Transitions come as rows of `agents.replay` with the tags of `agents.rollout`, whoever has made them: a trajectory
diffusion model or rollouts of an ensemble. So all of them pass through the same pipe, rows of the dataset included.

    log-likelihood    log pi(a_t | s_t) of a policy
    dynamics error    the simulator is put into s_t and makes one step with a_t; the squared difference of where it
                      leads from s_{t+1}, as a mean over columns. Of the reward likewise
    support           precision and recall (Kynkäänniemi et al., "Improved precision and recall metric for assessing
                      generative models", NeurIPS 2019) and coverage (Naeem et al., "Reliable fidelity and diversity
                      metrics for generative models", ICML 2020) of state-action pairs by k-nearest-neighbour balls
    terminals         how often d = 1, and how that agrees with the environment's rule on s_{t+1}

The first two are what policy-guided diffusion is judged by (Jackson et al. 2024, arXiv 2404.06356). No code for them is
public: the protocol is ours.

A transition is left out of the errors, and counted, if the simulator cannot be put into s_t, since a velocity is at the
limit that observations are clipped to, or would not be there, since its rule has ended the episode in s_t.
Errors have long tails (a foot that touches the ground a step too early): medians stand beside the means. Beside the
one-step error, which starts anew from every state, `DynamicsError.open_loop` lets the simulator go on by itself.

Everything is drawn by a generator of its own and nothing is changed, so that a run trains the same with and without.

Shapes: M member, R row, P point of a comparison, S observation, A action, D = S + A,
W = 2S + A + 2 columns of a row (see `agents.replay`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agents.actors import Actor
from agents.diagnostics import Standardiser
from agents.method import Measures, TrainingData
from agents.model_error import simulator, steps_told
from agents.randomness import generator
from agents.replay import transition_rows
from agents.rollout import Dynamics, tag_steps
from envs.errors import UserError
from envs.termination import termination_rule
from envs.transforms import STD_OFFSET
from envs.true_dynamics import StateLayout, robot_layout

NUM_ROWS = 3_000  # of a pool that a run looks at: about 100 trajectories of 31 transitions
NUM_POINTS = 2_000  # of both sets whose supports are compared
NEIGHBOURS = 5  # k

_CLIPPED = 1 + 1e-6  # float32 may have rounded a clipped velocity downwards


# ---- policy -----------------------------------------------------------------------------------------------------


def log_likelihood(actor: Actor, rows_RW: Tensor) -> Tensor:
    """log pi(a | s) of every row, `(R,)`, in nats.

    Args:
        actor: of one member.
    """
    obs, action = rows_RW[:, : actor.observation_dim], rows_RW[:, actor.observation_dim :][:, : actor.action_dim]
    return actor.log_prob(obs.unsqueeze(0), action.unsqueeze(0)).squeeze(0)


def own_log_likelihood(actor: Actor, rows_RW: Tensor, source: torch.Generator) -> Tensor:
    """The same of actions that the policy draws itself in the rows' states: as high as a mean over rows should get.

    Args:
        actor: of one member.
        source: draws the actions.
    """
    obs = rows_RW[:, : actor.observation_dim].unsqueeze(0)
    noise = torch.randn((1, len(rows_RW), actor.action_dim), generator=source, device=rows_RW.device)
    return actor.log_prob(obs, actor.sample(obs, noise)).squeeze(0)


# ---- dynamics ---------------------------------------------------------------------------------------------------


class RowErrors(NamedTuple):
    """Of R transitions, on the CPU. Errors are float64, not a number where a row is left out."""

    standardised_R: Tensor  # squared, in variances of the dataset's observations, mean over columns
    raw_R: Tensor  # squared, in the environment's units, mean over columns
    reward_R: Tensor  # squared, in variances of the dataset's rewards
    clipped_R: Tensor  # left out: the observation does not show the whole state
    unhealthy_R: Tensor  # left out: the episode would have ended before


class DynamicsError:
    """Holds transitions against the simulator, one step from their own states.

    Args:
        data: says how rows differ from the environment's observations, actions and rewards, and in which units errors
            are.
        true: its simulator, see `agents.model_error.simulator`.
    """

    def __init__(self, data: TrainingData, true: Dynamics) -> None:
        self._true, self._termination = true, data.termination
        self._dims = data.observation_dim, data.observation_dim + data.action_dim
        self._standardised = Standardiser(data.observations)
        self._layout: StateLayout | None = robot_layout(data.env_id)
        self._mean, self._std = (
            torch.full((data.observation_dim,), one) if x is None else x.cpu().float()
            for x, one in ((data.observation_mean, 0.0), (data.observation_std, 1.0))
        )
        # rewards that hardly vary, as some toys', would make every error large
        self._reward_std = float(data.rewards.double().std(correction=0)) + STD_OFFSET * abs(data.reward_scale)

    def __call__(self, rows_RW: Tensor) -> RowErrors:
        s, width = self._dims
        rows_1RW = rows_RW.unsqueeze(0)
        obs, state_action, reward, predicted = (
            rows_1RW[..., :s], rows_1RW[..., :width], rows_1RW[..., width], rows_1RW[..., width + 2 :]
        )  # fmt: skip
        true_next = torch.empty_like(predicted)
        none = torch.zeros_like(reward, dtype=torch.int64)
        step = self._true.step(self._true.begin(obs, None), state_action, obs[..., :0], none, None, true_next)
        unhealthy, clipped = self._termination(obs), self._clipped(obs)
        known = ~unhealthy & ~clipped & true_next.isfinite().all(-1) & step.reward_MB.isfinite()
        std = self._std.to(predicted.device)
        squares = (
            (self._standardised(predicted) - self._standardised(true_next)).double().square().mean(-1),
            ((predicted.double() - true_next.double()) * std).square().mean(-1),
            ((reward.double() - step.reward_MB.double()) / self._reward_std).square(),
        )
        standardised, raw, of_reward = (x.where(known, math.nan).squeeze(0).cpu() for x in squares)
        return RowErrors(standardised, raw, of_reward, clipped.squeeze(0).cpu(), unhealthy.squeeze(0).cpu())

    def open_loop(self, rows_RW: Tensor, steps_R: Tensor, trajectory_R: Tensor) -> Tensor:
        """Squared differences from where the simulator is after as many steps with the same actions from the first
        state: the errors of all steps so far together. In variances of the data's observations, mean over columns,
        `(R,)` float64 on the CPU.

        Not a number behind the step at which the environment's rule ends a trajectory, in the rows or in the simulator,
        nor where the simulator cannot be put into the first state.

        Args:
            rows_RW: of whole trajectories.
            steps_R: of the rows, 1 for first ones.
            trajectory_R: numbers of the trajectories from 0 on.
        """
        s, width = self._dims
        errors_R = torch.full(steps_R.shape, math.nan, dtype=torch.float64)
        (first,) = torch.where(steps_R == 1)
        obs = rows_RW[first, :s].unsqueeze(0)
        going_on_N = torch.zeros(int(trajectory_R.max()) + 1, dtype=torch.bool, device=rows_RW.device)
        going_on_N[trajectory_R[first]] = ~(self._clipped(obs) | self._termination(obs)).squeeze(0)
        carried = self._true.begin(obs, None)
        assert carried is not None
        states_NX = carried.new_zeros((len(going_on_N), carried.shape[-1]))
        states_NX[trajectory_R[first].cpu()] = carried.squeeze(0)
        for t in range(1, int(steps_R.max()) + 1):
            (here,) = torch.where((steps_R == t) & going_on_N[trajectory_R])
            number = trajectory_R[here]
            going_on_N[:] = False
            if not len(here):
                break
            state_action, predicted = rows_RW[here, :width].unsqueeze(0), rows_RW[here, width + 2 :].unsqueeze(0)
            true_next, none = torch.empty_like(predicted), torch.zeros_like(predicted[..., 0], dtype=torch.int64)
            carried = states_NX[number.cpu()].unsqueeze(0)
            step = self._true.step(carried, state_action, predicted[..., :0], none, None, true_next)
            assert step.carried_MBX is not None
            states_NX[number.cpu()] = step.carried_MBX.squeeze(0)
            error = (self._standardised(predicted) - self._standardised(true_next)).double().square().mean(-1)
            finite = true_next.isfinite().all(-1)
            errors_R[here.cpu()] = error.where(finite, math.nan).squeeze(0).cpu()
            ended = self._termination(true_next) | self._termination(predicted)
            going_on_N[number] = (finite & ~ended).squeeze(0)
        return errors_R

    def _clipped(self, obs_1RS: Tensor) -> Tensor:
        """Which states have a velocity at the limit of what is shown, or beyond, `(1, R)`."""
        if self._layout is None:
            return torch.zeros_like(obs_1RS[..., 0], dtype=torch.bool)
        in_environment = (obs_1RS.cpu() * self._std + self._mean) * _CLIPPED
        complete = torch.from_numpy(self._layout.complete(in_environment.squeeze(0).numpy()))
        return ~complete.unsqueeze(0).to(obs_1RS.device)


# ---- support ----------------------------------------------------------------------------------------------------


def support_overlap(real_PD: Tensor, made_PD: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """How far the supports of two sets of points agree, judged by balls around points up to their k-th neighbour.

    Args:
        real_PD, made_PD: points of the reference and of the model, more than k each, in units in which distances mean
            something.

    Returns:
        precision: share of the model's points within the ball of a reference point;
        recall: share of the reference points within the ball of a model's point;
        coverage: share of the reference points whose own ball has a point of the model. Recall's balls grow where the
        model's points are far apart, coverage's do not.
    """
    real_radius_P, made_radius_P = (_radius(x, k) for x in (real_PD, made_PD))
    between = torch.cdist(made_PD, real_PD)
    found = {
        "precision": (between <= real_radius_P).any(1), "recall": (between <= made_radius_P.unsqueeze(1)).any(0),
        "coverage": between.amin(0) <= real_radius_P,
    }  # fmt: skip
    return {name: float(x.double().mean()) for name, x in found.items()}


def _radius(points_PD: Tensor, k: int) -> Tensor:
    """The distance of every point's k-th nearest other point, `(P,)`."""
    distances = torch.cdist(points_PD, points_PD).fill_diagonal_(math.inf)
    return distances.kthvalue(k, 1).values


# ---- terminals --------------------------------------------------------------------------------------------------


def terminal_measures(done_R: Tensor, ended_R: Tensor) -> dict[str, float]:
    """How d agrees with the environment's rule.

    Args:
        done_R: which rows are terminals.
        ended_R: which rows' next states the rule takes for the end of an episode.

    Returns:
        rate, of terminals; rule_rate; precision: share of the terminals that the rule confirms; recall: share of the
        rule's ends that are terminals. Not a number where there is none.
    """
    both = (done_R & ended_R).sum().double()
    found = {
        "rate": done_R.double().mean(), "rule_rate": ended_R.double().mean(),
        "precision": both / done_R.sum(), "recall": both / ended_R.sum(),
    }  # fmt: skip
    return {name: float(x) for name, x in found.items()}


# ---- all of it, of the pools of a run -------------------------------------------------------------------------------


class PoolDiagnostics:
    """Measures what the members of a pack learn from: metrics `synthetic/*` (see docs/policy_guided_diffusion.md).

    Args:
        data: what the stages of the run were trained on. Pools are in its units.
    """

    def __init__(self, data: TrainingData) -> None:
        self.data = data
        self.scale_D = torch.cat((data.observations, data.actions), 1).std(0, correction=0) + STD_OFFSET
        try:
            termination_rule(data.env_id)
            self._has_rule = True
        except UserError:
            self._has_rule = False
        true = simulator(data)
        self.error = None if true is None else DynamicsError(data, true)
        # the same for all runs and evaluations
        device = data.observations.device
        source = generator(0, "pool diagnostics", device=device)
        chosen = torch.randperm(len(data.rewards), generator=source, device=device)[:NUM_ROWS]
        columns = (data.observations, data.actions, data.rewards, data.terminals, data.next_observations)
        self.real_RW = transition_rows(*(x[chosen] for x in columns))
        self._floor = {} if self.error is None else _error_measures(self.error(self.real_RW), None, 0, "_dataset")

    def __call__(
        self, actor: Actor, rows: Sequence[Tensor], tags: Sequence[Tensor], seeds: Sequence[int], epoch: int,
        length: int,
    ) -> list[Measures]:  # fmt: skip
        """Metrics of every member, those that are defined; nothing of one whose pool is empty.

        Args:
            actor: the current policies, lead (M,), for observations as `data` has them.
            rows, tags: of every member's pool, (n, W) and (n,).
            seeds: of the members.
            epoch: of the evaluation, counts the draws.
            length: H - 1, the most transitions of a trajectory.
        """
        return [
            self._of_member(actor.select([m]), rows[m], tags[m], seed, epoch, length) if len(rows[m]) else {}
            for m, seed in enumerate(seeds)
        ]

    @torch.inference_mode()
    def _of_member(self, actor: Actor, rows: Tensor, tags: Tensor, seed: int, epoch: int, length: int) -> Measures:
        device = rows.device
        source = generator(seed, "pool diagnostics", epoch, device=device)
        chosen = torch.randperm(len(rows), generator=source, device=device)[:NUM_ROWS]
        found = self.measures(actor, rows[chosen], tag_steps(tags[chosen]), length, source) | self._floor
        return {f"synthetic/{name}": x for name, x in found.items() if isinstance(x, float) and math.isfinite(x)}

    def measures(
        self, actor: Actor, rows_RW: Tensor, steps_R: Tensor, length: int, source: torch.Generator
    ) -> Measures:
        """Everything that is told of some rows, by name without prefix; not a number where it is not defined.

        Args:
            actor: of one member.
            steps_R: of the rows, 1 to `length`.
            source: draws the policy's own actions.
        """
        likelihood_R = log_likelihood(actor, rows_RW)
        found: Measures = {
            "log_likelihood": float(likelihood_R.double().mean()),
            "log_likelihood_dataset": float(log_likelihood(actor, self.real_RW).double().mean()),
            "log_likelihood_policy": float(own_log_likelihood(actor, rows_RW, source).double().mean()),
        }  # fmt: skip
        for step in steps_told(length):
            found[f"log_likelihood_step_{step}"] = float(likelihood_R[steps_R == step].double().mean())
        if self.error is not None:
            found |= _error_measures(self.error(rows_RW), steps_R.cpu(), length)
        s = self.data.observation_dim
        done_R = rows_RW[:, -s - 1] > 0
        if self._has_rule:
            ended_R = self.data.termination(rows_RW[:, -s:])
            found |= {f"terminal_{name}": x for name, x in terminal_measures(done_R, ended_R).items()}
        found["terminal_rate"] = float(done_R.double().mean())
        found["terminal_rate_dataset"] = float(self.data.terminals.double().mean())
        return found | {f"support_{name}": x for name, x in self.support(rows_RW).items()}

    def support(self, made_RW: Tensor, real_RW: Tensor | None = None) -> dict[str, float]:
        """`support_overlap` of the states and actions of rows, in standard deviations of the dataset's columns.

        Args:
            real_RW: the reference; None: rows of the dataset.
        """
        width = len(self.scale_D)
        real_RW = self.real_RW if real_RW is None else real_RW
        points = [_spread(x)[:, :width] / self.scale_D for x in (real_RW, made_RW)]
        # a diverged prediction is as good as any other that is far from everything
        real_PD, made_PD = (x.clamp(-1e6, 1e6) for x in points)
        return support_overlap(real_PD, made_PD) if min(len(real_PD), len(made_PD)) > NEIGHBOURS else {}


def _spread(rows_RW: Tensor) -> Tensor:
    """`NUM_POINTS` of the rows, or all, evenly from the first to the last."""
    count = min(NUM_POINTS, len(rows_RW))
    return rows_RW[torch.arange(count, device=rows_RW.device) * len(rows_RW) // max(count, 1)]


def _error_measures(errors: RowErrors, steps_R: Tensor | None, length: int, suffix: str = "") -> Measures:
    """Means and medians of squared errors: of all rows, and of the steps that are told if `steps_R` are given."""
    found: Measures = {}
    names = ("dynamics_error", "dynamics_error_raw", "reward_error")
    for name, values_R in zip(names, (errors.standardised_R, errors.raw_R, errors.reward_R), strict=True):
        found[f"{name}{suffix}"], found[f"{name}_median{suffix}"] = _mean_and_median(values_R)
    if steps_R is not None:
        for step in steps_told(length):
            mean, median = _mean_and_median(errors.standardised_R[steps_R == step])
            found[f"dynamics_error_step_{step}"], found[f"dynamics_error_median_step_{step}"] = mean, median
        found["clipped_share"] = float(errors.clipped_R.double().mean())
        found["unhealthy_share"] = float(errors.unhealthy_R.double().mean())
    return found


def _mean_and_median(values_R: Tensor) -> tuple[float, float]:
    """Of those that are numbers; the median is that of two middle values which is the lower."""
    return float(values_R.nanmean()), float(values_R.nanmedian())
