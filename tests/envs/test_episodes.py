import subprocess
import sys

import gymnasium
import numpy as np
import pytest

from envs.episodes import make_env, record_episodes, run_episodes
from envs.errors import UserError


def swing(obs: np.ndarray) -> np.ndarray:
    """An elementwise policy, so that a row does not depend on the batch it is in."""
    return 2.0 * np.sin(3.0 * obs[:, 2:3])


def hop(obs: np.ndarray) -> np.ndarray:
    return np.sin(5.0 * obs[:, 3:6])


def by_hand(env_id: str, act, seed: int) -> tuple[float, int]:
    env = gymnasium.make(env_id)
    obs, _ = env.reset(seed=seed)
    total, steps, over = 0.0, 0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(act(obs[None])[0].astype(np.float32))
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
    return total, steps


@pytest.mark.parametrize(("env_id", "act"), [("Pendulum-v1", swing), ("Hopper-v5", hop)])
def test_lockstep_gives_what_single_episodes_give(env_id, act):
    seeds = [5, 3, 11, 3]
    episodes = run_episodes(env_id, act, seeds)
    expected = [by_hand(env_id, lambda obs: act(obs).astype(np.float32), seed) for seed in seeds]
    np.testing.assert_allclose(episodes.returns, [total for total, _ in expected], rtol=1e-6)
    assert episodes.lengths.tolist() == [steps for _, steps in expected]
    assert episodes.returns[1] == episodes.returns[3]
    if env_id == "Hopper-v5":
        assert len(set(episodes.lengths.tolist())) > 1  # some end earlier and leave the batch


def test_reused_environments_remember_nothing():
    first = run_episodes("Hopper-v5", hop, [1, 2])
    run_episodes("Hopper-v5", hop, [7, 8, 9])
    again = run_episodes("Hopper-v5", hop, [1, 2])
    np.testing.assert_array_equal(first.returns, again.returns)


def test_only_living_episodes_are_asked_for_actions():
    batches = []

    def act(obs: np.ndarray) -> np.ndarray:
        batches.append(len(obs))
        return hop(obs)

    episodes = run_episodes("Hopper-v5", act, range(6))
    assert sum(batches) == episodes.lengths.sum()
    assert batches == sorted(batches, reverse=True)


def test_recorded_trajectories_match_the_returns():
    episodes = run_episodes("Hopper-v5", hop, range(4))
    trajectories = record_episodes("Hopper-v5", hop, range(4))
    assert [len(t) for t in trajectories] == episodes.lengths.tolist()
    np.testing.assert_allclose([t.rewards.sum() for t in trajectories], episodes.returns, rtol=1e-4)
    assert all(t.terminated == (len(t) < 1000) for t in trajectories)
    assert all(len(t.observations) == len(t) + 1 for t in trajectories)


def test_actions_are_clipped():
    loud = record_episodes("Pendulum-v1", lambda obs: np.full((len(obs), 1), 50.0), [0])[0]
    assert (loud.actions == 2.0).all()


def test_no_seeds_no_episodes():
    assert len(run_episodes("Pendulum-v1", swing, []).returns) == 0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda obs: np.zeros((len(obs), 3)), r"shape \(2, 3\)"),
        (lambda obs: np.full((len(obs), 1), np.nan), "not finite in 'Pendulum-v1' at step 0"),
    ],
)
def test_bad_actions_are_refused(action, message):
    with pytest.raises(UserError, match=message):
        run_episodes("Pendulum-v1", action, [0, 1])


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Hoper-v5", "no Gymnasium environment 'Hoper-v5'; nearest: Hopper-v5"),
        ("Hopper-v2", "cannot be made"),
        ("CartPole-v1", "a bounded vector is needed"),
    ],
)
def test_unusable_environments_are_one_sentence(env_id, message):
    with pytest.raises(UserError, match=message):
        make_env(env_id)


def test_old_versions_print_nothing():
    code = "from envs.episodes import make_env; make_env('Hopper-v4').reset(seed=0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_importing_errors_stays_cheap():
    code = (
        "import sys; from envs.errors import UserError;"
        " print(sorted({'torch', 'gymnasium', 'numpy', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
