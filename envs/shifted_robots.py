"""VGDF's robots and their shifted counterparts: Gymnasium's own robots with an edited model.

Observations and rewards are those of the paper's sources, Gym's v2 of HalfCheetah, Walker2d and Hopper, v4 of Ant:

- Ant shows 27 numbers, no contact forces, and pays no contact cost; Ant-v5 by default does both.
- Walker2d has the feet of v2 and v4, with a friction of 0.9 (right) and 1.9 (left); Walker2d-v5's are both 1.9.
- The reward for standing is not paid in the step of a fall in v5; v2 and v4 pay it. Nothing else differs between v4
  and v5 here.

The model is edited before it is compiled, so masses and inertias follow from the edited shapes: HalfCheetah's file asks
for a total of 14 kg, and what its thighs lose its other parts gain. Resets start from the stock pose, noise included,
even where that is beyond an edited joint's limits; limits are soft in MuJoCo.
"""

import warnings
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco import (
    MujocoEnv,
    ant_v4,
    ant_v5,
    half_cheetah_v4,
    half_cheetah_v5,
    hopper_v4,
    hopper_v5,
    walker2d_v4,
    walker2d_v5,
)
from gymnasium.utils import EzPickle

from envs import shifts
from envs.episodes import quiet_mujoco


class _Shifted(MujocoEnv, EzPickle):
    """A robot whose model is edited.

    Args:
        shift: the id's part between robot and version, such as morphology or gravity-0.5; empty: no edits.
        arguments: of Gymnasium's class.
    """

    def __init__(self, shift: str = "", **arguments: Any) -> None:
        robot, _, version = type(self).__name__.rpartition("V")
        known = shifts.parse(f"offsweep/{robot}{'-' if shift else ''}{shift}-v{version}")
        if known is None:
            raise ValueError(f"{robot} has no shift '{shift}'")
        self._edits = known.change.edits
        super().__init__(**arguments)
        # Gymnasium's class has noted its own arguments, from which a copy could not be made.
        EzPickle.__init__(self, shift, **arguments)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        with warnings.catch_warnings(), quiet_mujoco():
            warnings.simplefilter("ignore")  # of an attribute in Gymnasium's file
            model = edited_model(self.fullpath, self._edits)
        # as Gymnasium's own does
        size = model.vis.global_
        size.offwidth, size.offheight = max(size.offwidth, self.width), max(size.offheight, self.height)
        return model, mujoco.MjData(model)


def edited_model(path: str, edits: tuple[shifts.Edit, ...]) -> mujoco.MjModel:
    """The model of an XML file with edits, each in the file's units.

    Raises:
        ValueError: the file has no joint, body or geom of a name.
    """
    spec = mujoco.MjSpec.from_file(path)
    for edit in edits:
        _apply(spec, edit)
    return spec.compile()


def _apply(spec: mujoco.MjSpec, edit: shifts.Edit) -> None:
    match edit:
        case shifts.JointRange(joint, low, high):
            _named(spec.joint(joint), joint).range = [low, high]
        case shifts.JointPosition(joint, position):
            _named(spec.joint(joint), joint).pos = position
        case shifts.BodyPosition(body, position):
            _named(spec.body(body), body).pos = position
        case shifts.GeomPosition(geom, position):
            _named(spec.geom(geom), geom).pos = position
        case shifts.Capsule(name, start, end, radius):
            geom = _named(spec.geom(name), name)
            # Both ends take the place of what else can be said of a capsule's place and direction.
            geom.pos, geom.quat, geom.alt.type = np.zeros(3), [1, 0, 0, 0], mujoco.mjtOrientation.mjORIENTATION_QUAT
            geom.fromto = [*start, *end]
            if radius is not None:
                geom.size[0] = radius
        case shifts.Size(name, radius, half_length):
            geom = _named(spec.geom(name), name)
            if radius is not None:
                geom.size[0] = radius
            if half_length is not None:
                geom.size[1] = half_length
        case shifts.Gravity(factor):
            spec.option.gravity = np.asarray(spec.option.gravity) * factor
        case shifts.Friction(factor, floor, sliding_only):
            for geom in spec.geoms:
                if floor or geom.name != "floor":
                    geom.friction[: 1 if sliding_only else 3] *= factor


def _named(element: Any, name: str) -> Any:
    if element is None:
        raise ValueError(f"the model has no part named '{name}'")
    return element


# A class per robot and version, not one made on demand, so that environments can be pickled into other processes.
class HalfCheetahV4(_Shifted, half_cheetah_v4.HalfCheetahEnv):
    """HalfCheetah-v4 with shifts."""


class HalfCheetahV5(_Shifted, half_cheetah_v5.HalfCheetahEnv):
    """HalfCheetah-v5 with shifts."""


class HopperV4(_Shifted, hopper_v4.HopperEnv):
    """Hopper-v4 with shifts."""


class HopperV5(_Shifted, hopper_v5.HopperEnv):
    """Hopper-v5 with shifts."""


class Walker2dV4(_Shifted, walker2d_v4.Walker2dEnv):
    """Walker2d-v4 with shifts."""


class Walker2dV5(_Shifted, walker2d_v5.Walker2dEnv):
    """Walker2d-v5 with v4's feet and shifts."""

    def __init__(self, shift: str = "", **arguments: Any) -> None:
        super().__init__(shift, **{"xml_file": "walker2d.xml", **arguments})


class AntV4(_Shifted, ant_v4.AntEnv):
    """Ant-v4 with shifts."""


class AntV5(_Shifted, ant_v5.AntEnv):
    """Ant-v5 with v4's observations and rewards, and shifts."""

    def __init__(self, shift: str = "", **arguments: Any) -> None:
        as_v4 = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}
        super().__init__(shift, **{**as_v4, **arguments})
