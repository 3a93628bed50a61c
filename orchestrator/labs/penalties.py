"""The penalties laboratory: which measure of an ensemble's uncertainty goes with its true error, and how that changes
with the size of the ensemble (after Lu et al. 2022).

Every trial of the study is one repetition with an ensemble of its own. What its penalties are worth is measured against
the simulator by `agents.penalty_quality`, under policies that lead the rollouts elsewhere each, and on transitions of
other policies' datasets. docs/studies.md says what is shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.dynamics import Ensemble
from agents.method import TrainingData, load_method
from agents.model_error import simulator, steps_told
from agents.penalties import PENALTIES
from agents.penalty_quality import NOMINAL, Judged, imagine, transfer
from envs.collect import uniform_policy
from envs.errors import UserError
from envs.policies import Policy, embedded_actors, load_policy
from envs.recipes import EMBEDDED
from envs.registry import load_dataset
from envs.transforms import base_name
from orchestrator.artifacts import ArtifactStore, stage_keys
from orchestrator.config import Config, run_config
from orchestrator.driver import run_key
from orchestrator.labs.common import keep_figure, keep_rows, read_rows
from orchestrator.learner import action_bounds
from orchestrator.spool import RunSpool
from sweeps.plots_penalties import PenaltyFigure, draw_penalties
from sweeps.study import Study

ABOUT = (
    "which of six penalties goes with a model's true error, under policies that leave the data (Lu et al.'s question)"
)
FIGURE_FILE = "penalties.png"
SIZES = (2, 5, 7, 10)  # of ensembles, beside that of all members
SHOWN = 7  # the size whose results are told by policy: that of MOPO's settings
NUM_STARTS = 500
LENGTH = 20  # steps of a rollout
ALL_STEPS = 0

TRAINED = "MOPO's own"
_OTHERS = {"medium": "behaviour's last", "expert": "expert", "uniform": "random actions"}
_STATISTICS = ("spearman", "pearson", "spearman_mean", "auroc", "ause", "inside_1", "inside_2")


@dataclass(frozen=True)
class LabRow:
    """What a penalty is worth in one repetition, under one policy or on one dataset (see `agents.penalty_quality`)."""

    seed: int  # of the ensemble
    scenario: str  # a policy that is rolled out, or "data: ..." for single steps of a dataset
    imagined: bool  # whether it is a policy
    members: int  # N
    step: int  # of the rollouts; 0: all of them taken together
    penalty: str
    spearman: float
    pearson: float
    spearman_mean: float
    auroc: float
    ause: float
    inside_1: float
    inside_2: float
    states: int  # that it is measured on


def options(seeds: int | None, updates: int | None) -> dict[str, Any]:
    """What changes of the study (see `orchestrator.labs`)."""
    changed: dict[str, Any] = {}
    if seeds is not None:
        changed["study"] = {"trials": [{"method.dynamics.seed": seed} for seed in range(seeds)]}
    if updates is not None:
        changed["method"] = {"num_updates": updates, "updates_per_epoch": math.gcd(updates, 1000)}
    return changed


def show(config: Config, study: Study, spool: RunSpool, console: Console) -> list[LabRow]:
    """The tables, also as lab.csv, and the figure of a study whose trials have ended; both become artifacts.

    Repetitions whose ensemble could not be trained are left out, and counted in a line of their own.

    Raises:
        UserError: the environment has no true dynamics.
    """
    dataset = load_dataset(config.dataset, Path(config.workdir))
    data = TrainingData.from_dataset(dataset, *action_bounds(dataset.env_id))
    true = simulator(data)
    if true is None:
        raise UserError(f"{dataset.env_id} has no true dynamics that a model's errors could be measured against")
    policies, others = known_policies(config.dataset), other_data(config, data)
    rows: list[LabRow] = []
    missing = 0
    for record in study.trials():
        one = run_config(config, record.active, config.seed)
        whole = _ensemble(one, dataset.content_hash)
        if whole is None:
            missing += 1
            continue
        seed = one.method.dynamics.seed
        console.print(f"measuring repetition {seed}", highlight=False)
        trained = study.folder / "runs" / run_key(record.number, config.seed) / "policy.npz"
        mine = policies | ({TRAINED: load_policy(trained)} if trained.exists() else {})
        for size in sizes(whole):
            ensemble = whole.first(size, one.method.dynamics.num_elites)
            for name, policy in mine.items():
                judged = imagine(policy, ensemble, data, true, NUM_STARTS, LENGTH, seed)
                rows += lab_rows(seed, name, True, size, judged)
            for name, other in others.items():
                judged = transfer(ensemble, other, NUM_STARTS * LENGTH, seed)
                rows += lab_rows(seed, f"data: {name}", False, size, judged)
    keep_rows(study.folder, rows, LabRow, spool)
    if missing:
        console.print(f"[yellow]{missing} repetitions have no ensemble and are left out[/yellow]", highlight=False)
    if rows:
        for table in tables(rows, config):
            console.print(table)
        keep_figure(study.folder / FIGURE_FILE, draw_penalties(figure(rows, config)), spool, console)
    return rows


def table_values(folder: Path, row: str, column: str) -> dict[int, float]:
    """Spearman's correlation of a penalty (column) with the true error over whole rollouts of ensembles of `SHOWN`,
    mean over the policies; there is one row."""
    found: dict[int, list[float]] = {}
    for one in read_rows(folder, LabRow):
        if (one.imagined, one.members, one.step, one.penalty) == (True, SHOWN, ALL_STEPS, column) and not row:
            found.setdefault(one.seed, []).append(one.spearman)
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def sizes(ensemble: Ensemble) -> list[int]:
    """The sizes of ensembles that are made of a large one, itself the last."""
    return [*(size for size in SIZES if size < ensemble.size), ensemble.size]


def lab_rows(seed: int, scenario: str, imagined: bool, members: int, judged: Judged) -> list[LabRow]:
    """The rows of lab.csv of one ensemble in one scenario."""
    length = len(judged.error_HB)
    parts = {ALL_STEPS: None} | {step: [step] for step in (steps_told(length) if length > 1 else [])}
    return [
        LabRow(
            seed, scenario, imagined, members, number, penalty, **asdict(judged.quality(penalty, steps)),
            states=judged.count(steps),
        )
        for number, steps in parts.items()
        for penalty in PENALTIES
    ]  # fmt: skip


def known_policies(dataset: str) -> dict[str, Policy]:
    """Policies of the environment of an embedded dataset, near its data and far from it, by how the lab calls them."""
    name = base_name(dataset)
    env_id, robot = EMBEDDED[name].env_id, _robot(name)
    found: dict[str, Policy] = {}
    for kind, shown in _OTHERS.items():
        if kind == "uniform":
            found[shown] = uniform_policy(env_id)
        elif f"{robot}-{kind}" in embedded_actors():
            found[shown] = load_policy(f"{robot}-{kind}")
    return found


def other_data(config: Config, data: TrainingData) -> dict[str, TrainingData]:
    """A worse and a better policy's transitions in the same environment, and those that the ensemble learned from."""
    robot, found = _robot(base_name(config.dataset)), {"its own": data}
    for kind in ("random", "expert"):
        if (name := f"embedded/{robot}-{kind}-v0") in EMBEDDED:
            dataset = load_dataset(name, Path(config.workdir))
            found[kind] = TrainingData.from_dataset(dataset, *action_bounds(dataset.env_id))
    return found


