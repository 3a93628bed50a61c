"""Methods by name, and the settings of their papers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from agents.edac import EDACConfig
from agents.iql import IQLConfig
from agents.method import (
    TrainingData,
    load_method,
    method_names,
    method_settings,
    settings_file,
    variant_blocks,
)
from agents.mopo import MOPO, MOPOConfig
from agents.ravl import RAVL, RAVLConfig
from agents.td3_bc import TD3BCConfig
from envs import transforms
from envs.dataset import Dataset, Scaling
from envs.errors import UserError

# OfflineRL-Kit e3ce697, run_example/run_mopo.py, D4RL v2: rollout length, penalty coefficient
MOPO_OFFLINERLKIT = {
    "halfcheetah-medium-v2": (5, 0.5),
    "hopper-medium-v2": (5, 5.0),
    "walker2d-medium-v2": (5, 0.5),
    "halfcheetah-medium-replay-v2": (5, 0.5),
    "hopper-medium-replay-v2": (5, 2.5),
    "walker2d-medium-replay-v2": (1, 2.5),
    "halfcheetah-medium-expert-v2": (5, 2.5),
    "hopper-medium-expert-v2": (5, 5.0),
    "walker2d-medium-expert-v2": (1, 2.5),
}
# tianheyu927/mopo e5efe3e, examples/config/d4rl, D4RL v0
MOPO_OFFICIAL = {
    "halfcheetah-random-v0": (5, 0.5),
    "hopper-random-v0": (5, 1.0),
    "walker2d-random-v0": (1, 1.0),
    "halfcheetah-medium-v0": (1, 1.0),
    "hopper-medium-v0": (5, 5.0),
    "walker2d-medium-v0": (5, 5.0),
    "halfcheetah-medium-replay-v0": (5, 1.0),
    "hopper-medium-replay-v0": (5, 1.0),
    "walker2d-medium-replay-v0": (1, 1.0),
    "halfcheetah-medium-expert-v0": (5, 5.0),
    "hopper-medium-expert-v0": (5, 1.0),
    "walker2d-medium-expert-v0": (1, 2.0),
}
# critics N and eta: EDAC's CORL configs; rollout length and real ratio: yihaosun1124/mobile 4882dce, configs/gym
RAVL_EDAC_GRID = {
    "halfcheetah-medium-v2": (10, 1.0, 5, 0.05),
    "halfcheetah-medium-replay-v2": (10, 1.0, 5, 0.05),
    "halfcheetah-medium-expert-v2": (10, 5.0, 5, 0.5),
    "hopper-medium-v2": (50, 1.0, 5, 0.05),
    "hopper-medium-replay-v2": (50, 1.0, 5, 0.05),
    "hopper-medium-expert-v2": (50, 1.0, 5, 0.05),
    "walker2d-medium-v2": (10, 1.0, 5, 0.05),
    "walker2d-medium-replay-v2": (10, 1.0, 1, 0.05),
    "walker2d-medium-expert-v2": (10, 5.0, 1, 0.05),
    # without an EDAC config: N and eta of the released code
    "halfcheetah-random-v2": (10, 1.0, 5, 0.05),
    "hopper-random-v2": (10, 1.0, 5, 0.05),
    "walker2d-random-v2": (10, 1.0, 5, 0.05),
}

# CORL 6afec90, configs/offline/edac: critics N, eta
EDAC_CORL = {
    "halfcheetah-medium-v2": (10, 1.0),
    "halfcheetah-medium-replay-v2": (10, 1.0),
    "halfcheetah-medium-expert-v2": (10, 5.0),
    "hopper-medium-v2": (50, 1.0),
    "hopper-medium-replay-v2": (50, 1.0),
    "hopper-medium-expert-v2": (50, 1.0),
    "walker2d-medium-v2": (10, 1.0),
    "walker2d-medium-replay-v2": (10, 1.0),
    "walker2d-medium-expert-v2": (10, 5.0),
    "maze2d-umaze-v1": (10, 0.1),
    "pen-human-v1": (20, 1000.0),
    "pen-cloned-v1": (20, 10.0),
    "pen-expert-v1": (20, 10.0),
    "door-human-v1": (50, 200.0),
    "hammer-cloned-v1": (50, 200.0),
    "relocate-expert-v1": (50, 200.0),
}
# CORL 6afec90, configs/offline/sac_n: critics N
SAC_N_CORL = {
    "halfcheetah-medium-v2": 10,
    "halfcheetah-medium-replay-v2": 10,
    "halfcheetah-medium-expert-v2": 10,
    "hopper-medium-v2": 500,
    "hopper-medium-replay-v2": 200,
    "hopper-medium-expert-v2": 200,
    "walker2d-medium-v2": 20,
    "walker2d-medium-replay-v2": 20,
    "walker2d-medium-expert-v2": 20,
    "maze2d-large-v1": 25,
    "pen-human-v1": 100,
    "door-cloned-v1": 100,
}
# polixir/morec be8a641, generate_tmuxp_morec_mopo.py: penalty coefficient, selection, real ratio, fixed temperature
MOPO_MOREC = {
    "halfcheetah-random-v2": (0.5, "softmax", 0.05, None),
    "halfcheetah-medium-v2": (0.5, "argmax", 0.05, None),
    "halfcheetah-medium-replay-v2": (0.5, "softmax", 0.05, None),
    "halfcheetah-medium-expert-v2": (0.5, "argmax", 0.05, None),
    "hopper-random-v2": (10.0, "argmax", 0.05, None),
    "hopper-medium-v2": (15.0, "softmax", 0.05, None),
    "hopper-medium-replay-v2": (15.0, "softmax", 0.05, None),
    "hopper-medium-expert-v2": (15.0, "softmax", 0.05, None),
    "walker2d-random-v2": (1.0, "softmax", 0.05, None),
    "walker2d-medium-v2": (0.5, "softmax", 0.05, None),
    "walker2d-medium-replay-v2": (0.25, "argmax", 0.05, None),
    "walker2d-medium-expert-v2": (1.0, "softmax", 0.05, None),
    "neorl/HalfCheetah-v3-low-1000": (2.0, "argmax", 0.05, None),
    "neorl/HalfCheetah-v3-medium-1000": (2.0, "argmax", 0.05, None),
    "neorl/HalfCheetah-v3-high-1000": (2.0, "softmax", 0.05, None),
    "neorl/Hopper-v3-low-1000": (2.0, "argmax", 0.05, 0.1),
    "neorl/Hopper-v3-medium-1000": (20.0, "argmax", 0.5, None),
    "neorl/Hopper-v3-high-1000": (20.0, "argmax", 0.5, 0.2),
    "neorl/Walker2d-v3-low-1000": (2.0, "softmax", 0.05, None),
    "neorl/Walker2d-v3-medium-1000": (2.0, "softmax", 0.05, None),
    "neorl/Walker2d-v3-high-1000": (2.0, "argmax", 0.05, None),
}
# expectile, beta, observations standardised, rewards scaled, deterministic, tau
IQL_ORIGINAL = {  # ikostrikov/implicit_q_learning 09d7002, configs and train_offline.py
    "halfcheetah-medium-v2": (0.7, 3.0, False, "return-range", False, 0.005),
    "hopper-medium-expert-v2": (0.7, 3.0, False, "return-range", False, 0.005),
    "walker2d-random-v2": (0.7, 3.0, False, "return-range", False, 0.005),
    "pen-human-v1": (0.7, 0.5, False, "none", False, 0.005),
}
IQL_CORL = {  # CORL 6afec90, configs/offline/iql
    "halfcheetah-medium-v2": (0.7, 3.0, True, "none", False, 0.005),
    "hopper-medium-v2": (0.7, 3.0, True, "return-range", True, 0.001),
    "hopper-medium-replay-v2": (0.7, 3.0, True, "return-range", True, 0.001),
    "hopper-medium-expert-v2": (0.5, 6.0, True, "none", False, 0.005),
    "walker2d-medium-replay-v2": (0.7, 3.0, True, "none", False, 0.005),
    "maze2d-umaze-v1": (0.7, 3.0, True, "none", False, 0.005),
    "pen-cloned-v1": (0.8, 3.0, True, "none", False, 0.005),
}

# CORL 6afec90, configs/offline/cql: weight, learning rate of policy and temperature, lagrange, target gap, reward scale
CQL_CORL = {
    "halfcheetah-medium-v2": (10.0, 3e-5, False, -1.0, "none"),
    "hopper-medium-v2": (10.0, 3e-5, False, -1.0, "return-range"),
    "hopper-medium-replay-v2": (10.0, 3e-5, False, -1.0, "none"),
    "maze2d-large-dense-v1": (10.0, 3e-5, True, 5.0, "none"),
    "pen-human-v1": (1.0, 1e-4, False, -1.0, "none"),
    "relocate-expert-v1": (1.0, 1e-4, False, -1.0, "none"),
}
# CORL 6afec90, configs/offline/rebrac: weights of actor and critic, learning rates, batch size
REBRAC_CORL = {
    "halfcheetah-medium-v2": (0.001, 0.01, 1e-3, 1024),
    "halfcheetah-full-replay-v2": (0.001, 0.1, 1e-3, 1024),
    "hopper-medium-replay-v2": (0.05, 0.5, 1e-3, 1024),
    "hopper-medium-expert-v2": (0.1, 0.01, 1e-3, 1024),
    "walker2d-random-v2": (0.01, 0.0, 1e-3, 1024),
    "maze2d-umaze-v1": (0.003, 0.001, 3e-4, 256),
    "pen-cloned-v1": (0.05, 0.5, 3e-4, 256),
    "door-expert-v1": (0.05, 0.01, 3e-4, 256),
    "hammer-human-v1": (0.01, 0.5, 3e-4, 256),
}


# rollout length, penalty coefficient, fixed alpha (0: tuned), real ratio, entropy in the targets
MOBILE_KIT = {  # yihaosun1124/OfflineRL-Kit e3ce697, run_example/run_mobile.py
    "halfcheetah-random-v2": (5, 0.5, 0, 0.05, False),
    "hopper-random-v2": (5, 5.0, 0, 0.05, False),
    "walker2d-random-v2": (5, 2.0, 0, 0.05, False),
    "halfcheetah-medium-v2": (5, 0.5, 0, 0.05, False),
    "hopper-medium-v2": (5, 1.5, 0.2, 0.05, False),
    "walker2d-medium-v2": (5, 0.5, 0, 0.05, False),
    "halfcheetah-medium-replay-v2": (5, 0.1, 0, 0.05, False),
    "hopper-medium-replay-v2": (5, 0.1, 0, 0.05, False),
    "walker2d-medium-replay-v2": (1, 0.5, 0, 0.05, False),
    "halfcheetah-medium-expert-v2": (5, 2.0, 0, 0.05, False),
    "hopper-medium-expert-v2": (5, 1.5, 0, 0.05, False),
    "walker2d-medium-expert-v2": (1, 1.5, 0, 0.05, False),
}
MOBILE_NEORL = {  # yihaosun1124/mobile, configs/neorl, both commits; keys with a dash are not read
    "neorl/HalfCheetah-v3-low-1000": (5, 0.5, 0, 0.05, True),
    "neorl/HalfCheetah-v3-medium-1000": (5, 0.5, 0, 0.05, True),
    "neorl/HalfCheetah-v3-high-1000": (5, 1.5, 0, 0.05, True),
    "neorl/Hopper-v3-low-1000": (5, 2.5, 0, 0.05, True),
    "neorl/Hopper-v3-medium-1000": (5, 1.5, 0, 0.05, True),
    "neorl/Hopper-v3-high-1000": (5, 2.5, 0, 0.05, True),
    "neorl/Walker2d-v3-low-1000": (1, 2.5, 0, 0.05, True),
    "neorl/Walker2d-v3-medium-1000": (1, 2.5, 0, 0.05, True),
    "neorl/Walker2d-v3-high-1000": (1, 2.5, 0, 0.5, True),
}
MOBILE_2024 = {  # yihaosun1124/mobile 4882dce, configs/gym
    **MOBILE_KIT, **MOBILE_NEORL,
    "hopper-medium-replay-v2": (5, 0.1, 0.2, 0.05, False),
    "halfcheetah-medium-expert-v2": (5, 1.0, 0, 0.5, False),
}  # fmt: skip
MOBILE_2023 = {  # yihaosun1124/mobile 63ea424, configs/gym
    **MOBILE_NEORL,
    "halfcheetah-random-v2": (5, 0.5, 0, 0.05, True),
    "hopper-random-v2": (5, 5.0, 0, 0.05, False),
    "walker2d-random-v2": (5, 2.0, 0, 0.05, True),
    "halfcheetah-medium-v2": (5, 0.5, 0, 0.05, True),
    "hopper-medium-v2": (5, 1.5, 0.1, 0.05, True),
    "walker2d-medium-v2": (5, 1.0, 0, 0.05, True),
    "halfcheetah-medium-replay-v2": (5, 0.5, 0, 0.05, True),
    "hopper-medium-replay-v2": (5, 0.1, 0.1, 0.05, True),
    "walker2d-medium-replay-v2": (1, 0.5, 0, 0.05, True),
    "halfcheetah-medium-expert-v2": (5, 1.0, 0, 0.5, True),
    "hopper-medium-expert-v2": (5, 1.5, 0, 0.05, False),
    "walker2d-medium-expert-v2": (1, 1.5, 0, 0.05, True),
}


MOBILE_MOREC = {  # polixir/morec be8a641, generate_tmuxp_morec_mobile.py
    "halfcheetah-random-v2": (100, 0.25, 0, 0.05, True),
    "hopper-random-v2": (100, 7.5, 0, 0.05, False),
    "walker2d-random-v2": (100, 1.0, 0, 0.05, True),
    "halfcheetah-medium-v2": (100, 0.25, 0, 0.05, True),
    "hopper-medium-v2": (100, 1.5, 0, 0.05, True),
    "walker2d-medium-v2": (100, 0.75, 0, 0.05, True),
    "halfcheetah-medium-replay-v2": (100, 0.25, 0, 0.05, True),
    "hopper-medium-replay-v2": (100, 0.5, 0, 0.05, True),
    "walker2d-medium-replay-v2": (100, 0.1, 0, 0.05, True),
    "halfcheetah-medium-expert-v2": (100, 1.0, 0, 0.5, True),
    "hopper-medium-expert-v2": (100, 1.5, 0, 0.05, True),
    "walker2d-medium-expert-v2": (100, 0.25, 0, 0.05, True),
    "neorl/HalfCheetah-v3-low-1000": (100, 1.0, 0, 0.05, True),
    "neorl/HalfCheetah-v3-medium-1000": (100, 0.5, 0, 0.05, True),
    "neorl/HalfCheetah-v3-high-1000": (100, 0.75, 0, 0.05, True),
    "neorl/Hopper-v3-low-1000": (100, 0.5, 0, 0.05, True),
    "neorl/Hopper-v3-medium-1000": (100, 2.0, 0, 0.05, True),
    "neorl/Hopper-v3-high-1000": (100, 2.5, 0.1, 0.05, True),
    "neorl/Walker2d-v3-low-1000": (100, 0.75, 0, 0.05, True),
    "neorl/Walker2d-v3-medium-1000": (100, 0.25, 0, 0.05, True),
    "neorl/Walker2d-v3-high-1000": (100, 0.1, 0, 0.5, True),
}


def config(method: str, dataset: str, variant: str | None = None) -> Any:
    """The method's config with the file's settings, as a user gets it."""
    _, settings = method_settings(method, dataset, variant)
    cls = load_method(method).Config
    for name, block in settings.items():
        if isinstance(block, dict):
            settings[name] = dataclasses.replace(getattr(cls(), name), **block)
    return cls(**settings)


# ---- the settings of the papers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "table"), [("offlinerlkit", MOPO_OFFLINERLKIT), ("official", MOPO_OFFICIAL)])
def test_mopos_settings_per_dataset(variant: str, table: dict[str, tuple[int, float]]) -> None:
    for dataset, expected in table.items():
        c = config("mopo", dataset, variant)
        assert (c.rollout_length, c.penalty_coef) == expected, dataset


@pytest.mark.parametrize(
    ("variant", "table"),
    [("kit", MOBILE_KIT), ("2024", MOBILE_2024), ("2023", MOBILE_2023), ("morec", MOBILE_MOREC)],
)
def test_mobiles_settings_per_dataset(variant: str, table: dict[str, tuple[int, float, float, float, bool]]) -> None:
    for dataset, expected in table.items():
        c = config("mobile", dataset, variant)
        fixed = 0 if c.auto_alpha else c.alpha
        assert (c.rollout_length, c.penalty_coef, fixed, c.real_ratio, c.entropy_in_target) == expected, dataset
        assert (c.auto_alpha, c.alpha) in ((True, 1.0), (False, fixed))
        capped = 30 if variant == "kit" or dataset == "walker2d-medium-v2" else 2000
        assert c.dynamics.max_epochs == capped, dataset
        against = "target" if variant == "morec" else "online"
        assert (c.update_order, c.critic_loss, c.actor_critics) == ("critics-first", "mean", against)
        assert c.dynamics.filter == ("morec" if variant == "morec" else "none")
        if variant == "morec":
            assert (c.filter.num_discriminators, c.filter.selection, c.filter.cut) == (10, "softmax", "terminal")
            assert (c.rollout_batch, c.filter.clip) == (2000, 1e6 if dataset.startswith("neorl/") else 25.0), dataset


def test_morecs_settings_per_dataset() -> None:
    for dataset, (coef, selection, real_ratio, alpha) in MOPO_MOREC.items():
        c = config("mopo", dataset, "morec")
        assert (c.penalty_coef, c.filter.selection, c.real_ratio) == (coef, selection, real_ratio), dataset
        assert (c.alpha if not c.auto_alpha else None) == alpha, dataset
        assert c.filter.clip == (1e6 if dataset.startswith("neorl/") else 25.0), dataset
        assert (c.rollout_length, c.rollout_batch, c.dynamics.filter) == (100, 2000, "morec"), dataset
        shared = (c.filter.draws, c.filter.temperature, c.filter.threshold, c.filter.cut, c.filter.num_discriminators)
        assert shared == (2, 0.1, 0.6, "terminal", 40), dataset
    kit = config("mopo", "hopper-medium-v2")
    same = (
        "hidden",
        "actor_lr",
        "actor_lr_schedule",
        "critic_lr",
        "alpha_lr",
        "max_alpha",
        "num_updates",
        "batch_size",
    )
    assert [getattr(c, name) for name in same] == [getattr(kit, name) for name in same]
    assert dataclasses.replace(c.dynamics, filter="none") == kit.dynamics


def test_settings_of_the_model_free_methods_per_dataset() -> None:
    for dataset, expected in EDAC_CORL.items():
        edac = config("edac", dataset)
        assert (edac.num_critics, edac.eta) == expected, dataset
    for dataset, critics in SAC_N_CORL.items():
        sac_n = config("sac_n", dataset)
        assert (sac_n.num_critics, sac_n.eta) == (critics, 0.0), dataset
    for variant, table in (("original", IQL_ORIGINAL), ("corl", IQL_CORL)):
        for dataset, iql in table.items():
            c = config("iql", dataset, variant)
            mine = (c.expectile, c.beta, c.normalize_observations, c.reward_scale, c.deterministic, c.tau)
            assert mine == iql, (variant, dataset)


def test_settings_of_cql_rebrac_and_bc() -> None:
    for dataset, expected in CQL_CORL.items():
        c = config("cql", dataset)
        assert c.alpha_lr == c.actor_lr
        assert (c.cql_alpha, c.actor_lr, c.lagrange, c.target_action_gap, c.reward_scale) == expected, dataset
    for dataset, rebrac in REBRAC_CORL.items():
        c = config("rebrac", dataset)
        assert c.critic_lr == c.actor_lr
        assert (c.actor_bc_coef, c.critic_bc_coef, c.actor_lr, c.batch_size) == rebrac, dataset
    for method in ("cql", "rebrac"):
        assert dataclasses.asdict(load_method(method).Config()) == dataclasses.asdict(config(method, "other-v0"))
    assert [config("bc", "other-v0", v).top_fraction for v in ("corl", "corl-10")] == [1.0, 0.1]


def test_common_settings_of_the_model_free_methods() -> None:
    td3 = config("td3_bc", "hopper-medium-v2")  # sfujim/TD3_BC 8791ad7
    assert (td3.alpha, td3.policy_noise, td3.noise_clip, td3.policy_freq) == (2.5, 0.2, 0.5, 2)
    assert (td3.hidden, td3.actor_lr, td3.critic_lr, td3.num_updates) == ([256, 256], 3e-4, 3e-4, 1_000_000)
    assert td3.normalize_observations
    assert dataclasses.asdict(load_method("td3_bc").Config()) == dataclasses.asdict(td3)
    assert dataclasses.asdict(load_method("iql").Config()) == dataclasses.asdict(config("iql", "other-v0"))
    for method in ("td3_bc", "iql"):  # EmptyJackson/policy-guided-diffusion 9da606c
        c = config(method, "hopper-medium-v2", "pgd-code")
        assert (c.adam_eps, c.initialisation, c.normalize_observations) == (1e-5, "lecun", False)
        assert (c.actor_lr, c.critic_lr, c.gamma, c.tau, c.batch_size) == (3e-4, 3e-4, 0.99, 0.005, 256)
    for method in ("sac_n", "edac"):
        c = config(method, "halfcheetah-medium-v2")  # CORL 6afec90
        assert (c.hidden, c.gamma, c.tau, c.num_updates) == ([256, 256, 256], 0.99, 0.005, 3_000_000)
        assert (c.actor_lr, c.critic_lr, c.alpha_lr, c.batch_size) == (3e-4, 3e-4, 3e-4, 256)
        assert dataclasses.asdict(load_method(method).Config()) == dataclasses.asdict(c)


def test_mopos_common_settings() -> None:
    kit = config("mopo", "hopper-medium-v2")
    # OfflineRL-Kit: actor 1e-4 with a cosine, critics 3e-4, alpha 1e-4 bounded by 1, 3M steps, -dim(A)
    assert (kit.actor_lr, kit.critic_lr, kit.alpha_lr) == (1e-4, 3e-4, 1e-4)
    assert (kit.actor_lr_schedule, kit.max_alpha, kit.target_entropy) == ("cosine", 1.0, None)
    assert (kit.num_updates, kit.updates_per_epoch, kit.num_critics, kit.eta) == (3_000_000, 1000, 2, 0.0)
    assert (kit.rollout_batch, kit.rollout_epochs_retained, kit.real_ratio) == (50_000, 5, 0.05)
    assert (kit.dynamics.ensemble_size, kit.dynamics.num_elites, kit.dynamics.max_holdout) == (7, 5, 1000)
    assert kit.dynamics.hidden == [200] * 4
    # official code: 3e-4 everywhere, target entropy -3 everywhere, 1000 epochs
    official = config("mopo", "halfcheetah-medium-v0", "official")
    assert (official.actor_lr, official.critic_lr, official.alpha_lr) == (3e-4, 3e-4, 3e-4)
    assert (official.target_entropy, official.num_updates) == (-3.0, 1_000_000)
    assert (official.actor_lr_schedule, official.max_alpha) == ("constant", None)


@pytest.mark.parametrize("dataset", ["halfcheetah-medium-v2", "walker2d-medium-expert-v2", "hopper-random-v2"])
def test_ravls_released_code_has_one_setting(dataset: str) -> None:
    """anyasims/edge-of-reach 18b5085: TrainConfig's defaults; dynamics: train_dynamics_model.py."""
    variant, _ = method_settings("ravl", dataset, None)
    c = config("ravl", dataset)
    assert variant == "code"
    assert (c.num_critics, c.eta, c.rollout_length, c.real_ratio) == (10, 1.0, 5, 0.05)
    assert (c.actor_lr, c.critic_lr, c.alpha_lr, c.actor_lr_schedule) == (3e-4, 3e-4, 3e-4, "constant")
    assert (c.hidden, c.initialisation, c.gamma, c.tau, c.batch_size) == ([256] * 3, "edac", 0.99, 0.005, 256)
    assert (c.rollout_batch, c.rollout_epochs_retained) == (50_000, 5)
    assert (c.num_updates, c.updates_per_epoch, c.entropy_in_target) == (3_000_000, 1000, True)
    d = c.dynamics
    assert (d.ensemble_size, d.num_elites, d.hidden, d.learning_rate) == (7, 5, [200] * 4, 1e-3)
    assert (d.holdout_fraction, d.patience, d.min_epochs, d.max_epochs) == (0.2, 5, 350, 2000)
    assert (d.plateau_lr_factor, d.improvement, d.batch_size) == (0.3, 0.01, 256)
    assert d.weight_decay == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]


