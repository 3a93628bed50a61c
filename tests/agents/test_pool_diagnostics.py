"""What a run says of its pools at an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents.method import TrainingData
from agents.trajectory_metrics import log_likelihood
from tests.agents.test_synthetic import artifacts, configured, data, make, same, train  # noqa: F401


@pytest.mark.parametrize(("name", "source"), [("td3_bc", "ensemble"), ("iql", "diffusion")])
def test_a_run_measures_the_rows_it_learns_from(name: str, source: str, data: TrainingData, artifacts: dict[str, Any]):  # noqa: F811
    """TD3+BC standardises observations by itself; the pendulum's walk has no true dynamics."""
    method = make([configured(name, source)] * 2, [1, 2], data, artifacts, name)
    assert method.diagnostics(0) == [{}, {}]
    train(method, range(3))
    before = method.state_dict()
    found = method.diagnostics(3)
    assert same(before, method.state_dict())
    assert same(method.diagnostics(3), found)
    assert same(method.select([1]).diagnostics(3)[0], found[1], 1e-4)
    for m, measures in enumerate(found):
        rows = method.replay.member_rows(m)
        mean, std = method.data.observation_mean, method.data.observation_std
        if data.observation_mean is None and mean is not None and std is not None:
            rows = torch.cat((rows[:, :3] * std + mean, rows[:, 3:]), 1)
        expected = log_likelihood(method.actor().select([m]), rows).double().mean()
        assert measures["synthetic/log_likelihood"] == pytest.approx(float(expected), abs=1e-3)
        assert {"synthetic/log_likelihood_step_4", "synthetic/support_precision"} <= measures.keys()
        assert not [key for key in measures if "error" in key]


def test_a_run_without_synthetic_rows_measures_nothing(data: TrainingData, artifacts: dict[str, Any]):  # noqa: F811
    method = make([configured(source="none")], [1], data, artifacts)
    train(method, range(2))
    assert method.diagnostics(2) == [{}]
