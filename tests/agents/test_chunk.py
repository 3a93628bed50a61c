"""Chunks of updates: eager, as a graph, in mixed precision, and on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.chunk import METRICS_EVERY, ChunkRunner, draw_chunk, matrix_precision
from agents.graphs import CaptureError
from agents.replay import Replay
from agents.sac import SAC, SACHyperparameters, SACSettings
from tests.agents.devices import no_host, recorded_graph

OBS, ACT, ROWS, BATCH = 5, 2, 200, 16


def sac(num_members: int = 2, eta: float = 0.5, device: str = "cpu") -> SAC:
    settings = SACSettings(num_critics=3, actor_hidden=(16, 16), critic_hidden=(16, 16), max_alpha=0.9)
    hyper = [SACHyperparameters(eta=eta, actor_lr=1e-3 * (m + 1)) for m in range(num_members)]
    return SAC(range(num_members), hyper, settings, OBS, ACT, device)


def replay(num_members: int = 2, device: str = "cpu") -> Replay:
    rows = torch.randn(ROWS, 2 * OBS + ACT + 2, generator=torch.Generator().manual_seed(0))
    return Replay(rows, num_members, 0, device)


def chunk(updater: Any, rows: Replay, epoch: int, updates: int) -> tuple[Tensor, Tensor]:
    return draw_chunk(updater, rows, range(rows.num_members), epoch, updates, BATCH, 0, ACT)


def parameters(learner: SAC) -> Tensor:
    return torch.cat((learner.actor.flat, learner.critic.flat, learner.target.flat, learner.log_alpha.flat))


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_graph_ends_with_the_bits_of_eager_execution(eta: float) -> None:
    eager, graph = sac(eta=eta), sac(eta=eta)
    rows = replay()
    runners = ChunkRunner(eager, rows), ChunkRunner(graph, rows, capture=recorded_graph)
    updates = METRICS_EVERY + 30
    for epoch in range(3):
        draws = chunk(eager, rows, epoch, updates)
        metrics = [runner.run(*draws, first_update=epoch * updates) for runner in runners]
        assert metrics[0] == metrics[1]
        assert torch.equal(parameters(eager), parameters(graph))
    assert len(runners[1]._graphs) == 2  # with and without statistics
    assert not torch.equal(parameters(eager), parameters(sac(eta=eta)))


def test_what_cannot_be_captured_is_executed_as_written() -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        raise CaptureError("operation not permitted")

    eager, refused = sac(), sac()
    rows = replay()
    draws = chunk(eager, rows, 0, 10)
    with pytest.warns(UserWarning, match="operation not permitted"):
        metrics = ChunkRunner(refused, rows, capture=refuse).run(*draws, first_update=0)
    assert metrics == ChunkRunner(eager, rows).run(*draws, first_update=0)
    assert torch.equal(parameters(eager), parameters(refused))


class Counting:
    """Adds the mean of its noise to a number, and says at which turn it was asked for statistics."""

    num_noises, period = 1, 2

    def __init__(self) -> None:
        self.total = torch.zeros(1)
        self.looks: list[int] = []

    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False
    ) -> dict[str, Tensor] | None:
        self.total += noise_KMBA.mean()
        if with_metrics:
            self.looks.append(turn)
        return {"total": self.total} if with_metrics else None


def test_statistics_are_taken_when_every_network_has_moved() -> None:
    counting, rows = Counting(), replay(1)
    metrics = ChunkRunner(counting, rows).run(*chunk(counting, rows, 0, 2 * METRICS_EVERY + 1), first_update=0)
    assert counting.looks == [1, 1]  # the second one is also the chunk's last
    assert [row.keys() for row in metrics] == [{"total"}]
    # a chunk that ends in the middle of a period goes on there
    ChunkRunner(counting, rows).run(*chunk(counting, rows, 1, 3), first_update=1)
    assert counting.looks == [1, 1, 1]


def test_a_member_draws_the_same_in_every_pack() -> None:
    learner = sac(2)
    together = chunk(learner, replay(2), 4, 3)
    alone = draw_chunk(learner, replay(1), [1], 4, 3, BATCH, 0, ACT)
    for pack, single in zip(together, alone, strict=True):
        member = pack[:, 1:] if pack is together[0] else pack[:, :, 1:]
        assert torch.equal(member, single)


def test_an_update_never_needs_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = sac(device="meta")
    learner.actor_optim.scale_rates(0.5)
    assert isinstance(learner.actor_optim._groups[0].rate, Tensor)  # so that a graph can be told another one
    rows = torch.empty(2, BATCH, 2 * OBS + ACT + 2, device="meta")
    noise = torch.empty(2, 2, BATCH, ACT, device="meta")
    with no_host(monkeypatch):
        metrics = learner.update(rows, noise, 0, True)
    assert metrics is not None
    assert {value.device.type for value in metrics.values()} == {"meta"}


def test_mixed_precision_rounds_the_products_and_nothing_else() -> None:
    x, y = (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    exact = x @ y
    with matrix_precision("mixed"):
        rounded = x @ y
    assert torch.equal(x @ y, exact)  # as before again
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert error < 2e-2
    if torch.cpu._is_amx_tile_supported():  # oneDNN rounds on these processors only
        assert error > 1e-4


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="float32, mixed"), matrix_precision("half"):
        pass
