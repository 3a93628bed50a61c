import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs import policies, registry
from envs.dataset import Dataset
from envs.errors import UserError
from envs.hdf5 import write_hdf5
from envs.names import EMBEDDED, UNIFORM
from envs.registry import dataset_names, load_dataset

NAME = "embedded/pendulum-medium-replay-v0"


def shaped(env_id: str, observation_dim: int, action_dim: int) -> Dataset:
    rows = np.ones((4, observation_dim + action_dim), dtype=np.float32)
    observations, actions, none = (
        rows[:, :observation_dim],
        rows[:, observation_dim:],
        np.zeros(4, dtype=bool),
    )
    return Dataset("x", env_id, observations, actions, rows[:, 0], observations, none, none)


@pytest.fixture
def actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_actor) -> Path:
    """Random weights in place of every embedded actor, and a small set."""
    monkeypatch.setitem(EMBEDDED, NAME, replace(EMBEDDED[NAME], rows=2000))
    folder = tmp_path / "embedded"
    folder.mkdir()
    for name in {actor for spec in EMBEDDED.values() for actor, _ in spec.actors} - {UNIFORM}:
        pendulum = name.startswith("pendulum")
        write_actor(folder / f"{name}.npz", 3 if pendulum else 11, 1 if pendulum else 3, 2.0 if pendulum else 1.0)
    monkeypatch.setattr(policies, "EMBEDDED_FOLDER", folder)
    return folder


@pytest.fixture
def d4rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "d4rl"
    folder.mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    return folder


def test_embedded_set_is_collected_once_and_read_back(actors, tmp_path, monkeypatch):
    data = load_dataset(NAME, tmp_path)
    spec = EMBEDDED[NAME]
    assert (data.name, data.env_id, data.num_transitions) == (NAME, spec.env_id, spec.rows)
    assert [policy["kind"] for policy in data.provenance["policies"]] == ["uniform", "squashed", "squashed"]
    assert (tmp_path / "datasets" / f"{NAME}.hdf5").is_file()

    monkeypatch.setattr(registry, "collect", None)  # a second collection would fail
    assert load_dataset(NAME, tmp_path).content_hash == data.content_hash


def test_embedded_set_is_the_same_in_every_work_folder(actors, tmp_path):
    assert load_dataset(NAME, tmp_path / "a").content_hash == load_dataset(NAME, tmp_path / "b").content_hash


def test_embedded_set_is_made_anew_for_another_actor_or_a_damaged_file(actors, tmp_path, write_actor):
    first = load_dataset(NAME, tmp_path)
    path = tmp_path / "datasets" / f"{NAME}.hdf5"
    path.write_bytes(b"damaged")
    assert load_dataset(NAME, tmp_path).content_hash == first.content_hash
    write_actor(actors / "pendulum-medium.npz", 3, 1, 2.0, seed=9)
    assert load_dataset(NAME, tmp_path).content_hash != first.content_hash


def test_missing_embedded_actor_is_named(actors, tmp_path):
    (actors / "pendulum-medium.npz").unlink()
    with pytest.raises(UserError, match="needs the embedded actor 'pendulum-medium'"):
        load_dataset(NAME, tmp_path)
    assert NAME not in dataset_names()
    assert "embedded/pendulum-random-v0" in dataset_names()


def test_own_sets_by_name_and_by_path(tmp_path):
    dataset = shaped("Pendulum-v1", 3, 1)
    write_hdf5(dataset, tmp_path / "datasets" / "mine" / "set-1.hdf5")
    assert load_dataset("mine/set-1", tmp_path).content_hash == dataset.content_hash
    by_path = load_dataset(str(tmp_path / "datasets" / "mine" / "set-1.hdf5"), tmp_path / "elsewhere")
    assert by_path.content_hash == dataset.content_hash
    assert "mine/set-1" in dataset_names(tmp_path)


@pytest.mark.parametrize(
    ("name", "file_name", "env_id", "shape"),
    [
        ("hopper-medium-replay-v2", "hopper_medium_replay-v2.hdf5", "Hopper-v4", (11, 3)),
        ("halfcheetah-random-v1", "halfcheetah_random-v1.hdf5", "HalfCheetah-v4", (17, 6)),
        ("walker2d-medium-replay-v0", "walker_mixed.hdf5", "Walker2d-v4", (17, 6)),
    ],
)
def test_d4rl_sets_are_found_where_d4rl_keeps_them(d4rl, tmp_path, name, file_name, env_id, shape):
    with pytest.raises(UserError, match=f"{d4rl / file_name} does not exist.*D4RL_DATASET_DIR"):
        load_dataset(name, tmp_path)
    assert name not in dataset_names(tmp_path)
    write_hdf5(shaped(env_id, *shape), d4rl / file_name)
    loaded = load_dataset(name, tmp_path)
    assert (loaded.name, loaded.env_id) == (name, env_id)
    assert name in dataset_names(tmp_path)


def test_d4rl_folder_defaults_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_hdf5(shaped("Hopper-v4", 11, 3), tmp_path / ".d4rl" / "datasets" / "hopper_medium-v2.hdf5")
    assert load_dataset("hopper-medium-v2", tmp_path).env_id == "Hopper-v4"


def test_rows_that_do_not_fit_the_environment_are_refused(d4rl, tmp_path):
    write_hdf5(shaped("Ant-v4", 111, 8), d4rl / "ant_medium-v2.hdf5")
    with pytest.raises(UserError, match=r"111 observations and 8 actions per row.*'Ant-v4' has \(27,\) and \(8,\)"):
        load_dataset("ant-medium-v2", tmp_path)
    write_hdf5(shaped("NotInstalled-v0", 5, 2), tmp_path / "other.hdf5")
    assert load_dataset(str(tmp_path / "other.hdf5"), tmp_path).observation_dim == 5


def test_unknown_name_gives_the_nearest(actors, tmp_path):
    with pytest.raises(UserError, match="nearest: embedded/pendulum-random-v0"):
        load_dataset("embedded/pendulum-randon-v0", tmp_path)
    with pytest.raises(UserError, match=r"there is no dataset '\.\./secret'"):
        load_dataset("../secret", tmp_path)


@pytest.mark.skipif(
    not (policies.EMBEDDED_FOLDER / "provenance.json").is_file(),
    reason="the embedded actors are not made yet",
)
def test_every_embedded_actor_is_installed():
    assert {name for name in dataset_names() if name in EMBEDDED} == set(EMBEDDED)
    for name in policies.embedded_actors():
        policy = policies.load_policy(name)
        high = 2.0 if name.startswith("pendulum") else 1.0
        actions = policy.act(np.random.default_rng(0).normal(size=(500, policy.observation_dim or 0)) * 5, None)
        assert np.abs(actions).max() <= high
        assert np.abs(actions).max() > 0.5 * high


def test_concurrent_first_uses_leave_one_good_file(actors, tmp_path, monkeypatch):
    """The slower of two collectors replaces a finished file; its readers never see half of one."""
    real = registry.collect

    def collect_while_another_finishes(*args, **kwargs):
        data = real(*args, **kwargs)
        monkeypatch.setattr(registry, "collect", real)
        load_dataset(NAME, tmp_path)
        return data

    monkeypatch.setattr(registry, "collect", collect_while_another_finishes)
    slower = load_dataset(NAME, tmp_path)
    files = list((tmp_path / "datasets" / "embedded").iterdir())
    assert len(files) == 1
    shutil.copy(files[0], tmp_path / "copy.hdf5")
    assert load_dataset(str(tmp_path / "copy.hdf5"), tmp_path).content_hash == slower.content_hash
