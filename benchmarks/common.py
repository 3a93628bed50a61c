"""What every benchmark shares: the line it prints, the machine it ran on, and the rate its work is held against.

A benchmark is a module `benchmarks.<name>` that prints one JSON object per line on standard output, each made by
`record`, and everything else on standard error. `benchmarks.run` keeps the lines in `results/<name>.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents.cpu import configure_cpu, cpu_name
from envs.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = ("benchmark", "case", "value", "unit", "reference", "ratio", "threads", "command", "machine")
"""What every line holds; a benchmark adds its own fields behind them."""

MATRIX_SIZE = 256  # rows, inner and columns of the product that gives the matrix rate, fp32
_BATCHED = 10  # products in one bmm: the ten critics of a layer


def record(
    benchmark: str,
    case: str,
    value: float | None,
    unit: str,
    reference: float | None,
    threads: int,
    command: str,
    **more: Any,
) -> dict[str, Any]:
    """One line of results.

    Args:
        value: the measured number; None where there is none (a run that diverged).
        reference: what it is held against, in the same unit; `ratio` is value / reference.
        command: what was typed to get this line.
        more: the benchmark's own fields; one that says what the reference is belongs to them.
    """
    ratio = value / reference if value is not None and reference else None
    line = dict(zip(FIELDS, (benchmark, case, value, unit, reference, ratio, threads, command, machine()), strict=True))
    return {k: _plain(v) for k, v in {**line, **more}.items()}


def print_line(line: dict[str, Any]) -> None:
    print(json.dumps(line, allow_nan=False), flush=True)


def parse_line(text: str, benchmark: str) -> dict[str, Any]:
    """A line of results read back.

    Raises:
        UserError: it is not a JSON object with every field of `FIELDS`, or belongs to another benchmark.
    """
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise UserError(f"benchmark {benchmark} printed a line that is not a JSON object: {text.strip()[:80]!r}")
    missing = [field for field in FIELDS if field not in line]
    if missing:
        raise UserError(f"benchmark {benchmark} printed a line without {', '.join(missing)}")
    if line["benchmark"] != benchmark:
        raise UserError(f"benchmark {benchmark} printed a line of {line['benchmark']!r}")
    return line


def machine() -> str:
    """Processor, cores, instruction set and versions, without anything that names the host."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{cpu_name()}, {platform.machine()}, {os.cpu_count()} cores, {capability}; {platform.system()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _plain(value: Any) -> Any:
    """Floats to six digits; null for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# ---- what is timed in processes of its own --------------------------------------------------------------------------


def timing_parser(benchmark: str, description: str | None, blocks: int, seconds: float) -> argparse.ArgumentParser:
    """The options of a benchmark that times each thing in fresh processes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=blocks, help="measurements of each thing (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="length of a block (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3,
        help="processes in which each thing is measured; the one with the median ratio is shown (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--in-process", action="store_true", help="time a single thing in this process")
    return parser


def timing_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The words that hand `--blocks` and `--seconds` on; an error for numbers that are not positive."""
    if min(args.blocks, args.repeats) < 1 or args.seconds <= 0:
        parser.error("blocks, seconds and repeats must be greater than 0")
    return ["--blocks", str(args.blocks), "--seconds", f"{args.seconds:g}"]


def timed_apart(benchmark: str, words: Sequence[str], threads: int = 1) -> dict[str, Any]:
    """The line that a benchmark prints for a single thing, timed in a fresh process: OpenMP reads its variables when
    it is loaded.

    Raises:
        UserError: it failed.
    """
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *words, "--in-process"]
    done = subprocess.run(command, cwd=ROOT, env=env, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"benchmark {benchmark} failed with exit code {done.returncode} at {' '.join(words)}")
    return parse_line(done.stdout, benchmark)


def print_medians(benchmark: str, repeats: int, measure: Callable[[], list[dict[str, Any]]]) -> int:
    """Measure everything `repeats` times, all of it in turn so that a slow hour meets all; print of each line the
    repeat with the median ratio.

    Args:
        measure: the lines of one repeat, in the same order every time.

    Returns:
        The exit code.
    """
    rounds = []
    for i in range(repeats):
        print(f"{benchmark}: repeat {i + 1} of {repeats}", file=sys.stderr, flush=True)
        try:
            rounds.append(measure())
        except UserError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
    for lines in zip(*rounds, strict=True):
        ordered = sorted(lines, key=lambda line: line["ratio"])
        ratios = [line["ratio"] for line in ordered]
        print_line({**ordered[len(ordered) // 2], "ratios_of_repeats": ratios})
    return 0


# ---- beside another implementation ----------------------------------------------------------------------------------

Answer = Callable[[str], dict[str, Any]]


@contextmanager
def peer_of(command: str | None) -> Iterator[Answer | None]:
    """What asks another implementation to do a case once."""
    if command is None:
        yield None
        return
    process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    lines, answers = process.stdin, process.stdout

    def ask(case: str) -> dict[str, Any]:
        lines.write(f"{case}\n")
        lines.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
        return answer

    try:
        yield ask
    finally:
        lines.close()
        process.wait()


Measure = Callable[[str, int, Answer | None, str, str], list[dict[str, Any]]]
"""Lines of a case: of its name, the number of blocks, the peer, its name, and the command that measures the case."""


def measure_cases(
    benchmark: str, doc: str | None, cases: Sequence[str], blocks: int, measure: Measure, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """Measure the cases that a command line names, beside the other implementation that it may name, and print them.

    Args:
        cases: those there are.
        blocks: measurements of each thing, if the command line does not say.

    Returns:
        The command line (`cases`, `blocks`, `peer`, `peer_name`) and the lines printed.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), metavar="CASE")
    parser.add_argument("--blocks", type=int, default=blocks, help="measurements of each thing (default: %(default)s)")
    parser.add_argument("--peer", help="command of another implementation")
    parser.add_argument("--peer-name", default="another implementation", help="repository and commit")
    args = parser.parse_args(argv)
    if args.blocks < 1:
        parser.error("blocks must be greater than 0")
    configure_cpu(1)
    lines = []
    with peer_of(args.peer) as peer:
        for i, case in enumerate(args.cases, start=1):
            print(f"[{i}/{len(args.cases)}] {case}", file=sys.stderr, flush=True)
            command = f"python -m benchmarks.{benchmark} --blocks {args.blocks} --cases '{case}'"
            for line in measure(case, args.blocks, peer, args.peer_name, command):
                lines.append(line)
                print_line(line)
    return args, lines


