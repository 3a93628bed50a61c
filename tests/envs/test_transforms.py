from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.dataset import COLUMNS, Dataset
from envs.transforms import (
    FOLLOWING_ROW,
    RETURN_RANGE,
    STD_OFFSET,
    Options,
    Request,
    Term,
    TransformError,
    apply,
    base_name,
    parse,
)


def made(name: str, lengths: list[int], start: float = 0.0) -> Dataset:
    """Row i has observation [start + i, 1], reward start + i; episodes of these lengths end by a timeout."""
    n = sum(lengths)
    number = start + np.arange(n, dtype=np.float32)
    observations = np.stack([number, np.ones(n, np.float32)], axis=1)
    ends = np.isin(np.arange(n), np.cumsum(lengths) - 1)
    return Dataset(name, "Hopper-v4", observations, observations, number, observations + 1, np.zeros(n, bool), ends)


def asked(name: str, *parts: Dataset) -> Dataset:
    return apply(parse(name), parts)


def rows(data: Dataset) -> list[float]:
    return data.rewards.tolist()


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("hopper-medium-v2", Request((Term("hopper-medium-v2"),), Options())),
        ("mujoco/hopper/medium-v0", Request((Term("mujoco/hopper/medium-v0"),), Options())),
        ("a:0.5+b:2000", Request((Term("a", 0.5), Term("b", 2000.0)), Options())),
        ("a,first=10,seed=4,subsample=0.25", Request((Term("a"),), Options(first=10, seed=4, subsample=0.25))),
        (
            f"a,normalize=observations,reward_scale={RETURN_RANGE},reward_shift=-1",
            Request((Term("a"),), Options(normalize="observations", reward_scale=RETURN_RANGE, reward_shift=-1.0)),
        ),
    ],
)
def test_names_are_taken_apart_and_have_one_spelling(name: str, request_: Request):
    assert parse(name) == request_
    assert parse(str(request_)) == request_


def test_one_spelling():
    assert (
        str(parse("a:0.50 + b:1e3, seed=2,subsample=0.10,first=100")) == "a:0.5+b:1000,first=100,subsample=0.1,seed=2"
    )
    assert parse("a").plain
    assert not parse("a,first=3").plain


def test_a_path_is_a_path_whatever_it_holds(tmp_path: Path):
    path = tmp_path / "a+b:0.5,first=3.hdf5"
    path.write_text("")
    assert parse(str(path)) == Request((Term(str(path)),), Options())


def test_settings_are_looked_up_by_the_source():
    assert base_name("hopper-medium-v2:0.1,reward_scale=2") == "hopper-medium-v2"
    assert base_name("a+b") == "a+b"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a,frist=10", "'frist=10' is no option; nearest: first"),
        ("a,first", "'first' is no option"),
        ("a,first=0", "at least 1"),
        ("a,first=x", "first=x is not possible"),
        ("a,first=1,first=2", "given twice"),
        ("a:1.5+b", "amount '1.5' of a"),
        ("a:-1", "amount '-1' of a"),
        ("a+", "names no source"),
        ("a,subsample=0", "subsample=0 is not possible"),
        ("a,seed=3", "seed has no effect"),
        ("a,reward_scale=0", "must not be 0"),
        ("a,reward_scale=big", f"a number or {RETURN_RANGE}"),
        ("a,reward_shift=nan", "must be finite"),
        ("a,normalize=rewards", "only observations"),
        ("a,next_observations=true", f"can only be {FOLLOWING_ROW}"),
    ],
)
def test_what_does_not_exist_is_said(name: str, sentence: str):
    with pytest.raises(TransformError, match=sentence):
        parse(name)


def test_first_rows_and_the_cut_is_a_timeout():
    data = asked("a,first=5", made("a", [3, 4, 3]))
    assert rows(data) == [0, 1, 2, 3, 4]
    assert data.timeouts.tolist() == [False, False, True, False, True]
    with pytest.raises(TransformError, match="first=11: 'a' has only 10 rows"):
        asked("a,first=11", made("a", [3, 4, 3]))


def test_a_terminal_at_a_cut_stays_a_terminal():
    whole = made("a", [3, 3])
    whole = replace(whole, terminals=whole.timeouts, timeouts=np.zeros(6, bool))
    data = asked("a,first=3", whole)
    assert data.terminals.tolist() == [False, False, True]
    assert not data.timeouts.any()


@pytest.mark.parametrize("seed", range(4))
def test_a_subsample_is_made_of_whole_trajectories_in_file_order(seed: int):
    whole = made("a", [5] * 20)
    data = asked(f"a,subsample=0.33,seed={seed}", whole)
    assert data.num_transitions == 33
    assert rows(data) == sorted(rows(data))
    assert sorted(data.episodes.lengths.tolist()) == [3] + [5] * 6
    assert (data.rewards[data.episodes.starts] % 5 == 0).all()  # each from its start
    assert asked(f"a,subsample=33,seed={seed}", whole).content_hash == data.content_hash


def test_other_seeds_draw_other_trajectories():
    whole = made("a", [5] * 20)
    assert len({asked(f"a,subsample=0.3,seed={seed}", whole).content_hash for seed in range(4)}) == 4


def with_states(data: Dataset) -> Dataset:
    """The state of row i is its reward, twice."""
    return replace(data, states=np.repeat(data.rewards[:, None].astype(np.float64), 2, axis=1))


@pytest.mark.parametrize("options", ["", ",first=7", ",subsample=0.5", ",normalize=observations", ":0.5+b:3,first=6"])
def test_states_go_with_their_rows(options):
    parts = [with_states(made("a", [5, 4, 3])), with_states(made("b", [4], start=100))]
    data = asked(f"a{options}", *parts[: 1 + ("+b" in options)])
    assert data.states is not None
    np.testing.assert_array_equal(data.states, np.repeat(data.rewards[:, None], 2, axis=1))
    assert "states" not in data.provenance


def test_a_mix_with_rows_without_states_has_none_and_says_so():
    data = asked("a+b", with_states(made("a", [3])), made("b", [4]))
    assert data.states is None
    assert data.provenance["states"] == "left out: there are none of b"


def test_a_mix_of_whole_sets_is_their_concatenation():
    a, b = made("a", [3, 2]), made("b", [4], start=100)
    open_end = replace(a, timeouts=np.isin(np.arange(5), [2]))
    data = asked("a+b", open_end, b)
    for column in COLUMNS:
        if column != "timeouts":
            np.testing.assert_array_equal(
                getattr(data, column), np.concatenate([getattr(a, column), getattr(b, column)])
            )
    assert np.flatnonzero(data.timeouts).tolist() == [2, 4, 8]  # a's last episode does not go on in b
    assert data.name == "a+b"
    assert [part["content_hash"] for part in data.provenance["parts"]] == [open_end.content_hash, b.content_hash]


def test_shares_are_of_each_sets_own_rows():
    data = asked("a:0.5+b:0.1+c:3", made("a", [5] * 4), made("b", [5] * 40, 1000), made("c", [3] * 4, 5000))
    parts = [
        sum(r < 1000 for r in rows(data)),
        sum(1000 <= r < 5000 for r in rows(data)),
        sum(r >= 5000 for r in rows(data)),
    ]
    assert parts == [10, 20, 3]
    with pytest.raises(TransformError, match="b: 300 rows are asked for, 'b' has 200"):
        asked("a+b:300", made("a", [5]), made("b", [5] * 40))


def test_sets_of_different_environments_are_not_mixed():
    other = replace(made("b", [4]), env_id="Walker2d-v4")
    with pytest.raises(TransformError, match=r"mixes the environments Hopper-v4, Walker2d-v4"):
        asked("a+b", made("a", [3]), other)


def test_rewards_in_other_units_and_returns_in_the_environments():
    whole = made("a", [2, 3])
    data = asked("a,reward_scale=0.5,reward_shift=-1", whole)
    np.testing.assert_allclose(data.rewards, whole.rewards * 0.5 - 1)
    np.testing.assert_allclose(data.episode_returns(), whole.episode_returns())
    assert data.summary()["score"] == pytest.approx(whole.summary()["score"])
    again = apply(parse("b,reward_scale=2,reward_shift=3"), [data])
    np.testing.assert_allclose(again.scaling.rewards(again.rewards), whole.rewards, atol=1e-6)


