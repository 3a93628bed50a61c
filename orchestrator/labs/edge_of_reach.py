"""The edge-of-reach laboratory: the simple environment of RAVL (Sims et al. 2024, Figures 4, 5 and 7), rebuilt.

The task is `envs.toys.EdgeOfReach`: with true dynamics the base method fails since errors at edge-of-reach states
compound, an oracle's values there, or RAVL's many critics, are the cure. docs/edge_of_reach.md says what is shown.

Shapes: N critic, B state.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agents.config import make_sac
from agents.diagnostics import auroc, ensemble_values
from envs.episodes import make_env
from envs.policies import load_policy
from envs.reach import EDGE_OF_REACH, grid_points, optimal_values
from envs.toys import EdgeOfReach
from orchestrator.artifacts import load_tensors
from orchestrator.config import Config, run_config
from orchestrator.driver import run_key
from orchestrator.labs.common import keep_figure, keep_rows
from orchestrator.spool import RunSpool, read_records
from sweeps.plots_edge_of_reach import Course, LabFigure, Map, draw_lab
from sweeps.study import Study

ABOUT = "why model-based methods fail with perfect dynamics: values of states that no rollout updates"
FIGURE_FILE = "edge_of_reach.png"
SUCCESS = 0.8  # of the best possible return

_PLANE = 16.0  # half-width of the figure's planes
_PENALTY_STATES = 4_000  # within reach, and as many at its edge
_WALKS = 25  # episodes in the figure


@dataclass(frozen=True)
class LabRun:
    """One run of the laboratory at its end."""

    method: str
    seed: int
    k: int  # rollout length
    mean_return: float  # over the evaluation's episodes
    mean_q: float  # of 2,000 targets of its last minibatches
    largest_q: float  # of the evaluations' mean_q
    edge_share: float  # of the targets, mean over the training
    patched_share: float  # of the targets, mean over the training; not a number without a patch
    penalty_auroc: float  # of the critics' variance, states at the edge of reach against those within
    success: bool


def options(seeds: int | None, updates: int | None) -> dict[str, Any]:
    """What changes of the study (see `orchestrator.labs`)."""
    changed: dict[str, Any] = {} if seeds is None else {"num_seeds": seeds}
    if updates is not None:
        changed["method"] = {"num_updates": updates, "updates_per_epoch": math.gcd(updates, 500)}
    return changed


def show(config: Config, study: Study, spool: RunSpool, console: Console) -> list[LabRun]:
    """The table, also as lab.csv, and the figure of a study whose trials have ended; both become artifacts.

    Runs that diverged are left out, and counted in a line of their own.
    """
    best = best_return()
    settings: list[list[_Measured]] = []
    diverged = 0
    for record in study.trials():
        found = [_measure(run_config(config, record.active, s), study.folder, record.number) for s in config.seeds]
        measured = [one for one in found if one is not None]
        diverged += len(found) - len(measured)
        if measured:
            settings.append(measured)
    runs = [one.result(best) for measured in settings for one in measured]
    keep_rows(study.folder, runs, LabRun, spool)
    console.print(_table(runs, best, config))
    if diverged:
        console.print(f"[yellow]{diverged} runs diverged and are left out[/yellow]", highlight=False)
    if settings:
        figure = draw_lab(_figure(settings, best, config))
        keep_figure(study.folder / FIGURE_FILE, figure, spool, console)
    return runs


def method_name(config: Config) -> str:
    """What the paper calls a setting."""
    method = config.method
    if method.patch != "none":
        return "Base-OraclePatch" if method.patch == "oracle" else f"Base, {method.patch} patch"
    return "Base" if method.num_critics == 2 else "RAVL"


def best_return() -> float:
    """The largest mean return of an episode from the environment's start states, by dynamic programming."""
    env = make_env(EDGE_OF_REACH)
    horizon = env.spec.max_episode_steps if env.spec else None
    env.close()
    assert horizon is not None
    half_width, spacing = EdgeOfReach.START + horizon, 0.25
    values, _ = optimal_values(1.0, half_width, spacing, horizon=horizon)
    inside = np.abs(grid_points(half_width, spacing)).max(-1) <= EdgeOfReach.START
    return float(values[inside].mean())


# ---- what is measured of a run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """A finished run."""

    config: Config
    folder: Path
    updates: list[int]  # of the evaluations
    returns: list[float]
    mean_q: list[float]
    edge_share: list[float]
    patched_share: list[float]  # of every epoch, empty without a patch
    penalty_within: Tensor  # variance of the critics at random states (B,)
    penalty_edge: Tensor  # (B,)

    def result(self, best: float) -> LabRun:
        scores = torch.cat((self.penalty_edge, self.penalty_within))
        at_edge = torch.arange(len(scores)) < len(self.penalty_edge)
        return LabRun(
            method_name(self.config), self.config.seed, self.config.method.rollout_length, self.returns[-1],
            self.mean_q[-1], max(self.mean_q), statistics.fmean(self.edge_share),
            statistics.fmean(self.patched_share) if self.patched_share else math.nan,
            auroc(scores, at_edge, ~at_edge).item(), self.returns[-1] >= SUCCESS * best,
        )  # fmt: skip


