"""Penalties against loops over plain numbers, their scale, and weights that are tuned."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agents.dynamics import DynamicsConfig, Ensemble
from agents.mobile import MOBILEConfig
from agents.mopo import MOPO, MOPOConfig
from agents.penalties import (
    PENALTIES,
    EnsemblePenalty,
    PenaltyWeights,
    dataset_means,
    ensemble_std,
    loo_kl,
    make_penalty,
    max_pairwise,
)
from agents.rollout import Predictions
from envs.errors import UserError
from tests.agents.test_model_based import DYNAMICS, OBS, SMALL, R, artifacts, data, learner, run_jobs
from tests.agents.test_rollout import assert_same, linear_ensemble, on_gpu, pack_job, roll

E, B, D = 5, 40, 4


def predictions(size: int = E, spread: float = 0.5) -> Predictions:
    draw = torch.Generator().manual_seed(size)
    mean = 20.0 + spread * torch.randn(size, B, D, generator=draw)
    std = 0.1 + torch.rand(size, B, D, generator=draw)
    member = torch.randint(size, (B,), generator=draw)
    return Predictions(mean, std, member, 20.0 + torch.randn(B, D, generator=draw))


def by_hand(name: str, made: Predictions, reduction: str = "rms") -> NDArray[np.float64]:
    """Row by row in float64, as the module's formulas are written."""
    mean, std, sample = (x.double().numpy() for x in (made.mean_EBD, made.std_EBD, made.sample_BD))
    found: list[float] = []
    for b, member in enumerate(made.member_B.tolist()):
        mu, sigma, size = mean[:, b], std[:, b], len(mean)
        mixture = (sigma**2 + mu**2).mean(0) - mu.mean(0) ** 2
        if name == "max_aleatoric":
            value: Any = max(math.sqrt(sum(s**2 for s in sigma[i])) for i in range(size))
        elif name == "max_pairwise":
            value = max(np.linalg.norm(mu[i] - mu[j]) for i, j in itertools.combinations(range(size), 2))
        elif name == "ensemble_std":
            value = {"rms": mixture.mean() ** 0.5, "mean": (mixture**0.5).mean(), "norm": mixture.sum() ** 0.5}[
                reduction
            ]
        elif name == "ensemble_variance":
            value = mixture.sum() if reduction == "norm" else mixture.mean()
        elif name == "loo_kl":
            rest_mu = (mu.sum(0) - mu[member]) / (size - 1)
            second = (sigma**2 + mu**2).sum(0) - sigma[member] ** 2 - mu[member] ** 2
            rest_var = second / (size - 1) - rest_mu**2
            value = sum(
                math.log(math.sqrt(rest_var[d]) / sigma[member, d])
                + (sigma[member, d] ** 2 + (mu[member, d] - rest_mu[d]) ** 2) / (2 * rest_var[d])
                - 0.5
                for d in range(D)
            )
        else:
            log_p = [
                sum(
                    -0.5 * math.log(2 * math.pi) - math.log(sigma[i, d])
                    - (sample[b, d] - mu[i, d]) ** 2 / (2 * sigma[i, d] ** 2)
                    for d in range(D)
                )
                for i in range(size)
            ]  # fmt: skip
            value = np.var(log_p)
        found.append(float(value))
    return np.array(found)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_their_formulas(name: str, size: int) -> None:
    made = predictions(size)
    np.testing.assert_allclose(EnsemblePenalty(name)(made), by_hand(name, made), rtol=2e-4)


@pytest.mark.parametrize("name", ["ensemble_std", "ensemble_variance"])
@pytest.mark.parametrize("reduction", ["rms", "mean", "norm"])
def test_reductions_over_outputs(name: str, reduction: str) -> None:
    made = predictions()
    expected = by_hand(name, made, reduction)
    np.testing.assert_allclose(EnsemblePenalty(name, reduction=reduction)(made), expected, rtol=1e-4)


