"""The written-out gradients of a stack against autograd, and its storage: views, copies, members."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from agents.networks import (
    INITIALISATIONS,
    StackedLayerNormMLP,
    StackedMLP,
    StackedScalar,
    StackedVector,
    gather_members,
    initialise,
)
from agents.randomness import generator

LEAD, BATCH = (2, 3), 8
G = 6


def stack(sizes: Sequence[int] = (5, 7, 4, 2), lead: Sequence[int] = LEAD) -> StackedMLP:
    network = StackedMLP(lead, sizes)
    network.flat.normal_(generator=torch.Generator().manual_seed(0))
    return network


def recorded(network: StackedMLP, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, weights, biases and hidden pre-activations of a plain ReLU network, with a graph."""
    weights = [w.clone().requires_grad_() for w in network.weights]
    biases = [b.clone().requires_grad_() for b in network.biases]
    hidden = []
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        hidden.append(x @ w + b)
        hidden[-1].retain_grad()
        x = torch.relu(hidden[-1])
    return x @ weights[-1] + biases[-1], weights, biases, hidden


def grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("outputs", [1, 2])
def test_every_gradient_is_autograds(outputs: int) -> None:
    network = stack((5, 7, 4, outputs))
    x = torch.randn(G, BATCH, 5, requires_grad=True)
    out, weights, biases, hidden = recorded(network, x)
    grad_out = torch.randn(G, BATCH, outputs)
    (out * grad_out).sum().backward()

    with torch.no_grad():
        mine, inputs = network.forward(x)
        deltas = network.hidden_gradients(inputs, grad_out)
        network.write_gradients(inputs, deltas, grad_out)
    torch.testing.assert_close(mine, out)
    for delta, z in zip(deltas, hidden, strict=True):
        torch.testing.assert_close(delta, grad(z))
    torch.testing.assert_close(network.input_gradient(deltas[0], 2, 4), grad(x)[..., 2:4])
    expected = torch.cat([grad(t).reshape(-1) for pair in zip(weights, biases, strict=True) for t in pair])
    torch.testing.assert_close(network.grad, expected, rtol=1e-4, atol=1e-5)


def test_parameters_and_gradients_live_in_one_vector_each() -> None:
    network = StackedMLP(LEAD, (5, 7, 2))
    assert len(network.flat) == G * (5 * 7 + 7 + 7 * 2 + 2)
    assert [tuple(w.shape) for w in network.weights] == [(6, 5, 7), (6, 7, 2)]
    assert [tuple(b.shape) for b in network.biases] == [(6, 1, 7), (6, 1, 2)]
    network.flat.fill_(3.0)
    network.grad.fill_(4.0)
    assert all((t == 3.0).all() for t in (*network.weights, *network.biases))
    assert all((t == 4.0).all() for t in (*network.weight_grads, *network.bias_grads))
    assert [tuple(b.shape) for b in network.blocks(network.flat)] == [(2, 3, 35), (2, 3, 7), (2, 3, 14), (2, 3, 2)]


def test_a_clone_does_not_follow() -> None:
    network = stack()
    other = network.clone()
    before = network.flat.clone()
    network.flat.add_(1.0)
    assert torch.equal(other.flat, before)
    x = torch.randn(G, BATCH, 5)
    assert not torch.equal(other.forward(x)[0], network.forward(x)[0])


def test_selected_members_compute_what_they_did_in_the_stack() -> None:
    network = stack(lead=(4, 3))
    part = network.select([3, 1])
    x = torch.randn(1, BATCH, 5)
    whole = network.forward(x.expand(12, -1, -1))[0].view(4, 3, BATCH, 2)
    torch.testing.assert_close(part.forward(x.expand(6, -1, -1))[0].view(2, 3, BATCH, 2), whole[[3, 1]])
    network.flat.zero_()
    assert part.flat.abs().max() > 0


