"""Dynamics between an untrained model, a learned one and the true ones; methods that learn in them."""

from __future__ import annotations

import dataclasses
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.dynamics import DynamicsConfig, Ensemble, EnsembleTrainer, train_ensemble
from agents.method import TrainingData
from agents.model_based import ModelBasedConfig, ModelBasedSAC
from agents.model_quality import InterpolatedDynamics, dynamics_of_quality
from agents.mopo import MOPO, MOPOConfig
from agents.penalties import max_aleatoric
from agents.ravl import RAVL, RAVLConfig
from agents.rollout import Dynamics, Rollout, draw
from agents.true_dynamics import SimulatedDynamics
from envs.errors import UserError
from envs.toys import EdgeOfReach
from envs.true_dynamics import TrueDynamics
from tests.agents.test_model_based import DYNAMICS, SMALL, assert_equal, train
from tests.agents.test_true_dynamics import falling, make_data, make_job

OBS, ACT, ROWS = 2, 2, 200
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    **SMALL, "dynamics": dataclasses.replace(DYNAMICS, max_epochs=3), "hidden": [16, 16], "initialisation": "torch",
}  # fmt: skip


@cache
def plane() -> TrainingData:
    """Steps of EdgeOfReach, with a little noise in the next observations."""
    g = torch.Generator().manual_seed(0)
    obs, action = 4 * torch.rand(ROWS, OBS, generator=g) - 2, 2 * torch.rand(ROWS, ACT, generator=g) - 1
    reward = torch.tensor(EdgeOfReach.reward(obs.numpy())).float()
    after = obs + action + 0.01 * torch.randn(ROWS, OBS, generator=g)
    return TrainingData("offsweep/EdgeOfReach-v0", obs, action, reward, after, torch.zeros(ROWS))


