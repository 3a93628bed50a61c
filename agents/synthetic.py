"""Synthetic transitions: where they come from, and when.

Model rollouts of the model-based methods (`ModelRollouts`, one phase per epoch) and *pools* of the model-free ones
(`Pools`) have the same form: jobs that are pure functions of their fields and of a model, whose rows go into the rings
of the replay.

A pool is the set of synthetic transitions that a member learns from, beside real ones, until it is replaced as a whole
at the next *refresh* (policy-guided diffusion, Jackson et al. 2024, released diffusion/rollout_generator.py and
train_agent.py). With updates t counted from 0 and a refresh every R of them:

    synchronous         the pool of updates [kR, (k + 1) R) is made by the policy of update kR, for which learning waits
    asynchronous        it is made by the policy of update (k - 1) R, while learning goes on: it is asked for at one
                        refresh and taken in at the next, a fixed number of updates later however long it took
    the first pool      is waited for. That of a diffusion model is not guided: no policy has learned anything yet

So a policy is up to 2R updates older than the pool that is learned from (`synthetic/staleness_updates`), and results
depend neither on the speed nor on the number of workers. Asynchronously the first pool is kept for 2R updates, since no
other is asked for before the first refresh.

Shapes: M member, B start, S observation, X simulator state, W columns of a row, K step.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from agents.actors import Actor
from agents.checks import check_choice, check_positive
from agents.edm_sampler import SamplerConfig
from agents.guidance import GuidanceConfig
from agents.method import Job, JobsAhead, RolloutJob, RolloutResult, TrainingData
from agents.randomness import generator
from agents.replay import Replay
from agents.rollout import MAX_LENGTH, SHARD_ROWS, Dynamics, Penalty, RolloutStatistics, shard_size
from agents.trajectory_diffusion import TrajectoryModel
from agents.trajectory_rollout import TrajectoryJob
from envs.errors import UserError

# trajectories of a job, of each member: what it draws depends on it, so it does not depend on the pack
SHARD_TRAJECTORIES = 64  # on a CPU: activations stay in a core's cache, and workers can share a pool
DEVICE_SHARD_TRAJECTORIES = 1_024  # on a GPU
DEVICE_SHARD_MEMBERS = 8
SOURCES = ("none", "diffusion", "ensemble")
SURVIVAL = (10, 50, 90)  # percentiles of the rollouts' lengths


@dataclass
class SyntheticConfig:
    """Synthetic transitions of a model-free method (`method.synthetic.*`).

    The defaults are those of the release (EmptyJackson/policy-guided-diffusion 9da606c), but for `synchronous`, which
    there is always true, and for `length`, which there has to be said twice.
    """

    # none | diffusion: sub-trajectories of a diffusion model, guided by the policy (method.diffusion, .sampler,
    # .guidance) | ensemble: rollouts of the policy in a learned ensemble, as PETS makes them (method.dynamics)
    source: str = "none"
    real_ratio: float = 0.0625  # fraction of a batch that is of the dataset, truncated to rows
    num_trajectories: int = 8_192  # of a pool
    length: int | None = None  # transitions of each; None: one less than method.diffusion.length
    refresh_every: int = 10_000  # updates; a multiple of method.updates_per_epoch
    pools_retained: int = 1  # that a run learns from at once, its newest ones
    synchronous: bool = False  # true: learning waits for the pool of the present policy

    def __post_init__(self) -> None:
        check_choice(self, "source", SOURCES, "method.synthetic")
        check_positive(self, "num_trajectories", "refresh_every", "pools_retained", part="method.synthetic")
        if not 0 <= self.real_ratio < 1:
            raise UserError(
                f"method.synthetic.real_ratio={self.real_ratio} must be 0 or greater and below 1; a run without "
                "synthetic rows has method.synthetic.source=none"
            )
        if self.length is not None and not 1 <= self.length <= MAX_LENGTH:
            raise UserError(f"method.synthetic.length={self.length} must lie between 1 and {MAX_LENGTH}")


# ---- what has been generated ----------------------------------------------------------------------------------------


class Generated(NamedTuple):
    """What a member's jobs have given."""

    parts: list[tuple[Tensor, Tensor]]  # rows (n, W) and tags (n,) of each job
    statistics: RolloutStatistics  # of all


