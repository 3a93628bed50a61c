"""The robots' models against the released ones, their observations and rewards against Gymnasium's.

`golden/shifted_robots.npz`: of the model files of OffDynamicsRL/off-dynamics-rl 34bba73 (envs/mujoco/assets, stock ones
left out) and of Kavka1/VGDF 9f65d60 (env/assets/*_morph.xml) what MuJoCo 4.0.0 compiles of them: per robot the names
of the shifts, per name the arrays of `FIELDS`. Files in global coordinates, which MuJoCo no longer reads, were put into
local ones first; where a file writes the foot's frame as an expression ("0.13/2 0 0.1") it was put where the other
files have it, which moves no joint and no geom.
"""

import multiprocessing
import pickle
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

from envs import shifts
from envs.environments import register
from envs.episodes import make_env, quiet_mujoco

GOLDEN = Path(__file__).parent / "golden" / "shifted_robots.npz"
FIELDS = (
    "jnt_range", "jnt_pos", "body_pos", "body_quat", "body_mass", "body_ipos", "body_iquat", "body_inertia",
    "geom_size", "geom_pos", "geom_quat", "geom_friction",
)  # fmt: skip
STOCK = {"HalfCheetah": "half_cheetah", "Ant": "ant", "Walker2d": "walker2d", "Hopper": "hopper"}


def model_of(env_id):
    return make_env(env_id).unwrapped.model  # type: ignore[attr-defined]


def stock_model(robot):
    from gymnasium.envs.mujoco import mujoco_env

    path = Path(mujoco_env.__file__).parent / "assets" / f"{STOCK[robot]}.xml"
    with quiet_mujoco():
        return mujoco.MjModel.from_xml_path(str(path))


def numbers(model):
    """All of a model's numbers: field -> array."""
    found = {}
    for part, prefix in ((model, ""), (model.opt, "opt.")):
        for name in dir(part):
            value = None if name.startswith("_") else getattr(part, name)
            if isinstance(value, int | float | np.ndarray):
                found[prefix + name] = np.asarray(value)
    return found


def changed_fields(model, other):
    ours, theirs = numbers(model), numbers(other)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not np.array_equal(ours[name], theirs[name])}


def ends(model, name):
    """A capsule's two ends in its body."""
    geom = model.geom(name)
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, geom.quat)
    axis = matrix.reshape(3, 3)[:, 2] * geom.size[1]
    return sorted([tuple(np.round(geom.pos - axis, 9) + 0.0), tuple(np.round(geom.pos + axis, 9) + 0.0)])


@pytest.mark.parametrize("robot", shifts.ROBOTS)
def test_every_released_model_is_built_exactly(robot):
    with np.load(GOLDEN) as golden:
        names = [str(name) for name in golden[f"{robot}/names"]]
        assert len(names) == 21  # 6 kinematic, 6 of morphology, 4 of gravity and 4 of friction; VGDF's morphology
        for row, name in enumerate(names):
            model = model_of(f"offsweep/{robot}-{name}-v{4 + row % 2}")
            for field in FIELDS:
                expected = golden[f"{robot}/{field}"][row]
                np.testing.assert_allclose(
                    getattr(model, field), expected, rtol=0, atol=1e-9, err_msg=f"{name} {field}"
                )
            np.testing.assert_allclose(model.opt.gravity, golden[f"{robot}/gravity"][row], err_msg=name)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("robot", shifts.ROBOTS)
def test_the_source_s_model_is_the_stock_one(robot, version):
    assert changed_fields(model_of(f"offsweep/{robot}-v{version}"), stock_model(robot)) <= {"narena", "nbuffer"}


KINEMATIC = {  # VGDF D.2, radians: stock range times the factor
    "HalfCheetah": {"bthigh": (-0.52 * 0.01, 1.05 * 0.01)},
    "Ant": {"hip_1": np.radians((-0.3, 0.3)), "hip_2": np.radians((-0.3, 0.3))},
    "Walker2d": {"foot_joint": np.radians((-0.45, 0.45))},
    "Hopper": {"thigh_joint": np.radians((-0.15, 0.0)), "foot_joint": np.radians((-18.0, 18.0))},
}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("robot", KINEMATIC)
def test_a_kinematic_shift_changes_these_joints_limits_and_nothing_else(robot, version):
    model, stock = model_of(f"offsweep/{robot}-kinematic-v{version}"), stock_model(robot)
    assert changed_fields(model, stock) - {"narena", "nbuffer"} == {"jnt_range"}
    # a joint's limits may also be written into the model of an environment that is there: the same model again
    for joint, limits in KINEMATIC[robot].items():
        assert not np.allclose(stock.joint(joint).range, limits)
        stock.joint(joint).range = limits
    np.testing.assert_allclose(model.jnt_range, stock.jnt_range, rtol=1e-12, atol=1e-15)


