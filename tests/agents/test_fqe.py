"""Values of policies from data: fitted Q evaluation, returns in a model, and what a method's own critics say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.actors import TanhActor
from agents.critics import initial_values
from agents.fqe import FittedQ, FQESettings, fitted_q_evaluation, start_rows
from agents.method import TrainingData
from agents.model_return import model_return
from agents.networks import StackedMLP
from agents.randomness import generator
from agents.rollout import Step

NUM_STATES, GAMMA = 4, 0.9
PENDULUM = "Pendulum-v1"  # its episodes have no terminals


def constant_actor(actions: list[float], observation_dim: int) -> TanhActor:
    """Policies of one constant action each, whatever the state."""
    network = StackedMLP((len(actions),), (observation_dim, 2, 1))
    network.biases[-1][:, 0, 0] = torch.atanh(torch.tensor(actions))
    return TanhActor(network)


def chain(reward_scale: float = 1.0, reward_shift: float = 0.0) -> TrainingData:
    """A walk along one-hot states 0, 1, 2, 3: the action 0.5 goes on and -0.5 stays; steps cost 1; that to the end
    gives 10. Every pair of state and action is there 50 times; one episode begins in state 0."""
    rows = [(s, a) for s in range(NUM_STATES) for a in (0.5, -0.5)] * 50
    state = torch.tensor([s for s, _ in rows])
    action = torch.tensor([a for _, a in rows])
    goes = action > 0
    done = goes & (state == NUM_STATES - 1)
    reward = torch.where(done, 10.0, -1.0)
    eye = torch.eye(NUM_STATES)
    after = torch.where(goes, (state + 1).clamp(max=NUM_STATES - 1), state)
    return TrainingData(
        PENDULUM, eye[state], action.unsqueeze(1), reward * reward_scale + reward_shift, eye[after], done.float(),
        reward_scale=reward_scale, reward_shift=reward_shift, episode_starts=torch.tensor([0]),
    )  # fmt: skip


def settings(**changes: object) -> FQESettings:
    return dataclasses.replace(FQESettings(GAMMA, 1_500, 64, (32, 32)), **changes)  # type: ignore[arg-type]


GOES = -1.0 - GAMMA - GAMMA**2 + GAMMA**3 * 10.0  # solved by hand
STAYS = -1.0 / (1.0 - GAMMA)


def test_values_of_a_chain_are_those_of_its_bellman_equations() -> None:
    actor = constant_actor([0.5, -0.5], NUM_STATES)
    values = fitted_q_evaluation(actor, chain(), [0, 0], settings())
    np.testing.assert_allclose(values.numpy(), [GOES, STAYS], atol=0.3)
    # the environment's rewards count, however the data scales and shifts them
    scaled = fitted_q_evaluation(actor, chain(0.1, 0.7), [0, 0], settings())
    np.testing.assert_allclose(scaled.numpy(), values.numpy(), atol=1e-2)


def test_a_member_has_the_value_it_has_alone_and_again() -> None:
    both = fitted_q_evaluation(constant_actor([0.5, -0.5], NUM_STATES), chain(), [3, 4], settings(num_updates=50))
    for member, action in enumerate((0.5, -0.5)):
        arguments = constant_actor([action], NUM_STATES), chain(), [3 + member], settings(num_updates=50)
        alone = fitted_q_evaluation(*arguments)
        assert alone.item() == pytest.approx(both[member].item(), rel=1e-5)
        assert torch.equal(alone, fitted_q_evaluation(*arguments))


def test_one_step_is_that_of_autograd() -> None:
    actor, data = constant_actor([0.5, -0.5], NUM_STATES), chain()
    fitted = FittedQ(actor, data, [0, 1], settings())
    rows = torch.randint(len(data.rewards), (2, 64), generator=generator(0, "test"))
    before, target_before = fitted.network.clone(), fitted.target.flat.clone()
    wanted: list[tuple[Tensor, ...]] = []
    for member, action in enumerate((0.5, -0.5)):
        parameters = [
            (w[member].clone().requires_grad_(), b[member].clone().requires_grad_())
            for w, b in zip(before.weights, before.biases, strict=True)
        ]

        def f(obs: Tensor, act: Tensor, layers: list[tuple[Tensor, Tensor]] = parameters) -> Tensor:
            x = torch.cat(((obs - data.observations.mean(0)) / data.observations.std(0), act), -1)
            for w, b in layers[:-1]:
                x = (x @ w + b).relu()
            return (x @ layers[-1][0] + layers[-1][1]).squeeze(-1)

        row = rows[member]
        next_value = f(data.next_observations[row], torch.full((64, 1), action)).detach()
        q = fitted.offset + fitted.unit * next_value
        target = data.rewards[row] + GAMMA * (1 - data.terminals[row]) * q
        target = target.clamp(-1.0 / (1 - GAMMA), 10.0 / (1 - GAMMA))
        values = fitted.offset + fitted.unit * f(data.observations[row], data.actions[row])
        torch.testing.assert_close(fitted.offset + fitted.unit * fitted.targets(rows)[member], target)
        loss = ((values - target) / fitted.unit).square().mean()
        wanted.append(torch.autograd.grad(loss, [p for pair in parameters for p in pair]))
    fitted.update(rows)
    got = [p for pair in zip(fitted.network.weight_grads, fitted.network.bias_grads, strict=True) for p in pair]
    for member in range(2):
        for one, other in zip(wanted[member], got, strict=True):
            torch.testing.assert_close(one, other[member], rtol=1e-4, atol=1e-6)
    # Adam's first step has the size of its learning rate, and the target follows by tau
    torch.testing.assert_close(fitted.target.flat, target_before.lerp(fitted.network.flat, 0.05))
    moved = (fitted.network.flat - before.flat).abs().max().item()
    assert moved == pytest.approx(settings().learning_rate, rel=1e-3)


class Linear:
    """s' = s + a, reward 2 a + 1, in the units of the data; noise is added to the reward."""

    observation_dim, num_noises, choices, floats_per_row = 3, 1, (0,), 1

    def begin(self, obs_MBS: Tensor, states_MBX: Tensor | None) -> None:
        return None

    def step(
        self, carried: Tensor | None, state_action_MBY: Tensor, noise_MBZ: Tensor, choice_MB: Tensor, penalty: object,
        next_obs_MBS: Tensor,
    ) -> Step:  # fmt: skip
        action = state_action_MBY[..., -1]
        next_obs_MBS.copy_(state_action_MBY[..., :3] + action.unsqueeze(-1))
        return Step(2.0 * action + 1.0 + 0.1 * noise_MBZ[..., 0], None, None)