def by_member(results: Sequence[RolloutResult], num_members: int) -> list[Generated]:
    """The results of a pack's jobs, in the order of the jobs, by member."""
    generated = []
    for m in range(num_members):
        mine = [(r, r.members.index(m)) for r in results if m in r.members]
        if not mine:
            raise ValueError(f"no rollouts for member {m} of {num_members}")
        total = reduce(operator.add, (result.statistics[place] for result, place in mine))
        generated.append(Generated([(result.rows[place], result.tags[place]) for result, place in mine], total))
    return generated


def generation_metrics(total: RolloutStatistics, num_starts: int, any_rows: bool) -> dict[str, float]:
    """What is told of a member's synthetic transitions, whatever made them.

    Args:
        num_starts: trajectories that were begun.
        any_rows: whether there are synthetic rows to learn from; else the mean reward is not a number, which ends the
            run.
    """
    count = max(total.transitions, 1)
    lengths = _percentiles(num_starts, total.survivors)
    return {
        "transitions": float(total.transitions),
        "mean_length": total.transitions / num_starts,
        "terminal_share": total.terminals / count,
        "reward_mean": total.reward_sum / count if any_rows else math.nan,
        "dropped": float(total.dropped),
        **{f"length_p{p}": float(n) for p, n in zip(SURVIVAL, lengths, strict=True)},
    }


def _percentiles(num_rollouts: int, survivors: Sequence[int]) -> list[int]:
    """The smallest lengths that so many percent of rollouts do not exceed as `SURVIVAL` says. A length is the number of
    a rollout's transitions, 0 where the first was not kept.

    Args:
        survivors: transitions of each step.
    """
    longer = [*survivors, 0]  # than 0 steps, than 1 step, ...
    return [
        next(n for n, count in enumerate(longer) if 100 * (num_rollouts - count) >= percent * num_rollouts)
        for percent in SURVIVAL
    ]


# ---- rollouts in a model --------------------------------------------------------------------------------------------


class ModelRollouts:
    """Rollouts of a pack from states of its dataset.

    Args:
        dynamics: what they step through.
        data: where they start, in the units of which they are.
        device: where they are computed if no worker does it.
        num_starts: of each member, at a time.
        length: K, steps.
        initial_only: start from the first states of episodes instead of all states.
        penalty, cut: see `agents.rollout.Rollout`.
        with_states: whether the simulator's states are handed to the dynamics, where they are known.
        shard_rows: starts of a job on a CPU, at most.
    """

    def __init__(
        self, dynamics: Dynamics, data: TrainingData, device: torch.device, num_starts: int, length: int,
        initial_only: bool = False, penalty: Penalty | None = None, cut: str = "terminal", with_states: bool = False,
        shard_rows: int = SHARD_ROWS,
    ) -> None:  # fmt: skip
        self.dynamics, self.data, self.device = dynamics, data, device
        self.num_starts, self.length, self.initial_only = num_starts, length, initial_only
        self.penalty, self.cut, self.with_states, self.shard_rows = penalty, cut, with_states, shard_rows

    def jobs(self, actor: Actor, seeds: Sequence[int], epoch: int, penalty_coefs: Sequence[float]) -> list[RolloutJob]:
        """The jobs of all members.

        Args:
            actor: the policies, copied.
            seeds, penalty_coefs: one per member.
            epoch: counts the draws.
        """
        size, rows = shard_size(self.device, actor, self.dynamics, self.length)
        if self.device.type == "cpu":
            rows = min(rows, self.shard_rows)
        num_members, termination, jobs = len(seeds), self.data.termination, []
        for members in (range(m, min(m + size, num_members)) for m in range(0, num_members, size)):
            own_seeds, policies = tuple(seeds[m] for m in members), actor.select(members)
            coef = torch.tensor([penalty_coefs[m] for m in members], device=self.device)
            starts_MB = torch.stack([self._draw_starts(seed, epoch) for seed in own_seeds])
            for shard, index_MB in enumerate(starts_MB.split(rows, dim=1)):
                jobs.append(RolloutJob(
                    tuple(members), own_seeds, epoch, shard, termination, policies, self.data.observations[index_MB],
                    self.length, self.penalty, coef, self._states(index_MB), self.cut,
                ))  # fmt: skip
        return jobs

    def _states(self, index_MB: Tensor) -> Tensor | None:
        """The simulator's states `(M, B, X)` of rows of the dataset, if rollouts step through it and it is known."""
        states = self.data.states if self.with_states else None
        return None if states is None else states[index_MB.to(states.device)]

    def _draw_starts(self, seed: int, epoch: int) -> Tensor:
        """Row numbers `(num_starts,)` of the dataset, without replacement where it has enough of them."""
        source, rows = generator(seed, "starts", epoch, device=self.device), None
        if self.initial_only:
            rows = self.data.episode_starts
            if rows is None:
                raise ValueError("the data does not say where its episodes start")
        n = len(self.data.observations if rows is None else rows)
        if n >= self.num_starts:
            drawn = torch.randperm(n, generator=source, device=self.device)[: self.num_starts]
        else:
            drawn = torch.randint(n, (self.num_starts,), generator=source, device=self.device)
        return drawn if rows is None else rows[drawn]


