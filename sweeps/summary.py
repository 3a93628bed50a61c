"""What a study found: its table, its history, which parameters mattered, what it cost, what is running.

Everything here is computed from `Study.trials()` alone, so it works on a study that is running, resumed or
made up. A trial that was pruned or diverged is shown as such and never counts as a result: the value of the
first is a report from mid-training, that of the second a stand-in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from sweeps.errors import StudyError
from sweeps.space import Params, SearchSpace
from sweeps.study import State, TrialRecord

FAILURE = "failure"  # what a trial keeps: why it failed, or why its parameters were refused
COLLAPSING = "run_collapsing"  # what a trial keeps: run key -> mean Q over an expert's value, of the collapsing runs

_MOST, _MOST_RESAMPLED = 1000, 500  # trials that importances are worked out of, and resampled


@dataclass(frozen=True)
class TrialRow:
    """A row of the table of trials."""

    rank: int | None  # 1 is the best; None unless complete and not diverged
    number: int
    state: State
    diverged: bool
    value: float | None
    gap: float | None  # how far below (maximize) or above (minimize) the best value, >= 0; None without a rank
    last_step: int | None  # largest reported step
    duration: float | None  # seconds from being asked to being told, time between drivers included
    params: Params  # the active ones


@dataclass(frozen=True)
class History:
    """The course of a study in the order in which trials finished; all arrays (n,)."""

    numbers: np.ndarray  # int, of the complete trials that did not diverge
    values: np.ndarray  # float
    best: np.ndarray  # float, best value so far
    regret: np.ndarray | None  # float, distance of `best` from the optimum; None where that is not known


def trial_rows(records: Sequence[TrialRecord], direction: str) -> list[TrialRow]:
    """The table of trials: ranked ones from the best on (equals by number), then the others by number."""
    sign = _sign(direction)
    ranked = sorted(results(records), key=lambda record: (-sign * value_of(record), record.number))
    ranks = {record.number: rank for rank, record in enumerate(ranked, start=1)}
    top = value_of(ranked[0]) if ranked else math.nan
    others = sorted((r for r in records if r.number not in ranks), key=lambda record: record.number)
    return [
        TrialRow(
            rank=ranks.get(record.number),
            number=record.number,
            state=record.state,
            diverged=record.diverged,
            value=record.value,
            gap=sign * (top - value_of(record)) if record.number in ranks else None,
            last_step=max(record.intermediate, default=None),
            duration=(
                (record.finished - record.started).total_seconds()
                if record.started is not None and record.finished is not None
                else None
            ),
            params=record.active,
        )
        for record in (*ranked, *others)
    ]


def collapsing_runs(record: TrialRecord) -> dict[str, float]:
    """Name of every run of a trial that was collapsing at its last evaluation (its critics' mean value far above an
    expert's, and rising) -> that value over the expert's."""
    runs = record.attrs.get(COLLAPSING, {})
    return {f"t{record.number:03d}-{key.partition('-')[2]}": ratio for key, ratio in sorted(runs.items())}


def collapse_sentences(records: Sequence[TrialRecord], most: int = 10) -> list[str]:
    """One sentence for every collapsing run, by trial; beyond `most` of them only how many more there are."""
    runs = [item for record in sorted(records, key=lambda r: r.number) for item in collapsing_runs(record).items()]
    sentences = [
        f"{name} is collapsing: mean Q {ratio:.1f} times the value of an expert and rising" for name, ratio in runs
    ]
    more = len(sentences) - most
    return sentences if more <= 0 else [*sentences[:most], f"and {more} more runs are collapsing"]


def history(records: Sequence[TrialRecord], direction: str, optimum: float | None = None) -> History:
    """Best value so far after each result.

    Args:
        records: of the study.
        direction: maximize or minimize.
        optimum: the best possible value, where it is known (made-up objectives); gives the simple regret.
    """
    ordered = sorted(results(records), key=finishing_order)
    sign = _sign(direction)
    values = np.array([value_of(record) for record in ordered], dtype=np.float64)
    best = sign * np.maximum.accumulate(sign * values)
    return History(
        numbers=np.array([record.number for record in ordered], dtype=np.int64),
        values=values,
        best=best,
        regret=None if optimum is None else sign * (optimum - best),
    )


def parameter_importances(
    records: Sequence[TrialRecord], space: SearchSpace, direction: str, min_trials: int = 20
) -> dict[str, float] | None:
    """How much each parameter decides whether a trial is among the best tenth; most important first, sum 1.

    PED-ANOVA (Watanabe et al., IJCAI 2023, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in
    Arbitrary Subspaces") as implemented by Optuna, over complete trials, diverged ones included (that they
    are bad is known). A conditional parameter counts over all trials, also where it did not apply, which
    understates it.

    Args:
        records: of the study; of more than 1,000 complete trials, that many drawn at random count.
        space: of the study.
        direction: maximize or minimize.
        min_trials: complete trials below which the answer would be noise.

    Returns:
        None with fewer complete trials, with fewer than two parameters, or when all values are equal.
    """
    complete = [record for record in records if record.state == "complete"]
    if len(complete) > _MOST:
        complete = [complete[i] for i in np.random.default_rng(0).choice(len(complete), _MOST, replace=False)]
    values = {value_of(record) for record in complete}
    if len(complete) < min_trials or len(space.parameters) < 2 or len(values) < 2:
        return None
    from sweeps._optuna import optuna

    sign = _sign(direction)
    distributions = space.distributions()
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=record.params, distributions=distributions, value=-sign * value_of(record))
            for record in complete
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return dict(sorted(importances.items(), key=lambda item: -item[1]))


def results(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete trials that did not diverge."""
    return [record for record in records if record.state == "complete" and not record.diverged]


def value_of(record: TrialRecord) -> float:
    """The value of a trial that has one."""
    assert record.value is not None
    return record.value


def finishing_order(record: TrialRecord) -> tuple[float, int]:
    """A key to sort by: trials as they finished, unfinished ones last."""
    return (record.finished.timestamp() if record.finished else math.inf, record.number)


def _sign(direction: str) -> float:
    if direction not in ("maximize", "minimize"):
        raise StudyError(f"Unknown direction '{direction}'; use maximize or minimize.")
    return 1.0 if direction == "maximize" else -1.0


@dataclass(frozen=True)
class Spread:
    """A number, and the 5 to 95 % that it varies over when the trials are drawn again with replacement."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Running:
    """A trial under way."""

    number: int
    age: float  # seconds since it was asked for
    share: float  # of the training that its last report says is done
    value: float | None  # that report
    params: Params  # the active ones


@dataclass(frozen=True)
class Cost:
    """What a study has taken so far."""

    wall_seconds: float  # from the first trial asked for to the last one told, or until now
    pack_seconds: float  # the same of every pack, summed: what its slot was occupied, waits included
    updates: int  # gradient updates of all runs
    updates_saved: int  # that trials did without which were pruned or not given all seeds
    online_episodes: int  # in the real environment, those for the pruner included
    exact: bool  # False: updates and episodes of some trials, made before these were kept, follow from their reports


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Key -> key without `method.`."""
    return {key: key.removeprefix("method.") for key in keys}


def state_counts(records: Sequence[TrialRecord]) -> dict[str, int]:
    """How many trials there are of each state, those that diverged apart; states without any are left out."""
    states = ["diverged" if record.diverged else record.state for record in records]
    known = ("complete", "pruned", "diverged", "failed", "running", "waiting")
    return {state: states.count(state) for state in known if state in states}


def failures(records: Sequence[TrialRecord]) -> dict[str, list[int]]:
    """Reason -> numbers of the trials that failed for it, or whose parameters were refused; most frequent first."""
    reasons: dict[str, list[int]] = {}
    for record in records:
        if FAILURE in record.attrs:
            reasons.setdefault(" ".join(str(record.attrs[FAILURE]).split()), []).append(record.number)
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


def running_trials(records: Sequence[TrialRecord], total_steps: int, now: datetime | None = None) -> list[Running]:
    """The trials under way, by number; of a killed study those that a resumed driver takes up.

    Args:
        records: of the study.
        total_steps: updates of a whole training.
        now: with a time zone; None: now.
    """
    now = now or datetime.now(UTC)
    return [
        Running(
            number=record.number,
            age=(now - record.started).total_seconds() if record.started else 0.0,
            share=max(record.intermediate, default=0) / total_steps,
            value=next(reversed(record.intermediate.values()), None),
            params=record.active,
        )
        for record in records
        if record.state == "running"
    ]


def study_cost(
    records: Sequence[TrialRecord], seeds: int, total_steps: int, episodes: int, now: datetime | None = None
) -> Cost:
    """What the trials have taken.

    Where a trial does not keep its `updates` or `online_episodes` (running, or of a study made before they were kept)
    they are taken from its reports: all seeds trained to the last one, all evaluated at each.

    Args:
        records: of the study.
        seeds: runs of a trial.
        total_steps: updates of a whole training of one run.
        episodes: of one evaluation of one run.
        now: the end of a running study, with a time zone; None: now.
    """
    now = now or datetime.now(UTC)
    begun = [record for record in records if record.started is not None and record.state != "waiting"]
    packs: dict[str, list[tuple[datetime, datetime]]] = {}
    updates = saved = online = 0
    exact = True
    for record in begun:
        assert record.started is not None
        span = record.started, record.finished or now
        for pack in record.attrs.get("packs") or [f"trial {record.number}"]:
            packs.setdefault(pack, []).append(span)
        trained = len(record.attrs.get("seeds") or ()) or seeds
        kept = {key: record.attrs.get(key) for key in ("updates", "online_episodes")}
        exact = exact and (record.state == "running" or FAILURE in record.attrs or None not in kept.values())
        reported = max(record.intermediate, default=0) * trained
        spent = reported if kept["updates"] is None else int(kept["updates"])
        updates += spent
        if record.state == "pruned" or (record.state == "complete" and not record.diverged and trained < seeds):
            saved += max(0, seeds * total_steps - spent)
        evaluated = len(record.intermediate) * trained * episodes
        online += evaluated if kept["online_episodes"] is None else int(kept["online_episodes"])
    spans = [(min(start for start, _ in each), max(end for _, end in each)) for each in packs.values()]
    wall = (max(e for _, e in spans) - min(s for s, _ in spans)).total_seconds() if spans else 0.0
    return Cost(wall, sum((end - start).total_seconds() for start, end in spans), updates, saved, online, exact)


def importance_spreads(
    records: Sequence[TrialRecord], space: SearchSpace, direction: str, resamples: int = 50, seed: int = 0
) -> dict[str, Spread] | None:
    """`parameter_importances` with the spread that it has over bootstrap resamples of the trials.

    Args:
        records: of the study.
        space: of the study.
        direction: maximize or minimize.
        resamples: of the trials.
        seed: of the resamples.

    Returns:
        Most important first; None where `parameter_importances` says nothing. Beyond 500 complete trials the spread is
        not a number: it is small there, and would take a minute.
    """
    importances = parameter_importances(records, space, direction)
    if importances is None:
        return None
    complete = [record for record in records if record.state == "complete"]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples if len(complete) <= _MOST_RESAMPLED else 0):
        again = [complete[i] for i in rng.integers(len(complete), size=len(complete))]
        one = parameter_importances(again, space, direction)
        if one is not None:
            drawn.append([one[key] for key in importances])
    low, high = np.quantile(drawn, (0.05, 0.95), axis=0) if drawn else ([math.nan] * len(importances),) * 2
    return {key: Spread(value, float(low[i]), float(high[i])) for i, (key, value) in enumerate(importances.items())}
