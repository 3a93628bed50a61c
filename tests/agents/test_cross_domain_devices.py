"""Updates of the cross-domain methods on a device without values: nothing in them looks at one or comes from a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agents import target_dynamics
from agents.behaviour_cloning import BehaviourCloning
from agents.conservative import SourcePenalty
from agents.cross_domain import joined
from agents.domain_classifiers import ClassifierConfig, DomainClassifiers
from agents.domain_sac import ActorPenalty, CriticPenalty, DomainSAC, DomainSACHyperparameters, DomainSACSettings
from agents.method import Termination
from agents.source_filters import accept, filtered, value_score
from agents.target_dynamics import TargetDynamics, TargetDynamicsConfig
from agents.value_proximity import ValueGate, num_fictitious_noises
from tests.agents.devices import no_host

M, S, A, B, E = 2, 11, 3, 8, 3  # Hopper's widths, for its termination rule


def learner() -> DomainSAC:
    settings = DomainSACSettings(hidden=(16, 16), actor_every=2, max_grad_norm=1.0, auto_alpha=True, optimistic=True)
    return DomainSAC(range(M), [DomainSACHyperparameters()] * M, settings, S, A, "meta")


def rows() -> Tensor:
    return torch.empty(M, B, 2 * S + A + 2, device="meta")


def noise(count: int) -> Tensor:
    return torch.empty(count, M, 2 * B, A, device="meta")


def prediction(state_action_MBX: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = (torch.empty(M, E, state_action_MBX.shape[1], 1 + S, device="meta") for _ in range(2))
    return mean, variance


@pytest.mark.parametrize("gate", ["topk", "quantile"])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_filtered_update(form: str, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sac, batch = learner(), joined(rows(), rows())
    own = noise(num_fictitious_noises(form, E, B, 2 * B, S, A))
    values = ValueGate(form, gate, 0.25, "batch", Termination("Hopper-v5"))
    with no_host(monkeypatch):
        for turn in range(sac.period):
            targets = sac.targets(batch.rows_MBW, noise(1)[0])
            passed, shown = values(sac, prediction, batch, targets, own, True)
            metrics = sac.update(passed, noise(sac.num_noises), turn, True, targets=targets)
    assert metrics is not None
    assert {value.shape for value in (*metrics.values(), *shown.values())} == {(M,)}


def test_other_filters_and_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    sac, batch = learner(), joined(rows(), rows())
    penalties: list[tuple[CriticPenalty | None, ActorPenalty | None]] = [
        (None, BehaviourCloning([1.0] * M, device="meta"))
    ]
    size = SourcePenalty.noise_size(4, B, A)
    own = torch.empty(M, size, device="meta")
    weight, temperature = torch.empty(M, B, device="meta"), torch.empty(M, 1, 1, device="meta")
    penalties.append((SourcePenalty(weight, temperature, own, 4, True), None))
    with no_host(monkeypatch):
        passed = filtered(batch, accept(value_score(sac, rows()), 0.25), "accepted")
        for of_critics, of_actor in penalties:
            metrics = sac.update(passed, noise(sac.num_noises + 1), 0, True, of_critics, of_actor)
            assert metrics is not None


def test_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClassifierConfig(hidden=[16], batch_size=B)
    classifiers = DomainClassifiers([config] * M, range(M), S, A, "meta")
    with no_host(monkeypatch):
        classifiers.update(rows(), rows(), torch.empty(M, 2 * B, classifiers.noise_width, device="meta"))
        assert classifiers.ratio(rows(), 1e-4, 1.0).shape == (M, B)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_the_targets_dynamics(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient step and a prediction; a refit reads the holdout's errors once an epoch."""
    config = TargetDynamicsConfig(ensemble_size=E, hidden=[16], weight_decay=[0.0, 0.0], precision=precision)
    dynamics = TargetDynamics(config, range(M), S, A, "meta")
    monkeypatch.setattr(target_dynamics, "_fused_adam", lambda *_args, **_kwargs: None)  # does not know the device
    with no_host(monkeypatch):
        x, y = torch.empty(M * E, B, S + A, device="meta"), torch.empty(M * E, B, 1 + S, device="meta")
        assert dynamics._training.step(x, y).shape == (M * E,)
        mean, variance = dynamics.predict(torch.empty(M, B, S + A, device="meta"))
    assert mean.shape == variance.shape == (M, E, B, 1 + S)
