"""In which form an update runs fastest on a CPU: why it is executed as it is written, in float32.

Lines are named `<case>/<form>`, with the cases of `learner_speed` and these forms:

    compiled    torch.compile (inductor) of everything but the optimiser's kernel, which it cannot take
    foreach     Adam by torch's foreach kernels instead of the fused one
    onednn      products of large layers by oneDNN instead of torch's own (`agents.products` decides by a trial)
    mixed       `method.precision=mixed`: products of bfloat16 inputs

`value` is updates per second of processor time, one thread, a pack of 1; `reference` the same of the update as it is,
in turns in the same process. `setup_seconds` is the first call, compilation included. Every line is the one with the
median ratio of several fresh processes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agents import products
from agents.chunk import Updater, matrix_precision
from agents.cpu import configure_cpu
from agents.optim import Adam
from agents.replay import Replay, transition_rows
from benchmarks.common import (
    Block,
    print_line,
    print_medians,
    record,
    spread,
    timed_apart,
    timing_options,
    timing_parser,
)
from benchmarks.learner_speed import NUM_ROWS, UPDATES, hopper_shaped, work_of

BENCHMARK = "execution"
CASES = ("sac_n10", "mopo", "small_net")
FORMS = ("compiled", "foreach", "onednn", "mixed")


def in_form(updater: Updater, form: str, replay: Replay) -> Callable[[], object]:
    """One update of the updater in a form."""
    if form == "compiled":
        Adam.step = torch.compiler.disable(Adam.step)  # type: ignore[method-assign]
        plain = type(updater).update.__wrapped__  # type: ignore[attr-defined]
        updater._by_rows = False  # type: ignore[attr-defined]  # shapes that follow from values are compiled anew each time

        def update(rows: Tensor, noise: Tensor) -> None:
            plain(updater, rows, noise)

        compiled = torch.compile(update, dynamic=False)

        def call(rows: Tensor, noise: Tensor, turn: int = 0, with_metrics: bool = False) -> None:
            with torch.no_grad():  # the compiler does not take inference mode
                compiled(rows, noise)

        updater.update = call  # type: ignore[method-assign,assignment]
    elif form == "foreach":
        for optim in (value for value in vars(updater).values() if isinstance(value, Adam)):
            optim.step = foreach_step(optim)  # type: ignore[method-assign]
    work = work_of(updater, replay)
    if form == "mixed":

        def mixed() -> None:
            with matrix_precision("mixed"):
                work()

        return mixed
    if form == "onednn":

        def by_onednn() -> None:
            chosen, products.onednn_is_faster = products.onednn_is_faster, lambda: True  # type: ignore[assignment]
            work()
            products.onednn_is_faster = chosen

        return by_onednn
    return work


def foreach_step(optim: Adam) -> Callable[[], None]:
    parameter = torch.nn.Parameter(optim.network.flat)
    parameter.grad = optim.network.grad
    step = torch.optim.Adam([parameter], lr=optim.learning_rates[0], foreach=True).step

    def call() -> None:
        step()

    return call


def measure(case: str, form: str, blocks: int, seconds: float, command: str) -> dict[str, Any]:
    configure_cpu(1)
    rows = transition_rows(*hopper_shaped(NUM_ROWS))
    plain = Block.warmed_up(work_of(UPDATES[case].make(1), Replay(rows, 1, 0)), seconds)
    work = in_form(UPDATES[case].make(1), form, Replay(rows, 1, 0))
    started = time.perf_counter()
    work()
    setup = time.perf_counter() - started
    block = Block.warmed_up(work, seconds)
    pairs = [(plain.measure().per_cpu, block.measure().per_cpu) for _ in range(blocks)]
    ratios = [mine / other for other, mine in pairs]
    return record(
        BENCHMARK, f"{case}/{form}", statistics.median(mine for _, mine in pairs), "updates per CPU-second",
        statistics.median(other for other, _ in pairs), 1, command, reference_is="eager execution in float32",
        **spread("ratio", ratios), setup_seconds=setup, blocks=blocks, load_average=os.getloadavg()[0],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = timing_parser(BENCHMARK, __doc__, blocks=7, seconds=0.8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args(argv)
    options = timing_options(parser, args)
    chosen = [["--cases", case, "--forms", form, *options] for case in args.cases for form in args.forms]
    if args.in_process:
        if len(chosen) != 1:
            parser.error("--in-process times one case in one form")
        command = " ".join(["python", "-m", f"benchmarks.{BENCHMARK}", *chosen[0]])
        print_line(measure(args.cases[0], args.forms[0], args.blocks, args.seconds, command))
        return 0
    return print_medians(BENCHMARK, args.repeats, lambda: [timed_apart(BENCHMARK, words) for words in chosen])


if __name__ == "__main__":
    raise SystemExit(main())
