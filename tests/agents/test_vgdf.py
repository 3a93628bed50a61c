"""VGDF's methods: what the gate lets through on a toy, when it shuts, resume, packs, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.cross_domain import joined
from agents.domain_classifiers import ClassifierConfig
from agents.domain_sac import DomainSAC, DomainSACHyperparameters, DomainSACSettings
from agents.method import TrainingData, load_method, method_settings
from agents.target_dynamics import TargetDynamics, TargetDynamicsConfig
from agents.value_proximity import ValueGate
from agents.vgdf import VGDF, VGDFConfig
from agents.vgdf_bc import VGDFBC, VGDFBCConfig
from envs.errors import UserError
from envs.termination import never_done
from tests.agents.domains import SMALL, online_data, train, weights

DYNAMICS = TargetDynamicsConfig(
    ensemble_size=3, hidden=[16], weight_decay=[0.0, 0.0], batch_size=16, schedule="fixed-steps", steps=5,
    refit_every=50,
)  # fmt: skip
GATED: dict[str, Any] = {**SMALL, "start_gate": 249, "dynamics": DYNAMICS, "actor_every": 2}


def recorded(rows: int = 60) -> TrainingData:
    g, online = torch.Generator().manual_seed(3), online_data()
    obs, next_obs = (torch.randn(rows, 3, generator=g) for _ in range(2))
    action, reward = obs[:, :1].tanh(), torch.randn(rows, generator=g)
    return TrainingData(
        online.env_id, obs, action, reward, next_obs, torch.zeros(rows), None, None, None, 1.0, 0.0,
        online.action_low, online.action_high, None, torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip


def vgdf(seeds: tuple[int, ...] = (0,), **settings: Any) -> VGDF:
    return VGDF([VGDFConfig(**{**GATED, **settings})] * len(seeds), seeds, online_data(), {})


def vgdf_bc(seeds: tuple[int, ...] = (0,), **settings: Any) -> VGDFBC:
    return VGDFBC([VGDFBCConfig(**{**GATED, **settings})] * len(seeds), seeds, recorded(), {})


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_gate_shuts_behind_its_iteration_and_metrics_say_so(form: str):
    method = vgdf(proximity=form)
    before, after = (train(method, 1, epoch)[0][0] for epoch in (1, 2))
    assert not any("gate" in name for name in before)
    assert after["train/gate/accepted"] == 0.25
    assert {"train/gate/log_density", "train/gate/value_gap", "train/gate/fictitious_std"} < set(after)
    assert after["dynamics/gradient_steps"] == 5.0


def test_without_a_filter_there_is_no_ensemble():
    method = vgdf(filter="none")
    assert method.parts == {}
    assert "train/critic_loss" in train(method, 1)[0][0]
    assert method.shared.idle_setting("dynamics.refit_every") is not None
    assert vgdf().shared.idle_setting("dynamics.refit_every") is None


@pytest.mark.parametrize("name", ["classifiers", "value"])
def test_the_papers_other_filters_keep_as_many_rows(name: str):
    method = vgdf(filter=name, classifiers=ClassifierConfig(hidden=[8], batch_size=8))
    before, after = (train(method, 1, epoch)[0][0] for epoch in (1, 2))
    assert list(method.parts) == (["classifiers"] if name == "classifiers" else [])
    assert "train/gate/score" in after
    assert "train/gate/score" not in before
    assert ("train/sas_classifier_loss" in after) == (name == "classifiers")
    assert method.shared.idle_setting("dynamics.refit_every") is not None
    assert method.shared.idle_setting("keep_fraction") is None


@pytest.mark.parametrize("make", [vgdf, vgdf_bc])
def test_a_member_learns_the_same_alone_and_in_a_pack(make: Any):
    pack, alone = make((0, 5), proximity="paper"), make((5,), proximity="paper")
    train(pack, 2)
    kept = pack.select([1])
    train(kept, 2, 2)
    train(alone, 4)
    torch.testing.assert_close(weights(kept), weights(alone), rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("make", [vgdf, vgdf_bc])
def test_a_resumed_run_goes_on_as_the_undisturbed_one(make: Any):
    method, other = make(), make()
    train(method, 3)
    state = copy.deepcopy(method.state_dict())
    metrics = train(method, 1, 3)[0][0]
    other.load_state_dict(state)
    again = train(other, 1, 3)[0][0]
    assert torch.equal(weights(method), weights(other))
    learned = [name for name in metrics if name.startswith(("train/", "dynamics/"))]
    assert {name: metrics[name] for name in learned} == {name: again[name] for name in learned}
    assert "train/gate/accepted" in learned


def test_cloning_draws_the_policy_to_the_sources_actions():
    distance = []
    for coef in (0.0, 1000.0):
        method = vgdf_bc(coef=coef, filter="none", actor_lr=1e-2)
        data = method.data
        train(method, 4)
        action = method.updater.sample_actions(data.observations.unsqueeze(0), None)[0]
        distance.append(float((action - data.actions).square().mean()))
    assert distance[0] < 0.2 * distance[1]
    assert vgdf_bc().updater.source_actor is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_fraction": 1.0}, "method.filter=none"), ({"gate": "top"}, "method.gate"),
        ({"proximity": "text"}, "method.proximity"), ({"updates_per_target_step": 0}, "must be greater than 0"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        VGDFConfig(**{**GATED, **settings})


def test_one_network_has_no_spread():
    with pytest.raises(UserError, match=r"ensemble_size=1 must be 2 or more"):
        TargetDynamicsConfig(ensemble_size=1)


@pytest.mark.parametrize("name", ["vgdf", "vgdf_bc"])
@pytest.mark.parametrize("dataset", ["online/offsweep/Hopper-v5", "hopper-medium-v2", "online/Pendulum-v1"])
def test_every_block_of_settings_is_a_config(name: str, dataset: str):
    for variant in ("code", "paper") + (("mix",) if name == "vgdf" else ()):
        _, block = method_settings(name, dataset, variant)
        dynamics = TargetDynamicsConfig(**block.pop("dynamics"))
        config = load_method(name).Config(target="Pendulum-v1", dynamics=dynamics, **block)
        assert (config.filter == "none") == (variant == "mix")
    if name == "vgdf_bc" and dataset == "hopper-medium-v2":
        assert [method_settings(name, dataset, v)[1]["coef"] for v in ("code", "paper")] == [10.0, 5.0]


# ---- a toy in which half of the source's rows lead elsewhere ---------------------------------------------------------
# States on a line, s' = s + a/2 in the target; in the source the same where s < 0, and s' = s + a/2 - 4 where s > 0.
# Rewards are s', so values tell the states apart.


def toy_rows(count: int, shifted: bool, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    s, a = torch.rand(count, 1, generator=g) * 2 - 1, torch.rand(count, 1, generator=g) * 2 - 1
    next_s = s + a / 2 - (4.0 * (s > 0) if shifted else 0.0)
    return torch.cat((s, a, next_s, torch.zeros_like(s), next_s), 1)


def toy_learner() -> DomainSAC:
    settings = DomainSACSettings(hidden=(32, 32), gamma=0.5, tau=0.05, initialisation="vgdf")
    return DomainSAC([0], [DomainSACHyperparameters(1e-3, 3e-3, alpha=0.0)], settings, 1, 1)


def toy_run(filtered: bool, updates: int = 300) -> tuple[float, float]:
    """Share of accepted rows that the domains agree in, and the critics' error in rows that they do not."""
    source, target = toy_rows(2000, True, 0), toy_rows(400, False, 1)
    config = TargetDynamicsConfig(
        ensemble_size=5, hidden=[32, 32], weight_decay=[0.0] * 3, schedule="fixed-steps", steps=400,
        learning_rate=3e-3, batch_size=64,
    )  # fmt: skip
    dynamics, sac = TargetDynamics(config, [0], 1, 1), toy_learner()
    dynamics.refit([target], 0)
    gate = ValueGate("code", "topk", 0.25, "batch", never_done)
    g, agreeing = torch.Generator().manual_seed(2), []
    for _ in range(updates):
        pick = [rows[torch.randint(len(rows), (64,), generator=g)].unsqueeze(0) for rows in (source, target)]
        batch, noise = joined(*pick), torch.randn(2, 1, 128, 1, generator=g)
        targets = sac.targets(batch.rows_MBW, noise[0])
        if filtered:
            batch, _ = gate(sac, dynamics.predict, batch, targets, noise, False)
            passed = batch.weight_MB[0, :64] > 0
            agreeing.append((batch.rows_MBW[0, :64, 0][passed] < 0).float().mean())
        sac.update(batch, noise, 0, False, None, None, targets)
    elsewhere = toy_rows(500, False, 9)
    elsewhere = elsewhere[elsewhere[:, 0] > 0].unsqueeze(0)
    truth = sac.targets(elsewhere, torch.zeros(1, elsewhere.shape[1], 1)).target_MB
    error = (sac.critic.values(elsewhere[..., :2]).mean(1) - truth).abs().mean()
    return float(torch.stack(agreeing[-100:]).mean()) if filtered else 0.0, float(error)


def test_the_gate_keeps_what_the_domains_agree_in_and_the_critics_are_the_better_for_it():
    agreeing, filtered = toy_run(True)
    _, mixed = toy_run(False)
    assert agreeing > 0.95
    assert filtered < 0.5 * mixed
