"""The transition filter held against numbers of its authors' own code.

`golden/morec.npz` holds what polixir/morec at commit be8a641 computes (torch 2.13, CPU, float32) for the inputs that
`filter_inputs` draws with `numpy.random.RandomState`, whose streams are fixed for good. To repeat it, for every case:

- A `DiscriminatorRestrain` with `encoder_type="vanilla"`, whose networks have the widths below in place of 128, 256 and
  the unreleased head, `delta_input` of the case, and `history_discriminator` filled with the ten snapshots drawn here
  (`middle_value` 0; the rows that belong to its hidden factor are drawn here, too, and matter to nothing since that is
  0); its `expert_data` a `DataLoader` without data that has the bounds drawn here. Of it, as its launcher does, a
  `DiscriminatorEnsemble` with `load_min_max=False`, `max_retain_num=8` and `ensemble_choosing_interval=2`.
- `EnsembleDynamics.step` with `d_clip=1`, `resample_num_in_transition=2`, a threshold of 0.8 (so that all cases have
  cuts), a penalty coefficient of 0.5, and a model that returns the means (of the change) and log-variances drawn here
  and has the elites below; a scaler that changes nothing; terminals where the first column of the next observation is
  above 1. `numpy.random.normal` returns the noise drawn here; `Categorical.sample` takes the first candidate at which
  the cumulated probabilities exceed the uniform number drawn here.

The packages it imports and does not need for this (gym, d4rl, neorl, smart_logger, psutil) were empty stand-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.dynamics import Ensemble
from agents.dynamics_reward import DynamicsReward
from agents.penalties import max_aleatoric
from agents.transition_filter import FilterConfig, FilteredDynamics

Array = NDArray[np.float32]

GOLDEN = Path(__file__).parent / "golden" / "morec.npz"
OBS, ACT, ROWS = 5, 2, 96
SNAPSHOTS, RETAINED, EVERY = 10, 8, 2  # 4 are used
WIDTHS = (24, 32, 16, 16)  # encoder, then head
MODELS, ELITES, DRAWS = 4, (2, 0, 3), 2
CLIP, COEF, THRESHOLD = 2.0, 0.5, 0.8
CASES = {  # s' - s as input, selection
    "delta_softmax": (True, "softmax"), "delta_argmax": (True, "argmax"),
    "plain_softmax": (False, "softmax"), "plain_argmax": (False, "argmax"),
}  # fmt: skip


@dataclass
class FilterInputs:
    layers: list[
        tuple[Array, Array]
    ]  # (10, in, out), (10, 1, out); inputs [s, z, a, s' or s' - s], z the hidden factor
    expert: Array  # (10,)
    learner: Array
    obs_low: Array  # (S,)
    obs_high: Array
    act_low: Array  # (A,)
    act_high: Array
    observations: Array  # (B, S)
    actions: Array  # (B, A)
    mean: Array  # (E, B, S + 1), of change and reward
    logvar: Array
    noise: Array  # (draws, elites, B, S + 1)
    uniform: Array  # (B,)


def filter_inputs(case: str) -> FilterInputs:
    """The inputs of a case; the seed is its number, from 11 on."""
    rng = np.random.RandomState(11 + list(CASES).index(case))
    layers = []
    for n_in, n_out in pairwise((2 * OBS + 1 + ACT, *WIDTHS, 1)):
        bound = 2.0 / np.sqrt(n_in)
        weight, bias = (rng.uniform(-x, x, (SNAPSHOTS, n, n_out)) for x, n in ((bound, n_in), (0.3, 1)))
        layers.append((weight.astype(np.float32), bias.astype(np.float32)))
    hidden = rng.uniform(-0.8, 0.8, (300, 2 * OBS + 1 + ACT))
    for w, b in layers[:-1]:
        hidden = np.maximum(hidden @ w + b, 0)
    # many logits lie beyond the means
    learner, expert = np.quantile((hidden @ layers[-1][0] + layers[-1][1])[..., 0], (0.3, 0.7), axis=1)
    bounds = [side * rng.uniform(0.5, 1.5, width) for width in (OBS, ACT) for side in (-1.0, 1.0)]
    obs, act = rng.uniform(-1, 1, (ROWS, OBS)), rng.uniform(-1, 1, (ROWS, ACT))
    mean = 0.6 * rng.standard_normal((MODELS, ROWS, OBS + 1))
    logvar = rng.uniform(-4.0, 0.5, (MODELS, ROWS, OBS + 1))
    noise, uniform = rng.standard_normal((DRAWS, len(ELITES), ROWS, OBS + 1)), rng.uniform(size=ROWS)
    drawn = (x.astype(np.float32) for x in (expert, learner, *bounds, obs, act, mean, logvar, noise, uniform))
    return FilterInputs(layers, *drawn)


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Array]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


class Predicting(Ensemble):
    """An ensemble whose predictions are given."""

    def __init__(self, inputs: FilterInputs) -> None:
        super().__init__({"W0": torch.zeros(MODELS, 1, 1)}, list(ELITES), OBS)
        self.given = torch.from_numpy(inputs.mean), torch.from_numpy(inputs.logvar).mul(0.5).exp()

    def predict_all(self, state_action_BX: Tensor) -> tuple[Tensor, Tensor]:
        return self.given


def reward_state(inputs: FilterInputs, delta_input: bool) -> dict[str, Any]:
    """The retained snapshots as the stage stores them: without the hidden factor's row."""
    last = slice(SNAPSHOTS - RETAINED, None)
    columns = [i for i in range(2 * OBS + 1 + ACT) if i != OBS]
    tensors = {}
    for i, (weight, bias) in enumerate(inputs.layers):
        tensors[f"W{i}"], tensors[f"b{i}"] = torch.from_numpy(weight[last]), torch.from_numpy(bias[last])
    tensors["W0"] = tensors["W0"][:, columns]
    others = {
        "expert_logit": inputs.expert[last], "learner_logit": inputs.learner[last], "observation_low": inputs.obs_low,
        "observation_high": inputs.obs_high, "action_low": inputs.act_low, "action_high": inputs.act_high,
    }  # fmt: skip
    return {
        "tensors": tensors | {name: torch.from_numpy(value) for name, value in others.items()},
        "delta_input": delta_input, "observation_dim": OBS, "snapshot_updates": list(range(RETAINED)),
        "distilled": None,
    }  # fmt: skip


