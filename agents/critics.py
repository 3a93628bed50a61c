"""What the actors of several methods are trained against.

Shapes: M member, N critic, G = M*N, B batch, S observation, A action, X = S + A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.actors import Actor
from agents.fqe import STARTS, mean_action, start_rows
from agents.method import TrainingData
from agents.networks import StackedMLP


def min_value_and_gradient(critic: StackedMLP, state_action_MBX: Tensor, action_dim: int) -> tuple[Tensor, Tensor]:
    """min_i Q_i(s, a) `(M, B)` and its gradient with respect to a `(M, B, A)`, which the smallest critic of a row
    passes.

    Args:
        critic: lead `(M, N)`.
        state_action_MBX: columns `[s, a]`.
    """
    m, batch, width = state_action_MBX.shape
    x_GBX, outputs, traces = critic.spread(state_action_MBX), [], []
    parts = critic.parts(batch)
    for place, part in parts:
        q, inputs = part.forward(x_GBX[place])
        outputs.append(q)
        traces.append(inputs)
    q_MNB = torch.cat(outputs).view(m, -1, batch)
    q_M1B, index = q_MNB.min(1, keepdim=True)
    chosen_GB1 = torch.zeros_like(q_MNB).scatter_(1, index, 1.0).view(-1, batch, 1)
    gradients = [
        part.input_gradient(part.hidden_gradients(inputs, chosen_GB1[place])[0], width - action_dim, width)
        for (place, part), inputs in zip(parts, traces, strict=True)
    ]
    return q_M1B.squeeze(1), torch.cat(gradients).view(m, -1, batch, action_dim).sum(1)


@torch.inference_mode()
def initial_values(critic: StackedMLP, actor: Actor, data: TrainingData, gamma: float) -> Tensor:
    """What a method's own critics make of its policies: the mean over first states of min_i Q_i(s, pi(s)), `(M,)`, with
    pi's action without noise; discounted, in the environment's rewards.

    Critics of entropy-regularised methods count entropy, and penalised ones penalties: values of trials whose settings
    change these are not of one kind. A shift of the rewards is taken back as if no episode ended early.

    Args:
        critic: lead `(M, N)`, of columns `[s, a]`.
        actor: for observations as `data` has them.
        data: in the units that the critics have learned in.
    """
    obs_IS = data.observations[start_rows(data, STARTS)]
    obs_MIS = obs_IS.expand(actor.num_members, *obs_IS.shape)
    value_M = critic.values(torch.cat((obs_MIS, mean_action(actor, obs_MIS)), dim=-1)).amin(1).mean(1)
    return (value_M - data.reward_shift / (1.0 - gamma)) / data.reward_scale