# ---- sources of pools -----------------------------------------------------------------------------------------------


class PoolSource(Protocol):
    """What generates the pools of a pack."""

    @property
    def model(self) -> Any:
        """What the jobs are run in."""

    def needs_policies(self, first: bool) -> bool:
        """Whether policies have a part in a pool; `first`: in the one that learning begins with."""

    def jobs(self, actor: Actor | None, seeds: Sequence[int], epoch: int) -> Sequence[Job]:
        """The jobs of a pool of every member.

        Args:
            actor: the policies, copied; None where they have no part.
            seeds: of the members.
            epoch: counts the draws.
        """

    def select(self, members: Sequence[int]) -> PoolSource:
        """The source of some members only."""


class EnsembleSource:
    """PETS-style: the policy rolled out from states of the dataset, a random elite's Gaussian drawn at every step.

    Args:
        dynamics: the ensemble.
        data: where rollouts start.
        device: the learner's.
        config: common to the pack.
        length: transitions of a rollout.
    """

    def __init__(
        self, dynamics: Dynamics, data: TrainingData, device: torch.device, config: SyntheticConfig, length: int
    ) -> None:
        self.model = dynamics
        self._rollouts = ModelRollouts(dynamics, data, device, config.num_trajectories, length)

    def needs_policies(self, first: bool) -> bool:
        return True

    def jobs(self, actor: Actor | None, seeds: Sequence[int], epoch: int) -> list[RolloutJob]:
        if actor is None:
            raise ValueError("an ensemble cannot be rolled out without policies")
        return self._rollouts.jobs(actor, seeds, epoch, [0.0] * len(seeds))

    def select(self, members: Sequence[int]) -> EnsembleSource:
        return self


