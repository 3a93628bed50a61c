"""Rollouts in the simulator against the environment itself, stepped with the same actions."""

from __future__ import annotations

import dataclasses
import math
import pickle
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.actors import SquashedGaussianActor
from agents.method import RolloutJob, TrainingData
from agents.networks import StackedMLP
from agents.penalties import max_aleatoric
from agents.rollout import Rollout
from agents.true_dynamics import SimulatedDynamics
from envs.collect import collect
from envs.dataset import Dataset, Scaling
from envs.episodes import make_env
from envs.errors import UserError
from envs.toys import ProportionalController

LENGTH, SCALE, SHIFT = 5, 2.5, -0.5


@cache
def visited(env_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Observations and simulator states of 40 steps of random episodes, from the environment itself."""
    env = make_env(env_id)
    env.action_space.seed(0)
    obs, states = [], []
    for i in range(40):
        if i % 10 == 0:
            seen = env.reset(seed=i)[0]
        bare: Any = env.unwrapped
        obs.append(seen)
        states.append(np.concatenate((bare.data.qpos, bare.data.qvel)) if "Hopper" in env_id else bare._state)
        seen = env.step(env.action_space.sample())[0]
    env.close()
    return np.array(obs), np.array(states)


def make_data(env_id: str, with_states: bool = True) -> TrainingData:
    """What the environment has shown, standardised and with other rewards; the learner's bounds are not symmetric."""
    raw, states = visited(env_id)
    mean, std = raw.mean(0).astype(np.float32), (raw.std(0) + 0.1).astype(np.float32)
    n, a = len(raw), make_env(env_id).action_space.shape[0]  # type: ignore[index]
    obs, zeros = ((raw - mean) / std).astype(np.float32), np.zeros(n, np.float32)
    dataset = Dataset(
        "made", env_id, obs, np.zeros((n, a), np.float32), zeros, obs, zeros > 0, zeros > 0,
        scaling=Scaling(mean, std, SCALE, SHIFT),
    )  # fmt: skip
    data = TrainingData.from_dataset(dataset, np.full(a, -0.5, np.float32), np.full(a, 1.0, np.float32))
    return dataclasses.replace(data, states=torch.tensor(states)) if with_states else data


def make_job(data: TrainingData, members: int = 1, length: int = LENGTH, **changes: Any) -> RolloutJob:
    """From all rows, by actors with random weights."""
    actor = StackedMLP((members,), (data.observation_dim, 8, 2 * data.action_dim))
    actor.flat.copy_(0.5 * torch.randn(actor.flat.shape, generator=torch.Generator().manual_seed(1)))
    starts, states = (
        None if x is None else x.expand(members, *x.shape).clone() for x in (data.observations, data.states)
    )
    assert starts is not None
    fields = {"start_states": states, **changes}
    job = RolloutJob(
        tuple(range(members)), tuple(range(7, 7 + members)), 3, 2, data.termination, SquashedGaussianActor(actor),
        starts, length, None, torch.zeros(members),
    )  # fmt: skip
    return dataclasses.replace(job, **fields)


def in_environment(data: TrainingData, state: np.ndarray, actions: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Next observations and rewards as the learner has them, of an environment put into a state once."""
    env = make_env(data.env_id)
    env.reset(seed=0)
    bare: Any = env.unwrapped
    if "Hopper" in data.env_id:
        bare.set_state(state[: bare.model.nq], state[bare.model.nq :])
    else:
        bare._state = state
    steps = [env.step(0.25 + 0.75 * action.double().numpy())[:2] for action in actions]
    env.close()
    assert data.observation_mean is not None
    assert data.observation_std is not None
    obs = (np.array([s[0] for s in steps]) - data.observation_mean.numpy()) / data.observation_std.numpy()
    return obs, SCALE * np.array([s[1] for s in steps]) + SHIFT


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5", "offsweep/EdgeOfReach-v0"])
def test_a_rollout_is_what_the_environment_does_with_the_same_actions(env_id: str) -> None:
    data = make_data(env_id)
    result = make_job(data).run(SimulatedDynamics(data))
    s, a = data.observation_dim, data.action_dim
    rows, tags = result.rows[0], result.tags[0]
    whole = 0
    for start in range(0, 40, 3):
        mine = (rows[:, :s] == data.observations[start]).all(1).nonzero()[0]  # the first step
        trajectory = [rows[mine[0]]]
        while True:  # the next step begins where this one ended
            following = (rows[:, :s] == trajectory[-1][-s:]).all(1).nonzero()
            if not len(following):
                break
            trajectory.append(rows[following[0, 0]])
        made = torch.stack(trajectory)
        obs, rewards = in_environment(data, visited(env_id)[1][start], made[:, s : s + a])
        np.testing.assert_allclose(made[:, -s:].numpy(), obs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(made[:, s + a].numpy(), rewards, rtol=1e-5, atol=1e-5)
        whole += len(made) == LENGTH
    assert whole >= 10
    assert tags.abs().max() == LENGTH


def test_the_refrigerators_power_is_mapped_from_the_learners_bounds_and_its_noise_left_out() -> None:
    dataset = collect("offsweep/Refrigerator-v0", [(ProportionalController(), 1.0)], 20, seed=0)
    data = TrainingData.from_dataset(dataset, np.zeros(1, np.float32), np.full(1, 10.0, np.float32))
    dynamics = SimulatedDynamics(data)
    state_action = torch.tensor([[[10.0, -1.0], [10.0, -0.6], [0.0, 1.0]]])  # powers 0, 2 and 10
    after = torch.empty(1, 3, 1)
    carried = dynamics.begin(state_action[..., :1], None)
    step = dynamics.step(carried, state_action, torch.empty(1, 3, 0), torch.zeros(1, 3), None, after)
    np.testing.assert_allclose(after.flatten().numpy(), [10.1, 8.14, -9.5], rtol=1e-5)
    np.testing.assert_allclose(step.reward_MB.flatten().numpy(), [-12.1, -10.14, -7.5], rtol=1e-5)


def test_a_velocity_that_is_shown_clipped_is_known_from_the_dataset_only() -> None:
    data = make_data("Hopper-v4")
    assert data.states is not None
    states = data.states.clone()
    states[:, 7] = 12.0  # height's velocity, shown as 10
    data.observations[:, 6] = (10.0 - data.observation_mean[6]) / data.observation_std[6]  # type: ignore[index]
    known = make_job(data, length=1, start_states=states.unsqueeze(0)).run(SimulatedDynamics(data)).rows[0]
    shown = make_job(data, length=1, start_states=None).run(SimulatedDynamics(data)).rows[0]
    s, a = data.observation_dim, data.action_dim
    assert torch.equal(known[:, : s + a], shown[:, : s + a])
    higher = (known - shown)[:, s + a + 2] * data.observation_std[0]  # type: ignore[index]
    assert higher.tolist() == pytest.approx([2.0 * 0.008] * 40, rel=0.1)  # 2 m/s more for a step of 8 ms


def falling() -> TrainingData:
    """Hopper's states, many so far tilted that rollouts of 20 steps end at different times."""
    data = make_data("Hopper-v4", with_states=False)
    generator = torch.Generator().manual_seed(0)
    raw = torch.tensor(visited("Hopper-v4")[0])
    raw[:, 1] += 0.25 * torch.rand(40, generator=generator)
    raw[3] = math.nan
    assert data.observation_mean is not None
    assert data.observation_std is not None
    observations = ((raw - data.observation_mean) / data.observation_std).float()
    return dataclasses.replace(data, observations=observations)


@pytest.mark.parametrize("penalty", [None, max_aleatoric], ids=["free", "penalised"])
def test_both_forms_give_the_same_and_carry_the_same_states(penalty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = falling()
    dynamics = SimulatedDynamics(data)
    job = make_job(data, members=2, length=20, penalty=penalty, penalty_coef=torch.tensor([1.0, 2.0]))
    compacting = job.run(dynamics)
    monkeypatch.setattr(Rollout, "__call__", torch.inference_mode()(Rollout.masked))
    masked = job.run(dynamics)
    for m in range(2):
        torch.testing.assert_close(compacting.rows[m], masked.rows[m], rtol=1e-4, atol=1e-4)  # products of other sizes
        assert torch.equal(compacting.tags[m], masked.tags[m])
        assert compacting.rows[m].isfinite().all()
        statistics, other = compacting.statistics[m], masked.statistics[m]
        assert statistics.survivors == other.survivors
        sums, others = (vars(dataclasses.replace(one, survivors=())) for one in (statistics, other))
        assert {**sums, "survivors": 0} == pytest.approx({**others, "survivors": 0})
        assert statistics.dropped == 1  # the start that is not a number
        assert 10 < statistics.terminals < 40
        assert statistics.penalty_sum == 0.0


def test_there_is_no_penalty_on_true_dynamics() -> None:
    data = make_data("Hopper-v4")
    free = make_job(data).run(SimulatedDynamics(data))
    penalised = make_job(data, penalty=max_aleatoric, penalty_coef=torch.tensor([1e6])).run(SimulatedDynamics(data))
    assert torch.equal(free.rows[0], penalised.rows[0])


def test_a_worker_can_be_sent_the_simulator() -> None:
    data = make_data("Hopper-v4")
    sent = pickle.loads(pickle.dumps(SimulatedDynamics(data)))
    assert torch.equal(make_job(data).run(sent).rows[0], make_job(data).run(SimulatedDynamics(data)).rows[0])


def test_an_environment_without_true_dynamics_is_named() -> None:
    data = dataclasses.replace(make_data("Hopper-v4"), env_id="Pendulum-v1")
    with pytest.raises(UserError, match=r"no true dynamics for environment 'Pendulum-v1'"):
        SimulatedDynamics(data)
