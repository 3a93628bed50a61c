"""Environments with shifted dynamics, by id: the targets of off-dynamics reinforcement learning, and their sources.

    offsweep/<Robot>-v4|v5                              the unshifted robot of VGDF's paper
    offsweep/<Robot>-kinematic-v4|v5, -morphology-      VGDF's eight targets (arXiv 2305.17625, appendix D.2)
    offsweep/<Robot>-kinematic-<part>-<level>-v4|v5     ODRL's (arXiv 2410.20750): easy, medium, hard
    offsweep/<Robot>-morphology-<part>-<level>-v4|v5
    offsweep/<Robot>-gravity-<factor>-v4|v5             ODRL's with 0.1, 0.5, 2 and 5, and any other positive factor
    offsweep/<Robot>-friction-<factor>-v4|v5
    offsweep/Pendulum-gravity-<factor>-v1               Pendulum-v1 with g = 10 * factor

Robots are HalfCheetah, Ant, Walker2d and Hopper; v4 and v5 say whose rewards and observations they have
(`envs.shifted_robots`, which builds them). This module only knows what is changed, as edits of Gymnasium's model files:
numbers are in the units of those files (degrees, but radians for HalfCheetah), positions relative to the parent body.

VGDF's numbers are those of its released models (Kavka1/VGDF 9f65d60, env/assets and config/vgdf), which change more
than the paper says: HalfCheetah's shins and back foot, Hopper's thigh. ODRL's numbers are those of its model files
(OffDynamicsRL/off-dynamics-rl 34bba73, envs/mujoco/assets), whose names stand in `Change.source`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

ROBOTS = ("HalfCheetah", "Ant", "Walker2d", "Hopper")
LEVELS = ("easy", "medium", "hard")
FACTORS = ("0.1", "0.5", "2", "5")  # ODRL's; its files write 2.0 and 5.0
_VERSIONS = (4, 5)


class JointRange(NamedTuple):
    """A hinge's limits: degrees, radians for HalfCheetah."""

    joint: str
    low: float
    high: float


class JointPosition(NamedTuple):
    """Where a hinge sits in its body (m)."""

    joint: str
    position: tuple[float, float, float]


class BodyPosition(NamedTuple):
    """Where a body sits in its parent (m)."""

    body: str
    position: tuple[float, float, float]


class GeomPosition(NamedTuple):
    """Where a geom's centre sits in its body (m)."""

    geom: str
    position: tuple[float, float, float]


class Capsule(NamedTuple):
    """A capsule's two ends in its body, and its radius where that changes, too (m)."""

    geom: str
    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radius: float | None = None


class Size(NamedTuple):
    """A capsule's radius or half-length (m)."""

    geom: str
    radius: float | None = None
    half_length: float | None = None


class Gravity(NamedTuple):
    """Gravity times a factor."""

    factor: float


class Friction(NamedTuple):
    """Friction times a factor.

    MuJoCo gives a contact the larger of its two geoms' coefficients. ODRL multiplies sliding, torsional and rolling
    friction of all geoms, the floor's included, except in its Hopper files: these leave the floor's at 1, and of the
    robot's they multiply the sliding friction only. So on the floor Hopper's foot (2.0) slides with max(2 factor, 1),
    and below 0.5 the factor changes nothing there.
    """

    factor: float
    floor: bool = True
    sliding_only: bool = False


Edit = JointRange | JointPosition | BodyPosition | GeomPosition | Capsule | Size | Gravity | Friction


@dataclass(frozen=True)
class Change:
    """What a shift makes of a robot."""

    text: str  # in words
    source: str  # whose numbers they are
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Shift:
    """What an id says.

    Attributes:
        robot: one of `ROBOTS`, or Pendulum.
        name: such as kinematic, morphology-torso-hard or gravity-0.5; empty for an unshifted robot.
        version: of the Gymnasium environment that it is made from.
        change: what is changed.
    """

    robot: str
    name: str
    version: int
    change: Change

    @property
    def source_id(self) -> str:
        """The same environment with its dynamics as they are."""
        return f"{self.robot}-v1" if self.robot == "Pendulum" else f"offsweep/{self.robot}-v{self.version}"


_VGDF = "VGDF"