def test_gathered_vectors_follow_the_layout_of_the_parameters() -> None:
    """An optimiser's moments move with their members: block by block, not as one contiguous piece."""
    network = stack(lead=(3,))
    for m in range(3):
        for block in network.blocks(network.grad):
            block[m] = m
    part = network.select([2, 0])
    gather_members(network, network.grad, part, part.grad, [2, 0])
    for block in part.blocks(part.grad):
        assert (block[0] == 2).all()
        assert (block[1] == 0).all()


def test_scalars_have_one_value_per_member() -> None:
    scalar = StackedScalar(3, 0.5)
    scalar.flat[1] = 7.0
    assert scalar.select([1, 2]).flat.tolist() == [7.0, 0.5]
    assert tuple(scalar.blocks(scalar.flat)[0].shape) == (3, 1)


def test_vectors_belong_to_members() -> None:
    vector = StackedVector(3, 2, 0.5)
    vector.flat[2:4] = torch.tensor([7.0, 8.0])
    assert vector.select([1, 2]).flat.tolist() == [7.0, 8.0, 0.5, 0.5]
    assert tuple(vector.blocks(vector.flat)[0].shape) == (3, 2)


def test_one_network_of_each_member_shares_its_storage() -> None:
    network = StackedMLP((3, 2), (5, 8, 1))
    network.flat.normal_(generator=torch.Generator().manual_seed(0))
    second, x = network.of_each_member(1), torch.randn(3, 4, 5)
    both = network.forward(x.repeat_interleave(2, dim=0))[0].view(3, 2, 4, 1)
    torch.testing.assert_close(second.forward(x)[0], both[:, 1])
    network.flat.zero_()
    assert (second.forward(x)[0] == 0).all()


def test_a_network_needs_a_hidden_layer() -> None:
    with pytest.raises(ValueError, match="at least one hidden layer"):
        StackedMLP((1,), (5, 2))


# ---- initialisation -------------------------------------------------------------------------------------------------


def drawn(seeds: Sequence[int], scheme: str) -> StackedMLP:
    network = StackedMLP((len(seeds), 50), (4, 64, 16, 2))
    initialise(network, [generator(s, "init") for s in seeds], scheme=scheme, last_bound=3e-3)
    return network


@pytest.mark.parametrize(
    ("scheme", "bounds"),
    [
        ("torch", (1 / math.sqrt(4), 1 / math.sqrt(64), 1 / math.sqrt(16))),
        ("edac-fan-in", (1 / math.sqrt(4), 1 / math.sqrt(64), 3e-3)),
        # the released RAVL's weights are bounded by their output width: 1/sqrt(64), 1/sqrt(16)
        ("edac", (1 / math.sqrt(64), 1 / math.sqrt(16), 3e-3)),
    ],
)
def test_weights_are_uniform_within_the_bounds_of_the_scheme(scheme: str, bounds: tuple[float, ...]) -> None:
    network = drawn([0], scheme)
    for weight, bound in zip(network.weights, bounds, strict=True):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    last = network.biases[-1].abs().max()
    assert 0.9 * bounds[-1] < last <= bounds[-1]
    for bias, bound in zip(network.biases[:-1], bounds, strict=False):
        if scheme == "torch":
            assert 0.9 * bound < bias.abs().max() <= bound
        else:
            assert (bias == 0.1).all()


def test_orthogonal_weights_keep_lengths_times_the_square_root_of_two() -> None:
    network = drawn([0], "orthogonal")
    for weight in network.weights:  # (in, out): rows or columns, whichever are fewer
        short = weight if weight.shape[1] <= weight.shape[2] else weight.mT
        expected = 2 * torch.eye(short.shape[1]).expand(50, -1, -1)
        torch.testing.assert_close(short @ short.mT, expected, atol=1e-4, rtol=1e-4)
    assert all((bias == 0).all() for bias in network.biases)


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_a_member_starts_the_same_in_every_pack(scheme: str) -> None:
    pack = drawn([5, 6, 7], scheme)
    assert torch.equal(pack.select([1]).flat, drawn([6], scheme).flat)
    assert not torch.equal(pack.select([0]).flat, pack.select([1]).flat)
    networks = pack.weights[0].view(3, 50, 4, 64)
    assert not torch.equal(networks[0, 0], networks[0, 1])  # the critics of a member differ too


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match="unknown initialisation 'xavier'; one of edac, edac-fan-in, torch"):
        initialise(stack(), [torch.Generator()] * 2, scheme="xavier", last_bound=1.0)


