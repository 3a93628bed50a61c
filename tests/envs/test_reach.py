"""Edge-of-reach states against reachability by brute force, optimal values against the Bellman equation."""

import itertools

import numpy as np
import pytest
import torch

from envs.reach import exact_edge_test, grid_points, optimal_values
from envs.toys import EdgeOfReach


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_exact_test_is_reachability_on_a_grid(length):
    """Points of a grid with a spacing of 0.5, walks in steps of 0 or 0.5 or 1 along each axis from the start box."""
    spacing, width = 0.5, 10.0
    points = grid_points(width, spacing)
    reachable = np.abs(points).max(-1) <= EdgeOfReach.START
    before = reachable
    for _ in range(length):
        before, padded = reachable, np.pad(reachable, 2)
        size = len(reachable)
        reachable = np.any(
            [padded[i : i + size, j : j + size] for i, j in itertools.product(range(5), repeat=2)], axis=0
        )
    assert reachable.sum() > before.sum()
    np.testing.assert_array_equal(EdgeOfReach.edge_of_reach(points, length), reachable & ~before)
    test = exact_edge_test("offsweep/EdgeOfReach-v0")
    assert test is not None
    np.testing.assert_array_equal(test(torch.tensor(points), length).numpy(), reachable & ~before)
    assert exact_edge_test("Hopper-v4") is None


def test_optimal_values_are_those_of_brute_force_and_solve_the_bellman_equation():
    gamma, width, spacing = 0.9, 6.0, 0.5
    values, sweeps = optimal_values(gamma, width, spacing, tolerance=1e-10)
    assert values.shape == (25, 25)
    assert sweeps > 50
    points = grid_points(width, spacing)
    moves = np.array(list(itertools.product(np.arange(-2, 3), repeat=2)))
    index = np.stack(np.meshgrid(np.arange(25), np.arange(25), indexing="ij"), -1)
    best = np.full(values.shape, -np.inf)
    for move in moves:
        best = np.maximum(best, values[tuple(np.moveaxis(np.clip(index + move, 0, 24), -1, 0))])
    np.testing.assert_allclose(values, EdgeOfReach.reward(points) + gamma * best, atol=1e-9)
    # greedy walks earn what the values promise
    for start in [(12, 12), (0, 24), (3, 20)]:
        place, earned = np.array(start), 0.0
        for t in range(200):
            earned += gamma**t * float(EdgeOfReach.reward(points[tuple(place)]))
            reached = np.clip(place + moves, 0, 24)
            place = reached[values[tuple(reached.T)].argmax()]
        assert earned == pytest.approx(values[start], abs=1e-6)


def test_an_action_must_fall_on_the_grid():
    with pytest.raises(ValueError, match="whole number"):
        optimal_values(0.9, 6.0, 0.3)