def _vgdf() -> Iterator[tuple[tuple[str, str], Change]]:
    def target(robot: str, shift: str, text: str, *edits: Edit) -> tuple[tuple[str, str], Change]:
        return (robot, shift), Change(text, _VGDF, edits)

    yield target(
        "HalfCheetah", "kinematic", "broken back thigh: joint bthigh has 0.01 of its range",
        JointRange("bthigh", -0.0052, 0.0105),
    )  # fmt: skip
    yield target(
        "Ant", "kinematic", "broken hips: joints hip_1 and hip_2 have 0.01 of their range",
        JointRange("hip_1", -0.3, 0.3), JointRange("hip_2", -0.3, 0.3),
    )  # fmt: skip
    yield target(
        "Walker2d", "kinematic", "broken right foot: foot_joint has 0.01 of its range",
        JointRange("foot_joint", -0.45, 0.45),
    )  # fmt: skip
    yield target(
        "Hopper", "kinematic", "broken joints: thigh_joint has 0.001 of its range, foot_joint 0.4",
        JointRange("thigh_joint", -0.15, 0.0), JointRange("foot_joint", -18.0, 18.0),
    )  # fmt: skip
    yield target(
        "HalfCheetah", "morphology", "no thighs: of length 1e-4; both shins and the back foot are shorter, too",
        Capsule("bthigh", (0, 0, 0), (-1e-4, 0, -1e-4)), BodyPosition("bshin", (-1e-4, 0, -1e-4)),
        Capsule("bshin", (0, 0, 0), (-0.13, 0, -0.15)), BodyPosition("bfoot", (-0.13, 0, -0.15)),
        Size("bfoot", half_length=0.07),
        Capsule("fthigh", (0, 0, 0), (1e-4, 0, 1e-4)), BodyPosition("fshin", (1e-4, 0, 1e-4)),
        Capsule("fshin", (0, 0, 0), (0.01, 0, -0.16)), BodyPosition("ffoot", (0.01, 0, -0.16)),
    )  # fmt: skip
    yield target(
        "Ant", "morphology", "short feet: those of two legs have 0.25 of their length",
        Capsule("left_ankle_geom", (0, 0, 0), (0.1, 0.1, 0)), Capsule("right_ankle_geom", (0, 0, 0), (-0.1, 0.1, 0)),
    )  # fmt: skip
    yield target(
        "Walker2d", "morphology", "no right thigh: 0.005 long instead of 0.45; the leg is longer, the foot higher",
        Capsule("thigh_geom", (0, 0, 0), (0, 0, -0.005)), JointPosition("leg_joint", (0, 0, 0.695)),
        Capsule("leg_geom", (0, 0, 0.695), (0, 0, -0.05)), JointPosition("foot_joint", (-0.2, 0, 0.3)),
        Capsule("foot_geom", (-0.2, 0, 0.3), (0, 0, 0.3)),
    )  # fmt: skip
    yield target(
        "Hopper", "morphology", "big head: the torso's radius is 0.125 instead of 0.05, the thigh's 0.04",
        Size("torso_geom", radius=0.125), Size("thigh_geom", radius=0.04),
    )  # fmt: skip


_Limits = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]  # of the three levels
_HIP: _Limits = ((-24, 24), (-15, 15), (-6, 6))
_KNEE: _Limits = ((-120, 0), (-75, 0), (-30, 0))
_FOOT: _Limits = ((-36, 36), (-22.5, 22.5), (-9, 9))
_ODRL_JOINTS: Mapping[tuple[str, str, str], Mapping[str, _Limits]] = {
    ("HalfCheetah", "thighs", "halfcheetah_kinematic_thighjnt"): {
        "bthigh": ((-0.416, 0.84), (-0.26, 0.525), (-0.104, 0.21)),
        "fthigh": ((-0.8, 0.56), (-0.5, 0.35), (-0.2, 0.14)),
    },
    ("HalfCheetah", "feet", "halfcheetah_kinematic_footjnt"): {
        "bfoot": ((-0.32, 0.628), (-0.2, 0.3925), (-0.08, 0.157)),
        "ffoot": ((-0.4, 0.4), (-0.25, 0.25), (-0.1, 0.1)),
    },
    ("Ant", "hips", "ant_kinematic_hipjnt"): {f"hip_{leg}": _HIP for leg in range(1, 5)},
    ("Ant", "ankles", "ant_kinematic_anklejnt"): {
        "ankle_1": ((30, 62), (30, 50), (30, 38)),
        "ankle_2": ((-62, -30), (-50, -30), (-38, -30)),
        "ankle_3": ((-62, -30), (-50, -30), (-38, -30)),
        "ankle_4": ((30, 62), (30, 50), (30, 38)),
    },
    ("Walker2d", "thighs", "walker2d_kinematic_thighjnt"): {"thigh_joint": _KNEE, "thigh_left_joint": _KNEE},
    ("Walker2d", "feet", "walker2d_kinematic_footjnt"): {"foot_joint": _FOOT, "foot_left_joint": _FOOT},
    ("Hopper", "leg", "hopper_kinematic_legjnt"): {"leg_joint": _KNEE},
    ("Hopper", "foot", "hopper_kinematic_footjnt"): {"foot_joint": _FOOT},
}
_KEPT = {"easy": 0.8, "medium": 0.5, "hard": 0.2}  # of the range


