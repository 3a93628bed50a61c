"""Population-based training of a pack: what its members are trained with, and who goes on from whom.

The population is the trials of a study (`sweeps.pbt`), all of them in one pack. After every so many evaluations comes a
turn: the worst members take over what the best ones have learned, networks, optimisers, replay and all, with
hyperparameters a little beside theirs. A turn is a function of the sampler's seed, the updates done and the members'
values. All members have the same seed, and so the same batches and noise: they differ in their hyperparameters alone.

A member that diverges leaves the pack until the next turn, at which it is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.errors import UserError
from envs.files import write_atomically
from orchestrator.artifacts import save_json, write_text
from orchestrator.config import Config, apply_params, load_config, run_config, to_yaml
from orchestrator.schedule import check_changes, settings_of
from orchestrator.spool import RunSpool
from sweeps.pbt import SCHEDULE, PBTSpec, exploit, explore
from sweeps.plots_pbt import schedule_figure
from sweeps.space import Params, SearchSpace
from sweeps.study import Study

HISTORY_FILE = "population.json"  # of a pack's folder
LINEAGE_FILE = "lineage.json"  # of a study's folder
SCHEDULE_FILE = "schedule.yaml"  # of a run's folder
MAX_DRAWS = 20  # of hyperparameters that no other member has
TOO_LARGE = (
    "the population of study.pbt does not fit the memory in one pack, which it has to be; lower study.num_trials, "
    "method.batch_size, method.hidden or what the method's replay holds"
)


def check_population(config: Config) -> None:
    """Make sure that the trials of a study can be a population, if they are to be one.

    Raises:
        UserError: a searched key that cannot change while a run trains, or a setting that does not go with it.
    """
    spec = config.study.pbt
    if spec is None:
        return
    if config.schedule:
        raise UserError("study.pbt finds a schedule, so none can be given; leave out schedule or study.pbt")
    if config.study.objective_evaluations != 1:
        raise UserError(
            f"study.objective_evaluations={config.study.objective_evaluations} must be 1 with study.pbt: the "
            "evaluations before the last are of another state where a member was replaced"
        )
    size, most = config.study.num_trials, config.compute.runs_per_pack
    if most is not None and most < size:
        raise UserError(
            f"compute.runs_per_pack={most} is less than the population of study.num_trials={size}, which is one pack; "
            "leave it out"
        )
    every = config.evaluation.every_epochs * spec.every_evaluations
    if every >= config.method.num_epochs:
        raise UserError(
            f"study.pbt would never replace a member: the first turn comes after {every} epochs, and a run has "
            f"{config.method.num_epochs}; lower evaluation.every_epochs or study.pbt.every_evaluations"
        )
    space = SearchSpace.from_config(config.study.space)
    ends = {key: list(p.choices) or [p.low, p.high] for key, p in space.parameters.items()}
    first = apply_params(config, {key: values[0] for key, values in ends.items()})
    for key, values in ends.items():
        for value in values:
            check_changes(first, {key: value}, "study.pbt")


class Population:
    """What the members of a pack are trained with; changed by `turn` alone.

    Args:
        settings: of the study: `spec`, `space` and `seed`, as `population_settings` makes them.
        initial: hyperparameters that each run begins with, by its key, in the pack's order.

    Attributes:
        settings: of every run, as they are.
        histories: of every run: [{updates, run, settings}, ...], the runs whose states its own comes from, each from so
            many updates on, and what they were trained with.
        turns: [{updates, run, parent, value, parent_value, settings}, ...] of the members replaced.
    """

    def __init__(self, settings: Mapping[str, Any], initial: Mapping[str, Params]) -> None:
        self.spec = PBTSpec(**settings["spec"])
        self.space = SearchSpace.from_config(settings["space"])
        self.seed = int(settings["seed"])
        self._places = {key: place for place, key in enumerate(initial)}
        self.settings = {key: dict(params) for key, params in initial.items()}
        self.histories: dict[str, list[dict[str, Any]]] = {
            key: [{"updates": 0, "run": key, "settings": dict(params)}] for key, params in initial.items()
        }
        self.turns: list[dict[str, Any]] = []

    def is_due(self, epoch: int, every_epochs: int) -> bool:
        """Whether a turn comes before this epoch."""
        return epoch > 0 and epoch % (every_epochs * self.spec.every_evaluations) == 0

    def turn(self, updates: int, values: Mapping[str, float | None]) -> dict[str, str]:
        """Replace the worst members.

        Args:
            updates: done so far.
            values: of the runs that are still wanted, at the last evaluation; None: diverged.

        Returns:
            For each of them the run from whose state it goes on.
        """
        runs = sorted(values, key=lambda key: self._places[key])
        chosen = exploit([values[key] for key in runs], self.spec.quantile, np.random.default_rng([self.seed, updates]))
        parents = {key: runs[source] for key, source in zip(runs, chosen, strict=True)}
        siblings: dict[str, list[str]] = {}
        for key in (key for key, parent in parents.items() if parent != key):
            parent = parents[key]
            draws = np.random.default_rng([self.seed, updates, self._places[key]])
            # with the same state, seed and settings as another member's it would for ever be its double
            taken = [self.settings[parent], *(self.settings[k] for k in siblings.setdefault(parent, []))]
            for _ in range(MAX_DRAWS):
                params = explore(self.settings[parent], self.space, self.spec, draws)
                if params not in taken:
                    break
            siblings[parent].append(key)
            self.turns.append({
                "updates": updates, "run": key, "parent": parent, "value": values[key], "parent_value": values[parent],
                "settings": params,
            })  # fmt: skip
            # no parent is replaced in the same turn
            self.settings[key] = params
            self.histories[key] = [*self.histories[parent], {"updates": updates, "run": key, "settings": params}]
        return parents

    def schedule(self, run: str) -> list[dict[str, Any]]:
        """What the state of a run has been trained with, as a schedule whose first entry holds from the beginning."""
        return [{"updates": step["updates"], **step["settings"]} for step in self.histories[run]]

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "histories": self.histories, "turns": self.turns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.settings = {key: dict(params) for key, params in state["settings"].items()}
        self.histories = {key: list(steps) for key, steps in state["histories"].items()}
        self.turns = list(state["turns"])


def population_settings(study: Study) -> dict[str, Any] | None:
    """What a learner has to know of a study for `Population`; None if its trials are no population."""
    spec = study.spec.to_config()
    if spec["pbt"] is None:
        return None
    return {"spec": spec["pbt"], "space": spec["space"], "seed": spec["sampler"]["seed"]}


# ---- what is left behind --------------------------------------------------------------------------------------------


def write_schedule(path: Path, config: Config, steps: Sequence[Mapping[str, Any]]) -> None:
    """Write the configuration of a training that repeats a schedule with any seed (`offsweep train --config`).

    Args:
        config: of a run.
        steps: as `Population.schedule` gives them.
    """
    first, *later = steps
    replay = run_config(config, {key: value for key, value in first.items() if key != "updates"}, config.seed)
    replay.schedule = [dict(step) for step in later]
    write_text(path, to_yaml(replay))


def keep_schedule(study: Study, trial: int, run_key: str) -> None:
    """Keep with a trial of a population what its run's last state has been trained with."""
    path = study.folder / "runs" / run_key / SCHEDULE_FILE
    if study.spec.pbt is not None and path.exists():
        config = load_config([path], [])
        first = settings_of(config, study.space.parameters)
        study.set_attr(trial, SCHEDULE, [{"updates": 0, **first}, *config.schedule])


def keep_population(study: Study, spool: RunSpool) -> None:
    """The lineage and the figure of a finished population, as artifacts of the study's own run."""
    packs = {pack for record in study.trials() for pack in record.attrs.get("packs", [])}
    paths = [path for pack in sorted(packs) if (path := study.folder / "packs" / pack / HISTORY_FILE).exists()]
    best = study.best
    if not paths or best is None:  # all members have diverged
        return
    [content] = [json.loads(path.read_text()) for path in paths]
    save_json(study.folder / LINEAGE_FILE, {"turns": content["turns"], "histories": content["histories"]})
    spool.artifact(study.folder / LINEAGE_FILE)
    [run] = [key for key in content["histories"] if int(key[1:].partition("-")[0]) == best.number]
    figure = schedule_figure(content["histories"], run, study.space, study.spec.total_steps)
    path = study.folder / "schedule.png"
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=120))
    spool.artifact(path, "plots")