def plain_data(env_id: str, observations: Tensor, **changes: object) -> TrainingData:
    n = len(observations)
    return TrainingData(
        env_id, observations, torch.zeros(n, 1), torch.zeros(n), observations, torch.zeros(n),
        episode_starts=torch.arange(n), **changes,  # type: ignore[arg-type]
    )  # fmt: skip


def test_returns_in_a_known_model() -> None:
    data = plain_data(PENDULUM, torch.zeros(200, 3), reward_scale=2.0, reward_shift=1.0)
    actor = constant_actor([0.5, -0.25], 3)
    returns = model_return(actor, Linear(), data, [0, 1], 7)
    # the environment's reward is (2 a + 1 - 1) / 2 = a
    np.testing.assert_allclose(returns.numpy(), [3.5, -1.75], atol=0.05)
    assert torch.equal(returns, model_return(actor, Linear(), data, [0, 1], 7))
    torch.testing.assert_close(returns[1:], model_return(constant_actor([-0.25], 3), Linear(), data, [1], 7))


def test_returns_in_a_model_end_where_the_environment_does() -> None:
    # a hopper has fallen when its height, the first column, is 0.7 or less
    data = plain_data("Hopper-v5", torch.cat((torch.full((4, 1), 1.25), torch.zeros(4, 10)), 1))

    class Falling(Linear):
        observation_dim, num_noises = 11, 0

        def step(self, carried, state_action_MBY, noise_MBZ, choice_MB, penalty, next_obs_MBS):  # type: ignore[no-untyped-def]
            next_obs_MBS.copy_(state_action_MBY[..., :11])
            next_obs_MBS[..., 0] -= 0.2
            return Step(torch.ones_like(state_action_MBY[..., 0]), None, None)

    assert model_return(constant_actor([0.5], 11), Falling(), data, [0], 50).tolist() == [3.0]


def test_initial_values_are_the_smallest_critics() -> None:
    data = plain_data(PENDULUM, torch.randn(6, 3, generator=generator(0, "test")), reward_scale=4.0, reward_shift=0.5)
    critic = StackedMLP((2, 3), (4, 8, 1))
    critic.flat.normal_(generator=generator(1, "test"))
    actor = constant_actor([0.5, -0.5], 3)
    got = initial_values(critic, actor, data, GAMMA)
    for member, action in enumerate((0.5, -0.5)):
        x = torch.cat((data.observations, torch.full((6, 1), action)), -1)
        q = [
            (x @ critic.weights[0][g] + critic.biases[0][g]).relu() @ critic.weights[1][g] + critic.biases[1][g]
            for g in range(3 * member, 3 * member + 3)
        ]
        smallest = torch.stack(q).min(0).values.mean()
        torch.testing.assert_close(got[member], (smallest - 0.5 / (1 - GAMMA)) / 4.0)


def test_first_states_are_spread_over_all_episodes() -> None:
    data = dataclasses.replace(chain(), episode_starts=torch.arange(0, 400, 4))
    assert start_rows(data, 100).tolist() == list(range(0, 400, 4))
    assert start_rows(data, 3).tolist() == [0, 200, 396]