@pytest.mark.parametrize("name", PENALTIES)
def test_of_some_members_only(name: str) -> None:
    made, members = predictions(), (0, 2, 3)
    made = made._replace(member_B=torch.tensor(members)[made.member_B % 3])
    place = torch.tensor([members.index(e) for e in made.member_B.tolist()])
    alone = Predictions(made.mean_EBD[list(members)], made.std_EBD[list(members)], place, made.sample_BD)
    torch.testing.assert_close(EnsemblePenalty(name, members)(made), EnsemblePenalty(name)(alone))
    assert not torch.allclose(EnsemblePenalty(name, members)(made), EnsemblePenalty(name)(made))


def test_the_kl_is_torchs_of_the_moments_of_the_others() -> None:
    """And 0 where all members agree."""
    made = predictions(2)
    row, other = torch.arange(B), 1 - made.member_B
    of = [torch.distributions.Normal(made.mean_EBD[m, row], made.std_EBD[m, row]) for m in (made.member_B, other)]
    torch.testing.assert_close(loo_kl(made), torch.distributions.kl_divergence(*of).sum(-1), rtol=1e-4, atol=1e-5)
    alike = Predictions(torch.full((3, B, D), 7.0), torch.full((3, B, D), 0.3), torch.zeros(B).long(), torch.ones(B, D))
    torch.testing.assert_close(loo_kl(alike), torch.zeros(B), atol=1e-6, rtol=0.0)


def test_the_kl_survives_an_outlier_far_from_small_deviations() -> None:
    """Sums of squares of raw numbers would lose the others' variance, 1e-4, in float32."""
    mean = torch.tensor([[[1000.0]], [[0.001]], [[-0.001]]])
    made = Predictions(mean, torch.full((3, 1, 1), 0.01), torch.tensor([0]), torch.zeros(1, 1))
    np.testing.assert_allclose(loo_kl(made), by_hand_one(1000.0, 0.01, 0.0, 1e-4 + 1e-6), rtol=1e-4)


def by_hand_one(mu: float, sigma: float, rest: float, variance: float) -> float:
    return 0.5 * (math.log(variance / sigma**2) + (sigma**2 + (mu - rest) ** 2) / variance - 1.0)


def test_pairs_are_farther_apart_than_members_from_the_mean() -> None:
    """What some code calls pairwise is the largest distance to the mean: half, where two members differ."""
    made = predictions(2)
    to_mean = (made.mean_EBD - made.mean_EBD.mean(0)).norm(dim=-1).amax(0)
    torch.testing.assert_close(max_pairwise(made), 2 * to_mean)


def test_the_ensemble_std_has_an_aleatoric_part() -> None:
    """Members that agree are as unsure as each of them is."""
    std = torch.full((3, B, D), 0.3)
    made = Predictions(torch.ones(3, B, D), std, torch.zeros(B).long(), torch.ones(B, D))
    torch.testing.assert_close(ensemble_std(made), torch.full((B,), 0.3))
    torch.testing.assert_close(ensemble_std(made, "norm"), torch.full((B,), 0.3 * math.sqrt(D)))


# ---- in rollouts ----------------------------------------------------------------------------------------------------


