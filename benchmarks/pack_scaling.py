"""What a pack costs in time and memory beside a pack of 1, on a CPU or a GPU.

The cases are those of `learner_speed` that are updates, run as in training: chunks of updates whose draws are made
beforehand, on a GPU as captured graphs. `<case>/<M>` is a pack of M runs.

`value` is run-updates per second (of processor time on a CPU, of the wall clock on a GPU), `reference` the same of a
pack of 1 measured in turns in the same process. `time_of_one` is the time of an update of the pack in updates of a pack
of 1. `memory` is what the process (on a GPU its allocator) grew by from before the pack to its peak, `memory_predicted`
what the packer would take it for from the smaller packs of the same case. On a GPU `<case>/<M>/eager` executes the
updates without a graph. Every line is the one with the median ratio of several fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from agents.chunk import ChunkRunner
from agents.cpu import configure_cpu
from agents.graphs import default_capture
from agents.replay import Replay, transition_rows
from benchmarks.common import (
    MatrixRate,
    print_line,
    print_medians,
    record,
    spread,
    timed_apart,
    timing_options,
    timing_parser,
)
from benchmarks.learner_speed import ACTION_DIM, BATCH, UPDATES, hopper_shaped
from orchestrator import memory
from orchestrator.packing import Curve

BENCHMARK = "pack_scaling"
NUM_ROWS = 100_000
CASES = ("sac_n10", "ravl_n10", "mopo", "td3_bc", "iql", "small_net")
PAPER_UPDATES = 3_000_000


class Chunks:
    """Chunks of updates of a pack, and the time of one."""

    def __init__(self, case: str, pack: int, device: torch.device, graph: bool, seconds: float) -> None:
        rows = transition_rows(*hopper_shaped(NUM_ROWS))
        self.pack, self.device = pack, device
        updater = UPDATES[case].make(pack, device)
        self._runner = ChunkRunner(
            updater, Replay(rows, pack, 0, device), capture=default_capture(device) if graph else None
        )
        self._shape, self._noises = (pack, BATCH), updater.num_noises
        self._draws = self._drawn(10)
        self._run()  # allocations, libraries, graphs
        started = time.perf_counter()
        self._run()
        self.updates = max(2, int(10 * seconds / (time.perf_counter() - started)))
        self._draws = self._drawn(self.updates)
        self._run()

    def _drawn(self, updates: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.randint(NUM_ROWS, (updates, *self._shape), device=self.device)
        return indices, torch.randn((updates, self._noises, *self._shape, ACTION_DIM), device=self.device)

    def _run(self) -> None:
        self._runner.run(*self._draws, first_update=0)  # ends with a transfer, so nothing is under way behind it

    def rate(self) -> float:
        """Run-updates per second."""
        now: Callable[[], float] = time.process_time if self.device.type == "cpu" else time.perf_counter
        started = now()
        self._run()
        return self.pack * self.updates / (now() - started)


def matrix_gflops(device: torch.device, seconds: float) -> float:
    """The rate of the device's best matrix product in float32."""
    if device.type == "cpu":
        rate = MatrixRate(seconds)
        rate.measure()
        return rate.of_best()[0]
    n, calls = 8192, 10
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b)
        torch.cuda.synchronize()
        best = max(best, calls * 2 * n**3 / (time.perf_counter() - started) / 1e9)
    return best


def measure(
    case: str, pack: int, device: torch.device, graph: bool, blocks: int, seconds: float, command: str,
    smaller: Sequence[tuple[float, float]],
) -> dict[str, Any]:  # fmt: skip
    """The line of one pack; `smaller` are (size, memory) of smaller packs of the case."""
    configure_cpu(1)
    torch.zeros(1, device=device)
    memory.release(device)
    base = memory.in_use(device)
    memory.reset_peak(device)
    chunks = Chunks(case, pack, device, graph, seconds)
    grown = memory.peak(device) - base
    single = Chunks(case, 1, device, graph, seconds)
    pairs = [(single.rate(), chunks.rate()) for _ in range(blocks)]
    of_one, value = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    gflops = matrix_gflops(device, seconds)
    more: dict[str, Any] = {}
    if len(smaller) > 1:  # one size does not tell what a pack takes from what each run does
        more["memory_predicted"] = Curve(tuple(smaller))(pack)
        more["memory_ratio"] = grown / more["memory_predicted"]
    clock = "CPU-second" if device.type == "cpu" else "second"
    return record(
        BENCHMARK, f"{case}/{pack}" + ("" if graph or device.type == "cpu" else "/eager"), value,
        f"run-updates per {clock}", of_one, 1, command, reference_is="a pack of 1, in turns in the same process",
        **spread("ratio", [mine / other for other, mine in pairs]), time_of_one=pack * of_one / value,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", pack=pack,
        memory=grown, memory_per_member=grown / pack, **more, matrix_gflops=gflops,
        share_of_matrix_rate=value * UPDATES[case].flops / gflops / 1e9,
        hours_per_run_of_3m_updates=PAPER_UPDATES / value / 3600, hours_of_one_alone=PAPER_UPDATES / of_one / 3600,
        updates_per_block=chunks.updates, blocks=blocks, load_average=os.getloadavg()[0],
    )  # fmt: skip


def measure_case(case: str, packs: Sequence[int], options: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of all packs of a case, each measured in a fresh process."""
    lines: list[dict[str, Any]] = []
    known: list[tuple[float, float]] = []
    for pack in sorted(packs):
        words = ["--cases", case, "--packs", str(pack), *options, "--smaller", json.dumps(known)]
        lines.append(timed_apart(BENCHMARK, words))
        known.append((pack, lines[-1]["memory"]))
        if "cuda" in options:
            lines.append(timed_apart(BENCHMARK, [*words, "--eager"]))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = timing_parser(BENCHMARK, __doc__, blocks=5, seconds=1.0)
    gpu = torch.cuda.is_available()
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--packs", nargs="+", type=int, default=[1, 4, 16, 64] if gpu else [1, 4, 16])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--eager", action="store_true", help="of one pack: no graphs")
    parser.add_argument("--smaller", type=json.loads, default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    options = ["--device", args.device, *timing_options(parser, args)]
    if min(args.packs) < 1:
        parser.error("packs must be greater than 0")
    if args.device == "cuda" and not gpu:
        parser.error("there is no GPU here; say --device cpu")
    if not args.in_process:

        def measure_all() -> list[dict[str, Any]]:
            return [line for case in args.cases for line in measure_case(case, args.packs, options)]

        return print_medians(BENCHMARK, args.repeats, measure_all)
    if len(args.cases) * len(args.packs) != 1:
        parser.error("--in-process measures one pack of one case")
    words = ["--cases", args.cases[0], "--packs", str(args.packs[0]), *options, *["--eager"][: args.eager]]
    command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *words])
    print_line(measure(
        args.cases[0], args.packs[0], torch.device(args.device), not args.eager, args.blocks, args.seconds, command,
        args.smaller,
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