def _odrl_joints() -> Iterator[tuple[tuple[str, str], Change]]:
    for (robot, part, file), joints in _ODRL_JOINTS.items():
        for number, level in enumerate(LEVELS):
            edits = tuple(JointRange(joint, *limits[number]) for joint, limits in joints.items())
            text = f"{', '.join(joints)}: {_KEPT[level]} of the range"
            yield (robot, f"kinematic-{part}-{level}"), Change(text, f"ODRL, {file}_{level}", edits)


# Sizes of the three levels, lengths in m; heights above the floor, as ODRL's files have them.
_HALF_TORSO = (0.4, 0.25, 0.1)  # HalfCheetah's; 0.5 in the stock file
_BACK_SHIN = ((0.11, 0, -0.11), (0.08, 0, -0.08), (0.02, 0, -0.02))  # where HalfCheetah's shins begin
_FRONT_SHIN = ((-0.09, 0, -0.1), (-0.07, 0, -0.08), (-0.04, 0, -0.05))
_ANT_FOOT = (0.32, 0.2, 0.08)  # along x and y; stock 0.4
_KNEE_HEIGHT = (0.5, 0.35, 0.2)  # Walker2d's; stock 0.6
_HEAD = ((1.53, 0.075), (1.69, 0.1), (1.85, 0.125))  # height and radius of Walker2d's and Hopper's torso; 1.45, 0.05
_SOLE = ((-0.104, 0.208, 0.048), (-0.078, 0.156, 0.036), (-0.052, 0.104, 0.024))  # Hopper's heel, toe, radius
_TORSO_HEIGHT, _THIGH_HEIGHT, _LEG_HEIGHT = 1.25, 1.05, 0.35  # of Walker2d's and Hopper's bodies
_HOPPER_FOOT_X = 0.13  # of its body
_ANT_FEET = {"left": (1, 1), "right": (-1, 1), "third": (-1, -1), "fourth": (1, -1)}


def _odrl_bodies() -> Iterator[tuple[tuple[str, str], Change]]:
    def target(robot: str, part: str, file: str, text: str, *edits: Edit) -> tuple[tuple[str, str], Change]:
        return (robot, f"morphology-{part}-{LEVELS[n]}"), Change(text, f"ODRL, {file}_{LEVELS[n]}", edits)

    for n in range(len(LEVELS)):
        half = _HALF_TORSO[n]
        yield target(
            "HalfCheetah", "torso", "halfcheetah_morph_torso", f"torso {2 * half:g} m long instead of 1 m",
            Capsule("torso", (-half, 0, 0), (half, 0, 0)), GeomPosition("head", (half + 0.1, 0, 0.1)),
            BodyPosition("bthigh", (-half, 0, 0)), BodyPosition("fthigh", (half, 0, 0)),
        )  # fmt: skip
        back, front = _BACK_SHIN[n], _FRONT_SHIN[n]
        yield target(
            "HalfCheetah", "thighs", "halfcheetah_morph_thigh",
            f"thighs {_length(back):.2g} m and {_length(front):.2g} m long instead of 0.29 m and 0.27 m; shins shorter,"
            " the same at all levels",
            Capsule("bthigh", (0, 0, 0), back), BodyPosition("bshin", back),
            Capsule("bshin", (0, 0, 0), (-0.13, 0, -0.15)), BodyPosition("bfoot", (-0.13, 0, -0.15)),
            Capsule("fthigh", (0, 0, 0), front), BodyPosition("fshin", front),
            Capsule("fshin", (0, 0, 0), (0.11, 0, -0.13)), BodyPosition("ffoot", (0.11, 0, -0.13)),
        )  # fmt: skip
        foot = _ANT_FOOT[n]
        feet = [Capsule(f"{leg}_ankle_geom", (0, 0, 0), (x * foot, y * foot, 0)) for leg, (x, y) in _ANT_FEET.items()]
        kept = f"{foot / 0.4:g} of the length"
        yield target("Ant", "alllegs", "ant_morph_alllegs", f"feet of all legs: {kept}", *feet)
        yield target("Ant", "halflegs", "ant_morph_halflegs", f"feet of the two front legs: {kept}", *feet[:2])
        knee = _KNEE_HEIGHT[n]
        legs: list[Edit] = []
        for side in ("", "_left"):
            legs += [
                Capsule(f"thigh{side}_geom", (0, 0, 0), (0, 0, knee - _THIGH_HEIGHT)),
                JointPosition(f"leg{side}_joint", (0, 0, knee - _LEG_HEIGHT)),
                Capsule(f"leg{side}_geom", (0, 0, knee - _LEG_HEIGHT), (0, 0, 0.1 - _LEG_HEIGHT)),
            ]
        text = f"both knees {knee} m above the floor instead of 0.6 m: longer thighs, shorter legs"
        yield target("Walker2d", "legs", "walker2d_morph_leg", text, *legs)
        top, radius = _HEAD[n]
        torso = Capsule("torso_geom", (0, 0, top - _TORSO_HEIGHT), (0, 0, _THIGH_HEIGHT - _TORSO_HEIGHT), radius)
        text = f"torso {top - _THIGH_HEIGHT:g} m long and {radius} m in radius instead of 0.4 m and 0.05 m"
        yield target("Walker2d", "torso", "walker2d_morph_torso", text, torso)
        yield target("Hopper", "torso", "hopper_morph_torso", text, torso)
        heel, toe, radius = _SOLE[n]
        yield target(
            "Hopper", "foot", "hopper_morph_foot",
            f"foot {toe - heel:g} m long and {radius} m in radius instead of 0.39 m and 0.06 m",
            Capsule("foot_geom", (heel - _HOPPER_FOOT_X, 0, 0.1), (toe - _HOPPER_FOOT_X, 0, 0.1), radius),
        )  # fmt: skip


