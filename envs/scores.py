"""Reference returns and the D4RL-normalised score."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs import d4rl_sets, shifts
from envs.errors import UserError
from envs.names import env_id_of

PROVENANCE_FILE = Path(__file__).parent / "embedded" / "provenance.json"

# Gymnasium's and gymnasium-robotics' environments of D4RL's tasks.
_D4RL_TASKS = {
    "Hopper": "hopper",
    "HalfCheetah": "halfcheetah",
    "Walker2d": "walker2d",
    "Ant": "ant",
    "AdroitHandDoor": "door",
    "AdroitHandHammer": "hammer",
    "AdroitHandPen": "pen",
    "AdroitHandRelocate": "relocate",
}

# polixir/NeoRL a4b6c57; MOREC's, LEQ's and NEUBAY's code have the same numbers.
_NEORL = {"Hopper": (5.0, 3294.0), "HalfCheetah": (-298.0, 12284.0), "Walker2d": (1.0, 5143.0)}

# OffDynamicsRL/off-dynamics-rl 34bba73, envs/infos.py: (random, expert) of a robot, and experts of some of its shifts.
_ODRL = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-26.3360015397715, 3234.3),
    "Walker2d": (10.079455055289959, 4592.3),
    "Ant": (-325.6, 5139.832),
}
_ODRL_EXPERTS = {  # with the factors 0.1, 0.5, 2 and 5
    ("HalfCheetah", "friction"): (41696.546875, 7357.0712890625, 11255.9677734375, 10199.3271484375),
    ("HalfCheetah", "gravity"): (2466.85, 9509.15, 9509.15, 3756.24),
    ("Walker2d", "friction"): (3360.181, 4229.348, 5180.044, 4988.835),
    ("Walker2d", "gravity"): (2074.904, 5194.713, 5056.445, 3665.385),
    ("Ant", "friction"): (7938.962, 8301.338, 5167.376, 4545.021),
    ("Ant", "gravity"): (2782.098, 4317.065, 6705.12, 6226.89),
}

# What Minari's sets called mujoco/<key>/... were made in.
_MINARI = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5", "ant": "Ant-v5"}


@dataclass(frozen=True)
class ReferenceScores:
    """Undiscounted returns of the random policy (score 0) and the expert (100), and who measured them.

    A pair belongs to the environment that it was measured in; scores are measured in another version of it where
    that one no longer runs. `label` names both.
    """

    random: float
    expert: float
    source: str  # whose pair it is
    measured: str = ""  # where scores are measured, if not where the pair was

    @property
    def label(self) -> str:
        """What to write beside every score that was normalised with this pair."""
        return f"{self.source}; {self.measured}" if self.measured else self.source


def reference_scores(name_or_env_id: str) -> ReferenceScores | None:
    """Reference returns of an environment id or of a dataset name; None when there are none.

    D4RL's locomotion pair belongs to Gym's v2 environments. Gymnasium's v4 are the same on MuJoCo's current bindings.
    v5 are not: they pay 1.0 less on the terminating step, Walker2d-v5's right foot has a friction of 1.9 instead of
    0.9, and Ant-v5 has a contact cost and 105 observations; a score in v5 is labelled as not comparable. So is one in
    gymnasium-robotics' Adroit environments, where for example a dropped pen does not end the episode.

    Unshifted robots of `envs.shifts` have D4RL's pair. Of the shifted ones, ODRL's have ODRL's pairs: these were
    measured in Gym's v3 robots by mujoco-py, with an Ant of other observations, so scores here are labelled as not
    comparable.

    Raises:
        UserError: the file with this project's own reference returns, or the installed d4rl, cannot be used.
    """
    name = name_or_env_id
    neorl = re.fullmatch(r"neorl/(\w+)-v\d+(?:-.+)?", name)
    if neorl:
        return _neorl(neorl[1])
    spec = d4rl_sets.d4rl_spec(name)
    if spec is not None:
        pair = d4rl_sets.reference_pair(name)
        return ReferenceScores(*pair, "D4RL reference", _where(spec.env_id)) if pair else None
    minari = re.fullmatch(r"mujoco/(\w+)/.+", name)
    env_id = _MINARI.get(minari[1]) if minari else env_id_of(name)
    if env_id is None:
        return None
    shift = shifts.parse(env_id)
    if shift is not None and shift.name:
        return _odrl(env_id, shift)
    task = _d4rl_task(env_id)
    pair = d4rl_sets.reference_pair(f"{task}-expert-v1") if task else None  # the same for all sets of a task
    return ReferenceScores(*pair, "D4RL reference", _where(env_id)) if pair else _measured_here(env_id)


def _neorl(robot: str) -> ReferenceScores | None:
    if robot not in _NEORL:
        return None
    where = f"Gymnasium {robot}-v4 with the x position (NeoRL: Gym v3)"
    return ReferenceScores(*_NEORL[robot], "NeoRL reference", where)


def _odrl(env_id: str, shift: shifts.Shift) -> ReferenceScores | None:
    if not shift.change.source.startswith("ODRL"):
        return None
    random, expert = _ODRL[shift.robot]
    kind, _, factor = shift.name.partition("-")
    if (shift.robot, kind) in _ODRL_EXPERTS:
        expert = _ODRL_EXPERTS[shift.robot, kind][[float(known) for known in shifts.FACTORS].index(float(factor))]
    where = f"measured in {env_id}: not comparable with ODRL's numbers (Gym's {shift.robot}-v3 by mujoco-py)"
    return ReferenceScores(random, expert, "ODRL reference", where)


def _d4rl_task(env_id: str) -> str | None:
    match = re.fullmatch(r"(?:d4rl/|offsweep/)?(\w+)-v\d+", env_id)
    return _D4RL_TASKS.get(match[1]) if match else None


def _where(env_id: str) -> str:
    """How an environment relates to the one that D4RL's pair was measured in."""
    if _d4rl_task(env_id) is None:
        return ""  # D4RL's own name: there is no other environment of this task
    robot, _, version = env_id.removeprefix("d4rl/").removeprefix("offsweep/").rpartition("-v")
    if robot.startswith("Adroit"):
        return f"measured in {env_id}: not comparable with D4RL's numbers"
    if int(version) >= 5:
        return f"measured in {env_id}: not comparable with D4RL's v2 numbers"
    return "" if version == "2" else f"Gymnasium {robot}-v{version} (D4RL: v2)"


