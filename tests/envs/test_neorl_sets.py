import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.errors import UserError
from envs.neorl_sets import (
    NeorlError,
    NeorlSpec,
    entries,
    fetch,
    neorl_path,
    neorl_spec,
    neorl_specs,
    read_neorl,
)

NAME = "neorl/Hopper-v3-medium-1000"
FILE = "Hopper-v3-medium-1000-train-noise.npz"


@pytest.fixture
def spec(tmp_path, monkeypatch) -> NeorlSpec:
    monkeypatch.setenv("NEORL_DATASET_DIR", str(tmp_path / "neorl"))
    found = neorl_spec(NAME)
    assert found is not None
    return found


# Rows of trajectories that end: fallen early, healthy at the limit, fallen at the limit, cut early.
LENGTHS = [30, 1000, 1000, 20]
ENDS = (np.cumsum(LENGTHS) - 1).tolist()
ROWS = sum(LENGTHS)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """A Hopper file as NeoRL lays it out, `done` at the time limit too."""
    rng = np.random.default_rng(0)
    obs = rng.normal(scale=0.01, size=(ROWS, 12))
    obs[:, 0] = np.linspace(0, 300, ROWS)  # the position is no reason to end
    obs[:, 1] = 1.2
    next_obs = obs + rng.normal(scale=0.001, size=obs.shape)
    next_obs[[ENDS[0], ENDS[2]], 2] = 0.3  # the angle is
    done = np.zeros((ROWS, 1))
    done[ENDS[:3]] = 1
    return {
        "obs": obs,
        "next_obs": next_obs,
        "action": rng.uniform(-1, 1, size=(ROWS, 3)),
        "reward": rng.normal(size=(ROWS, 1)),
        "done": done,
        "index": np.cumsum(LENGTHS).astype(np.float32),
    }


def write(spec: NeorlSpec, arrays: dict[str, Any]) -> Path:
    path = neorl_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def test_names_stand_for_neorl_s_files():
    specs = neorl_specs()
    assert len(specs) == 72
    spec = specs[NAME]
    assert (spec.env_id, spec.file_name) == ("neorl/Hopper-v4", FILE)
    assert spec.url == f"http://datasets.polixir.site/v2/Hopper-v3/{FILE}"
    assert spec.md5 == "c54404ee2f9b3eeb9168b35d48dca341"
    assert specs["neorl/Walker2d-v3-low-10-val"].file_name == "Walker2d-v3-low-10-val-noise.npz"
    assert specs["neorl/HalfCheetah-v3-high-10000"].env_id == "neorl/HalfCheetah-v4"
    assert all(re.fullmatch("[0-9a-f]{32}", spec.md5) for spec in specs.values())
    assert len({spec.md5 for spec in specs.values()}) == 72
    assert neorl_spec("neorl/Hopper-v3-medium-999") is None


def test_file_is_looked_for_in_the_folder_the_home_and_the_installed_package(spec, tmp_path, monkeypatch):
    assert neorl_path(spec) == tmp_path / "neorl" / FILE
    monkeypatch.delenv("NEORL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert neorl_path(spec) == tmp_path / ".neorl" / "datasets" / FILE
    theirs = tmp_path / "site" / "neorl" / "data" / FILE
    theirs.parent.mkdir(parents=True)
    (tmp_path / "site" / "neorl" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert neorl_path(spec) == tmp_path / ".neorl" / "datasets" / FILE
    theirs.write_bytes(b"1234")
    assert neorl_path(spec) == theirs
    entry = next(entry for entry in entries() if entry.name == NAME)
    assert (entry.present, entry.size, entry.licence) == (True, 4, "CC BY 4.0")


def test_fetch_downloads_what_is_missing(spec, monkeypatch):
    calls = []

    def download(name: str, url: str, path: Path, **options: object) -> Path:
        calls.append((name, url, options))
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        return path

    monkeypatch.setattr("envs.download.download", download)
    assert fetch(spec) == fetch(spec) == neorl_path(spec)
    assert calls == [(NAME, spec.url, {"md5": spec.md5, "progress": None})]


def test_done_at_the_limit_is_a_timeout_while_healthy(spec, arrays):
    data = read_neorl(spec, write(spec, arrays))
    assert (data.name, data.env_id, data.observation_dim) == (NAME, "neorl/Hopper-v4", 12)
    assert np.flatnonzero(data.terminals).tolist() == [ENDS[0], ENDS[2]]
    assert np.flatnonzero(data.timeouts).tolist() == [ENDS[1], ENDS[3]]
    assert data.episodes.lengths.tolist() == LENGTHS
    np.testing.assert_array_equal(data.rewards, arrays["reward"][:, 0].astype(np.float32))
    assert data.provenance["trajectories"] == 4


@pytest.mark.parametrize("index", [np.cumsum(LENGTHS)[:-1], np.append(0, np.cumsum(LENGTHS)[:-1])])
def test_index_with_and_without_both_ends(spec, arrays, index):
    expected = read_neorl(spec, write(spec, arrays))
    assert read_neorl(spec, write(spec, {**arrays, "index": index})).content_hash == expected.content_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"done": None}, "has no 'done'; a NeoRL file holds"),
        ({"index": None}, "has no 'index'"),
        ({"index": np.array([1000, 30])}, "'index' must be increasing row numbers from 0 to 2050"),
        ({"index": np.array([30, 99_999])}, "'index' must be"),
        ({"index": np.array([30.5])}, "'index' must be"),
        ({"index": np.array([np.nan])}, "'index' must be"),
        ({"action": np.zeros((7, 3))}, "actions 7"),
        ({"reward": np.full(ROWS, np.inf)}, "'rewards' is inf at row 0"),
    ],
)
def test_other_files_are_refused(spec, arrays, change, message):
    changed = {key: values for key, values in (arrays | change).items() if values is not None}
    with pytest.raises(UserError, match=message):
        read_neorl(spec, write(spec, changed))


def test_truncated_file(spec, arrays):
    path = write(spec, arrays)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        read_neorl(spec, path)


def test_errors_are_user_errors():
    assert issubclass(NeorlError, UserError)
