"""The dynamics reward of a transition, by hand."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.dynamics_reward import (
    HIGHEST,
    LOWEST,
    DynamicsReward,
    distilled_probability,
    input_bounds,
    rescaled,
    reward_of,
    scaled_inputs,
)
from envs.errors import UserError
from tests.agents.filters import linear_reward, random_reward

OBS, ACT = 3, 2


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def transitions(rows: int, candidates: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    state_action = 2 * torch.rand(rows, OBS + ACT, generator=source) - 1
    after = state_action[:, None, :OBS] + 0.3 * torch.randn(rows, candidates, OBS, generator=source)
    return state_action, after


def test_a_logit_is_rescaled_between_the_two_means() -> None:
    learner, expert = torch.tensor(-1.0), torch.tensor(3.0)
    logits = torch.tensor([-5.0, -1.0, 0.0, 1.0, 2.0, 3.0, 9.0])
    assert rescaled(logits, learner, expert).tolist() == pytest.approx([-1, -1, -0.5, 0, 0.5, 1, 1], abs=1e-6)


def test_constants_of_the_reward() -> None:
    """0.6 is p = 0.4512, 40 % of the way from the learner's to the expert's mean logit."""
    assert pytest.approx((sigmoid(-1), sigmoid(1))) == (LOWEST, HIGHEST)
    p = torch.tensor([LOWEST, 0.5, 1 - math.exp(-0.6), HIGHEST])
    assert reward_of(p).tolist() == pytest.approx([0.31326, 0.69315, 0.6, 1.31326], abs=1e-5)
    assert float(torch.logit(p[2])) == pytest.approx(-0.2 + 0.0043, abs=1e-3)
    ends = distilled_probability(torch.tensor([-100.0, 0.0, 100.0]))
    assert ends.tolist() == pytest.approx([LOWEST, 0.5, HIGHEST])


def test_inputs_are_scaled_by_the_datas_bounds() -> None:
    obs = torch.tensor([[0.0, 5.0, -1.0], [4.0, 5.0, 3.0], [1.0, 5.0, 0.0]])
    bounds = input_bounds(obs, torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, 0.5]]))
    after = torch.tensor([[8.0, 5.0, 1.0]])
    given = obs[:1], torch.tensor([[1.0, 1.0]]), after
    scaled = scaled_inputs(*given, bounds, delta_input=False)
    assert scaled[0].tolist() == pytest.approx([-0.8, 0.0, -0.8, 0.5, 1.0, 2.4, 0.0, 0.0], abs=1e-6)
    delta = scaled_inputs(*given, bounds, delta_input=True)
    assert delta[0].tolist() == pytest.approx([-0.8, 0.0, -0.8, 0.5, 1.0, 3.2, 0.0, 0.8], abs=1e-6)


def test_the_reward_of_two_discriminators_by_hand() -> None:
    """Probabilities are averaged, then the logarithm is taken; each discriminator has its own means."""
    weights = [[1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, -1.0]]
    state = linear_reward(weights, OBS, ACT, learner=[-1.0, 0.0], expert=[1.0, 4.0])
    reward = DynamicsReward.from_state_dict(state)
    state_action = torch.tensor([[0.25, 0.0, 0.0, 0.5, 0.0]])
    after = torch.tensor([[[0.125, 0.0, 0.5], [-3.0, 0.0, 0.0]]])
    # logits: 0.25 + 2 * 0.125 = 0.5 and 1.5 - 0.5 = 1; then -5.75, cut to -1, and 1.5
    p = [(sigmoid(0.5) + sigmoid(-0.5)) / 2, (sigmoid(-1.0) + sigmoid(-0.25)) / 2]
    assert reward.probability(state_action, after).tolist() == [pytest.approx(p, abs=1e-6)]
    assert reward(state_action, after).tolist() == [pytest.approx([-math.log(1 - x) for x in p], abs=1e-6)]


def by_definition(state: dict[str, Any], chosen: list[int], state_action: Tensor, after: Tensor) -> Tensor:
    """p, with every network as it stands."""
    tensors = state["tensors"]
    inputs = scaled_inputs(
        state_action[:, None, :OBS], state_action[:, None, OBS:], after, tensors, state["delta_input"]
    )
    of_each = []
    for k in chosen:
        h = inputs
        for i in range(4):
            h = h @ tensors[f"W{i}"][k] + tensors[f"b{i}"][k]
            h = h.relu() if i < 3 else h
        logit = rescaled(h.squeeze(-1), tensors["learner_logit"][k], tensors["expert_logit"][k])
        of_each.append(logit.sigmoid())
    return torch.stack(of_each).mean(0)


@pytest.mark.parametrize("delta_input", [False, True])
@pytest.mark.parametrize("hidden", [(16, 32, 16), (128, 256, 256)])
def test_candidates_of_many_rows(delta_input: bool, hidden: tuple[int, ...]) -> None:
    """More of them than a chunk has."""
    state = random_reward(4, OBS, ACT, hidden=hidden, delta_input=delta_input)
    state_action, after = transitions(300, 10)
    p = DynamicsReward.from_state_dict(state).probability(state_action, after)
    assert p.shape == (300, 10)
    torch.testing.assert_close(p, by_definition(state, [0, 1, 2, 3], state_action, after), rtol=1e-5, atol=1e-5)
    assert float(p.std(1).mean()) > 0.01


def test_fewer_discriminators_are_taken_evenly_from_the_oldest_on() -> None:
    state = random_reward(8, OBS, ACT)
    state_action, after = transitions(20, 4)
    for wanted, chosen in ((8, list(range(8))), (4, [0, 2, 4, 6]), (3, [0, 2, 5]), (1, [0])):
        reward = DynamicsReward.from_state_dict(state, num_discriminators=wanted)
        assert reward.num_discriminators == wanted
        assert reward.state_dict()["snapshot_updates"] == [100 * (k + 1) for k in chosen]
        expected = by_definition(state, chosen, state_action, after)
        torch.testing.assert_close(reward.probability(state_action, after), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"^method\.filter\.num_discriminators=9 is more than the 8 snapshots"):
        DynamicsReward.from_state_dict(state, num_discriminators=9)


@pytest.mark.parametrize("delta_input", [False, True])
def test_bfloat16_is_near(delta_input: bool) -> None:
    state = random_reward(8, OBS, ACT, hidden=(128, 256, 256), delta_input=delta_input)
    state_action, after = transitions(100, 10)
    exact = DynamicsReward.from_state_dict(state).probability(state_action, after)
    near = DynamicsReward.from_state_dict(state, precision="bfloat16").probability(state_action, after)
    assert not torch.equal(near, exact)
    assert float((near - exact).abs().mean()) < 2e-3
    assert float((near - exact).abs().max()) < 2e-2


def test_the_distilled_network() -> None:
    state = random_reward(8, OBS, ACT, distilled=True)
    state_action, after = transitions(20, 4)
    reward = DynamicsReward.from_state_dict(state, num_discriminators=5, scorer="distilled")
    inputs = scaled_inputs(state_action[:, None, :OBS], state_action[:, None, OBS:], after, state["tensors"], False)
    for i in range(4):
        inputs = inputs @ state["distilled"][f"W{i}"][0] + state["distilled"][f"b{i}"][0]
        inputs = inputs.relu() if i < 3 else inputs
    p = LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(inputs.squeeze(-1))
    torch.testing.assert_close(reward.probability(state_action, after), p, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        UserError, match=r"^method\.filter\.scorer=distilled needs a dynamics reward with a distilled network"
    ):
        DynamicsReward.from_state_dict(random_reward(8, OBS, ACT), scorer="distilled")


@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16"}, {"scorer": "distilled"}])
def test_a_scorer_can_be_sent_and_stored(options: dict[str, Any]) -> None:
    state = random_reward(8, OBS, ACT, distilled=True)
    state_action, after = transitions(20, 4)
    reward = DynamicsReward.from_state_dict(state, num_discriminators=2, **options)
    buffer = io.BytesIO()
    torch.save(reward.state_dict(), buffer)
    stored = torch.load(io.BytesIO(buffer.getvalue()))
    for other in (
        pickle.loads(pickle.dumps(reward)),
        DynamicsReward.from_state_dict(stored, **options),
        reward.to("cpu"),
    ):
        assert torch.equal(other(state_action, after), reward(state_action, after))
    # what is not used is not sent: 2 of 8 networks, or the distilled one
    assert len(pickle.dumps(reward)) < 0.5 * len(pickle.dumps(state))
