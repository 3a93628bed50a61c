from pathlib import Path

import numpy as np
import pytest

from envs import policies
from envs.episodes import run_episodes
from envs.errors import UserError
from envs.policies import UniformPolicy, load_policy, save_policy
from envs.scores import normalized_score, reference_scores

POLICIES = Path(__file__).parents[3] / "shared" / "data" / "policies"

RNG = np.random.default_rng(0)
W0, B0 = RNG.normal(size=(4, 3)), RNG.normal(size=4)
WM, BM = RNG.normal(size=(2, 4)), RNG.normal(size=2)
WS, BS = RNG.normal(size=(2, 4)) * 0.1, np.array([-1.0, 5.0])
OBS = RNG.normal(size=(6, 3))


def hidden(obs: np.ndarray) -> np.ndarray:
    return np.maximum(obs @ W0.T + B0, 0)


@pytest.fixture
def squashed(tmp_path: Path) -> Path:
    path = tmp_path / "actor.npz"
    save_policy(path, [(W0, B0)], (WM, BM), (WS, BS), action_low=[-2, -1], action_high=[2, 3], log_std_max=0.5)
    return path


def test_squashed_actor_by_hand(squashed):
    mean = hidden(OBS) @ WM.T + BM
    expected = np.array([0.0, 1.0]) + 2.0 * np.tanh(mean)
    policy = load_policy(squashed)
    assert (policy.observation_dim, policy.action_dim) == (3, 2)
    action = policy.act(OBS, None)
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-5)


def test_squashed_actor_samples_with_clipped_log_std(squashed):
    mean = hidden(OBS) @ WM.T + BM
    std = np.exp(np.clip(hidden(OBS) @ WS.T + BS, -20, 0.5))
    noise = np.random.default_rng(7).standard_normal((6, 2), dtype=np.float32)
    expected = np.array([0.0, 1.0]) + 2.0 * np.tanh(mean + std * noise)
    action = load_policy(squashed).act(OBS, np.random.default_rng(7))
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)


def test_save_policy_keeps_the_standardisation_and_returns_the_file_hash(tmp_path):
    path = tmp_path / "actor.npz"
    mean, std = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 2.0])
    digest = save_policy(path, [(W0, B0)], (WM, BM), (WS, BS), obs_mean=mean, obs_std=std)
    policy = load_policy(path)
    expected = np.tanh(hidden((OBS - mean) / std) @ WM.T + BM)
    np.testing.assert_allclose(policy.act(OBS, None), expected, rtol=1e-4, atol=1e-5)
    assert policy.describe() == {"kind": "squashed", "name": "actor", "sha256": digest}
    assert [item.name for item in tmp_path.iterdir()] == ["actor.npz"]


def test_gauss_and_linear_are_clipped(tmp_path):
    np.savez(tmp_path / "g.npz", kind="gauss", act="tanh", W0=W0, b0=B0, Wm=WM, bm=BM, log_std=[0.0, 2.0])
    policy = load_policy(tmp_path / "g.npz")
    mean = np.tanh(OBS @ W0.T + B0) @ WM.T + BM
    np.testing.assert_allclose(policy.act(OBS, None), np.clip(mean, -1, 1), rtol=1e-5, atol=1e-6)
    noise = np.random.default_rng(1).standard_normal((6, 2), dtype=np.float32)
    sampled = np.clip(mean + np.exp([0.0, 2.0]) * noise, -1, 1)
    np.testing.assert_allclose(policy.act(OBS, np.random.default_rng(1)), sampled, rtol=1e-4, atol=1e-5)

    weight = RNG.normal(size=(2, 3))
    extra = {"obs_mean": np.zeros(3), "obs_var": np.ones(3), "obs_clip": np.float32(0.5), "obs_eps": 0.0}
    np.savez(tmp_path / "l.npz", kind="linear", act="none", Wm=weight, **extra)
    expected = np.clip(np.clip(OBS, -0.5, 0.5) @ weight.T, -1, 1)
    linear = load_policy(tmp_path / "l.npz")
    np.testing.assert_allclose(linear.act(OBS, np.random.default_rng(0)), expected, rtol=1e-5, atol=1e-6)