def test_ravls_starting_grid() -> None:
    for dataset, expected in RAVL_EDAC_GRID.items():
        c = config("ravl", dataset, "edac-grid")
        assert (c.num_critics, c.eta, c.rollout_length, c.real_ratio) == expected, dataset


def test_ravls_variants_differ_in_what_their_names_say() -> None:
    """Apart from it they are what they extend, embedded sets included."""
    for dataset in (
        "hopper-medium-v2",
        "walker2d-random-v2",
        "embedded/hopper-medium-v0",
        "embedded/pendulum-medium-v0",
    ):
        for base in ("code", "edac-grid"):
            c = config("ravl", dataset, base)
            patient, fan_in = config("ravl", dataset, f"{base}-patience"), config("ravl", dataset, f"{base}-fan-in")
            assert patient == dataclasses.replace(c, dynamics=dataclasses.replace(c.dynamics, min_epochs=0))
            scheme = c.initialisation if "pendulum" in dataset else "edac-fan-in"
            assert fan_in == dataclasses.replace(c, initialisation=scheme)
    assert config("ravl", "hopper-medium-v2").dynamics.min_epochs == 350
    assert config("ravl", "hopper-medium-v2", "edac-grid").dynamics.min_epochs == 350
    small = config("ravl", "embedded/hopper-medium-v0", "edac-grid-fan-in")
    assert (small.num_updates, small.dynamics.min_epochs) == (100_000, 0)