CAPSULES = {
    "HalfCheetah": {
        "bthigh": ((0, 0, 0), (-1e-4, 0, -1e-4)), "bshin": ((0, 0, 0), (-0.13, 0, -0.15)),
        "fthigh": ((0, 0, 0), (1e-4, 0, 1e-4)), "fshin": ((0, 0, 0), (0.01, 0, -0.16)),
    },
    "Ant": {"left_ankle_geom": ((0, 0, 0), (0.1, 0.1, 0)), "right_ankle_geom": ((0, 0, 0), (-0.1, 0.1, 0))},
    "Walker2d": {
        "thigh_geom": ((0, 0, 0), (0, 0, -0.005)), "leg_geom": ((0, 0, 0.695), (0, 0, -0.05)),
        "foot_geom": ((-0.2, 0, 0.3), (0, 0, 0.3)),
    },
    "Hopper": {},
}  # fmt: skip
SIZES = {"HalfCheetah": {"bfoot": (0.046, 0.07)}, "Hopper": {"torso_geom": (0.125, 0.2), "thigh_geom": (0.04, 0.225)}}
MASSES = {"HalfCheetah": (14.0, 14.0), "Ant": (0.911, 0.826), "Walker2d": (23.68, 21.41), "Hopper": (15.82, 38.44)}


@pytest.mark.parametrize("robot", CAPSULES)
def test_a_morphology_shift_changes_these_shapes_and_no_others(robot):
    model, stock = model_of(f"offsweep/{robot}-morphology-v5"), stock_model(robot)
    for name, (start, end) in CAPSULES[robot].items():
        np.testing.assert_allclose(ends(model, name), sorted([start, end]), atol=1e-8)
    for name, (radius, half_length) in SIZES.get(robot, {}).items():
        np.testing.assert_allclose(model.geom(name).size[:2], (radius, half_length))
    edited = {*CAPSULES[robot], *SIZES.get(robot, {})}
    for i in range(stock.ngeom):
        if stock.geom(i).name not in edited:
            for field in ("size", "pos", "quat", "friction"):
                np.testing.assert_array_equal(getattr(model.geom(i), field), getattr(stock.geom(i), field))
    for field in ("jnt_range", "geom_friction", "dof_damping", "actuator_gear", "jnt_stiffness", "qpos0"):
        np.testing.assert_array_equal(getattr(model, field), getattr(stock, field))
    before, after = MASSES[robot]
    assert (stock.body_mass.sum(), model.body_mass.sum()) == pytest.approx((before, after), abs=0.006)


def test_masses_of_the_parts_are_those_of_the_paper_s_models():
    cheetah, walker = model_of("offsweep/HalfCheetah-morphology-v4"), model_of("offsweep/Walker2d-morphology-v4")
    parts = [cheetah.body(name).mass[0] for name in ("torso", "bthigh", "fthigh")]
    assert parts == pytest.approx([8.20, 0.35, 0.35], abs=0.01)
    assert [walker.body(name).mass[0] for name in ("thigh", "leg")] == pytest.approx([0.56, 4.01], abs=0.01)
    assert model_of("offsweep/Hopper-morphology-v5").body("torso").mass[0] == pytest.approx(27.82, abs=0.01)
    legs = [walker.joint(name).pos for name in ("leg_joint", "foot_joint")]
    np.testing.assert_allclose(legs, [(0, 0, 0.695), (-0.2, 0, 0.3)])


def roll(env, steps, seed=3):
    """Observations, rewards and ends of an episode under random actions."""
    observations, rewards, ended = [env.reset(seed=seed)[0]], [], []
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
        ended.append(terminated)
    return np.array(observations), np.array(rewards), np.array(ended)