class DiffusionSource:
    """Sub-trajectories of a diffusion model, guided by the policies but for the first pool (`agents.guidance`).

    Args:
        model: on the learner's device.
        data: what it has learned from.
        device: the learner's.
        config, sampler, guidance: common to the pack, but for `guidance.coef`.
        coefs: the guidance coefficient of every member.
    """

    def __init__(
        self, model: TrajectoryModel, data: TrainingData, device: torch.device, config: SyntheticConfig,
        sampler: SamplerConfig, guidance: GuidanceConfig, coefs: Sequence[float],
    ) -> None:  # fmt: skip
        self.model, self.device, self.coefs = model, device, list(coefs)
        self._termination, self._num_trajectories = data.termination, config.num_trajectories
        self._sampler, self._guidance = sampler, guidance

    def needs_policies(self, first: bool) -> bool:
        return not first and any(self.coefs)

    def jobs(self, actor: Actor | None, seeds: Sequence[int], epoch: int) -> list[TrajectoryJob]:
        on_cpu = self.device.type == "cpu"
        size, rows = (1, SHARD_TRAJECTORIES) if on_cpu else (DEVICE_SHARD_MEMBERS, DEVICE_SHARD_TRAJECTORIES)
        total, jobs = self._num_trajectories, []
        for members in (range(m, min(m + size, len(seeds))) for m in range(0, len(seeds), size)):
            policies, coef = None, torch.zeros(len(members))
            if actor is not None:
                policies, coef = actor.select(members), torch.tensor([self.coefs[m] for m in members])
            for shard, start in enumerate(range(0, total, rows)):
                jobs.append(TrajectoryJob(
                    tuple(members), tuple(seeds[m] for m in members), epoch, shard, min(rows, total - start), policies,
                    coef, self._sampler, self._guidance, self._termination, self.device,
                ))  # fmt: skip
        return jobs

    def select(self, members: Sequence[int]) -> DiffusionSource:
        other = copy.copy(self)
        other.coefs = [self.coefs[m] for m in members]
        return other


# ---- pools ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A pool that is being generated, or still to be."""

    epoch: int  # of the refresh at which it was asked for
    actor: Actor | None  # the policies of that moment, where they have a part