MADE_UP = """
default_variant: one
variants:
  one:
    "*": {eta: 1.0, gamma: 0.9, hidden: [8], dynamics: {patience: 5, max_epochs: 9, hidden: [7]}}
    "hopper-*": {eta: 2.0, dynamics: {patience: 6}}
    "hopper-medium-v2": {eta: 3.0, hidden: [9, 9]}
    "*-v0": {eta: 4.0}
  two:
    extends: one
    "walker2d-*": {eta: 5.0}
    "*": {gamma: 0.8, dynamics: {max_epochs: 8}}
  three: {extends: two, "hopper-*": {dynamics: {hidden: [6]}}}
  lost: {extends: onne, "*": {}}
  there: {extends: back}
  back: {extends: there}
"""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(MADE_UP)
    monkeypatch.setattr("agents.method.settings_file", lambda name: content)


@pytest.mark.usefixtures("made_up")
def test_later_blocks_go_over_earlier_ones_key_by_key() -> None:
    """What a block leaves out stays, inside `dynamics` too."""
    general = {"eta": 1.0, "gamma": 0.9, "hidden": [8], "dynamics": {"patience": 5, "max_epochs": 9, "hidden": [7]}}
    hopper = {**general, "eta": 2.0, "dynamics": {"patience": 6, "max_epochs": 9, "hidden": [7]}}
    assert method_settings("x", "walker2d-medium-v2", None) == ("one", general)
    assert method_settings("x", "hopper-expert-v2", None) == ("one", hopper)
    assert method_settings("x", "hopper-medium-v2", "one") == ("one", {**hopper, "eta": 3.0, "hidden": [9, 9]})
    assert method_settings("x", "hopper-medium-v0", None) == ("one", {**hopper, "eta": 4.0})
    assert method_settings("x", "Hopper-medium-v2", None) == ("one", general)  # names are case-sensitive


