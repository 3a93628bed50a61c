"""MOBILE's penalty by hand, which rows have it, and the noise it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agents import chunk
from agents.chunk import ChunkRunner, OwnNoise, draw_chunk
from agents.dynamics import DynamicsConfig, Ensemble
from agents.mobile import MOBILE, BellmanInconsistency, MOBILEConfig
from agents.replay import Replay
from agents.sac import SAC, SACHyperparameters, SACSettings
from envs.errors import UserError
from tests.agents.devices import no_host, recorded_graph

OBS, ACT, DRAWS, REAL, MODEL = 3, 2, 4, 5, 7
BATCH, WIDTH = REAL + MODEL, 2 * OBS + ACT + 2
ELITES = [3, 0, 2]


def ensemble(device: str = "cpu") -> Ensemble:
    """Four linear-in-SiLU models; member 1 is no elite and predicts what would be noticed."""
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return 0.5 * torch.randn(shape, generator=g)

    tensors = {
        "W0": drawn(4, OBS + ACT, 8), "b0": drawn(4, 1, 8),
        "W1": drawn(4, 8, 2 * OBS + 2), "b1": drawn(4, 1, 2 * OBS + 2),
        "max_logvar": torch.full((OBS + 1,), 0.5), "min_logvar": torch.full((OBS + 1,), -3.0),
        "mean": drawn(OBS + ACT), "std": torch.rand(OBS + ACT, generator=g) + 0.5,
    }  # fmt: skip
    tensors["b1"][1] = 100.0
    return Ensemble({name: t.to(device) for name, t in tensors.items()}, ELITES, OBS)


def learner(coefs: tuple[float, ...] = (1.0,), device: str = "cpu", **settings: Any) -> SAC:
    hook = BellmanInconsistency(ensemble(device), coefs, DRAWS, MODEL, ACT)
    fixed = SACSettings(num_critics=2, actor_hidden=(8,), critic_hidden=(8,), initialisation="torch", **settings)
    return SAC(range(len(coefs)), [SACHyperparameters()] * len(coefs), fixed, OBS, ACT, device, hook=hook)


def minibatch(sac: SAC, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, noise and the hook's own noise; a member's are the same in every pack."""
    g, m = torch.Generator().manual_seed(seed), sac.num_members
    rows = torch.randn(4, BATCH, WIDTH, generator=g)
    rows[..., OBS + ACT + 1] = (rows[..., OBS + ACT + 1] > 1).float()
    noise, own = torch.randn(2, 4, BATCH, ACT, generator=g), torch.randn(4, sac.num_own_noises, generator=g)
    return rows[:m], noise[:, :m], own[:m]


def one(network: Any, index: int, x: Tensor) -> Tensor:
    """One network of a stack for rows `(R, in)`."""
    for w, b in zip(network.weights[:-1], network.biases[:-1], strict=True):
        x = torch.relu(x @ w[index] + b[index])
    return x @ network.weights[-1][index] + network.biases[-1][index]


def by_hand(sac: SAC, member: int, rows_BW: Tensor, own_Z: Tensor) -> Tensor:
    """U of model rows, one prediction after the other: an elite draws a next state, the policy an action, the lower
    target critic says what it is worth."""
    models, n = ensemble(), len(ELITES) * DRAWS * MODEL
    state_noise = own_Z[: n * OBS].view(len(ELITES), DRAWS, MODEL, OBS)
    action_noise = own_Z[n * OBS :].view(len(ELITES), DRAWS, MODEL, ACT)
    means, stds = models.predict_all(rows_BW[:, : OBS + ACT])
    backup = torch.zeros(len(ELITES), MODEL)
    for k, e in enumerate(ELITES):
        for d in range(DRAWS):
            next_obs = rows_BW[:, :OBS] + means[e, :, :OBS] + stds[e, :, :OBS] * state_noise[k, d]
            mu, log_std = one(sac.actor, member, next_obs).split(ACT, -1)
            action = torch.tanh(mu + log_std.clamp(-5, 2).exp() * action_noise[k, d])
            q = [one(sac.target, 2 * member + i, torch.cat((next_obs, action), 1)).squeeze(1) for i in range(2)]
            backup[k] += torch.minimum(*q) / DRAWS
    centred = backup - backup.mean(0)
    return (centred.square().sum(0) / (len(ELITES) - 1)).sqrt()


