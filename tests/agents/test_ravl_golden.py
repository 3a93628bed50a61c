"""RAVL's update and ensemble held against numbers of its authors' own code.

`golden/ravl.npz` holds what anyasims/edge-of-reach at commit 18b5085 computes (torch 2.13, CPU, float32) for the inputs
that `agent_inputs` and `dynamics_inputs` draw with `numpy.random.RandomState`, whose streams are fixed for good. To
repeat it, for every case:

- `Actor`, `VectorizedCritic` and `Agent` of agent_training/agent.py, layers of the widths below in place of 256,
  parameters set to those drawn here (their `target_critic`, too), learning rates 3e-4, auto_alpha; `Agent.update` on
  the three batches. `Normal.rsample` is replaced by mean + standard deviation * noise. They draw three times in an
  update, for the temperature, the actor and the target; this project draws once for the first two, so both were given
  the same noise.
- `Ensemble` of dynamics_training/ensemble.py with `hidden_dim`, parameters and bounds set to those drawn here and its
  filters updated with the rows as `load_memory` does; the loss and the optimiser of train_dynamics_model.py:155-162 on
  the same rows for every member; then `get_means_logvars`.

Kept are the losses of every update, the gradients of the first, each as it was before its optimiser's step, and the
parameters after the third. Tolerances are relative to a tensor's largest entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.dynamics import DynamicsConfig, Ensemble, EnsembleTrainer
from agents.networks import StackedMLP
from agents.sac import SAC, SACHyperparameters, SACSettings
from tests.agents.golden_values import Array, Layers, close, drawn_layers, fill

GOLDEN = Path(__file__).parent / "golden" / "ravl.npz"
OBS, ACT, WIDTH, BATCH, UPDATES = 11, 3, 16, 32, 3  # S and A are Hopper's
CASES = {"n10": (10, 1.0), "n2": (2, 0.0), "n5": (5, 5.0)}  # critics N, eta
MODELS, MODEL_ROWS = 3, 160


@dataclass
class AgentInputs:
    actor: Layers
    critic: Layers  # leading axis N
    target: Layers
    rows: Array  # (U, B, 2 S + A + 2): s, a, r, d, s'
    noise: Array  # (U, 2, B, A): for a~ and for a~'


@dataclass
class DynamicsInputs:
    layers: Layers  # leading axis E; the last layer's outputs are mean, then log-variance
    max_logvar: Array  # (D,)
    min_logvar: Array
    observations: Array  # (N, S)
    actions: Array  # (N, A)
    rewards: Array  # (N,)
    next_observations: Array


def agent_inputs(case: str) -> AgentInputs:
    """Parameters and batches of a case; the seed is 1 for n10, 2 for n2, 3 for n5."""
    rng = np.random.RandomState(1 + list(CASES).index(case))
    num_critics, hidden = CASES[case][0], (WIDTH, WIDTH, WIDTH)
    actor = drawn_layers(
        rng, (), (OBS, *hidden, 2 * ACT), 16.0
    )  # log standard deviations on both sides of their bounds,
    actor[-1][..., -1] -= 3.0
    actor[-2][:, :ACT] *= (
        0.05  # but actions not so close to 1 that log(1 - a^2) is all rounding (small noise: likewise)
    )
    critic = drawn_layers(rng, (num_critics,), (OBS + ACT, *hidden, 1), 4.0)
    critic[-2] -= critic[-2].mean(1, keepdims=True)  # so that none of them is the smallest everywhere
    target = [layer + 0.02 * rng.standard_normal(layer.shape).astype(np.float32) for layer in critic]
    obs, next_obs = (rng.standard_normal((UPDATES, BATCH, OBS)) for _ in range(2))
    action, reward = np.tanh(rng.standard_normal((UPDATES, BATCH, ACT))), rng.standard_normal((UPDATES, BATCH, 1))
    done = rng.uniform(size=(UPDATES, BATCH, 1)) < 0.2
    rows = np.concatenate((obs, action, reward, done, next_obs), -1).astype(np.float32)
    noise = 0.25 * rng.standard_normal((UPDATES, 2, BATCH, ACT))
    return AgentInputs(actor, critic, target, rows, noise.astype(np.float32))


def dynamics_inputs() -> DynamicsInputs:
    """Parameters of the models and the rows they learn from; seed 4."""
    rng = np.random.RandomState(4)
    layers = drawn_layers(rng, (MODELS,), (OBS + ACT, *[WIDTH] * 4, 2 * (OBS + 1)), 3.0)
    bounds = [rng.uniform(*low_high, OBS + 1).astype(np.float32) for low_high in ((0.2, 0.8), (-3.0, -2.0))]
    obs = rng.normal(2.0, np.linspace(0.1, 4.0, OBS), (MODEL_ROWS, OBS))
    obs[1, 0] += 20.0  # beyond the clip at ten standard deviations
    next_obs = obs + rng.normal(0.0, 0.5, (MODEL_ROWS, OBS))
    next_obs[1, 0] = 2.0
    action, reward = rng.uniform(-1.0, 1.0, (MODEL_ROWS, ACT)), rng.standard_normal(MODEL_ROWS)
    return DynamicsInputs(layers, *bounds, *(x.astype(np.float32) for x in (obs, action, reward, next_obs)))


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Array]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


def learner(case: str) -> tuple[SAC, AgentInputs]:
    num_critics, eta = CASES[case]
    hidden = (WIDTH, WIDTH, WIDTH)
    settings = SACSettings(num_critics=num_critics, actor_hidden=hidden, critic_hidden=hidden)
    sac, inputs = SAC([0], [SACHyperparameters(eta=eta)], settings, OBS, ACT), agent_inputs(case)
    for network, layers in ((sac.actor, inputs.actor), (sac.critic, inputs.critic), (sac.target, inputs.target)):
        fill(network, layers)
    return sac, inputs


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_authors_update(case: str, golden: Mapping[str, Array]) -> None:
    """Gradients and losses to 1e-5. After three updates of Adam, each at most 3e-4 of a parameter whose gradient's sign
    rounding may decide: to 1e-6."""
    sac, inputs = learner(case)
    for u in range(UPDATES):
        log_alpha = float(sac.log_alpha.flat)
        metrics = sac.update(
            torch.from_numpy(inputs.rows[u]).unsqueeze(0), torch.from_numpy(inputs.noise[u]).unsqueeze(1), 0, True
        )
        assert metrics is not None
        if u == 0:
            for name in ("log_alpha", "actor", "critic"):
                close(getattr(sac, name).grad, golden[f"{case}/{name}_grad"], 1e-5, f"gradient of {name}")
        diversity = float(metrics.get("critic_diversity", torch.zeros(1)))
        losses = [
            log_alpha * (float(metrics["entropy"]) + ACT),  # -log_alpha (log pi + target entropy)
            float(metrics["actor_loss"]),
            float(metrics["critic_loss"]) + CASES[case][1] * diversity,
            diversity,
        ]
        for mine, theirs in zip(losses, golden[f"{case}/losses"][u], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-8)
    for name in ("log_alpha", "actor", "critic", "target"):
        close(getattr(sac, name).flat, golden[f"{case}/{name}"], 1e-6, name)


def test_the_cases_reach_every_branch() -> None:
    """Log standard deviations beyond both bounds, terminals, more than one critic that is smallest."""
    sac, inputs = learner("n5")
    rows, noise = (torch.from_numpy(x[0]).unsqueeze(0) for x in (inputs.rows, inputs.noise))
    assert 0 < float(rows[..., OBS + ACT + 1].mean()) < 0.5
    raw = sac.actor.forward(rows[..., :OBS])[0][..., ACT:]
    assert bool((raw < -5).any())
    assert bool((raw > 2).any())
    action = sac.sample_actions(rows[..., :OBS], noise[:, 0])
    q, _ = sac.critic.forward(torch.cat((rows[..., :OBS], action), -1).expand(5, -1, -1))
    assert len(q.argmin(0).unique()) > 1


# ---- dynamics -------------------------------------------------------------------------------------------------------


def test_the_ensembles_prediction_is_the_authors(golden: Mapping[str, Array]) -> None:
    """Mean and standard deviation of the next state and the reward, to 1e-6."""
    inputs = dynamics_inputs()
    mean, std = torch.from_numpy(golden["dynamics/filter"]).float()
    tensors = {"mean": mean, "std": std}
    for i, layer in enumerate(inputs.layers):
        tensors[f"{'Wb'[i % 2]}{i // 2}"] = torch.from_numpy(layer)
    bounds = {name: torch.from_numpy(getattr(inputs, name)) for name in ("max_logvar", "min_logvar")}
    ensemble = Ensemble({**tensors, **bounds}, list(range(MODELS)), OBS)
    state_action = torch.from_numpy(np.concatenate((inputs.observations, inputs.actions), -1))
    predicted, deviation = ensemble.predict_all(state_action)
    next_state = torch.from_numpy(inputs.observations) + predicted[..., :OBS]
    assert float(ensemble._normalise(state_action).max()) == 10.0  # the clip is at work
    close(torch.cat((next_state, predicted[..., OBS:]), -1), golden["dynamics/next_mean"], 1e-6, "mean")
    close(deviation, golden["dynamics/std"], 1e-6, "standard deviation")


def test_a_step_of_the_ensemble_is_the_authors_step(golden: Mapping[str, Array]) -> None:
    """Loss and gradients to 1e-5, parameters after three steps of Adam with its L2 terms to 1e-6."""
    inputs = dynamics_inputs()
    obs, action, reward, next_obs = (
        torch.from_numpy(x) for x in (inputs.observations, inputs.actions, inputs.rewards, inputs.next_observations)
    )
    config = DynamicsConfig(ensemble_size=MODELS, num_elites=MODELS, hidden=[WIDTH] * 4)
    trainer = EnsembleTrainer(obs, action, reward, next_obs, [config])
    # inputs normalised by the authors' statistics: theirs are of the next observations
    mean, std = golden["dynamics/filter"]
    normalised = (np.concatenate((inputs.observations, inputs.actions), -1) - mean) / std
    trainer._table[:, : OBS + ACT] = torch.from_numpy(normalised.clip(-10, 10).astype(np.float32))
    networks = trainer._networks
    for layer, weight, bias in zip(
        networks.layers(networks.sizes, networks.rows_GF), inputs.layers[::2], inputs.layers[1::2], strict=True
    ):
        layer[:, :-1], layer[:, -1:] = torch.from_numpy(weight), torch.from_numpy(bias)
    trainer._bounds_P2D.copy_(torch.from_numpy(np.stack((inputs.max_logvar, inputs.min_logvar))))

    def flat(rows_GF: Tensor) -> Tensor:
        layers = networks.layers(networks.sizes, rows_GF)
        return torch.cat([part.reshape(-1) for layer in layers for part in (layer[:, :-1], layer[:, -1])])

    every_row = torch.arange(MODEL_ROWS).expand(MODELS, -1)
    for u in range(UPDATES):
        loss = trainer.step(every_row)
        if u == 0:
            assert float(loss) == pytest.approx(float(golden["dynamics/loss"][0]), rel=1e-5)
            close(flat(networks.grad_GF), golden["dynamics/grad"], 1e-5, "gradient")
            close(trainer._grad_bounds_P2D, golden["dynamics/bounds_grad"], 1e-5, "gradient of the bounds")
    close(flat(networks.rows_GF), golden["dynamics/parameters"], 1e-6, "parameters")
    close(trainer._bounds_P2D, golden["dynamics/bounds"], 1e-6, "bounds")


# ---- initialisation -------------------------------------------------------------------------------------------------


def spread(network: StackedMLP) -> Array:
    """Of every layer: the weights' largest size and standard deviation, and the biases' range."""
    layers = zip(network.weights, network.biases, strict=True)
    return np.array([[float(x) for x in (w.abs().max(), w.std(), b.min(), b.max())] for w, b in layers], np.float32)


def test_parameters_start_where_the_authors_start(golden: Mapping[str, Array]) -> None:
    """Four critics and an actor 256 wide, as `VectorizedCritic` and `Actor` draw them: bounds to 3 %, spread 5 %.

    Their critics' weights are stored (in, out) and handed to an initialiser that expects (out, in), so their bound is
    1/sqrt(out). Their actor is made of `torch.nn.Linear`, whose bound is 1/sqrt(in).
    """
    for scheme, first_bound in (("edac", 256**-0.5), ("edac-fan-in", (OBS + ACT) ** -0.5)):
        settings = SACSettings(4, (256,) * 3, (256,) * 3, initialisation=scheme)
        sac = SAC([0], [SACHyperparameters()], settings, OBS, ACT)
        actor, critic = spread(sac.actor), spread(sac.critic)
        assert critic[0, 0] == pytest.approx(first_bound, rel=0.03)
        for mine, theirs in ((actor, golden["init/actor"]), (critic[1:], golden["init/critic"][1:])):
            np.testing.assert_allclose(mine[:, 0], theirs[:, 0], rtol=0.03)
            np.testing.assert_allclose(mine[:, 1], theirs[:, 1], rtol=0.05)
            np.testing.assert_allclose(mine[:-1, 2:], theirs[:-1, 2:])  # hidden biases 0.1
            assert np.abs(mine[-1, 2:]).max() <= mine[-1, 0] * 1.01
        if scheme == "edac":
            np.testing.assert_allclose(critic[0], golden["init/critic"][0], rtol=0.03)