@pytest.mark.usefixtures("made_up")
def test_a_variant_goes_over_the_one_it_extends_block_by_block() -> None:
    """A block stays where the other variant has it; a new one comes last."""
    dynamics = {"patience": 5, "max_epochs": 8, "hidden": [7]}
    general = {"eta": 1.0, "gamma": 0.8, "hidden": [8], "dynamics": dynamics}
    assert method_settings("x", "ant-medium-v2", "two") == ("two", general)
    assert method_settings("x", "hopper-medium-v0", "two")[1]["eta"] == 4.0
    assert method_settings("x", "walker2d-medium-v0", "two")[1]["eta"] == 5.0
    hopper = {**general, "eta": 2.0, "dynamics": {"patience": 6, "max_epochs": 8, "hidden": [6]}}
    assert method_settings("x", "hopper-expert-v2", "three") == ("three", hopper)
    assert method_settings("x", "hopper-expert-v2", "one")[1]["dynamics"]["hidden"] == [7]  # as it was


@pytest.mark.usefixtures("made_up")
def test_what_a_variant_extends_has_to_exist() -> None:
    with pytest.raises(
        UserError, match=r"^agents/x\.yaml: lost extends 'onne', which is none of one, two, three, lost"
    ):
        method_settings("x", "hopper-medium-v2", "lost")
    with pytest.raises(UserError, match=r"^agents/x\.yaml: there extends back extends there: a variant cannot extend"):
        method_settings("x", "hopper-medium-v2", "there")


