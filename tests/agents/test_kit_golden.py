"""MOPO's and MOBILE's updates held against numbers of OfflineRL-Kit's and MOREC's own code.

`golden/kit.npz` holds what yihaosun1124/OfflineRL-Kit at commit e3ce697 (cases mopo, mobile) and polixir/morec at
be8a641 (case morec) compute (torch 2.13, CPU, float32) for the inputs that `case_inputs` draws with
`numpy.random.RandomState`, whose streams are fixed for good. To repeat it, for every case:

- `MOPOPolicy` (mopo) or `MOBILEPolicy` with `EnsembleDynamics` (mobile, morec; MOREC's policy on OfflineRL-Kit's
  dynamics, whose draws differ from MOREC's only in how many are made by one call), `ActorProb`, `TanhDiagGaussian`
  (unbounded, conditioned_sigma), `Critic` and `EnsembleDynamicsModel` of the widths below, parameters set to those
  drawn here (the old critics', too; the actor's last layer is `mu`, then `sigma`), the scaler's `mu` and `std`
  likewise; learning rates 3e-4, target entropy -3; `learn` on the three batches;
- `Normal.rsample` replaced by mean + standard deviation * noise and `torch.randn_like` by noise, in the order of the
  calls: in MOBILE the next states (draw after draw, elites first), their actions, then a~' and a~. Where OfflineRL-Kit
  draws for rows of the dataset, whose penalty it sets to 0, the noise is 0; so is that of the predicted rewards.

Kept are the losses of every update (actor; critics: their sum in MOPO, their mean in MOBILE; temperature), the
gradients of the first as they were before their optimiser's step, and the parameters after the third. Tolerances are
relative to a tensor's largest entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.dynamics import Ensemble
from agents.mobile import BellmanInconsistency
from agents.sac import SAC, SACHyperparameters, SACSettings
from tests.agents.golden_values import Array, Layers, close, drawn_layers, fill

GOLDEN = Path(__file__).parent / "golden" / "kit.npz"
OBS, ACT, WIDTH, UPDATES = 11, 3, 16, 3  # S and A are Hopper's
REAL, MODEL = 8, 24
BATCH = REAL + MODEL
ELITES, DRAWS, COEF = [2, 0, 3], 10, 1.5
CASES = {  # settings beside those that all of them share
    "mopo": {"critic_loss": "sum", "entropy_in_target": True},
    "mobile": {"critic_loss": "mean", "entropy_in_target": False, "target_floor": 0.0},
    "morec": {"critic_loss": "mean", "entropy_in_target": True, "target_floor": 0.0, "actor_critics": "target"},
}


@dataclass
class Inputs:
    actor: Layers
    critic: Layers  # leading axis 2
    target: Layers
    models: Layers  # leading axis 4; the last layer's outputs are mean, then log-variance, of s' - s and r
    max_logvar: Array  # (S + 1,)
    min_logvar: Array
    mean: Array  # (S + A,) of the models' inputs
    std: Array
    rows: Array  # (U, B, 2 S + A + 2): s, a, r, d, s'; the first REAL are the dataset's
    noise: Array  # (U, 2, B, A): for a~ and for a~'
    state_noise: Array  # (U, K, D, MODEL, S)
    action_noise: Array  # (U, K, D, MODEL, A)


def case_inputs(case: str) -> Inputs:
    """Parameters and batches of a case; the seed is 11 for mopo, 12 for mobile, 13 for morec."""
    rng = np.random.RandomState(11 + list(CASES).index(case))
    actor = drawn_layers(rng, (), (OBS, WIDTH, WIDTH, 2 * ACT), 16.0)  # log standard deviations beyond their bounds,
    actor[-1][..., -1] -= 3.0
    actor[-2][:, :ACT] *= 0.05  # but actions not so close to 1 that log(1 - a^2) is all rounding
    critic = drawn_layers(rng, (2,), (OBS + ACT, WIDTH, WIDTH, 1), 4.0)
    critic[-2] -= critic[-2].mean(1, keepdims=True)  # so that neither is the smaller everywhere
    target = [layer + 0.02 * rng.standard_normal(layer.shape).astype(np.float32) for layer in critic]
    models = drawn_layers(rng, (4,), (OBS + ACT, *[WIDTH] * 4, 2 * (OBS + 1)), 3.0)
    bounds = [rng.uniform(*low_high, OBS + 1) for low_high in ((0.2, 0.8), (-3.0, -2.0))]
    moments = rng.normal(0.0, 0.3, OBS + ACT), rng.uniform(0.5, 1.5, OBS + ACT)
    obs, next_obs = (rng.standard_normal((UPDATES, BATCH, OBS)) for _ in range(2))
    action, reward = np.tanh(rng.standard_normal((UPDATES, BATCH, ACT))), rng.standard_normal((UPDATES, BATCH, 1))
    done = rng.uniform(size=(UPDATES, BATCH, 1)) < 0.2
    rows = np.concatenate((obs, action, reward + 0.5, done, next_obs), -1)
    noise = 0.25 * rng.standard_normal((UPDATES, 2, BATCH, ACT))
    own = (rng.standard_normal((UPDATES, len(ELITES), DRAWS, MODEL, n)) for n in (OBS, ACT))
    arrays = (x.astype(np.float32) for x in (*bounds, *moments, rows, noise, *own))
    return Inputs(actor, critic, target, models, *arrays)


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Array]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


def learner(case: str, **changes: Any) -> tuple[SAC, Inputs]:
    inputs = case_inputs(case)
    tensors = {name: torch.from_numpy(getattr(inputs, name)) for name in ("max_logvar", "min_logvar", "mean", "std")}
    for i, layer in enumerate(inputs.models):
        tensors[f"{'Wb'[i % 2]}{i // 2}"] = torch.from_numpy(layer)
    hook = BellmanInconsistency(Ensemble(tensors, ELITES, OBS), [COEF], DRAWS, MODEL, ACT) if case != "mopo" else None
    settings: dict[str, Any] = {"update_order": "critics-first", "max_alpha": 1.0, **CASES[case], **changes}
    hidden = (WIDTH, WIDTH)
    fixed = SACSettings(2, hidden, hidden, **settings)
    sac = SAC([0], [SACHyperparameters()], fixed, OBS, ACT, hook=hook)
    for network, layers in ((sac.actor, inputs.actor), (sac.critic, inputs.critic), (sac.target, inputs.target)):
        fill(network, layers)
    return sac, inputs


def own_noise(inputs: Inputs, update: int) -> torch.Tensor:
    parts = inputs.state_noise[update], inputs.action_noise[update]
    return torch.cat([torch.from_numpy(part).reshape(1, -1) for part in parts], 1)


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_authors_update(case: str, golden: Mapping[str, Array]) -> None:
    """Losses, gradients and the parameters after three updates to 1e-5."""
    sac, inputs = learner(case)
    for u in range(UPDATES):
        log_alpha = float(sac.log_alpha.flat)
        rows, noise = torch.from_numpy(inputs.rows[u]).unsqueeze(0), torch.from_numpy(inputs.noise[u]).unsqueeze(1)
        metrics = sac.update(rows, noise, 0, True, None if case == "mopo" else own_noise(inputs, u))
        assert metrics is not None
        if u == 0:
            for name in ("log_alpha", "actor", "critic"):
                close(getattr(sac, name).grad, golden[f"{case}/{name}_grad"], 1e-5, f"gradient of {name}")
        losses = [
            float(metrics["actor_loss"]),
            float(metrics["critic_loss"]),
            log_alpha * (float(metrics["entropy"]) + ACT),  # -log_alpha (log pi + target entropy)
        ]
        for mine, theirs in zip(losses, golden[f"{case}/losses"][u], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for name in ("log_alpha", "actor", "critic", "target"):
        close(getattr(sac, name).flat, golden[f"{case}/{name}"], 1e-5, name)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("mopo", {"update_order": "actor-first"}),
        ("mopo", {"critic_loss": "mean"}),
        ("mobile", {"target_floor": None}),
        ("mobile", {"entropy_in_target": True}),
        ("mobile", {"critic_loss": "sum"}),
        ("morec", {"actor_critics": "online"}),
    ],
)
def test_each_of_these_settings_is_told_apart(
    case: str, changes: dict[str, Any], golden: Mapping[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are not met with another one."""
    monkeypatch.setitem(CASES, case, CASES[case] | changes)
    with pytest.raises(AssertionError):
        test_an_update_is_the_authors_update(case, golden)


@pytest.mark.parametrize("case", ["mobile", "morec"])
def test_the_cases_reach_every_branch(case: str) -> None:
    """Targets below the floor, a penalty that matters, terminals, either critic the smaller."""
    sac, inputs = learner(case, target_floor=None)
    rows, noise = torch.from_numpy(inputs.rows[0]).unsqueeze(0), torch.from_numpy(inputs.noise[0]).unsqueeze(1)
    target, shown = sac._critic_target(rows, noise[1:], own_noise(inputs, 0))
    assert 0.2 < float((target < 0).float().mean()) < 0.8
    assert float(shown["penalty_mean"].mean()) > 0.05
    assert 0 < float(rows[..., OBS + ACT + 1].mean()) < 0.5
    values = sac.target.values(torch.cat((rows[..., :OBS], sac.sample_actions(rows[..., :OBS], noise[0])), -1))
    assert len(values.argmin(1).unique()) == 2
