"""The methods for other dynamics held against numbers of ODRL's own code.

`golden/odrl.npz` holds what OffDynamicsRL/off-dynamics-rl at commit 34bba73 computes (torch 2.13, CPU, float32) for the
inputs that `draw` makes with `numpy.random.RandomState`, whose streams are fixed for good. To repeat it: `train` of the
class, parameters set to those drawn here, hidden layers 16 wide, `batch_size` 16 rows of each domain as drawn,
`cql_n_actions` 5, `weight` 2.5, `total_it` beyond the warm-up and no multiple of `tar_env_interact_freq` so that the
classifiers stay as they are, the other settings those of config/mujoco/*/halfcheetah.yaml; `Normal.rsample` replaced by
mean + standard deviation * noise, `Tensor.uniform_` by erf(noise / sqrt 2), in the order of the calls:

- darc: `algo/online_online/darc.py`, `DARC`, source rows only
- iw_clip: `algo/online_online/sac_iw.py`, `SAC_IW`, source rows only
- h2o: `algo/offline_online/h2o.py`, `H2O`
- symmetric_sampling: `algo/offline_online/cql_sac.py`, `CQLSAC`
- bc_sac: `algo/offline_online/bc_sac.py`, `BCSAC`

What is compared: gradients of the first update to 1e-5 of the largest entry, and by how much parameters have changed
after all of them, to 1e-4 of the largest change of a tensor beside the rounding of the parameters themselves; without
the 1e-6 that soft actor-critic here adds to 1 - a^2 in the density. ODRL trains its classifiers on a softmax of a
softmax, which is not compared (`agents.domain_classifiers`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from agents.bc_sac import BCSAC
from agents.cross_domain import CrossDomain
from agents.darc import DARC
from agents.domain_classifiers import ClassifierConfig, DomainClassifiers
from agents.h2o import H2O
from agents.iw_clip import IWClip
from agents.method import TrainingData
from agents.symmetric_sampling import SymmetricSampling
from tests.agents.golden_values import assert_moved_alike, close, drawn_layers, fill

GOLDEN = Path(__file__).parent / "golden" / "odrl.npz"
OBS, ACT, WIDTH, BATCH, UPDATES, DRAWS = 5, 2, 16, 16, 3, 5
CASES = {"darc": 41, "iw_clip": 42, "h2o": 43, "symmetric_sampling": 44, "bc_sac": 45}  # seeds


def draw(case: str) -> dict[str, Any]:
    """Parameters, batches and noise of a case; a row is s, a, r, d, s', those of the source before those of the
    target."""
    rng, hidden = np.random.RandomState(CASES[case]), [WIDTH] * 2
    x: dict[str, Any] = {"actor": drawn_layers(rng, (), (OBS, *hidden, 2 * ACT), 0.5)}
    critic = drawn_layers(rng, (2,), (OBS + ACT, *hidden, 1), 4.0)
    critic[-2] -= critic[-2].mean(1, keepdims=True)  # so that neither is the smaller everywhere
    x["critic"] = critic
    x["target"] = [p + 0.02 * rng.standard_normal(p.shape).astype(np.float32) for p in critic]
    x["sa"] = drawn_layers(rng, (), (OBS + ACT, *hidden, 2), 3.0)
    x["sas"] = drawn_layers(rng, (), (2 * OBS + ACT, *hidden, 2), 3.0)
    shape = (UPDATES, 2 * BATCH)
    obs, next_obs = (rng.standard_normal((*shape, OBS)) for _ in range(2))
    action = np.tanh(rng.standard_normal((*shape, ACT)))
    reward, done = rng.standard_normal((*shape, 1)), rng.uniform(size=(*shape, 1)) < 0.2
    x["rows"] = np.concatenate((obs, action, reward, done, next_obs), -1).astype(np.float32)
    x["noise"] = rng.standard_normal((UPDATES, 3, 2 * BATCH, ACT)).astype(np.float32)
    # of the uniform actions, those of pi(.|s) and those of pi(.|s')
    x["own_noise"] = rng.standard_normal((UPDATES, 3, DRAWS, BATCH, ACT)).astype(np.float32)
    return x


CONFIGS: dict[str, tuple[type[CrossDomain], dict[str, Any]]] = {
    "darc": (DARC, {"warm_up": 0}),
    "iw_clip": (IWClip, {"warm_up": 0, "max_weight": 10.0}),
    "h2o": (H2O, {"penalty_weighting": "mean"}),
    "symmetric_sampling": (SymmetricSampling, {}),
    "bc_sac": (BCSAC, {"bc_coef": 2.5}),
}


def made(case: str) -> CrossDomain:
    cls, settings = CONFIGS[case]
    own: dict[str, Any] = {"num_actions": DRAWS} if case in ("h2o", "symmetric_sampling") else {}
    if case in ("darc", "iw_clip", "h2o"):
        own["classifiers"] = ClassifierConfig(hidden=[WIDTH] * 2)
    config = cls.Config(  # type: ignore[attr-defined]
        target="x", hidden=[WIDTH] * 2, batch_size=BATCH, log_std_min=-20.0, initialisation="torch", **settings, **own
    )
    columns = (torch.zeros(1, OBS), torch.zeros(1, ACT), torch.zeros(1), torch.zeros(1, OBS), torch.zeros(1))
    return cls([config], [0], TrainingData("x", *columns), {})


@pytest.mark.parametrize("case", CASES)
def test_updates(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, golden, method = draw(case), np.load(GOLDEN), made(case)
    sac = method.updater
    sac._scalars = sac._scalars._replace(tiny=torch.zeros(()))
    for name in ("actor", "critic", "target"):
        fill(getattr(sac, name), x[name])
    if "classifiers" in method.parts:
        classifiers = cast(DomainClassifiers, method.parts["classifiers"])
        fill(classifiers.sa, x["sa"])
        fill(classifiers.sas, x["sas"])
        ratio = classifiers.log_ratio(torch.from_numpy(x["rows"][0]).unsqueeze(0))
        close(ratio, golden[f"{case}.log_ratio"], 1e-5, "log ratio")
    own = torch.from_numpy(x["own_noise"]).flatten(1).unsqueeze(1)
    monkeypatch.setattr(method, "_draws", lambda t: own[t], raising=False)
    for i in range(UPDATES):
        rows, noise = torch.from_numpy(x["rows"][i]).unsqueeze(0), torch.from_numpy(x["noise"][i]).unsqueeze(1)
        method.update(i, rows[:, :BATCH], rows[:, BATCH:], noise[: method.num_noises], False)
        if i == 0:
            for name in ("critic", "actor"):
                network = getattr(sac, name)
                pairs = zip(network.weight_grads, network.bias_grads, strict=True)
                for j, mine in enumerate(t for pair in pairs for t in pair):
                    close(mine, golden[f"{case}.{name}_grad.{j}"], 1e-5, f"{name} gradient {j}")
    for name in ("actor", "critic", "target"):
        assert_moved_alike(getattr(sac, name), x[name], [golden[f"{case}.{name}.{j}"] for j in range(6)], name)
