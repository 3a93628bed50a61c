import json

import numpy as np
import pytest

from envs.dataset import Dataset, DatasetError
from envs.errors import UserError


def build(columns: dict[str, np.ndarray], **changes: object) -> Dataset:
    return Dataset("d", "Hopper-v4", **{**columns, **changes})  # type: ignore[arg-type]


def test_columns_become_contiguous_float32_and_bool(columns):
    wide = np.asfortranarray(columns["observations"].astype(np.float64))
    dataset = build(columns, observations=wide, terminals=columns["terminals"].astype(np.uint8))
    assert dataset.observations.dtype == np.float32
    assert dataset.observations.flags.c_contiguous
    assert dataset.terminals.dtype == np.bool_
    np.testing.assert_array_equal(dataset.observations, columns["observations"])
    assert (dataset.num_transitions, dataset.observation_dim, dataset.action_dim) == (10, 3, 2)


def test_hash_depends_on_every_value_and_not_on_the_name(columns):
    original = build(columns)
    assert original.content_hash == Dataset("other", "Walker2d-v4", **columns).content_hash
    hashes = {original.content_hash}
    for column, values in columns.items():
        changed = values.copy()
        changed[-1] = ~changed[-1] if values.dtype == bool else changed[-1] + 1
        hashes.add(build(columns, **{column: changed}).content_hash)
    assert len(hashes) == 1 + len(columns)


def test_states_are_checked_and_not_part_of_the_hash(columns):
    states = np.arange(40, dtype=np.float32).reshape(10, 4)
    dataset = build(columns, states=states)
    assert dataset.states is not None
    assert dataset.states.dtype == np.float64
    np.testing.assert_array_equal(dataset.states, states)
    assert dataset.content_hash == build(columns).content_hash
    assert (dataset.summary()["states"], build(columns).summary()["states"]) == (True, False)
    with pytest.raises(DatasetError, match=r"states are float32 of shape \(9, 4\), numbers of shape \(10, entries\)"):
        build(columns, states=states[:9])
    with pytest.raises(DatasetError, match="states are not finite at row 3"):
        build(columns, states=np.where(states == 13, np.nan, states))


def test_hash_is_the_same_for_another_memory_layout(columns):
    reordered = np.asfortranarray(columns["observations"].astype(np.float64))
    assert build(columns, observations=reordered).content_hash == build(columns).content_hash


def test_episodes_and_returns_leave_out_the_cut_one(dataset):
    episodes = dataset.episodes
    assert episodes.starts.tolist() == [0, 4, 8]
    assert episodes.ends.tolist() == [4, 8, 10]
    assert episodes.complete.tolist() == [True, True, False]
    assert episodes.lengths.tolist() == [4, 4, 2]
    assert dataset.episode_returns().tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7]


def test_last_episode_is_complete_when_its_row_says_so(columns):
    timeouts = columns["timeouts"].copy()
    timeouts[-1] = True
    dataset = build(columns, timeouts=timeouts)
    assert dataset.episodes.complete.all()
    assert dataset.episode_returns()[-1] == 8 + 9


def test_summary_is_json_and_scores_the_mean_return(dataset):
    summary = dataset.summary()
    json.dumps(summary)
    assert (summary["rows"], summary["episodes"], summary["complete_episodes"]) == (10, 3, 2)
    assert (summary["terminals"], summary["timeouts"]) == (1, 1)
    assert (summary["return_mean"], summary["return_min"], summary["return_max"]) == (14.0, 6.0, 22.0)
    # Hopper's D4RL pair, by hand.
    assert summary["score"] == pytest.approx(100 * (14 + 20.272305) / (3234.3 + 20.272305))
    assert summary["content_hash"] == dataset.content_hash


def test_summary_without_complete_episodes_or_reference(columns):
    none = np.zeros(10, dtype=bool)
    summary = Dataset("d", "Unknown-v0", **{**columns, "terminals": none, "timeouts": none}).summary()
    assert summary["complete_episodes"] == 0
    assert summary["return_mean"] is None
    assert summary["score"] is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_not_finite_names_column_row_and_entry(columns, bad):
    actions = columns["actions"].astype(np.float64)
    actions[[6, 8], 1] = bad
    with pytest.raises(DatasetError, match=r"'actions' is .* at row 6, entry 1 \(the first of 2"):
        build(columns, actions=actions)


def test_infinities_of_both_signs_do_not_cancel(columns):
    rewards = columns["rewards"].copy()
    rewards[2], rewards[3] = np.inf, -np.inf
    with pytest.raises(DatasetError, match=r"'rewards' is inf at row 2 "):
        build(columns, rewards=rewards)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("observations", np.zeros((0, 3)), "different numbers of rows .*observations 0"),
        ("actions", np.zeros((9, 2)), "different numbers of rows .*actions 9"),
        ("rewards", np.zeros((10, 1)), r"'rewards' has shape \(10, 1\), it must be 1-D"),
        ("next_observations", np.zeros((10, 4)), "observations are 3 wide, next_observations 4"),
        ("actions", np.zeros((10, 0)), "'actions' has no entries"),
        ("actions", np.array([["a", "b"]] * 10), "'actions' holds <U1, numbers"),
        ("terminals", np.full(10, 2), r"'terminals' .* must hold true/false"),
        ("timeouts", np.zeros((10, 1), dtype=bool), r"'timeouts' has shape \(10, 1\)"),
    ],
)
def test_bad_columns_are_refused(columns, column, value, message):
    with pytest.raises(UserError, match=message):
        build(columns, **{column: value})


def test_no_rows_is_refused(columns):
    with pytest.raises(DatasetError, match="has no rows"):
        build({column: values[:0] for column, values in columns.items()})