def _measured_here(env_id: str) -> ReferenceScores | None:
    """The pair that was measured with this project's own expert."""
    if not PROVENANCE_FILE.exists():
        return None
    try:
        pair = json.loads(PROVENANCE_FILE.read_text(encoding="utf-8")).get("reference_scores", {}).get(env_id)
        if pair is None:
            return None
        scores = ReferenceScores(float(pair["random"]), float(pair["expert"]), str(pair["source"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{PROVENANCE_FILE} is damaged ({error!r}): restore it from the repository or the package."
        ) from error
    if not scores.random < scores.expert or not math.isfinite(scores.random + scores.expert):
        raise UserError(
            f"{PROVENANCE_FILE} gives {env_id} a random return of {scores.random} and an expert return of"
            f" {scores.expert}: the expert's must be higher."
        )
    return scores


@overload
def normalized_score(returns: float, reference: ReferenceScores) -> float: ...
@overload
def normalized_score(returns: ArrayLike, reference: ReferenceScores) -> NDArray[np.float64]: ...
def normalized_score(returns: ArrayLike, reference: ReferenceScores) -> float | NDArray[np.float64]:
    """100 x (return - random) / (expert - random), as in D4RL (Fu et al. 2020, section 5).

    Args:
        returns: undiscounted episode return(s), a number or an array of any shape.
        reference: the pair to normalise with.

    Returns:
        A float for a number, else a float64 array of the same shape.
    """
    values = np.asarray(returns, dtype=np.float64)
    scores = 100.0 * (values - reference.random) / (reference.expert - reference.random)
    return float(scores) if scores.ndim == 0 else scores
