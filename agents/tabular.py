"""Tabular Q-learning in two domains, which differ in what becomes of source transitions (VGDF, arXiv 2305.17625, 4.1).

    Q(s, a) <- Q(s, a) + rate (r + gamma (1 - d) max_a' Q(s', a') - Q(s, a))

One step in the source per iteration and one in the target every `updates_per_target_step`, both epsilon-greedy, each
followed by an update with its transition. Methods:

    source only      all source transitions, no target steps (zero-shot)
    target only      target transitions
    mix              all of both
    DARC             source transitions with the reward r + log P_tar(s'|s,a) - log P_src(s'|s,a)
    dynamics filter  target transitions, and source transitions whose s' is the target's, too
    value filter     target transitions, and source transitions with |V(s'_src) - V(s'_tar)| <= threshold (eq. 4), where
                     V is V* of the target
    value filter, learned values   the same with V = max_a Q of the table as it is

The paper's learners estimate P and s'_tar; here both are exact, so that what is left is what each rule does with them.
Learning rate, epsilon, threshold and floor are ours.

Shapes: S state, A action.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from envs import grid_world
from envs.grid_world import GAMMA, GOAL, MAX_STEPS, START, Domain

METHODS = (
    "source only", "target only", "mix", "DARC", "dynamics filter", "value filter", "value filter, learned values",
)  # fmt: skip


@dataclass
class TabularConfig:
    """Settings of a run."""

    steps: int = 500_000  # in the source
    updates_per_target_step: int = 10
    learning_rate: float = 0.1
    epsilon: float = 0.2  # share of random actions
    threshold: float = 0.1  # of the values' difference, in units of the reward
    floor: float = 1e-3  # probability that DARC's correction takes for 0
    evaluations: int = 100  # evenly spread


@dataclass(frozen=True, eq=False)
class TabularRun:
    """What came of a run."""

    method: str
    seed: int
    q: NDArray[np.float64]  # (S, A)
    source_visits: NDArray[np.int64]  # (S,)
    target_visits: NDArray[np.int64]  # (S,)
    steps: list[int] = field(default_factory=list)  # of the evaluations, in the source
    steps_to_goal: list[int | None] = field(default_factory=list)  # of the greedy policy in the target


Rule = Callable[[int, int], float | None]
"""State and action of a source transition -> what is added to its reward; None: it is not learned from."""


def train(method: str, seed: int, config: TabularConfig | None = None) -> TabularRun:
    """Learn by one of `METHODS`.

    Raises:
        ValueError: there is no such method.
    """
    config = config or TabularConfig()
    source, target = grid_world.domain("source"), grid_world.domain("target")
    table = [[0.0] * len(grid_world.ACTIONS) for _ in grid_world.CELLS]
    rule = _rule(method, table, source, target, config)
    draw = random.Random(seed)
    in_source = _Walk(source, table, draw, config) if method != "target only" else None
    in_target = _Walk(target, table, draw, config) if method != "source only" else None
    run = TabularRun(method, seed, np.empty(0), np.zeros(len(table), np.int64), np.zeros(len(table), np.int64))
    every = max(config.steps // config.evaluations, 1)
    for t in range(config.steps):
        if in_source is not None:
            state, action, after = in_source.step()
            correction = rule(state, action)
            if correction is not None:
                _update(table, state, action, after, correction, config.learning_rate)
        if in_target is not None and t % config.updates_per_target_step == 0:
            state, action, after = in_target.step()
            if method != "DARC":  # its policy learns from the source; the target is for its dynamics, known here
                _update(table, state, action, after, 0.0, config.learning_rate)
        if (t + 1) % every == 0:
            run.steps.append(t + 1)
            run.steps_to_goal.append(target.steps_to_goal([row.index(max(row)) for row in table]))
    for walk, visits in ((in_source, run.source_visits), (in_target, run.target_visits)):
        if walk is not None:
            visits[:] = walk.visits
    return TabularRun(method, seed, np.array(table), run.source_visits, run.target_visits, run.steps, run.steps_to_goal)


def accepted(method: str, q: NDArray[np.float64], config: TabularConfig | None = None) -> NDArray[np.bool_]:
    """(S, A): which source transitions a method that has this table learns from, as they are or corrected."""
    rule = _rule(
        method, q.tolist(), grid_world.domain("source"), grid_world.domain("target"), config or TabularConfig()
    )
    return np.array([[rule(s, a) is not None for a in range(q.shape[1])] for s in range(len(q))])


def _rule(method: str, table: Sequence[Sequence[float]], source: Domain, target: Domain, config: TabularConfig) -> Rule:
    if method in ("source only", "mix"):
        return lambda state, action: 0.0
    if method == "target only":
        return lambda state, action: None
    if method == "DARC":
        corrections = grid_world.dynamics_corrections(config.floor).tolist()
        return lambda state, action: corrections[state][action]
    from_source, from_target = source.next_state.tolist(), target.next_state.tolist()
    if method == "value filter, learned values":

        def rule(state: int, action: int) -> float | None:
            there, here = from_source[state][action], from_target[state][action]
            return 0.0 if there == here or abs(max(table[there]) - max(table[here])) <= config.threshold else None

        return rule
    if method == "dynamics filter":
        keep = ~grid_world.mismatches()
    elif method == "value filter":
        keep = grid_world.value_gaps(target.optimal_q().max(axis=1)) <= config.threshold
    else:
        raise ValueError(f"no tabular method '{method}'; known are {', '.join(METHODS)}")
    kept = keep.tolist()
    return lambda state, action: 0.0 if kept[state][action] else None


def _update(
    table: list[list[float]], state: int, action: int, after: int, correction: float, learning_rate: float
) -> None:
    value = 1.0 if after == GOAL else GAMMA * max(table[after])
    table[state][action] += learning_rate * (value + correction - table[state][action])


class _Walk:
    """Epsilon-greedy episodes in one domain; equal values are told apart by chance."""

    def __init__(
        self, domain: Domain, table: Sequence[Sequence[float]], draw: random.Random, config: TabularConfig
    ) -> None:
        self._next, self._table, self._draw, self._epsilon = domain.next_state.tolist(), table, draw, config.epsilon
        self._state, self._steps = START, 0
        self.visits = [0] * len(table)

    def step(self) -> tuple[int, int, int]:
        """State, action, next state."""
        state, draw = self._state, self._draw
        self.visits[state] += 1
        row = self._table[state]
        if draw.random() < self._epsilon:
            action = int(draw.random() * len(row))
        else:
            best = max(row)
            action = row.index(best)
            if row.count(best) > 1:
                action = draw.choice([i for i, value in enumerate(row) if value == best])
        after = self._next[state][action]
        self._steps += 1
        ended = after == GOAL or self._steps == MAX_STEPS
        self._state, self._steps = (START, 0) if ended else (after, self._steps)
        return state, action, after
