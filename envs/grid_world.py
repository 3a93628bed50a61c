"""A grid world in two domains, and exact values in both: why filtering by values differs from filtering by dynamics.

After the motivating example of VGDF's paper (arXiv 2305.17625, section 4.1 and appendix D.1). Known of that: a plane of
cells, four actions, a reward of 1 for reaching the goal and none else, episodes of at most 256 steps, 5e5 steps in the
source and 5e4 in the target, and four positions in the agent's room where an action leads to different cells in the two
domains. Its layouts are only shown as pictures, so the layout here is ours, in the same spirit:

    ###############      S start, G goal, # wall
    #.....#.......#      d  the four door cells: in the source, who leaves the room by one of a pair of doors comes out
    #.....d..#....#         of the other, so four actions lead to another cell than in the target, whose value in the
    #.....d..#....#         target is nearly the same
    #.....#..#....#      |  a shortcut, open in the source and shut in the target, where the way leads around the
    #S....#..|...G#         wall's upper end: two actions whose results have different values in the target
    #.....#..#....#
    #.....d..#....#
    #.....d..#....#
    #.....#..#....#
    ###############

Shapes: S state (a free cell), A action (up, down, left, right).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LAYOUT = (
    "###############",
    "#.....#.......#",
    "#.....d..#....#",
    "#.....d..#....#",
    "#.....#..#....#",
    "#S....#..|...G#",
    "#.....#..#....#",
    "#.....d..#....#",
    "#.....d..#....#",
    "#.....#..#....#",
    "###############",
)
ACTIONS = ("up", "down", "left", "right")
MAX_STEPS = 256
GAMMA = 0.95  # ours; the paper does not give the grid's

_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
Cell = tuple[int, int]
CELLS: tuple[Cell, ...] = tuple(
    (row, column) for row, line in enumerate(LAYOUT) for column, sign in enumerate(line) if sign != "#"
)
"""(row, column) of every state."""
_STATE = {cell: state for state, cell in enumerate(CELLS)}


def _find(sign: str) -> list[Cell]:
    return [cell for cell in CELLS if LAYOUT[cell[0]][cell[1]] == sign]


START, GOAL = _STATE[_find("S")[0]], _STATE[_find("G")[0]]
SHORTCUT = _find("|")[0]


@dataclass(frozen=True, eq=False)
class Domain:
    """Deterministic dynamics; the reward is 1 for a step into the goal, which ends the episode.

    Attributes:
        name: source or target.
        next_state: (S, A); the goal leads to itself.
    """

    name: str
    next_state: NDArray[np.int64]

    def optimal_q(self, gamma: float = GAMMA) -> NDArray[np.float64]:
        """Q* (S, A) by value iteration until nothing changes; V* of a cell n steps from the goal is gamma^(n-1)."""
        q = np.zeros(self.next_state.shape)
        while True:
            updated = self.rewards() + gamma * q.max(axis=1)[self.next_state] * (self.next_state != GOAL)
            updated[GOAL] = 0.0
            if np.array_equal(updated, q):
                return q
            q = updated

    def rewards(self) -> NDArray[np.float64]:
        """(S, A)"""
        rewards = (self.next_state == GOAL).astype(np.float64)
        rewards[GOAL] = 0.0
        return rewards

    def steps_to_goal(self, actions: Sequence[int], start: int = START) -> int | None:
        """Steps that a policy, an action for every state, takes to the goal; None: more than 256."""
        state = start
        for step in range(MAX_STEPS):
            state = int(self.next_state[state, actions[state]])
            if state == GOAL:
                return step + 1
        return None


def domain(name: str) -> Domain:
    """The `source` or the `target`."""
    doors = _find("d")
    partner = {door: other for pair in zip(doors[::2], doors[1::2], strict=True) for door, other in (pair, pair[::-1])}
    next_state = np.empty((len(CELLS), len(ACTIONS)), np.int64)
    for state, cell in enumerate(CELLS):
        for action, (down, right) in enumerate(_MOVES):
            there = (cell[0] + down, cell[1] + right)
            if there not in _STATE or state == GOAL:
                there = cell
            elif name == "target" and SHORTCUT in (cell, there) and min(cell[1], there[1]) < SHORTCUT[1]:
                there = cell  # shut on the shortcut's left side
            elif name == "source" and there in partner and ACTIONS[action] == "right":
                there = partner[there]
            next_state[state, action] = _STATE[there]
    return Domain(name, next_state)


def mismatches() -> NDArray[np.bool_]:
    """(S, A): where the two domains differ."""
    differ: NDArray[np.bool_] = domain("source").next_state != domain("target").next_state
    return differ


def value_gaps(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S, A): how far apart the values (S,) of the two domains' next states are, |V(s'_src) - V(s'_tar)| (eq. 4)."""
    gaps: NDArray[np.float64] = np.abs(values[domain("source").next_state] - values[domain("target").next_state])
    return gaps


def dynamics_corrections(floor: float) -> NDArray[np.float64]:
    """(S, A): DARC's correction of rewards, log P_tar(s'|s,a) - log P_src(s'|s,a) of the source's next state.

    Args:
        floor: taken for a probability of 0, whose logarithm a classifier would never give.
    """
    return np.where(mismatches(), np.log(floor), 0.0)
