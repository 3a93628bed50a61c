"""Episodes for the choice among a study's best trials, and the report on what all its episodes buy.

The bandit of `study.objective.kind=hybrid` plays one episode after the other. Each is written down before the next is
decided on, and which comes next follows from those alone: a study that was killed plays on as if it had not been.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from envs.dataset import Dataset
from envs.files import write_atomically
from orchestrator.artifacts import save_json
from orchestrator.config import Config
from orchestrator.learner import evaluation_env
from orchestrator.spool import RunSpool
from orchestrator.workers import PolicyArrays, evaluate
from sweeps.plots_selection import online_budget_figure
from sweeps.selection import PULLS_FILE, REPORT_FILE, Pull, best_trials, next_arm, read_pulls, selection_report
from sweeps.study import Study

FIRST_SEED = 1_000_000  # beyond evaluation.first_seed: episodes that no evaluation has seen


def play_bandit(config: Config, study: Study, dataset: Dataset, spool: RunSpool) -> None:
    """Play the episodes that are still missing, with the policies of the best trials' runs; the runs of a trial take
    turns, and the i-th episode of every trial begins in the same state.

    Args:
        spool: of the study's own run.
    """
    objective = config.study.objective
    records, path = {record.number: record for record in study.trials()}, study.folder / PULLS_FILE
    arms = best_trials(list(records.values()), objective.top, study.spec.direction)
    if objective.kind != "hybrid" or len(arms) < 2:
        return
    runs = {arm: sorted(records[arm].attrs["run_values"]) for arm in arms}
    policies: dict[str, PolicyArrays] = {}
    env_id, known = evaluation_env(config, dataset), dataset.episode_returns()
    low, high = (float(known.min()), float(known.max())) if len(known) else (np.inf, -np.inf)
    pulls = read_pulls(study.folder)
    with path.open("a+b") as file:
        file.truncate(_whole(path))
        while len(pulls) < objective.pulls:
            arm = next_arm(arms, pulls, low, high)
            turn = sum(pull.trial == arm for pull in pulls)
            run = runs[arm][turn % len(runs[arm])]
            if run not in policies:
                with np.load(study.folder / "runs" / run / "policy.npz") as arrays:
                    policies[run] = dict(arrays)
            seed = config.evaluation.first_seed + FIRST_SEED + turn
            value = float(evaluate(policies[run], env_id, [seed])[0])
            if not np.isfinite(value):  # it could not act: as bad as anything that is known
                value = min([0.0, low if np.isfinite(low) else 0.0, *(pull.value for pull in pulls)])
            pulls.append(Pull(arm, run, seed, value))
            file.write((json.dumps(asdict(pulls[-1])) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    for i, pull in enumerate(pulls):
        spool.metrics(i, {"selection/trial": float(pull.trial), "selection/return": pull.value})
    spool.artifact(path)


def _whole(path: Path) -> int:
    """Bytes up to the end of the last line that was written whole."""
    return path.read_bytes().rfind(b"\n") + 1


def keep_report(spool: RunSpool, study: Study, unit: str) -> None:
    """Write what the study's episodes buy, and draw it, as artifacts of the study's own run.

    Args:
        unit: of values in the environment: score or return.
    """
    report = selection_report(study.folder, study.trials())
    if report is None:
        return
    save_json(study.folder / REPORT_FILE, report.to_json())
    spool.artifact(study.folder / REPORT_FILE)
    spool.set_tags({"online_episodes": str(report.search_episodes + report.pulls)})
    if report.eop:
        figure, path = online_budget_figure(report, unit), study.folder / "online_budget.png"
        write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=120))
        spool.artifact(path, "plots")
