"""Are these rows what they claim to be? The checks of `offsweep data verify`.

Each check is one function; what it finds bears its name. The strongest is the replay: states are put into the
simulator, the stored actions are stepped, and what comes out is held against what is stored.

Shape suffixes: N rows, S observation, A action.
"""

import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.dataset import Dataset
from envs.errors import UserError
from envs.evidence import CONCLUSIVE_ROWS, ROUNDING, Evidence, Moments, winner
from envs.simulate import Simulator

Severity = Literal["ok", "flaw", "error", "skipped"]
Verdict = Literal["genuine", "plausible", "usable with flaws", "rejected"]

STATISTICS_FILE = Path(__file__).parent / "references" / "d4rl_observation_statistics.json"

# Share of the rows up to which something wrong is a flaw of single rows; beyond it the set as a whole is wrong.
_FEW = 0.01

# In standard deviations. D4RL's sets differ from one another by 0.29 or more in their furthest entry; an incomplete
# last episode that one reader keeps and another drops moves an entry by 0.03 at most.
_STATISTICS_TOLERANCE = 0.05

# One-step errors that sets recorded with other MuJoCo releases show, in standard deviations: (median, 95th percentile).
# Hopper, HalfCheetah, Walker2d: MuJoCo 2.1.0 against 4.0.0. Ant: up to 3.4 against 3.5 and later, which treat contacts
# of geoms with a margin (Ant's and Hopper's) otherwise. With the same release the error is float32's, about 1e-7.
_OTHER_RELEASES = {
    "Hopper": (3e-4, 7e-3),
    "HalfCheetah": (8e-3, 3e-2),
    "Walker2d": (2e-3, 5e-2),
    "Ant": (4e-2, 2.5e-1),
}
_OTHER_ROBOTS = (1e-2, 1e-1)
_ARITHMETIC = {"Pendulum", "MountainCarContinuous", "EdgeOfReach"}  # a few lines of it: the same everywhere
_ARITHMETIC_LIMITS = (1e-4, 1e-3)
# Room above them, and shares of a median step that are accepted too, since errors grow with the steps (a walker with
# uniform actions takes larger ones than an expert). Measured on expert data, what must not pass has medians of 0.11
# steps (Hopper), 0.64 (HalfCheetah), 0.21 (Walker2d) and 0.43 (Ant) when actions are moved by one row, 0.6 to 2.7 with
# the actions of other rows, and 1 or more in a random walk.
_ROOM = 4.0
_STEP_SHARES = (0.05, 0.5)
_SAME_RELEASE = 1e-4  # errors below it are rounding


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    severity: Severity
    message: str  # what was found and, if it is not ok, what to do about it
    figures: Mapping[str, Any] = field(default_factory=dict)  # numbers, words and lists of them


@dataclass(frozen=True)
class Report:
    """What all checks found in one dataset.

    Verdicts: `genuine`, nothing is wrong, and the simulator or D4RL's statistics confirm the rows; `plausible`, nothing
    is wrong, but neither could confirm them; `usable with flaws`, each is named; `rejected`, do not learn from it.
    """

    dataset: Mapping[str, Any]  # `Dataset.summary()`
    findings: tuple[Finding, ...]
    verdict: Verdict

    @property
    def exit_code(self) -> int:
        """Of the command line: 0 accepted, 1 rejected."""
        return int(self.verdict == "rejected")

    def named(self, severity: Severity) -> list[str]:
        """The checks that ended so."""
        return [finding.check for finding in self.findings if finding.severity == severity]

    def to_json(self) -> str:
        """The whole report as JSON."""
        findings = [{**vars(finding), "figures": dict(finding.figures)} for finding in self.findings]
        return json.dumps({"verdict": self.verdict, "findings": findings, "dataset": dict(self.dataset)}, indent=1)


