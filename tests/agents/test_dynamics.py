"""The ensemble's loss, its fit on a system known exactly, its stopping rule and what it keeps."""

from __future__ import annotations

import math
import operator
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agents import dynamics
from agents.dynamics import (
    DynamicsConfig,
    Ensemble,
    EnsembleTrainer,
    EpochReport,
    train_ensemble,
    train_ensembles,
    training_settings,
)
from envs.errors import UserError
from tests.agents.devices import recorded_graph

OBS, ACT = 2, 1
NOISE = torch.tensor([0.05, 0.2, 0.1])  # of the two state changes and the reward
A = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
B = torch.tensor([[0.5], [-0.3]])
C = torch.tensor([1.0, -0.5])

Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def truth(obs: Tensor, action: Tensor) -> Tensor:
    """Mean of [s' - s, r]: linear in s and a, the reward with an offset of 2."""
    return torch.cat((obs @ A.T + action @ B.T, (obs @ C + 2.0).unsqueeze(1)), dim=1)


def system(n: int, seed: int = 0) -> Columns:
    g = torch.Generator().manual_seed(seed)
    obs, action = torch.randn(n, OBS, generator=g), torch.rand(n, ACT, generator=g) * 2 - 1
    outputs = truth(obs, action) + NOISE * torch.randn(n, OBS + 1, generator=g)
    return obs, action, outputs[:, -1], obs + outputs[:, :-1]


def config(**changes: Any) -> DynamicsConfig:
    small = {"ensemble_size": 3, "num_elites": 2, "hidden": [8], "weight_decay": [1e-5, 1e-5], "max_epochs": 5}
    return DynamicsConfig(**{**small, **changes})


def random_ensemble(hidden: list[int] | None = None, size: int = 4) -> Ensemble:
    hidden = [8, 8] if hidden is None else hidden
    decay = [0.0] * (len(hidden) + 1)
    settings = config(ensemble_size=size, hidden=hidden, weight_decay=decay, seed=3)
    (ensemble,) = EnsembleTrainer(*system(50), [settings]).ensembles
    for i in range(len(hidden) + 1):
        ensemble.tensors[f"b{i}"].normal_(generator=torch.Generator().manual_seed(i))
    return ensemble


def copies(ensemble: Ensemble) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ensemble.tensors.items()}


# ---- the loss -------------------------------------------------------------------------------------------------------


def by_hand(ensemble: Ensemble, member: int, x: list[float]) -> list[tuple[float, float]]:
    """Mean and log-variance of every output of one member for one normalised input, in plain floats."""
    t = ensemble.tensors

    def layer(values: list[float], i: int) -> list[float]:
        weight, bias = t[f"W{i}"][member].tolist(), t[f"b{i}"][member, 0].tolist()
        return [b + sum(v * row[j] for v, row in zip(values, weight, strict=True)) for j, b in enumerate(bias)]

    for i in range(ensemble.num_layers - 1):
        x = [z / (1 + math.exp(-z)) for z in layer(x, i)]
    out = layer(x, ensemble.num_layers - 1)
    upper, lower = t["max_logvar"].tolist(), t["min_logvar"].tolist()
    result = []
    for d in range(OBS + 1):
        logvar = upper[d] - math.log1p(math.exp(upper[d] - out[OBS + 1 + d]))
        result.append((out[d], lower[d] + math.log1p(math.exp(logvar - lower[d]))))
    return result


