"""How an error at an edge-of-reach state spreads (Sims et al. 2024): a chain, the project's rollouts and targets.

A state that rollouts of k steps only ever end in is bootstrapped from and never updated. If its value is off by e,
value iteration carries gamma^(k-t) e to the state at step t of the rollout, and it stays there. Nothing is learned here
but the values: the ensemble is exact, the critics hold one value per state.

The chain: heights H, H - 1, ..., 1 and the floor, where Hopper's rule ends it; every step is worth 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from agents.dynamics import Ensemble
from agents.method import TrainingData
from agents.ravl import RAVL, RAVLConfig

GAMMA, HEIGHT, OBS, ACT = 0.9, 12, 2, 1
E = 5.0  # error of the state that is not updated


def true_value(height: int) -> float:
    """What `height` steps that are worth 1 each are worth."""
    return (1 - GAMMA**height) / (1 - GAMMA)


def exact_ensemble() -> Ensemble:
    """One member that predicts s' = s - (1, 0) and r = 1 with a standard deviation of e^-30."""
    outputs = OBS + 1
    tensors = {
        "W0": torch.zeros(1, OBS + ACT, 4), "b0": torch.zeros(1, 1, 4), "W1": torch.zeros(1, 4, 2 * outputs),
        "b1": torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]).view(1, 1, -1), "mean": torch.zeros(OBS + ACT),
        "std": torch.ones(OBS + ACT), "max_logvar": torch.full((outputs,), -60.0),
        "min_logvar": torch.full((outputs,), -60.0),
    }  # fmt: skip
    return Ensemble(tensors, [0], OBS)


def learner(starts: Sequence[int], length: int, num_critics: int = 2) -> RAVL:
    """RAVL on a dataset of these heights, whose first rollouts have been made; no entropy in its targets."""
    n = len(starts)
    obs = torch.tensor([[float(height), 0.0] for height in starts])
    data = TrainingData("Hopper-v4", obs, torch.zeros(n, ACT), torch.ones(n), obs - torch.eye(2)[0], torch.zeros(n))
    config = RAVLConfig(
        hidden=[HEIGHT], num_critics=num_critics, eta=0.0, gamma=GAMMA, entropy_in_target=False, real_ratio=0.0,
        rollout_length=length, rollout_batch=n,
    )  # fmt: skip
    method = RAVL([config], [0], data, {"dynamics": exact_ensemble().state_dict()})
    method.add_rollouts([job.run(method.dynamics) for job in method.rollout_jobs(0)])
    return method


def hold(method: RAVL, values_NH: Tensor) -> None:
    """Give target critic n the values of heights 0..HEIGHT, exact at whole heights: straight lines between them."""
    network = method.sac.target
    network.flat.zero_()
    network.weights[0][:, 0] = 1.0
    network.biases[0][:, 0] = -torch.arange(HEIGHT, dtype=torch.float32)
    slopes = values_NH.diff(dim=1)
    network.weights[1][:, :, 0] = torch.cat((slopes[:, :1], slopes.diff(dim=1)), 1)
    network.biases[1][:, 0, 0] = values_NH[:, 0]


def errors(method: RAVL, frozen: Sequence[float]) -> dict[int, float]:
    """Value minus true value of every state that rollouts have started a step in, after value iteration on their
    transitions. All other states keep the true value plus `frozen[n]` in critic n."""
    rows = method.replay.member_rows(0).unsqueeze(0)
    heights = rows[0, :, 0].round().long()
    true = torch.tensor([true_value(h) for h in range(HEIGHT + 1)])
    values_NH = true + torch.tensor(frozen).unsqueeze(1)
    values_NH[:, heights] = 0.0  # what is updated may start anywhere
    for _ in range(2 * HEIGHT):
        hold(method, values_NH)
        target, _ = method.sac._critic_target(rows, torch.zeros(1, 1, rows.shape[1], ACT))
        values_NH[:, heights] = target
    return {h: float((values_NH - true)[0, h]) for h in sorted(set(heights.tolist()), reverse=True)}


@pytest.mark.parametrize("length", [1, 3, 5, 10])
def test_the_error_of_an_edge_of_reach_state_is_carried_back(length: int) -> None:
    """gamma^(k-t) e at the state of step t = 0..k-1."""
    found = errors(learner([HEIGHT], length), [E, E])
    assert list(found) == [HEIGHT - t for t in range(length)]
    for t, error in enumerate(found.values()):
        assert error == pytest.approx(GAMMA ** (length - t) * E, rel=1e-4)


@pytest.mark.parametrize("length", [HEIGHT, HEIGHT + 3])
def test_rollouts_to_the_end_leave_no_error(length: int) -> None:
    found = errors(learner([HEIGHT], length), [E, E])
    assert list(found) == list(range(HEIGHT, 0, -1))
    assert max(map(abs, found.values())) < 1e-4


def test_starts_from_which_every_state_is_left_leave_no_error() -> None:
    """Rollouts of 5 from 12, 7 and 2: each ends in a state that another one starts from."""
    found = errors(learner([12, 7, 2], 5), [E, E])
    assert list(found) == list(range(HEIGHT, 0, -1))
    assert max(map(abs, found.values())) < 1e-4


def test_a_rollout_that_passes_a_state_updates_it() -> None:
    """From 12 and 10 with 5 steps the edge is the second rollout's: 7, the first one's, is on the way."""
    found = errors(learner([12, 10], 5), [E, E])
    assert min(found) == 6
    for height, error in found.items():
        assert error == pytest.approx(GAMMA ** (height - 5) * E, rel=1e-4)


@pytest.mark.parametrize("frozen", [[5.0, 2.0, 3.0], [5.0, -1.0, 4.0]])
def test_of_critics_that_disagree_at_the_edge_the_lowest_counts(frozen: list[float]) -> None:
    """RAVL's remedy: what is carried back is the smallest error, so critics that disagree widely carry back none that
    overestimates."""
    for t, error in enumerate(errors(learner([HEIGHT], 5, len(frozen)), frozen).values()):
        assert error == pytest.approx(GAMMA ** (5 - t) * min(frozen), rel=1e-3)
