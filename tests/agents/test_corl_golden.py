"""BC, CQL and ReBRAC held against numbers of CORL's own code.

`golden/corl.npz` holds what tinkoff-ai/CORL at commit 6afec90 computes (torch 2.13; for ReBRAC jax 0.10.2, flax 0.12.8,
optax 0.2.8; CPU, float32) for the inputs that `draw` makes with `numpy.random.RandomState`, whose streams are fixed for
good. To repeat it, with every hidden layer 16 wide, parameters set to those drawn here and the actions' bound 1:

- bc: `algorithms/offline/any_percent_bc.py`, `BC.train` with Adam of 3e-4 on the four batches;
- cql: `algorithms/offline/cql.py`, `ContinuousCQL.train` with critics of three hidden layers, `policy_lr` 3e-5, `qf_lr`
  3e-4, `cql_alpha` 10, `cql_n_actions` 5 and the other arguments at their defaults; cql options: with `cql_lagrange`,
  `cql_target_action_gap` 0.5, `cql_max_target_backup`, `backup_entropy`, no `cql_importance_sample`, `cql_temp` 2 and
  `cql_clip_diff_min` and `max` of 5.4 and 5.7, which cut some rows' gaps. `Normal.rsample` replaced by mean + standard
  deviation * noise, `Tensor.uniform_` by erf(noise / sqrt 2), in the order of the calls;
- rebrac: `algorithms/offline/rebrac.py`, `update_td3` and `update_td3_no_targets` in turn, with 0.05 and 0.1 as weights
  of actor and critic and Adam of 1e-3, and `PRNGKey(300 + update)`, whose draws of the target noise are kept.

What is compared: losses to 1e-5, and by how much parameters have changed, to 1e-4 of the largest change of a tensor
beside the rounding of the parameters themselves, which is less than 1e-6 of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.bc import BCConfig, BCUpdater
from agents.cql import CQLConfig, CQLUpdater
from agents.networks import StackedLayerNormMLP, StackedMLP
from agents.rebrac import ReBRACConfig, ReBRACUpdater
from tests.agents.golden_values import Array, Layers, assert_moved_alike, drawn_layers, fill

GOLDEN = Path(__file__).parent / "golden" / "corl.npz"
OBS, ACT, WIDTH, BATCH, UPDATES, DRAWS = 11, 3, 16, 32, 4, 5
CASES = {"bc": 31, "cql": 32, "cql options": 33, "rebrac": 34}  # seeds
SMALL: dict[str, Any] = {"batch_size": BATCH}


def draw(case: str) -> dict[str, Any]:
    """Parameters, batches and noise of a case; a row is s, a, r, d, s', in ReBRAC also the action after it."""
    rng, hidden = np.random.RandomState(CASES[case]), [WIDTH] * (2 if case == "bc" else 3)
    outputs = 2 * ACT if case.startswith("cql") else ACT
    x: dict[str, Any] = {"actor": drawn_layers(rng, (), (OBS, *hidden, outputs), 1.0)}
    critic = drawn_layers(rng, (2,), (OBS + ACT, *hidden, 1), 4.0)
    critic[-2] -= critic[-2].mean(1, keepdims=True)  # so that neither is the smaller everywhere
    x["critic"] = critic
    x["target_critic"] = [p + 0.02 * rng.standard_normal(p.shape).astype(np.float32) for p in critic]
    x["target_actor"] = [p + 0.02 * rng.standard_normal(p.shape).astype(np.float32) for p in x["actor"]]
    obs, next_obs = (rng.standard_normal((UPDATES, BATCH, OBS)) for _ in range(2))
    action, next_action = (np.tanh(rng.standard_normal((UPDATES, BATCH, ACT))) for _ in range(2))
    reward, done = rng.standard_normal((UPDATES, BATCH, 1)), rng.uniform(size=(UPDATES, BATCH, 1)) < 0.2
    columns = (obs, action, reward, done, next_obs, *((next_action,) if case == "rebrac" else ()))
    x["rows"] = np.concatenate(columns, -1).astype(np.float32)
    x["noise"] = rng.standard_normal((UPDATES, 2, BATCH, ACT)).astype(np.float32)
    x["own_noise"] = rng.standard_normal((UPDATES, 4, DRAWS, BATCH, ACT)).astype(np.float32)
    # of the critics' normalised layers: scale, shift, scale, ...
    x["norms"] = [
        (1.0 - i % 2 + rng.uniform(-0.3, 0.3, (2, 1, WIDTH))).astype(np.float32) for i in range(2 * len(hidden))
    ]
    return x


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(GOLDEN)