def verify(dataset: Dataset, *, known_as: str | None = None, replay_rows: int = 2000, seed: int = 0) -> Report:
    """Hold the rows of a dataset against each other, its environment, D4RL's statistics and the simulator.

    Args:
        dataset: any; scaled observations and rewards are brought back to the environment's units first.
        known_as: D4RL's name of the set that it claims to be; default its own name, if that is one of D4RL's.
        replay_rows: random rows to step in the simulator; up to 500 terminal ones come on top.
        seed: decides which.

    Raises:
        UserError: `replay_rows` is not positive, or the file with D4RL's statistics is damaged.
    """
    if replay_rows < 1:
        raise UserError(f"the number of rows to replay must be at least 1, not {replay_rows}.")
    evidence = Evidence(dataset, known_as, replay_rows, seed)
    findings = tuple(Finding(check.__name__, *check(evidence)) for check in CHECKS)
    severities = {finding.severity for finding in findings}
    confirmed = any(f.severity == "ok" and f.check in ("simulator_replay", "known_statistics") for f in findings)
    verdict: Verdict = "genuine" if confirmed else "plausible"
    if "error" in severities:
        verdict = "rejected"
    elif "flaw" in severities:
        verdict = "usable with flaws"
    return Report(dataset.summary(), findings, verdict)


# What the checks share ------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    severity: Severity
    message: str
    figures: dict[str, Any]


def _ok(message: str, **figures: Any) -> _Result:
    return _Result("ok", message, figures)


def _flaw(message: str, **figures: Any) -> _Result:
    return _Result("flaw", message, figures)


def _error(message: str, **figures: Any) -> _Result:
    return _Result("error", message, figures)


def _skipped(message: str, **figures: Any) -> _Result:
    return _Result("skipped", message, figures)


def _limits(env_id: str, step: float) -> tuple[float, float]:
    """Largest accepted (median, 95th percentile) of one-step errors where the median step is this long."""
    robot = env_id.rpartition("/")[2].rpartition("-v")[0]
    if robot in _ARITHMETIC:
        return _ARITHMETIC_LIMITS
    median, high = _OTHER_RELEASES.get(robot, _OTHER_ROBOTS)
    return max(_ROOM * median, _STEP_SHARES[0] * step), max(_ROOM * high, _STEP_SHARES[1] * step)


def _quantiles(errors: NDArray[np.float64]) -> tuple[float, float]:
    median, high = np.quantile(errors, (0.5, 0.95))
    return float(median), float(high)


def _within(errors: NDArray[np.float64], limits: tuple[float, float]) -> bool:
    return all(error <= limit for error, limit in zip(_quantiles(errors), limits, strict=True))


def _count(number: int, what: str, of: int | None = None) -> str:
    share = "" if of is None else f" ({number / of:.1%})" if number >= 0.001 * of else f" ({number / of:.1g})"
    return f"{number:,} {what}{'' if number == 1 else 's'}{share}"


# The checks -----------------------------------------------------------------------------------------------------------


def schema(evidence: Evidence) -> _Result:
    """Rows have the shapes of the environment's spaces."""
    d = evidence.dataset
    if isinstance(evidence.environment, str):
        return _skipped(f"shapes, bounds and time limit are not known: {evidence.environment}")
    if evidence.misfit:
        return _error(f"{evidence.misfit}: it belongs to another environment or version; give the right env_id")
    return _ok(f"{d.observation_dim} observations and {d.action_dim} actions, as {d.env_id} has")


def finite_values(evidence: Evidence) -> _Result:
    """Every number is finite, and so is its square in float32."""
    largest = {}
    for column in ("observations", "actions", "rewards", "next_observations"):
        values = getattr(evidence.dataset, column)
        largest[column] = float(np.max([np.abs(values[rows]).max() for rows in evidence.chunks()]))
    for column, value in largest.items():
        if not math.isfinite(value):
            return _error(f"'{column}' holds values that are not finite; remove or repair those rows", column=column)
        if value**2 > float(np.finfo(np.float32).max):
            return _error(f"'{column}' holds values up to {value:.2g}, whose squares overflow float32", **largest)
    return _ok(f"all finite, the largest is {max(largest.values()):.4g}", **largest)


def constant_columns(evidence: Evidence) -> _Result:
    """No entry of a row is the same in all rows, unless the environment makes it so."""
    d, constant = evidence.dataset, {}
    for column in ("observations", "actions", "rewards"):
        values = getattr(d, column).reshape(d.num_transitions, -1)
        same = np.ones(values.shape[1], dtype=np.bool_)
        for rows in evidence.chunks():
            same &= (values[rows] == values[0]).all(axis=0)
        if same.any():
            constant[column] = np.flatnonzero(same).tolist()
    if d.num_transitions == 1:
        return _skipped("there is one row only")
    if not constant:
        return _ok("every entry varies")
    names = "; ".join(name if name == "rewards" else f"{name} {_ranges(on)}" for name, on in constant.items())
    message = f"the same in all rows: {names}; do not divide by its standard deviation, which is 0"
    if set(constant) == {"observations"} and not isinstance(evidence.sample, str):
        # D4RL's Ant shows 84 contact forces that are always 0.
        simulated = evidence.sample.replay.simulated[d.env_id].next_observations[:, constant["observations"]]
        if (simulated == simulated[0]).all():
            return _ok(f"{message} (as in {d.env_id} itself)", **constant)
    return _flaw(message, **constant)


