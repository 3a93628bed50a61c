"""What cross-domain methods share: a pack that learns from a source domain and from a target domain with other
dynamics, and whose policies are evaluated in the target.

The source is an environment that is sampled while learning (`dataset=online/<id>`), or a dataset's rows. Gamma is
`updates_per_target_step`. One iteration t, of which a run has `num_updates`, is (Xu et al. 2023, arXiv 2305.17625,
algorithm 1):

    1. where the source is online: one step there by the source policy
    2. where t is a multiple of Gamma: one step in the target by the target policy
    3. `refit(t)`: the method's further models
    4. `update(t, ...)`, once every domain that the method uses holds a batch

With `collect_every` C > 1 the steps of C iterations are taken before the first of them, by one policy. With
`asynchronous` they are taken while the C iterations before them learn, by the policy from before these:

    iterations     0..C-1         C..2C-1        2C..3C-1
    steps          chunk 0 (waited for, by the first policy)
                   | chunk 1 ---->| taken in
                     asked for    | chunk 2 ---->| taken in

So a chunk is a function of its number and of the policy one chunk before, however long it takes and wherever it is
computed. The one that is under way at a checkpoint is asked for again after a resume, with the policy of the
checkpoint.

Shapes: M member, B row of a batch, K noise, S observation, A action, W columns of a row (see `agents.replay`).
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor
from torch.profiler import record_function

from agents.actors import Actor, SquashedGaussianActor
from agents.checks import check_not_negative, check_positive
from agents.chunk import METRICS_EVERY, matrix_precision
from agents.config import ScheduleConfig
from agents.domain_sac import DomainBatch, DomainSAC
from agents.interaction import (
    DOMAINS,
    Collect,
    Environments,
    Episode,
    InteractionJob,
    InteractionResult,
    StartJobs,
    start_here,
)
from agents.method import JobsAhead, Measures, RolloutResult, Stage, TrainingData
from agents.networks import StackedMLP
from agents.policies import squashed_arrays
from agents.randomness import generator
from agents.replay import Replay, transition_rows
from envs.episodes import borrow_envs
from envs.errors import UserError

DRAWS_AT_ONCE = 100  # updates whose batches and noise are drawn by one generator
STEPS_AT_ONCE = 1_000  # environment steps whose noise is


@dataclass
class CrossDomainConfig(ScheduleConfig):
    """What every cross-domain method has. `num_updates` counts iterations (see the module)."""

    recorded_source_only: ClassVar[bool] = False  # whether the method makes no sense with a source that is sampled

    target: str = ""  # Gymnasium id of the target domain
    updates_per_target_step: int = 10  # Gamma with an online source, K with a recorded one
    batch_size: int = 128  # of each domain
    random_steps: int = 0  # first steps in each domain, by uniform actions
    collect_every: int = 1  # updates between interactions; the papers' is 1
    asynchronous: bool = False  # take the next steps while learning from the last ones
    time_limit_terminals: bool = False  # store ends by a time limit as terminals, as the released VGDF does
    replay_rows: int = 1_000_000  # of each domain and member

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "collect_every", "replay_rows")
        check_not_negative(self, "random_steps")
        if self.steps_in_target:
            check_positive(self, "updates_per_target_step")
        if self.updates_per_epoch % self.collect_every:
            raise UserError(
                f"method.collect_every={self.collect_every} must divide "
                f"method.updates_per_epoch={self.updates_per_epoch}"
            )
        for name in ("batch_size", "collect_every"):
            if self.replay_rows < getattr(self, name):
                raise UserError(
                    f"method.replay_rows={self.replay_rows} must be at least method.{name}={getattr(self, name)}"
                )

    @property
    def steps_in_target(self) -> bool:
        """Whether steps are ever taken in the target."""
        return True

    @property
    def uses_source(self) -> bool:
        """Whether updates ever take rows of the source."""
        return True

    @property
    def uses_target(self) -> bool:
        """Whether updates ever take rows of the target."""
        return True

    def source_steps(self, t: int) -> int:
        """Steps taken in an online source in the iterations before t."""
        return t if self.uses_source else 0

    def target_steps(self, t: int) -> int:
        """Steps taken in the target in the iterations before t."""
        return -(-t // self.updates_per_target_step) if self.steps_in_target else 0

    def learns_from(self, t: int) -> tuple[bool, bool]:
        """Whether update t takes rows of the source, and of the target."""
        return self.uses_source, self.uses_target

    def learns_at(self, t: int, recorded_rows: int) -> bool:
        """Whether update t takes place: whether every domain that it takes rows of holds a batch by then.

        Args:
            recorded_rows: of the source; 0 where it is online.
        """
        met = (t // self.collect_every + 1) * self.collect_every
        held = recorded_rows or self.source_steps(met), self.target_steps(met)
        return all(rows >= self.batch_size for rows, uses in zip(held, self.learns_from(t), strict=True) if uses)

    def domain_rows(self, source_is_online: bool) -> int:
        """Rows of a member's rings, once they are full."""
        source = self.source_steps(self.num_updates) if source_is_online else 0
        return min(self.replay_rows, source) + min(self.replay_rows, self.target_steps(self.num_updates))

    @property
    def work_period(self) -> int:
        """Iterations after which the work of an iteration repeats: a method that refits models every so often says
        so."""
        return math.lcm(self.collect_every, self.updates_per_target_step if self.steps_in_target else 1)

    @property
    def batch_rows(self) -> int:
        """Rows of an update, of both domains."""
        return self.batch_size * (self.uses_source + self.uses_target)


