import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from envs.dataset import COLUMNS, Dataset
from envs.errors import UserError
from envs.files import DiskFullError
from envs.hdf5 import Hdf5Error, check_writable, read_hdf5, write_hdf5


def write_columns(path: Path, columns: dict[str, np.ndarray], **attributes: str) -> Path:
    with h5py.File(path, "w") as file:
        for column, values in columns.items():
            file[column] = values
        for key, value in attributes.items():
            file.require_group("metadata").attrs[key] = value
    return path


def without(columns: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {column: values for column, values in columns.items() if column not in names}


def test_round_trip_keeps_everything(dataset, tmp_path):
    path = tmp_path / "new" / "set.hdf5"
    write_hdf5(dataset, path)
    back = read_hdf5(path)
    assert back.content_hash == dataset.content_hash
    assert (back.name, back.env_id, back.provenance) == (dataset.name, dataset.env_id, dataset.provenance)
    assert [item.name for item in path.parent.iterdir()] == ["set.hdf5"]
    assert read_hdf5(path, name="mine", env_id="Hopper-v5").name == "mine"


def test_file_has_d4rl_columns(dataset, tmp_path):
    write_hdf5(dataset, tmp_path / "set.hdf5")
    with h5py.File(tmp_path / "set.hdf5") as file:
        assert set(COLUMNS) | {"metadata"} == set(file)
        assert file["observations"].shape == (10, 3)


def test_a_failed_write_leaves_the_old_file(dataset, columns, tmp_path, monkeypatch):
    path = tmp_path / "set.hdf5"
    write_hdf5(dataset, path)
    other = Dataset("x", "Hopper-v4", **{**columns, "rewards": columns["rewards"] + 1})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(DiskFullError, match="No space left"):
        write_hdf5(other, path)
    assert read_hdf5(path).content_hash == dataset.content_hash
    assert list(tmp_path.iterdir()) == [path]


def test_d4rl_file_is_read_as_it_is(columns, tmp_path):
    flags = {name: columns[name].astype(np.float32) for name in ("terminals", "timeouts")}
    path = write_columns(tmp_path / "hopper_medium_replay-v2.hdf5", {**columns, **flags}, algorithm="SAC")
    with h5py.File(path, "a") as file:
        file["infos/qpos"] = np.zeros((10, 6))
        file["metadata/policy/fc0/weight"] = np.zeros((4, 4))
        file["metadata/iteration"] = np.array(7)
    dataset = read_hdf5(path)
    assert (dataset.name, dataset.env_id) == ("hopper_medium_replay-v2", "Hopper-v4")
    np.testing.assert_array_equal(dataset.next_observations, columns["next_observations"])
    np.testing.assert_array_equal(dataset.timeouts, columns["timeouts"])
    assert dataset.provenance["metadata"] == {"algorithm": "SAC", "iteration": 7}


def test_states_are_written_under_d4rl_s_names_and_read_again(hopping, tmp_path):
    path = tmp_path / "set.hdf5"
    write_hdf5(hopping, path)
    with h5py.File(path) as file:
        assert file["infos/qpos"].shape == file["infos/qvel"].shape == (150, 6)
        np.testing.assert_array_equal(file["infos/qpos"][:, 1:].astype(np.float32), hopping.observations[:, :5])
    back = read_hdf5(path)
    np.testing.assert_array_equal(back.states, hopping.states)
    assert back.provenance == hopping.provenance
    assert replace(back, states=None).content_hash == back.content_hash == hopping.content_hash
    assert read_hdf5(path, env_id="Ant-v5").states is None


def test_states_follow_the_rows_that_are_kept(hopping, tmp_path):
    path = tmp_path / "set.hdf5"
    write_hdf5(hopping, path)
    with h5py.File(path, "a") as file:
        del file["next_observations"]
    kept = ~(hopping.terminals | hopping.timeouts)
    np.testing.assert_array_equal(read_hdf5(path).states, hopping.states[kept])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda states: np.roll(states, 1, axis=0), "they do not show the observation of row 0"),
        (lambda states: np.where(np.arange(150)[:, None] == 99, np.nan, states), "the observation of row 99"),
        (lambda states: states[:-1], r"shapes \(149, 6\) and \(149, 6\), not \(150, 6\) each"),
    ],
)
def test_states_that_are_not_those_of_the_rows_are_left_out(hopping, tmp_path, change, reason):
    path = tmp_path / "set.hdf5"
    write_hdf5(replace(hopping, states=None), path)
    with h5py.File(path, "a") as file:
        file["infos/qpos"], file["infos/qvel"] = np.split(change(hopping.states), 2, axis=1)
    back = read_hdf5(path)
    assert back.states is None
    assert re.search(reason, back.provenance["states"])
    assert back.content_hash == hopping.content_hash


