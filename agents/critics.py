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


def bellman_target(reward_MB: Tensor, done_MB: Tensor, value_MB: Tensor, gamma: float) -> Tensor:
    """r + gamma (1 - d) V, `(M, B)`."""
    return torch.add(reward_MB, torch.addcmul(value_MB, done_MB, value_MB, value=-1.0), alpha=gamma)


def regress_twins(critic: StackedMLP, x_MBX: Tensor, target_MB: Tensor) -> Tensor:
    """Write the gradient of sum_i mean_b (Q_i - y)^2; the critics' values `(M, 2, B)` before any step."""
    m, batch = target_MB.shape
    x_GBX = critic.spread(x_MBX)
    y_GB1 = target_MB.unsqueeze(1).expand(m, 2, batch).reshape(2 * m, batch, 1)
    values = []
    for place, part in critic.parts(batch):
        q, inputs = part.forward(x_GBX[place])
        values.append(q)
        c = (q - y_GB1[place]).mul_(2.0 / batch)
        part.write_gradients(inputs, part.hidden_gradients(inputs, c), c)
    q_GB1 = torch.cat(values) if len(values) > 1 else values[0]
    return q_GB1.view(m, 2, batch)


def extreme_value(
    critic: StackedMLP, sa_MBX: Tensor, largest: bool = False
) -> tuple[Tensor, Tensor, list[list[Tensor]], Tensor]:
    """min (or max) over critics `(M, B)`, its index `(M, 1, B)`, the layers' inputs of every part, every critic's value
    `(M, N, B)`."""
    x_GBX, outputs, inputs = critic.spread(sa_MBX), [], []
    for place, part in critic.parts(sa_MBX.shape[1]):
        q, layer_inputs = part.forward(x_GBX[place])
        outputs.append(q)
        inputs.append(layer_inputs)
    q_GB1 = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    q_MNB = q_GB1.view(sa_MBX.shape[0], -1, sa_MBX.shape[1])
    q_MB, index = (q_MNB.max if largest else q_MNB.min)(dim=1, keepdim=True)
    return q_MB.squeeze(1), index, inputs, q_MNB


def extreme_gradient(critic: StackedMLP, index_M1B: Tensor, inputs: list[list[Tensor]], action_dim: int) -> Tensor:
    """d Q_i / da of the critic i that `extreme_value` chose for a row, `(M, B, A)`."""
    m, _, batch = index_M1B.shape
    width, gradients = critic.sizes[0], []
    chosen_MNB = torch.zeros((m, critic.num_stacked // m, batch), device=index_M1B.device)
    chosen_GB1 = chosen_MNB.scatter_(1, index_M1B, 1.0).view(-1, batch, 1)
    for (place, part), layer_inputs in zip(critic.parts(batch), inputs, strict=True):
        deltas = part.hidden_gradients(layer_inputs, chosen_GB1[place])
        gradients.append(part.input_gradient(deltas[0], width - action_dim, width))
    return torch.cat(gradients).view(m, -1, batch, action_dim).sum(1)


def min_value_and_gradient(critic: StackedMLP, state_action_MBX: Tensor, action_dim: int) -> tuple[Tensor, Tensor]:
    """min_i Q_i(s, a) `(M, B)` and its gradient with respect to a `(M, B, A)`, which the smallest critic of a row
    passes.

    Args:
        critic: lead `(M, N)`.
        state_action_MBX: columns `[s, a]`.
    """
    q_MB, index, inputs, _ = extreme_value(critic, state_action_MBX)
    return q_MB, extreme_gradient(critic, index, inputs, action_dim)


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
