"""A pack goes on with other settings, and with other members' states: made anew from its own state, as schedules and
populations do it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from agents.dynamics import train_ensemble
from agents.method import TrainingData, changeable_settings, load_method
from agents.vgdf import VGDF, VGDFConfig
from tests.agents import test_cross_domain_baselines as cross_domain
from tests.agents import test_model_based as model_based
from tests.agents import test_model_free as model_free
from tests.agents import test_synthetic as synthetic
from tests.agents import test_vgdf as vgdf
from tests.agents.domains import online_data

SEED = 7
NAMES = (
    *(f"model-free {name}" for name in model_free.METHODS),
    *(f"model-based {name}" for name in ("ravl", "mopo", "mobile")),
    *(f"cross-domain {name}" for name in cross_domain.METHODS),
    "vgdf ahead",
    "pools ahead",
)
# settings that nothing depends on as they are combined in these packs
IDLE = {
    **{f"cross-domain {name}": {"alpha_lr"} for name in cross_domain.METHODS},
    "vgdf ahead": {"alpha_lr"},
    "model-free cql": {"target_action_gap"},
}


def configs_of(name: str) -> list[Any]:
    """Configurations of three members that differ."""
    kind, _, method = name.partition(" ")
    if kind == "model-free":
        configs = model_free.METHODS[method][1]
        return [*configs[:2], configs[3 if configs[2] == configs[0] else 2]]
    if kind == "model-based":
        return [model_based.PACKS[method][m] for m in (0, 2, 3)]
    if kind == "vgdf":  # with steps under way
        settings = {**vgdf.GATED, "start_gate": 149, "asynchronous": True, "collect_every": 10}
        return [VGDFConfig(**settings, critic_lr=rate) for rate in (3e-4, 1e-3, 3e-3)]
    if kind == "pools":  # with a pool asked for
        base = synthetic.configured(synchronous=False)
        return [replace(base, critic_lr=rate) for rate in (3e-4, 1e-3, 3e-3)]
    own = [{}, *cross_domain.OWN[method]]
    return [cross_domain.config(method, **settings) for settings in own]


def made(name: str, configs: Sequence[Any]) -> Any:
    kind, _, method = name.partition(" ")
    seeds = [SEED] * len(configs)
    if kind == "model-free":
        return model_free.METHODS[method][0](configs, seeds, model_free.data(), {})
    if kind == "model-based":
        return model_based.learner(configs, seeds)
    if kind == "vgdf":
        return VGDF(configs, seeds, online_data(), {})
    if kind == "pools":
        return synthetic.make(configs, seeds, *pools())
    data = online_data() if method in cross_domain.SAMPLED else cross_domain.recorded()
    return cross_domain.METHODS[method](configs, seeds, data, {})


@functools.cache
def pools() -> tuple[TrainingData, dict[str, Any]]:
    """Data for pools, and the ensemble that they are rolled out in."""
    bound = np.full(1, 2.0, np.float32)
    data = TrainingData.from_dataset(synthetic.dataset(), -bound, bound)
    columns = data.observations, data.actions, data.rewards, data.next_observations
    return data, {"dynamics": train_ensemble(*columns, synthetic.ENSEMBLE).state_dict()}


def train(method: Any, part: int) -> Any:
    """The epochs before a change or after it; pools are taken in with every second one."""
    epochs = ((0, 1, 2), (3, 4)) if getattr(method, "pools", None) else ((0,), (1,))
    for epoch in epochs[part]:
        synthetic.step(method, epoch)
    return method


def gone_on(name: str, method: Any, members: Sequence[int], configs: Sequence[Any]) -> Any:
    """The pack made anew from the states of some members."""
    other = made(name, configs)
    other.load_state_dict(copy.deepcopy(method.select(members).state_dict()))
    return other


def everything(method: Any, member: int) -> list[torch.Tensor]:
    """The numbers of a member's state."""

    def numbers(tree: Any) -> list[torch.Tensor]:
        if isinstance(tree, dict):
            return [x for key in sorted(tree) for x in numbers(tree[key])]
        if isinstance(tree, list | tuple):
            return [x for item in tree for x in numbers(item)]
        return [torch.as_tensor(tree, dtype=torch.float64)] if not isinstance(tree, str | None) else []

    return numbers(method.select([member]).state_dict())


def assert_close(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_member_takes_over_all_that_another_has_learned(name: str) -> None:
    """With the other's settings it then learns what the other does: nothing of its own is left."""
    configs = configs_of(name)
    pack = train(made(name, configs), 0)
    before = [everything(pack, m) for m in range(3)]
    new = gone_on(name, pack, [2, 1, 2], [configs[m] for m in (2, 1, 2)])
    for member, source in enumerate([2, 1, 2]):
        assert all(torch.equal(a, b) for a, b in zip(everything(new, member), before[source], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before[0], before[2], strict=True))
    train(new, 1)
    train(pack, 1)
    assert_close(everything(new, 0), everything(pack, 2))
    assert_close(everything(new, 1), everything(pack, 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_can_change_counts_from_the_change_on(name: str) -> None:
    config = configs_of(name)[1]
    start = train(made(name, [config]), 0)
    as_before = everything(train(gone_on(name, start, [0], [config]), 1), 0)
    straight = everything(train(train(made(name, [config]), 0), 1), 0)
    assert all(torch.equal(a, b) for a, b in zip(as_before, straight, strict=True))
    idle = set()
    names = changeable_settings(config)
    assert "actor_lr" in names
    for setting in names:
        value = functools.reduce(getattr, setting.split("."), config)
        if value == 0 and setting == "eta":  # what is off stays off
            continue
        other = changed(config, setting.split("."), 0.3 * value if value else 0.5)
        after = everything(train(gone_on(name, start, [0], [other]), 1), 0)
        if all(torch.equal(a, b) for a, b in zip(as_before, after, strict=True)):
            idle.add(setting)
    assert idle == IDLE.get(name, set())


def changed(config: Any, names: Sequence[str], value: float) -> Any:
    first, *others = names
    part = getattr(config, first)
    return replace(config, **{first: changed(part, others, value) if is_dataclass(part) else value})


def test_what_a_run_begins_with_cannot_change() -> None:
    """A temperature that is learned is part of what a member has learned, a fixed one is a setting."""
    config = load_method("vgdf").Config(target="offsweep/Pendulum-gravity-0.5-v1")
    assert "alpha" in changeable_settings(replace(config, auto_alpha=False))
    assert "alpha" not in changeable_settings(replace(config, auto_alpha=True))
    assert "guidance.coef" not in changeable_settings(load_method("td3_bc").Config())