def _ranges(entries: list[int]) -> str:
    """[0, 3, 4, 5] -> 0, 3-5."""
    breaks = [0, *(i for i in range(1, len(entries)) if entries[i] != entries[i - 1] + 1), len(entries)]
    parts = [entries[start:end] for start, end in pairwise(breaks)]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def unclipped_actions(evidence: Evidence) -> _Result:
    """Every action lies within the environment's bounds."""
    d, environment = evidence.dataset, evidence.environment
    if isinstance(environment, str) or evidence.misfit:
        return _skipped("the bounds are not known")
    low, high = environment.low, environment.high
    slack = np.float32(ROUNDING) * (np.abs(low) + np.abs(high))
    beyond, largest = 0, 0.0
    for rows in evidence.chunks():
        actions = d.actions[rows]
        beyond += int(((actions < low - slack) | (actions > high + slack)).any(axis=1).sum())
        largest = max(largest, float(np.abs(actions).max()))
    figures = {"rows": beyond, "largest": largest, "bound": float(np.abs([low, high]).max())}
    same = (low == low[0]).all() and (high == high[0]).all()
    bounds = f"[{low[0]:g}, {high[0]:g}]" if same else f"the bounds of {d.env_id}"
    if not beyond:
        return _ok(f"all within {bounds}", **figures)
    return _flaw(
        f"{_count(beyond, 'row', d.num_transitions)} with actions beyond {bounds}, the largest {largest:.3g}: the"
        " simulator clips them and a bounded policy cannot take them; clip them before training",
        **figures,
    )


def episode_lengths(evidence: Evidence) -> _Result:
    """No episode is longer than the time limit."""
    episodes, environment = evidence.dataset.episodes, evidence.environment
    lengths = episodes.lengths
    text = f"{_count(len(episodes), 'episode')} of {lengths.min():,} to {lengths.max():,} steps"
    if not episodes.complete[-1]:
        text += f", the last one cut by the end of the data after {lengths[-1]:,}"
    figures = {
        "episodes": len(episodes),
        "shortest": int(lengths.min()),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "last_complete": bool(episodes.complete[-1]),
    }
    if isinstance(environment, str):
        return _skipped(f"{text}; the time limit is not known", **figures)
    limit = environment.time_limit
    longer = int((lengths > limit).sum())
    figures |= {"time_limit": limit, "longer": longer}
    if not longer:
        return _ok(f"{text}, the time limit is {limit:,}", **figures)
    return _flaw(
        f"{text}: {longer:,} beyond the time limit of {limit:,}; mark where they end in 'timeouts', or state the limit"
        " that they were recorded with",
        **figures,
    )


def broken_episodes(evidence: Evidence) -> _Result:
    """Inside an episode the next observation is the following row's observation."""
    inside = ~evidence.ends
    inside[-1] = False
    broken = np.flatnonzero(inside & ~evidence.follows)
    total = int(inside.sum())
    figures = {"rows": len(broken), "of": total, "first": broken[:10].tolist()}
    if not total:
        return _skipped("no episode has two rows")
    if not len(broken):
        return _ok("inside every episode the next observation is the following row's observation", **figures)
    rows = _count(len(broken), "row", total)
    if len(broken) <= _FEW * total:
        return _flaw(
            f"after {rows} inside episodes, first row {broken[0]:,}, the data goes on somewhere else: ends of episodes"
            " that no flag marks; set 'timeouts' there",
            **figures,
        )
    return _error(
        f"after {rows} inside episodes the following row is not where this one led: rows are not in the order of time,"
        " ends are not marked, or columns come from different rows; episodes and their returns mean nothing",
        **figures,
    )