def test_a_pickled_stack_is_as_large_as_its_parameters_and_computes_the_same() -> None:
    stack = StackedMLP((2,), (5, 64, 64, 3))
    initialise(stack, [torch.Generator().manual_seed(m) for m in range(2)], scheme="torch", last_bound=1.0)
    content = pickle.dumps(stack)
    assert len(content) < 4 * stack.flat.numel() + 5_000
    copy = pickle.loads(content)
    x = torch.randn(2, 7, 5)
    assert torch.equal(copy.forward(x)[0], stack.forward(x)[0])
    copy.flat.zero_()  # parameters and layers are one storage again
    assert not copy.forward(x)[0].any()


# ---- layer normalisation -------------------------------------------------------------------------------------------


def normalised(lead: Sequence[int] = LEAD, sizes: Sequence[int] = (5, 7, 4, 1)) -> StackedLayerNormMLP:
    network = StackedLayerNormMLP(lead, sizes)
    network.flat.normal_(generator=torch.Generator().manual_seed(0))
    return network


@pytest.mark.parametrize("outputs", [1, 2])
def test_gradients_of_a_normalised_network_are_autograds(outputs: int) -> None:
    network = normalised(sizes=(5, 7, 4, outputs))
    x, grad_out = torch.randn(G, BATCH, 5, requires_grad=True), torch.randn(G, BATCH, outputs)
    flat = network.flat.clone().requires_grad_()
    weights, biases = network._views(flat)
    scales, shifts = network._norm_views(flat)
    h = x
    for w, b, scale, shift in zip(weights[:-1], biases[:-1], scales, shifts, strict=True):
        h = torch.nn.functional.layer_norm(torch.relu(h @ w + b), w.shape[-1:], eps=1e-6) * scale + shift
    out = h @ weights[-1] + biases[-1]
    (out * grad_out).sum().backward()

    with torch.no_grad():
        mine, inputs = network.forward(x)
        deltas = network.hidden_gradients(inputs, grad_out)
        network.write_gradients(inputs, deltas, grad_out)
    torch.testing.assert_close(mine, out)
    torch.testing.assert_close(network.input_gradient(deltas[0], 2, 4), grad(x)[..., 2:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.grad, grad(flat), rtol=1e-4, atol=1e-4)


def test_a_normalised_network_starts_with_scales_of_one_and_keeps_its_members() -> None:
    fresh = StackedLayerNormMLP(LEAD, (5, 7, 4, 1))
    assert all(bool((scale == 1).all()) for scale in fresh.scales)
    assert all(bool((shift == 0).all()) for shift in fresh.shifts)
    network, x = normalised(), torch.randn(G, BATCH, 5)
    out = network.forward(x)[0]
    for copied in (network.clone(), pickle.loads(pickle.dumps(network))):
        assert isinstance(copied, StackedLayerNormMLP)
        assert torch.equal(copied.forward(x)[0], out)
    torch.testing.assert_close(network.select([1]).forward(x[3:])[0], out[3:])
    torch.testing.assert_close(network.of_each_member(2).forward(x[2::3])[0], out[2::3])
    assert len(network.blocks(network.flat)) == 10
    assert sum(block.numel() for block in network.blocks(network.flat)) == network.flat.numel()


def test_lecun_weights_have_the_variance_of_their_inputs_and_are_cut() -> None:
    network = StackedMLP((1, 4), (100, 200, 50))
    initialise(network, [generator(0, "init")], scheme="lecun", last_bound=0.0)
    for weight, bias in zip(network.weights, network.biases, strict=True):
        std = weight.shape[1] ** -0.5
        assert float(weight.std()) == pytest.approx(std, rel=0.02)
        assert float(weight.abs().max()) <= 2 * std / 0.8796 + 1e-6
        assert not bias.any()
