"""Windows of a dataset, their scaling, and the transitions in sub-trajectories."""

import math

import pytest
import torch

from agents.method import TrainingData
from agents.trajectories import EpisodeRows, Trajectories, TrajectoryScaling, transitions


def stream(*episodes: tuple[int, bool]) -> TrainingData:
    """Episodes of so many transitions, each ended by a terminal or by a time limit; a state is 100 x episode + step."""
    obs: list[int] = []
    after: list[int] = []
    done: list[int] = []
    starts: list[int] = []
    for number, (length, terminated) in enumerate(episodes):
        starts.append(len(obs))
        obs += [100 * number + t for t in range(length)]
        after += [100 * number + t + 1 for t in range(length)]
        done += [0] * (length - 1) + [int(terminated)]
    n = len(obs)
    actions = torch.linspace(-0.9, 0.9, n).unsqueeze(1)
    return TrainingData(
        "Toy-v0", torch.tensor(obs).float().unsqueeze(1), actions, torch.arange(n) / 10,
        torch.tensor(after).float().unsqueeze(1), torch.tensor(done).float(), episode_starts=torch.tensor(starts),
    )  # fmt: skip


def states(windows) -> list[list[int]]:
    return sorted(windows.gather(torch.arange(len(windows))).observations.squeeze(-1).int().tolist())


def test_whole_windows_end_with_the_state_behind_the_last_transition():
    # stride 4 of the 3 + 2 starts 0 1 2 | 100 101: 0 and 101; the starts 0, 100; the terminal end 2..5
    windows = EpisodeRows.from_data(stream((5, True), (4, False))).windows(4, "whole", stride=4)
    assert states(windows) == [[0, 1, 2, 3], [2, 3, 4, 5], [100, 101, 102, 103], [101, 102, 103, 104]]
    assert windows.counts == {"strided": 2, "start": 1, "terminal_end": 1}
    rows = windows.gather(torch.arange(len(windows)))
    ended = rows.observations[:, 0, 0] == 2
    assert rows.terminals[ended].tolist() == [[0, 0, 1, 0]]
    assert not rows.terminals[~ended].any()  # a time limit is no terminal


def test_padded_windows_have_terminals_in_any_row_and_hold_short_episodes():
    windows = EpisodeRows.from_data(stream((2, True), (3, False), (1, False)), 3).windows(4, "padded", stride=1)
    # an episode that a time limit ends is as long as in whole windows
    assert states(windows) == [[0, 1, 2, 2], [1, 2, 2, 2], [100, 101, 102, 103]]
    rows = windows.gather(torch.arange(len(windows)))
    terminals = {int(obs[0, 0]): done.tolist() for obs, done in zip(rows.observations, rows.terminals, strict=True)}
    assert terminals == {0: [0, 1, 1, 1], 1: [1, 1, 1, 1], 100: [0, 0, 0, 0]}
    kept = transitions(rows)[1]
    assert kept.sum(1).tolist() == [2, 1, 3]  # what stands behind a terminal is no transition
    assert windows.coverage == pytest.approx(5 / 6)


def test_padded_windows_hold_every_transition_of_an_episode_with_a_terminal_equally_often():
    data = stream(*((n, True) for n in (40, 13, 25)))
    windows = EpisodeRows.from_data(data, 7).windows(8, "padded", stride=1)
    assert len(windows) == 40 + 13 + 25  # one begins with each
    rows, kept = transitions(windows.gather(torch.arange(len(windows))))
    # but for the first of an episode, which fewer windows reach
    terminals = rows[..., 3][kept]
    later = rows[..., 0][kept] % 100 >= 6
    assert terminals.sum() == 7 * 3
    assert later.sum() == 7 * (40 + 13 + 25 - 3 * 6)


def test_release_windows_have_terminals_in_their_last_row_and_none_ends_at_a_time_limit():
    # starts 0 1 | 100 101 | 200 201 202: of every second of them, 0 100 200 202, the last ends at a time limit
    windows = EpisodeRows.from_data(stream((5, True), (5, False), (6, False))).windows(4, "release", stride=2)
    assert states(windows) == [[0, 1, 2, 3], [1, 2, 3, 4], [100, 101, 102, 103], [200, 201, 202, 203]]
    assert windows.counts == {"strided": 3, "start": 0, "terminal_end": 1}
    rows = windows.gather(torch.arange(len(windows)))
    assert not rows.terminals[:, :-1].any()
    assert rows.terminals[:, -1].sum() == 1
    assert not transitions(rows)[0][..., 1 + 1 + 1].any()  # which is why nothing that ends is learned


