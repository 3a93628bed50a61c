"""Steps of policies in the environments of two domains, while they learn.

A job is some steps of one domain for all members of a pack: one call of the stacked policies a step, then every
member's environment takes its own step. `Environments` keeps the environments alive between jobs. It may do so in the
learner's process or in a worker's, and a process that does not have an environment in the job's state makes it: it
resets it with the seed of its episode and takes the episode's actions over again. So a job's result follows from its
fields alone wherever the environments are deterministic, as MuJoCo's and Gymnasium's classic ones are.

Jobs are computed on a CPU, whatever the learner's device: environments are there.

Shapes: M member, T step of a job, S observation, A action, W columns of a row (see `agents.replay`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from agents.actors import Actor
from agents.randomness import derived_seed
from envs.episodes import make_env

DOMAINS = ("source", "target")
TERMINATED, TRUNCATED = 1, 2  # what `InteractionResult.ends_MT` says; 0: the episode goes on


class Episode(NamedTuple):
    """How far a member is in a domain: enough to be there again."""

    number: int  # counted from 0
    actions: NDArray[np.float32]  # (t, A) in [-1, 1], taken so far


@dataclass(frozen=True)
class InteractionJob:
    """Some steps of the members of a pack in one domain."""

    domain: str  # one of DOMAINS
    members: tuple[int, ...]  # M of the pack
    places: tuple[int, ...]  # (M,) numbers of their environments, which stay when other members leave
    seeds: tuple[int, ...]  # (M,)
    episodes: tuple[Episode, ...]  # (M,) as they are before the first step
    actor: Actor  # of M members, on the CPU
    noise_TMA: Tensor  # standard normal; uniform in [-1, 1] in the first steps that are random
    num_random: int = 0  # steps whose actions are the numbers of `noise_TMA`

    def run(self, environments: Environments) -> InteractionResult:
        return environments.step(self)


@dataclass(frozen=True)
class InteractionResult:
    """What the members of a job have met, arrays that Ray moves without a copy."""

    members: tuple[int, ...]
    rows_MTW: NDArray[np.float32]  # observations and rewards as the learner has them; d: the environment's own end
    ends_MT: NDArray[np.int8]
    returns: tuple[tuple[float, ...], ...]  # (M,) of the episodes that have ended, in the environment's rewards
    seconds: float = 0.0  # that it took where it was computed; nothing depends on it


Collect = Callable[[], list[InteractionResult]]
"""Waits for the results of some jobs, in their order."""
StartJobs = Callable[[Sequence[InteractionJob], "Environments"], Collect]
"""Begins some jobs, of one domain each."""


def run_interaction(job: InteractionJob, environments: Environments) -> InteractionResult:
    """A job's result, with the time that it took."""
    started = time.perf_counter()
    result = job.run(environments)
    return replace(result, seconds=time.perf_counter() - started)


def start_here(jobs: Sequence[InteractionJob], environments: Environments) -> Collect:
    """`StartJobs` in this process: nothing happens before the results are asked for."""
    return lambda: [run_interaction(job, environments) for job in jobs]


class _Live:
    """An environment in the middle of an episode."""

    def __init__(self, env_id: str) -> None:
        self.env: gymnasium.Env[Any, Any] = make_env(env_id)
        space = self.env.action_space
        assert isinstance(space, Box)
        self._center, self._scale = (space.high + space.low) / 2, (space.high - space.low) / 2
        self.number, self.steps, self.total = -1, 0, 0.0
        self.ended = True
        self.last_action: NDArray[np.float32] | None = None
        self.observation: NDArray[Any] = np.empty(0)

    def begin(self, number: int, seed: int, domain: str) -> None:
        """Start an episode."""
        self.observation, _ = self.env.reset(seed=derived_seed(seed, f"{domain} episode", number) % 2**31)
        self.number, self.steps, self.total, self.ended, self.last_action = number, 0, 0.0, False, None

    def is_at(self, episode: Episode) -> bool:
        if self.number != episode.number or self.ended or self.steps != len(episode.actions):
            return False
        return self.last_action is None or np.array_equal(self.last_action, episode.actions[-1])

    def restore(self, episode: Episode, seed: int, domain: str) -> None:
        """Be where an episode says."""
        if not self.is_at(episode):
            self.begin(episode.number, seed, domain)
            for action in episode.actions:
                self.step(action)

    def step(self, action: NDArray[np.float32]) -> tuple[float, int]:
        """Reward, and whether and how the episode has ended."""
        self.observation, reward, terminated, truncated, _ = self.env.step(self._center + self._scale * action)
        self.steps += 1
        self.total += float(reward)
        self.last_action = action
        end = TERMINATED if terminated else TRUNCATED if truncated else 0
        self.ended = end != 0
        return float(reward), end


