"""The offline metrics of a study's objective (`sweeps.objectives`), measured of a pack's policies.

Each is a function of the policies, the dataset and the runs' seeds: the same alone and in any pack, before and after a
resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from agents.actors import Actor, actor_from_arrays
from agents.dynamics import Ensemble
from agents.fqe import FQESettings, fitted_q_evaluation
from agents.method import Method, TrainingData
from agents.model_return import model_return
from orchestrator.artifacts import ArtifactStore, stage_key
from orchestrator.config import OBJECTIVE_STAGE, Config, stages_of

OfflineMetric = Callable[[Any, Sequence[int]], Tensor]
"""A pack's method and its members' seeds -> a value for each, `(M,)`."""


def offline_metric(config: Config, data: TrainingData, dataset_hash: str) -> OfflineMetric | None:
    """What the objective measures; None where it is the score of episodes.

    Args:
        config: of the pack's runs, which agree in what it depends on.
        data: as the method was given it.
        dataset_hash: of the dataset, for the ensemble of `model_return`.
    """
    objective = config.study.objective
    if objective.metric == "initial_value":
        return lambda method, seeds: method.initial_values()
    if objective.metric == "fqe":
        settings = FQESettings(config.method.gamma, objective.fqe_updates)
        return lambda method, seeds: fitted_q_evaluation(_policies(method, data), data, seeds, settings)
    if objective.metric == "model_return":
        stages = stages_of(config)
        stage = stages.get("dynamics") or stages[OBJECTIVE_STAGE]
        stored = ArtifactStore(Path(config.workdir) / "artifacts").load(stage.kind, stage_key(stage, dataset_hash))
        ensemble = Ensemble.from_state_dict(stored).to(data.observations.device)
        return lambda method, seeds: model_return(_policies(method, data), ensemble, data, seeds, objective.horizon)
    return None


def _policies(method: Method, data: TrainingData) -> Actor:
    arrays = [method.policy(m) for m in range(method.num_members)]
    return actor_from_arrays(arrays, device=data.observations.device)