class Part(Protocol):
    """A model of a method beside its actor and critics."""

    def select(self, members: Sequence[int]) -> Part: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load in place."""


class CrossDomain(ABC):
    """A pack of M runs; see `agents.method.Method`.

    Args:
        configs: one per member; what is not per member is equal in all of them.
        data: of the source: its rows, or none where it is online.

    Attributes:
        source, target: the rows of either domain, a ring for each member; a recorded source's are `real`.
        updater: actor and critics.
        parts: further models by name, selected, saved and restored with the rest.
        extra_metrics: of each member, logged at the end of the epoch and then forgotten; `refit` may add to them.
        updates_done: gradient updates so far.
        start_jobs: what steps are taken with.
    """

    def __init__(
        self,
        configs: Sequence[Any],
        seeds: Sequence[int],
        data: TrainingData,
        artifacts: Mapping[str, dict[str, Any]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.configs, self.seeds, self.shared = list(configs), list(seeds), configs[0]
        self.device, self.data = torch.device(device), data
        self.observation_dim, self.action_dim = data.observation_dim, data.action_dim
        self.source_is_online = len(data.observations) == 0
        cfg: CrossDomainConfig = self.shared
        rows = transition_rows(
            data.observations, data.actions, data.rewards, data.terminals, data.next_observations
        ).to(self.device)
        self.source, self.target = (
            Replay(real, len(self.seeds), self.capacity_of(domain), self.device)
            for domain, real in zip(DOMAINS, (rows, rows[:0]), strict=True)
        )
        self.updater = self.make_updater()
        self.parts = self.make_parts()
        self.extra_metrics: list[dict[str, float]] = [{} for _ in self.seeds]
        self.updates_done = 0
        self.start_jobs: StartJobs = start_here
        mean, std = (None if x is None else x.numpy() for x in (data.observation_mean, data.observation_std))
        self.environments = Environments(data.env_id, cfg.target, mean, std, data.reward_scale, data.reward_shift)
        self._places = list(range(len(self.seeds)))
        self._progress = {domain: [_Progress(self.action_dim) for _ in self.seeds] for domain in DOMAINS}
        self._ahead: _Ahead | None = None
        self._drawn: tuple[int, list[Tensor], Tensor] | None = None  # block, u (U, M, B) of each domain, noise
        self._steps_drawn: dict[str, tuple[int, Tensor]] = {}
        self.bind()

    # ---- what a method says -------------------------------------------------------------------------------------

    @abstractmethod
    def make_updater(self) -> DomainSAC:
        """Actor and critics of the pack."""

    def make_parts(self) -> dict[str, Part]:
        """The models that the pack begins with beside these, if any."""
        return {}

    def bind(self) -> None:  # noqa: B027 - many methods have nothing to make
        """Make what follows from the members' configs alone: called at first and when members have left."""

    def target_policy(self) -> Actor:
        """The policies as they are, not copied: they act in the target and are evaluated."""
        return self._squashed(self.updater.actor)

    def source_policy(self) -> Actor:
        """The policies that act in an online source, not copied: those of their own, where the updater has them."""
        network = self.updater.source_actor
        return self.target_policy() if network is None else self._squashed(network)

    def _squashed(self, network: StackedMLP) -> Actor:
        settings = self.updater.settings
        return SquashedGaussianActor(network, log_std_min=settings.log_std_min, log_std_max=settings.log_std_max)

    def refit(self, t: int) -> None:  # noqa: B027 - many methods have nothing to refit
        """Called before update t, from the first iteration on, whether the update takes place or not."""

    @property
    def num_noises(self) -> int:
        """K, the standard normal draws (M, B, A) of an update."""
        return self.updater.num_noises

    def update(
        self, t: int, source_MBW: Tensor, target_MBW: Tensor, noise_KMBA: Tensor, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        """Gradient update t; statistics `(M,)` on the device if they are wanted.

        Args:
            source_MBW, target_MBW: minibatches, of no rows where the update takes none of that domain.
            noise_KMBA: B counts the rows of both.
        """
        batch = joined(source_MBW, target_MBW)
        turn = self.updates_done % self.updater.period
        return self.updater.update(batch, noise_KMBA, turn, with_metrics)

    def replay_of(self, domain: str) -> Replay:
        """Where the rows that are met in a domain are kept."""
        return self.source if domain == "source" else self.target

    # ---- see `agents.method.Method` -----------------------------------------------------------------------------

    @staticmethod
    def stages(config: Any) -> dict[str, Stage]:
        return {}

    @staticmethod
    def check_environment(config: CrossDomainConfig, env_id: str) -> None:
        """Make sure that both domains are named, exist and have equal spaces."""
        if not config.target:
            raise UserError(
                "method.target is missing: name the environment to adapt to, such as "
                "method.target=offsweep/HalfCheetah-kinematic-v5"
            )
        check_spaces(env_id, config.target)

    @property
    def num_members(self) -> int:
        return len(self.seeds)

    @property
    def rollout_model(self) -> Any:
        return self.environments

    def rollout_jobs(self, epoch: int) -> Sequence[Any]:
        return []

    def add_rollouts(self, results: Sequence[RolloutResult]) -> list[dict[str, float]]:
        return [{} for _ in self.seeds]

    def ask_ahead(self, epoch: int) -> None:
        """Nothing: what is collected ahead is asked for between updates."""
        return

    @property
    def jobs_ahead(self) -> JobsAhead | None:
        return None

    def policy(self, member: int) -> dict[str, np.ndarray]:
        settings = self.updater.settings
        return squashed_arrays(self.updater.actor, member, settings.log_std_min, settings.log_std_max)

    def diagnostics(self, epoch: int) -> Sequence[Measures]:
        return [{} for _ in self.seeds]

    def train_epoch(self, epoch: int) -> list[dict[str, float]]:
        every = self.shared.updates_per_epoch
        return self.iterate(epoch * every, every)

    def iterate(self, first: int, count: int) -> list[dict[str, float]]:
        """Some iterations; metrics per member.

        Args:
            first: number of the first one, a multiple of `collect_every`, as `count` is.
        """
        cfg: CrossDomainConfig = self.shared
        timer = _Timer()
        sums: dict[str, Tensor] = {}
        looks = 0
        for t in range(first, first + count):
            if t % cfg.collect_every == 0:
                self._interact(t // cfg.collect_every, timer)
            with record_function("refit"):
                self.refit(t)
            if not self._ready(t):
                continue
            look = (t + 1) % METRICS_EVERY == 0 or t + 1 == first + count
            with matrix_precision(cfg.precision):
                metrics = self.update(t, *self._batch(t), look)
            self.updates_done += 1
            if look and metrics is not None:
                looks += 1
                for name, value in metrics.items():
                    sums[name] = sums[name] + value if name in sums else value.clone()
        table = _table(sums, looks, self.num_members)
        extra, self.extra_metrics = self.extra_metrics, [{} for _ in self.seeds]
        return [
            {
                **{f"train/{name}": value for name, value in row.items()}, **extra[m],
                **self._domain_metrics(m, first + count), **timer.metrics(self.num_members),
            }
            for m, row in enumerate(table)
        ]  # fmt: skip

    # ---- interaction --------------------------------------------------------------------------------------------

    def _steps_before(self, domain: str, t: int) -> int:
        cfg: CrossDomainConfig = self.shared
        if domain == "target":
            return cfg.target_steps(t)
        return cfg.source_steps(t) if self.source_is_online else 0

    def capacity_of(self, domain: str) -> int:
        """Rows of each member's ring of a domain."""
        return min(self.shared.replay_rows, self._steps_before(domain, self.shared.num_updates))

    def _interact(self, chunk: int, timer: _Timer) -> None:
        """Have the steps of a chunk, and with `asynchronous` begin those of the next one."""
        with record_function("interaction"):
            started = time.perf_counter()
            if self._ahead is None:
                steps, kept = self._steps_of(chunk), list(range(self.num_members))
                collect = self._start(steps, self._actors())
            else:
                collect, kept, steps = self._ahead.collect, self._ahead.kept, self._steps_of(self._ahead.chunk)
                self._ahead = None
            for (domain, _, _), result in zip(steps, collect(), strict=True):
                self._take(domain, result, kept, timer)
            last = (chunk + 1) * self.shared.collect_every >= self.shared.num_updates
            if self.shared.asynchronous and not last:
                actors = {domain: actor.select(range(self.num_members)) for domain, actor in self._actors().items()}
                self._ask(chunk + 1, actors)
            timer.waited += time.perf_counter() - started

    def _ask(self, chunk: int, actors: dict[str, Actor]) -> None:
        """Begin a chunk's steps by policies that stay as they are."""
        self._ahead = _Ahead(chunk, actors, self._start(self._steps_of(chunk), actors), list(range(self.num_members)))

    def _actors(self) -> dict[str, Actor]:
        return {"source": self.source_policy(), "target": self.target_policy()}

    def _steps_of(self, chunk: int) -> list[tuple[str, int, int]]:
        """What a chunk has of each domain: the number of its first step there, and how many."""
        every, steps = self.shared.collect_every, []
        for domain in DOMAINS:
            first = self._steps_before(domain, chunk * every)
            if (count := self._steps_before(domain, (chunk + 1) * every) - first) > 0:
                steps.append((domain, first, count))
        return steps

    def _start(self, steps: Sequence[tuple[str, int, int]], actors: Mapping[str, Actor]) -> Collect:
        jobs = [self._job(actors[domain], domain, first, count) for domain, first, count in steps]
        return self.start_jobs(jobs, self.environments) if jobs else list

    def _job(self, actor: Actor, domain: str, first: int, count: int) -> InteractionJob:
        return InteractionJob(
            domain, tuple(range(self.num_members)), tuple(self._places), tuple(self.seeds),
            tuple(one.episode for one in self._progress[domain]), on_cpu(actor),
            self._step_noise(domain, first, count), min(count, max(0, self.shared.random_steps - first)),
        )  # fmt: skip

    def _step_noise(self, domain: str, first: int, count: int) -> Tensor:
        """`(T, M, A)` of steps in a domain: normal, and uniform where they are random."""
        parts, step = [], first
        while step < first + count:
            block, at = divmod(step, STEPS_AT_ONCE)
            if self._steps_drawn.get(domain, (-1,))[0] != block:
                self._steps_drawn[domain] = block, self._draw_steps(domain, block)
            part = self._steps_drawn[domain][1][at : at + first + count - step]
            parts.append(part)
            step += len(part)
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _draw_steps(self, domain: str, block: int) -> Tensor:
        drawn, shape = [], (STEPS_AT_ONCE, self.action_dim)
        for seed in self.seeds:
            draw = generator(seed, f"{domain} steps", block)
            noise, uniform = torch.randn(shape, generator=draw), torch.rand(shape, generator=draw) * 2.0 - 1.0
            step = torch.arange(block * STEPS_AT_ONCE, (block + 1) * STEPS_AT_ONCE).unsqueeze(1)
            drawn.append(torch.where(step < self.shared.random_steps, uniform, noise))
        return torch.stack(drawn, 1)

    def _take(self, domain: str, result: InteractionResult, kept: Sequence[int], timer: _Timer) -> None:
        """Keep what members have met.

        Args:
            kept: the place of every member in the result.
        """
        replay, a = self.replay_of(domain), self.observation_dim
        timer.computing += result.seconds
        timer.steps += result.rows_MTW.shape[1]
        for member, place in enumerate(kept):
            rows, ends = result.rows_MTW[place], result.ends_MT[place]
            progress = self._progress[domain][member]
            progress.add(rows[:, a : a + self.action_dim], ends, result.returns[place])
            if self.shared.time_limit_terminals:
                rows = rows.copy()
                rows[:, a + self.action_dim + 1] = ends > 0
            replay.add(member, torch.from_numpy(np.array(rows) if not rows.flags.writeable else rows))

    # ---- minibatches --------------------------------------------------------------------------------------------

    def _ready(self, t: int) -> bool:
        """Whether every domain that update t learns from holds a batch."""
        return self.shared.learns_at(t, self.source.num_real)

    @record_function("batch drawing")
    def _batch(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Minibatches of both domains and noise of update t."""
        block, at = divmod(t, DRAWS_AT_ONCE)
        if self._drawn is None or self._drawn[0] != block:
            self._drawn = block, *self._draw_updates(block)
        _, uniform, noise = self._drawn
        used = self.shared.learns_from(t)
        rows = [
            replay.gather(replay.row_numbers(u[at] if uses else u[at, :, :0]))
            for replay, u, uses in zip((self.source, self.target), uniform, used, strict=True)
        ]
        return rows[0], rows[1], noise[at]

    def _draw_updates(self, block: int) -> tuple[list[Tensor], Tensor]:
        cfg: CrossDomainConfig = self.shared
        shape = DRAWS_AT_ONCE, self.num_noises, cfg.batch_rows, self.action_dim
        uniform: list[list[Tensor]] = [[], []]
        noise = []
        for seed in self.seeds:
            draw = generator(seed, "cross-domain updates", block, device=self.device)
            for of_domain in uniform:
                size = (DRAWS_AT_ONCE, cfg.batch_size)
                of_domain.append(torch.rand(size, generator=draw, device=self.device, dtype=torch.float64))
            noise.append(torch.randn(shape, generator=draw, device=self.device))
        return [torch.stack(of_domain, 1) for of_domain in uniform], torch.stack(noise, 2)

    # ---- measuring ----------------------------------------------------------------------------------------------

    def stand_in(self, t: int, most_bytes: int) -> int:
        """Fill the rings with copies of a few rows as they are filled at iteration t, so that what follows takes as
        long; for measurements.

        Args:
            most_bytes: of the rows of a domain.

        Returns:
            Bytes that the rings will hold beyond these, in the end.
        """
        for domain in DOMAINS:
            replay = self.replay_of(domain)
            row_bytes = (4 * replay.width + 2) * self.num_members
            count = min(self._steps_before(domain, t), replay.capacity - replay.sizes[0], most_bytes // row_bytes)
            if count > 0:
                for member, rows in enumerate(self._few_rows(domain)):
                    replay.add(member, rows.repeat(-(-count // len(rows)), 1)[:count])
        return sum(
            (replay.capacity - replay.sizes[0]) * (4 * replay.width + 2) * self.num_members
            for replay in (self.source, self.target)
        )

    def _few_rows(self, domain: str) -> list[Tensor]:
        """Some rows of every member, by uniform actions."""
        draws = [torch.rand((256, self.action_dim), generator=generator(seed, "stand-in")) for seed in self.seeds]
        begun = Episode(0, np.empty((0, self.action_dim), np.float32))
        job = InteractionJob(
            domain, tuple(range(self.num_members)), tuple(self._places), tuple(self.seeds), (begun,) * self.num_members,
            on_cpu(self.target_policy()), torch.stack(draws, 1) * 2.0 - 1.0, len(draws[0]),
        )  # fmt: skip
        return [torch.from_numpy(rows) for rows in job.run(self.environments).rows_MTW]

    # ---- metrics ------------------------------------------------------------------------------------------------

    def _domain_metrics(self, member: int, t: int) -> dict[str, float]:
        """Of the training episodes that have ended since this was called last."""
        metrics = {}
        for domain in DOMAINS:
            if self._steps_before(domain, self.shared.num_updates) == 0:
                continue
            returns = self._progress[domain][member].pop_returns()
            metrics[f"domain/{domain}_steps"] = float(self._steps_before(domain, t))
            if returns:
                metrics[f"domain/{domain}_return"] = float(np.mean(returns))
        return metrics

    # ---- members and checkpoints --------------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> CrossDomain:
        other = copy.copy(self)
        for name in ("configs", "seeds", "extra_metrics", "_places"):
            setattr(other, name, [getattr(self, name)[m] for m in members])
        other.source, other.target = self.source.select(members), self.target.select(members)
        other.updater = self.updater.select(members)
        other.parts = {name: part.select(members) for name, part in self.parts.items()}
        other._progress = {domain: [of[m].copy() for m in members] for domain, of in self._progress.items()}
        other._ahead = None if self._ahead is None else self._ahead.select(members)
        other._drawn, other._steps_drawn = None, {}
        other.bind()
        return other

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "updater": self.updater.state_dict(), "updates_done": self.updates_done,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "replay": {"source": self.source.state_dict(), "target": self.target.state_dict()},
            "progress": {domain: [one.state_dict() for one in of] for domain, of in self._progress.items()},
        }  # fmt: skip
        if self._ahead is not None:
            actors = {domain: actor.tensors() for domain, actor in self._ahead.actors.items()}
            state["ahead"] = {"chunk": self._ahead.chunk, "actors": actors}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updater.load_state_dict(state["updater"])
        self.updates_done = state["updates_done"]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.source.load_state_dict(state["replay"]["source"])
        self.target.load_state_dict(state["replay"]["target"])
        for domain, of in state["progress"].items():
            self._progress[domain] = [_Progress.from_state_dict(one, self.action_dim) for one in of]
        self._ahead, self._drawn, self._steps_drawn = None, None, {}
        if "ahead" in state:
            kinds = self._actors()
            actors = {domain: kinds[domain].with_tensors(t) for domain, t in state["ahead"]["actors"].items()}
            self._ask(state["ahead"]["chunk"], actors)


# ---- pieces ---------------------------------------------------------------------------------------------------------


class _Progress:
    """How far a member is in a domain."""

    def __init__(self, action_dim: int) -> None:
        self._number, self._steps = 0, 0
        self._actions = np.empty((1024, action_dim), np.float32)
        self._returns: list[float] = []

    @property
    def episode(self) -> Episode:
        return Episode(self._number, self._actions[: self._steps])

    def add(self, actions_TA: np.ndarray, ends_T: np.ndarray, returns: Sequence[float]) -> None:
        """Note the actions of further steps, and which of them ended an episode."""
        self._returns.extend(returns)
        over = np.flatnonzero(ends_T)
        if len(over):
            self._number, self._steps = self._number + len(over), 0
            # jobs may still hold the actions of the episode before
            self._actions = np.empty_like(self._actions)
            actions_TA = actions_TA[over[-1] + 1 :]
        needed = self._steps + len(actions_TA)
        if needed > len(self._actions):
            larger = np.empty((2 * needed, self._actions.shape[1]), np.float32)
            larger[: self._steps] = self._actions[: self._steps]
            self._actions = larger
        self._actions[self._steps : needed] = actions_TA
        self._steps = needed

    def pop_returns(self) -> list[float]:
        """Returns of the episodes that have ended since the last call."""
        returns, self._returns = self._returns, []
        return returns

    def copy(self) -> _Progress:
        return _Progress.from_state_dict(self.state_dict(), self._actions.shape[1])

    def state_dict(self) -> dict[str, Any]:
        actions = torch.from_numpy(self._actions[: self._steps].copy())
        return {"number": self._number, "actions": actions, "returns": list(self._returns)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], action_dim: int) -> _Progress:
        one = cls(action_dim)
        one.add(state["actions"].cpu().numpy(), np.zeros(len(state["actions"]), np.int8), state["returns"])
        one._number = state["number"]
        return one


@dataclass(frozen=True)
class _Ahead:
    """A chunk of steps that are being taken, or are still to be."""

    chunk: int
    actors: dict[str, Actor]  # that take them, of the members there are
    collect: Collect
    kept: list[int]  # of every member there is, the place in the results

    def select(self, members: Sequence[int]) -> _Ahead:
        actors = {domain: actor.select(members) for domain, actor in self.actors.items()}
        return _Ahead(self.chunk, actors, self.collect, [self.kept[m] for m in members])


class _Timer:
    """What interaction took in an epoch."""

    def __init__(self) -> None:
        self.waited = self.computing = 0.0
        self.steps = 0  # of each member

    def metrics(self, members: int) -> dict[str, float]:
        if not self.steps:
            return {}
        return {
            "time/interaction_seconds": self.waited,  # that learning waited for environments
            "time/interaction_computing_seconds": self.computing,  # that they took, over all processes
            "time/environment_steps_per_second": members * self.steps / max(self.computing, 1e-9),
        }


def joined(source_MBW: Tensor, target_MBW: Tensor) -> DomainBatch:
    """The minibatches of both domains as one; the critics' loss is the sum of the means over either."""
    sizes = [x.shape[1] for x in (source_MBW, target_MBW)]
    rows = torch.cat((source_MBW, target_MBW), 1) if all(sizes) else source_MBW if sizes[0] else target_MBW
    weight = rows.new_full(rows.shape[:2], 1.0 / max(sizes[0], 1))
    if sizes[1]:
        weight[:, sizes[0] :] = 1.0 / sizes[1]
    return DomainBatch(rows, sizes[0], weight)


def on_cpu(actor: Actor) -> Actor:
    """The actor where environments are; itself if it is there."""
    return actor if actor.device.type == "cpu" else actor.to("cpu")


def check_spaces(source_id: str, target_id: str) -> None:
    """Make sure that two domains are of one kind.

    Raises:
        EpisodeError: an environment cannot be made (see `envs.episodes.make_env`).
        UserError: they have other observations or actions.
    """
    with borrow_envs(source_id, 1) as (source,), borrow_envs(target_id, 1) as (target,):
        spaces = [(env.observation_space, env.action_space) for env in (source, target)]
    widths, bounds = [], []
    for observation, action in spaces:
        assert isinstance(observation, Box)
        assert isinstance(action, Box)
        widths.append((observation.shape[0], action.shape[0]))
        bounds.append((action.low.tolist(), action.high.tolist()))
    advice = "choose a target of the same robot and version"
    if widths[0] != widths[1]:
        (s, a), (u, b) = widths
        raise UserError(
            f"method.target={target_id} has {u} observations and {b} actions, the source {source_id} {s} and {a}; "
            f"{advice}"
        )
    if bounds[0] != bounds[1]:
        raise UserError(
            f"method.target={target_id} has actions of bounds {bounds[1]}, the source {source_id} of {bounds[0]}; "
            f"{advice}"
        )


def _table(sums: Mapping[str, Tensor], looks: int, members: int) -> list[dict[str, float]]:
    """Means of each statistic per member: the epoch's one transfer."""
    if not looks or not sums:
        return [{} for _ in range(members)]
    names = sorted(sums)
    rows = (torch.stack([sums[name] for name in names], 1) / looks).tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]
