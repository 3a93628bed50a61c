"""The stage that learns a diffusion model of sub-trajectories."""

import dataclasses
import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch

from agents.edm import noise_levels
from agents.method import TrainingData
from agents.trajectories import transitions
from agents.trajectory_diffusion import (
    DiffusionConfig,
    DiffusionTrainer,
    TrajectoryModel,
    diffusion_stage,
    split_windows,
    train_trajectory_diffusion,
)
from envs.errors import UserError
from tests.agents.devices import recorded_graph

QUICK: dict[str, Any] = {
    "length": 4, "stride": 1, "features": 16, "num_blocks": 2, "num_updates": 30, "batch_size": 16, "ema_decay": 0.9,
}  # fmt: skip


def walk(num_episodes: int = 60, length: int = 9, seed: int = 0) -> TrainingData:
    """s' = 0.8 s + a, a = +-0.5 about evenly, r = s; every episode ends in a terminal."""
    draw = torch.Generator().manual_seed(seed)
    obs = torch.zeros(num_episodes, length + 1)
    obs[:, 0] = torch.randn(num_episodes, generator=draw)
    action = 0.5 * torch.randn(num_episodes, length, generator=draw).sign()
    for t in range(length):
        obs[:, t + 1] = 0.8 * obs[:, t] + action[:, t]
    done = torch.zeros(num_episodes, length)
    done[:, -1] = 1
    return TrainingData(
        "Toy-v0", obs[:, :-1].reshape(-1, 1), action.reshape(-1, 1), obs[:, :-1].reshape(-1), obs[:, 1:].reshape(-1, 1),
        done.reshape(-1), episode_starts=torch.arange(0, num_episodes * length, length),
    )  # fmt: skip


def test_what_it_learns_samples_the_datas_dynamics_and_terminals():
    config = DiffusionConfig(**QUICK | {"features": 32, "num_updates": 700, "batch_size": 48})
    model = TrajectoryModel.from_state_dict(train_trajectory_diffusion(walk(200), config))
    draw, levels = torch.Generator().manual_seed(1), noise_levels(24)
    x = torch.randn(400, 4, 4, generator=draw) * levels[0]
    for now, after in pairwise(levels):
        x = x + (after - now) * (x - model.denoiser(x, now)) / now
    rows, mask = transitions(model.scaling.decode(x))
    obs, action, reward, done, next_obs = rows[mask].unbind(-1)
    scale = float(walk(200).observations.std())
    assert (next_obs - (0.8 * obs + action)).abs().median() < 0.25 * scale
    assert (reward - obs).abs().median() < 0.25 * scale
    # each window of 3 transitions at one of 7 places, and that at the end once more: 1 in 7 holds the last one
    ended = done.sum() / len(x)
    assert 0.05 < ended < 0.3