@pytest.mark.usefixtures("made_up")
def test_settings_are_the_callers_own() -> None:
    first = method_settings("x", "hopper-medium-v2", None)[1]
    first["dynamics"]["patience"] = 99
    first["dynamics"]["hidden"].append(99)
    first["hidden"].append(99)
    second = method_settings("x", "hopper-medium-v2", None)[1]
    assert second["hidden"] == [9, 9]
    assert second["dynamics"] == {"patience": 6, "max_epochs": 9, "hidden": [7]}


@pytest.mark.parametrize("method", method_names())
def test_every_key_of_every_block_is_a_field(method: str) -> None:
    content = settings_file(method)
    cls = load_method(method).Config
    fields = {f.name for f in dataclasses.fields(cls)}
    assert set(content) == {"default_variant", "variants"}
    assert content["default_variant"] in content["variants"]
    for variant in content["variants"]:
        blocks = variant_blocks(method, variant)
        assert "*" in blocks, variant
        for pattern, block in blocks.items():
            assert set(block) <= fields, (variant, pattern)
            for name, part in block.items():
                if isinstance(part, dict):
                    known = {f.name for f in dataclasses.fields(getattr(cls(), name))}
                    assert set(part) <= known, (variant, pattern, name)
            # every dataset of the block gets a config that passes its own checks
            config(method, pattern.replace("*", "x"), variant)