def test_states_of_another_robot_are_not_written(dataset, tmp_path):
    with pytest.raises(Hdf5Error, match="its 4 states per row are not qpos and qvel of 'Hopper-v4'"):
        write_hdf5(replace(dataset, states=np.ones((10, 4))), tmp_path / "set.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_missing_next_observations_never_come_from_another_episode(columns, tmp_path):
    path = write_columns(tmp_path / "s.hdf5", without(columns, "next_observations"), env_id="Hopper-v4")
    dataset = read_hdf5(path)
    kept = [0, 1, 2, 4, 5, 6, 8]
    np.testing.assert_array_equal(dataset.observations, columns["observations"][kept])
    np.testing.assert_array_equal(dataset.next_observations, columns["next_observations"][kept])
    # The episodes stay apart, although the rows that ended them are gone.
    assert np.flatnonzero(dataset.timeouts).tolist() == [2, 5, 6]
    assert not dataset.terminals.any()
    assert "3 rows at episode ends were dropped, 1 of them terminals" in dataset.provenance["next_observations"]


def test_missing_next_observations_with_only_one_row_episodes(columns, tmp_path):
    every = {**without(columns, "next_observations"), "timeouts": np.ones(10, dtype=bool)}
    with pytest.raises(Hdf5Error, match="no transition is left"):
        read_hdf5(write_columns(tmp_path / "s.hdf5", every, env_id="Hopper-v4"))


def test_missing_timeouts_are_found_where_the_rows_jump(columns, tmp_path):
    dataset = read_hdf5(write_columns(tmp_path / "s.hdf5", without(columns, "timeouts"), env_id="Hopper-v4"))
    # Row 7 jumps, row 9 is the last; row 3 jumps too but is a terminal.
    assert np.flatnonzero(dataset.timeouts).tolist() == [7, 9]
    assert "2 set" in dataset.provenance["timeouts"]


def test_neither_timeouts_nor_next_observations_is_refused(columns, tmp_path):
    path = write_columns(tmp_path / "s.hdf5", without(columns, "timeouts", "next_observations"))
    with pytest.raises(Hdf5Error, match="neither 'next_observations' nor 'timeouts'"):
        read_hdf5(path)


@pytest.mark.parametrize("column", ["observations", "actions", "rewards", "terminals"])
def test_missing_required_column_is_named_with_those_present(columns, tmp_path, column):
    path = write_columns(tmp_path / "s.hdf5", without(columns, column))
    with pytest.raises(UserError, match=rf"no column '{column}'; present are .*next_observations"):
        read_hdf5(path)


def test_unequal_rows_are_refused(columns, tmp_path):
    path = write_columns(tmp_path / "s.hdf5", {**columns, "rewards": np.zeros(9)}, env_id="Hopper-v4")
    with pytest.raises(Hdf5Error, match="rewards 9"):
        read_hdf5(path)


def test_unknown_environment_is_refused(columns, tmp_path):
    path = write_columns(tmp_path / "mystery.hdf5", columns)
    with pytest.raises(Hdf5Error, match="which environment"):
        read_hdf5(path)
    assert read_hdf5(path, env_id="Hopper-v5").env_id == "Hopper-v5"


def test_an_empty_file(tmp_path):
    (tmp_path / "a.hdf5").touch()
    with pytest.raises(Hdf5Error, match=r"a\.hdf5 is empty"):
        read_hdf5(tmp_path / "a.hdf5")


def test_truncated_file_text_file_and_no_file(dataset, tmp_path):
    path = tmp_path / "set.hdf5"
    write_hdf5(dataset, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(Hdf5Error, match="cut short, damaged"):
        read_hdf5(path)
    path.write_text("<html>404</html>")
    with pytest.raises(Hdf5Error, match="cut short, damaged"):
        read_hdf5(path)
    with pytest.raises(Hdf5Error, match="there is no dataset file"):
        read_hdf5(tmp_path / "absent.hdf5")


def test_unwritable_targets_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Hdf5Error, match="cannot write"):
        check_writable(tmp_path / "file" / "set.hdf5")
    with pytest.raises(Hdf5Error, match="is a folder"):
        check_writable(tmp_path)
