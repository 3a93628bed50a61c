"""The dynamics ensemble (`agents.dynamics`) as a stage of the methods that roll out in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from agents.dynamics import (
    DynamicsConfig,
    Ensemble,
    EpochReport,
    together_settings,
    train_ensemble,
    train_ensembles,
    training_settings,
)
from agents.method import BuildTogether, Stage, TrainingData
from envs.errors import UserError


def ensemble_stage(config: DynamicsConfig) -> Stage:
    """The dynamics ensemble as a stage; ensembles that differ in `agents.dynamics.TOGETHER` only train in one batch."""

    def build(data: TrainingData, report: Callable[[int, Mapping[str, float]], None]) -> dict[str, Any]:
        def on_epoch(epoch: EpochReport) -> None:
            report(epoch.epoch, _epoch_metrics(epoch))

        return train_ensemble(*_columns(data), config, on_epoch).state_dict()

    def build_together(
        settings: Sequence[Mapping[str, Any]],
        data: TrainingData,
        report: Callable[[int, int, Mapping[str, float]], None],
    ) -> list[dict[str, Any] | UserError]:
        def on_epoch(which: int, epoch: EpochReport) -> None:
            report(which, epoch.epoch, _epoch_metrics(epoch))

        trained = train_ensembles(*_columns(data), [DynamicsConfig(**one) for one in settings], on_epoch)
        return [one if isinstance(one, UserError) else one.state_dict() for one in trained]

    together = BuildTogether(together_settings(config), build_together)
    return Stage("dynamics_ensemble", training_settings(config), build, together)


def ensemble_of(state: Mapping[str, Any], config: DynamicsConfig) -> Ensemble:
    """What the stage has stored, or the part of it that the configuration uses.

    Raises:
        UserError: see `Ensemble.first`.
    """
    whole = Ensemble.from_state_dict(dict(state))
    return whole if config.use_members is None else whole.first(config.use_members, config.num_elites)


def _columns(data: TrainingData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return data.observations, data.actions, data.rewards, data.next_observations


def _epoch_metrics(epoch: EpochReport) -> dict[str, float]:
    errors = epoch.holdout_mse
    return {
        "train_loss": epoch.train_loss, "holdout_mse_best": min(errors), "holdout_mse_mean": sum(errors) / len(errors),
        "learning_rate": epoch.learning_rate,
    }  # fmt: skip