@pytest.mark.parametrize("method", method_names())
def test_values_have_their_fields_types(method: str) -> None:
    """1e-4 without a dot is text to YAML; a learning rate of type str would surface far from here."""

    def check(block: dict[str, Any], default: Any, where: str) -> None:
        types = {f.name: str(f.type) for f in dataclasses.fields(default)}
        for key, value in block.items():
            expected = getattr(default, key)
            if isinstance(value, dict):
                check(value, expected, f"{where}.{key}")
            elif value is None:
                assert "None" in types[key], f"{where}.{key} cannot be null"
            elif expected is not None:
                number = isinstance(expected, float) and isinstance(value, int | float)
                assert number or type(value) is type(expected), f"{where}.{key}={value!r}"
            else:
                assert isinstance(value, float), f"{where}.{key}={value!r}"

    for variant in settings_file(method)["variants"]:
        for pattern, block in variant_blocks(method, variant).items():
            check(block, load_method(method).Config(), f"{variant}[{pattern}]")


def test_an_unknown_variant_lists_the_known() -> None:
    with pytest.raises(
        UserError, match=r"^method ravl has no variant 'paper'; choose one of: code, code-patience, .*, edac-grid,"
    ):
        method_settings("ravl", "hopper-medium-v2", "paper")
    assert method_settings("mopo", "hopper-medium-v2", None)[0] == "offlinerlkit"
    assert method_settings("mopo", "hopper-medium-v2", "official")[0] == "official"


