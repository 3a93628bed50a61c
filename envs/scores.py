"""Reference returns and the D4RL-normalised score."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.errors import UserError
from envs.names import env_id_of

PROVENANCE_FILE = Path(__file__).parent / "embedded" / "provenance.json"

# (return of the random policy, return of the expert): D4RL, d4rl/infos.py, REF_MIN_SCORE and REF_MAX_SCORE.
_D4RL = {
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
}


@dataclass(frozen=True)
class ReferenceScores:
    """Undiscounted returns of the random policy (score 0) and the expert (100), and who measured them."""

    random: float
    expert: float
    source: str


def reference_scores(name_or_env_id: str) -> ReferenceScores | None:
    """Reference returns of an environment id or of a dataset name; None when there are none.

    For MuJoCo's v5 environments D4RL's pair is used and the source says so: v5 pays 1.0 less on the
    terminating step and Walker2d-v5 has other friction, so those scores are not D4RL's.

    Raises:
        UserError: the file with this project's own reference returns is damaged.
    """
    env_id = env_id_of(name_or_env_id)
    if env_id is None:
        return None
    match = re.fullmatch(r"(\w+)-v(\d+)", env_id)
    if match and match[1] in _D4RL:
        random, expert = _D4RL[match[1]]
        source = "D4RL infos.py"
        if int(match[2]) >= 5:
            source += f", but the score was measured on {env_id}, not on v2"
        return ReferenceScores(random, expert, source)
    return _measured_here(env_id)


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