class Environments:
    """What interaction jobs are run in: the environments of both domains. A copy that is sent elsewhere has none alive.

    Args:
        source_id, target_id: Gymnasium ids.
        observation_mean, observation_std: `(S,)` if the learner's observations are standardised, else None.
        reward_scale, reward_shift: the learner's rewards are reward_scale times the environment's plus reward_shift.
    """

    def __init__(
        self,
        source_id: str,
        target_id: str,
        observation_mean: NDArray[np.float32] | None = None,
        observation_std: NDArray[np.float32] | None = None,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
    ) -> None:
        self.ids = dict(zip(DOMAINS, (source_id, target_id), strict=True))
        self._mean, self._std = observation_mean, observation_std
        self._reward_scale, self._reward_shift = reward_scale, reward_shift
        self._live: dict[str, dict[int, _Live]] = {domain: {} for domain in DOMAINS}

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (*self.ids.values(), self._mean, self._std, self._reward_scale, self._reward_shift)
        return Environments, arguments

    def _of(self, job: InteractionJob) -> list[_Live]:
        """The environments of a job's members, where its episodes are."""
        known = self._live[job.domain]
        for place in known.keys() - set(job.places):  # of members that have left
            known.pop(place).env.close()
        for place, seed, episode in zip(job.places, job.seeds, job.episodes, strict=True):
            if place not in known:
                known[place] = _Live(self.ids[job.domain])
            known[place].restore(episode, seed, job.domain)
        return [known[place] for place in job.places]

    def _observe(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """An observation as the learner has it, `(S,)`."""
        if self._mean is None or self._std is None:
            return observation.astype(np.float32)
        return (observation.astype(np.float32) - self._mean) / self._std

    @torch.inference_mode()
    def step(self, job: InteractionJob) -> InteractionResult:
        """Take a job's steps; see `InteractionJob`."""
        live = self._of(job)
        num_steps, members, action_dim = job.noise_TMA.shape
        s = job.actor.observation_dim
        obs_M1S = np.stack([self._observe(one.observation) for one in live])[:, None]
        rows = np.empty((members, num_steps, 2 * s + action_dim + 2), np.float32)
        ends = np.zeros((members, num_steps), np.int8)
        returns: list[list[float]] = [[] for _ in live]
        noise_TM1A = job.noise_TMA.unsqueeze(2)
        for t, noise_M1A in enumerate(noise_TM1A):
            action_M1A = noise_M1A
            if t >= job.num_random:
                # a policy that has diverged is found by its losses, and need not break a simulator before
                action_M1A = job.actor.sample(torch.from_numpy(obs_M1S), noise_M1A).nan_to_num_(0.0)
            actions = action_M1A.numpy()[:, 0]
            rows[:, t, :s], rows[:, t, s : s + action_dim] = obs_M1S[:, 0], actions
            for m, one in enumerate(live):
                row = rows[m, t]
                reward, end = one.step(row[s : s + action_dim])
                row[s + action_dim] = reward * self._reward_scale + self._reward_shift
                row[s + action_dim + 1] = end == TERMINATED
                row[s + action_dim + 2 :] = obs_M1S[m, 0] = self._observe(one.observation)
                if end:
                    ends[m, t] = end
                    returns[m].append(one.total)
                    one.begin(one.number + 1, job.seeds[m], job.domain)
                    obs_M1S[m, 0] = self._observe(one.observation)
        return InteractionResult(job.members, rows, ends, tuple(map(tuple, returns)))