def test_two_trainings_are_equal_to_the_bit_and_seeds_differ():
    data = walk()
    states = [train_trajectory_diffusion(data, DiffusionConfig(**QUICK, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(states[0]["parameters"], states[1]["parameters"])
    assert not torch.equal(states[0]["parameters"], states[2]["parameters"])


def test_it_tells_its_course():
    told: list[tuple[int, dict[str, float]]] = []
    config = DiffusionConfig(**QUICK)
    diffusion_stage(config).build(walk(), lambda step, metrics: told.append((step, dict(metrics))))
    assert [step for step, _ in told] == [10, 20, 30]
    first, last = told[0][1], told[-1][1]
    # 3 of 60 episodes are held out; of each a window begins with all 9 transitions
    assert (first["windows"], first["windows_held_out"], first["coverage"]) == (57 * 9, 3 * 9, 1.0)
    assert first["terminal_share_data"] == pytest.approx(1 / 9)
    # 7 windows hold 3 transitions, the last two 2 and 1; the last three have the terminal
    assert first["terminal_share_windows"] == pytest.approx(3 / 24)
    # of update 9, behind 3 in which it rises
    assert first["learning_rate"] == pytest.approx(2e-3 * (1 + math.cos(math.pi * 6 / 27)) / 2)
    assert last["learning_rate"] < 2e-3 * 0.02
    assert 0 < last["holdout_loss"] < first["holdout_loss"]


def test_updates_replayed_from_a_graph_are_those_executed_as_written():
    data, config = walk(), DiffusionConfig(**QUICK)
    written, replayed = DiffusionTrainer(data, config), DiffusionTrainer(data, config, recorded_graph)
    with torch.inference_mode():
        for trainer in (written, replayed):
            for update, batch in zip(range(12), trainer.batches(), strict=False):
                trainer.step(update, *batch)
    assert torch.allclose(written.network.stack.flat, replayed.network.stack.flat, atol=1e-6)
    assert torch.allclose(written.averaged, replayed.averaged, atol=1e-6)
    assert not torch.equal(written.network.stack.flat, written.averaged)


def test_the_learning_rate_rises_and_falls():
    trainer = DiffusionTrainer(walk(), DiffusionConfig(**QUICK | {"num_updates": 100}))
    assert [trainer.schedule(u) for u in (0, 5, 10, 55)] == pytest.approx([0.1, 0.55, 1.0, 0.5])
    assert trainer.schedule(99) < 1e-3


def test_what_is_stored_comes_back():
    state = train_trajectory_diffusion(walk(), DiffusionConfig(**QUICK))
    model, again = (
        TrajectoryModel.from_state_dict(s) for s in (state, TrajectoryModel.from_state_dict(state).state_dict())
    )
    x, sigma = torch.randn(5, 4, 4), torch.tensor(0.7)
    assert torch.equal(model.denoiser(x, sigma), again.denoiser(x, sigma))
    assert (model.length, model.observation_dim, model.action_dim) == (4, 1, 1)
    for copy in (model.to("cpu"), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copy.denoiser(x, sigma), model.denoiser(x, sigma))


def test_runs_with_the_same_settings_share_a_stage():
    stages = [diffusion_stage(DiffusionConfig(**QUICK | extra)) for extra in ({}, {}, {"learning_rate": 1e-3})]
    assert stages[0].settings == stages[1].settings != stages[2].settings
    assert stages[0].kind == "trajectory_diffusion"


def test_held_out_episodes_are_not_learned_from():
    train, held = split_windows(walk(), DiffusionConfig(**QUICK))
    bounds = train.episodes.starts
    of_train, of_held = (set(torch.bucketize(w.starts, bounds, right=True).tolist()) for w in (train, held))
    assert not of_train & of_held
    assert (len(of_train), len(of_held)) == (57, 3)


def test_short_episodes_name_the_longest_length_that_works():
    with pytest.raises(UserError, match=r"median of 9 transitions give 0 windows.*method\.diffusion\.length=10$"):
        split_windows(walk(), DiffusionConfig(**QUICK | {"length": 32, "windows": "whole"}))
    assert len(split_windows(walk(), DiffusionConfig(**QUICK | {"length": 32}))[0]) == 57 * 9  # a terminal ends each
    with pytest.raises(UserError, match="use a dataset with longer episodes"):
        split_windows(walk(num_episodes=3, length=2), DiffusionConfig(**QUICK | {"windows": "whole"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 24}, "features=24 must be a multiple of 16"),
        ({"length": 3, "num_blocks": 3}, "length=3 must be at least 4"),
        ({"windows": "all"}, "windows='all' must be one of padded, whole, release"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must lie in"),
        ({"num_updates": 0}, "num_updates=0 must be greater than 0"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=f"method.diffusion.{message}"):
        DiffusionConfig(**QUICK | changes)


def test_a_training_that_diverges_says_so():
    data = walk()
    broken = dataclasses.replace(data, rewards=data.rewards * float("nan"))
    with pytest.raises(UserError, match=r"diverged; lower method\.diffusion\.learning_rate"):
        train_trajectory_diffusion(broken, DiffusionConfig(**QUICK))
