import json
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs import minari_sets
from envs.errors import UserError
from envs.minari_sets import (
    MinariError,
    entries,
    fetch,
    is_minari_name,
    minari_path,
    minari_source,
    missing,
    read_minari,
)

NAME = "test/hopper/mixed-v0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def minari() -> Any:
    return pytest.importorskip("minari", reason="the extra [minari] is not installed")


# (steps, terminated, truncated) at the end of each episode: fallen, time limit, neither, both, one step.
EPISODES = [(5, True, False), (8, False, True), (3, False, False), (4, True, True), (1, True, False)]


def episodes() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for steps, terminated, truncated in EPISODES:
        flags = np.zeros((2, steps), dtype=bool)
        flags[:, -1] = terminated, truncated
        made.append(
            {
                "observations": rng.normal(size=(steps + 1, 11)),
                "actions": rng.uniform(-1, 1, size=(steps, 3)).astype(np.float32),
                "rewards": rng.normal(size=steps),
                "terminations": flags[0],
                "truncations": flags[1],
            }
        )
    return made


@pytest.fixture
def create(minari: Any) -> Callable[..., None]:
    """Makes a dataset through Minari's own API."""

    def make(name: str = NAME, made: list[dict[str, Any]] | None = None, **options: Any) -> None:
        from minari.data_collector import EpisodeBuffer

        settings = {"env": "Hopper-v5", "author": "someone", "code_permalink": "https://example.org/code", **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what metadata is missing
            buffers = [EpisodeBuffer(**{"infos": {}, **episode}) for episode in made or episodes()]
            minari.create_dataset_from_buffers(name, buffers, **settings)

    return make


def check(data: Any) -> None:
    made = episodes()
    for column, key, part in [
        ("observations", "observations", slice(0, -1)),
        ("next_observations", "observations", slice(1, None)),
        ("actions", "actions", slice(None)),
        ("rewards", "rewards", slice(None)),
    ]:
        expected = np.concatenate([episode[key][part] for episode in made]).astype(np.float32)
        np.testing.assert_array_equal(getattr(data, column), expected)
    assert np.flatnonzero(data.terminals).tolist() == [4, 19, 20]
    assert np.flatnonzero(data.timeouts).tolist() == [12, 15]
    assert data.episodes.lengths.tolist() == [5, 8, 3, 4, 1]


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_arrays_come_back_from_minari(create, minari, monkeypatch, data_format):
    if data_format == "arrow":
        pytest.importorskip("pyarrow")
    create(data_format=data_format, ref_min_score=-20.0, ref_max_score=3234.0)
    monkeypatch.setattr(socket, "socket", None)  # reading needs no network
    data = read_minari(NAME)
    check(data)
    assert (data.name, data.env_id) == (NAME, "Hopper-v5")
    about = data.provenance
    assert (about["source"], about["dataset"], about["minari_version"]) == ("Minari", NAME, minari.__version__)
    assert (about["author"], about["code_permalink"]) == (["someone"], "https://example.org/code")
    assert (about["ref_min_score"], about["ref_max_score"]) == (-20.0, 3234.0)
    json.dumps(dict(about))


@pytest.mark.parametrize("at_reset", [True, False])
def test_states_in_the_infos(create, minari, hopping, at_reset):
    episodes = hopping.episodes
    made = []
    for start, end in zip(episodes.starts[:3], episodes.ends[:3], strict=True):
        states = hopping.states[start:end]
        # Minari keeps what reset returned and then what every step did; without the former, rows are one off
        infos = np.concatenate([states, states[-1:]]) if at_reset else states[1:]
        rows = slice(start, end)
        made.append(
            {
                "observations": np.concatenate([hopping.observations[rows], hopping.next_observations[end - 1 : end]]),
                "actions": hopping.actions[rows],
                "rewards": hopping.rewards[rows],
                "terminations": hopping.terminals[rows],
                "truncations": hopping.timeouts[rows],
                "infos": {"qpos": infos[:, :6], "qvel": infos[:, 6:]},
            }
        )
    create(made=made)
    data = read_minari(NAME)
    if at_reset:
        np.testing.assert_array_equal(data.states, hopping.states[: data.num_transitions])
    else:
        assert data.states is None
        assert "infos/qpos and infos/qvel are left out: they have the shapes" in data.provenance["states"]


def test_own_reading_equals_minari_s_iteration(create, minari):
    create()
    rows = minari_sets._Rows.empty(21, 5, 11, 3)
    minari_sets._read_episodes(minari.load_dataset(NAME), rows)
    check(read_minari(NAME))
    fast = minari_sets._Rows.empty(21, 5, 11, 3)
    minari_sets._read_file(minari_path(NAME) / "main_data.hdf5", fast)
    for column in ("observations", "actions", "rewards", "terminations", "truncations", "lengths"):
        np.testing.assert_array_equal(getattr(rows, column), getattr(fast, column))


def test_local_sets_are_listed_and_found_again(create, folder, monkeypatch):
    assert entries() == []
    assert missing(NAME) == NAME
    create()
    create("other/set-v3")
    (folder / "empty" / "set-v0" / "data").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "minari", None)  # listing does without
    first, second = entries()
    assert (first.name, second.name) == ("other/set-v3", NAME)
    assert (second.source, second.env_id, second.path, second.present) == (
        "Minari",
        "Hopper-v5",
        minari_path(NAME),
        True,
    )
    assert second.size
    assert second.size >= (minari_path(NAME) / "main_data.hdf5").stat().st_size
    assert missing(NAME) is None
    before = minari_source(NAME)
    assert json.loads(json.dumps(before)) == before == minari_source(NAME)
    (minari_path(NAME) / "main_data.hdf5").touch()
    assert minari_source(NAME) != before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mujoco/hopper/medium-v0", True),
        ("D4RL/door/human-v2", True),
        ("hopper/medium-v10", True),
        ("hopper-medium-v2", False),
        ("mujoco/hopper/medium", False),
        ("embedded/hopper-medium-v0", False),
        ("neorl/Hopper-v3-medium-1000", False),
        ("collected/mine-v0", False),
        ("../secret/set-v0", False),
        ("/data/set-v0", False),
    ],
)
def test_form_of_the_names(name, expected):
    assert is_minari_name(name) is expected
    assert (missing(name) == name) is expected