Work = Callable[[], int]
"""Does something once, and says how much of it that was."""


def measure_in_turns(
    benchmark: str, case: str, unit: str, works: Mapping[str, Work], blocks: int, peer: Answer | None, asked: str,
    peer_name: str, command: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """The lines of a case that is done in several precisions, in turns with each other and with the peer: rates per
    CPU-second beside the peer's, or without one beside float32's.

    Args:
        unit: of what is done.
        works: by precision.
        asked: the case in the peer's words.
    """
    rates: dict[str, list[float]] = {precision: [] for precision in works}
    theirs: list[float] = []
    for block in range(blocks + 1):  # the first is not counted
        if peer is not None:
            answer = peer(asked)
            theirs += [answer["done"] / answer["cpu_seconds"]] if block else []
        for precision, work in works.items():
            begun = time.process_time()
            per_second = work() / (time.process_time() - begun)
            rates[precision] += [per_second] if block else []
    against = theirs or rates["float32"]
    lines = []
    for precision, mine in rates.items():
        paired = [a / b for a, b in zip(mine, against, strict=True)]
        lines.append(record(
            benchmark, "/".join([*case.split(), precision]), statistics.median(mine), f"{unit} per CPU-second",
            statistics.median(against), 1, command, reference_is=peer_name if theirs else "ours in float32, in turns",
            blocks=blocks, **spread("value", mine), **spread("reference", against), **spread("ratio", paired),
            ratio_median=statistics.median(paired), load_average=os.getloadavg()[0],
        ))  # fmt: skip
    return lines


# ---- timing ---------------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """Calls per second."""

    per_cpu: float  # second of processor time of all threads of this process
    per_wall: float


class Block(NamedTuple):
    """A piece of work that is timed again and again."""

    work: Callable[[], object]
    calls: int  # per measurement

    @classmethod
    def warmed_up(cls, work: Callable[[], object], seconds: float) -> Block:
        """Call `work` for some seconds, and take as many calls as fit into them as a block."""
        work()  # allocations and choices of the first call
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            work()
            done += 1
        return cls(work, max(done, 1))

    def measure(self) -> Rate:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            self.work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Rate(self.calls / max(cpu, 1e-9), self.calls / max(wall, 1e-9))


class MatrixRate:
    """The rate of the best matrix product the core has, 256 x 256 x 256 in fp32.

    The candidates are `torch.mm`, `torch.bmm` (ten products a call), `torch.nn.functional.linear` and, where torch has
    it, oneDNN's linear. Results go to memory allocated beforehand where the operator can write there.

    Args:
        seconds: of one measurement, shared by the candidates.
    """

    def __init__(self, seconds: float) -> None:
        n = MATRIX_SIZE
        a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
        stack_a, stack_b, stack_out = (torch.randn(_BATCHED, n, n) for _ in range(3))
        works: dict[str, tuple[Callable[[], object], int]] = {
            "mm": (lambda: torch.mm(a, b, out=out), 1),
            "bmm": (lambda: torch.bmm(stack_a, stack_b, out=stack_out), _BATCHED),
            "linear": (lambda: torch.nn.functional.linear(a, b), 1),
        }
        try:
            onednn = torch.ops.mkldnn._linear_pointwise
            onednn(a, b, None, "none", [], "")
        except (AttributeError, RuntimeError):
            pass  # not in this build of torch, or not for this processor
        else:
            works["mkldnn_linear"] = (lambda: onednn(a, b, None, "none", [], ""), 1)
        share = seconds / len(works)
        self._blocks = {name: Block.warmed_up(work, share) for name, (work, _) in works.items()}
        self._gflop = {name: products * 2 * n**3 / 1e9 for name, (_, products) in works.items()}
        self._measured: dict[str, list[float]] = {name: [] for name in works}

    def measure(self) -> None:
        """Time every candidate once."""
        for name, block in self._blocks.items():
            self._measured[name].append(self._gflop[name] * block.measure().per_cpu)

    def medians(self) -> dict[str, float]:
        """GFLOP per second of processor time, by candidate."""
        return {name: statistics.median(rates) for name, rates in self._measured.items()}

    @property
    def best(self) -> str:
        medians = self.medians()
        return max(medians, key=lambda name: medians[name])

    def of_best(self) -> list[float]:
        """Every measurement of the candidate with the highest median."""
        return self._measured[self.best]


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The fields `<name>_min` and `<name>_max`."""
    return {f"{name}_min": min(values), f"{name}_max": max(values)}
