import numpy as np
import pytest

from envs import grid_world
from envs.grid_world import ACTIONS, CELLS, GAMMA, GOAL, START, domain

RIGHT, LEFT = ACTIONS.index("right"), ACTIONS.index("left")


def state(row, column):
    return CELLS.index((row, column))


def test_values_are_those_of_the_shortest_ways():
    # 17 steps through a door and the shortcut; 6 to a lower cell beside an upper door, 1 through it, 13 around the wall
    assert domain("source").optimal_q()[START].max() == pytest.approx(GAMMA**16)
    assert domain("target").optimal_q()[START].max() == pytest.approx(GAMMA**19)
    values = domain("target").optimal_q().max(axis=1)
    assert values[state(5, 12)] == 1.0
    assert values[GOAL] == 0.0
    assert values[state(5, 8)] == pytest.approx(GAMMA**12)  # 4 up, 5 right, 4 down
    assert values[state(5, 9)] == pytest.approx(GAMMA**3)
    assert values[state(2, 6)] == pytest.approx(GAMMA**11)
    assert values[state(7, 6)] == pytest.approx(GAMMA**16)


def test_the_domains_differ_in_six_actions_of_two_kinds():
    values = domain("target").optimal_q().max(axis=1)
    gaps = grid_world.value_gaps(values)
    upper, lower, shortcut = GAMMA**11 - GAMMA**12, GAMMA**16 - GAMMA**17, GAMMA**3 - GAMMA**12
    expected = {
        (state(2, 5), RIGHT): upper, (state(3, 5), RIGHT): upper, (state(7, 5), RIGHT): lower,
        (state(8, 5), RIGHT): lower, (state(5, 8), RIGHT): shortcut, (state(5, 9), LEFT): shortcut,
    }  # fmt: skip
    assert {(s, a) for s, a in zip(*np.nonzero(grid_world.mismatches()), strict=True)} == set(expected)
    for (s, a), gap in expected.items():
        assert gaps[s, a] == pytest.approx(gap)
    assert gaps.sum() == pytest.approx(sum(expected.values()))
    assert domain("source").next_state[state(2, 5), RIGHT] == state(3, 6)
    assert domain("target").next_state[state(5, 8), RIGHT] == state(5, 8)


def test_the_best_policy_of_the_source_never_arrives_in_the_target():
    actions = domain("source").optimal_q().argmax(axis=1)
    assert domain("source").steps_to_goal(actions) == 17
    assert domain("target").steps_to_goal(actions) is None
    assert domain("target").steps_to_goal(domain("target").optimal_q().argmax(axis=1)) == 20


@pytest.mark.parametrize("of", ["source", "target"])
def test_what_a_policy_loses_between_the_domains_is_its_value_gaps(of):
    """The equality behind theorem 4.2 (lemma C.1) for the best policy of each domain, along its way in the source:
    V_src(s_0) - V_tar(s_0) = sum_t gamma^(t+1) (V_tar(s'_src) - V_tar(s'_tar))."""
    source, target = domain("source"), domain("target")
    actions = domain(of).optimal_q().argmax(axis=1)

    def value(where, start):
        if start == GOAL:
            return 0.0
        steps = where.steps_to_goal(actions, start)
        return 0.0 if steps is None else GAMMA ** (steps - 1)

    total, s = 0.0, START
    for t in range(grid_world.MAX_STEPS):
        there, here = source.next_state[s, actions[s]], target.next_state[s, actions[s]]
        total += GAMMA ** (t + 1) * (value(target, there) - value(target, here))
        s = there
        if s == GOAL:
            break
    assert value(source, START) - value(target, START) == pytest.approx(total, abs=1e-12)


def test_corrections_are_large_exactly_where_the_domains_differ():
    corrections = grid_world.dynamics_corrections(1e-3)
    np.testing.assert_allclose(corrections[grid_world.mismatches()], np.log(1e-3))
    assert (corrections[~grid_world.mismatches()] == 0).all()