# ---- methods by name ------------------------------------------------------------------------------------------------


def test_methods_are_found_by_name() -> None:
    assert {"mopo", "ravl"} <= set(method_names())
    assert load_method("ravl") is RAVL
    assert load_method("mopo") is MOPO
    assert RAVL.Config is RAVLConfig
    assert MOPO.Config is MOPOConfig


def test_every_method_has_the_interface() -> None:
    interface = [
        "stages", "check_environment", "num_members", "rollout_jobs", "add_rollouts", "train_epoch",
        "policy", "select", "state_dict", "load_state_dict",
    ]  # fmt: skip
    for name in method_names():
        assert not [a for a in interface if not hasattr(load_method(name), a)], name
        assert dataclasses.is_dataclass(load_method(name).Config)


def test_an_unknown_method_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"^unknown method 'ravel'; did you mean 'ravl'\? \(known: .*mopo.*ravl.*\)$"):
        load_method("ravel")
    with pytest.raises(UserError, match="did you mean 'mopo'"):
        load_method("MOPO")


def test_fields_that_may_differ_in_a_pack_are_marked() -> None:
    def marked(cls: type) -> set[str]:
        return {f.name for f in dataclasses.fields(cls) if f.metadata.get("per_member")}

    assert marked(RAVLConfig) == {"eta", "actor_lr", "critic_lr", "alpha_lr"}
    tuned = {"penalty_coef", "penalty_target", "penalty_lr"}
    assert marked(MOPOConfig) == {"eta", "actor_lr", "critic_lr", "alpha_lr"} | tuned
    assert marked(EDACConfig) == {"eta", "actor_lr", "critic_lr", "alpha_lr"}
    assert marked(TD3BCConfig) == {"alpha", "policy_noise", "noise_clip", "actor_lr", "critic_lr"}
    assert marked(IQLConfig) == {"expectile", "beta", "actor_lr", "critic_lr", "value_lr"}


def test_defaults_of_a_config_are_its_papers_default() -> None:
    """A config made in a notebook, without the YAML, is the released RAVL apart from its ensemble's least epochs."""
    assert dataclasses.asdict(RAVLConfig())["num_critics"] == 10
    from_file = dataclasses.asdict(config("ravl", "halfcheetah-medium-v2"))
    from_file["dynamics"]["min_epochs"] = 0
    assert dataclasses.asdict(RAVLConfig()) == from_file