def minibatch(trainer: EnsembleTrainer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised inputs and targets of rows of the data."""
    joined = trainer._table[rows]
    return joined[..., : OBS + ACT], joined[..., OBS + ACT + 1 :]


def recorded_loss(ensemble: Ensemble, x: Tensor, y: Tensor) -> Tensor:
    """The loss as autograd can differentiate it."""
    mean, logvar = ensemble.forward(x)
    nll = (logvar + (y - mean).square() * torch.exp(-logvar)).mean((1, 2)).sum()
    return nll + 0.01 * (ensemble.tensors["max_logvar"].sum() - ensemble.tensors["min_logvar"].sum())


def test_loss_by_hand() -> None:
    trainer = EnsembleTrainer(*system(50), [config()])
    (ensemble,) = trainer.ensembles
    ensemble.tensors["max_logvar"].copy_(torch.tensor([0.5, 0.1, -0.3]))
    ensemble.tensors["min_logvar"].copy_(torch.tensor([-4.0, -1.0, -2.0]))
    rows = torch.tensor([[0, 1, 2, 3], [9, 8, 7, 6], [3, 3, 20, 40]])
    x, y = minibatch(trainer, rows)
    expected = 0.01 * (0.5 + 0.1 - 0.3) - 0.01 * (-4.0 - 1.0 - 2.0)
    for member in range(3):  # summed over members, a mean over rows and outputs
        for row in range(4):
            for d, (mean, logvar) in enumerate(by_hand(ensemble, member, x[member, row].tolist())):
                expected += (logvar + (y[member, row, d].item() - mean) ** 2 * math.exp(-logvar)) / (4 * 3)
    assert float(recorded_loss(ensemble, x, y)) == pytest.approx(expected, rel=1e-5)
    assert float(trainer.step(rows)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("hidden", [[], [8], [8, 5, 8]])
def test_gradients_are_those_of_autograd(hidden: list[int]) -> None:
    trainer = EnsembleTrainer(*system(50), [config(hidden=hidden, weight_decay=[0.0] * (len(hidden) + 1))])
    (ensemble,) = trainer.ensembles
    ensemble.tensors["max_logvar"].copy_(torch.tensor([0.5, 0.1, -0.3]))  # near enough to count
    ensemble.tensors["min_logvar"].copy_(torch.tensor([-1.0, -0.5, -2.0]))
    reference = Ensemble(copies(ensemble), ensemble.elites, OBS)
    trained = [k for k in reference.tensors if k not in ("mean", "std")]
    rows = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    for k in trained:
        reference.tensors[k].requires_grad_()
    loss = recorded_loss(reference, *minibatch(trainer, rows))
    grads = dict(zip(trained, torch.autograd.grad(loss, [reference.tensors[k] for k in trained]), strict=True))
    trainer.step(rows)
    written = trainer._ensemble(trainer._networks.grad_GF, trainer._grad_bounds_P2D[0], []).tensors
    for k in trained:
        assert grads[k].abs().max() > 1e-4, k
        torch.testing.assert_close(written[k], grads[k], rtol=1e-4, atol=1e-6)


def test_steps_are_adams_with_l2_on_the_weights_of_each_layer() -> None:
    decay = [0.3, 0.1]
    trainer = EnsembleTrainer(*system(50), [config(weight_decay=decay, learning_rate=0.01)])
    (mine,) = trainer.ensembles
    reference = Ensemble(copies(mine), mine.elites, OBS)
    trained = [k for k in reference.tensors if k not in ("mean", "std")]
    for k in trained:
        reference.tensors[k].requires_grad_()
    groups = [{"params": [reference.tensors[f"W{i}"]], "weight_decay": d} for i, d in enumerate(decay)]
    groups.append({"params": [reference.tensors[k] for k in trained if not k.startswith("W")]})
    optim = torch.optim.Adam(groups, lr=0.01)
    for step in range(3):
        rows = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(step))
        optim.zero_grad()
        loss = recorded_loss(reference, *minibatch(trainer, rows))
        loss.backward()
        optim.step()
        assert float(trainer.step(rows)) == pytest.approx(loss.item(), rel=1e-5)
    for k in trained:
        torch.testing.assert_close(mine.tensors[k], reference.tensors[k].detach(), rtol=1e-4, atol=1e-6)


def view_of(tensor: Tensor, key: Any) -> Tensor:
    """`tensor[key]` for slices and numbers; indexing itself needs a torch that was built for CUDA."""
    keys = key if isinstance(key, tuple) else (key,)
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys = (*keys[:at], *[slice(None)] * (tensor.ndim - len(keys) + 1), *keys[at + 1 :])
    axis = 0
    for k in keys:
        if isinstance(k, slice):
            start, stop, _ = k.indices(tensor.shape[axis])
            tensor = tensor.narrow(axis, start, stop - start)
            axis += 1
        else:
            tensor = tensor.select(axis, operator.index(k))
    return tensor


def copied(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor.copy_(other)` of fake tensors, for the same reason."""
    assert (tensor.device, tensor.shape) == (other.device, other.shape)
    return tensor


def test_a_step_can_be_captured_as_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors refuse what asks the device for a value, and what mixes in tensors of the host."""
    updated: list[int] = []

    def adam(params: list[Tensor], grads: list[Tensor], *_: Any, lr: Tensor, **__: Any) -> None:
        assert {t.device.type for t in (*params, *grads, lr)} == {"cuda"}
        updated.append(sum(p.numel() for p in params))

    monkeypatch.setattr(dynamics, "_fused_adam", adam)  # has no fake form with a learning rate as a tensor
    trainer = EnsembleTrainer(*system(50), [config(seed=0), config(seed=1)])
    monkeypatch.setattr(Tensor, "__getitem__", view_of)
    monkeypatch.setattr(Tensor, "copy_", copied, raising=False)
    with FakeTensorMode():
        for name, value in vars(trainer).items():
            if isinstance(value, Tensor) and name != "_best_mse_PE":
                setattr(trainer, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        trainer.device = torch.device("cuda")
        trainer._bind()
        rows = torch.empty(6, 16, dtype=torch.long, device="cuda")
        before = dict(vars(trainer))
        loss = trainer.step(rows)
        # a tensor that is bound anew would not be seen by the next replay
        assert all(vars(trainer)[name] is value for name, value in before.items())
        error = trainer.holdout_mse()
    assert (loss.device.type, loss.shape, error.shape) == ("cuda", (2,), (2, 3))
    assert sum(updated) == 2 * (3 * ((3 + 1) * 8 + (8 + 1) * 6) + 6)


def test_captured_steps_end_with_the_bits_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = [config(seed=seed, learning_rate=rate, batch_size=64) for seed, rate in ((0, 1e-3), (1, 3e-3))]
    trainers = [EnsembleTrainer(*system(300), fit)]
    losses = [trainers[0].train_epoch(epoch) for epoch in range(2)]
    monkeypatch.setattr(dynamics, "default_capture", lambda device: recorded_graph)
    trainers.append(EnsembleTrainer(*system(300), fit))
    for epoch, loss in enumerate(losses):
        assert torch.equal(trainers[1].train_epoch(epoch), loss)
    for eager, captured in zip(*(trainer.ensembles for trainer in trainers), strict=True):
        assert all(torch.equal(eager.tensors[name], captured.tensors[name]) for name in eager.tensors)
    assert trainers[1]._captured  # and the graphs were taken


def test_the_fit_recovers_mean_and_noise_of_a_linear_system() -> None:
    fit = config(
        ensemble_size=2, num_elites=1, hidden=[32], batch_size=128, learning_rate=3e-3, max_epochs=60, improvement=0.0,
        patience=20,
    )  # fmt: skip
    ensemble = train_ensemble(*system(3000), fit)
    obs, action, _, _ = system(500, seed=1)
    mean, std = ensemble.predict_all(torch.cat((obs, action), dim=1))
    error = (mean - truth(obs, action)).square().mean((0, 1)).sqrt()
    assert (error < 0.35 * NOISE).all(), error
    torch.testing.assert_close(std.mean((0, 1)), NOISE, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("raw", [-1e4, -3.0, 0.0, 3.0, 1e4])
def test_log_variances_are_softly_bounded(raw: float) -> None:
    ensemble = random_ensemble()
    ensemble.tensors["max_logvar"] = torch.tensor([0.5, 0.0, -1.0])
    ensemble.tensors["min_logvar"] = torch.tensor([-10.0, -3.0, -4.0])
    ensemble.tensors["W2"][..., OBS + 1 :] = 0.0
    ensemble.tensors["b2"][..., OBS + 1 :] = raw
    _, std = ensemble.predict_all(torch.zeros(1, OBS + ACT))
    for d, (upper, lower) in enumerate([(0.5, -10.0), (0.0, -3.0), (-1.0, -4.0)]):
        logvar = 2 * math.log(float(std[0, 0, d]))
        assert lower - 1e-3 <= logvar <= upper + 0.06  # the lower bound's softplus lifts the upper end a little
        if abs(raw) > 100:
            assert logvar == pytest.approx(upper if raw > 0 else lower, abs=0.06)
        elif raw == -3.0 and d == 0:
            assert logvar == pytest.approx(raw, abs=0.05)  # far from both bounds: left as it is


def test_inputs_are_standardised_and_clipped_outputs_are_raw() -> None:
    obs, action, reward, next_obs = system(4000)
    scale, offset = torch.tensor([100.0, 1e-3]), torch.tensor([500.0, -7.0])
    shifted = (offset + scale * obs, action, reward, offset + scale * obs + (next_obs - obs))
    plain = train_ensemble(obs, action, reward, next_obs, config(max_epochs=2))
    scaled = train_ensemble(*shifted, config(max_epochs=2))
    mean, std = plain.predict_all(torch.cat((obs, action), dim=1)[:20])
    mean_scaled, std_scaled = scaled.predict_all(torch.cat((shifted[0], action), dim=1)[:20])
    torch.testing.assert_close(mean_scaled, mean, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(std_scaled, std, rtol=1e-2, atol=1e-2)
    far = torch.tensor([[1e3, 0.0, 0.0], [1e6, 0.0, 0.0]])
    clipped = plain.predict_all(far)[0]
    assert torch.equal(clipped[:, 0], clipped[:, 1])


def test_without_a_clip_far_inputs_are_told_apart_wherever_the_ensemble_goes_and_old_keys_stay() -> None:
    settings = config(input_clip=math.inf, max_epochs=1)
    ensemble = train_ensemble(*system(200), settings)
    far = torch.tensor([[100.0, 0.0, 0.0], [200.0, 0.0, 0.0]])
    expected = ensemble.predict_all(far)[0]
    assert not torch.equal(expected[:, 0], expected[:, 1])
    for copy in (
        pickle.loads(pickle.dumps(ensemble)), Ensemble.from_state_dict(ensemble.state_dict()), ensemble.to("cpu"),
    ):  # fmt: skip
        assert torch.equal(copy.predict_all(far)[0], expected)
    assert ensemble.untrained(0).input_clip == math.inf
    old = {name: value for name, value in ensemble.state_dict().items() if name != "input_clip"}
    clipped = Ensemble.from_state_dict(old).predict_all(far)[0]
    assert torch.equal(clipped[:, 0], clipped[:, 1])
    assert "input_clip" not in training_settings(config())
    assert training_settings(settings)["input_clip"] == math.inf
    with pytest.raises(UserError, match="input_clip=0"):
        config(input_clip=0)


def test_a_constant_column_does_no_harm() -> None:
    obs, action, reward, next_obs = system(200)
    obs[:, 1] = 4.0
    ensemble = train_ensemble(obs, action, reward, next_obs, config(max_epochs=2))
    mean, std = ensemble.predict_all(torch.cat((obs, action), dim=1))
    assert torch.isfinite(mean).all()
    assert torch.isfinite(std).all()


# ---- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [[], [8], [8, 8, 8]])
def test_the_drawn_member_predicts_as_among_all(hidden: list[int]) -> None:
    ensemble = random_ensemble(hidden)
    x = torch.randn(30, OBS + ACT, generator=torch.Generator().manual_seed(0)) * 3
    member = torch.tensor([3, 0, 0, 1, 3, 3] * 5)  # member 2 is never drawn
    mean_all, std_all = ensemble.predict_all(x)
    mean, std = ensemble.predict_drawn(x, member)
    rows = torch.arange(30)
    torch.testing.assert_close(mean, mean_all[member, rows])
    torch.testing.assert_close(std, std_all[member, rows])
    assert (mean_all[3] - mean_all[0]).abs().max() > 0.1  # the members do differ
    # the form of a GPU, where all elites compute every row
    ensemble.elites = [0, 1, 3]
    dense = ensemble._drawn_of_all(x, member)
    torch.testing.assert_close(dense[0], mean_all[member, rows])
    torch.testing.assert_close(dense[1].mul(0.5).exp(), std_all[member, rows])


def test_a_prediction_can_be_captured_as_a_cuda_graph() -> None:
    ensemble = random_ensemble()
    with FakeTensorMode():
        tensors = {k: torch.empty(v.shape, device="cuda") for k, v in ensemble.tensors.items()}
        on_gpu = Ensemble(tensors, [0, 2], OBS)
        x, member = torch.empty(30, OBS + ACT, device="cuda"), torch.empty(30, dtype=torch.long, device="cuda")
        for mean, std in (on_gpu.predict_drawn(x, member), on_gpu.predict_all(x)):
            assert (mean.device.type, std.device.type) == ("cuda", "cuda")
            assert mean.shape[-2:] == std.shape[-2:] == (30, OBS + 1)


def test_a_saved_ensemble_predicts_the_same() -> None:
    ensemble = train_ensemble(*system(100), config(max_epochs=2))
    again = Ensemble.from_state_dict(ensemble.state_dict())
    x = torch.randn(5, OBS + ACT)
    assert torch.equal(again.predict_all(x)[0], ensemble.predict_all(x)[0])
    assert torch.equal(again.predict_all(x)[1], ensemble.predict_all(x)[1])
    assert (again.elites, again.size, again.observation_dim) == (ensemble.elites, 3, OBS)


# ---- the holdout ----------------------------------------------------------------------------------------------------


def trained_on(rewards: Tensor, **changes: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Weights after two epochs, and the holdout error before them."""
    obs, action, _, next_obs = system(30)
    trainer = EnsembleTrainer(obs, action, rewards, next_obs, [config(batch_size=8, ensemble_size=7, **changes)])
    error = trainer.holdout_mse()
    for epoch in range(2):
        trainer.train_epoch(epoch)
    return copies(trainer.ensembles[0]), error


@pytest.mark.parametrize(("changes", "num_held"), [({}, 6), ({"max_holdout": 3}, 3)])
def test_held_out_rows_are_never_trained_on(changes: dict[str, Any], num_held: int) -> None:
    """A row's reward reaches the weights or the holdout error, never both."""
    rewards = system(30)[2]
    weights, error = trained_on(rewards, **changes)
    held, trained = [], []
    for row in range(30):
        changed = rewards.clone()
        changed[row] += 50.0
        other, other_error = trained_on(changed, **changes)
        reaches_weights = any(not torch.equal(other[k], weights[k]) for k in weights)
        reaches_error = not torch.equal(other_error, error)
        assert not (reaches_weights and reaches_error), row
        held += [row] if reaches_error else []
        trained += [row] if reaches_weights else []
    assert len(held) == num_held
    assert len(trained) >= 28 - num_held  # seven resamples with replacement may miss a row or two
    assert held != list(range(num_held))
    assert held != list(range(30 - num_held, 30))


def test_holdout_error_is_the_mean_squared_error_of_the_mean() -> None:
    trainer = EnsembleTrainer(*system(50), [config(batch_size=4)])
    (ensemble,) = trainer.ensembles
    (held,) = trainer._held_PH
    assert len(held) == 10
    x, y = minibatch(trainer, held)
    mean, _ = ensemble.forward(x.unsqueeze(0))
    torch.testing.assert_close(trainer.holdout_mse(), (mean - y).square().mean((1, 2)).unsqueeze(0))


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_rows_is_one_sentence(n: int) -> None:
    with pytest.raises(UserError, match=f"^{n} transitions are too few to hold out 20% of them$"):
        EnsembleTrainer(*system(n), [config()])


# ---- stopping, best weights, elites ---------------------------------------------------------------------------------


class Scripted(EnsembleTrainer):
    """Real training whose holdout errors are told beforehand, one row of E numbers per epoch."""

    def __init__(self, script: list[list[float]], settings: DynamicsConfig) -> None:
        super().__init__(*system(60), [settings])
        self.script = iter(script)
        self.history: list[dict[str, Tensor]] = []

    def holdout_mse(self) -> Tensor:
        self.history.append(copies(self.ensembles[0]))
        return torch.tensor([next(self.script)])

    def run(self) -> list[EpochReport]:
        return [reports[0] for reports in self.epochs()]

    def result(self) -> Ensemble:
        (ensemble,) = self.finish()
        assert isinstance(ensemble, Ensemble)
        return ensemble


def test_training_stops_after_epochs_without_improvement_in_a_row() -> None:
    errors = [[9.0], [8.0], [8.0], [7.95], [7.0], [7.0], [6.99], [6.98], [1.0]]
    settings = config(ensemble_size=1, num_elites=1, patience=3, max_epochs=20)
    reports = Scripted(errors, settings).run()
    # 7.95 falls short of 1 % below 8; 7.0 starts the count anew; three epochs without improvement end it
    assert [r.epoch for r in reports] == list(range(8))
    assert {r.learning_rate for r in reports} == {settings.learning_rate}


def test_any_improving_member_keeps_the_training_alive() -> None:
    errors = [[9.0, 9.0], [9.0, 8.0], [9.0, 8.0], [8.0, 8.0], [8.0, 8.0], [8.0, 8.0], [1.0, 1.0]]
    reports = Scripted(errors, config(ensemble_size=2, num_elites=1, patience=2, max_epochs=20)).run()
    assert len(reports) == 6


def test_before_the_least_number_of_epochs_a_plateau_lowers_the_learning_rate_once() -> None:
    """Released RAVL: stop at a plateau from epoch index 350 on; the first plateau before it multiplies by 0.3."""
    settings = config(ensemble_size=1, num_elites=1, patience=2, min_epochs=10, max_epochs=50, learning_rate=1e-3)
    reports = Scripted([[9.0]] * 50, settings).run()
    assert [r.epoch for r in reports] == list(range(11))
    assert [r.learning_rate for r in reports[:3]] == [1e-3] * 3
    assert [r.learning_rate for r in reports[3:]] == pytest.approx([3e-4] * 8)


def test_lowering_the_learning_rate_starts_the_count_anew() -> None:
    settings = config(ensemble_size=1, num_elites=1, patience=3, min_epochs=4, max_epochs=50)
    reports = Scripted([[9.0]] * 50, settings).run()
    assert len(reports) == 7  # lowered after epoch 3, then three epochs more


def test_an_improvement_after_the_least_number_of_epochs_is_waited_for() -> None:
    errors = [[9.0]] * 4 + [[5.0]] * 9
    settings = config(ensemble_size=1, num_elites=1, patience=4, min_epochs=5, max_epochs=50)
    reports = Scripted(errors, settings).run()
    # improvements at epochs 0 and 4: the plateau is complete at epoch 8
    assert len(reports) == 9
    assert {r.learning_rate for r in reports} == {settings.learning_rate}


def test_the_most_epochs() -> None:
    assert len(Scripted([[1.0 / (i + 1)] for i in range(9)], config(ensemble_size=1, num_elites=1)).run()) == 5


def test_each_member_ends_with_its_best_weights_and_the_best_are_elites() -> None:
    errors = [[5.0, 3.0, 9.0], [4.0, 2.0, 8.0], [4.5, 1.0, 7.0], [4.5, 6.0, 3.0], [4.2, 6.0, 4.0]]
    trainer = Scripted(errors, config(num_elites=2, max_epochs=5))
    reports = trainer.run()
    ensemble = trainer.result()
    for member, best_epoch in enumerate([1, 2, 3]):
        for name in ("W0", "b0", "W1", "b1"):
            assert torch.equal(ensemble.tensors[name][member], trainer.history[best_epoch][name][member])
            assert not torch.equal(ensemble.tensors[name][member], trainer.history[4][name][member])
    assert ensemble.elites == [1, 2]  # errors 4, 1, 3
    assert reports[-1].holdout_mse == [4.0, 1.0, 3.0]


def test_the_returned_ensemble_has_the_reported_errors() -> None:
    """With a learning rate far too high the last epoch is not the best one."""
    settings = config(learning_rate=0.1, max_epochs=12, patience=50, batch_size=32, improvement=0.0)
    trainer = EnsembleTrainer(*system(300), [settings])
    reports = [of_all[0] for of_all in trainer.epochs()]
    (last,) = trainer.holdout_mse()
    (ensemble,) = trainer.finish()
    assert isinstance(ensemble, Ensemble)
    x, y = minibatch(trainer, trainer._held_PH[0])
    errors = (ensemble.forward(x.unsqueeze(0))[0] - y).square().mean((1, 2))
    torch.testing.assert_close(errors, torch.tensor(reports[-1].holdout_mse))
    assert (errors <= last + 1e-6).all()
    assert (errors < last - 1e-3).any()
    ranked = sorted(range(3), key=lambda m: reports[-1].holdout_mse[m])
    assert ensemble.elites == sorted(ranked[:2])


def test_a_diverged_training_is_one_sentence() -> None:
    rewards = torch.full((60,), 1e38) * torch.tensor([1.0, -1.0]).repeat(30)
    obs, action, _, next_obs = system(60)
    with pytest.raises(UserError, match=r"dynamics training diverged.*lower dynamics\.learning_rate"):
        train_ensemble(obs, action, rewards, next_obs, config())


# ---- several at once ------------------------------------------------------------------------------------------------


def differing() -> list[DynamicsConfig]:
    """Settings that end at different epochs, the second one first."""
    shared: dict[str, Any] = {"batch_size": 16, "max_epochs": 40, "patience": 2, "min_epochs": 12, "improvement": 0.2}
    return [
        config(seed=1, learning_rate=2e-2, weight_decay=[1e-2, 1e-3], **shared),
        config(seed=0, learning_rate=3e-3, **shared),
        config(seed=2, learning_rate=1e-2, **shared),
    ]


def test_an_ensemble_trained_with_others_is_the_one_trained_alone() -> None:
    configs, columns = differing(), system(200)
    together: dict[int, list[EpochReport]] = {0: [], 1: [], 2: []}
    ensembles = train_ensembles(*columns, configs, lambda place, report: together[place].append(report))
    lengths = [len(reports) for reports in together.values()]
    assert len(set(lengths)) == 3, lengths  # one by one they leave the batch
    assert lengths[0] != min(lengths)
    for place, one in enumerate(configs):
        alone: list[EpochReport] = []
        expected, ensemble = train_ensemble(*columns, one, alone.append), ensembles[place]
        assert isinstance(ensemble, Ensemble)
        assert ensemble.elites == expected.elites
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(ensemble.tensors[name], tensor, rtol=1e-3, atol=1e-5, msg=f"{place} {name}")
        assert [r.epoch for r in together[place]] == [r.epoch for r in alone]
        assert [r.learning_rate for r in together[place]] == [r.learning_rate for r in alone]
        for mine, other in zip(together[place], alone, strict=True):
            assert mine.train_loss == pytest.approx(other.train_loss, rel=1e-3)
            assert mine.holdout_mse == pytest.approx(other.holdout_mse, rel=1e-3)
    # a plateau before the least number of epochs lowered one's learning rate alone
    assert [len({r.learning_rate for r in reports}) for reports in together.values()] == [1, 2, 1]


def test_one_that_diverges_does_not_disturb_the_others() -> None:
    configs = [config(learning_rate=1e30, seed=4), config(seed=5)]
    diverged, trained = train_ensembles(*system(100), configs)
    assert isinstance(diverged, UserError)
    assert "dynamics training diverged" in str(diverged)
    assert isinstance(trained, Ensemble)
    alone = train_ensemble(*system(100), configs[1])
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(trained.tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_what_changes_the_computation_cannot_train_together() -> None:
    with pytest.raises(ValueError, match="may differ in seed, learning_rate, weight_decay only"):
        train_ensembles(*system(100), [config(), config(patience=2)])


# ---- seeds and settings ---------------------------------------------------------------------------------------------


def test_the_seed_decides_every_bit() -> None:
    reports: list[EpochReport] = []
    first = train_ensemble(*system(100), config(seed=5), reports.append)
    torch.manual_seed(99)  # the global generator has no part in it
    again = train_ensemble(*system(100), config(seed=5))
    other = train_ensemble(*system(100), config(seed=6))
    assert all(torch.equal(first.tensors[k], again.tensors[k]) for k in first.tensors)
    assert first.elites == again.elites
    assert not torch.equal(first.tensors["W0"], other.tensors["W0"])
    assert [r.epoch for r in reports] == list(range(5))


def test_members_and_seeds_start_apart() -> None:
    first, other = (EnsembleTrainer(*system(50), [config(seed=s)]).ensembles[0].tensors for s in (0, 1))
    for name in ("W0", "W1"):
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name][0], first[name][1])
    wide = EnsembleTrainer(*system(50), [config(hidden=[300], ensemble_size=7)]).ensembles[0].tensors
    for name, n_in in (("W0", 3), ("W1", 300)):
        std = 1 / (2 * math.sqrt(n_in))  # truncated at two of these
        assert wide[name].abs().max() <= 2 * std
        assert float(wide[name].std()) == pytest.approx(0.88 * std, rel=0.03)
    whole_config = config(hidden=[300], ensemble_size=7, initial_cut=math.inf)
    whole = EnsembleTrainer(*system(50), [whole_config]).ensembles[0]
    assert float(whole.tensors["W1"].std()) == pytest.approx(1 / (2 * math.sqrt(300)), rel=0.03)
    untrained = whole.untrained(whole_config.seed, math.inf)
    assert torch.equal(untrained.tensors["W1"], whole.tensors["W1"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_elites": 4}, r"dynamics\.num_elites=4 must lie in 1\.\.ensemble_size=3"),
        ({"num_elites": 0}, r"dynamics\.num_elites=0"),
        ({"initial_cut": 0.0}, r"dynamics\.initial_cut=0\.0 must be greater than 0"),
        ({"weight_decay": [1.0]}, r"dynamics\.weight_decay needs 2 values"),
        ({"holdout_fraction": 0.0}, r"dynamics\.holdout_fraction=0\.0"),
        ({"holdout_fraction": 1.0}, r"dynamics\.holdout_fraction=1\.0"),
        ({"max_holdout": 0}, r"dynamics\.max_holdout=0 must be greater than 0"),
        ({"learning_rate": 0.0}, r"dynamics\.learning_rate=0\.0 must be greater than 0"),
        ({"batch_size": 0}, r"dynamics\.batch_size=0 must"),
        ({"patience": 0}, r"dynamics\.patience=0 must"),
        ({"max_epochs": 0}, r"dynamics\.max_epochs=0 must"),
    ],
)
def test_a_bad_setting_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config(**changes)
