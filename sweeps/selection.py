"""What choosing among the policies of a study costs in episodes, and how good the chosen one then is.

`expected_online_performance` is Kurenkov and Kolesnikov's (ICML 2022): the expected best value of n policies drawn
with replacement. `bandit_curve` is the selection before deployment of Unifloral (2025, "Clean Slate"): a UCB bandit
among K policies, one pull an episode. Both are computed from what a study has stored; nothing is run.

Shapes: N policies, K arms, R repeats, T pulls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sweeps.objectives import SCORE, ObjectiveSpec
from sweeps.spec import StudySpec
from sweeps.study import SPEC_FILE, Study, TrialRecord

FloatArray = NDArray[np.float64]

ALPHA = 2.0  # of the UCB bonus
ARMS, PULLS, REPEATS = 8, 200, 1_000
REGRETS = (1, 3, 5)  # k of regret@k
REPORT_FILE = "online_budget.json"  # of a study's folder, once it has ended
PULLS_FILE = "selection.jsonl"  # of a study's folder: the episodes of the bandit of kind=hybrid
_RESAMPLES = 1_000
_STEPS_KEPT = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 75, 100, 150, 200)  # pulls at which a curve is told


# ---- budgets --------------------------------------------------------------------------------------------------------


def expected_online_performance(values: Sequence[float], budgets: Sequence[int]) -> list[float]:
    """EOP(n) = sum_i y_(i) [(i / N)^n - ((i - 1) / N)^n] for each n: the expected best of n of the N values, drawn with
    replacement.

    Raises:
        ValueError: no values, or a budget below 1.
    """
    if not len(values) or min(budgets, default=1) < 1:
        raise ValueError("at least one value and budgets of at least 1 are needed")
    y_N = np.sort(np.asarray(values, np.float64))
    share = np.arange(len(y_N) + 1) / len(y_N)
    return [float(y_N @ np.diff(share**n)) for n in budgets]


@dataclass(frozen=True)
class BanditCurve:
    """How good the policy is that a bandit believes the best after so many episodes; mean over repeats, in the unit of
    the policies' true values, with a 95 % bootstrap interval of that mean."""

    pulls: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    num_policies: int
    num_arms: int  # in each repeat


def ucb_index(means: FloatArray, counts: FloatArray, pulls: int | FloatArray, alpha: float = ALPHA) -> FloatArray:
    """mean_a + sqrt(alpha ln t / n_a) of returns in [0, 1], any shape; infinite for an arm that was never pulled."""
    with np.errstate(divide="ignore", invalid="ignore"):
        index = means + np.sqrt(alpha * np.log(pulls) / counts)
    return np.where(counts > 0, index, np.inf)


def bandit_curve(
    returns: Sequence[Sequence[float]], values: Sequence[float], num_arms: int = ARMS, num_pulls: int = PULLS,
    num_repeats: int = REPEATS, seed: int = 0, alpha: float = ALPHA,
) -> BanditCurve:  # fmt: skip
    """Play the bandit again and again with stored returns.

    Each repeat draws K of the policies without replacement (all, if there are fewer). Every arm is pulled once, then
    the one with the largest `ucb_index`; a pull draws one of the arm's stored returns, and all returns are scaled to
    [0, 1] together. Believed best is the arm with the highest mean so far.

    Args:
        returns: of every policy's episodes, N lists.
        values: of every policy: its true value, such as its score over these episodes.

    Raises:
        ValueError: a policy without returns, or fewer than two policies.
    """
    if len(returns) < 2 or len(returns) != len(values) or not all(map(len, returns)):
        raise ValueError("two policies or more, each with returns and a value, are needed")
    rng = np.random.default_rng(seed)
    flat = np.concatenate([np.asarray(r, np.float64) for r in returns])
    low, spread = float(flat.min()), float(np.ptp(flat)) or 1.0
    sizes_N = np.array([len(r) for r in returns])
    first_N = np.concatenate(([0], np.cumsum(sizes_N)[:-1]))
    flat = (flat - low) / spread
    num_arms, rows = min(num_arms, len(returns)), np.arange(num_repeats)
    arms_RK = rng.random((num_repeats, len(returns))).argsort(1)[:, :num_arms]
    true_N = np.asarray(values, np.float64)
    sums_RK, counts_RK = np.zeros((num_repeats, num_arms)), np.zeros((num_repeats, num_arms))
    believed_TR = np.empty((num_pulls, num_repeats))
    draws_TR = rng.random((num_pulls, num_repeats))
    for t in range(num_pulls):
        with np.errstate(invalid="ignore", divide="ignore"):
            means_RK = sums_RK / counts_RK
        chosen_R = ucb_index(means_RK, counts_RK, max(t, 1), alpha).argmax(1)
        policy_R = arms_RK[rows, chosen_R]
        place_R = first_N[policy_R] + (draws_TR[t] * sizes_N[policy_R]).astype(np.int64)
        sums_RK[rows, chosen_R] += flat[place_R]
        counts_RK[rows, chosen_R] += 1
        best_R = np.divide(sums_RK, counts_RK, out=np.full_like(sums_RK, -np.inf), where=counts_RK > 0).argmax(1)
        believed_TR[t] = true_N[arms_RK[rows, best_R]]
    told = [t for t in _STEPS_KEPT if t <= num_pulls] or [num_pulls]
    kept_TR = believed_TR[[t - 1 for t in told]]
    resampled = np.stack([kept_TR[:, rng.integers(num_repeats, size=num_repeats)].mean(1) for _ in range(_RESAMPLES)])
    lower, upper = np.percentile(resampled, (2.5, 97.5), axis=0)
    means = kept_TR.mean(1)
    return BanditCurve(told, means.tolist(), lower.tolist(), upper.tolist(), len(returns), num_arms)