def spread() -> Ensemble:
    """Three members that disagree, of which two are elites."""
    return linear_ensemble([0.0, 0.02, -0.03], [[-3.0, -3.0, 0.0], [-2.5, -3.0, 0.5], [-3.0, -2.0, 0.0]], [0, 2])


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("members", [None, (0, 2)])
def test_both_forms_of_rollouts_give_the_same_penalties(
    name: str, members: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalty = EnsemblePenalty(name, members, factor=0.1)
    compacted = pack_job(pickle.loads(pickle.dumps(penalty))).run(spread())
    on_gpu(monkeypatch)
    assert_same(compacted, pack_job(penalty).run(spread()))
    assert all(s.penalty_sum > 0 for s in compacted.statistics)


@pytest.mark.parametrize("name", ["loo_kl", "ll_variance"])
def test_a_rollout_hands_over_what_it_has_drawn(name: str) -> None:
    """The penalties of the rows that come out, from the state change and reward that stand in them."""
    ensemble, starts = spread(), torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    seen: list[Predictions] = []

    def penalty(made: Predictions) -> Tensor:
        seen.append(made)
        return EnsemblePenalty(name)(made)

    rows, statistics = roll(ensemble, starts, 1, penalty=penalty, penalty_coef=0.0)
    torch.testing.assert_close(seen[0].sample_BD, torch.cat((rows[:, -2:] - rows[:, :2], rows[:, 3:4]), 1))
    assert set(seen[0].member_B.tolist()) == {0, 2}
    means, _ = ensemble.predict_all(rows[:, :3])
    torch.testing.assert_close(seen[0].mean_EBD, means)
    assert statistics.penalty_sum == pytest.approx(by_hand_sum(name, seen[0]), rel=1e-4)


def by_hand_sum(name: str, made: Predictions) -> float:
    # D is 3 here: another output that adds nothing
    mean, std, sample = (torch.cat((x, torch.ones(*x.shape[:-1], 1)), -1) for x in (*made[:2], made.sample_BD))
    return float(by_hand(name, Predictions(mean, std, made.member_B, sample)).sum())


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("members", [None, (0, 2)])
def test_penalties_never_wait_for_the_device(name: str, members: tuple[int, ...] | None) -> None:
    with FakeTensorMode(), torch.device("meta"):
        made = Predictions(torch.empty(3, B, D), torch.empty(3, B, D), torch.empty(B).long(), torch.empty(B, D))
        assert EnsemblePenalty(name, members, factor=2.0)(made).shape == (B,)


def test_a_filtered_rollout_penalises_the_candidate_taken() -> None:
    """`ll_variance` needs the outputs with which the rollout goes on, `loo_kl` the elite that made them."""
    from tests.agents.test_model_based import filtered, mopo_configs

    (config,) = filtered(mopo_configs(penalty="loo_kl", penalty_members="elites")[1:2], threshold=0.0, clip=1e6)
    method, seen = learner([config], [3]), []
    (job,) = method.rollout_jobs(0)
    original = job.penalty

    def penalty(made: Predictions) -> Tensor:
        seen.append(made)
        return original(made)  # type: ignore[misc]

    rows = dataclasses.replace(job, penalty=penalty, penalty_coef=torch.zeros(1), length=1).run(method.dynamics).rows[0]
    assert len(rows) == len(seen[0].sample_BD)
    change = torch.cat((rows[:, -OBS:] - rows[:, :OBS], rows[:, R : R + 1]), 1)
    torch.testing.assert_close(seen[0].sample_BD, change, atol=1e-6, rtol=1e-4)
    # the draws of the member named are the nearest to its own mean, in its own deviations
    row = torch.arange(len(rows))
    z = (seen[0].sample_BD - seen[0].mean_EBD[seen[0].member_B, row]) / seen[0].std_EBD[seen[0].member_B, row]
    assert set(seen[0].member_B.tolist()) == set(method.ensemble.elites)  # type: ignore[union-attr]
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.4)


# ---- settings -------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> MOPOConfig:
    return MOPOConfig(**{**SMALL, **changes})


def test_by_default_it_is_mopos() -> None:
    assert learner([config()], [0]).penalty == EnsemblePenalty("max_aleatoric")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"penalty": "ensemble_sdt"}, "method.penalty='ensemble_sdt' must be one of max_aleatoric, max_pairwise"),
        ({"penalty_target": 0.0}, "method.penalty_target=0.0 must be greater than 0"),
        ({"penalty_target": 1.0, "penalty_coef": 0.0}, "method.penalty_coef=0.0 must be greater than 0 with"),
        ({"penalty_target": 1.0, "model_quality": 1.0}, "the true dynamics have no penalty"),
        ({"penalty_lr": 0.0}, "method.penalty_lr=0.0 must be greater than 0"),
        ({"penalty_scale": "mean"}, "method.penalty_scale='mean' must be one of raw, dataset, max_aleatoric"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**changes)