@pytest.mark.parametrize("rule", ["whole", "release"])
def test_no_window_leaves_its_episode(rule):
    lengths = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = EpisodeRows.from_data(stream(*((n, n % 3 > 0) for n in lengths))).windows(8, rule, stride=1)
    obs = windows.gather(torch.arange(len(windows))).observations.squeeze(-1)
    assert torch.equal(obs, obs[:, :1] + torch.arange(8.0))
    if rule == "whole":
        assert len(windows) == sum(max(n + 1 - 8 + 1, 0) for n in lengths)
        inside = sum(n for n in lengths if n + 1 >= 8)
        assert windows.coverage == pytest.approx(inside / sum(lengths))


def test_episodes_can_be_held_out():
    rows = EpisodeRows.from_data(stream((5, True), (6, True), (7, True)))
    train, held = rows.windows(4, stride=1, episodes=torch.tensor([0, 2])), rows.windows(4, episodes=torch.tensor([1]))
    assert {row[0] // 100 for row in states(train)} == {0, 2}
    assert {row[0] // 100 for row in states(held)} == {1}


def test_a_window_of_the_data_gives_back_its_transitions():
    data = stream((5, True))
    windows = EpisodeRows.from_data(data).windows(6)
    rows, mask = transitions(windows.gather(torch.zeros(1, dtype=torch.int64)))
    whole = torch.cat((
        data.observations, data.actions, data.rewards.unsqueeze(1), data.terminals.unsqueeze(1), data.next_observations,
    ), 1)  # fmt: skip
    assert torch.equal(rows[0], whole)
    assert mask.all()


def test_nothing_behind_a_terminal_is_a_transition():
    done = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    obs, action = torch.zeros(3, 4, 2), torch.zeros(3, 4, 1)
    _, mask = transitions(Trajectories(obs, action, torch.zeros(3, 4), done))
    assert mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]


def test_scaling_standardises_what_windows_hold():
    data = stream((9, True), (12, False), (30, True))
    windows = EpisodeRows.from_data(data).windows(4, stride=3)
    scaling = TrajectoryScaling.fit(windows)
    held = windows.gather(torch.arange(len(windows)))
    x = scaling.encode(held)
    std, mean = torch.std_mean(x.reshape(-1, x.shape[-1])[:, [0, 3]], 0, correction=0)
    assert torch.allclose(mean, torch.zeros(2), atol=1e-5)
    assert torch.allclose(std, torch.ones(2), atol=1e-5)
    p = held.terminals.mean()
    assert x[..., -1].max() == pytest.approx(math.sqrt((1 - p) / p), rel=1e-4)
    back = scaling.decode(x)
    for mine, theirs in zip(back, held, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4)
    assert torch.equal(scaling.observations(x), back.observations)
    assert torch.equal(scaling.pre_tanh_actions(x).tanh(), back.actions)


@pytest.mark.parametrize(("scale", "values"), [("raw", [0, 1]), ("bounded", [-1, 1])])
def test_terminals_in_another_scale_come_back(scale, values):
    windows = EpisodeRows.from_data(stream((9, True), (12, False))).windows(4)
    scaling = TrajectoryScaling.fit(windows, scale)
    held = windows.gather(torch.arange(len(windows)))
    x = scaling.encode(held)
    assert x[..., -1].unique().tolist() == values
    assert torch.equal(scaling.decode(x).terminals, held.terminals)


def test_a_constant_channel_is_left_as_it_is():
    data = stream((9, False), (12, False))
    scaling = TrajectoryScaling.fit(EpisodeRows.from_data(data).windows(4))
    assert scaling.terminal_std == 1
    assert scaling.encode(EpisodeRows.from_data(data).windows(4).gather(torch.tensor([0])))[..., -1].abs().max() == 0


def test_a_saturated_action_stays_finite():
    data = stream((9, True))
    data.actions[::2] = 1.0
    windows = EpisodeRows.from_data(data).windows(4)
    scaling = TrajectoryScaling.fit(windows)
    x = scaling.encode(windows.gather(torch.arange(len(windows))))
    assert x.isfinite().all()
    assert scaling.decode(x).actions.max() == pytest.approx(0.999)
    assert TrajectoryScaling.from_state_dict(scaling.state_dict()).encode(scaling.decode(x)).allclose(x, atol=1e-3)
