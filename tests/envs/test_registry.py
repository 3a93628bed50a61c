import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs import policies, recipes, registry
from envs.dataset import Dataset
from envs.errors import UserError
from envs.hdf5 import write_hdf5
from envs.recipes import CONTROLLER, EMBEDDED, UNIFORM
from envs.registry import catalogue, load_dataset

NAME = "embedded/pendulum-medium-snapshots-v0"


def shaped(env_id: str, observation_dim: int, action_dim: int, name: str = "x") -> Dataset:
    rows = np.ones((4, observation_dim + action_dim), dtype=np.float32)
    observations, actions = rows[:, :observation_dim], rows[:, observation_dim:]
    none, last = np.zeros(4, dtype=bool), np.arange(4) == 3
    return Dataset(name, env_id, observations, actions, rows[:, 0], observations, none, last)


@pytest.fixture
def actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_actor) -> Path:
    """Random weights in place of Pendulum's actors, no others, and a small set."""
    monkeypatch.setitem(EMBEDDED, NAME, replace(EMBEDDED[NAME], rows=2000))
    folder = tmp_path / "embedded"
    folder.mkdir()
    for name in ("pendulum-random", "pendulum-medium", "pendulum-expert"):
        write_actor(folder / f"{name}.npz", 3, 1, 2.0)
    monkeypatch.setattr(policies, "EMBEDDED_FOLDER", folder)
    return folder


@pytest.fixture
def d4rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "d4rl"
    folder.mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    return folder


def known(workdir: Path) -> dict[str, Any]:
    return {entry.name: entry for entry in catalogue(workdir)}


def test_an_embedded_set_is_collected_once(actors, tmp_path, monkeypatch):
    assert known(tmp_path)[NAME].present
    assert not known(tmp_path)[NAME].cached
    data = load_dataset(NAME, tmp_path)
    spec = EMBEDDED[NAME]
    assert (data.name, data.env_id, data.num_transitions) == (NAME, spec.env_id, spec.rows)
    assert [policy["kind"] for policy in data.provenance["policies"]] == ["uniform", "squashed", "squashed"]
    assert "in place of D4RL's medium-replay" in data.provenance["recipe_text"]
    assert known(tmp_path)[NAME].cached
    monkeypatch.setattr(recipes, "collect", None)  # a second collection would fail
    assert load_dataset(NAME, tmp_path).content_hash == data.content_hash


def test_an_embedded_set_is_the_same_in_every_work_folder(actors, tmp_path):
    assert load_dataset(NAME, tmp_path / "a").content_hash == load_dataset(NAME, tmp_path / "b").content_hash


def test_another_actor_makes_another_set(actors, tmp_path, write_actor):
    first = load_dataset(NAME, tmp_path)
    write_actor(actors / "pendulum-medium.npz", 3, 1, 2.0, seed=9)
    assert load_dataset(NAME, tmp_path).content_hash != first.content_hash


def test_missing_embedded_actor_is_named(actors, tmp_path):
    (actors / "pendulum-medium.npz").unlink()
    with pytest.raises(UserError, match="needs the embedded actor 'pendulum-medium'"):
        load_dataset(NAME, tmp_path)
    assert NAME not in known(tmp_path)
    assert "embedded/pendulum-random-v0" in known(tmp_path)


@pytest.mark.parametrize("name", ["set-1", "mine/set-1", "looks/like/minari-v1"])
def test_own_sets_by_name_and_by_path(tmp_path, name):
    dataset = shaped("Pendulum-v1", 3, 1)
    path = tmp_path / "datasets" / f"{name}.hdf5"
    write_hdf5(dataset, path)
    loaded = load_dataset(name, tmp_path)
    assert (loaded.name, loaded.content_hash) == (name, dataset.content_hash)
    by_path = load_dataset(str(path), tmp_path / "elsewhere")
    assert (by_path.name, by_path.content_hash) == ("x", dataset.content_hash)
    entry = known(tmp_path)[name]
    assert (entry.source, entry.present, entry.cached, entry.size) == ("collected", True, True, path.stat().st_size)


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "a.hdf5"
    write_hdf5(shaped("Pendulum-v1", 3, 1), path)
    first = load_dataset(str(path), tmp_path)
    changed = replace(shaped("Pendulum-v1", 3, 1), rewards=np.zeros(4, np.float32))
    write_hdf5(changed, path)
    assert load_dataset(str(path), tmp_path).content_hash == changed.content_hash != first.content_hash


def test_npz_files_are_read_too(tmp_path):
    data = shaped("Hopper-v4", 11, 3)
    columns = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    np.savez(tmp_path / "expert_Hopper-v4.npz", **{column: getattr(data, column) for column in columns})
    loaded = load_dataset(str(tmp_path / "expert_Hopper-v4.npz"), tmp_path)
    assert (loaded.env_id, loaded.content_hash) == ("Hopper-v4", data.content_hash)


@pytest.mark.parametrize(
    ("name", "file_name", "env_id", "shape"),
    [
        ("hopper-medium-replay-v2", "hopper_medium_replay-v2.hdf5", "Hopper-v4", (11, 3)),
        ("halfcheetah-random-v1", "halfcheetah_random-v1.hdf5", "HalfCheetah-v4", (17, 6)),
        ("walker2d-medium-replay-v0", "walker_mixed.hdf5", "Walker2d-v4", (17, 6)),
        ("ant-medium-v2", "ant_medium-v2.hdf5", "d4rl/Ant-v4", (111, 8)),
    ],
)
def test_d4rl_sets_are_found_where_d4rl_keeps_them(d4rl, tmp_path, name, file_name, env_id, shape):
    with pytest.raises(UserError, match=rf"'{name}' is not on this machine.* fetch http://.*{file_name} .*{d4rl}"):
        load_dataset(name, tmp_path)
    assert not known(tmp_path)[name].present
    write_hdf5(shaped(env_id, *shape), d4rl / file_name)
    loaded = load_dataset(name, tmp_path)
    assert (loaded.name, loaded.env_id) == (name, env_id)
    entry = known(tmp_path)[name]
    assert (entry.present, entry.cached, entry.licence) == (True, True, "CC BY 4.0")


def test_without_a_network_a_missing_set_is_told_within_a_second(d4rl, tmp_path, monkeypatch):
    from envs import d4rl_sets

    monkeypatch.delenv("OFFSWEEP_OFFLINE")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    spec = replace(d4rl_sets.d4rl_spec("hopper-medium-v2"), url="http://nohost.invalid/hopper_medium-v2.hdf5")
    monkeypatch.setattr(d4rl_sets, "d4rl_spec", lambda name: spec)
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"'hopper-medium-v2': nohost.invalid cannot be reached .* at .*medium-v2\.hdf5"
    ):
        load_dataset("hopper-medium-v2", tmp_path)
    assert time.monotonic() - started < 1.5
    assert not any(d4rl.iterdir())


def test_rows_that_do_not_fit_the_environment_are_refused(d4rl, tmp_path):
    write_hdf5(shaped("Ant-v4", 27, 8), d4rl / "ant_medium-v2.hdf5")
    with pytest.raises(
        UserError, match=r"27 observations and 8 actions per row.*environment 'd4rl/Ant-v4' has \(111,\) and \(8,\)"
    ):
        load_dataset("ant-medium-v2", tmp_path)
    write_hdf5(shaped("NotInstalled-v0", 5, 2), tmp_path / "other.hdf5")
    assert load_dataset(str(tmp_path / "other.hdf5"), tmp_path).observation_dim == 5


def test_unknown_name_gives_the_nearest(actors, tmp_path):
    with pytest.raises(UserError, match="nearest: embedded/pendulum-random-v0"):
        load_dataset("embedded/pendulum-randon-v0", tmp_path)
    with pytest.raises(UserError, match="nearest: hopper-medium-v2"):
        load_dataset("hopper-medum-v2", tmp_path)
    with pytest.raises(UserError, match=r"there is no dataset '\.\./secret'"):
        load_dataset("../secret", tmp_path)


def test_a_mix_and_its_parts_are_stored_under_their_own_hashes(tmp_path, monkeypatch):
    for name, value in (("a", 1.0), ("b", 2.0)):
        data = replace(shaped("Pendulum-v1", 3, 1), rewards=np.full(4, value, np.float32))
        write_hdf5(data, tmp_path / "datasets" / f"{name}.hdf5")
    mixed = load_dataset("a:0.5+b,reward_scale=2", tmp_path)
    assert mixed.rewards.tolist() == [2, 2, 4, 4, 4, 4]
    assert mixed.name == "a:0.5+b,reward_scale=2"
    assert mixed.content_hash not in {load_dataset(name, tmp_path).content_hash for name in ("a", "b")}
    monkeypatch.setattr(registry, "apply", None)  # making it again would fail
    assert load_dataset("a:0.50 + b, reward_scale=2.0", tmp_path).content_hash == mixed.content_hash


def test_a_mix_of_environments_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "collect", None)
    with pytest.raises(UserError, match=r"mixes the environments Hopper-v5, Walker2d-v5"):
        load_dataset("embedded/hopper-medium-v0+embedded/walker2d-medium-v0", tmp_path)


def test_every_actor_of_the_embedded_sets_is_installed():
    assert all(spec.available() for spec in EMBEDDED.values())
    for name in policies.embedded_actors():
        policy = policies.load_policy(name)
        high = 2.0 if name.startswith("pendulum") else 1.0
        actions = policy.act(np.random.default_rng(0).normal(size=(500, policy.observation_dim or 0)) * 5, None)
        assert np.abs(actions).max() <= high
        assert np.abs(actions).max() > 0.5 * high
    used = {actor for spec in EMBEDDED.values() for actor, _ in spec.actors} - {UNIFORM, CONTROLLER}
    assert used == set(policies.embedded_actors())


def test_a_derived_set_is_made_anew_when_its_part_has_states_or_no_longer(tmp_path, hopping):
    path = tmp_path / "datasets" / "mine.hdf5"
    for states in (None, hopping.states, None):
        write_hdf5(replace(hopping, states=states), path)
        data = load_dataset("mine,first=30", tmp_path)
        if states is None:
            assert data.states is None
        else:
            np.testing.assert_array_equal(data.states, states[:30])
