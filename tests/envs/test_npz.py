from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.dataset import COLUMNS, DatasetError
from envs.errors import UserError
from envs.npz import NpzError, read_npz

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


def save(path: Path, columns: dict[str, Any], **more: Any) -> Path:
    np.savez(path, **columns, **more)
    return path


def renamed(columns: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(column, column): values for column, values in columns.items()}


def without(columns: dict[str, Any], *names: str) -> dict[str, Any]:
    return {column: values for column, values in columns.items() if column not in names}


def test_d4rl_names_and_the_file_s_own_name_and_environment(columns, tmp_path):
    path = save(tmp_path / "set.npz", columns, name="mine", env_id="Hopper-v5", infos=np.zeros(3))
    data = read_npz(path)
    assert (data.name, data.env_id) == ("mine", "Hopper-v5")
    for column, values in columns.items():
        np.testing.assert_array_equal(getattr(data, column), values.astype(getattr(data, column).dtype))
    assert read_npz(path, name="other", env_id="Hopper-v4").env_id == "Hopper-v4"


@pytest.mark.parametrize(
    "names",
    [
        {"observations": "obs", "actions": "action", "rewards": "reward", "next_observations": "next_obs"},
        {"next_observations": "next_observation", "terminals": "terminal", "timeouts": "timeout"},
        {"terminals": "terminations", "timeouts": "truncations"},
        {"terminals": "terminated", "timeouts": "truncated"},
        {"terminals": "done", "timeouts": "truncation"},
    ],
)
def test_other_common_names(columns, tmp_path, names):
    expected = read_npz(save(tmp_path / "Hopper-v4.npz", columns))
    data = read_npz(save(tmp_path / "Hopper-v4.npz", renamed(columns, **names)))
    assert data.content_hash == expected.content_hash


def test_columns_of_one_entry_per_row_may_have_a_second_axis(columns, tmp_path):
    tall = {c: values[:, None] if values.ndim == 1 else values for c, values in columns.items()}
    expected = read_npz(save(tmp_path / "Hopper-v4.npz", columns))
    assert read_npz(save(tmp_path / "Hopper-v4.npz", tall)).content_hash == expected.content_hash


def test_two_names_for_one_column(columns, tmp_path):
    twice = {**renamed(columns, observations="obs"), "observation": columns["observations"]}
    with pytest.raises(NpzError, match=r"both 'observation' and 'obs'"):
        read_npz(save(tmp_path / "Hopper-v4.npz", twice))
    # D4RL's own name goes before others.
    data = read_npz(save(tmp_path / "Hopper-v4.npz", {**columns, "obs": columns["observations"] + 1}))
    np.testing.assert_array_equal(data.observations, columns["observations"])


def test_done_at_a_time_limit_is_no_terminal(columns, tmp_path):
    done = renamed({**columns, "terminals": columns["terminals"] | columns["timeouts"]}, terminals="dones")
    data = read_npz(save(tmp_path / "Hopper-v4.npz", done))
    np.testing.assert_array_equal(data.terminals, columns["terminals"])
    assert "without the 1 rows that 'timeouts' marks as cut" in data.provenance["terminals"]
    undecided = read_npz(save(tmp_path / "Hopper-v4.npz", without(done, "timeouts")))
    assert "may be set at time limits too" in undecided.provenance["terminals"]


def test_states_under_d4rl_s_names(hopping, tmp_path):
    columns = {column: getattr(hopping, column) for column in COLUMNS}
    positions, velocities = np.split(hopping.states, 2, axis=1)
    path = tmp_path / "hopping_Hopper-v5.npz"
    np.savez(path, **columns, **{"infos/qpos": positions, "infos/qvel": velocities})
    np.testing.assert_array_equal(read_npz(path).states, hopping.states)


def test_episode_lengths_in_place_of_timeouts(columns, tmp_path):
    lengths = np.array([4, 4, 2])
    data = read_npz(save(tmp_path / "Hopper-v4.npz", without(columns, "timeouts"), episode_lengths=lengths))
    assert np.flatnonzero(data.terminals).tolist() == [3]
    assert np.flatnonzero(data.timeouts).tolist() == [7, 9]
    with pytest.raises(NpzError, match="add up to the 10 rows"):
        read_npz(save(tmp_path / "Hopper-v4.npz", without(columns, "timeouts"), episode_lengths=lengths[:2]))


