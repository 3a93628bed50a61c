"""The points that a study begins with (see `sweeps.warm_start`), settled before any compute is spent."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.errors import UserError
from orchestrator.artifacts import save_json
from orchestrator.config import Config, apply_params, load_config
from sweeps.confirm import confirmations
from sweeps.errors import SpaceError
from sweeps.study import Study
from sweeps.warm_start import best_of

FILE = "warm_start.json"  # of a study's folder: its points


def points(config: Config) -> list[dict[str, Any]]:
    """The points that `study.warm_start` names, in its order, none of them twice.

    Raises:
        UserError: there is no such variant or study, a study is of another method, or a point is not of the space: no
            value is moved to where it would be.
    """
    spec = config.study.warm_start
    wanted = {"study.warm_start.settings": _own(config, config.method.variant)} if spec.settings else {}
    for variant in spec.variants:
        wanted[f"study.warm_start.variants: {variant}"] = _own(config, variant)
    for name in spec.studies:
        wanted |= _earlier(config, name)
    found: list[dict[str, Any]] = []
    for where, settings in wanted.items():
        point = _point(config, where, settings)
        if point not in found:
            found.append(point)
    return found


def save(folder: Path, found: list[dict[str, Any]]) -> None:
    if found:
        save_json(folder / FILE, found)


def with_points(config: Config, found: list[dict[str, Any]]) -> Config:
    """The configuration with these points before those that are enqueued by hand."""
    warm = copy.copy(config)
    warm.study = copy.copy(config.study)
    warm.study.enqueue = [*found, *(point for point in config.study.enqueue if point not in found)]
    return warm


def load(folder: Path) -> list[dict[str, Any]]:
    """What `save` wrote for a study; [] where it began with nothing."""
    if not (folder / FILE).exists():
        return []
    found: list[dict[str, Any]] = json.loads((folder / FILE).read_text())
    return found


def _own(config: Config, variant: str) -> Config:
    """What the method's settings file says for the dataset."""
    return load_config([{"method": {"name": config.method_name, "variant": variant}, "dataset": config.dataset}], [])


def _earlier(config: Config, name: str) -> dict[str, Config]:
    """The settings of the best trials of an earlier study, by what they are called."""
    where, folder = f"study.warm_start.studies: {name}", Path(config.workdir).absolute() / "studies" / name
    if not (folder / "config.yaml").exists():
        known = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        raise UserError(f"{where} is not in {folder.parent}; it holds: {', '.join(known) or 'none'}")
    theirs = load_config([folder / "config.yaml"], [])
    if theirs.method_name != config.method_name:
        raise UserError(f"{where} is of method={theirs.method_name}, not of {config.method_name}; leave it out")
    study = Study.open(folder, read_only=True)
    best = best_of(study.trials(), study.spec.direction, config.study.warm_start.top, confirmations(folder))
    if not best:
        raise UserError(f"{where} has no trial that was trained to its end; leave it out")
    made = {f"{where} trial {one.number}": (apply_params(theirs, one.params), one.params) for one in best}
    for label, (settings, params) in made.items():
        for key in params.keys() - config.study.space.keys():
            if (value := _value(settings, key)) != (fixed := _value(config, key)):
                raise UserError(
                    f"{label} has {key}={value}, which is {fixed} here and not searched; add it to study.space, set it "
                    "to the same value, or leave the study out"
                )
    return {label: settings for label, (settings, _) in made.items()}


def _point(config: Config, where: str, settings: Config) -> dict[str, Any]:
    space = config.study_spec().validate()
    active = space.active({key: _value(settings, key) for key in space.parameters})
    try:
        space.check(active)
    except SpaceError as error:
        raise UserError(f"{where}: {error}") from None
    return active


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value