def next_observation_of_the_next_episode(evidence: Evidence) -> _Result:
    """At an episode's end the next observation is its own last state, not the first one of the next episode."""
    ends = evidence.ends[:-1]
    wrong = np.flatnonzero(ends & evidence.follows[:-1])
    total = int(ends.sum())
    figures = {"rows": len(wrong), "of": total, "first": wrong[:10].tolist()}
    if not total:
        return _skipped("no episode is followed by another")
    if not len(wrong):
        return _ok(f"none of {_count(total, 'episode end')} leads into the next episode", **figures)
    return _flaw(
        f"at {len(wrong):,} of {_count(total, 'episode end')} it is the next episode's first, as d4rl.qlearning_dataset"
        " gives it: wrong for learning the dynamics; take the file's own next_observations, or leave these rows out",
        **figures,
    )


def terminal_at_time_limit(evidence: Evidence) -> _Result:
    """An episode that only ran out of time is a timeout, not a terminal."""
    environment, rule = evidence.environment, evidence.rule
    if isinstance(environment, str):
        return _skipped("the time limit is not known")
    flagged = evidence.dataset.terminals & evidence.at_time_limit
    wrong = int((flagged if isinstance(rule, str) else flagged & ~rule.done).sum())
    reached = int(evidence.at_time_limit.sum())
    figures = {"rows": wrong, "reached_limit": reached, "time_limit": environment.time_limit}
    if not wrong:
        return _ok(f"{_count(reached, 'episode')} reached the time limit, none is terminal for that", **figures)
    state = "whether their state ended them is not known" if isinstance(rule, str) else "their last state is healthy"
    return _flaw(
        f"{_count(wrong, 'episode')} of exactly {environment.time_limit:,} steps, the time limit, marked as terminal"
        f" ({state}): their last value would be taken for 0; mark them as 'timeouts'",
        **figures,
    )


def termination(evidence: Evidence) -> _Result:
    """A row is terminal exactly where the environment's rule ends the episode."""
    d, rule = evidence.dataset, evidence.rule
    if isinstance(rule, str):
        return _skipped(f"flags are not judged: {rule}")
    # Other checks speak of these.
    judged = ~(evidence.ends & evidence.follows) & ~(evidence.at_time_limit & ~rule.done)
    terminals, unhealthy = int((d.terminals & judged).sum()), int((rule.done & judged).sum())
    disputed = rule.disputed & judged
    early, missed = int((disputed & d.terminals).sum()), int((disputed & ~d.terminals).sum())
    figures = {
        "terminals": terminals,
        "terminals_while_healthy": early,
        "unhealthy": unhealthy,
        "unhealthy_without_terminal": missed,
        "first": np.flatnonzero(disputed)[:10].tolist(),
    }
    if not early and not missed:
        return _ok(f"{_count(terminals, 'terminal')}, exactly where {d.env_id}'s rule says so", **figures)
    parts = [f"{early:,} of {_count(terminals, 'terminal')} in a healthy state"] if early else []
    parts += [f"{missed:,} of {_count(unhealthy, 'unhealthy state')} not terminal"] if missed else []
    message = f"against {d.env_id}'s rule, {' and '.join(parts)}"
    if early <= _FEW * terminals and missed <= _FEW * unhealthy:
        return _flaw(f"{message}: single rows; correct 'terminals' there or leave them", **figures)
    return _error(f"{message}: recorded with another rule, or flags and states come from different rows", **figures)


def terminal_and_timeout(evidence: Evidence) -> _Result:
    """No row is both."""
    both = int((evidence.dataset.terminals & evidence.dataset.timeouts).sum())
    if not both:
        return _ok("no row is both", rows=0)
    return _flaw(f"{_count(both, 'row')} marked as both, taken as terminal; clear the wrong flag", rows=both)


def duplicate_transitions(evidence: Evidence) -> _Result:
    """No transition is there twice."""
    n = evidence.dataset.num_transitions
    double = n - len(np.unique(evidence.row_hashes))
    if not double:
        return _ok("none", rows=0, share=0.0)
    message = f"{_count(double, 'row', n)} equal to another one in every number: they count twice; remove them"
    return _flaw(message, rows=double, share=double / n)