def _length(vector: tuple[float, float, float]) -> float:
    return math.hypot(*vector)


_CHANGES = {
    **{(robot, ""): Change("unshifted", _VGDF, ()) for robot in ROBOTS},
    **dict(_vgdf()),
    **dict(_odrl_joints()),
    **dict(_odrl_bodies()),
}


def _scaled(robot: str, kind: str, factor: str) -> Change | None:
    """Gravity or friction times a factor; None where that is none, or not a positive one."""
    if not re.fullmatch(r"\d+(\.\d+)?", factor) or not 0 < float(factor) < math.inf:
        return None
    number = float(factor)
    source = f"ODRL, {robot.lower()}_{kind}_{number}" if number in map(float, FACTORS) and robot in ROBOTS else "the id"
    if kind == "gravity":
        return Change(f"gravity times {factor}", source, (Gravity(number),))
    if robot == "Hopper":
        text = f"sliding friction of the robot's geoms times {factor}, the floor's unchanged"
        return Change(text, source, (Friction(number, floor=False, sliding_only=True),))
    return Change(f"friction of all geoms times {factor}, the floor's included", source, (Friction(number),))


def parse(env_id: str) -> Shift | None:
    """What an id of this module says; None for every other id."""
    match = re.fullmatch(r"offsweep/([A-Za-z0-9]+?)(?:-(.+))?-v(\d+)", env_id)
    if match is None:
        return None
    robot, name, version = match[1], match[2] or "", int(match[3])
    kind, _, factor = name.partition("-")
    if (kind == "gravity" and version == 1 and robot == "Pendulum") or (
        kind in ("gravity", "friction") and version in _VERSIONS and robot in ROBOTS
    ):
        change = _scaled(robot, kind, factor)
    else:
        change = _CHANGES.get((robot, name)) if version in _VERSIONS else None
    return None if change is None else Shift(robot, name, version, change)


def source_id(target_id: str) -> str | None:
    """The id of a shifted environment's unshifted counterpart, of which it shows the observations and pays the rewards.

    None for an id that is none of a shifted environment.
    """
    shift = parse(target_id)
    return shift.source_id if shift is not None and shift.name else None


def versions(env_id: str) -> list[str]:
    """The same environment with the rewards of either version, or just one if there is one; none for other ids."""
    shift = parse(env_id)
    if shift is None:
        return []
    stem, _, _ = env_id.rpartition("-v")
    return [f"{stem}-v{version}" for version in (_VERSIONS if shift.robot in ROBOTS else (shift.version,))]


def ids() -> list[str]:
    """All ids, gravity and friction with ODRL's factors only: per robot the source, VGDF's targets, ODRL's."""
    names = [
        f"offsweep/{robot}-{shift}" if shift else f"offsweep/{robot}"
        for robot in ROBOTS
        for shift in (
            *(shift for known, shift in _CHANGES if known == robot),
            *(f"{kind}-{factor}" for kind in ("gravity", "friction") for factor in FACTORS),
        )
    ]
    pendulums = [f"offsweep/Pendulum-gravity-{factor}-v1" for factor in FACTORS]
    return [f"{name}-v{version}" for name in names for version in _VERSIONS] + pendulums
