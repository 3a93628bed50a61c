import numpy as np
import pytest

from agents.tabular import METHODS, TabularConfig, accepted, train
from envs import grid_world
from envs.grid_world import ACTIONS, CELLS, START, domain

QUICK = TabularConfig(steps=60_000, evaluations=10)
DIFFER = grid_world.mismatches()
DOORS = [CELLS.index((row, 5)) for row in (2, 3, 7, 8)]
RIGHT = ACTIONS.index("right")


def doors_and_shortcut(method, q):
    kept = accepted(method, q)
    assert (kept[~DIFFER]).all() or method == "target only"
    others = DIFFER.copy()
    others[DOORS, RIGHT] = False
    return kept[DOORS, RIGHT].tolist(), kept[others].tolist()


def test_which_source_transitions_a_filter_keeps():
    nothing, best = np.zeros(DIFFER.shape), domain("target").optimal_q()
    assert doors_and_shortcut("mix", nothing) == ([True] * 4, [True] * 2)
    assert doors_and_shortcut("dynamics filter", nothing) == ([False] * 4, [False] * 2)
    assert doors_and_shortcut("value filter", nothing) == ([True] * 4, [False] * 2)
    # by values of its own a filter knows nothing before it has learned, and then the same
    assert doors_and_shortcut("value filter, learned values", nothing) == ([True] * 4, [True] * 2)
    assert doors_and_shortcut("value filter, learned values", best) == ([True] * 4, [False] * 2)
    # and where the shortcut is believed in, the gap at it is one step's: nothing is rejected
    believed = domain("source").optimal_q()
    assert doors_and_shortcut("value filter, learned values", believed) == ([True] * 4, [True] * 2)


@pytest.mark.parametrize(
    ("method", "arrives"),
    [
        ("value filter", True),
        ("dynamics filter", True),
        ("DARC", False),
        ("source only", False),
        ("target only", False),
    ],
)
def test_who_arrives_in_the_target_with_few_target_steps(method, arrives):
    run = train(method, 0, QUICK)
    assert (run.steps_to_goal[-1] == 20) == arrives


def test_a_correction_keeps_the_policy_in_its_room_and_a_filter_does_not():
    darc, filtered = train("DARC", 0, QUICK), train("value filter", 0, QUICK)
    room = np.array([column < 6 for _, column in CELLS])
    shares = [run.source_visits[room].sum() / run.source_visits.sum() for run in (darc, filtered)]
    assert shares[0] > 0.9
    assert shares[1] < 0.6
    assert (darc.q[DOORS, RIGHT] < -1).all()
    assert darc.q[START].max() < 0.01
    assert filtered.q[START].max() > 0.3
    assert [run.source_visits.sum() for run in (darc, filtered)] == [60_000] * 2
    assert [run.target_visits.sum() for run in (darc, filtered)] == [6_000] * 2


def test_the_source_s_policy_is_learned_and_goes_wrong_in_the_target():
    run = train("source only", 0, QUICK)
    np.testing.assert_allclose(run.q[START].max(), domain("source").optimal_q()[START].max(), atol=0.01)
    assert run.steps_to_goal[-1] is None
    assert not run.target_visits.any()


def test_a_run_is_its_seed_s():
    config = TabularConfig(steps=3_000)
    first, second, other = (train("mix", seed, config) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.q, second.q)
    assert not np.array_equal(first.source_visits, other.source_visits)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="no tabular method 'vgdf'; known are source only"):
        train("vgdf", 0, QUICK)
    assert len(METHODS) == 7
