"""TD3+BC's and IQL's variant `pgd-code` held against numbers of policy-guided diffusion's own code.

`golden/pgd_learners.npz` holds what EmptyJackson/policy-guided-diffusion at commit 9da606c computes (jax 0.10.2, flax
0.12.8, optax 0.2.8, CPU, float32) for the inputs that `draw` makes with `numpy.random.RandomState`, whose streams are
fixed for good. To repeat it, for td3_bc and iql:

- `rl.agents.get_agent` with action limits of 1 and no `obs_stats`, the layers of models/td3_bc.py and models/iql.py 16
  wide, the arguments at their defaults (util/args.py); every network's parameters set to those drawn here; the targets
  as they are initialised, since the first step overwrites them;
- `rl.agents.make_train_step` on the batches 0 to 3, in TD3+BC with `PRNGKey(100 + step)`, whose draws of the target
  noise are kept as `td3_bc.noise`; then once more on batch 4, of which only the targets are kept, since a step averages
  them before anything else. (With current jax `jax.tree_map` is `jax.tree_util.tree_map`, and the keywords `a_min` and
  `a_max` of `jnp.clip` are `min` and `max`.)

What is compared is by how much parameters have changed: to 1e-4 of the largest change of a tensor, beside the rounding
of the parameters themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.iql import IQLConfig, IQLUpdater
from agents.method import method_settings
from agents.td3_bc import TD3BCConfig, TD3BCUpdater
from tests.agents.golden_values import assert_change, assert_moved_alike, drawn_layers, fill

GOLDEN = Path(__file__).parent / "golden" / "pgd_learners.npz"
OBS, ACT, WIDTH, BATCH, UPDATES = 11, 3, 16, 32, 4


def draw(case: str) -> dict[str, Any]:
    """Parameters and batches of a case; a row is s, a, r, d, s'."""
    rng, hidden = np.random.RandomState({"td3_bc": 21, "iql": 22}[case]), [WIDTH, WIDTH]
    x: dict[str, Any] = {
        "actor": drawn_layers(rng, (), (OBS, *hidden, ACT), 1.0),
        "critic": drawn_layers(rng, (2,), (OBS + ACT, *hidden, 1), 4.0),
        "value": drawn_layers(rng, (), (OBS, *hidden, 1), 4.0),
        "log_std": rng.uniform(-1.0, 0.5, ACT).astype(np.float32),
    }
    rows = UPDATES + 1
    obs, next_obs = (rng.standard_normal((rows, BATCH, OBS)) for _ in range(2))
    action, reward = np.tanh(rng.standard_normal((rows, BATCH, ACT))), rng.standard_normal((rows, BATCH, 1))
    done = rng.uniform(size=(rows, BATCH, 1)) < 0.2
    x["rows"] = np.concatenate((obs, action, reward, done, next_obs), -1).astype(np.float32)
    return x


def settings(method: str) -> dict[str, Any]:
    """Of the variant, for a dataset of any name."""
    return {**method_settings(method, "other-v0", "pgd-code")[1], "hidden": [WIDTH, WIDTH], "batch_size": BATCH}


def assert_networks(updater: Any, x: dict[str, Any], golden: Any, case: str, names: tuple[str, ...]) -> None:
    for name in names:
        before = x[name.removeprefix("target_")]
        theirs = [golden[f"{case}.{name}.{i}"] for i in range(len(before))]
        assert_moved_alike(getattr(updater, name), before, theirs, name)


@pytest.fixture(scope="module")
def golden() -> Any:
    return np.load(GOLDEN)


def test_td3_bc(golden: Any) -> None:
    x = draw("td3_bc")
    updater = TD3BCUpdater([TD3BCConfig(**settings("td3_bc"))], [0], OBS, ACT)
    for name in ("actor", "critic", "target_actor", "target_critic"):
        fill(getattr(updater, name), x[name.removeprefix("target_")])
    assert (updater.period, updater.num_noises) == (1, 2)
    for i in range(UPDATES):
        noise = torch.from_numpy(golden["td3_bc.noise"][i]).unsqueeze(1)
        metrics = updater.update(torch.from_numpy(x["rows"][i]).unsqueeze(0), noise, 0, with_metrics=True)
        assert metrics is not None
        assert float(metrics["actor_loss"]) == pytest.approx(golden["td3_bc.losses"][i, 0], rel=1e-5)
    assert_networks(updater, x, golden, "td3_bc", ("actor", "critic", "target_actor", "target_critic"))


def test_iql(golden: Any) -> None:
    x = draw("iql")
    updater = IQLUpdater([IQLConfig(**settings("iql"))], [0], OBS, ACT)
    for name in ("actor", "value", "critic", "target_critic"):
        fill(getattr(updater, name), x[name.removeprefix("target_")])
    updater.log_std.flat.copy_(torch.from_numpy(x["log_std"]))
    for i in range(UPDATES):
        rows = torch.from_numpy(x["rows"][i]).unsqueeze(0)
        metrics = updater.update(rows, torch.empty(0, 1, BATCH, ACT), 0, with_metrics=True)
        assert metrics is not None
        assert float(metrics["value_loss"]) == pytest.approx(golden["iql.losses"][i, 0], rel=1e-5)
        assert float(metrics["critic_loss"]) == pytest.approx(golden["iql.losses"][i, 1], rel=1e-5)
    assert_networks(updater, x, golden, "iql", ("actor", "value", "critic", "target_critic"))
    assert_change(updater.log_std.flat, x["log_std"], golden["iql.log_std"], "iql.log_std")
