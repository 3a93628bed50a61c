"""Schedules: hyperparameters of a run that change while it trains.

    schedule:
      - {updates: 50000, method.penalty_coef: 2.0}
      - {updates: 100000, method.penalty_coef: 1.0, method.actor_lr: 1.0e-4}

From so many updates on the run goes on with the settings of an entry, which stay until a later one changes them. Only
what enters arithmetic can change: what may differ between the members of a pack. Networks, optimisers and replay go on
as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agents.method import changeable_settings
from envs.errors import UserError
from orchestrator.config import Config, apply_params, check_effect, pack_key


def settings_at(schedule: Sequence[Mapping[str, Any]], updates: int) -> dict[str, Any]:
    """What the entries of a schedule have set by then, by configuration key; of a checked schedule."""
    due = [entry for entry in schedule if entry["updates"] <= updates]
    return {key: value for entry in due for key, value in entry.items() if key != "updates"}


def check_schedule(config: Config) -> None:
    """Make sure that a run can follow its schedule.

    Raises:
        UserError: an entry that is not of the form above, at a number of updates where no epoch begins or out of order,
            or with a key that cannot change.
    """
    method, last = config.method, -1
    for entry in config.schedule:
        updates = entry.get("updates")
        if not isinstance(updates, int) or isinstance(updates, bool) or len(entry) < 2:
            raise UserError(
                f"schedule: {entry} must be of the form {{updates: 5000, method.actor_lr: 1.0e-4}}, with the updates "
                "from which on its settings hold"
            )
        if updates % method.updates_per_epoch or not 0 <= updates < method.num_updates:
            raise UserError(
                f"schedule: updates={updates} must be a multiple of method.updates_per_epoch="
                f"{method.updates_per_epoch}, at least 0 and less than method.num_updates={method.num_updates}"
            )
        if updates <= last:
            raise UserError(f"schedule: updates={updates} comes after updates={last}; put its entries into their order")
        last = updates
        check_changes(config, {str(k): v for k, v in entry.items() if k != "updates"}, "schedule")


def check_changes(config: Config, changes: Mapping[str, Any], where: str) -> None:
    """Make sure that a run can go on with some keys changed.

    Args:
        changes: configuration key -> value.
        where: the part of the configuration that asks for it, for the sentence.

    Raises:
        UserError: a key that cannot change, or a value that it cannot have.
    """
    can = [f"method.{name}" for name in changeable_settings(config.method)]
    for key, value in changes.items():
        changed = apply_params(config, {key: value})  # refuses unknown keys and bad values
        check_effect(changed, [key])
        if key not in can:
            initial = [f"method.{name}" for name in getattr(config.method, "initial_settings", ())]
            why = "counts when training begins only" if key in initial else "decides how updates are computed"
            raise UserError(f"{where}: {key} {why} and cannot change while a run trains; what can is {', '.join(can)}")
        if pack_key(changed) != pack_key(config):
            raise UserError(
                f"{where}: {key} leaves a term out of the computation where it is 0, and cannot change from or to 0 "
                f"while a run trains, as from {settings_of(config, [key])[key]} to {value}"
            )


def settings_of(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    """What a configuration has for some dotted keys."""
    return {key: functools.reduce(getattr, key.split("."), config) for key in keys}


def scheduled_keys(config: Config) -> list[str]:
    """The keys that a run's schedule changes."""
    return list(dict.fromkeys(key for entry in config.schedule for key in entry if key != "updates"))