def assert_networks(updater: Any, x: dict[str, Any], golden: Any, case: str, names: tuple[str, ...]) -> None:
    for name in names:
        network, before = getattr(updater, name), x[name]
        if isinstance(network, StackedLayerNormMLP):
            before = [*before, *x["norms"]]
        assert_moved_alike(network, before, [golden[f"{case}.{name}.{i}"] for i in range(len(before))], name)


def test_bc(golden: Any) -> None:
    x = draw("bc")
    updater = BCUpdater([BCConfig(actor_lr=3e-4, hidden=[WIDTH] * 2, **SMALL)], [0], OBS, ACT)
    fill(updater.actor, x["actor"])
    for i in range(UPDATES):
        metrics = updater.update(torch.from_numpy(x["rows"][i]).unsqueeze(0), torch.empty(0), with_metrics=True)
        assert metrics is not None
        assert float(metrics["actor_loss"]) == pytest.approx(golden["bc.losses"][i], rel=1e-5)
    assert_networks(updater, x, golden, "bc", ("actor",))


CQL_OPTIONS: dict[str, dict[str, Any]] = {
    "cql": {},
    "cql options": {
        "lagrange": True, "target_action_gap": 0.5, "max_target_backup": True, "entropy_in_target": True,
        "importance_sampling": False, "cql_temperature": 2.0, "min_gap": 5.4, "max_gap": 5.7,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CQL_OPTIONS)
def test_cql(golden: Any, case: str) -> None:
    x = draw(case)
    c = CQLConfig(num_actions=DRAWS, hidden=[WIDTH] * 3, **SMALL, **CQL_OPTIONS[case])
    updater = CQLUpdater([c], [0], OBS, ACT)
    for name in ("actor", "critic", "target_critic"):
        fill(getattr(updater, name), x[name])
    for i in range(UPDATES):
        noise = torch.from_numpy(x["noise"][i][: updater.num_noises]).unsqueeze(1)
        own = torch.from_numpy(x["own_noise"][i]).flatten()[: updater.num_own_noises].unsqueeze(0)
        metrics = updater.update(torch.from_numpy(x["rows"][i]).unsqueeze(0), noise, 0, True, own)
        assert metrics is not None
        policy_loss, q1, q2, gap1, gap2, alpha, _ = golden[f"{case}.losses"][i]
        assert float(metrics["actor_loss"]) == pytest.approx(policy_loss, rel=1e-5)
        assert float(metrics["critic_loss"]) == pytest.approx(q1 + q2, rel=1e-5)
        assert float(metrics["conservative_gap"]) == pytest.approx((gap1 + gap2) / 2, rel=1e-5)
        assert float(metrics["alpha"]) == pytest.approx(alpha, rel=1e-6)
    assert_networks(updater, x, golden, case, ("actor", "critic", "target_critic"))
    names = ("log_std_scale", "log_std_offset", "log_alpha", "log_alpha_prime")
    scalars = torch.cat([getattr(updater, name).flat for name in names])
    torch.testing.assert_close(scalars, torch.from_numpy(golden[f"{case}.scalars"]), rtol=0, atol=1e-7)
    start = torch.tensor([1.0, -1.0, 0.0, 1.0])
    assert ((scalars - start).abs() > 5e-5).tolist() == [True, True, True, c.lagrange]


def test_rebrac(golden: Any) -> None:
    x = draw("rebrac")
    c = ReBRACConfig(actor_bc_coef=0.05, critic_bc_coef=0.1, hidden=[WIDTH] * 3, **SMALL)
    updater = ReBRACUpdater([c], [0], OBS, ACT)
    for name in ("actor", "critic", "target_actor", "target_critic"):
        network: StackedMLP = getattr(updater, name)
        layers: Layers = [*x[name], *x["norms"]] if "critic" in name else x[name]
        fill(network, layers)
    for i in range(UPDATES):
        noise = torch.from_numpy(golden["rebrac.noise"][i]).view(1, 1, BATCH, ACT)
        metrics = updater.update(torch.from_numpy(x["rows"][i]).unsqueeze(0), noise, i % 2, True)
        assert metrics is not None
        expected: Array = golden["rebrac.losses"][i]
        assert float(metrics["critic_loss"]) == pytest.approx(expected[0], rel=1e-5)
        if i % 2 == 0:
            assert float(metrics["actor_loss"]) == pytest.approx(expected[1], rel=1e-5)
    assert_networks(updater, x, golden, "rebrac", ("actor", "critic", "target_actor", "target_critic"))
