import csv
import hashlib
import re
from pathlib import Path

import pytest

from envs import d4rl_sets, download
from envs.d4rl_sets import OWN_URLS, REFERENCE_PAIRS, d4rl_path, d4rl_spec, entries, env_id_of_file, fetch
from envs.errors import UserError


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    forget = d4rl_sets.infos.cache_clear
    forget()
    yield
    forget()


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d4rl_sets, "infos", lambda: None)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a package d4rl with these lines as its infos.py where Python looks first."""

    def write(text: str) -> None:
        package = tmp_path / "site" / "d4rl"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('MuJoCo 2.1.0 is missing')")
        (package / "infos.py").write_text(text)
        monkeypatch.syspath_prepend(package.parent)

    return write


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize(
    ("name", "env_id", "url"),
    [
        ("hopper-medium-replay-v2", "Hopper-v4", "gym_mujoco_v2/hopper_medium_replay-v2.hdf5"),
        ("halfcheetah-full-replay-v1", "HalfCheetah-v4", "gym_mujoco_v1/halfcheetah_full_replay-v1.hdf5"),
        ("walker2d-medium-replay-v0", "Walker2d-v4", "gym_mujoco/walker_mixed.hdf5"),
        ("walker2d-medium-expert-v0", "Walker2d-v4", "gym_mujoco/walker2d_medium_expert.hdf5"),
        ("ant-random-expert-v0", "d4rl/Ant-v4", "gym_mujoco/ant_random_expert.hdf5"),
        ("door-human-v0", "AdroitHandDoor-v1", "hand_dapg/door-v0_demos_clipped.hdf5"),
        ("pen-cloned-v0", "AdroitHandPen-v1", "hand_dapg/pen-demos-v0-bc-combined.hdf5"),
        ("relocate-expert-v1", "AdroitHandRelocate-v1", "hand_dapg_v1/relocate-expert-v1.hdf5"),
    ],
)
def test_a_name_gives_address_file_and_environment(name, env_id, url):
    spec = d4rl_spec(name)
    assert spec is not None
    assert spec.url == f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{url}"
    assert (spec.name, spec.env_id, spec.file_name) == (name, env_id, url.split("/")[1])
    assert env_id_of_file(Path(spec.file_name).stem) == env_id


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize(
    "name", ["hopper-full-replay-v0", "hopper-random-expert-v0", "hopper-medium-v3", "maze2d-umaze-v1", "Hopper-v4", ""]
)
def test_other_names_are_not_d4rls(name):
    assert d4rl_spec(name) is None
    assert d4rl_sets.reference_pair(name) is None


def test_a_name_that_is_only_in_the_installed_d4rl(install):
    install(
        "DATASET_URLS = {'maze2d-umaze-v1': 'http://other/maze2d-umaze-sparse-v1.hdf5',"
        " 'hopper-medium-v2': 'http://other/hopper_medium-v2.hdf5'}\n"
        "REF_MIN_SCORE = {'maze2d-umaze-v1': 23.85, 'hopper-medium-v2': 1}\n"
        "REF_MAX_SCORE = {'maze2d-umaze-v1': 161.86, 'hopper-medium-v2': 2}\n"
    )
    spec = d4rl_spec("maze2d-umaze-v1")
    assert spec is not None
    assert (spec.env_id, spec.size) == ("maze2d-umaze-v1", None)  # no environment: its own name
    assert d4rl_sets.reference_pair("maze2d-umaze-v1") == (23.85, 161.86)
    assert env_id_of_file("maze2d-umaze-sparse-v1") == "maze2d-umaze-v1"
    # What d4rl says goes before offsweep's own table, which still knows the names that this d4rl does not.
    hopper, walker = d4rl_spec("hopper-medium-v2"), d4rl_spec("walker2d-medium-v2")
    assert hopper is not None
    assert walker is not None
    assert (hopper.url, hopper.sha256) == ("http://other/hopper_medium-v2.hdf5", None)
    assert d4rl_sets.reference_pair("hopper-medium-v2") == (1.0, 2.0)
    assert "rail.eecs.berkeley.edu" in walker.url


@pytest.mark.parametrize("text", ["DATASET_URLS = {", "DATASET_URLS = {}", "import mujoco_of_the_past"])
def test_a_damaged_d4rl_is_reported(install, text):
    install(text)
    with pytest.raises(UserError, match="installed d4rl cannot be used"):
        d4rl_spec("hopper-medium-v2")


def test_the_own_table_is_that_of_the_installed_d4rl():
    found = d4rl_sets.infos()
    if found is None:
        pytest.skip("d4rl is not installed (the optional extra [d4rl])")
    assert len(OWN_URLS) == 4 * 17 + 1 + 4 * 6
    for name, url in OWN_URLS.items():
        assert found.urls[name] == url
        if name != "ant-random-expert-v0":  # D4RL states no reference scores for it
            pair = REFERENCE_PAIRS[name.split("-")[0]]
            assert (found.ref_min[name], found.ref_max[name]) == pair


def test_the_table_of_files_covers_what_it_says():
    with open(d4rl_sets.FILES, newline="") as file:
        rows = list(csv.DictReader(file))
    by_url = {row["url"]: row for row in rows}
    assert len(by_url) == len(rows)
    missing = {name.rsplit("-", 1)[0].split("-")[0] for name, url in OWN_URLS.items() if url not in by_url}
    assert missing == {"relocate", "ant"}
    assert set(by_url) < set(OWN_URLS.values())
    for row in rows:
        assert re.fullmatch(r"[0-9a-f]{64}", row["sha256"])
        assert 1_000_000 < int(row["size"]) < 1_000_000_000
    assert len({row["sha256"] for row in rows}) == len(rows)


def test_a_damaged_table_of_files_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(d4rl_sets, "FILES", tmp_path / "files.csv")
    d4rl_sets._files.cache_clear()
    (tmp_path / "files.csv").write_text("url,size,sha256\nhttp://x,many,0\n")
    with pytest.raises(UserError, match=r"files\.csv is damaged"):
        d4rl_spec("hopper-medium-v2")
    d4rl_sets._files.cache_clear()


@pytest.mark.usefixtures("not_installed")
def test_entries_say_what_is_here_and_how_large_it_is():
    spec = d4rl_spec("hopper-medium-v2")
    assert spec is not None
    path = d4rl_path(spec)
    by_name = {entry.name: entry for entry in entries()}
    assert set(by_name) == set(OWN_URLS)
    entry = by_name["hopper-medium-v2"]
    assert (entry.present, entry.size, entry.path) == (False, 152_756_557, path)
    assert (entry.source, entry.licence, entry.env_id) == ("D4RL", "CC BY 4.0", "Hopper-v4")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    entry = next(e for e in entries() if e.name == "hopper-medium-v2")
    assert (entry.present, entry.size) == (True, 5)


def test_another_set_of_the_installed_d4rl_is_listed_once_it_is_here(install):
    url = "http://other/kitchen-v0.hdf5"
    install(f"DATASET_URLS = {{'kitchen-complete-v0': '{url}'}}\nREF_MIN_SCORE = REF_MAX_SCORE = {{}}")
    assert "kitchen-complete-v0" not in {entry.name for entry in entries()}
    spec = d4rl_spec("kitchen-complete-v0")
    assert spec is not None
    d4rl_path(spec).parent.mkdir(parents=True)
    d4rl_path(spec).write_bytes(b"1")
    assert "kitchen-complete-v0" in {entry.name for entry in entries()}


def test_the_folder_is_d4rls(monkeypatch, tmp_path):
    assert d4rl_sets.d4rl_folder() == tmp_path / "d4rl"
    monkeypatch.setenv("D4RL_DATASET_DIR", "~/elsewhere")  # just-d4rl sets it unexpanded
    assert d4rl_sets.d4rl_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert d4rl_sets.d4rl_folder() == Path.home() / ".d4rl" / "datasets"


def test_a_file_that_d4rl_has_downloaded_is_used_as_it_is(monkeypatch):
    spec = d4rl_spec("hopper-medium-v2")
    assert spec is not None
    d4rl_path(spec).parent.mkdir(parents=True)
    d4rl_path(spec).write_bytes(b"an older release")
    monkeypatch.setattr(download, "download", lambda *_, **__: pytest.fail("downloaded although it is there"))
    assert fetch(spec) == d4rl_path(spec)


def test_a_missing_file_is_downloaded_to_d4rls_folder_and_checked(monkeypatch):
    asked = {}
    monkeypatch.setattr(download, "download", lambda *args, **known: asked.update(args=args, **known) or args[2])
    spec = d4rl_spec("door-human-v1")
    assert spec is not None
    assert fetch(spec, progress=print) == d4rl_path(spec)
    assert asked["args"] == ("door-human-v1", spec.url, d4rl_path(spec))
    assert (asked["size"], asked["sha256"], asked["progress"]) == (3_121_206, spec.sha256, print)
    assert len(spec.sha256 or "") == len(hashlib.sha256().hexdigest())
