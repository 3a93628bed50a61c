"""What is learned from: datasets, their collection, reference scores, termination rules, evaluation episodes.

The names below are loaded on first use, so that importing `envs.errors` costs neither torch nor a simulator.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.dataset import Dataset as Dataset
    from envs.dataset import EpisodeIndex as EpisodeIndex
    from envs.episodes import Episodes as Episodes
    from envs.episodes import make_env as make_env
    from envs.episodes import run_episodes as run_episodes
    from envs.errors import UserError as UserError
    from envs.hdf5 import read_hdf5 as read_hdf5
    from envs.hdf5 import write_hdf5 as write_hdf5
    from envs.policies import Policy as Policy
    from envs.policies import UniformPolicy as UniformPolicy
    from envs.policies import load_policy as load_policy
    from envs.policies import save_policy as save_policy
    from envs.registry import catalogue as catalogue
    from envs.registry import load_dataset as load_dataset
    from envs.scores import ReferenceScores as ReferenceScores
    from envs.scores import normalized_score as normalized_score
    from envs.scores import reference_scores as reference_scores
    from envs.termination import termination_rule as termination_rule

# `collect` is missing on purpose: `envs.collect` is the module; write `from envs.collect import collect`.
_HOME = {
    "Dataset": "dataset",
    "EpisodeIndex": "dataset",
    "Episodes": "episodes",
    "Policy": "policies",
    "ReferenceScores": "scores",
    "UniformPolicy": "policies",
    "UserError": "errors",
    "catalogue": "registry",
    "load_dataset": "registry",
    "load_policy": "policies",
    "make_env": "episodes",
    "normalized_score": "scores",
    "read_hdf5": "hdf5",
    "reference_scores": "scores",
    "run_episodes": "episodes",
    "save_policy": "policies",
    "termination_rule": "termination",
    "write_hdf5": "hdf5",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'envs' has no attribute {name!r}")
    return getattr(import_module(f"envs.{_HOME[name]}"), name)