def duplicate_episodes(evidence: Evidence) -> _Result:
    """No episode is there twice."""
    episodes = evidence.dataset.episodes
    first_with: dict[bytes, int] = {}
    pairs = []
    for number, (start, end) in enumerate(zip(episodes.starts.tolist(), episodes.ends.tolist(), strict=True)):
        first = first_with.setdefault(evidence.row_hashes[start:end].tobytes(), number)
        if first != number:
            pairs.append([first, number])
    figures = {"episodes": len(pairs), "of": len(episodes), "first": pairs[:10]}
    if not pairs:
        return _ok("none", **figures)
    return _flaw(
        f"{len(pairs):,} of {_count(len(episodes), 'episode')} repeat an earlier one row for row (episode {pairs[0][1]}"
        f" is {pairs[0][0]} again): less data than it seems, and splits would share it; remove them",
        **figures,
    )


def known_statistics(evidence: Evidence) -> _Result:
    """Observations have the mean and standard deviation of the D4RL set that the dataset claims to be."""
    sets, moments, name = _known_sets(), evidence.moments, evidence.dataset.name
    claim = evidence.known_as or (name if name in sets else None)
    deviations = {
        known: _deviation(moments, *sets[known]) for known in sets if sets[known][0].shape == moments.mean.shape
    }
    matching = [known for known, (deviation, _) in deviations.items() if deviation <= _STATISTICS_TOLERANCE]
    figures = {
        "observation_mean": moments.mean.tolist(),
        "observation_std": moments.std.tolist(),
        "reward_mean": moments.reward_mean,
        "reward_std": moments.reward_std,
        "tolerance": _STATISTICS_TOLERANCE,
        "deviations": {known: deviation for known, (deviation, _) in deviations.items()},
    }
    if claim is None and not matching:
        return _skipped("it claims to be none of D4RL's sets and has the statistics of none", **figures)
    if claim is not None and claim not in sets:
        return _skipped(f"no statistics of '{claim}' are known", **figures)
    if claim is None or claim in matching:
        return _ok(f"statistics are those of D4RL's {claim or matching[0]}", **figures)
    instead = f"; they are those of {matching[0]}" if matching else "; it is another set or version, or part of it"
    if claim not in deviations:
        width = len(sets[claim][0])
        return _error(f"not D4RL's {claim}, which has {width} observations per row{instead}", **figures)
    deviation, what = deviations[claim]
    return _error(f"not D4RL's {claim}: {what} is off by {deviation:.2g} standard deviations{instead}", **figures)


