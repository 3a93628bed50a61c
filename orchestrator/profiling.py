"""Where the time of one epoch goes: a trace for Perfetto and a table by phase and by operator."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from envs.files import write_atomically
from orchestrator.artifacts import write_text

EPOCH = "epoch"
PHASES = ("rollouts", "batch drawing", "updates", "evaluation", "checkpoint", "logging")
"""Names of the ranges (`torch.profiler.record_function`) that an epoch is divided into. They may be nested: a phase has
the time that no phase inside it has."""

TRACE, TABLE = "trace.json.gz", "table.txt"
OPERATORS = 25  # rows of the table


@dataclass(frozen=True)
class Span:
    """Something that the profiler has seen on one thread or one device; times in nanoseconds."""

    name: str
    start: int
    duration: int
    lane: tuple[str, int]  # ("cpu", thread) or ("device", its number)
    flops: int = 0
    annotation: bool = False  # a range of the program, not an operator


@dataclass
class Share:
    """What spans of one name have in common."""

    calls: int = 0
    seconds: float = 0.0  # without the spans inside them
    flops: int = 0


def self_times(spans: Iterable[Span]) -> dict[str, Share]:
    """The time spent in spans of each name, less that of the spans inside them on the same lane."""
    shares: dict[str, Share] = {}
    open_spans: list[Span] = []
    lane: tuple[str, int] | None = None
    # where two begin at once, the longer one is around the other
    for span in sorted(spans, key=lambda s: (s.lane, s.start, -s.duration)):
        if span.lane != lane:
            open_spans, lane = [], span.lane
        while open_spans and open_spans[-1].start + open_spans[-1].duration <= span.start:
            open_spans.pop()
        if open_spans:
            shares[open_spans[-1].name].seconds -= span.duration / 1e9
        share = shares.setdefault(span.name, Share())
        share.calls += 1
        share.seconds += span.duration / 1e9
        share.flops += span.flops
        open_spans.append(span)
    return shares


class EpochProfile:
    """Profiles what runs inside its `with` statement, which is one epoch.

    Args:
        device: the learner's; on a GPU its kernels are profiled, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
        self._profiler = profile(activities=activities, with_flops=True)
        self._epoch = record_function(EPOCH)

    def __enter__(self) -> EpochProfile:
        self._profiler.__enter__()
        self._epoch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._epoch.__exit__(kind, error, at)
        self._profiler.__exit__(kind, error, at)

    def write(self, folder: Path, title: Sequence[str]) -> list[Path]:
        """Write trace and table, the table last; returns their paths.

        Args:
            title: lines above the table.
        """

        def export(path: Path) -> None:
            plain = path.with_name(path.name + ".json")
            try:
                self._profiler.export_chrome_trace(str(plain))
                # level 1 makes a file a quarter larger than the default level, in a fraction of its time
                with open(plain, "rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            finally:
                plain.unlink(missing_ok=True)

        spans = self._spans()
        write_atomically(folder / TRACE, export)
        write_text(folder / TABLE, "\n".join([*title, "", *table_lines(spans)]) + "\n")
        return [folder / TRACE, folder / TABLE]

    def _spans(self) -> list[Span]:
        # what torch's own tables are made from: making those takes a minute for an epoch of 1,000 updates
        assert self._profiler.profiler is not None
        results: Any = self._profiler.profiler.kineto_results
        spans = []
        for e in results.events():
            on_cpu = e.device_type() == torch.autograd.DeviceType.CPU
            lane = ("cpu", e.start_thread_id()) if on_cpu else ("device", e.device_index())
            spans.append(Span(e.name(), e.start_ns(), e.duration_ns(), lane, e.flops(), e.is_user_annotation()))
        return spans


def table_lines(spans: Sequence[Span]) -> list[str]:
    """The table of an epoch: its phases, then the operators and the GPU's kernels with the most time of their own."""
    on_cpu = [s for s in spans if s.lane[0] == "cpu"]
    ranges = [s for s in on_cpu if s.annotation and s.name in (EPOCH, *PHASES)]
    total = sum(s.duration for s in ranges if s.name == EPOCH) / 1e9
    phases = self_times(ranges)
    lines = [f"{'phase':<16}{'seconds':>12}{'share':>9}"]
    for name in (*PHASES, EPOCH):
        seconds = phases.get(name, Share()).seconds
        lines.append(f"{name if name != EPOCH else 'anything else':<16}{seconds:>12.3f}{seconds / total:>9.1%}")
    lines.append(f"{'the epoch':<16}{total:>12.3f}{1:>9.1%}")
    operators = self_times(s for s in on_cpu if not s.annotation)
    lines += ["", *_by_self_time("operator on the CPU", operators, total)]
    kernels = self_times(s for s in spans if s.lane[0] == "device" and not s.annotation)
    if kernels:
        lines += ["", *_by_self_time("kernel or copy on the GPU", kernels, total)]
    return lines


def _by_self_time(heading: str, shares: dict[str, Share], total: float) -> list[str]:
    lines = [f"{heading:<60}{'self seconds':>14}{'share':>9}{'calls':>10}{'GFLOP':>12}"]
    top = sorted(shares.items(), key=lambda item: -item[1].seconds)[:OPERATORS]
    for name, share in top:
        label = name if len(name) < 60 else name[:56] + "..."
        flops = f"{share.flops / 1e9:.3f}" if share.flops else "-"
        lines.append(f"{label:<60}{share.seconds:>14.3f}{share.seconds / total:>9.1%}{share.calls:>10}{flops:>12}")
    return lines
