import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.collect import collect, uniform_policy
from envs.episodes import record_episodes
from envs.errors import UserError
from envs.hdf5 import read_hdf5
from envs.policies import load_policy
from envs.scores import normalized_score, reference_scores
from envs.true_dynamics import TrueDynamics


class Constant:
    """Always the same action: tells whose rows are whose."""

    observation_dim = None

    def __init__(self, value: float, action_dim: int = 1) -> None:
        self.value, self.action_dim = value, action_dim

    def act(self, observations: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return np.full((len(observations), self.action_dim), self.value, dtype=np.float32)

    def describe(self) -> dict[str, object]:
        return {"kind": "constant", "value": self.value}


def uniform(env_id: str):
    return [(uniform_policy(env_id), 1.0)]


def test_time_limit_is_a_timeout_and_the_last_trajectory_is_cut():
    data = collect("Pendulum-v1", uniform("Pendulum-v1"), 500, seed=0)
    assert data.num_transitions == 500
    assert np.flatnonzero(data.timeouts).tolist() == [199, 399, 499]
    assert not data.terminals.any()
    assert data.provenance["last_trajectory_cut"] is True
    assert collect("Pendulum-v1", uniform("Pendulum-v1"), 400, 0).provenance["last_trajectory_cut"] is False


def test_rows_chain_within_episodes_and_not_across():
    data = collect("Hopper-v5", uniform("Hopper-v5"), 700, seed=0)
    ends = data.terminals | data.timeouts
    follows = (data.next_observations[:-1] == data.observations[1:]).all(axis=1)
    np.testing.assert_array_equal(follows, ~ends[:-1])
    assert data.terminals.sum() > 10
    assert not (data.terminals & data.timeouts).any()
    assert ends[-1]


def test_the_simulator_gives_the_same_step():
    data = collect("Pendulum-v1", uniform("Pendulum-v1"), 200, seed=3)
    cos, sin, speed = data.observations.T
    torque = data.actions[:, 0]
    # Pendulum's equation of motion (Gymnasium pendulum.py: g = 10, m = l = 1, dt = 0.05).
    expected = np.clip(speed + (15.0 * sin + 3.0 * torque) * 0.05, -8, 8)
    np.testing.assert_allclose(data.next_observations[:, 2], expected, atol=1e-4)
    cost = np.arctan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * torque**2
    np.testing.assert_allclose(data.rewards, -cost, atol=1e-3)


def test_same_seed_same_rows_other_seed_other_rows(tmp_path, write_actor):
    write_actor(tmp_path / "a.npz", 11, 3)
    actor = [(load_policy(tmp_path / "a.npz"), 1.0)]
    hashes = [collect("Hopper-v5", actor, 600, seed).content_hash for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_actions_are_sampled_unless_asked_otherwise(tmp_path, write_actor):
    write_actor(tmp_path / "a.npz", 3, 1, high=2.0)
    policy = load_policy(tmp_path / "a.npz")
    sampled = collect("Pendulum-v1", [(policy, 1.0)], 200, seed=1)
    fixed = collect("Pendulum-v1", [(policy, 1.0)], 200, seed=1, deterministic=True)
    np.testing.assert_allclose(fixed.actions, policy.act(fixed.observations, None), atol=1e-4)
    assert np.abs(sampled.actions - policy.act(sampled.observations, None)).max() > 0.1
    assert (fixed.provenance["deterministic"], sampled.provenance["deterministic"]) == (True, False)


def test_policies_follow_one_another_in_whole_trajectories():
    data = collect("Pendulum-v1", [(Constant(-1), 1.0), (Constant(0.5), 1.0), (Constant(9), 2.0)], 1800, seed=0)
    # Shares of 450, 450 and 900 rows, trajectories of 200: changes at 600 and 1000. 9 is clipped to 2.
    shares = [policy["rows"] for policy in data.provenance["policies"]]
    assert shares == [[0, 600], [600, 1000], [1000, 1800]]
    expected = np.repeat([-1, 0.5, 2], [600, 400, 800])[:, None]
    np.testing.assert_array_equal(data.actions, expected)


def test_stepping_in_lockstep_changes_nothing(monkeypatch):
    """Trajectories are kept in starting order; keeping those that finish first would favour short ones."""
    policy = [(Constant(0.3, action_dim=3), 1.0)]
    together = collect("Hopper-v5", policy, 3000, seed=0)
    assert len(set(together.episodes.lengths.tolist())) > 2

    def one_by_one(env_id, act, seeds, state):
        return [record_episodes(env_id, act, [seed], state)[0] for seed in seeds]

    monkeypatch.setattr("envs.collect.record_episodes", one_by_one)
    alone = collect("Hopper-v5", policy, 3000, seed=0)
    assert alone.content_hash == together.content_hash
    np.testing.assert_array_equal(alone.states, together.states)


def test_rows_do_not_depend_on_who_computes_the_shards_and_when(tmp_path, write_actor):
    write_actor(tmp_path / "a.npz", 11, 3)
    policies = [(load_policy(tmp_path / "a.npz"), 1.0), (uniform_policy("Hopper-v5"), 2.0)]

    def ahead_and_backwards(shards):
        """Every shard that is handed out is computed before the first one is given back, in another order."""
        sent = [pickle.dumps(shard) for shard in shards]
        results = {i: pickle.loads(sent[i]).run() for i in reversed(range(len(sent)))}
        for i in range(len(sent)):
            yield results[i]

    here = collect("Hopper-v5", policies, 3000, seed=0)
    there = collect("Hopper-v5", policies, 3000, seed=0, run_shards=ahead_and_backwards)
    assert here.content_hash == there.content_hash
    assert here.provenance == there.provenance
    np.testing.assert_array_equal(here.states, there.states)


def test_true_dynamics_repeat_a_collection_from_its_states(hopping):
    dynamics = TrueDynamics("Hopper-v5")
    np.testing.assert_array_equal(dynamics.observe(hopping.states).astype(np.float32), hopping.observations)
    step = dynamics.step(hopping.states, hopping.actions)
    np.testing.assert_allclose(step.observations, hopping.next_observations, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(step.rewards, hopping.rewards, rtol=1e-5)
    np.testing.assert_array_equal(step.terminals, hopping.terminals)
    goes_on = ~(hopping.terminals | hopping.timeouts)[:-1]
    np.testing.assert_allclose(step.states[:-1][goes_on], hopping.states[1:][goes_on], rtol=1e-6, atol=1e-6)
    assert np.abs(hopping.states[:, 0]).max() > 1e-3  # x is kept, which observations do not show


def test_states_are_kept_of_robots_with_true_dynamics_only():
    for env_id in ("Ant-v5", "Pendulum-v1", "offsweep/EdgeOfReach-v0"):
        assert collect(env_id, [(uniform_policy(env_id), 1.0)], 20, seed=0).states is None


def test_a_policy_s_rows_do_not_depend_on_the_others():
    alone = collect("Pendulum-v1", [(Constant(1), 1.0)], 1600, seed=0)
    first = collect("Pendulum-v1", [(Constant(1), 1.0), (Constant(-1), 1.0)], 3200, seed=0)
    np.testing.assert_array_equal(first.observations[:1600], alone.observations)
    assert len(np.unique(first.observations[::200], axis=0)) == 16  # every episode has a start of its own


def test_no_more_is_computed_than_is_needed():
    """Episodes that all last to the time limit: how many are needed is known beforehand."""
    handed_out, closed = [], []

    def computes_ahead(shards):
        try:
            handed_out.extend(shards)
            for shard in handed_out:
                yield shard.run()
        finally:
            closed.append(True)

    collect("Pendulum-v1", [(Constant(1), 1.0)], 3201, seed=0, run_shards=computes_ahead)
    assert [(shard.place, shard.episodes) for shard in handed_out] == [((0, 0), 8), ((0, 1), 8), ((0, 2), 1)]
    assert closed == [True]


def test_short_episodes_are_still_stepped_together():
    """How many are needed is estimated from those before."""
    handed_out = []

    def record(shards):
        for shard in shards:
            handed_out.append(shard)
            yield shard.run()

    data = collect("Hopper-v5", [(Constant(0.3, action_dim=3), 1.0)], 2000, seed=0, run_shards=record)
    assert [shard.place for shard in handed_out] == [(0, i) for i in range(len(handed_out))]
    assert handed_out[0].episodes == 2  # would do if they lasted to the time limit
    assert sum(shard.episodes == 8 for shard in handed_out) > 1
    assert sum(shard.episodes for shard in handed_out) < len(data.episodes) + 8


def test_progress_is_the_number_of_rows():
    seen = []
    collect("Pendulum-v1", uniform("Pendulum-v1"), 500, seed=0, on_rows=seen.append)
    assert seen == [200, 400, 500]


SHARED_POLICIES = Path(__file__).parents[2].parent / "shared" / "data" / "policies"


def test_a_real_expert_s_rows_have_an_expert_s_score():
    file = SHARED_POLICIES / "Hopper_sb3_tqc.npz"
    if not file.is_file():
        pytest.skip(f"the policy file {file} is not there")
    data = collect("Hopper-v5", [(load_policy(file), 1.0)], 10_000, seed=0)
    reference = reference_scores("Hopper-v5")
    assert reference is not None
    scores = normalized_score(data.episode_returns(), reference)[:-1]  # the last one is cut
    assert len(scores) >= 10
    # 100.6 is what this policy's sampled actions reached in ten other episodes; an episode's deviation is about 17
    assert np.mean(scores) == pytest.approx(100.6, abs=10)
    assert np.abs(data.actions).max() <= 1


@pytest.mark.slow
def test_rows_do_not_depend_on_the_threads_of_matrix_products(tmp_path):
    """A driver may have several, Ray's workers have one."""
    code = f"""
import numpy as np
from envs.collect import collect
from envs.policies import load_policy, save_policy
rng = np.random.default_rng(0)
layer = lambda i, o: (rng.normal(size=(o, i)) / i**0.5, np.zeros(o))
save_policy("{tmp_path}/a.npz", [layer(11, 512), layer(512, 512)], layer(512, 3), layer(512, 3))
print(collect("Hopper-v5", [(load_policy("{tmp_path}/a.npz"), 1.0)], 7001, 0).content_hash)
"""
    hashes = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
        ).stdout
        for threads in "12"
    ]  # fmt: skip
    assert len(hashes[0].strip()) == 64
    assert len(set(hashes)) == 1


def test_mujoco_s_remarks_on_model_files_are_not_shown(tmp_path):
    code = "from envs.episodes import make_env; make_env('HalfCheetah-v5')"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # no MUJOCO_LOG.TXT


def test_provenance_says_who_and_with_what(tmp_path, write_actor):
    digest = write_actor(tmp_path / "actor.npz", 3, 1)
    data = collect("Pendulum-v1", [(load_policy(tmp_path / "actor.npz"), 2.0)], 10, seed=4, about={"for": "a test"})
    json.dumps(data.provenance)
    assert data.provenance["for"] == "a test"
    assert data.provenance["policies"][0]["sha256"] == digest
    assert data.provenance["seed"] == 4
    assert set(data.provenance["versions"]) == {"offsweep", "gymnasium", "mujoco", "numpy"}


def test_path_is_written_and_refused_before_any_step(tmp_path):
    class Unused(Constant):
        def act(self, observations, rng):
            raise AssertionError("stepped before the target was checked")

    path = tmp_path / "set.hdf5"
    data = collect("Pendulum-v1", uniform("Pendulum-v1"), 10, seed=0, path=path)
    assert read_hdf5(path).content_hash == data.content_hash
    with pytest.raises(UserError, match="cannot write"):
        collect("Pendulum-v1", [(Unused(0), 1.0)], 10, seed=0, path=path / "below.hdf5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_transitions": 0}, "at least 1"),
        ({"seed": -1}, "must not be negative"),
        ({"policies": []}, "at least one policy"),
        ({"policies": [(Constant(0), 0.0)]}, "positive"),
        ({"policies": [(Constant(0, action_dim=3), 1.0)]}, "gives 3 actions, 'Pendulum-v1' has 3 and 1"),
        ({"num_transitions": 10**16}, "GB of memory"),
        ({"env_id": "Pendulom-v1"}, "nearest: Pendulum-v1"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    request = {"env_id": "Pendulum-v1", "policies": [(Constant(0), 1.0)], "num_transitions": 10, "seed": 0}
    with pytest.raises(UserError, match=message):
        collect(**{**request, **arguments})