def _robot(name: str) -> str:
    return name.removeprefix("embedded/").split("-")[0]


def _ensemble(config: Config, dataset_hash: str) -> Ensemble | None:
    """The whole ensemble of a run; None if it was not trained."""
    store = ArtifactStore(Path(config.workdir) / "artifacts")
    stages = load_method(config.method_name).stages(config.method)
    kind, key = stages["dynamics"].kind, stage_keys(stages, dataset_hash)["dynamics"]
    return Ensemble.from_state_dict(store.load(kind, key)) if store.exists(kind, key) else None


# ---- how it is shown --------------------------------------------------------------------------------------------


def mean(rows: Sequence[LabRow], statistic: str) -> float:
    """Over rows that have it; not a number where none has."""
    known = [value for value in (getattr(row, statistic) for row in rows) if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def tables(rows: Sequence[LabRow], config: Config) -> list[Table]:
    """What penalties are worth by the size of the ensemble, and by scenario."""
    seeds, whole = len({row.seed for row in rows}), [row for row in rows if row.step == ALL_STEPS]
    imagined = [row for row in whole if row.imagined]
    by_size = Table(
        title=f"penalties on {config.dataset}: imagined states of {LENGTH} steps, mean over {seeds} repetitions and "
        f"{len({row.scenario for row in imagined})} policies; of the mean: Spearman with the error of the members' "
        "mean; AUROC of the largest 10 % of errors, AUSE 0 is best, inside 1 and 2 deviations "
        f"{100 * NOMINAL[0]:.1f} and {100 * NOMINAL[1]:.1f} % of Gaussians"
    )
    for column in ("penalty", "N", "Spearman", "Pearson", "of the mean", "AUROC", "AUSE", "inside 1", "inside 2"):
        by_size.add_column(column, justify="left" if column == "penalty" else "right")
    for penalty in PENALTIES:
        for members in sorted({row.members for row in rows}):
            mine = [row for row in imagined if (row.penalty, row.members) == (penalty, members)]
            by_size.add_row(penalty, str(members), *(_cell(mean(mine, name), name) for name in _STATISTICS))
        by_size.add_section()
    shown = shown_size(rows)
    by_scenario = Table(title=f"Spearman / Pearson by policy and, of single steps, by dataset; N = {shown}")
    for column in ("", *PENALTIES):
        by_scenario.add_column(column, justify="right" if column else "left")
    for scenario in dict.fromkeys(row.scenario for row in whole):
        cells = []
        for penalty in PENALTIES:
            mine = [row for row in whole if (row.scenario, row.penalty, row.members) == (scenario, penalty, shown)]
            cells.append(f"{mean(mine, 'spearman'):.2f} / {mean(mine, 'pearson'):.2f}")
        by_scenario.add_row(scenario, *cells)
    return [by_size, by_scenario]


def shown_size(rows: Sequence[LabRow]) -> int:
    """`SHOWN`, or the largest size there is."""
    known = {row.members for row in rows}
    return SHOWN if SHOWN in known else max(known)


def _cell(value: float, statistic: str) -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:.1f} %" if statistic.startswith("inside") else f"{value:.2f}"


