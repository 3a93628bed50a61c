"""VGDF's learner held against numbers of the authors' own code.

`golden/vgdf.npz` holds what Kavka1/VGDF at commit 9f65d60 computes (torch 2.13, CPU, float32) for the inputs that
`draw` makes with `numpy.random.RandomState`, whose streams are fixed for good. To repeat it, for `VGDF_Agent` of
agent/vgdf.py and `VGDF_BC_Agent` of agent/vgdf_bc.py (once with and once without `use_q_decay`):

- all layers of policies and values 16 wide, `dynamics_ensemble_size` 7, `batch_size` 16, `ac_gradient_clip` 5,
  `start_gate_src_sample` 1, `likelihood_gate_threshold` 0.75, `bc_coeff` 5, all else as in config/vgdf; parameters
  set to those drawn here, targets equal to the values;
- the buffers return the minibatches drawn here, `dynamics.predict` the means and variances drawn here, and
  `torch.distributions.Normal.rsample` takes its standard normal numbers from `noise`: a policy's call for states of
  the target, of the source, of both, those of the optimistic policy, or in VGDF_BC those of the clone term;
- `train_ac(t, is_terminal_region_for_wk)` for t = 0 to 5: the gate opens for all rows up to t = 1;
- kept at every t: what `_value_expansion` returns, the rows chosen, entries of `loss_log`, all parameters at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.behaviour_cloning import BehaviourCloning
from agents.cross_domain import joined
from agents.domain_sac import DomainSAC, DomainSACHyperparameters, DomainSACSettings
from agents.value_proximity import ValueGate, fictitious_values, proximity
from envs.termination import termination_rule
from tests.agents.golden_values import assert_moved_alike, close, drawn_layers, fill

GOLDEN = Path(__file__).parent / "golden" / "vgdf.npz"
OBS, ACT, WIDTH, BATCH, ENSEMBLE, UPDATES = 5, 2, 16, 16, 7, 6
START_GATE, CLIP = 1, 5.0


def draw() -> dict[str, Any]:
    """Parameters, minibatches `[s, a, r, d, s']`, predictions and noise."""
    rng, hidden = np.random.RandomState(41), [WIDTH, WIDTH]
    x: dict[str, Any] = {
        "actor": drawn_layers(rng, (), (OBS, *hidden, 2 * ACT), 1.5),
        "source_actor": drawn_layers(rng, (), (OBS, *hidden, 2 * ACT), 1.5),
        "critic": drawn_layers(rng, (2,), (OBS + ACT, *hidden, 1), 4.0),
    }
    shape = (UPDATES, 2 * BATCH)
    obs, next_obs = (rng.standard_normal((*shape, OBS)) for _ in range(2))
    next_obs[..., 0] = 1.3 + 0.4 * rng.standard_normal(shape)  # a height: some fall
    action, reward = np.tanh(rng.standard_normal((*shape, ACT))), rng.standard_normal((*shape, 1))
    done = rng.uniform(size=(*shape, 1)) < 0.1
    x["rows"] = np.concatenate((obs, action, reward, done, next_obs), -1).astype(np.float32)
    source = x["rows"][:, None, :BATCH]
    true = np.concatenate((source[..., OBS + ACT, None], source[..., OBS + ACT + 2 :] - source[..., :OBS]), -1)
    noise = 0.3 * rng.standard_normal((UPDATES, ENSEMBLE, BATCH, 1 + OBS))
    x["mean"] = (true + noise).astype(np.float32)
    x["variance"] = np.exp(rng.uniform(-6.0, -1.0, x["mean"].shape)).astype(np.float32)
    x["noise"] = rng.standard_normal((UPDATES, 4, 2 * BATCH, ACT)).astype(np.float32)
    return x


def learner(x: dict[str, Any], optimistic: bool) -> DomainSAC:
    settings = DomainSACSettings(hidden=(WIDTH, WIDTH), actor_every=2, max_grad_norm=CLIP, optimistic=optimistic)
    sac = DomainSAC([0], [DomainSACHyperparameters(alpha=0.2)], settings, OBS, ACT)
    for name in ("actor", "critic", "target", *(["source_actor"] if optimistic else [])):
        fill(getattr(sac, name), x["critic" if name == "target" else name])
    return sac


def given(prediction: tuple[Tensor, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda _: prediction


def tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values)).unsqueeze(0)


@pytest.mark.parametrize("form", ["quantile", "topk"])
def test_the_whole_update(form: str) -> None:
    x, golden = draw(), np.load(GOLDEN)
    sac = learner(x, optimistic=True)
    gate = ValueGate("code", "quantile", 0.25, "batch", termination_rule("Walker2d-v5"))
    for t in range(UPDATES):
        rows, prediction = tensor(x["rows"][t]), (tensor(x["mean"][t]), tensor(x["variance"][t]))
        noise = torch.from_numpy(x["noise"][t]).unsqueeze(1)
        targets = sac.targets(rows, noise[0])
        fictitious = fictitious_values(sac, rows[:, :BATCH, :OBS], prediction, gate.termination, "code", noise[:0])
        close(fictitious, golden[f"fictitious.{t}"], 1e-5, f"fictitious values at {t}")
        source = rows[:, :BATCH]
        value = source[..., OBS + ACT] + 0.99 * (1 - source[..., OBS + ACT + 1]) * targets.value_MB[:, :BATCH]
        near = proximity(value, fictitious)
        close(near.log_density.exp().mean(), golden[f"likelihood.{t}"], 1e-5, f"density at {t}")
        close((near.mean - near.value).abs().mean(), golden[f"value_difference.{t}"], 1e-5, f"gap at {t}")
        batch = joined(rows[:, :BATCH], rows[:, BATCH:])
        if t > START_GATE:
            even = batch
            batch, shown = gate(sac, given(prediction), batch, targets, noise[:0], True)
            torch.testing.assert_close(shown["gate/value_gap"][0], (near.mean - near.value).abs().mean())
            # rows that rank the same by topk
            by_rank = ValueGate("code", "topk", 0.25, "batch", gate.termination)
            ranked, _ = by_rank(sac, given(prediction), even, targets, noise[:0], False)
            assert torch.equal(ranked.weight_MB, batch.weight_MB)
            if form == "topk":
                batch = ranked
        assert batch.weight_MB[0, :BATCH].nonzero().flatten().tolist() == golden[f"chosen.{t}"].tolist()
        metrics = sac.update(batch, noise, t % 2, with_metrics=True, targets=targets)
        assert metrics is not None
        close(metrics["critic_loss"], golden[f"loss_value.{t}"], 1e-5, f"critic loss at {t}")
        close(metrics["critic_loss_source"], golden[f"q_loss_src.{t}"], 1e-5, f"source loss at {t}")
        close(metrics["critic_grad_norm"], golden[f"value_total_norm.{t}"], 1e-5, f"gradient norm at {t}")
        if t % 2 == 0:
            close(metrics["actor_loss"], golden[f"loss_policy.{t}"], 1e-5, f"actor loss at {t}")
            close(metrics["source_actor_loss"], golden[f"loss_opt_policy.{t}"], 1e-5, f"optimistic loss at {t}")
    for name in ("actor", "source_actor", "critic", "target"):
        before = x["critic" if name == "target" else name]
        assert_moved_alike(getattr(sac, name), before, [golden[f"{name}.{i}"] for i in range(len(before))], name)
    assert [len(golden[f"chosen.{t}"]) for t in range(UPDATES)] == [16, 16, 4, 4, 4, 4]
    norms = [float(golden[f"value_total_norm.{t}"]) for t in range(UPDATES)]
    assert min(norms) < CLIP < max(norms)  # some are clipped, some not


@pytest.mark.parametrize(("case", "scale"), [("bc", "none"), ("bc_decay", "value")])
def test_the_policy_that_also_clones(case: str, scale: str) -> None:
    x, golden = draw(), np.load(GOLDEN)
    sac, cloning = learner(x, optimistic=False), BehaviourCloning([5.0], scale)
    gate = ValueGate("code", "topk", 0.25, "batch", termination_rule("Walker2d-v5"))
    for t in range(UPDATES):
        rows, prediction = tensor(x["rows"][t]), (tensor(x["mean"][t]), tensor(x["variance"][t]))
        noise = torch.from_numpy(x["noise"][t]).unsqueeze(1)
        targets, batch = sac.targets(rows, noise[0]), joined(rows[:, :BATCH], rows[:, BATCH:])
        if t > START_GATE:
            batch, _ = gate(sac, given(prediction), batch, targets, noise[:0], False)
        metrics = sac.update(batch, noise, t % 2, True, None, cloning, targets)
        assert metrics is not None
        if t % 2 == 0:
            loss = metrics["policy_weight"] * metrics["actor_loss"] + metrics["cloning_loss"]
            close(loss, golden[f"{case}.loss_policy.{t}"], 1e-5, f"policy's loss at {t}")
    for name in ("actor", "critic"):
        assert_moved_alike(getattr(sac, name), x[name], [golden[f"{case}.{name}.{i}"] for i in range(6)], name)