# ---- offline metrics against episodes -------------------------------------------------------------------------------


def rank_correlation(metric: Sequence[float], values: Sequence[float]) -> float | None:
    """Spearman's; None where it is not defined: fewer than three pairs, or one side all the same."""
    from scipy.stats import spearmanr

    if len(metric) < 3 or len(set(metric)) == 1 or len(set(values)) == 1:
        return None
    return float(spearmanr(metric, values).statistic)


def regret_at(k: int, metric: Sequence[float], values: Sequence[float]) -> float:
    """How far the best value among the k with the highest metric stays behind the best of all, in the values' unit."""
    order = np.argsort(-np.asarray(metric, np.float64), kind="stable")[:k]
    told = np.asarray(values, np.float64)
    return float(told.max() - told[order].max())


# ---- the choice of trials -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pull:
    """One episode of the bandit among a study's best trials."""

    trial: int
    run: str  # key of the run whose policy acted
    seed: int  # of the episode
    value: float  # its return


def read_pulls(study_folder: Path) -> list[Pull]:
    """The bandit's episodes so far, in their order; a last line that a kill has cut is left out."""
    try:
        text = (study_folder / PULLS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [Pull(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def best_trials(records: Sequence[TrialRecord], top: int, direction: str = "maximize") -> list[int]:
    """Numbers of the complete trials with the best values, best first; diverged ones are none of them."""
    sign = -1.0 if direction == "maximize" else 1.0
    complete = [r for r in records if r.state == "complete" and not r.diverged and r.value is not None]
    ranked = sorted(complete, key=lambda r: (sign * (r.value or 0.0), r.number))
    return [record.number for record in ranked[:top]]


def next_arm(arms: Sequence[int], pulls: Sequence[Pull], low: float, high: float) -> int:
    """The trial that the bandit plays next, a function of its episodes so far: every arm once, in order, then the one
    with the largest `ucb_index`.

    Args:
        low, high: what returns are scaled by to [0, 1], beside those of the pulls.
    """
    returns = {arm: [p.value for p in pulls if p.trial == arm] for arm in arms}
    for arm in arms:
        if not returns[arm]:
            return arm
    everything = [x for some in returns.values() for x in some]
    low, high = min(low, *everything), max(high, *everything)
    means = np.array([np.mean(returns[arm]) for arm in arms])
    counts = np.array([len(returns[arm]) for arm in arms], np.float64)
    return arms[int(ucb_index((means - low) / ((high - low) or 1.0), counts, len(pulls)).argmax())]


def chosen_trials(
    study_folder: Path, records: Sequence[TrialRecord], top: int, direction: str = "maximize"
) -> list[int]:
    """Numbers of the trials to go on with, best first: those of a bandit by its mean returns where one was played, the
    others behind them by their values in the search."""
    by_value = best_trials(records, len(records), direction)
    returns: dict[int, list[float]] = {}
    for pull in read_pulls(study_folder):
        if pull.trial in by_value:
            returns.setdefault(pull.trial, []).append(pull.value)
    played = sorted(returns, key=lambda n: (-float(np.mean(returns[n])), by_value.index(n)))
    return [*played, *(n for n in by_value if n not in played)][:top]


# ---- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredPolicy:
    """A trained run's last evaluation."""

    run: str
    trial: int
    score: float  # or mean return
    returns: list[float]  # of its episodes
    metric: float | None  # of an offline objective


@dataclass(frozen=True)
class SelectionReport:
    """What a study has spent, and what that many episodes buy."""

    kind: str
    metric: str
    search_episodes: int  # in the environment, by the runs of the search
    seen_by_search: bool  # whether the search was led by them
    pulls: int  # episodes of the bandit of kind=hybrid
    confirm_episodes: int | None  # None: there is no confirm stage
    num_policies: int  # runs trained to their end whose episodes are stored
    eop: list[tuple[int, float]] = field(default_factory=list)  # (n, expected best of n policies)
    bandit: BanditCurve | None = None
    rank_correlation: float | None = None  # of the metric with the scores, over runs
    regret: dict[int, float] = field(default_factory=dict)  # k -> regret@k
    chosen: int | None = None  # trial that a bandit has chosen

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, study_folder: Path) -> SelectionReport | None:
        """What was kept of a study that has ended; None before."""
        try:
            kept = json.loads((study_folder / REPORT_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        bandit = None if kept["bandit"] is None else BanditCurve(**kept["bandit"])
        eop = [(n, value) for n, value in kept["eop"]]
        regret = {int(k): value for k, value in kept["regret"].items()}
        return cls(**{**kept, "bandit": bandit, "eop": eop, "regret": regret})


def stored_policies(study_folder: Path, records: Sequence[TrialRecord], metric: str = SCORE) -> list[StoredPolicy]:
    """The last evaluations of the runs of trials that were trained to their end, those with episodes."""
    policies = []
    for record in records:
        if record.state != "complete" or record.diverged:
            continue
        for run in record.attrs.get("run_values", {}):
            last = (_evaluations(study_folder, run) or [{}])[-1]
            if last.get("returns"):
                offline = last.get("offline", {}).get(metric)
                policies.append(StoredPolicy(run, record.number, last["value"], last["returns"], offline))
    return policies


def episodes_of(study_folder: Path, records: Sequence[TrialRecord]) -> int:
    """Episodes that a study's runs have played in the environment, those for pruners and of trials that were stopped
    included."""
    total = 0
    for record in records:
        told = record.attrs.get("online_episodes")
        if told is None:  # still running, or of a study made before they were counted
            runs = (study_folder / "runs").glob(f"t{record.number:04d}-s*")
            told = sum(len(e["returns"]) for run in runs for e in _evaluations(study_folder, run.name))
        total += int(told)
    return total


def selection_report(study_folder: Path, records: Sequence[TrialRecord]) -> SelectionReport | None:
    """What can be said of a study's episodes; None where no trial has ended.

    Args:
        study_folder: with the runs' evaluations.
        records: of its trials.
    """
    if not any(record.finished for record in records):
        return None
    objective: ObjectiveSpec = StudySpec.load(study_folder / SPEC_FILE).objective
    policies, pulls = stored_policies(study_folder, records, objective.metric), read_pulls(study_folder)
    scores = [policy.score for policy in policies]
    budgets = [2**i for i in range(max(len(scores), 1).bit_length())]
    confirm = study_folder / "confirm"
    confirm_episodes = None
    if (confirm / SPEC_FILE).exists():
        confirm_episodes = episodes_of(confirm, Study.open(confirm, read_only=True).trials())
    judged = [(p.metric, p.score) for p in policies if p.metric is not None]
    metric_values, scores_judged = [m for m, _ in judged], [s for _, s in judged]
    return SelectionReport(
        kind=objective.kind, metric=objective.metric, search_episodes=episodes_of(study_folder, records),
        seen_by_search=not objective.offline, pulls=len(pulls), confirm_episodes=confirm_episodes,
        num_policies=len(policies),
        eop=list(zip(budgets, expected_online_performance(scores, budgets), strict=True)) if scores else [],
        bandit=bandit_curve([p.returns for p in policies], scores) if len(policies) > 1 else None,
        rank_correlation=rank_correlation(metric_values, scores_judged),
        regret={k: regret_at(k, metric_values, scores_judged) for k in REGRETS if k < len(judged)},
        chosen=chosen_trials(study_folder, records, 1)[0] if pulls else None,
    )  # fmt: skip


def report_lines(report: SelectionReport, unit: str = "score") -> list[str]:
    """The report in sentences.

    Args:
        unit: of the policies' values in the environment: score or return.
    """
    searched = f"{report.search_episodes} in the search"
    if not report.seen_by_search and report.search_episodes:
        searched += f", which it did not see (it was led by {report.metric})"
    parts = [searched]
    if report.pulls:
        parts.append(f"{report.pulls} by the bandit, which chose trial {report.chosen}")
    if report.confirm_episodes is not None:
        parts.append(f"{report.confirm_episodes} in the confirm stage")
    lines = [f"online episodes: {'; '.join(parts)}"]
    if report.eop:
        best = ", ".join(f"{n}: {value:.1f}" for n, value in report.eop)
        lines.append(f"expected best {unit} of n of the {report.num_policies} policies: {best}")
    if report.bandit is not None:
        curve = report.bandit
        shown = [i for i, t in enumerate(curve.pulls) if t in (10, 50, 200)]
        told = ", ".join(
            f"{curve.pulls[i]}: {curve.mean[i]:.1f} [{curve.low[i]:.1f}, {curve.high[i]:.1f}]" for i in shown
        )
        lines.append(
            f"{unit} of the policy that a bandit among {curve.num_arms} believes best after n episodes: {told}"
        )
    if report.rank_correlation is not None:
        regrets = ", ".join(f"regret@{k} {value:.1f}" for k, value in report.regret.items())
        lines.append(
            f"{report.metric} against {unit}s that the search did not see: rank correlation "
            f"{report.rank_correlation:.2f}{', ' if regrets else ''}{regrets} ({report.num_policies} policies)"
        )
    return lines


def _evaluations(study_folder: Path, run: str) -> list[Mapping[str, Any]]:
    """A run's evaluations as its learner has stored them; none before the first."""
    try:
        content: list[Mapping[str, Any]] = json.loads((study_folder / "runs" / run / "evaluations.json").read_text())
    except FileNotFoundError:
        return []
    return content