@pytest.mark.parametrize(
    ("stem", "env_id"),
    [
        ("expert_data_Hopper-v4", "Hopper-v4"),
        ("HalfCheetah-v5_seed0", "HalfCheetah-v5"),
        ("hopper_medium-v2", "Hopper-v4"),
        ("MyModel-v2_Walker2d-v4", "Walker2d-v4"),
        ("MyModel-v2_Nothing-v4", None),
        ("Hopper-v4_to_Walker2d-v4", None),
    ],
)
def test_environment_from_the_file_name(columns, tmp_path, stem, env_id):
    path = save(tmp_path / f"{stem}.npz", columns)
    if env_id:
        assert read_npz(path).env_id == env_id
    else:
        with pytest.raises(NpzError, match="which environment"):
            read_npz(path)


def test_unusable_files_are_one_sentence(columns, tmp_path):
    path = save(tmp_path / "Hopper-v4.npz", columns)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[200:260] = bytes(60)
    pickled = np.empty(10, dtype=object)
    for bad in (b"", content[:-500], content[:100], b"<html>404</html>", bytes(damaged)):
        path.write_bytes(bad)
        with pytest.raises(NpzError, match=r"cannot be read as \.npz") as caught:
            read_npz(path)
        assert "\n" not in str(caught.value)
    save(path, {**columns, "rewards": pickled})
    with pytest.raises(NpzError, match="holds Python objects"):
        read_npz(path)
    with open(path, "wb") as file:
        np.save(file, columns["rewards"])
    with pytest.raises(NpzError, match="single array"):
        read_npz(path)
    with pytest.raises(NpzError, match="there is no dataset file"):
        read_npz(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "no column 'rewards'; present are actions, next_observations"),
        ({"terminals": None}, "no column 'terminals'"),
        ({"timeouts": None, "next_observations": None}, "neither 'next_observations' nor 'timeouts'"),
        ({"rewards": np.zeros(9)}, "rewards 9"),
        ({"actions": np.array([["a", "b"]] * 10)}, "'actions' holds <U1"),
        ({"timeouts": None, "next_observations": np.zeros((10, 4))}, "observations are 3 wide, next_observations 4"),
        ({"next_observations": None, "terminals": np.full(10, 7)}, "'terminals' .* must hold true/false"),
        ({"observations": np.zeros(10)}, r"'observations' has shape \(10,\)"),
        ({"actions": np.full((10, 2), np.nan)}, "'actions' is nan at row 0"),
    ],
)
def test_bad_columns_are_refused(columns, tmp_path, change, message):
    changed = {column: values for column, values in (columns | change).items() if values is not None}
    with pytest.raises(UserError, match=message):
        read_npz(save(tmp_path / "Hopper-v4.npz", changed))


@needs_shared
@pytest.mark.parametrize(
    ("robot", "observation_dim", "mean_return"),
    [("Hopper", 11, 3717.5), ("HalfCheetah", 17, 4034.8), ("Walker2d", 17, 5383.3), ("Ant", 27, 4681.9)],
)
def test_real_expert_files(robot, observation_dim, mean_return):
    data = read_npz(SHARED / "berkeley_experts" / f"expert_data_{robot}-v4.npz")
    assert (data.env_id, data.num_transitions, data.observation_dim) == (f"{robot}-v4", 2000, observation_dim)
    assert np.flatnonzero(data.timeouts).tolist() == [999, 1999]
    assert data.episode_returns().mean() == pytest.approx(mean_return, abs=0.1)


@needs_shared
def test_real_demonstrations_without_ends_and_successors():
    path = SHARED / "adroit_door_human" / "door-v0_demos.npz"
    data = read_npz(path, env_id="AdroitHandDoor-v1")
    assert len(data.episodes) == 25
    assert data.num_transitions == 6729 - 25
    assert not data.terminals.any()
    assert {"terminals", "timeouts", "next_observations"} <= set(data.provenance)
    follows = (data.next_observations[:-1] == data.observations[1:]).all(axis=1)
    np.testing.assert_array_equal(follows, ~data.timeouts[:-1])
    with pytest.raises(NpzError, match="which environment"):
        read_npz(path)


def test_same_checks_as_the_dataset_s(columns, tmp_path):
    infinite = columns["observations"].astype(np.float64)
    infinite[2, 1] = 1e300
    with pytest.raises(DatasetError, match="row 2, entry 1"):
        read_npz(save(tmp_path / "Hopper-v4.npz", {**columns, "observations": infinite}))
