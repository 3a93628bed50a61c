"""What a policy gains in a learned model: its mean return over H steps from the first states of the data.

The return is that of the ensemble's own rewards, not penalised, undiscounted and in the environment's units; a rollout
ends where the environment's rule ends it. A model is wrong where it has seen little, and a policy that was trained in
it has looked for such places: see docs/studies.md for when its return can be trusted.

Shapes: M member, I first states, H steps, S observation, A action.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.actors import Actor
from agents.fqe import mean_action, start_rows
from agents.method import TrainingData
from agents.randomness import generator
from agents.rollout import Dynamics

STARTS = 256  # first states at most


@torch.inference_mode()
def model_return(actor: Actor, dynamics: Dynamics, data: TrainingData, seeds: Sequence[int], horizon: int) -> Tensor:
    """Mean return `(M,)` of M policies without noise; not finite where the model's predictions are not.

    Args:
        actor: for observations as `data` has them.
        dynamics: what is stepped through, in the units of `data`.
        seeds: one per member: which elite predicts and what is drawn from it follow from it alone.
        horizon: H.
    """
    obs_IS = data.observations[start_rows(data, STARTS)]
    obs_MIS = obs_IS.expand(len(seeds), *obs_IS.shape).contiguous()
    device, termination = obs_IS.device, data.termination
    sources = [generator(seed, "model return", device=device) for seed in seeds]
    choices = torch.tensor(list(dynamics.choices), device=device)
    total_MI = torch.zeros(obs_MIS.shape[:2], dtype=torch.float64, device=device)
    alive_MI = torch.ones_like(total_MI, dtype=torch.bool)
    carried = dynamics.begin(obs_MIS, None)
    shape = (len(obs_IS), dynamics.num_noises)
    for _ in range(horizon):
        noise = torch.stack([torch.randn(shape, generator=s, device=device) for s in sources])
        which = torch.stack([torch.randint(len(choices), shape[:1], generator=s, device=device) for s in sources])
        state_action = torch.cat((obs_MIS, mean_action(actor, obs_MIS)), dim=-1)
        next_obs = torch.empty_like(obs_MIS)
        step = dynamics.step(carried, state_action, noise, choices[which], None, next_obs)
        reward = (step.reward_MB.double() - data.reward_shift) / data.reward_scale
        total_MI += torch.where(alive_MI, reward, 0.0)
        alive_MI &= ~termination(next_obs)
        obs_MIS, carried = torch.where(alive_MI.unsqueeze(-1), next_obs, obs_MIS), step.carried_MBX
        if not bool(alive_MI.any()):
            break
    return total_MI.mean(1)