def test_tanh_actor_by_hand(tmp_path):
    arrays = {"kind": "tanh", "act": "relu", "W0": W0, "b0": B0, "Wm": WM, "bm": BM, "action_low": -2.0}
    np.savez(tmp_path / "t.npz", **arrays)
    mean = np.tanh(hidden(OBS) @ WM.T + BM)
    policy = load_policy(tmp_path / "t.npz")
    expected = -2 + (mean + 1) * 1.5  # to [-2, 1]
    np.testing.assert_allclose(policy.act(OBS, None), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(policy.act(OBS, np.random.default_rng(0)), expected, rtol=1e-5, atol=1e-5)

    np.savez(tmp_path / "n.npz", **arrays, log_std=[0.0, -1.0])  # noise of actions in [-1, 1], clipped there
    noise = np.random.default_rng(1).standard_normal((6, 2), dtype=np.float32)
    sampled = np.clip(mean + np.exp([0.0, -1.0]) * noise, -1, 1)
    noisy = load_policy(tmp_path / "n.npz")
    np.testing.assert_allclose(noisy.act(OBS, None), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(noisy.act(OBS, np.random.default_rng(1)), -2 + (sampled + 1) * 1.5, rtol=1e-4, atol=1e-5)


def test_uniform_policy_fills_its_bounds():
    policy = UniformPolicy([-2, 0], [2, 1])
    actions = policy.act(np.zeros((5000, 3)), np.random.default_rng(0))
    np.testing.assert_allclose(actions.min(0), [-2, 0], atol=0.01)
    np.testing.assert_allclose(actions.max(0), [2, 1], atol=0.01)
    np.testing.assert_allclose(policy.act(np.zeros((1, 3)), None), [[0, 0.5]])


def test_embedded_name_and_nearest(tmp_path, monkeypatch, write_actor):
    monkeypatch.setattr(policies, "EMBEDDED_FOLDER", tmp_path)
    write_actor(tmp_path / "pendulum-expert.npz", 3, 1, high=2.0)
    assert load_policy("pendulum-expert").action_dim == 1
    with pytest.raises(UserError, match="nearest: pendulum-expert"):
        load_policy("pendulum-expart")


GOOD = {"kind": "squashed", "act": "relu", "W0": W0, "b0": B0, "Wm": WM, "bm": BM, "Ws": WS, "bs": BS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "magic"}, "'kind' is magic, it must be one of squashed"),
        ({"bm": None}, "'bm' is missing"),
        ({"Ws": None}, "'Ws' is missing"),
        ({"Wm": np.zeros((2, 5))}, "'Wm' has shape"),
        ({"bs": np.zeros(3)}, "'bs' has shape"),
        ({"b0": np.full(4, np.nan)}, "'b0' holds a value that is not finite"),
        ({"action_low": 2.0}, "action_low must be below"),
        ({"W0": np.array("x")}, "'W0' does not hold numbers"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, message):
    arrays = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "p.npz")


def test_cut_and_absent_files_are_refused(squashed):
    squashed.write_bytes(squashed.read_bytes()[:300])
    with pytest.raises(UserError, match="not a usable"):
        load_policy(squashed)
    with pytest.raises(UserError, match="No such file"):
        load_policy(squashed.with_name("absent.npz"))


def test_save_refuses_what_could_not_be_loaded(tmp_path):
    with pytest.raises(UserError, match="'Wm' has shape"):
        save_policy(tmp_path / "a.npz", [(W0, B0)], (np.zeros((2, 9)), BM), (WS, BS))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not POLICIES.is_dir(), reason="the folder ../shared/data with trained policies is absent")
@pytest.mark.parametrize(
    ("name", "env_id", "low", "high"),
    [
        # Published with the arrays: 101.0 +- a few over 10 episodes, 24.9, 112.4.
        ("Hopper_sb3_tqc", "Hopper-v5", 85, 115),
        ("Hopper_sb3_a2c", "Hopper-v5", 15, 35),
        ("Hopper_oai_trpo_iter0000240", "Hopper-v5", 95, 118),
    ],
)
def test_trained_policies_reach_their_scores(name, env_id, low, high):
    policy = load_policy(POLICIES / f"{name}.npz")
    episodes = run_episodes(env_id, lambda obs: policy.act(obs, None), range(3))
    reference = reference_scores(env_id)
    assert reference is not None
    assert low < normalized_score(episodes.returns, reference).mean() < high