@pytest.mark.parametrize("name", PENALTIES[1:])
def test_one_member_has_nobody_to_disagree_with(name: str) -> None:
    one = dataclasses.replace(DYNAMICS, use_members=1)
    with pytest.raises(UserError, match=f"method.penalty={name} needs an ensemble of 2 or more members"):
        config(penalty=name, dynamics=one)
    config(dynamics=one)
    with pytest.raises(UserError, match="2 or more elites"):
        config(penalty=name, penalty_members="elites", dynamics=dataclasses.replace(DYNAMICS, num_elites=1))


def test_scales_make_penalties_comparable_on_the_dataset() -> None:
    ensemble = Ensemble.from_state_dict(artifacts()["dynamics"])
    for name in PENALTIES:
        relative = make_penalty(name, "rms", "all", "dataset", ensemble, data())
        as_large = make_penalty(name, "rms", "all", "max_aleatoric", ensemble, data())
        means = dataset_means(ensemble, data(), [relative, as_large, EnsemblePenalty("max_aleatoric")])
        assert means[0] == pytest.approx(1.0, rel=1e-4)
        assert means[1] == pytest.approx(means[2], rel=1e-4)
    assert make_penalty("max_aleatoric", "rms", "all", "max_aleatoric", ensemble, data()).factor == 1.0


def test_the_mean_over_the_dataset_is_that_of_all_its_rows() -> None:
    """The dataset has fewer rows than are looked at."""
    ensemble = Ensemble.from_state_dict(artifacts()["dynamics"])
    _, std = ensemble.predict_all(torch.cat((data().observations, data().actions), 1))
    (mean,) = dataset_means(ensemble, data(), [EnsemblePenalty("max_aleatoric")])
    assert mean == pytest.approx(float(std.norm(dim=-1).amax(0).mean()), rel=1e-5)


def test_members_that_agree_cannot_be_scaled_by_their_disagreement() -> None:
    ensemble = linear_ensemble([0.0, 0.0], [[-1.0] * 3] * 2)
    few = dataclasses.replace(data(), observations=torch.ones(10, 2), actions=torch.ones(10, 1))
    with pytest.raises(UserError, match=r"method.penalty=max_pairwise over the dataset is 0, by which nothing"):
        make_penalty("max_pairwise", "rms", "all", "dataset", ensemble, few)


# ---- a part of an ensemble ------------------------------------------------------------------------------------------


def test_a_part_of_an_ensemble_is_its_first_members() -> None:
    whole = Ensemble.from_state_dict(artifacts()["dynamics"])
    method = learner([config(dynamics=dataclasses.replace(DYNAMICS, use_members=2, num_elites=1))], [0])
    part = method.ensemble
    assert part is not None
    x = torch.cat((data().observations, data().actions), 1)
    for mine, all_members in zip(part.predict_all(x), whole.predict_all(x), strict=True):
        torch.testing.assert_close(mine, all_members[:2])
    errors = (whole.predict_all(x)[0][..., :OBS] - (data().next_observations - data().observations)).square()
    assert whole.holdout_mse is not None
    assert part.elites == [min((0, 1), key=whole.holdout_mse.__getitem__)]
    assert np.argsort(whole.holdout_mse)[-1] == int(errors.mean((1, 2)).argmax())  # errors belong to their members
    assert all(math.isfinite(v) for v in method.add_rollouts(run_jobs(method, 0))[0].values())


def test_parts_of_an_ensemble_share_its_stage_and_no_pack() -> None:
    from agents.method import common_settings

    parts = [config(dynamics=dataclasses.replace(DYNAMICS, use_members=n)) for n in (None, 1, 2)]
    stages = [MOPO.stages(part)["dynamics"] for part in parts]
    assert stages[0].settings == stages[1].settings == stages[2].settings
    assert len({str(common_settings(part)) for part in parts}) == 3


