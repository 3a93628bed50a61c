"""A chunk of gradient updates of a pack: everything random drawn before it, nothing read from the device within it.

On a CPU the updates run one after the other as they are written (eager execution; see benchmarks/README.md for what was
measured against it). On CUDA an update, its minibatch's gather included, is captured once as a graph and replayed: the
host then only launches one graph per update.

An updater may take noise of its own beside that of the batch's actions, so much that an epoch's would not fit memory.
It is drawn a piece of the epoch at a time, by generators of its own and one call for every update of a member: so the
pieces' length, which depends on the pack, changes nothing.

Shapes: U update of the chunk, P update of a piece, K draw of normal numbers, M member, B batch row, A action, W width
of a row, Z numbers of an updater's own noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.profiler import record_function

from agents.graphs import WARM_UP, Capture, CaptureError, side_stream, warn_eager
from agents.randomness import generator
from agents.replay import Replay

METRICS_EVERY = 100  # updates between two looks at the statistics
PRECISIONS = ("float32", "mixed")
OWN_NOISE_BYTES = 64 << 20  # of an updater's own noise that is there at once, if an update does not take more


class Updater(Protocol):
    """Networks of a pack and one gradient update of all of them.

    For CUDA graphs `update` must be a function of tensors at fixed addresses: its state changes in place, and nothing
    in it looks at a value or takes data from the host.
    """

    @property
    def num_noises(self) -> int:
        """K, the standard normal draws `(M, B, A)` that an update takes."""

    @property
    def period(self) -> int:
        """After so many updates the computation repeats: 2 if the actor moves with every other one."""

    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False
    ) -> dict[str, Tensor] | None:
        """One gradient step of every member, in place.

        Args:
            rows_MBW: minibatches, columns `[s, a, r, d, s']` (see `agents.replay`).
            noise_KMBA: standard normal draws.
            turn: number of the update modulo `period`.
            with_metrics: also return statistics, each `(M,)` on the device.
        """


@runtime_checkable
class OwnNoiseUpdater(Protocol):
    """An `Updater` that can take further noise: unless `num_own_noises` is 0, `update` is called with it."""

    @property
    def num_own_noises(self) -> int:
        """Z, the standard normal numbers that an update of a member takes beside its K draws."""

    def update(
        self, rows_MBW: Tensor, noise_KMBA: Tensor, turn: int = 0, with_metrics: bool = False,
        own_noise_MZ: Tensor | None = None,
    ) -> dict[str, Tensor] | None: ...  # fmt: skip


class OwnNoise:
    """An updater's own noise for an epoch, one generator per member, update after update."""

    def __init__(self, seeds: Sequence[int], epoch: int, device: torch.device | str) -> None:
        self._sources = [generator(seed, "own noise", epoch, device=device) for seed in seeds]

    @record_function("batch drawing")
    def fill(self, noise_PMZ: Tensor) -> None:
        """Write the noise of the next P updates."""
        for noise_MZ in noise_PMZ:
            for noise_Z, source in zip(noise_MZ, self._sources, strict=True):
                noise_Z.normal_(generator=source)