def _measure(config: Config, folder: Path, trial: int) -> _Measured | None:
    """What is known of a run; None if it did not end with a policy."""
    key = run_key(trial, config.seed)
    run = folder / "runs" / key
    if not (run / "checkpoint.pt").exists():
        return None
    evaluations = json.loads((run / "evaluations.json").read_text())
    logged: dict[str, dict[int, float]] = {}
    for record, _ in read_records(folder / "spool" / f"{key}.jsonl"):
        for name, value in (record or {}).get("values", {}).items():
            logged.setdefault(name, {})[record["step"]] = value  # type: ignore[index]
    updates = [evaluation["updates"] for evaluation in evaluations]
    within, edge = _penalties(config, run)
    mean_q, share = ([logged[name].get(u, math.nan) for u in updates] for name in ("reach/q_mean", "reach/edge_share"))
    return _Measured(
        config, run, updates, [evaluation["value"] for evaluation in evaluations], mean_q, share,
        list(logged.get("train/patched_share", {}).values()), within, edge,
    )  # fmt: skip


def _penalties(config: Config, run: Path) -> tuple[Tensor, Tensor]:
    """Variance of a run's target critics at states drawn uniformly within reach and at its edge, `(B,)` each, for
    actions of its policy."""
    sac = make_sac([config.method], [config.seed], 2, 2)
    sac.load_state_dict(load_tensors(run / "checkpoint.pt")["sac"])
    draw, reach = torch.Generator().manual_seed(0), EdgeOfReach.START + config.method.rollout_length
    states = (torch.rand(40 * _PENALTY_STATES, 2, generator=draw) * 2 - 1) * reach
    edge = EdgeOfReach.edge_of_reach(states, config.method.rollout_length)
    groups = (states[~edge][:_PENALTY_STATES], states[edge][:_PENALTY_STATES])
    variances = []
    for group in groups:
        noise = torch.randn(1, len(group), 2, generator=draw)
        variances.append(ensemble_values(sac.actor, sac.target, group.unsqueeze(0), noise)[0].var(0, correction=0))
    return variances[0], variances[1]


# ---- how it is shown --------------------------------------------------------------------------------------------


def _table(runs: Sequence[LabRun], best: float, config: Config) -> Table:
    title = (
        f"edge of reach, a reconstruction: {config.num_seeds} seeds, {config.method.num_updates} updates; best "
        f"possible return {best:.1f}, success from {SUCCESS * best:.1f}; Q: median of the last and of the largest "
        f"mean, where no policy's value is above {_largest_value(config):.1f}"
    )
    table = Table(title=title)
    columns = ("method", "k", "return", "mean Q", "largest", "edge targets %", "patched %", "AUROC", "success")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, k in dict.fromkeys((run.method, run.k) for run in runs):
        mine = [run for run in runs if (run.method, run.k) == (method, k)]
        returns = [run.mean_return for run in mine]
        patched = statistics.fmean(run.patched_share for run in mine)
        table.add_row(
            method, str(k), f"{statistics.fmean(returns):.1f} ± {statistics.pstdev(returns):.1f}",
            f"{statistics.median(run.mean_q for run in mine):.3g}",
            f"{statistics.median(run.largest_q for run in mine):.3g}",
            f"{100 * statistics.fmean(run.edge_share for run in mine):.2f}",
            "" if math.isnan(patched) else f"{100 * patched:.2f}",
            f"{statistics.fmean(run.penalty_auroc for run in mine):.2f}",
            f"{sum(run.success for run in mine)} of {len(mine)}",
        )  # fmt: skip
    return table


def _figure(settings: Sequence[Sequence[_Measured]], best: float, config: Config) -> LabFigure:
    length = config.method.rollout_length
    courses, walks, lengths = [], {}, {}
    shown: Sequence[_Measured] = []
    for measured in settings:
        name, k = method_name(measured[0].config), measured[0].config.method.rollout_length
        course = Course(
            name, measured[0].updates,
            *([getattr(one, what) for one in measured] for what in ("returns", "mean_q", "edge_share")),
        )  # fmt: skip
        if name == "Base":
            lengths[k] = course
        if k != length:
            continue
        courses.append(course)
        if name == "RAVL":
            shown = measured
        if name in ("Base", "Base-OraclePatch", "RAVL"):
            walks[name] = _walks(measured[0].folder)
    points, start = grid_points(_PLANE, 0.25), EdgeOfReach.START
    axis, reward = points[:, 0, 0], EdgeOfReach.reward(points)
    return LabFigure(
        f"Edge-of-reach states: a reconstruction of RAVL's simple environment, k = {length}, true dynamics",
        Map(axis.tolist(), reward, start, start + length - 1, start + length), walks, courses, best,
        _largest_value(config),
        *((shown[0].penalty_within.tolist(), shown[0].penalty_edge.tolist()) if shown else ([], [])),
        [one.result(best).penalty_auroc for one in shown], lengths,
    )  # fmt: skip


def _largest_value(config: Config) -> float:
    """The value of the highest reward forever."""
    reward = EdgeOfReach.reward(grid_points(_PLANE, 0.0625))
    return float(reward.max()) / (1 - config.method.gamma)


def _walks(run: Path) -> Any:
    """Episodes of a run's deterministic policy `(episodes, T + 1, 2)`, from start states on a grid."""
    policy, side = load_policy(run / "policy.npz"), math.isqrt(_WALKS)
    axis = np.linspace(-EdgeOfReach.START, EdgeOfReach.START, side)
    states = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    walks = [states]
    for _ in range(30):
        states = states + np.clip(policy.act(states.astype(np.float32), None), -1.0, 1.0)
        walks.append(states)
    return np.stack(walks, 1)
