import numpy as np
import pytest

from envs.collect import collect
from envs.environments import register
from envs.episodes import make_env, record_episodes
from envs.toys import EdgeOfReach, ProportionalController, Refrigerator


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def test_edge_of_reach_is_a_walk_with_bounded_steps_for_30_steps():
    actions = np.random.default_rng(0).uniform(-2, 2, size=(30, 2))
    env = make_env("offsweep/EdgeOfReach-v0")
    state, _ = env.reset(seed=1)
    assert np.abs(state).max() <= 2.0
    for step, action in enumerate(actions):
        after, reward, terminated, truncated, _ = env.step(action)
        np.testing.assert_allclose(after, state + np.clip(action, -1, 1), atol=1e-5)
        assert reward == pytest.approx(float(EdgeOfReach.reward(state)), abs=1e-5)
        assert (terminated, truncated) == (False, step == 29)
        state = after


def test_edge_of_reach_rewards_the_larger_bump_within_reach():
    axis = np.linspace(-32, 32, 257)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    rewards = EdgeOfReach.reward(grid)
    best = grid[np.unravel_index(rewards.argmax(), rewards.shape)]
    np.testing.assert_allclose(best, EdgeOfReach.PEAKS[EdgeOfReach.HEIGHTS.argmax()], atol=0.3)
    # Reachable within k - 1 = 9 of 10 steps from the start states.
    assert np.abs(EdgeOfReach.PEAKS).max() + EdgeOfReach.WIDTHS.max() <= EdgeOfReach.START + 9
    assert rewards[np.abs(grid).max(-1) > EdgeOfReach.START + 9].max() < 0.2


def test_refrigerator_follows_its_equations():
    env = make_env("offsweep/Refrigerator-v0")
    _, info = env.reset(seed=0)
    assert info["temperature"] == 10.0
    temperature, noise, opened = 10.0, [], []
    rng = np.random.default_rng(1)
    for _ in range(2000):
        power = rng.uniform(0, 1, size=1)
        observation, reward, terminated, truncated, info = env.step(power)
        cooled = temperature - power[0]
        temperature = cooled - (cooled - 15.0) * (0.08 if info["door_open"] else 0.02)
        assert info["temperature"] == pytest.approx(temperature)
        assert reward == pytest.approx(-abs(observation[0] + 2.0))
        noise.append(observation[0] - temperature)
        opened.append(info["door_open"])
    assert not terminated
    assert truncated
    assert np.std(noise) == pytest.approx(0.1, rel=0.1)
    # Once per interval of 200, for 20 steps, in every interval from the first one on.
    per_interval = np.reshape(opened, (10, 200)).sum(1).tolist()
    first = per_interval.index(20)
    assert per_interval == [0] * first + [20] * (10 - first)


def test_a_refrigerator_without_a_door_is_the_same_but_for_the_door():
    envs = [make_env(f"offsweep/Refrigerator{door}-v0") for door in ("", "Shut")]
    opened = False
    for env in envs:
        env.reset(seed=0)
    for _ in range(1200):
        (with_door, _, _, _, info), (without, _, _, _, shut) = (env.step(np.array([0.3], np.float32)) for env in envs)
        assert not shut["door_open"]
        opened |= info["door_open"]
        if not opened:
            np.testing.assert_array_equal(with_door, without)
    assert opened
    assert info["temperature"] > shut["temperature"]


def test_refrigerator_is_repeated_by_its_seed_and_cannot_heat():
    env = make_env("offsweep/Refrigerator-v0")

    def run(seed: int) -> list[float]:
        first, _ = env.reset(seed=seed)
        return [float(first[0]), *(float(env.step(np.array([-5.0]))[0][0]) for _ in range(300))]

    assert run(4) == run(4) != run(5)
    assert run(4)[-1] == pytest.approx(15.0, abs=1.0)  # outside temperature


def test_its_controller_holds_the_target_and_collects_its_log():
    data = collect("offsweep/Refrigerator-v0", [(ProportionalController(), 1.0)], 10_000, seed=0)
    assert np.flatnonzero(data.timeouts).tolist() == [1999, 3999, 5999, 7999, 9999]
    # The shipped log of 2000 steps: mean reward -0.518, actions on the line of the controller with a spread of 0.1.
    assert data.rewards.mean() == pytest.approx(-0.518, abs=0.1)
    law = 0.2 * (data.observations + 3.75)
    inside = (law > 0.4)[:, 0]
    assert (data.actions - law)[inside].std() == pytest.approx(0.1, rel=0.1)
    settled = data.observations[1500:2000, 0]
    assert np.median(settled) == pytest.approx(Refrigerator.TARGET, abs=0.15)
    assert data.provenance["policies"][0]["kind"] == "proportional"


def test_its_controller_without_noise():
    episode = record_episodes(
        "offsweep/Refrigerator-v0", lambda obs: ProportionalController(gain=1.5).act(obs, None), [0]
    )[0]
    expected = np.clip(1.5 * (episode.observations[:-1] + 3.75), 0, 10)
    np.testing.assert_allclose(episode.actions, expected, rtol=1e-5)