def own_noise_updates(num_own_noises: int, num_members: int, num_updates: int) -> int:
    """P, the updates whose own noise is drawn at once."""
    return min(num_updates, max(1, OWN_NOISE_BYTES // (4 * num_own_noises * num_members)))


@record_function("batch drawing")
def draw_chunk(
    updater: Updater, replay: Replay, seeds: Sequence[int], epoch: int, num_updates: int, num_real: int,
    num_model: int, action_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What an epoch's updates draw, one generator per member: a member draws the same alone and in any pack.

    Returns:
        Row numbers `(U, M, num_real + num_model)` for `replay.gather` and noise `(U, K, M, B, A)`, on the device.
    """
    shape = (num_updates, updater.num_noises, num_real + num_model, action_dim)
    indices, noise = [], []
    for member, seed in enumerate(seeds):
        draw = generator(seed, "updates", epoch, device=replay.device)
        indices.append(replay.draw_indices(member, num_updates, num_real, num_model, draw))
        noise.append(torch.randn(shape, generator=draw, device=replay.device))
    return torch.stack(indices, 1), torch.stack(noise, 2)


class ChunkRunner:
    """Runs chunks of updates.

    Args:
        updater: the networks.
        replay: where the minibatches come from, on the updater's device.
        precision: "float32", or "mixed": matrix products of the updates round their inputs to bfloat16 (CPU) or TF32
            (CUDA) and add up in float32; parameters, losses and optimisers stay in float32.
        capture: how an update becomes a graph; None: every update is executed as it is written.
    """

    def __init__(
        self, updater: Updater, replay: Replay, precision: str = "float32", capture: Capture | None = None
    ) -> None:
        self.updater, self.replay, self.precision = updater, replay, precision
        self._capture = capture
        self._graphs: dict[tuple[int, bool], Callable[[], None]] = {}
        self._to_warm_up = WARM_UP * updater.period
        self._sums: dict[str, Tensor] = {}
        self._indices = self._noise = self._at = torch.empty(0)
        takes_own = isinstance(updater, OwnNoiseUpdater) and updater.num_own_noises > 0
        self._own_updater: OwnNoiseUpdater | None = updater if takes_own else None  # type: ignore[assignment]
        self._own_noise = torch.empty(0)  # (P, M, Z)

    def run_epoch(
        self, seeds: Sequence[int], epoch: int, num_updates: int, num_real: int, num_model: int, action_dim: int
    ) -> list[dict[str, float]]:
        """Draw an epoch's updates (see `draw_chunk` and `OwnNoise`) and run them; metrics `train/*` per member."""
        draws = draw_chunk(self.updater, self.replay, seeds, epoch, num_updates, num_real, num_model, action_dim)
        own = OwnNoise(seeds, epoch, self.replay.device) if self._own_updater is not None else None
        table = self.run(*draws, first_update=epoch * num_updates, own_noise=own)
        return [{f"train/{name}": value for name, value in row.items()} for row in table]

    def run(
        self, indices_UMB: Tensor, noise_UKMBA: Tensor, first_update: int, own_noise: OwnNoise | None = None
    ) -> list[dict[str, float]]:
        """All updates of a chunk; the mean of each statistic per member.

        Args:
            indices_UMB: row numbers for `replay.gather`.
            noise_UKMBA: the draws of each update.
            first_update: how many updates came before the chunk.
            own_noise: where the updater's own noise comes from, if it takes any.
        """
        num_updates, num_members = indices_UMB.shape[:2]
        period, looks = self.updater.period, 0
        self._place(indices_UMB, noise_UKMBA)
        with matrix_precision(self.precision):
            for i in range(num_updates):
                turn = (first_update + i) % period
                # at the end of a period, when every network has moved
                due = (i + 1) // METRICS_EVERY > max(i + 1 - period, 0) // METRICS_EVERY
                look = turn == period - 1 and (due or i + period >= num_updates)
                looks += look
                if own_noise is not None and i % len(self._own_noise) == 0:
                    own_noise.fill(self._own_noise[: num_updates - i])
                self._one(i, turn, look)
        if not looks:
            return [{} for _ in range(num_members)]
        names = sorted(self._sums)
        table = (torch.stack([self._sums[name] for name in names], 1) / looks).tolist()  # the chunk's one transfer
        return [dict(zip(names, row, strict=True)) for row in table]

    def _place(self, indices_UMB: Tensor, noise_UKMBA: Tensor) -> None:
        """Put the draws where the graphs expect them."""
        if self._capture is not None and self._indices.shape == indices_UMB.shape:
            self._indices.copy_(indices_UMB)
            self._noise.copy_(noise_UKMBA)
            self._at.zero_()
        else:
            self._indices, self._noise = indices_UMB, noise_UKMBA
            self._at = torch.zeros(1, dtype=torch.int64, device=indices_UMB.device)
            self._graphs.clear()
            if self._own_updater is not None:
                num_updates, num_members, _ = indices_UMB.shape
                width = self._own_updater.num_own_noises
                shape = (own_noise_updates(width, num_members, num_updates), num_members, width)
                if self._own_noise.shape != shape:
                    self._own_noise = torch.empty(shape, device=indices_UMB.device)
        for total in self._sums.values():
            total.zero_()

    def _one(self, i: int, turn: int, look: bool) -> None:
        if self._capture is None:
            own = self._own_noise[i % len(self._own_noise)] if self._own_updater is not None else None
            self._add(self._update(self._indices[i], self._noise[i], turn, look, own))
        elif (turn, look) in self._graphs:
            self._graphs[turn, look]()
        elif self._to_warm_up:
            self._to_warm_up -= 1
            with side_stream(self.replay.device):
                self._update_at_counter(turn, look, allocate=True)
        else:
            try:
                self._graphs[turn, look] = self._capture(lambda: self._update_at_counter(turn, look))
            except CaptureError as error:  # nothing of the update has been executed
                warn_eager(error)
                self._capture = None
                self._one(i, turn, look)

    def _update(
        self, indices_MB: Tensor, noise_KMBA: Tensor, turn: int, look: bool, own_noise_MZ: Tensor | None
    ) -> dict[str, Tensor] | None:
        rows = self.replay.gather(indices_MB)
        if self._own_updater is None:
            return self.updater.update(rows, noise_KMBA, turn, look)
        return self._own_updater.update(rows, noise_KMBA, turn, look, own_noise_MZ)

    def _update_at_counter(self, turn: int, look: bool, allocate: bool = False) -> None:
        """The update whose number stands on the device."""
        indices, noise = (x.index_select(0, self._at).squeeze(0) for x in (self._indices, self._noise))
        own = None
        if self._own_updater is not None:
            own = self._own_noise.index_select(0, self._at % len(self._own_noise)).squeeze(0)
        metrics = self._update(indices, noise, turn, look or allocate, own)
        if allocate and metrics is not None:
            for name, value in metrics.items():
                self._sums.setdefault(name, torch.zeros_like(value))
        if look:
            self._add(metrics)
        self._at.add_(1)

    def _add(self, metrics: dict[str, Tensor] | None) -> None:
        for name, value in (metrics or {}).items():
            if name in self._sums:
                self._sums[name].add_(value)
            else:
                self._sums[name] = value.clone()


@contextlib.contextmanager
def matrix_precision(precision: str) -> Iterator[None]:
    """Matrix products in "float32" or "mixed" precision; what was set before comes back."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; one of {', '.join(PRECISIONS)}")
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    cuda: Any = torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = ("bf16", "tf32") if precision == "mixed" else ("ieee", "ieee")
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
