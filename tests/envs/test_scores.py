import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from envs import scores
from envs.errors import UserError
from envs.names import d4rl_spec
from envs.scores import ReferenceScores, normalized_score, reference_scores


def test_normalized_score_by_hand():
    reference = ReferenceScores(random=-20.0, expert=180.0, source="made up")
    assert normalized_score(80.0, reference) == 50.0
    np.testing.assert_allclose(normalized_score([-20, 180, 380], reference), [0, 100, 200])


@pytest.mark.parametrize("name", ["Hopper-v4", "Hopper-v2", "hopper-medium-replay-v2"])
def test_d4rl_pair_by_environment_or_dataset_name(name):
    assert reference_scores(name) == ReferenceScores(-20.272305, 3234.3, "D4RL infos.py")


@pytest.mark.parametrize("name", ["Hopper-v5", "embedded/hopper-medium-v0"])
def test_v5_scores_are_labelled(name):
    reference = reference_scores(name)
    assert reference is not None
    assert reference.expert == 3234.3
    assert "measured on Hopper-v5" in reference.source


def test_unknown_environment_has_no_reference():
    assert reference_scores("Unknown-v3") is None
    assert reference_scores("my-own-set") is None


@pytest.fixture
def provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "provenance.json"
    monkeypatch.setattr(scores, "PROVENANCE_FILE", path)
    return path


def test_pendulum_pair_comes_from_the_embedded_expert(provenance):
    assert reference_scores("Pendulum-v1") is None
    pair = {"random": -1200.0, "expert": -150.0, "source": "measured"}
    provenance.write_text(json.dumps({"actors": {}, "reference_scores": {"Pendulum-v1": pair}}))
    expected = ReferenceScores(-1200.0, -150.0, "measured")
    assert reference_scores("Pendulum-v1") == expected
    assert reference_scores("embedded/pendulum-expert-v0") == expected


@pytest.mark.parametrize(
    "text", ["{", '{"reference_scores": {"Pendulum-v1": {"random": 1}}}', '{"reference_scores": []}']
)
def test_damaged_reference_file_is_reported(provenance, text):
    provenance.write_text(text)
    with pytest.raises(UserError, match="damaged"):
        reference_scores("Pendulum-v1")


def test_expert_below_random_is_refused(provenance):
    provenance.write_text('{"reference_scores": {"Pendulum-v1": {"random": 5, "expert": 1, "source": "x"}}}')
    with pytest.raises(UserError, match="must be higher"):
        reference_scores("Pendulum-v1")


def test_numbers_and_file_names_are_those_of_d4rl():
    spec = importlib.util.find_spec("d4rl")
    if spec is None or spec.origin is None:
        pytest.skip("d4rl is not installed (the optional extra [d4rl])")
    # Loaded as a file: importing the package needs MuJoCo 2.1.0.
    infos = runpy.run_path(str(Path(spec.origin).with_name("infos.py")))
    checked = 0
    for name, url in infos["DATASET_URLS"].items():
        own = d4rl_spec(name)
        if own is None:
            continue
        checked += 1
        assert url.rsplit("/", 1)[-1] == own.file_name
        reference = reference_scores(name)
        assert reference is not None
        assert reference.random == pytest.approx(infos["REF_MIN_SCORE"][name])
        assert reference.expert == pytest.approx(infos["REF_MAX_SCORE"][name])
    assert checked >= 48
