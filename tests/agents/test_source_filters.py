"""The scores by which source rows can be kept."""

from __future__ import annotations

import torch

from agents.domain_classifiers import ClassifierConfig, DomainClassifiers
from agents.domain_sac import DomainSAC, DomainSACHyperparameters, DomainSACSettings
from agents.source_filters import accept, value_score

S, A, B = 2, 1, 5


def test_domain_ratio_prefers_the_targets_dynamics() -> None:
    """In the target s' = s + a / 2 for the first observation, in half of the source rows, too."""
    draw = torch.Generator().manual_seed(0)

    def rows(count: int, gain: torch.Tensor) -> torch.Tensor:
        s, a = torch.randn(count, S, generator=draw), torch.rand(count, A, generator=draw) * 2 - 1
        s2 = s + torch.cat((gain.unsqueeze(1) * a, 0 * a), 1) + 0.05 * torch.randn(count, S, generator=draw)
        return torch.cat((s, a, torch.zeros(count, 2), s2), 1).unsqueeze(0)

    def of_source(count: int) -> torch.Tensor:
        return rows(count, torch.where(torch.arange(count) % 2 == 0, 0.5, 1.5))

    config = ClassifierConfig(hidden=[32, 32], input_noise=0.0, learning_rate=3e-3)
    classifiers = DomainClassifiers([config], [0], S, A)
    for _ in range(400):
        target = rows(128, torch.full((128,), 0.5))
        classifiers.update(of_source(128), target, torch.zeros(1, 256, classifiers.noise_width))
    kept = accept(classifiers.log_ratio(of_source(400)), 0.25).index_MR
    assert kept is not None
    assert kept.shape == (1, 100)
    assert float((kept % 2 == 0).float().mean()) > 0.95


def test_value_is_the_least_of_the_critics() -> None:
    sac = DomainSAC([0, 1], [DomainSACHyperparameters()] * 2, DomainSACSettings(hidden=(8,)), S, A)
    rows = torch.randn(2, B, 2 * S + A + 2)
    score = value_score(sac, rows)
    for m in range(2):
        x = rows[m, :, : S + A]
        values = []
        for g in (2 * m, 2 * m + 1):
            w1, w2 = (w[g] for w in sac.critic.weights)
            b1, b2 = (b[g] for b in sac.critic.biases)
            values.append(((x @ w1 + b1).relu() @ w2 + b2)[:, 0])
        torch.testing.assert_close(score[m], torch.minimum(*values))
