"""The dataset's rows and the rings of model rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agents.replay import Replay, transition_rows

WIDTH = 3


def rows(first: int, last: int) -> Tensor:
    """Rows [i, i, i] for first <= i < last."""
    return torch.arange(first, last, dtype=torch.float32).unsqueeze(1).expand(-1, WIDTH).clone()


def values(x: Tensor) -> list[float]:
    return sorted(x[:, 0].tolist())


def tags(first: int, last: int) -> Tensor:
    """Of rows(first, last), so that it shows whose they are."""
    return (torch.arange(first, last) % 100 + 1).to(torch.int16)


def assert_tagged(replay: Replay) -> None:
    """Every model row has the tag it came with, every row of the dataset 0."""
    for member in range(replay.num_members):
        made = replay.member_rows(member)[:, 0]
        assert torch.equal(replay.member_tags(member), (made % 100 + 1).to(torch.int16))
    assert not replay.gather_tagged(torch.arange(replay.num_real))[1].any()


@pytest.fixture
def replay() -> Replay:
    """10 real rows (0..9); rings of 6 rows for 3 members."""
    return Replay(rows(0, 10), num_members=3, capacity=6)


def test_a_row_is_s_a_r_d_next_s() -> None:
    obs, action, next_obs = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 3)
    reward, done = torch.randn(4), torch.tensor([True, False, False, True])
    joined = transition_rows(obs, action, reward, done, next_obs)
    assert joined.dtype == torch.float32
    assert torch.equal(joined[:, :3], obs)
    assert torch.equal(joined[:, 3:5], action)
    assert torch.equal(joined[:, 5], reward)
    assert joined[:, 6].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert torch.equal(joined[:, 7:], next_obs)


def test_a_full_ring_overwrites_its_oldest_rows(replay: Replay) -> None:
    replay.add(1, rows(100, 104))
    assert replay.sizes == [0, 4, 0]
    assert values(replay.member_rows(1)) == [100, 101, 102, 103]
    replay.add(1, rows(104, 109))  # wraps in the middle of these rows
    assert replay.sizes == [0, 6, 0]
    assert values(replay.member_rows(1)) == [103, 104, 105, 106, 107, 108]
    replay.add(1, rows(109, 110))
    assert values(replay.member_rows(1)) == [104, 105, 106, 107, 108, 109]
    replay.add(1, rows(200, 206))  # a ring's worth at once
    assert values(replay.member_rows(1)) == [200, 201, 202, 203, 204, 205]


def test_rings_do_not_touch_each_other_or_the_dataset(replay: Replay) -> None:
    for member in range(3):
        replay.add(member, rows(100 * member + 100, 100 * member + 105))
        replay.add(member, rows(100 * member + 105, 100 * member + 109))
    for member in range(3):
        assert values(replay.member_rows(member)) == [100 * member + 103 + i for i in range(6)]
    assert torch.equal(replay.gather(torch.arange(10).view(1, -1))[0], rows(0, 10))


def test_tags_stay_beside_their_rows(replay: Replay) -> None:
    for first, last in ((0, 4), (4, 9), (9, 10)):  # the ring wraps twice
        for member in range(3):
            replay.add(member, rows(100 * member + first + 100, 100 * member + last + 100), tags(first, last))
    assert_tagged(replay)
    g = torch.Generator().manual_seed(0)
    index = torch.stack([replay.draw_indices(m, 3, 2, 5, g) for m in range(3)])
    drawn, drawn_tags = replay.gather_tagged(index)
    assert torch.equal(drawn, replay.gather(index))
    assert tuple(drawn_tags.shape) == (3, 3, 7)
    expected = torch.where(drawn[..., 0] < 10, 0, drawn[..., 0] % 100 + 1)
    assert torch.equal(drawn_tags, expected.to(torch.int16))
    part = replay.select([2, 0])
    assert_tagged(part)
    restored = Replay(rows(0, 10), 2, 6)
    restored.load_state_dict(part.state_dict())
    assert_tagged(restored)
    for one in (part, restored):
        one.add(1, rows(104, 108), tags(4, 8))
        assert_tagged(one)


def test_rows_of_no_rollout_have_no_tag(replay: Replay) -> None:
    replay.add(0, rows(100, 103), tags(0, 3))
    replay.add(0, rows(103, 109))  # over them
    assert replay.member_tags(0).tolist() == [0] * 6


def test_more_rows_than_the_ring_holds_are_refused(replay: Replay) -> None:
    with pytest.raises(ValueError, match="7 rows do not fit a ring of 6"):
        replay.add(0, rows(0, 7))


def test_indices_point_at_real_rows_first_then_at_the_members_own(replay: Replay) -> None:
    for member, count in enumerate([6, 4, 6]):
        replay.add(member, rows(100 * member + 100, 100 * member + 100 + count))
    for member, count in enumerate([6, 4, 6]):
        index = replay.draw_indices(member, 400, 2, 5, torch.Generator().manual_seed(member))
        assert tuple(index.shape) == (400, 7)
        drawn = replay.gather(index)[..., 0]
        assert sorted(drawn[:, :2].unique().tolist()) == list(range(10))  # all of the dataset, nothing else
        own = [100 * member + 100 + i for i in range(count)]  # all of the filled part, nothing of the others
        assert sorted(drawn[:, 2:].unique().tolist()) == own
        assert drawn[:, 2:].eq(own[0]).float().mean().item() == pytest.approx(1 / count, abs=0.05)


def test_all_real_or_all_model(replay: Replay) -> None:
    replay.add(0, rows(100, 103))
    g = torch.Generator().manual_seed(0)
    assert replay.gather(replay.draw_indices(0, 50, 4, 0, g))[..., 0].max() < 10
    assert replay.gather(replay.draw_indices(0, 50, 0, 4, g))[..., 0].min() >= 100


def test_a_minibatch_has_a_block_per_member(replay: Replay) -> None:
    for member in range(3):
        replay.add(member, rows(100 * member + 100, 100 * member + 106))
    g = torch.Generator().manual_seed(0)
    index = torch.stack([replay.draw_indices(m, 1, 1, 4, g)[0] for m in range(3)])
    batch = replay.gather(index)
    assert tuple(batch.shape) == (3, 5, WIDTH)
    assert (batch[:, 1:, 0] // 100).tolist() == [[1.0] * 4, [2.0] * 4, [3.0] * 4]


def test_selected_members_keep_their_rings(replay: Replay) -> None:
    for member in range(3):
        replay.add(member, rows(100 * member + 100, 100 * member + 104))
    part = replay.select([2, 0])
    assert part.sizes == [4, 4]
    part.add(0, rows(900, 904))  # wraps where member 2's cursor was
    replay.add(2, rows(900, 904))
    assert torch.equal(part.member_rows(0), replay.member_rows(2))
    assert torch.equal(part.member_rows(1), replay.member_rows(0))
    part.add(1, rows(950, 956))
    assert values(replay.member_rows(0)) == [100, 101, 102, 103]
    assert torch.equal(part.gather(torch.arange(10).view(1, -1))[0], rows(0, 10))


def test_a_restored_replay_goes_on_as_the_first(replay: Replay) -> None:
    replay.add(0, rows(100, 106))
    replay.add(0, rows(106, 108))
    replay.add(2, rows(300, 303))
    state = replay.state_dict()
    restored = Replay(rows(0, 10), 3, 6)
    restored.load_state_dict(state)
    replay.add(0, rows(400, 405))
    restored.add(0, rows(400, 405))
    assert restored.sizes == replay.sizes == [6, 0, 3]
    for member in range(3):
        assert torch.equal(restored.member_rows(member), replay.member_rows(member))


def test_a_state_is_a_snapshot(replay: Replay) -> None:
    replay.add(0, rows(100, 106))
    state = replay.state_dict()
    replay.add(0, rows(200, 206))
    restored = Replay(rows(0, 10), 3, 6)
    restored.load_state_dict(state)
    assert values(restored.member_rows(0)) == [100, 101, 102, 103, 104, 105]
