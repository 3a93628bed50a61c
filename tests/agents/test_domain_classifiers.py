"""The domain classifiers against hand computation, autograd, exact log ratios, and alone against a pack."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from agents.domain_classifiers import FORMS, ClassifierConfig, DomainClassifiers
from agents.draws import Draws
from agents.replay import Replay, transition_rows
from envs.errors import UserError

S, A, B = 3, 2, 8
W = 2 * S + A + 2


def small(**settings: Any) -> ClassifierConfig:
    values: dict[str, Any] = {"hidden": [16], "batch_size": B} | settings
    return ClassifierConfig(**values)


def rows_of(seed: int, members: int = 1, count: int = B) -> Tensor:
    return torch.randn(members, count, W, generator=torch.Generator().manual_seed(seed))


def test_delta_r_by_hand() -> None:
    one = DomainClassifiers([small(hidden=[1])], [0], 1, 1)
    for network, weights in ((one.sa, (1.0, 0.0)), (one.sas, (0.0, 0.0, 1.0))):
        network.flat.zero_()
        network.weights[0][0, :, 0] = torch.tensor(weights)  # relu(s) and relu(s')
        network.weights[1][0, 0] = torch.tensor([0.5, 2.0])
    rows = torch.tensor([[[3.0, 0.7, 9.0, 0.0, 4.0], [-1.0, 0.7, 9.0, 0.0, 4.0]]])  # s, a, r, d, s'
    # log odds 1.5 * 4 of (s, a, s'), 1.5 * 3 or 0 of (s, a)
    torch.testing.assert_close(one.log_ratio(rows), torch.tensor([[1.5, 6.0]]))
    torch.testing.assert_close(one.ratio(rows, 1e-4, 10.0), torch.tensor([[math.exp(1.5), 10.0]]))
    one.shared.form = "residual"
    torch.testing.assert_close(one.log_ratio(rows), torch.tensor([[6.0, 6.0]]))


def test_log_ratio_of_certain_classifiers_is_finite() -> None:
    one = DomainClassifiers([small()], [0], S, A)
    one.sas.biases[-1][0, 0] = torch.tensor([500.0, -500.0])
    ratio = one.log_ratio(rows_of(1))
    assert bool((ratio < -900).all())
    assert bool(ratio.isfinite().all())
    assert one.ratio(rows_of(1), 1e-4, 1.0).unique().tolist() == [pytest.approx(1e-4)]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_cross_entropies(form: str) -> None:
    one = DomainClassifiers([small(form=form, input_noise=0.3)], [4], S, A)
    source, target, noise = rows_of(2), rows_of(3), torch.randn(1, 2 * B, one.noise_width)
    leaves = {}
    for name in ("sa", "sas"):
        network = getattr(one, name)
        leaves[name] = [
            t[0].clone().requires_grad_() for p in zip(network.weights, network.biases, strict=True) for t in p
        ]

    def logits(name: str, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = leaves[name]
        return (x @ w1 + b1).relu() @ w2 + b2

    both = torch.cat((source[0], target[0]))
    sa, sas = both[:, : S + A], torch.cat((both[:, : S + A], both[:, S + A + 2 :]), 1)
    z_sa = logits("sa", sa + 0.3 * noise[0, :, : S + A])
    z_sas = logits("sas", sas + 0.3 * noise[0, :, S + A :])
    z_sas = z_sas + z_sa if form == "residual" else z_sas
    labels = torch.tensor([0] * B + [1] * B)
    losses = cross_entropy(z_sa, labels), cross_entropy(z_sas, labels)
    (losses[0] + losses[1]).backward()
    metrics = one.update(source, target, noise)
    for name in ("sa", "sas"):
        network = getattr(one, name)
        grads = [t[0] for p in zip(network.weight_grads, network.bias_grads, strict=True) for t in p]
        for mine, leaf in zip(grads, leaves[name], strict=True):
            assert leaf.grad is not None
            assert leaf.grad.abs().max() > 1e-4
            torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-6)
    assert float(metrics["sa_classifier_loss"]) == pytest.approx(float(losses[0].detach()), rel=1e-5)
    assert float(metrics["sas_classifier_loss"]) == pytest.approx(float(losses[1].detach()), rel=1e-5)
    found = (z_sas.argmax(1) == labels).float().mean()
    assert float(metrics["sas_classifier_accuracy"]) == pytest.approx(float(found))


def gaussian_domains(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """s' ~ N(s + a, 0.5) in the source and N(s + 0.4 a, 0.5) in the target, where other actions are taken, too."""

    def rows(gain: float, mean_action: float) -> Tensor:
        s = torch.randn(count, 1, generator=generator)
        a = mean_action + 0.6 * torch.randn(count, 1, generator=generator)
        s2 = s + gain * a + 0.5 * torch.randn(count, 1, generator=generator)
        return transition_rows(s, a, torch.zeros(count), torch.zeros(count), s2).unsqueeze(0)

    return rows(1.0, 0.6), rows(0.4, 0.0)


def exact_log_ratio(rows: Tensor) -> Tensor:
    s, a, s2 = rows[..., 0], rows[..., 1], rows[..., 4]
    return ((s2 - s - a).square() - (s2 - s - 0.4 * a).square()) / (2 * 0.5**2)


