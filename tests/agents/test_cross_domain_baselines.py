"""DARC, IW-Clip, H2O, symmetric sampling and BC-SAC on Pendulum: what they do with the rows, packs and resume."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from agents.bc_sac import BCSAC
from agents.classified import Classified
from agents.cross_domain import CrossDomain
from agents.darc import DARC
from agents.domain_classifiers import ClassifierConfig
from agents.domain_sac import DomainBatch
from agents.h2o import H2O
from agents.iw_clip import IWClip
from agents.method import TrainingData, load_method, method_settings
from agents.replay import transition_rows
from agents.symmetric_sampling import SymmetricSampling
from envs.errors import UserError
from tests.agents.domains import BOUND, SMALL, SOURCE, online_data, train, weights

SAMPLED: dict[str, Any] = {"darc": DARC, "iw_clip": IWClip}
RECORDED: dict[str, Any] = {"h2o": H2O, "symmetric_sampling": SymmetricSampling, "bc_sac": BCSAC}
METHODS = {**SAMPLED, **RECORDED}
WITH_CLASSIFIERS = ("darc", "iw_clip", "h2o")
OWN: dict[str, list[dict[str, Any]]] = {
    "darc": [{"delta_r_scale": 0.5}, {"delta_r_scale": 2.0}],
    "iw_clip": [{"critic_lr": 1e-3}, {"critic_lr": 1e-2}],
    "h2o": [{"cql_alpha": 0.1}, {"cql_alpha": 5.0}],
    "symmetric_sampling": [{"cql_alpha": 0.1}, {"cql_temperature": 2.0}],
    "bc_sac": [{"bc_coef": 0.5}, {"bc_coef": 5.0}],
}


def recorded(count: int = 60) -> TrainingData:
    draw = torch.Generator().manual_seed(0)
    obs, next_obs = (torch.randn((count, 3), generator=draw) for _ in range(2))
    action, reward = torch.rand((count, 1), generator=draw) * 2 - 1, torch.randn(count, generator=draw)
    bounds = (torch.from_numpy(-BOUND), torch.from_numpy(BOUND))
    return TrainingData(
        SOURCE, obs, action, reward, next_obs, torch.zeros(count), action_low=bounds[0], action_high=bounds[1]
    )


def config(name: str, **settings: Any) -> Any:
    own: dict[str, Any] = {**SMALL, **settings}
    if name in WITH_CLASSIFIERS:
        own.setdefault("classifiers", ClassifierConfig(hidden=[8], batch_size=8, train_every=3))
    if name in SAMPLED:
        own.setdefault("warm_up", 120)
    if name in ("h2o", "symmetric_sampling"):
        own.setdefault("num_actions", 2)
    return METHODS[name].Config(**own)


def made(name: str, members: Sequence[int] = (0, 1)) -> CrossDomain:
    configs = [config(name, **OWN[name][m]) for m in members]
    data = online_data() if name in SAMPLED else recorded()
    return METHODS[name](configs, [10 + m for m in members], data, {})


def everything(method: CrossDomain, member: int) -> Tensor:
    parts = [weights(method, member)]
    if isinstance(method, Classified):
        of_member = method.classifiers.select([member])
        parts += [of_member.sa.flat, of_member.sas.flat]
    return torch.cat(parts)


def plain(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_pack_goes_on_as_the_undisturbed_one(name: str) -> None:
    undisturbed, killed = made(name), made(name)
    metrics = train(undisturbed, 3)
    train(killed, 2)
    resumed = made(name)
    resumed.load_state_dict(copy.deepcopy(killed.state_dict()))
    [repeated] = train(resumed, 1, first=2)
    start = made(name)
    for m in range(2):
        assert torch.equal(everything(resumed, m), everything(undisturbed, m))
        assert not torch.allclose(everything(resumed, m), everything(start, m), atol=1e-3)
        assert plain(repeated[m]) == plain(metrics[2][m])


@pytest.mark.parametrize("name", METHODS)
def test_a_member_of_a_pack_learns_as_alone_and_goes_on_when_another_leaves(name: str) -> None:
    pack, alone = made(name), made(name, (1,))
    train(pack, 1)
    train(alone, 2)
    left = pack.select([1])
    train(left, 1, first=1)
    torch.testing.assert_close(everything(left, 0), everything(alone, 0), rtol=1e-3, atol=1e-4)


def noise(method: CrossDomain, size: int) -> Tensor:
    return torch.randn(method.num_noises, method.num_members, 2 * size, 1, generator=torch.Generator().manual_seed(1))


def rows(seed: int, size: int = 8, members: int = 2) -> Tensor:
    return torch.randn(members, size, 9, generator=torch.Generator().manual_seed(seed))


def seen_batches(method: CrossDomain, monkeypatch: pytest.MonkeyPatch) -> list[tuple[DomainBatch, Any]]:
    seen: list[tuple[DomainBatch, Any]] = []
    update = method.updater.update

    def note(batch: DomainBatch, noise_KMBA: Tensor, turn: int, with_metrics: bool, penalty: Any = None) -> Any:
        seen.append((batch, penalty))
        return update(batch, noise_KMBA, turn, with_metrics, penalty)

    monkeypatch.setattr(method.updater, "update", note)
    return seen


def test_darc_changes_rewards_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    method = cast(DARC, METHODS["darc"]([config("darc", **s, reward_scale=0.1) for s in OWN["darc"]], [0, 1],
                                        online_data(), {}))  # fmt: skip
    seen, source = seen_batches(method, monkeypatch), rows(2)
    for t in (119, 120):
        method.update(t, source, rows(3), noise(method, 8), True)
    delta_r = method.classifiers.log_ratio(source)
    before, after = (batch.rows_MBW for batch, _ in seen)
    torch.testing.assert_close(before[..., 4], 0.1 * source[..., 4])
    expected = source[..., 4] + torch.tensor([[0.5], [2.0]]) * delta_r
    torch.testing.assert_close(after[..., 4], 0.1 * expected)
    assert torch.equal(after[..., :4], source[..., :4])
    assert torch.equal(after[..., 5:], source[..., 5:])
    assert seen[1][0].num_source == after.shape[1] == 8  # no row of the target


def test_iw_clip_weights_source_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [config("iw_clip", min_weight=0.9, max_weight=1.0)] * 2
    method = cast(IWClip, METHODS["iw_clip"](settings, [0, 1], online_data(), {}))
    seen, source = seen_batches(method, monkeypatch), rows(2)
    for t in (119, 120):
        method.update(t, source, rows(3), noise(method, 8), True)
    torch.testing.assert_close(seen[0][0].weight_MB, torch.full((2, 8), 1 / 8))
    ratio = method.classifiers.log_ratio(source).exp()
    assert ratio.min() < 0.9 < 1.0 < ratio.max()
    torch.testing.assert_close(seen[1][0].weight_MB, ratio.clamp(0.9, 1.0) / 8)


@pytest.mark.parametrize("weighting", ["rows", "mean"])
def test_h2o_weights_errors_and_the_conservative_term(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [config("h2o", **s, penalty_weighting=weighting) for s in OWN["h2o"]]
    method = H2O(settings, [0, 1], recorded(), {})
    seen, source = seen_batches(method, monkeypatch), rows(2)
    method.update(0, source, rows(3), noise(method, 8), True)
    [(batch, penalty)] = seen
    ratio = method.classifiers.log_ratio(source).exp().clamp(1e-4, 10.0)
    torch.testing.assert_close(batch.weight_MB[:, :8], ratio / 8)
    torch.testing.assert_close(batch.weight_MB[:, 8:], torch.full((2, 8), 1 / 8))
    of_rows = ratio if weighting == "rows" else ratio.mean(1, keepdim=True).expand(2, 8)
    torch.testing.assert_close(penalty.weight_MB, torch.tensor([[0.1], [5.0]]) * of_rows / 8)


def test_darc_lowers_rewards_where_the_target_cannot_follow() -> None:
    """In the target nothing moves for s_0 > 0, so there the source's transitions, which do, are impossible."""
    data, draw = online_data(), torch.Generator().manual_seed(4)
    wide = ClassifierConfig(hidden=[32], batch_size=64, learning_rate=5e-3, input_noise=0.1)
    method = DARC([config("darc", classifiers=wide)], [0], data, {})

    def transitions(moves_everywhere: bool, count: int = 80) -> Tensor:
        s, a = torch.randn(count, 3, generator=draw), torch.rand(count, 1, generator=draw) * 2 - 1
        moves = torch.ones(count, 1) if moves_everywhere else (s[:, :1] <= 0).float()
        after = s + moves * (1.0 + 0.2 * torch.randn(count, 3, generator=draw))
        return transition_rows(s, a, torch.zeros(count), torch.zeros(count), after)

    for _ in range(5):
        method.source.add(0, transitions(True))
    method.target.add(0, transitions(False, 40))
    for t in range(200):
        method.classifiers.train(t, method.source, method.target)
    source = transitions(True, 400).unsqueeze(0)
    corrected, _ = method.corrected(1_000, source)
    blocked = source[0, :, 0] > 0.2
    free = source[0, :, 0] < -0.2
    assert float(corrected[0, blocked, 4].mean()) < -1.0
    assert float(corrected[0, blocked, 4].mean()) < float(corrected[0, free, 4].mean()) - 1.0


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("darc", {"updates_per_target_step": 0}, r"method\.updates_per_target_step=0"),
        ("darc", {"warm_up": -1}, r"method\.warm_up=-1"),
        ("darc", {"reward_scale": 0.0}, r"method\.reward_scale=0\.0"),
        ("iw_clip", {"min_weight": 0.0}, r"method\.min_weight=0\.0"),
        ("iw_clip", {"max_weight": 1e-5}, r"method\.max_weight=1e-05"),
        ("h2o", {"penalty_weighting": "row"}, r"method\.penalty_weighting='row'"),
        ("h2o", {"updates_per_target_step": 0}, r"method\.updates_per_target_step=0"),
        ("symmetric_sampling", {"num_actions": 0}, r"method\.num_actions=0"),
        ("bc_sac", {"bc_coef": 0.0}, r"method\.bc_coef=0\.0"),
        ("bc_sac", {"cloned_action": "median"}, r"method\.cloned_action='median'"),
    ],
)
def test_impossible_settings(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(name, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_settings_files_make_configs(name: str) -> None:
    assert load_method(name) is METHODS[name]
    dataset = "online/Pendulum-v1" if name in SAMPLED else "embedded/pendulum-medium-v0"
    _, small = method_settings(name, dataset, None)
    assert small["num_updates"] == 10_000
    variants = {"darc": ("paper", "google", "odrl"), "bc_sac": ("odrl",)}.get(name, ("paper", "odrl"))
    for variant in variants:
        _, values = method_settings(name, "online/HalfCheetah-v5" if name in SAMPLED else "hopper-medium-v2", variant)
        parts = {k: ClassifierConfig(**v) if k == "classifiers" else v for k, v in values.items()}
        assert METHODS[name].Config(**parts).num_updates == 1_000_000
