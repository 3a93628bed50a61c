"""Online soft actor-critic in a real environment: how the embedded actors were made.

One environment step, one update (Haarnoja et al. 2018), with the same `SAC` that learns offline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch

from agents.networks import StackedMLP
from agents.randomness import generator
from agents.replay import Replay, transition_rows
from agents.sac import LOG_STD_MAX, LOG_STD_MIN, SAC, SACHyperparameters, SACSettings
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


def actor_arrays(
    actor: StackedMLP,
    member: int,
    action_low: np.ndarray,
    action_high: np.ndarray,
    observation_mean: np.ndarray | None = None,
    observation_std: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """One member's squashed-Gaussian actor as the arrays of a policy file (weights as (out, in)).

    Args:
        action_low, action_high: `(A,)` the environment's bounds.
        observation_mean, observation_std: `(S,)` if the actor has learned from standardised observations.
    """
    action_dim = actor.sizes[-1] // 2
    weights = [w[member].T.cpu().numpy().copy() for w in actor.weights]
    biases = [b[member, 0].cpu().numpy().copy() for b in actor.biases]
    arrays: dict[str, np.ndarray] = {"kind": np.array("squashed"), "act": np.array("relu")}
    for layer, (w, b) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        arrays[f"W{layer}"], arrays[f"b{layer}"] = w, b
    arrays["Wm"], arrays["bm"] = weights[-1][:action_dim], biases[-1][:action_dim]
    arrays["Ws"], arrays["bs"] = weights[-1][action_dim:], biases[-1][action_dim:]
    arrays["action_low"], arrays["action_high"] = action_low.astype(np.float32), action_high.astype(np.float32)
    if observation_mean is not None and observation_std is not None:
        arrays["obs_mean"], arrays["obs_var"] = observation_mean, observation_std**2
        arrays["obs_eps"] = np.array(0.0, np.float32)
    arrays["log_std_min"], arrays["log_std_max"] = np.array(LOG_STD_MIN, np.float32), np.array(LOG_STD_MAX, np.float32)
    return arrays


def train_online(config: OnlineSACConfig, on_step: Callable[[int], None] | None = None) -> Iterator[Snapshot]:
    """Train and yield a snapshot at step 0 and every `snapshot_every` steps. Deterministic in the seed."""
    env = make_env(config.env_id)
    space = env.action_space
    assert isinstance(space, gymnasium.spaces.Box), f"{config.env_id}: continuous actions only"
    center, scale = (space.high + space.low) / 2, (space.high - space.low) / 2
    obs_dim, action_dim = int(np.prod(env.observation_space.shape or ())), int(np.prod(space.shape))
    hyper = SACHyperparameters(0.0, config.learning_rate, config.learning_rate, config.learning_rate)
    settings = SACSettings(
        num_critics=2,
        actor_hidden=config.hidden,
        critic_hidden=config.hidden,
        gamma=config.gamma,
        initialisation="torch",
    )
    sac = SAC([config.seed], [hyper], settings, obs_dim, action_dim)
    replay = Replay(torch.empty((0, 2 * obs_dim + action_dim + 2)), 1, config.steps)
    yield Snapshot(0, actor_arrays(sac.actor, 0, space.low, space.high))

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
            yield Snapshot(step + 1, actor_arrays(sac.actor, 0, space.low, space.high))
