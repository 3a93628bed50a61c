import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs import cache
from envs.cache import CacheError, FlatStore, file_source, flat_store
from envs.dataset import COLUMNS, Dataset, Scaling
from envs.hdf5 import write_hdf5

SOURCE = {"recipe": "small", "seed": 3}


def unused() -> Dataset:
    raise AssertionError("made although it is stored")


@pytest.fixture
def store(tmp_path: Path) -> FlatStore:
    return flat_store(tmp_path)


def files(store: FlatStore) -> set[str]:
    return {p.relative_to(store.folder).as_posix() for p in store.folder.rglob("*") if p.is_file()}


def test_the_second_use_opens_what_the_first_has_stored(store, dataset):
    first = store.get(SOURCE, lambda: dataset)
    second = store.get(SOURCE, unused)
    for data in (first, second):
        assert (data.name, data.env_id, data.provenance) == (dataset.name, dataset.env_id, dataset.provenance)
        assert data.content_hash == dataset.content_hash
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(data, column), getattr(dataset, column))
    assert replace(second).content_hash == dataset.content_hash  # computed anew from the mapped columns
    assert type(second.observations) is np.ndarray
    assert isinstance(second.observations.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.observations[0] = 0


def test_scaling_is_kept(store, dataset):
    mean, std = np.arange(3, dtype=np.float32), np.full(3, 2, np.float32)
    scaled = replace(dataset, scaling=Scaling(mean, std, 0.1, -1.0))
    assert scaled.content_hash != dataset.content_hash
    kept = store.get(SOURCE, lambda: scaled)
    assert kept.content_hash == scaled.content_hash == replace(kept).content_hash
    np.testing.assert_array_equal(kept.scaling.observation_mean, mean)
    np.testing.assert_array_equal(kept.scaling.observation_std, std)
    assert (kept.scaling.reward_scale, kept.scaling.reward_shift) == (0.1, -1.0)


def test_equal_rows_are_stored_once_and_keep_their_own_names(store, dataset):
    store.get(SOURCE, lambda: dataset)
    other = store.get({"recipe": "other"}, lambda: replace(dataset, name="other"))
    assert other.name == "other"
    assert store.get(SOURCE, unused).name == dataset.name
    assert len([*(store.folder / "sets").glob("*/observations.npy")]) == 1


def test_states_are_kept_beside_the_same_rows_without_them(store, dataset):
    states = np.random.default_rng(0).normal(size=(10, 4))
    store.get(SOURCE, lambda: replace(dataset, states=states))
    without = store.get({"recipe": "other"}, lambda: dataset)
    kept = store.get(SOURCE, unused)
    np.testing.assert_array_equal(kept.states, states)
    assert isinstance(kept.states.base, np.memmap)
    assert kept.content_hash == without.content_hash
    assert without.states is None
    [column] = (store.folder / "sets").glob("*/states.npy")
    column.unlink()
    assert store.get(SOURCE, lambda: replace(dataset, states=states + 1)).states[0, 0] == states[0, 0] + 1


@pytest.mark.parametrize("damage", ["truncate", "remove", "empty record"])
def test_a_damaged_set_is_made_again(store, dataset, damage):
    store.get(SOURCE, lambda: dataset)
    [column] = (store.folder / "sets").glob("*/actions.npy")
    [record] = (store.folder / "sources").glob("*.json")
    if damage == "truncate":
        column.write_bytes(column.read_bytes()[:-8])
    elif damage == "remove":
        shutil.rmtree(column.parent)
    else:
        record.write_text("{}")
    assert not store.holds(SOURCE)
    np.testing.assert_array_equal(store.get(SOURCE, lambda: dataset).actions, dataset.actions)
    assert store.get(SOURCE, unused).content_hash == dataset.content_hash
    assert not [name for name in files(store) if ".new" in name]


def test_a_file_that_changes_is_another_source(store, dataset, tmp_path):
    path = tmp_path / "a.hdf5"
    write_hdf5(dataset, path)
    before = file_source(path, name="a")
    write_hdf5(replace(dataset, rewards=dataset.rewards + 1), path)
    assert file_source(path, name="a") != before
    assert file_source(path, name="b") != file_source(path, name="a")


@pytest.mark.parametrize("where", ["no room", "write fails"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(store, dataset, monkeypatch, where):
    if where == "no room":
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    else:

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(CacheError, match=r"'small' cannot be stored in .*OFFSWEEP_CACHE"):
        store.get(SOURCE, lambda: dataset)
    assert not files(store)
    assert not [*(store.folder / "sets").iterdir()]


def test_the_folder_can_be_chosen(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFSWEEP_CACHE", str(tmp_path / "elsewhere"))
    flat_store(tmp_path / "work").get(SOURCE, lambda: dataset)
    assert (tmp_path / "elsewhere" / "sets").is_dir()
    assert not (tmp_path / "work").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFSWEEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="cannot be made"):
        flat_store(tmp_path / "work").get(SOURCE, lambda: dataset)


def test_of_two_processes_one_makes_it(tmp_path):
    """The second waits for the first and opens what that has made."""
    code = (
        "import sys, time, pathlib, numpy as np\n"
        "from envs.cache import flat_store\nfrom envs.dataset import Dataset\n"
        "def make():\n"
        "    with open(sys.argv[1] + '/made', 'a') as f: f.write('x')\n"
        "    time.sleep(0.5); x = np.ones((5, 2), np.float32); n = np.zeros(5, bool)\n"
        "    return Dataset('d', 'Hopper-v4', x, x, x[:, 0], x, n, n)\n"
        "print(flat_store(pathlib.Path(sys.argv[1])).get({'a': 1}, make).content_hash)\n"
    )
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    hashes = {process.communicate(timeout=60)[0] for process in both}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 65
    assert (tmp_path / "made").read_text() == "x"


def test_records_are_plain_json(store, dataset):
    store.get(SOURCE, lambda: dataset)
    [record] = (store.folder / "sources").glob("*.json")
    content = json.loads(record.read_text())
    assert content["source"] == SOURCE
    assert content["rows"] == dataset.num_transitions