@pytest.mark.parametrize("robot", shifts.ROBOTS)
def test_sources_step_as_gymnasium_s_v4(robot):
    theirs = roll(make_env(f"{robot}-v4"), 60)
    same = roll(make_env(f"offsweep/{robot}-v4"), 60)
    for a, b in zip(theirs, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert theirs[2].any() == (robot in ("Hopper", "Walker2d"))
    observations, rewards, ended = roll(make_env(f"offsweep/{robot}-v5"), 60)
    np.testing.assert_array_equal(observations, theirs[0])
    # v5 does not pay for standing once the robot has fallen
    np.testing.assert_allclose(rewards, theirs[1] - ended, atol=1e-12)


@pytest.mark.parametrize("robot", shifts.ROBOTS)
def test_a_kinematic_target_steps_as_a_stock_robot_with_these_limits(robot):
    stock = make_env(f"{robot}-v4")
    model = stock.unwrapped.model  # type: ignore[attr-defined]
    target = make_env(f"offsweep/{robot}-kinematic-v4")
    for joint in KINEMATIC[robot]:
        model.joint(joint).range = target.unwrapped.model.joint(joint).range  # type: ignore[attr-defined]
    for a, b in zip(roll(stock, 60), roll(target, 60), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(roll(target, 60)[0], roll(make_env(f"{robot}-v4"), 60)[0])


def step_of_a_copy(pickled):
    return roll(pickle.loads(pickled), 5)[0]


def test_a_shifted_robot_can_be_sent_to_another_process():
    for env_id in ("offsweep/Walker2d-morphology-v5", "offsweep/Ant-gravity-0.3-v5"):
        env = make_env(env_id).unwrapped
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            there = pool.apply(step_of_a_copy, (pickle.dumps(env),))
        np.testing.assert_array_equal(there, roll(env, 5)[0])


def test_making_and_copying_a_robot_says_nothing_and_leaves_no_log_file(tmp_path, monkeypatch, recwarn, capfd):
    monkeypatch.chdir(tmp_path)
    register()
    env = gymnasium.make("offsweep/HalfCheetah-kinematic-v5")  # its file has an attribute that MuJoCo warns about
    pickle.loads(pickle.dumps(env.unwrapped))
    assert env.spec is not None
    assert env.spec.max_episode_steps == 1000
    assert list(tmp_path.iterdir()) == []
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_any_factor_scales_gravity_and_friction():
    model, stock = model_of("offsweep/Ant-gravity-0.3-v5"), stock_model("Ant")
    assert changed_fields(model, stock) - {"narena", "nbuffer"} == {"opt.gravity"}
    np.testing.assert_allclose(model.opt.gravity, (0, 0, -0.3 * 9.81))
    model = model_of("offsweep/Walker2d-friction-1.5-v5")
    np.testing.assert_allclose(model.geom_friction, 1.5 * stock_model("Walker2d").geom_friction)
    hopper, stock = model_of("offsweep/Hopper-friction-0.25-v4"), stock_model("Hopper")
    np.testing.assert_allclose(hopper.geom_friction[1:, 0], 0.25 * stock.geom_friction[1:, 0])
    np.testing.assert_array_equal(hopper.geom_friction[:, 1:], stock.geom_friction[:, 1:])
    np.testing.assert_array_equal(hopper.geom("floor").friction, stock.geom("floor").friction)


def test_hopper_s_friction_on_the_floor_is_at_least_the_floor_s():
    """As in ODRL's files: a contact has the larger of two coefficients, and the floor's stays 1."""
    low, half, source, double = (
        roll(make_env(f"offsweep/Hopper{shift}-v5"), 200)[0]
        for shift in ("-friction-0.1", "-friction-0.5", "", "-friction-2")
    )
    np.testing.assert_array_equal(low, half)
    assert not np.array_equal(half, source)
    assert not np.array_equal(source, double)


# Of 3,000 uniform random steps, action space and first reset seeded with 0: mean return and length of whole episodes.
RANDOM_POLICY = {
    "Walker2d-v5": (1.9, 21.9), "Walker2d-kinematic-v5": (0.4, 22.8), "Walker2d-morphology-v5": (2.8, 16.4),
    "Hopper-v5": (18.3, 22.2), "Hopper-kinematic-v5": (31.2, 39.3), "Hopper-morphology-v5": (24.6, 26.5),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM_POLICY)
def test_random_actions_get_the_known_returns(name):
    from benchmarks.shift_robots import random_policy

    found = random_policy(f"offsweep/{name}", 3000)
    assert (found.mean_return, found.mean_length) == pytest.approx(RANDOM_POLICY[name], abs=0.06)


def test_the_hopper_with_a_big_head_falls_by_itself():
    from benchmarks.shift_robots import zero_action_lengths

    lengths = zero_action_lengths("offsweep/Hopper-morphology-v5", 20, 200)
    assert (np.mean(lengths), min(lengths)) == pytest.approx((86.8, 79), abs=0.06)
