"""The confirm stage of a search: what is trained again, and with which seeds (see `sweeps.confirm`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.artifacts import write_text
from orchestrator.config import Config, StudyConfig, apply_params, load_config, to_yaml
from sweeps.confirm import Candidate, ConfirmSpec, candidates, load_candidates, save_candidates
from sweeps.objectives import ObjectiveSpec
from sweeps.selection import chosen_trials
from sweeps.study import Study

CONFIG_FILE = "config.yaml"  # of the stage's folder; written last


def prepare(config: Config, study: Study, folder: Path) -> tuple[Config, list[Candidate]] | None:
    """What a confirm stage is to train, settled once and for all: a resumed one goes on with what stands in its folder.

    Args:
        config: of the search.
        study: the search, ended.
        folder: of the stage; it need not exist.

    Returns:
        The stage's configuration, and the candidate of each of its trials; None if there is nothing to confirm.
    """
    if not (folder / CONFIG_FILE).exists():
        spec = config.study.confirm
        if not study.spec.searches or not spec.top or study.num_finished < study.spec.num_trials:
            return None
        ignored = stage_seeds(config.method) if spec.fresh_stages else ()
        records = study.trials()
        ranked = chosen_trials(study.folder, records, len(records), study.spec.direction)
        begun_with = range(min(spec.enqueued, len(config.study.enqueue), len(records)))
        chosen = candidates(records, ranked, spec.top, ignored, begun_with)
        if not chosen:
            return None
        save_candidates(folder, chosen)
        write_text(folder / CONFIG_FILE, to_yaml(confirm_config(config, [one.params for one in chosen])))
    made = load_config([folder / CONFIG_FILE], [])
    # where it is computed is for the one who resumes it to say
    made.compute, made.workdir, made.tracking_uri = config.compute, config.workdir, config.tracking_uri
    return made, load_candidates(folder)


def confirm_config(config: Config, trials: Sequence[Mapping[str, Any]]) -> Config:
    """A study of listed trials with seeds, episodes and, if wanted, stages that the search has not used.

    Args:
        config: of the search.
        trials: the settings of each.
    """
    spec = config.study.confirm
    seeds = {key: _beyond(config, key) for key in stage_seeds(config.method)} if spec.fresh_stages else {}
    fresh = apply_params(config, seeds)
    fresh.seed, fresh.num_seeds = config.seed + config.num_seeds, spec.num_seeds
    fresh.evaluation.first_seed = config.evaluation.first_seed + config.evaluation.episodes
    # a search that saw no episodes is confirmed by them all the same, unless none may be played
    objective = (
        ObjectiveSpec() if config.evaluation.episodes else replace(config.study.objective, kind="offline", pulls=0)
    )
    listed = [dict(params) for params in trials]
    fresh.study = StudyConfig(
        config.study.name, len(listed), trials=listed, confirm=ConfirmSpec(top=0), divergence=config.study.divergence,
        objective=objective, objective_evaluations=config.study.objective_evaluations,
    )  # fmt: skip
    return fresh


def stage_seeds(method: Any) -> list[str]:
    """Keys of the seeds of a method's stages: those of its blocks, such as method.dynamics.seed."""
    return [f"method.{path}" for path in _seeds(method) if "." in path]


def _seeds(block: Any) -> Iterator[str]:
    for item in dataclasses.fields(block):
        part = getattr(block, item.name)
        if dataclasses.is_dataclass(part):
            yield from (f"{item.name}.{path}" for path in _seeds(part))
        elif item.name == "seed":
            yield item.name


def _beyond(config: Config, key: str) -> int:
    """A seed beyond the one configured, and beyond those that the search could choose."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    entry: Mapping[str, Any] = config.study.space.get(key, {})
    others: Collection[Any] = [entry.get("high"), *(entry.get("choices") or [])]
    return 1 + max(int(one) for one in (value, *others) if one is not None)