def columns(data: TrainingData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return data.observations, data.actions, data.rewards, data.next_observations


@cache
def stage() -> dict[str, Any]:
    return train_ensemble(*columns(plane()), SETTINGS["dynamics"]).state_dict()


def of_quality(quality: float) -> Dynamics:
    return dynamics_of_quality(quality, Ensemble.from_state_dict(stage()), DYNAMICS.seed, plane())


def stepped(dynamics: Dynamics) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Next observations, rewards and penalties of one step with the same draws, and what is carried on."""
    data = plane()
    obs = data.observations[:50].view(2, 25, OBS)
    noise, choice = draw([3, 4], 0, 0, 25, 1, 0, of_quality(0.0), CPU)
    after = torch.empty(2, 25, OBS)
    carried = dynamics.begin(obs, None)
    state_action = torch.cat((obs, data.actions[:50].view(2, 25, ACT)), -1)
    noise = noise[:, 0, :, : dynamics.num_noises]
    reward, penalty, carried, *_ = dynamics.step(carried, state_action, noise, choice[:, 0], max_aleatoric, after)
    assert penalty is not None
    return (after, reward, penalty), carried


def test_an_untrained_ensemble_is_the_learned_one_before_its_training() -> None:
    learned = Ensemble.from_state_dict(stage())
    untrained = learned.untrained(DYNAMICS.seed)
    (start,) = EnsembleTrainer(*columns(plane()), [SETTINGS["dynamics"]]).ensembles
    for name, tensor in untrained.tensors.items():
        bound = name.endswith("logvar")
        assert torch.equal(tensor, (learned if bound else start).tensors[name]), name
    assert untrained.elites == learned.elites
    assert not torch.equal(untrained.tensors["W0"], learned.tensors["W0"])
    assert not torch.equal(untrained.tensors["W0"], learned.untrained(DYNAMICS.seed + 1).tensors["W0"])


def test_the_ends_are_the_dynamics_themselves() -> None:
    assert isinstance(of_quality(-1.0), Ensemble)
    assert isinstance(of_quality(0.0), Ensemble)
    assert isinstance(of_quality(1.0), SimulatedDynamics)
    assert isinstance(dynamics_of_quality(1.0, None, 0, plane()), SimulatedDynamics)


@pytest.mark.parametrize("end", [-1.0, 1.0])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_interpolation_with_a_weight_of_0_or_1_is_one_of_its_ends(end: float, weight: float) -> None:
    learned = of_quality(0.0)
    assert isinstance(learned, Ensemble)
    mixed, _ = stepped(InterpolatedDynamics(learned, of_quality(end), weight))
    alone, _ = stepped(of_quality(end) if weight else learned)
    assert all(map(torch.equal, mixed, alone))


@pytest.mark.parametrize("quality", [-0.75, -0.25, 0.25, 0.75])
def test_between_the_ends_everything_is_interpolated(quality: float) -> None:
    weight = abs(quality)
    (mixed, carried), (learned, _) = stepped(of_quality(quality)), stepped(of_quality(0.0))
    other, _ = stepped(of_quality(1.0 if quality > 0 else -1.0))
    for mine, one, two in zip(mixed, learned, other, strict=True):
        torch.testing.assert_close(mine, (1 - weight) * one + weight * two)
        assert not torch.allclose(one, two)
    if quality > 0:  # the plane's state is what it shows
        data = plane()
        torch.testing.assert_close(other[0].view(50, OBS), data.observations[:50] + data.actions[:50])
        assert not other[2].any()
        torch.testing.assert_close(carried, mixed[0].double(), rtol=0.0, atol=1e-6)
    else:
        assert carried is None


def hopper_ensemble(data: TrainingData) -> Ensemble:
    """One that has learned nothing."""
    obs = data.observations.nan_to_num()
    a = torch.rand((len(obs), data.action_dim), generator=torch.Generator().manual_seed(0)) - 0.5
    config = DynamicsConfig(ensemble_size=2, num_elites=2, hidden=[8], weight_decay=[0.0, 0.0])
    return EnsembleTrainer(obs, a, obs[:, 0], obs, [config]).finish()[0]  # type: ignore[return-value]


def test_the_carried_state_lies_between_the_true_one_and_the_one_that_shows_the_prediction() -> None:
    """By hand, for a robot that rises faster than it shows."""
    data = make_data("Hopper-v4")
    learned, true = hopper_ensemble(data), TrueDynamics("Hopper-v4")
    assert data.states is not None
    states = data.states.clone().unsqueeze(0)
    states[..., 7] = 25.0  # the height's velocity, shown as 10
    dynamics = InterpolatedDynamics(learned, SimulatedDynamics(data), 0.75)
    obs, action = data.observations.unsqueeze(0), 0.5 * torch.ones(1, 40, 3)
    state_action, after = torch.cat((obs, action), -1), torch.empty(1, 40, 11)
    noise, choice = torch.zeros(1, 40, 12), torch.zeros(1, 40, dtype=torch.int64)
    predicted = torch.empty(1, 40, 11)
    reward, _, carried, *_ = dynamics.step(dynamics.begin(obs, states), state_action, noise, choice, None, after)
    guess, *_ = learned.step(None, state_action, noise, choice, None, predicted)

    mean, std = data.observation_mean, data.observation_std
    assert mean is not None
    assert std is not None
    step = true.step(states[0].numpy(), (0.25 + 0.75 * action[0]).numpy())
    shown = true.states_of((predicted[0].double() * std.double() + mean.double()).numpy())
    expected = torch.tensor(0.25 * shown + 0.75 * step.states)
    assert carried is not None
    torch.testing.assert_close(carried[0], expected)
    assert float(expected[:, 7].min()) > 15
    expected_obs = 0.25 * predicted[0].double() + 0.75 * (torch.tensor(step.observations) - mean) / std
    torch.testing.assert_close(after[0].double(), expected_obs, rtol=1e-5, atol=1e-5)
    expected_reward = 0.25 * guess[0] + 0.75 * (2.5 * torch.tensor(step.rewards) - 0.5)
    torch.testing.assert_close(reward[0], expected_reward.float(), rtol=1e-5, atol=1e-5)


def test_both_forms_give_the_same_in_interpolated_dynamics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended, or were never finite, go on in one of them; the state of the others must not move."""
    data = falling()
    dynamics = InterpolatedDynamics(hopper_ensemble(data), SimulatedDynamics(data), 0.97)
    job = make_job(data, members=2, length=20, penalty=max_aleatoric, penalty_coef=torch.tensor([1.0, 2.0]))
    compacting = job.run(dynamics)
    monkeypatch.setattr(Rollout, "__call__", torch.inference_mode()(Rollout.masked))
    masked = job.run(dynamics)
    for m in range(2):
        torch.testing.assert_close(compacting.rows[m], masked.rows[m], rtol=1e-4, atol=1e-4)
        assert torch.equal(compacting.tags[m], masked.tags[m])
        assert compacting.statistics[m].dropped == 1
        assert 39 < compacting.statistics[m].transitions < 19 * 39
        assert compacting.tags[m].abs().max() > 3


def test_a_worker_can_be_sent_interpolated_dynamics() -> None:
    for quality in (-0.5, 0.5):
        dynamics = of_quality(quality)
        sent = pickle.loads(pickle.dumps(dynamics))
        assert all(map(torch.equal, stepped(dynamics)[0], stepped(sent)[0]))


# ---- methods --------------------------------------------------------------------------------------------------------


def learner(method: type[ModelBasedSAC], config: ModelBasedConfig) -> ModelBasedSAC:
    """A pack of two."""
    artifacts = {name: stage() for name in method.stages(config)}
    return method([config, config], [5, 6], plane(), artifacts)


def test_without_model_error_mopo_is_the_base_method() -> None:
    """Two critics, no diversity, no penalty: its coefficient multiplies 0."""
    mopo = learner(MOPO, MOPOConfig(penalty_coef=1e3, model_quality=1.0, **SETTINGS))
    base = learner(RAVL, RAVLConfig(num_critics=2, eta=0.0, model_quality=1.0, **SETTINGS))
    metrics = train(mopo, [0, 1])
    train(base, [0, 1])
    assert_equal(mopo, base)
    assert metrics[0][0]["rollout/penalty_mean"] == 0.0
    rows = mopo.replay.member_rows(0)
    torch.testing.assert_close(rows[:, -OBS:], rows[:, :OBS] + rows[:, OBS : OBS + ACT])  # s' = s + a


def test_every_quality_trains_in_other_dynamics() -> None:
    rewards = []
    for quality in (-1.0, -0.5, 0.0, 0.5, 1.0):
        method = learner(RAVL, RAVLConfig(num_critics=2, model_quality=quality, **SETTINGS))
        rewards.append(train(method, [0])[0][0]["rollout/reward_mean"])
    assert len(set(rewards)) == 5


def test_starts_take_the_datasets_states_along() -> None:
    config = RAVLConfig(num_critics=2, model_quality=1.0, **SETTINGS)
    states = torch.arange(2.0 * ROWS, dtype=torch.float64).view(ROWS, 2)
    data = dataclasses.replace(plane(), states=states)
    (job, _) = RAVL([config] * 2, [5, 6], data, {}).rollout_jobs(0)
    assert job.start_states is not None
    index = (job.start_states[0, :, 0] / 2).long()
    assert torch.equal(plane().observations[index], job.starts[0])
    without = RAVL([dataclasses.replace(config, model_quality=0.0)] * 2, [5, 6], data, {"dynamics": stage()})
    assert without.rollout_jobs(0)[0].start_states is None


def test_only_the_true_dynamics_need_no_stage() -> None:
    for quality, stages in ((-1.0, ["dynamics"]), (0.0, ["dynamics"]), (0.99, ["dynamics"]), (1.0, [])):
        assert list(RAVL.stages(RAVLConfig(model_quality=quality))) == stages


@pytest.mark.parametrize("quality", [-1.01, 1.5, float("nan")])
def test_a_quality_that_is_none_is_named(quality: float) -> None:
    with pytest.raises(UserError, match=rf"^method\.model_quality={quality} must lie between -1"):
        RAVLConfig(model_quality=quality)


def test_an_environment_that_cannot_be_simulated_is_named() -> None:
    for quality in (-1.0, 0.0):
        RAVL.check_environment(RAVLConfig(model_quality=quality), "Pendulum-v1")
    with pytest.raises(UserError, match=r"^method\.model_quality=0\.5 must be 0 or less here: there are no true dyn"):
        RAVL.check_environment(RAVLConfig(model_quality=0.5), "Pendulum-v1")
    RAVL.check_environment(RAVLConfig(model_quality=0.5), "Hopper-v4")
    with pytest.raises(UserError, match="no termination rule"):
        RAVL.check_environment(RAVLConfig(), "Swimmer-v4")