def test_parts_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"use_members=4 must lie in 1..ensemble_size=3"):
        dataclasses.replace(DYNAMICS, use_members=4)
    old = {k: v for k, v in artifacts()["dynamics"].items() if k != "holdout_mse"}
    part = config(dynamics=dataclasses.replace(DYNAMICS, use_members=2))
    with pytest.raises(UserError, match="which this stored ensemble lacks"):
        MOPO([part], [0], data(), {"dynamics": old})
    with pytest.raises(UserError, match=r"method\.dynamics\.use_members=1 must be at least 2: MOBILE"):
        MOBILEConfig(dynamics=DynamicsConfig(use_members=1))


# ---- tuned weights --------------------------------------------------------------------------------------------------


def test_a_tuned_weight_holds_the_mean_penalty_at_its_target() -> None:
    """From above and from below; one without a target stays."""
    weights = PenaltyWeights([10.0, 0.01, 3.0], [1.5, 1.5, None], [0.05, 0.05, 0.05])
    first = weights.values
    weights.step([0.5, 0.5, 0.5])
    # Adam's first step is the rate in the direction of the gradient: lambda u = 5 is too large, 0.005 too small
    assert weights.values == pytest.approx([10.0 * math.exp(-0.05), 0.01 * math.exp(0.05), 3.0], rel=1e-5)
    for _ in range(600):
        weights.step([0.5, 0.5, 0.5])
    assert weights.values == pytest.approx([3.0, 3.0, 3.0], rel=0.02)
    assert first[2] == weights.values[2] == 3.0


def test_a_rollout_without_rows_or_with_an_enormous_penalty_breaks_nothing() -> None:
    weights = PenaltyWeights([1.0, 1.0], [1.0, 1.0], [0.1, 0.1])
    weights.step([math.nan, 1e38])
    assert weights.values == pytest.approx([1.0, math.exp(-0.1)], rel=1e-5)


def test_a_tuned_run_reaches_its_target() -> None:
    """The policy hardly moves, so the mean penalty stays as it is."""
    target = 0.2
    tuned = config(penalty="ensemble_std", penalty_target=target, penalty_lr=0.2, penalty_coef=3.0)
    method, seen = learner([tuned], [1]), []
    for epoch in range(60):
        (metrics,) = method.add_rollouts(run_jobs(method, epoch))
        seen.append(metrics["rollout/penalty_coef"] * metrics["rollout/penalty_mean"])
    assert seen[0] > 2 * target
    assert np.mean(seen[-10:]) == pytest.approx(target, rel=0.1)


def test_the_weight_of_an_epoch_is_that_of_its_rollouts() -> None:
    tuned = config(penalty_target=1e-3, penalty_lr=0.5, penalty_coef=2.0)
    method = learner([tuned], [1])
    results = run_jobs(method, 0)
    (metrics,) = method.add_rollouts(results)
    assert metrics["rollout/penalty_coef"] == pytest.approx(2.0)
    (job,) = method.rollout_jobs(1)
    assert job.penalty_coef.tolist() == pytest.approx([2.0 * math.exp(-0.5)], rel=1e-5)


def test_a_selection_keeps_what_was_tuned() -> None:
    weights = PenaltyWeights([1.0, 1.0, 1.0], [0.5, None, 5.0], [0.1, 0.1, 0.1])
    for _ in range(3):
        weights.step([1.0, 1.0, 1.0])
    part = weights.select([2, 1])
    assert part.values == [weights.values[2], weights.values[1]]
    restored = PenaltyWeights([1.0, 1.0], [5.0, None], [0.1, 0.1])
    restored.load_state_dict(part.state_dict())
    for each in (weights, part, restored):
        each.step([1.0] * len(each.values))
    assert part.values == restored.values == [weights.values[2], weights.values[1]]
    assert weights.select([1]).state_dict() == {}