def test_a_set_that_is_not_here(minari):
    with pytest.raises(UserError, match=f"'{NAME}' is not on this machine: {minari_path(NAME)}.*minari download"):
        read_minari(NAME)


def test_without_minari_the_extra_is_named(create, monkeypatch):
    create()
    monkeypatch.setitem(sys.modules, "minari", None)
    for use in (read_minari, lambda _: fetch("other/set-v0")):
        with pytest.raises(MinariError, match=r"pip install 'offsweep\[minari\]'"):
            use(NAME)


def test_only_flat_vectors(create, minari):
    from gymnasium.spaces import Box, Dict, Discrete

    made = [{**episode, "actions": np.zeros(len(episode["rewards"]), dtype=np.int64)} for episode in episodes()]
    box = Box(-np.inf, np.inf, (11,), np.float64)
    create("test/discrete-v0", made, env=None, observation_space=box, action_space=Discrete(2))
    with pytest.raises(MinariError, match=r"actions of the form Discrete\(2\); only flat vectors"):
        read_minari("test/discrete-v0")
    made = [{**episode, "observations": {"a": episode["observations"]}} for episode in episodes()]
    move = Box(-1, 1, (3,), np.float32)
    create("test/goal-v0", made, env=None, observation_space=Dict(a=box), action_space=move)
    with pytest.raises(MinariError, match=r"observations of the form Dict\('a': Box"):
        read_minari("test/goal-v0")
    create("test/nowhere-v0", env=None, observation_space=box, action_space=move)
    with pytest.raises(MinariError, match="does not say which environment"):
        read_minari("test/nowhere-v0")


def test_damaged_sets_are_one_sentence(create):
    import h5py

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_minari(NAME)
        assert "\n" not in str(caught.value)

    create()
    rows = minari_path(NAME) / "main_data.hdf5"
    whole = rows.read_bytes()
    rows.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read with Minari")
    for change, message in [
        (lambda file: file.pop("episode_1"), "cannot be read"),
        (lambda file: file["episode_1/rewards"].resize((3,)), r"'observations' of episode 1 has shape \(9, 11\)"),
        (lambda file: file["episode_4/observations"].resize((9, 11)), "'observations' of episode 4"),
        (lambda file: file["episode_2/actions"].write_direct(np.full((3, 3), np.nan, np.float32)), "'actions' is nan"),
    ]:
        rows.write_bytes(whole)
        with h5py.File(rows, "a") as file:
            change(file)
        refused(message)
    rows.write_bytes(whole)
    metadata = minari_path(NAME) / "metadata.json"
    text = metadata.read_text()
    metadata.write_text(text.replace('"total_steps": 21', '"total_steps": 30'))
    refused("its episodes have 21 steps, its metadata say 30")
    metadata.write_text(text.replace('"minari_version": "', '"minari_version": "9'))
    refused("cannot be read with Minari")
    metadata.write_text(text[:50])
    refused("cannot be read")
    assert [entry.name for entry in entries()] == [NAME]
    metadata.unlink()
    refused("is not on this machine")


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Path]]:
    """Every server can be reached; what was asked for."""
    asked: list[tuple[str, str, Path]] = []
    monkeypatch.setattr("envs.download.probe", lambda name, url, path: asked.append((name, url, path)), raising=False)
    return asked


def test_download_goes_through_minari_and_leaves_nothing_half(create, minari, reachable, monkeypatch):
    create("kept/set-v0")
    kept = minari_path("kept/set-v0").parent

    def interrupted(name: str) -> None:
        minari_path(name).mkdir(parents=True)
        (minari_path(name) / "metadata.json").write_bytes((kept / "data" / "metadata.json").read_bytes())
        raise OSError("connection lost\nand more")

    monkeypatch.setattr(minari, "download_dataset", interrupted)
    with pytest.raises(MinariError, match=f"'{NAME}' cannot be downloaded to {minari_path(NAME)}: connection lost$"):
        fetch(NAME)
    assert not minari_path(NAME).parent.exists()

    def download(name: str) -> None:
        assert not minari_path(name).parent.exists()  # Minari would take it for the dataset
        create(name)

    monkeypatch.setattr(minari, "download_dataset", download)
    minari_path(NAME).mkdir(parents=True)  # left by a killed process
    assert fetch(NAME) == minari_path(NAME)
    check(read_minari(NAME))
    assert kept.is_dir()
    server = "https://huggingface.co/datasets/farama-minari/test"
    assert reachable == [(NAME, server, minari_path(NAME))] * 2
    monkeypatch.setattr(minari, "download_dataset", None)
    assert fetch(NAME) == minari_path(NAME)


def test_a_missing_network_is_told_before_minari_is_asked(minari, monkeypatch):
    def unreachable(name: str, url: str, path: Path) -> None:
        raise UserError(f"{name} {url} {path}")

    monkeypatch.setattr("envs.download.probe", unreachable, raising=False)
    monkeypatch.setattr(minari, "download_dataset", None)
    monkeypatch.setenv("MINARI_REMOTE", "gcp://bucket")
    with pytest.raises(UserError, match=rf"{NAME} https://storage.googleapis.com/bucket/{NAME} {minari_path(NAME)}"):
        fetch(NAME)
