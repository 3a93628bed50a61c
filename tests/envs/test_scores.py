import json
from pathlib import Path

import numpy as np
import pytest

from envs import scores
from envs.d4rl_sets import OWN_URLS
from envs.errors import UserError
from envs.scores import ReferenceScores, normalized_score, reference_scores


def test_normalized_score_by_hand():
    reference = ReferenceScores(random=-20.0, expert=180.0, source="made up")
    assert normalized_score(80.0, reference) == 50.0
    np.testing.assert_allclose(normalized_score([-20, 180, 380], reference), [0, 100, 200])
    assert reference.label == "made up"


@pytest.mark.parametrize("name", ["Hopper-v4", "hopper-medium-replay-v2", "hopper-medium-v0", "hopper_mixed"])
def test_d4rl_pair_by_environment_dataset_or_file(name):
    reference = reference_scores(name)
    assert reference is not None
    assert (reference.random, reference.expert, reference.source) == (-20.272305, 3234.3, "D4RL reference")
    assert reference.label == "D4RL reference; Gymnasium Hopper-v4 (D4RL: v2)"


@pytest.mark.parametrize("name", ["Hopper-v5", "embedded/hopper-medium-v0", "mujoco/hopper/medium-v0"])
def test_v5_scores_are_said_not_to_compare_with_d4rls(name):
    reference = reference_scores(name)
    assert reference is not None
    assert reference.expert == 3234.3
    assert reference.label == "D4RL reference; measured in Hopper-v5: not comparable with D4RL's v2 numbers"


@pytest.mark.parametrize("name", ["d4rl/Ant-v4", "ant-medium-v2", "ant-random-expert-v0"])
def test_d4rls_ant(name):
    reference = reference_scores(name)
    assert reference is not None
    assert (reference.random, reference.expert) == (-325.6, 3879.7)
    assert reference.label == "D4RL reference; Gymnasium Ant-v4 (D4RL: v2)"


@pytest.mark.parametrize("name", ["pen-human-v1", "AdroitHandPen-v1"])
def test_adroit_scores_are_said_not_to_compare_with_d4rls(name):
    reference = reference_scores(name)
    assert reference is not None
    assert (reference.random, reference.expert) == (96.262799, 3076.8331017826877)
    assert "measured in AdroitHandPen-v1: not comparable" in reference.label


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("neorl/Hopper-v4", (5, 3294)),
        ("neorl/Hopper-v3-medium-1000", (5, 3294)),
        ("neorl/HalfCheetah-v3-low-100-val", (-298, 12284)),
        ("neorl/Walker2d-v3-high-10000", (1, 5143)),
    ],
)
def test_neorl_pair(name, pair):
    reference = reference_scores(name)
    assert reference is not None
    assert (reference.random, reference.expert, reference.source) == (*pair, "NeoRL reference")
    assert "-v4 with the x position (NeoRL: Gym v3)" in reference.label


def test_unshifted_robots_have_d4rl_s_pair():
    reference = reference_scores("offsweep/HalfCheetah-v4")
    assert reference == reference_scores("HalfCheetah-v4")
    newer = reference_scores("offsweep/Walker2d-v5")
    assert newer is not None
    assert newer.label == "D4RL reference; measured in offsweep/Walker2d-v5: not comparable with D4RL's v2 numbers"


# OffDynamicsRL/off-dynamics-rl 34bba73, envs/infos.py
@pytest.mark.parametrize(
    ("shift", "pair"),
    [
        ("HalfCheetah-gravity-0.1", (-280.178953, 2466.85)),
        ("HalfCheetah-friction-5.0", (-280.178953, 10199.3271484375)),
        ("HalfCheetah-morphology-torso-hard", (-280.178953, 12135.0)),
        ("Hopper-friction-2", (-26.3360015397715, 3234.3)),
        ("Walker2d-gravity-2", (10.079455055289959, 5056.445)),
        ("Ant-friction-0.5", (-325.6, 8301.338)),
        ("Ant-kinematic-hips-easy", (-325.6, 5139.832)),
    ],
)
def test_odrl_s_pairs_are_said_not_to_compare(shift, pair):
    reference = reference_scores(f"offsweep/{shift}-v5")
    assert reference is not None
    assert (reference.random, reference.expert) == pair
    assert reference.label.startswith(f"ODRL reference; measured in offsweep/{shift}-v5: not comparable")


@pytest.mark.parametrize("shift", ["Hopper-kinematic-v5", "Ant-gravity-0.3-v5", "Pendulum-gravity-0.5-v1"])
def test_shifts_that_odrl_has_not_have_no_pair(shift):
    assert reference_scores(f"offsweep/{shift}") is None


def test_every_set_of_d4rls_has_a_pair():
    assert all(reference_scores(name) for name in OWN_URLS)


@pytest.mark.parametrize("name", ["Unknown-v3", "my-own-set", "mine/Hopper-v4", "neorl/IB-v4", "mujoco/pusher/x-v0"])
def test_unknown_environment_has_no_reference(name):
    assert reference_scores(name) is None


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
    assert expected.label == "measured"


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