def figure(rows: Sequence[LabRow], config: Config) -> PenaltyFigure:
    """What the figure shows."""
    members, seeds = sorted({row.members for row in rows}), sorted({row.seed for row in rows})
    whole, shown = [row for row in rows if row.step == ALL_STEPS], shown_size(rows)
    imagined = [row for row in whole if row.imagined]
    by_size = {
        name: {
            penalty: [
                [
                    mean([r for r in imagined if (r.seed, r.penalty, r.members) == (s, penalty, n)], name)
                    for n in members
                ]
                for s in seeds
            ]
            for penalty in PENALTIES
        }
        for name in ("spearman", "pearson", "auroc", "ause")
    }
    steps = sorted({row.step for row in rows if row.step != ALL_STEPS})
    by_step = {
        penalty: [
            mean([r for r in rows if (r.penalty, r.step, r.members) == (penalty, t, shown)], "spearman") for t in steps
        ]
        for penalty in PENALTIES
    }
    inside = {
        (penalty, deviations): [
            mean([r for r in imagined if (r.penalty, r.members) == (penalty, n)], f"inside_{deviations}")
            for n in members
        ]
        for penalty in ("max_aleatoric", "ensemble_std")
        for deviations in (1, 2)
    }
    by_scenario = {
        scenario: [
            mean([r for r in whole if (r.scenario, r.penalty, r.members) == (scenario, penalty, shown)], "spearman")
            for penalty in PENALTIES
        ]
        for scenario in dict.fromkeys(row.scenario for row in whole)
    }
    title = f"Penalties and the model's true error: {base_name(config.dataset)}, {len(seeds)} repetitions"
    return PenaltyFigure(title, PENALTIES, members, by_size, steps, by_step, shown, inside, NOMINAL, by_scenario)
