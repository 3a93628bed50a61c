"""Online soft actor-critic in a real environment: how the embedded actors were made.

One environment step, one update (Haarnoja et al. 2018), with the same `SAC` that learns offline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch

from agents.policies import in_environment, squashed_arrays
from agents.randomness import generator
from agents.replay import Replay, transition_rows
from agents.sac import SAC, SACHyperparameters, SACSettings
from envs.episodes import make_env

_CHUNK = 1000  # steps whose noise is drawn at once


@dataclass(frozen=True)
class OnlineSACConfig:
    """Settings of one online training."""

    env_id: str = "Pendulum-v1"
    steps: int = 10_000  # environment steps
    seed: int = 0
    hidden: tuple[int, ...] = (64, 64)  # of actor and critics
    batch_size: int = 256
    learning_rate: float = 1e-3
    random_steps: int = 1_000  # uniform actions first, no updates
    gamma: float = 0.99
    snapshot_every: int = 1_000  # environment steps between snapshots


@dataclass(frozen=True)
class Snapshot:
    """The actor after some steps, as arrays in the policy file format of `envs.policies`."""

    step: int
    arrays: dict[str, np.ndarray]


def train_online(config: OnlineSACConfig, on_step: Callable[[int], None] | None = None) -> Iterator[Snapshot]:
    """Train and yield a snapshot at step 0 and every `snapshot_every` steps. Deterministic in the seed."""
    env = make_env(config.env_id)
    space = env.action_space
    assert isinstance(space, gymnasium.spaces.Box), f"{config.env_id}: continuous actions only"
    center, scale = (space.high + space.low) / 2, (space.high - space.low) / 2
    obs_dim, action_dim = int(np.prod(env.observation_space.shape or ())), int(np.prod(space.shape))
    hyper = SACHyperparameters(config.learning_rate, config.learning_rate, config.learning_rate)
    settings = SACSettings(
        num_critics=2,
        actor_hidden=config.hidden,
        critic_hidden=config.hidden,
        gamma=config.gamma,
        initialisation="torch",
    )
    sac = SAC([config.seed], [hyper], settings, obs_dim, action_dim)
    replay = Replay(torch.empty((0, 2 * obs_dim + action_dim + 2)), 1, config.steps)
    yield Snapshot(0, in_environment(squashed_arrays(sac.actor, 0), space.low, space.high))

    obs, _ = env.reset(seed=config.seed)
    for step in range(config.steps):
        if step % _CHUNK == 0:
            noise = torch.randn(
                (_CHUNK, 3, 1, config.batch_size, action_dim), generator=generator(config.seed, "online noise", step)
            )
            draws = torch.rand(
                (_CHUNK, 1, config.batch_size),
                generator=generator(config.seed, "online batches", step),
                dtype=torch.float64,
            )
            uniform = torch.rand((_CHUNK, action_dim), generator=generator(config.seed, "online actions", step)) * 2 - 1
        i = step % _CHUNK
        if step < config.random_steps:
            action = uniform[i].numpy()
        else:
            with torch.no_grad():
                x = torch.as_tensor(obs, dtype=torch.float32).view(1, 1, -1)
                action = sac.sample_actions(x, noise[i, 2, :, :1]).view(-1).numpy()
        next_obs, reward, terminated, truncated, _ = env.step(center + scale * action)
        row = (obs, action, reward, terminated, next_obs)
        replay.add(0, transition_rows(*(torch.as_tensor(np.asarray(x), dtype=torch.float32).unsqueeze(0) for x in row)))
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
        if step >= config.random_steps:
            indices = (draws[i] * replay.sizes[0]).long()
            sac.update(replay.gather(indices), noise[i, :2])
        if on_step is not None:
            on_step(step + 1)
        if (step + 1) % config.snapshot_every == 0:
            yield Snapshot(step + 1, in_environment(squashed_arrays(sac.actor, 0), space.low, space.high))