@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_the_penalty_by_hand(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the predictions of a row are made in several goes."""
    monkeypatch.setattr(BellmanInconsistency, "_predictions_at_once", lambda *_: at_once)
    sac = learner((1.0, 2.5))
    rows, noise, own = minibatch(sac)
    sac.target.flat.mul_(2.0)  # not those of the critics
    penalised, shown = sac._critic_target(rows, noise[1:], own)
    without = learner((0.0, 0.0))
    without.target.flat.mul_(2.0)
    plain, _ = without._critic_target(rows, noise[1:], own)
    for m, beta in enumerate((1.0, 2.5)):
        expected = by_hand(sac, m, rows[m, REAL:], own[m])
        assert expected.min() > 1e-3
        torch.testing.assert_close(shown["penalty_mean"][m], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(penalised[m, REAL:], plain[m, REAL:] - beta * expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(penalised[m, :REAL], plain[m, :REAL])  # the dataset's rows have no penalty


def test_a_minibatch_of_real_rows_has_no_penalty_and_takes_no_noise() -> None:
    hook = BellmanInconsistency(ensemble(), [5.0], DRAWS, 0, ACT)
    fixed = SACSettings(num_critics=2, actor_hidden=(8,), critic_hidden=(8,), initialisation="torch")
    sac, plain = (SAC([0], [SACHyperparameters()], fixed, OBS, ACT, hook=h) for h in (hook, None))
    rows, noise, _ = minibatch(learner())
    assert torch.equal(sac._critic_target(rows, noise[1:])[0], plain._critic_target(rows, noise[1:])[0])
    assert run(sac, members=1)[0].isfinite().all()
    assert sac.num_own_noises == 0


def test_the_targets_are_floored_after_the_penalty() -> None:
    rows, noise, own = minibatch(learner())
    rows[..., OBS + ACT] += 1.0
    free, _ = learner((3.0,))._critic_target(rows, noise[1:], own)
    floored, _ = learner((3.0,), target_floor=0.5)._critic_target(rows, noise[1:], own)
    assert (free < 0.5).any()
    assert (free > 0.5).any()
    assert torch.equal(floored, free.clamp(min=0.5))


def test_a_deterministic_backup_still_draws_its_actions() -> None:
    """OfflineRL-Kit `actforward(next_obss)`: what its name says of the backup is only that alpha log pi is left out."""
    rows, noise, own = minibatch(learner())
    target, _ = learner(entropy_in_target=False)._critic_target(rows, noise[1:], own)
    other = noise.clone()
    other[1] += 1.0
    assert not torch.allclose(learner(entropy_in_target=False)._critic_target(rows, other[1:], own)[0], target)
    assert not torch.allclose(learner(entropy_in_target=True)._critic_target(rows, noise[1:], own)[0], target)


def test_selected_members_keep_their_coefficients() -> None:
    whole, rows_noise_own = learner((0.0, 2.0, 5.0)), minibatch(learner((0.0, 2.0, 5.0)))
    rows, noise, own = rows_noise_own
    part, keep = whole.select([2, 1]), [2, 1]
    mine, _ = part._critic_target(rows[keep], noise[1:, keep], own[keep])
    torch.testing.assert_close(mine, whole._critic_target(rows, noise[1:], own)[0][keep], rtol=1e-5, atol=1e-5)
    assert part.num_own_noises == whole.num_own_noises


def test_the_penalty_never_needs_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    sac = learner((1.0, 2.0), device="meta", target_floor=0.0, update_order="critics-first", critic_loss="mean")
    rows, noise, own = (x.to("meta") for x in minibatch(sac))
    with no_host(monkeypatch):
        metrics = sac.update(rows, noise, 0, True, own)
    assert metrics is not None
    assert metrics["penalty_mean"].shape == (2,)


# ---- noise of its own -----------------------------------------------------------------------------------------------


def run(sac: SAC, updates: int = 11, epochs: int = 2, capture: Any = None, members: int = 2) -> tuple[Tensor, Any]:
    rows = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0))
    runner = ChunkRunner(sac, Replay(rows, members, 0), capture=capture)
    seen = [runner.run_epoch(sac.seeds, epoch, updates, BATCH, 0, ACT) for epoch in range(epochs)]
    return torch.cat((sac.actor.flat, sac.critic.flat, sac.target.flat)), seen


@pytest.mark.parametrize("updates_at_once", [1, 3, 11])
def test_the_pieces_in_which_noise_is_drawn_change_nothing(
    updates_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(learner((1.0, 2.0)))
    monkeypatch.setattr(chunk, "OWN_NOISE_BYTES", updates_at_once * 4 * 2 * learner().num_own_noises)
    found = run(learner((1.0, 2.0)))
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert not torch.equal(found[0], run(learner((0.0, 0.0)))[0])


def test_a_graph_gets_the_noise_of_each_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "OWN_NOISE_BYTES", 3 * 4 * 2 * learner().num_own_noises)
    eager, graph = run(learner((1.0, 2.0))), run(learner((1.0, 2.0)), capture=recorded_graph)
    assert torch.equal(graph[0], eager[0])
    assert graph[1] == eager[1]


def test_own_noise_is_a_members_own_and_new_in_every_update_and_epoch() -> None:
    together, alone, later = torch.empty(4, 2, 33), torch.empty(4, 1, 33), torch.empty(4, 1, 33)
    OwnNoise([7, 8], 3, "cpu").fill(together)
    OwnNoise([8], 3, "cpu").fill(alone)
    OwnNoise([8], 4, "cpu").fill(later)
    assert torch.equal(together[:, 1:], alone)
    assert len(torch.cat((together.flatten(), later.flatten())).unique()) == 12 * 33
    sac, replay = learner(), Replay(torch.zeros(9, WIDTH), 1, 0)
    _, noise = draw_chunk(sac, replay, [8], 3, 4, BATCH, 0, ACT)
    assert not torch.isin(alone, noise).any()


# ---- settings -------------------------------------------------------------------------------------------------------


def test_own_noises_are_what_the_update_takes() -> None:
    dynamics = DynamicsConfig(ensemble_size=4, num_elites=3, hidden=[8], weight_decay=[0.0, 0.0])
    config = MOBILEConfig(dynamics=dynamics, penalty_draws=DRAWS, batch_size=BATCH, real_ratio=REAL / BATCH)
    assert config.own_noises(OBS, ACT) == learner().num_own_noises == 3 * DRAWS * MODEL * (OBS + ACT)
    assert set(MOBILE.stages(config)) == {"dynamics"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"penalty_coef": -1.0}, "method.penalty_coef=-1.0 must be 0 or greater"),
        ({"penalty_draws": 0}, "method.penalty_draws=0 must be greater than 0"),
        ({"model_quality": 0.5}, "method.model_quality=0.5 must be 0: MOBILE's penalty"),
        ({"dynamics": DynamicsConfig(num_elites=1)}, "method.dynamics.num_elites=1 must be at least 2"),
        ({"update_order": "actor"}, "must be actor-first or critics-first"),
        ({"critic_loss": "max"}, "must be sum or mean"),
        ({"actor_critics": "both"}, "must be online or target"),
        ({"target_floor": float("nan")}, "must be a finite number, or null"),
    ],
)
def test_what_cannot_be_trained(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MOBILEConfig(**changes)