# ---- data -----------------------------------------------------------------------------------------------------------


def test_actions_are_mapped_from_the_environments_bounds() -> None:
    n = 5
    raw = np.linspace([-2.0, 0.0], [2.0, 10.0], n).astype(np.float32)
    dataset = Dataset(
        name="made-up", env_id="Pendulum-v1", observations=np.ones((n, 3), np.float32), actions=raw,
        rewards=np.arange(n, dtype=np.float32), next_observations=np.zeros((n, 3), np.float32),
        terminals=np.array([0, 0, 1, 0, 0], bool), timeouts=np.array([0, 0, 0, 0, 1], bool), provenance={},
    )  # fmt: skip
    data = TrainingData.from_dataset(dataset, np.array([-2.0, 0.0]), np.array([2.0, 10.0]))
    torch.testing.assert_close(data.actions, torch.linspace(-1, 1, n).unsqueeze(1).expand(-1, 2))
    assert data.terminals.tolist() == [0, 0, 1, 0, 0]  # a time limit is no terminal
    assert data.rewards.tolist() == [0, 1, 2, 3, 4]
    assert (data.observation_dim, data.action_dim, data.env_id) == (3, 2, "Pendulum-v1")
    assert {t.dtype for t in (data.observations, data.actions, data.rewards, data.terminals)} == {torch.float32}
    assert float(data.observations.sum() + data.next_observations.sum()) == 15.0


def test_states_are_shared_with_the_dataset_and_stay_what_they_are(recwarn: pytest.WarningsRecorder) -> None:
    states = np.random.default_rng(0).normal(size=(5, 3))
    states.flags.writeable = False  # as mapped from a file
    dataset = dataclasses.replace(episodes([1.0, 2.0, 3.0, 4.0, 5.0]), states=states)
    data = TrainingData.from_dataset(dataset, -np.ones(1), np.ones(1)).standardised().with_return_range(1000.0)
    assert data.states is not None
    assert data.states.dtype == torch.float64
    assert data.states.data_ptr() == states.ctypes.data
    assert data.states.tolist() == states.tolist()
    assert not recwarn.list
    plain = dataclasses.replace(dataset, states=None)
    assert TrainingData.from_dataset(plain, -np.ones(1), np.ones(1)).states is None


def test_standardised_observations_bring_their_units() -> None:
    ones, none = np.ones((4, 2), np.float32), np.zeros(4, bool)
    scaling = Scaling(np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32))
    dataset = Dataset("made-up", "Hopper-v4", ones, ones, ones[:, 0], ones, none, none, scaling=scaling)
    data = TrainingData.from_dataset(dataset, -np.ones(2), np.ones(2))
    assert data.termination.mean is not None
    assert data.termination.std is not None
    assert data.termination.mean.tolist() == [1, 2]
    assert data.termination.std.tolist() == [3, 4]


def episodes(rewards: list[float]) -> Dataset:
    """Two episodes of two steps, and one that the end of the file cuts."""
    n = len(rewards)
    obs = np.random.default_rng(0).normal([0.0, 3.0], [1.0, 5.0], (n, 2)).astype(np.float32)
    ends = np.array([False, True, False, True, False])
    none = np.zeros((n, 1), np.float32)
    return Dataset("made-up", "Pendulum-v1", obs, none, np.array(rewards, np.float32), obs + 1, none[:, 0] > 0, ends)


def test_data_are_standardised_as_the_dataset_option_does() -> None:
    plain = episodes([1.0, 2.0, 3.0, 4.0, 50.0])
    named = transforms.apply(transforms.parse("made-up,normalize=observations"), [plain])
    low, high = -np.ones(1), np.ones(1)
    mine, other = TrainingData.from_dataset(plain, low, high), TrainingData.from_dataset(named, low, high)
    assert mine.observation_mean is None
    again = mine.standardised()
    for name in ("observations", "next_observations", "observation_mean", "observation_std"):
        torch.testing.assert_close(getattr(again, name), getattr(other, name))
    assert other.standardised() is other


def test_rewards_are_scaled_to_a_range_of_returns_once() -> None:
    """Returns of the complete episodes are 3 and 7; a dataset scaled already stays as it is."""
    plain = episodes([1.0, 2.0, 3.0, 4.0, 50.0])
    named = transforms.apply(transforms.parse("made-up,reward_scale=return-range"), [plain])
    for dataset in (plain, named):
        data = TrainingData.from_dataset(dataset, -np.ones(1), np.ones(1)).with_return_range(1000.0)
        torch.testing.assert_close(data.rewards, 250 * torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0]))
    alike = TrainingData.from_dataset(episodes([1.0, 2.0, 1.0, 2.0, 50.0]), -np.ones(1), np.ones(1))
    with pytest.raises(UserError, match="return-range needs a dataset with two complete episodes of different"):
        alike.with_return_range(1000.0)


def test_settings_are_plain_yaml() -> None:
    """They go into a run's stored config and back."""
    settings = method_settings("ravl", "embedded/pendulum-medium-v0", None)[1]
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings
