"""Learning a dynamics reward."""

import dataclasses
import io
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from agents.dynamics_reward import DynamicsReward
from agents.dynamics_reward_training import (
    DynamicsRewardConfig,
    RewardTrainer,
    classification_gradients,
    reward_stage,
    train_dynamics_reward,
)
from agents.method import TrainingData
from agents.optim import Adam
from envs.errors import UserError
from tests.agents.devices import no_host

QUICK: dict[str, Any] = {
    "hidden": [32, 32], "policy_hidden": [32], "distil_hidden": [32], "batch_size": 128, "max_epochs": 25,
    "pretraining_epochs": 4, "distil_epochs": 30, "num_snapshots": 6,
}  # fmt: skip
NOISE = 0.05


def truth(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return 0.9 * obs + 0.5 * action


def linear_data(n: int = 4000, seed: int = 0) -> TrainingData:
    """s' = 0.9 s + 0.5 a + noise, s and a between -1 and 1."""
    draw = torch.Generator().manual_seed(seed)
    obs, action = torch.rand(n, 1, generator=draw) * 2 - 1, torch.rand(n, 1, generator=draw) * 2 - 1
    after = truth(obs, action) + NOISE * torch.randn(n, 1, generator=draw)
    return TrainingData("Toy-v0", obs, action, torch.zeros(n), after, torch.zeros(n))


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Any], list[tuple[int, dict[str, float]]]]:
    told: list[tuple[int, dict[str, float]]] = []
    config = DynamicsRewardConfig(**QUICK)
    state = reward_stage(config).build(linear_data(), lambda step, metrics: told.append((step, dict(metrics))))
    return state, told


def test_real_transitions_score_above_those_of_a_biased_model(trained):
    reward = DynamicsReward.from_state_dict(trained[0])
    fresh = linear_data(1000, seed=1)
    biased = fresh.next_observations + 4 * NOISE
    candidates = torch.stack((fresh.next_observations, biased), 1)
    p = reward.probability(torch.cat((fresh.observations, fresh.actions), 1), candidates).mean(0)
    assert p[0] > 0.6
    assert p[1] < p[0] - 0.1


def test_the_reward_peaks_at_the_true_next_state(trained):
    reward = DynamicsReward.from_state_dict(trained[0])
    draw = torch.Generator().manual_seed(2)
    obs, action = (torch.rand(50, 1, generator=draw) * 1.6 - 0.8 for _ in range(2))
    offsets = torch.linspace(-1, 1, 201)
    grid = truth(obs, action).unsqueeze(1) + offsets.view(1, -1, 1)
    score = reward(torch.cat((obs, action), 1), grid)
    peak = offsets[score.argmax(1)]
    assert peak.abs().median() < 2 * NOISE
    assert (score[:, 100] > score[:, 0]).all()
    assert (score[:, 100] > score[:, -1]).all()


def test_metrics_tell_how_far_it_is(trained):
    state, told = trained
    steps = [step for step, _ in told]
    assert steps == list(range(QUICK["max_epochs"] + 1))
    assert told[-2][1]["snapshots"] == QUICK["num_snapshots"] == len(state["snapshot_updates"])
    last = told[-1][1]
    assert last["mixture_p_real"] > last["mixture_p_likelihood"]
    assert last["rank_correlation"] < -0.2
    assert last["choice_error"] < 1
    assert last["distilled_rmse"] < 0.1
    assert all(metrics["minutes"] > 0 for _, metrics in told)


def test_a_state_survives_its_file(trained):
    state, _ = trained
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    data = linear_data(20, seed=3)
    inputs, candidates = torch.cat((data.observations, data.actions), 1), data.next_observations.unsqueeze(1)
    for scorer in ("discriminators", "distilled"):
        one, other = (DynamicsReward.from_state_dict(x, scorer=scorer)(inputs, candidates) for x in (state, again))
        assert torch.equal(one, other)


def test_the_same_seed_gives_the_same_reward_and_another_seed_another():
    config = DynamicsRewardConfig(**{**QUICK, "max_epochs": 2, "likelihood_share": 0.5})
    data = linear_data(500)
    first, again = (train_dynamics_reward(data, config) for _ in range(2))
    other = train_dynamics_reward(data, dataclasses.replace(config, seed=1))
    for name, tensor in first["tensors"].items():
        assert torch.equal(tensor, again["tensors"][name])
    for name, tensor in first["distilled"].items():
        assert torch.equal(tensor, again["distilled"][name])
    assert not torch.equal(first["tensors"]["W0"], other["tensors"]["W0"])


@pytest.mark.parametrize("delta_input", [True, False])
def test_a_stored_discriminator_computes_in_the_datas_units_what_it_learned_in_standardised_ones(delta_input: bool):
    data = linear_data(600)
    wide = dataclasses.replace(
        data, observations=torch.cat((data.observations * 30 + 5, torch.full((600, 1), 2.0)), 1),
        next_observations=torch.cat((data.next_observations * 30 + 5, torch.full((600, 1), 2.0)), 1),
    )  # fmt: skip
    trainer = RewardTrainer(wide, DynamicsRewardConfig(**{**QUICK, "delta_input": delta_input, "distil_epochs": 0}))
    trainer.pretrain()
    for _ in trainer.epochs():
        pass
    state, _ = trainer.finish()
    reward = DynamicsReward.from_state_dict(state)
    p = reward.probability(torch.cat((wide.observations, wide.actions), 1), wide.next_observations.unsqueeze(1))
    transitions = trainer._transitions
    context, change, real = transitions.parts(torch.arange(600))
    torch.testing.assert_close(p.squeeze(1), trainer._mixture_probability(real), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transitions.inputs(context, change), real, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        transitions.changed(wide.observations, change), wide.next_observations, rtol=1e-4, atol=1e-4
    )
    # a column that never changes says nothing: drift in it is not told from the real
    drifted = wide.next_observations + torch.tensor([0.0, 0.1])
    same = reward.probability(torch.cat((wide.observations, wide.actions), 1), drifted.unsqueeze(1))
    torch.testing.assert_close(p, same, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_the_discriminators_loss_has_the_gradients_of_autograd(bonus: float):
    draw = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, generator=draw).mul(2).requires_grad_() for n in (5, 7))
    expected = -logsigmoid(real).mean() - logsigmoid(-fake).mean()
    for logits in (real, fake):
        p = torch.sigmoid(logits)
        expected = expected + bonus * (p * p.log() + (1 - p) * (1 - p).log()).mean()
    expected.backward()
    loss, grad_real, grad_fake = classification_gradients(real.detach(), fake.detach(), bonus)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad_real, real.grad)
    torch.testing.assert_close(grad_fake, fake.grad)


def test_snapshots_are_even_and_hold_the_running_means():
    config = DynamicsRewardConfig(**{**QUICK, "num_snapshots": 4, "snapshots_from": 0.5, "logit_decay": 0.75})
    trainer = RewardTrainer(linear_data(1100), dataclasses.replace(config, holdout_fraction=0.2, max_epochs=4))
    assert trainer.num_updates == 4 * (880 // 128) == 24
    trainer._update = 0
    expected = 0.0
    for update in range(1, 25):
        trainer._update = update
        trainer._follow(torch.tensor(float(update)), torch.tensor(-1.0))
        # the plain mean of the first 4, then a step of 1 / 4 towards the new one
        expected += (update - expected) * max(1 / update, 0.25)
    assert [one.update for one in trainer.snapshots] == [15, 18, 21, 24]
    assert float(trainer.snapshots[-1].expert_logit) == pytest.approx(expected, rel=1e-5)
    assert float(trainer.snapshots[0].learner_logit) == pytest.approx(-1.0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_few_updates_still_make_all_snapshots(share: float):
    config = DynamicsRewardConfig(**{**QUICK, "max_epochs": 2, "snapshots_from": share})
    state = train_dynamics_reward(linear_data(60), config)
    assert len(state["snapshot_updates"]) == QUICK["num_snapshots"]
    DynamicsReward.from_state_dict(state, num_discriminators=QUICK["num_snapshots"])


def test_a_learner_whose_policy_does_not_learn_is_the_likelihood_policy():
    config = DynamicsRewardConfig(**{**QUICK, "max_epochs": 2, "policy_learning_rate": 0.0, "likelihood_share": 0.0})
    trainer = RewardTrainer(linear_data(500), config)
    trainer.pretrain()
    for _ in trainer.epochs():
        pass
    assert torch.equal(trainer.policy.network.flat, trainer.likelihood_policy.network.flat)
    config = dataclasses.replace(config, policy_learning_rate=1e-3)
    trainer = RewardTrainer(linear_data(500), config)
    trainer.pretrain()
    for _ in trainer.epochs():
        pass
    assert not torch.equal(trainer.policy.network.flat, trainer.likelihood_policy.network.flat)


def test_an_update_never_waits_for_the_device(monkeypatch):
    trainer = RewardTrainer(linear_data(300), DynamicsRewardConfig(**{**QUICK, "max_epochs": 1, "weight_decay": 1e-4}))
    trainer.pretrain()
    meta = torch.device("meta")
    trainer.device, trainer._transitions.table = meta, trainer._transitions.table.to(meta)
    trainer.discriminator = trainer.discriminator.to(meta)
    trainer.policy.network, trainer.likelihood_policy.network = (
        policy.network.to(meta) for policy in (trainer.policy, trainer.likelihood_policy)
    )
    trainer._optimiser = Adam(trainer.discriminator, [1e-3])
    trainer._policy_optimiser = Adam(trainer.policy.network, [1e-3])
    trainer._expert_logit, trainer._learner_logit = (
        x.to(meta) for x in (trainer._expert_logit, trainer._learner_logit)
    )
    rows = torch.empty(100, dtype=torch.int64, device=meta)
    with no_host(monkeypatch):
        for _ in range(trainer.num_updates):
            trainer._step(rows, None)
    assert len(trainer.snapshots) == QUICK["num_snapshots"]


def test_too_few_rows_and_divergence_are_said():
    with pytest.raises(UserError, match="too few"):
        train_dynamics_reward(linear_data(5), DynamicsRewardConfig(**QUICK))
    with pytest.raises(UserError, match="learning_rate"):
        train_dynamics_reward(linear_data(500), DynamicsRewardConfig(**{**QUICK, "learning_rate": 1e30}))