class Pools:
    """The pools of a pack: asked for, taken in, forgotten.

    Args:
        config: common to the pack.
        source: what generates them.
        seeds: one per member.
        replay: whose rings hold them.
        as_learned: from rows in the units of the source to rows in which the pack learns.
        updates_per_epoch, num_epochs: of the training.

    Attributes:
        policy_epoch: how many epochs the policies that made the newest pool had learned for; None where policies had no
            part in it.
    """

    def __init__(
        self, config: SyntheticConfig, source: PoolSource, seeds: Sequence[int], replay: Replay,
        as_learned: Callable[[Tensor], Tensor], updates_per_epoch: int, num_epochs: int,
    ) -> None:  # fmt: skip
        self.config, self.source, self.seeds, self.replay = config, source, list(seeds), replay
        self._as_learned, self._updates_per_epoch, self._num_epochs = as_learned, updates_per_epoch, num_epochs
        self._period = config.refresh_every // updates_per_epoch
        self._counts: list[list[int]] = [[] for _ in self.seeds]  # rows of each pool in the rings, oldest first
        self._asked: _Asked | None = None
        self.policy_epoch: int | None = None

    def _ask(self, epoch: int, policies: Callable[[], Actor]) -> _Asked:
        return _Asked(epoch, policies() if self.source.needs_policies(first=epoch == 0) else None)

    def _jobs(self, asked: _Asked) -> Sequence[Job]:
        return self.source.jobs(asked.actor, self.seeds, asked.epoch)

    def jobs(self, epoch: int, policies: Callable[[], Actor]) -> Sequence[Job]:
        """What has to be generated before this epoch's updates.

        Args:
            policies: copies them as they are, for observations as the source has them.
        """
        if epoch % self._period or (epoch and not self.config.synchronous):
            return []
        asked = self._ask(epoch, policies)
        self.policy_epoch = None if asked.actor is None else epoch
        return self._jobs(asked)

    def ask_ahead(self, epoch: int, policies: Callable[[], Actor]) -> None:
        """Ask for the next refresh's pool, if this epoch begins with a refresh and pools are made while learning goes
        on; none is asked for that nothing would learn from."""
        if epoch and not (epoch % self._period or self.config.synchronous):
            self._asked = self._ask(epoch, policies) if epoch + self._period < self._num_epochs else None

    @property
    def ahead(self) -> JobsAhead | None:
        """The pool that was asked for; its jobs are the same after a resume."""
        asked = self._asked
        return None if asked is None else JobsAhead(lambda: self._jobs(asked), asked.epoch + self._period)

    def add(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        """Take in a pool, the one asked for ahead if there is one; metrics `synthetic/*` of every member."""
        if self._asked is not None:
            self.policy_epoch = None if self._asked.actor is None else self._asked.epoch
            self._asked = None
        metrics = []
        for m, generated in enumerate(by_member(results, len(self.seeds))):
            counts = self._counts[m] = self._counts[m][max(0, len(self._counts[m]) + 1 - self.config.pools_retained) :]
            self.replay.keep_newest(m, sum(counts))
            for rows, tags in generated.parts:
                self.replay.add(m, self._as_learned(rows.to(self.replay.device)), tags)
            counts.append(generated.statistics.transitions)
            told = generation_metrics(generated.statistics, self.config.num_trajectories, self.replay.sizes[m] > 0)
            metrics.append({f"synthetic/{name}": value for name, value in told.items()})
        return metrics

    def staleness(self, epochs: int) -> dict[str, float]:
        """The metric `synthetic/staleness_updates` after so many epochs: updates since the policies that made the
        newest pool; nothing where policies had no part in it."""
        if self.policy_epoch is None:
            return {}
        return {"synthetic/staleness_updates": float((epochs - self.policy_epoch) * self._updates_per_epoch)}

    # ---- members and checkpoints --------------------------------------------------------------------------------

    def select(self, members: Sequence[int], replay: Replay) -> Pools:
        """The pools of some members only.

        Args:
            replay: with the rings of these members.
        """
        other = copy.copy(self)
        other.seeds, other.replay = [self.seeds[m] for m in members], replay
        other.source, other._counts = self.source.select(members), [list(self._counts[m]) for m in members]
        if self._asked is not None and self._asked.actor is not None:
            other._asked = replace(self._asked, actor=self._asked.actor.select(members))
        return other

    def state_dict(self) -> dict[str, Any]:
        """Without the rings, which are the replay's."""
        asked = None
        if self._asked is not None:
            actor = self._asked.actor
            asked = {"epoch": self._asked.epoch, "actor": None if actor is None else actor.tensors()}
        return {"counts": [list(c) for c in self._counts], "policy_epoch": self.policy_epoch, "asked": asked}

    def load_state_dict(self, state: Mapping[str, Any], policies: Callable[[], Actor]) -> None:
        self._counts = [list(c) for c in state["counts"]]
        self.policy_epoch, asked = state["policy_epoch"], state["asked"]
        self._asked = None
        if asked is not None:
            actor = None if asked["actor"] is None else policies().with_tensors(asked["actor"])
            self._asked = _Asked(asked["epoch"], actor)


def mapped_rows(given: TrainingData, learned: TrainingData) -> Callable[[Tensor], Tensor]:
    """From rows in the units of some data to rows in those of the same data as a method has prepared them.

    Args:
        given, learned: may differ in the standardisation of observations and in the affine transformation of rewards.
    """
    s, a = given.observation_dim, given.action_dim
    factor = learned.reward_scale / given.reward_scale
    shift = learned.reward_shift - given.reward_shift * factor
    mean, std = learned.observation_mean, learned.observation_std
    standardises = given.observation_mean is None and mean is not None and std is not None
    if not standardises and (factor, shift) == (1.0, 0.0):
        return lambda rows: rows
    device = given.observations.device
    # one scale and one offset for every column: actions and terminals stay
    offset, scale = torch.zeros(2 * s + a + 2, device=device), torch.ones(2 * s + a + 2, device=device)
    if standardises and mean is not None and std is not None:
        for columns in (slice(0, s), slice(s + a + 2, None)):
            scale[columns] = 1.0 / std.to(device)
            offset[columns] = (-mean / std).to(device)
    scale[s + a], offset[s + a] = factor, shift
    return lambda rows: torch.addcmul(offset, rows, scale)