def _known_sets() -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    try:
        sets = json.loads(STATISTICS_FILE.read_text(encoding="utf-8"))["sets"]
        return {name: (np.array(entry["mean"]), np.array(entry["std"])) for name, entry in sets.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{STATISTICS_FILE} is missing or damaged ({error!r}): install offsweep again.") from error


def _deviation(moments: Moments, mean: NDArray[np.float64], std: NDArray[np.float64]) -> tuple[float, str]:
    """The largest one, in the reference's standard deviations, and of what."""
    deviations = np.abs([moments.mean - mean, moments.std - std]) / std
    which, entry = np.unravel_index(int(deviations.argmax()), deviations.shape)
    return float(deviations.max()), f"the {('mean', 'standard deviation')[which]} of observation {entry}"


def environment_version(evidence: Evidence) -> _Result:
    """The version in the label is the one that the rows were recorded in."""
    label, sample = evidence.dataset.env_id, evidence.sample
    if isinstance(sample, str):
        return _skipped(f"not replayed: {sample}")
    if sample.votes is None:
        return _skipped(f"there is no other version of {label} to tell it from")
    votes = sample.votes
    figures = {"label": label, **vars(votes)}
    dynamics, rewards = winner(votes.dynamics), winner(votes.rewards)
    if dynamics == "other":
        return _error(
            f"recorded in {votes.other}, not in {label}: it moves as {votes.other} does in {votes.dynamics[1]:,} of the"
            f" {sum(votes.dynamics):,} rows that tell; set env_id to {votes.other}",
            **figures,
        )
    if "both" in (dynamics, rewards):
        own, other = votes.dynamics if dynamics == "both" else votes.rewards
        return _flaw(
            f"rows of two versions: {own:,} of those that tell are {label}'s, {other:,} {votes.other}'s; separate them",
            **figures,
        )
    if rewards == "other":
        return _flaw(
            f"rewards are those of {votes.other}, not of {label}, in {votes.rewards[1]:,} of the {sum(votes.rewards):,}"
            f" rows that tell; set env_id to {votes.other}",
            **figures,
        )
    if max(votes.dynamics[0], votes.rewards[0]) < CONCLUSIVE_ROWS:
        return _ok(f"{label} and {votes.other} cannot be told apart by these rows", **figures)
    telling = max(votes.dynamics, votes.rewards)
    return _ok(f"{label}, not {votes.other}, in {telling[0]:,} of the {sum(telling):,} rows that tell", **figures)


def simulator_replay(evidence: Evidence) -> _Result:
    """Stepping the stored action from the stored state gives the stored next observation."""
    sample = evidence.sample
    if isinstance(sample, str):
        return _skipped(f"not replayed: {sample}")
    env_id, n = sample.recorded_in, sample.num_random
    errors, step = sample.replay.state_errors(env_id)[:n], float(np.median(sample.replay.step_sizes()[:n]))
    (median, high), limits = _quantiles(errors), _limits(env_id, step)
    off = int((errors > limits[1]).sum())
    figures = {
        "env_id": env_id,
        "mujoco": importlib.metadata.version("mujoco"),
        "rows": n,
        "left_out": sample.left_out,
        "error_median": median,
        "error_p95": high,
        "limit_median": limits[0],
        "limit_p95": limits[1],
        "rows_beyond": off,
        "step_median": step,
        "seed": evidence.seed,
    }
    text = f"{n:,} rows stepped in {env_id}: error {median:.1g} (median) and {high:.1g} (95 %) standard deviations"
    if _within(errors, limits):
        likeness = "they are reproduced" if high <= _SAME_RELEASE else "no more than between MuJoCo releases"
        return _ok(f"{text}, {likeness}", **figures)
    whose = "next observations do" if median > limits[0] else f"{_count(off, 'row', n)} do"
    return _error(
        f"{text}, where a step moves the state by {step:.1g}: {whose} not follow from state and action; recorded in"
        " another environment, made up, or columns of different rows",
        **figures,
    )


def simulator_rewards(evidence: Evidence) -> _Result:
    """Stepping the stored action from the stored state gives the stored reward."""
    sample, environment = evidence.sample, evidence.environment
    if isinstance(sample, str) or isinstance(environment, str):
        return _skipped(f"not replayed: {sample}")
    env_id, n = sample.recorded_in, sample.num_random
    limits = _limits(env_id, float(np.median(sample.replay.step_sizes()[:n])))
    stored, paid = sample.replay.rewards[:n], sample.replay.simulated[env_id].rewards[:n]
    errors = sample.replay.reward_errors(env_id)[:n]
    median, high = _quantiles(errors)
    figures = {"env_id": env_id, "rows": n, "error_median": median, "error_p95": high}
    if _within(errors, limits):
        return _ok(
            f"as {env_id} pays: error {median:.1g} (median) and {high:.1g} (95 %) standard deviations", **figures
        )
    actions = sample.replay.actions[:n]
    clipped = np.clip(actions, environment.low, environment.high)
    if not np.array_equal(clipped, actions):
        paid_for_clipped = Simulator(env_id).steps(sample.replay.observations[:n], clipped).rewards
        if _within(np.abs(paid_for_clipped - stored) / sample.replay.reward_std, limits):
            return _flaw("they were paid for the clipped actions; clip the actions before training", **figures)
    variance = float(np.var(paid))
    scale = float(np.mean((paid - paid.mean()) * (stored - stored.mean()))) / variance if variance else 0.0
    shift = float(stored.mean() - scale * paid.mean())
    explained = 1.0 - float(np.var(stored - scale * paid - shift) / max(float(np.var(stored)), 1e-30))
    figures |= {"scale": scale, "shift": shift, "explained": explained}
    if explained < 0.9:
        return _error(
            f"{env_id}'s rewards explain {max(explained, 0.0):.0%} of theirs: another reward function, or rewards of"
            " other rows",
            **figures,
        )
    return _flaw(
        f"not as {env_id} pays, but about {scale:.3g} x its reward {'-' if shift < 0 else '+'} {abs(shift):.3g}: scores"
        " cannot be compared with others'; undo it",
        **figures,
    )


CHECKS: tuple[Callable[[Evidence], _Result], ...] = (
    schema,
    finite_values,
    constant_columns,
    unclipped_actions,
    episode_lengths,
    broken_episodes,
    next_observation_of_the_next_episode,
    terminal_at_time_limit,
    termination,
    terminal_and_timeout,
    duplicate_transitions,
    duplicate_episodes,
    known_statistics,
    environment_version,
    simulator_replay,
    simulator_rewards,
)