def close(mine: Tensor, theirs: Array, what: str) -> None:
    np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-5, err_msg=what)


@pytest.mark.parametrize("case", CASES)
def test_a_filtered_step_is_the_authors(case: str, golden: Mapping[str, Array]) -> None:
    """Rewards of every candidate, odds, the choice, its state and penalised reward, and where rollouts end."""
    delta_input, selection = CASES[case]
    inputs = filter_inputs(case)
    reward = DynamicsReward.from_state_dict(reward_state(inputs, delta_input), num_discriminators=RETAINED // EVERY)
    config = FilterConfig(draws=DRAWS, selection=selection, clip=CLIP, threshold=THRESHOLD)
    dynamics = FilteredDynamics(Predicting(inputs), reward, config)
    state_action = torch.from_numpy(np.concatenate((inputs.observations, inputs.actions), 1))
    mean, std = (dynamics.ensemble.of_elites(x) for x in dynamics.ensemble.predict_all(state_action))
    noise = torch.from_numpy(inputs.noise).permute(2, 0, 1, 3).reshape(ROWS, -1)
    candidates = dynamics.candidates(state_action, mean, std, noise)
    close(candidates, golden[f"{case}/candidates"], "candidates")
    scores = reward(state_action, candidates[..., :-1].transpose(0, 1))
    close(scores, golden[f"{case}/dynamics_reward"], "dynamics reward")
    assert float(scores.std(1).mean()) > 0.1
    if selection == "softmax":
        close(torch.softmax(scores / config.temperature, 1), golden[f"{case}/odds"], "odds")
        normal = torch.special.ndtri(torch.from_numpy(inputs.uniform).double()).float()
        noise = torch.cat((noise, normal.unsqueeze(1)), 1)

    after = torch.empty(1, ROWS, OBS)
    step = dynamics.step(
        None, state_action.unsqueeze(0), noise.unsqueeze(0), torch.zeros(1, ROWS, dtype=torch.int64), max_aleatoric,
        after,
    )  # fmt: skip
    close(after[0], golden[f"{case}/next_observations"], "next observations")
    assert step.penalty_MB is not None
    assert step.cut_MB is not None
    close((step.reward_MB - COEF * step.penalty_MB)[0], golden[f"{case}/rewards"], "rewards")
    terminal = after[0, :, 0] > 1
    ended = golden[f"{case}/terminals"].astype(bool)
    assert ((step.cut_MB[0] | terminal).numpy() == ended).all()
    assert int(terminal.sum()) > 5
    assert 5 < int((step.cut_MB[0] & ~terminal).sum()) < ROWS - 20