@pytest.mark.parametrize("form", FORMS)
def test_delta_r_tends_to_the_true_log_ratio(form: str) -> None:
    config = ClassifierConfig(form=form, hidden=[32, 32], input_noise=0.0, batch_size=256, learning_rate=3e-3)
    one, source = DomainClassifiers([config], [0], 1, 1), torch.Generator().manual_seed(5)
    for t in range(1200):
        if t == 900:
            for optim in (one.sa_optim, one.sas_optim):
                optim.scale_rates(0.1)
        one.update(*gaussian_domains(256, source), torch.zeros(1, 512, one.noise_width))
    rows, _ = gaussian_domains(4000, source)
    mine, exact = one.log_ratio(rows)[0], exact_log_ratio(rows)[0]
    assert float(exact.mean()) < -0.1  # the source's own transitions look unlike the target's
    assert float(torch.corrcoef(torch.stack((mine, exact)))[0, 1]) > 0.97
    assert float((mine - exact).square().mean().sqrt() / exact.std()) < 0.25
    # without the correction by (s, a) the other actions of the target would count as other dynamics
    assert abs(float((mine - exact).mean())) < 0.1


def replays(members: int, offline: bool) -> tuple[Replay, Replay]:
    source = Replay(rows_of(6, count=40)[0] if offline else torch.empty(0, W), members, 0 if offline else 50)
    target = Replay(torch.empty(0, W), members, 30)
    for m in range(members):
        if not offline:
            source.add(m, rows_of(10 + m, count=20)[0])
        target.add(m, rows_of(20 + m, count=9)[0])
    return source, target


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_member_of_a_pack_as_alone(form: str, offline: bool) -> None:
    configs = [small(form=form, learning_rate=rate, input_noise=std) for rate, std in ((1e-3, 1.0), (1e-2, 0.1))]
    pack = DomainClassifiers(configs, [7, 8], S, A)
    source, target = replays(2, offline)
    for t in range(20):
        pack.train(t, source, target)
    alone = DomainClassifiers(configs[1:], [8], S, A)
    own = source.select([1]), target.select([1])
    for t in range(20):
        alone.train(t, *own)
    torch.testing.assert_close(pack.select([1]).sas.flat, alone.sas.flat, rtol=0, atol=1e-6)
    torch.testing.assert_close(pack.select([1]).sa.flat, alone.sa.flat, rtol=0, atol=1e-6)
    assert not torch.allclose(alone.sa.flat, DomainClassifiers(configs[1:], [8], S, A).sa.flat, atol=1e-3)


def test_resume_and_pruning_change_nothing() -> None:
    configs = [small(learning_rate=1e-3), small(learning_rate=1e-2)]
    source, target = replays(2, False)
    through = DomainClassifiers(configs, [7, 8], S, A)
    for t in range(12):
        through.train(t, source, target)
    first = DomainClassifiers(configs, [7, 8], S, A)
    for t in range(5):
        first.train(t, source, target)
    again = DomainClassifiers(configs, [7, 8], S, A)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    for t in range(5, 12):
        again.train(t, source, target)
    assert torch.equal(through.sas.flat, again.sas.flat)
    assert torch.equal(through.sa.flat, again.sa.flat)
    kept, own = first.select([1]), (source.select([1]), target.select([1]))
    for t in range(5, 12):
        kept.train(t, *own)
    torch.testing.assert_close(kept.sas.flat, through.select([1]).sas.flat, rtol=0, atol=1e-6)


def test_rows_come_from_each_members_own_rings() -> None:
    one = DomainClassifiers([small(hidden=[4])] * 2, [1, 2], S, A)
    source, target = replays(2, False)
    seen: list[Tensor] = []

    def note(source_MBW: Tensor, target_MBW: Tensor, noise_MRZ: Tensor) -> dict[str, Tensor]:
        seen.append(torch.cat((source_MBW, target_MBW), 1))
        return {}

    one.update = note  # type: ignore[method-assign]
    for t in range(40):
        one.train(t, source, target)
    drawn = torch.cat(seen, 1)
    for m in range(2):
        known = {tuple(row.tolist()) for replay in (source, target) for row in replay.member_rows(m)}
        assert {tuple(row.tolist()) for row in drawn[m]} == known  # all of them and no others


def test_schedule() -> None:
    one = DomainClassifiers([small(train_every=10, first_update=25)], [0], S, A)
    assert [t for t in range(60) if one.due(t)] == [30, 40, 50]


def test_draws_depend_on_the_step_only() -> None:
    forward = Draws([3, 4], "x", (1000, 200))
    in_turn = [forward(n).clone() for n in range(5)]
    again = Draws([3, 4], "x", (1000, 200))
    for n in (4, 0, 2):
        assert torch.equal(again(n), in_turn[n])
    assert torch.equal(forward.select([1])(3)[0], in_turn[3][1])
    assert not torch.equal(in_turn[0], in_turn[1])
    places = Draws([3], "y", (100_000,), uniform=True)(0)
    assert float(places.min()) >= 0
    assert float(places.max()) < 1
    assert abs(float(places.mean()) - 0.5) < 0.01


@pytest.mark.parametrize(
    "settings", [{"form": "both"}, {"learning_rate": 0.0}, {"input_noise": -1.0}, {"hidden": []}, {"train_every": 0}]
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"method\.classifiers\.{next(iter(settings))}="):
        ClassifierConfig(**settings)