def test_return_range_is_iqls_scale():
    whole = made("a", [2, 3])  # returns 0 + 1 and 2 + 3 + 4
    data = asked(f"a,reward_scale={RETURN_RANGE}", whole)
    np.testing.assert_allclose(data.rewards, whole.rewards * 1000 / 8)
    with pytest.raises(TransformError, match="no two complete episodes"):
        asked(f"a,reward_scale={RETURN_RANGE}", made("a", [4]))


def test_normalized_observations(dataset: Dataset):
    data = apply(parse("small,normalize=observations"), [dataset])
    mean, std = dataset.observations.mean(0), dataset.observations.std(0) + STD_OFFSET
    np.testing.assert_allclose(data.observations, (dataset.observations - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data.next_observations, (dataset.next_observations - mean) / std, rtol=1e-4)
    kept_mean, kept_std = data.scaling.observation_mean, data.scaling.observation_std
    assert kept_mean is not None
    assert kept_std is not None
    np.testing.assert_allclose(kept_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(kept_std, std, rtol=1e-5)


def qlearning_rows(data: Dataset) -> list[tuple[float, float, bool]]:
    """Reward, first entry of the next observation and terminal of d4rl.qlearning_dataset's rows: one after the other,
    but for the last of the file and those at a time limit, with the observation of the row behind it."""
    n = data.num_transitions
    return [
        (float(data.rewards[i]), float(data.observations[i + 1, 0]), bool(data.terminals[i]))
        for i in range(n - 1)
        if not data.timeouts[i]
    ]


def test_next_observations_of_the_following_row_are_d4rls():
    """Episodes of 3 (falls), 4 (out of time), 2 (falls) and 3 rows, the last one cut by the end of the file. A true
    next observation is half a step on; the next row's is a whole one."""
    whole = made("a", [3, 4, 2, 3])
    ends = np.flatnonzero(whole.timeouts)
    whole = replace(
        whole, terminals=np.isin(np.arange(12), ends[[0, 2]]), timeouts=np.isin(np.arange(12), ends[1:2]),
        next_observations=whole.observations + np.float32(0.5),
    )  # fmt: skip
    data = asked(f"a,next_observations={FOLLOWING_ROW}", whole)
    mine = list(zip(rows(data), data.next_observations[:, 0].tolist(), data.terminals.tolist(), strict=True))
    assert mine == qlearning_rows(whole)
    assert mine[2] == (2.0, 3.0, True)  # where it fell it seems to stand up
    assert data.episodes.lengths.tolist() == [3, 3, 2, 2]
    assert asked("a,first=12", whole).next_observations[2, 0] == 2.5  # by default what came of it
    for name in (f"a,first=5,next_observations={FOLLOWING_ROW}", f"a:5,next_observations={FOLLOWING_ROW}"):
        assert asked(name, whole).num_transitions == 5  # of the rows that are left
    with pytest.raises(TransformError, match="no row that another one follows"):
        asked(f"b,next_observations={FOLLOWING_ROW}", made("b", [1, 1]))


def test_all_that_is_asked_for_is_part_of_the_hash(dataset: Dataset):
    names = ["small", "small,first=9", "small,first=8", "small,reward_scale=2", "small,reward_shift=2", "small:0.5",
             "small,normalize=observations", f"small,next_observations={FOLLOWING_ROW}",
             "small,reward_scale=2,reward_shift=2"]  # fmt: skip
    hashes = {apply(parse(name), [dataset]).content_hash for name in names}
    assert len(hashes) == len(names)
    zero: dict[str, Any] = {"rewards": np.zeros_like(dataset.rewards)}
    still = replace(dataset, **zero)
    assert apply(parse("small,reward_scale=2"), [still]).content_hash != still.content_hash  # by its units alone
