"""The target dynamics beside the released VGDF's, alone and in a pack, resumed, and in each schedule.

`golden/target_dynamics.npz` holds what Kavka1/VGDF at commit 9f65d60 computes (torch 2.13, CPU, float32) for the inputs
of `drawn`: `EnsembleDynamicsModel(3, 2, 4, 2, 1, 16, use_decay=True)` with parameters set to those, the loss with
`get_decay_loss` of one batch and its gradients, then `train` on the first 300 rows with patience 5 and on all 340 with
patience 3, numpy's generator seeded with 90 and 91 (holdout ratio 0.1, batches of 256): every epoch's holdout errors,
and `predict` after each. Its permutations are numpy's, so the test hands those to the refits.
"""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import target_dynamics
from agents.target_dynamics import TargetDynamics, TargetDynamicsConfig
from envs.errors import UserError
from tests.agents.golden_values import close, fill

GOLDEN = Path(__file__).parent / "golden" / "target_dynamics.npz"
OBS, ACT, SIZE, WIDTH = 4, 2, 3, 16


def drawn() -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, rows [s, a, r, d, s'] of a system that can be learnt, a minibatch's row numbers, and queries."""
    rng, layers = np.random.RandomState(71), []
    sizes = (OBS + ACT, *[WIDTH] * 4, 2 * (OBS + 1))
    for n_in, n_out in pairwise(sizes):
        layers.append((rng.standard_normal((SIZE, n_in, n_out)) / (2 * np.sqrt(n_in))).astype(np.float32))
        layers.append((0.1 * rng.standard_normal((SIZE, 1, n_out))).astype(np.float32))
    obs, action = rng.standard_normal((340, OBS)), np.tanh(rng.standard_normal((340, ACT)))
    mix = rng.standard_normal((OBS + ACT, OBS + 1))
    out = np.tanh(np.concatenate((obs, action), 1) @ mix) * 0.5 + 0.1 * rng.standard_normal((340, OBS + 1))
    rows = np.concatenate((obs, action, out[:, :1], np.zeros((340, 1)), obs + out[:, 1:]), 1).astype(np.float32)
    return layers, rows, rng.randint(0, 340, (SIZE, 32)), rng.standard_normal((20, OBS + ACT)).astype(np.float32)


ROWS, QUERY = (torch.from_numpy(x) for x in (drawn()[1], drawn()[3]))


def settings(**changes: Any) -> TargetDynamicsConfig:
    return TargetDynamicsConfig(**{"ensemble_size": SIZE, "hidden": [WIDTH] * 4, "batch_size": 64, **changes})


def ensembles(*seeds: int, **changes: Any) -> TargetDynamics:
    return TargetDynamics(settings(**changes), seeds, OBS, ACT)


def golden_ensemble() -> TargetDynamics:
    made = ensembles(0, batch_size=256)
    fill(made.networks, drawn()[0])
    return made


# ---- beside the released code ---------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_the_released_code() -> None:
    golden, made, batch = np.load(GOLDEN), golden_ensemble(), torch.from_numpy(drawn()[2])
    targets = torch.cat((ROWS[:, 6:7], ROWS[:, 8:] - ROWS[:, :OBS]), 1)
    loss_G = made._training.write_gradients(ROWS[:, : OBS + ACT][batch], targets[batch])
    assert float(loss_G.sum()) == pytest.approx(float(golden["loss"]), rel=1e-5)
    nets = made.networks
    for i, decay in enumerate(made.config.weight_decay):
        close(nets.weight_grads[i] + decay * nets.weights[i], golden[f"grad{2 * i}"], 1e-5, f"weights {i}")
        close(nets.bias_grads[i], golden[f"grad{2 * i + 1}"], 1e-5, f"biases {i}")


def test_refits_are_those_of_the_released_code(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, made = np.load(GOLDEN), golden_ensemble()
    errors: list[list[float]] = []
    watched = target_dynamics._Watch.after_epoch

    def noted(watch: Any, mse_E: list[float], steps: int) -> tuple[list[bool], bool]:
        errors.append(mse_E)
        return watched(watch, mse_E, steps)

    monkeypatch.setattr(target_dynamics._Watch, "after_epoch", noted)
    # patience is 5 at t = 0 and 3 at t = 300,000
    for i, (count, t) in enumerate(((300, 0), (340, 300_000))):
        rng = np.random.RandomState(90 + i)

        def permutation(n: int, generator: torch.Generator, rng: np.random.RandomState = rng) -> Tensor:
            return torch.from_numpy(rng.permutation(n))

        errors.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randperm", permutation)
            (metrics,) = made.refit([ROWS[:count]], t)
        assert metrics["dynamics/epochs"] == len(golden[f"holdout{i}"]) == len(errors)
        assert metrics["dynamics/gradient_steps"] == 2 * len(errors)
        close(torch.tensor(errors), golden[f"holdout{i}"], 1e-5, f"holdout errors {i}")
        assert metrics["dynamics/holdout_mse"] == pytest.approx(golden[f"holdout{i}"][-1].mean(), rel=1e-4)
        mean, variance = made.predict(QUERY.unsqueeze(0))
        close(mean, golden[f"mean{i}"], 1e-5, f"mean {i}")
        close(variance, golden[f"var{i}"], 1e-4, f"variance {i}")


# ---- when a refit ends, and what it leaves --------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "epochs"), [(0, 7), (149_999, 7), (150_000, 6), (750_000, 2), (2_000_000, 2)])
def test_without_any_improvement_a_refit_takes_patience_and_two_epochs(t: int, epochs: int) -> None:
    watch, taken = target_dynamics._Watch(settings(), t), 1
    while not watch.after_epoch([0.3, 0.2, 0.4], 1)[1]:
        taken += 1
    assert taken == watch.epochs == epochs


def test_one_network_that_improves_by_more_than_a_hundredth_is_enough() -> None:
    watch = target_dynamics._Watch(settings(patience=1), 0)
    errors = [[1.0, 1.0], [0.995, 1.0], [0.988, 1.0], [0.98, 1.2], [0.979, 0.9901]]
    assert [watch.after_epoch(e, 1) for e in errors] == [
        ([True, True], False), ([False, False], False), ([True, False], False), ([False, False], False),
        ([False, False], True),
    ]  # fmt: skip


def test_an_error_that_is_not_finite_is_no_improvement() -> None:
    watch = target_dynamics._Watch(settings(patience=0), 0)
    assert watch.after_epoch([float("nan"), float("inf")], 1) == ([False, False], True)


def test_the_cheaper_schedules_take_the_steps_they_say() -> None:
    (once,) = ensembles(3, schedule="one-epoch").refit([ROWS], 0)
    assert (once["dynamics/epochs"], once["dynamics/gradient_steps"]) == (1, 5)  # 306 rows in batches of 64
    (fixed,) = ensembles(3, schedule="fixed-steps", steps=12).refit([ROWS], 0)
    assert (fixed["dynamics/epochs"], fixed["dynamics/gradient_steps"]) == (3, 12)


def test_too_few_rows_leave_the_ensemble_as_it_is() -> None:
    made = ensembles(3, 4, schedule="one-epoch")
    before = made.networks.flat.clone()
    assert made.refit([ROWS[:9], ROWS[:0]], 0) == [{}, {}]
    assert not made.fitted
    assert torch.equal(made.networks.flat, before)
    assert made.refit([ROWS[:10], ROWS[:9]], 250)[0]["dynamics/rows"] == 10
    assert not made.fitted  # one of them is not
    made.refit([ROWS[:10], ROWS[:10]], 500)
    assert made.fitted


def test_a_refit_is_due_once_the_source_holds_a_batch() -> None:
    made = ensembles(3, batch_size=256)
    assert [made.due(t, rows) for t, rows in ((0, 1), (250, 251), (500, 501), (501, 502))] == [
        False,
        False,
        True,
        False,
    ]
    assert made.due(0, 1_000_000)


def test_the_best_weights_come_back_if_that_is_asked_for() -> None:
    changes: dict[str, Any] = {"patience": 6, "learning_rate": 0.02}  # which overshoots
    last, best = ensembles(3, **changes), ensembles(3, **changes, restore_best=True)
    (of_last,), (of_best,) = last.refit([ROWS], 0), best.refit([ROWS], 0)
    assert of_best == of_last  # which are those of the last epoch
    split = torch.randperm(len(ROWS), generator=target_dynamics.generator(3, "target dynamics split", 0))
    data = target_dynamics._Rows(best.config, OBS, ACT, [ROWS], [split])
    errors_last, errors_best = (made._training.holdout_mse(data)[0] for made in (last, best))
    assert float(errors_last.mean()) == pytest.approx(of_last["dynamics/holdout_mse"], rel=1e-5)
    assert (errors_best <= errors_last * 1.0101).all()
    assert float(errors_best.mean()) < 0.98 * float(errors_last.mean())


def test_weights_begin_as_the_release_draws_them_or_cut() -> None:
    drawn_weights, cut = (ensembles(*range(8), initialisation=scheme).networks.weights for scheme in
                          ("normal", "truncated"))  # fmt: skip
    for plain, bounded in zip(drawn_weights, cut, strict=True):
        std = 1 / (2 * plain.shape[1] ** 0.5)
        assert plain.abs().max() > 2.5 * std
        assert 1.5 * std < bounded.abs().max() <= 2 * std


# ---- packs, resumes, copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_member_of_a_pack_is_fitted_as_it_is_alone(precision: str) -> None:
    seeds, rows = (3, 4, 5), [ROWS[:200], ROWS[100:300], ROWS[:150]]
    changes: dict[str, Any] = {"precision": precision, "patience": 1, "learning_rate": 5e-3}
    if precision == "mixed":  # else its rounding, another one in a pack, decides after which epoch a fit ends
        changes |= {"schedule": "fixed-steps", "steps": 20}
    pack = ensembles(*seeds, **changes)
    together = [pack.refit(rows, t) for t in (0, 250)]
    epochs = [m["dynamics/epochs"] for m in together[0]]
    assert precision == "mixed" or len(set(epochs[:2])) == 2, "the two with as many rows must end apart"
    tolerance = 1e-4 if precision == "float32" else 3e-2
    for m, seed in enumerate(seeds):
        alone = ensembles(seed, **changes)
        for values, t in zip(together, (0, 250), strict=True):
            (metrics,) = alone.refit([rows[m]], t)
            assert metrics["dynamics/epochs"] == values[m]["dynamics/epochs"]
            assert metrics["dynamics/holdout_mse"] == pytest.approx(values[m]["dynamics/holdout_mse"], rel=tolerance)
        mean, variance = alone.predict(QUERY.unsqueeze(0))
        in_pack = [x[m] for x in pack.predict(QUERY.expand(3, -1, -1))]
        torch.testing.assert_close(mean[0], in_pack[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(variance[0], in_pack[1], rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_resumed_ensemble_goes_on_bit_for_bit(precision: str) -> None:
    changes: dict[str, Any] = {"precision": precision, "patience": 1, "restore_best": True}
    undisturbed = ensembles(3, 4, **changes)
    undisturbed.refit([ROWS[:200], ROWS[:200]], 0)
    state = pickle.loads(pickle.dumps(undisturbed.state_dict()))
    resumed = ensembles(3, 4, **changes)
    resumed.load_state_dict(state)
    assert resumed.fitted
    queries = QUERY.expand(2, -1, -1)
    for a, b in zip(undisturbed.predict(queries), resumed.predict(queries), strict=True):
        assert torch.equal(a, b)
    assert undisturbed.refit([ROWS, ROWS], 250) == resumed.refit([ROWS, ROWS], 250)
    for a, b in zip(undisturbed.predict(queries), resumed.predict(queries), strict=True):
        assert torch.equal(a, b)


def test_selected_members_go_on_as_they_were() -> None:
    pack = ensembles(3, 4, 5, schedule="one-epoch")
    pack.refit([ROWS, ROWS[:200], ROWS[:100]], 0)
    some = pack.select([2, 0])
    assert some.seeds == [5, 3]
    query = QUERY.expand(3, -1, -1)
    torch.testing.assert_close(some.predict(query[:2])[0], pack.predict(query)[0][[2, 0]], rtol=1e-5, atol=1e-6)
    pack.refit([ROWS] * 3, 250)
    some.refit([ROWS] * 2, 250)
    torch.testing.assert_close(some.predict(query[:2])[0], pack.predict(query)[0][[2, 0]], rtol=1e-4, atol=1e-5)


def test_mixed_precision_fits_as_well() -> None:
    errors = []
    for precision in ("float32", "mixed"):
        made = ensembles(3, precision=precision)
        errors.append(made.refit([ROWS], 0)[0]["dynamics/holdout_mse"])
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert errors[0] < 0.1  # outputs vary by 0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ensemble_size", 1), ("schedule", "none"), ("precision", "half"), ("weight_decay", [0.0]), ("steps", 0),
        ("holdout_fraction", 1.0), ("initialisation", "xavier"), ("patience", -1),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"method.dynamics.{name}"):
        settings(**{name: value})
