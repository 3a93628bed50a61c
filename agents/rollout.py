"""Model rollouts: short imagined trajectories from states of the dataset.

A shard is a pure function of its inputs and its generator, so shards may run anywhere, in any order, with the same
result.

Shapes: B rows still alive, S observation, A action, D = S + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.dynamics import Ensemble
from agents.networks import StackedMLP
from agents.replay import transition_rows
from agents.sac import squashed_sample

SHARD_ROWS = 2_500  # starts of one shard: its activations stay in a core's cache

Penalty = Callable[[Tensor], Tensor]  # standard deviations (E, B, D) -> penalty (B,)


@dataclass(frozen=True)
class RolloutStatistics:
    """Sums over a shard, so that shards add up."""

    transitions: int
    terminals: int
    dropped: int  # predictions or penalised rewards that were not finite
    reward_sum: float
    penalty_sum: float

    def __add__(self, other: RolloutStatistics) -> RolloutStatistics:
        mine, theirs = vars(self), vars(other)
        return RolloutStatistics(**{k: mine[k] + theirs[k] for k in mine})


@torch.no_grad()
def rollout(
    actor: StackedMLP,
    ensemble: Ensemble,
    termination: Callable[[Tensor], Tensor],
    starts_BS: Tensor,
    length: int,
    generator: torch.Generator,
    penalty: Penalty | None = None,
    penalty_coef: float = 0.0,
) -> tuple[Tensor, RolloutStatistics]:
    """Roll the stochastic policy through the ensemble.

    At every step and for every row an elite is drawn uniformly and its Gaussian sampled, for the state change and for
    the reward (RAVL `rollout_generation.py:33-46`). A terminal transition is kept with d = 1 and its row ends; a
    transition with a value that is not finite is dropped and ends its row too. Without a penalty only the drawn elites
    are evaluated.

    Args:
        actor: one member's actor.
        termination: next observations (B, S) -> bool (B,).
        starts_BS: start states.
        length: steps.
        generator: CPU generator of this shard.
        penalty: a function of the standard deviations of all ensemble members, (E, B, D) -> (B,).
        penalty_coef: subtracted from the reward, times the penalty.

    Returns:
        Rows (n, W) as `agents.replay` lays them out, and statistics.
    """
    obs, rows = starts_BS, []
    elites = torch.tensor(ensemble.elites)
    transitions = terminals = dropped = 0
    reward_sum = penalty_sum = 0.0
    action_dim = actor.sizes[-1] // 2
    for _ in range(length):
        batch, device = len(obs), obs.device
        noise = torch.randn((batch, action_dim + ensemble.num_outputs), generator=generator).to(device)
        drawn = elites[torch.randint(len(elites), (batch,), generator=generator)].to(device)
        out, _ = actor.forward(obs.unsqueeze(0))
        action = squashed_sample(out.squeeze(0), noise[:, :action_dim])
        state_action = torch.cat((obs, action), dim=-1)
        if penalty is None:
            mean, std = ensemble.predict_drawn(state_action, drawn)
        else:
            mean_all, std_all = ensemble.predict_all(state_action)
            at = torch.arange(batch, device=device)
            mean, std = mean_all[drawn, at], std_all[drawn, at]
        sample = torch.addcmul(mean, std, noise[:, action_dim:])
        next_obs, reward = obs + sample[:, :-1], sample[:, -1]
        if penalty is not None:
            cost = penalty(std_all)
            reward = reward - penalty_coef * cost
        done = termination(next_obs)
        # of the stored values: a penalty over all members can overflow where the drawn one predicts well
        finite = torch.isfinite(next_obs).all(dim=-1) & torch.isfinite(reward)
        if penalty is not None:
            penalty_sum += float(cost[finite].sum())
        step_rows = transition_rows(obs, action, reward, done, next_obs)[finite]
        rows.append(step_rows)
        transitions += len(step_rows)
        dropped += batch - len(step_rows)
        terminals += int((done & finite).sum())
        reward_sum += float(reward[finite].sum())
        obs = next_obs[finite & ~done]
        if not len(obs):
            break
    return torch.cat(rows), RolloutStatistics(transitions, terminals, dropped, reward_sum, penalty_sum)
