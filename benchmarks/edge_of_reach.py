"""The edge-of-reach laboratory (`offsweep lab edge-of-reach`, docs/edge_of_reach.md) as lines of results, one per run.

`value` is the mean return of the last evaluation and `reference` the largest that any policy can have. Read from the
work folder of a finished laboratory, or trained first if it holds none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import record
from benchmarks.labs import lab_main
from orchestrator.config import load_config

BENCHMARK = "edge_of_reach"


def lines(folder: Path, command: str) -> Iterator[dict[str, Any]]:
    """A line of every run of the laboratory in a study's folder.

    Raises:
        UserError: it is not finished.
    """
    from orchestrator.labs.common import read_rows
    from orchestrator.labs.edge_of_reach import LabRun, best_return

    config, best = load_config([folder / "config.yaml"], []), best_return()
    for run in read_rows(folder, LabRun):
        yield record(
            BENCHMARK, f"{run.method}, k={run.k}, seed {run.seed}", run.mean_return, "return of 30 steps", best,
            config.compute.threads, command, reference_is="the best possible, by dynamic programming",
            method=run.method, seed=run.seed, k=run.k, mean_q=run.mean_q, largest_q=run.largest_q,
            edge_share=run.edge_share, patched_share=run.patched_share, penalty_auroc=run.penalty_auroc,
            success=run.success, updates=config.method.num_updates,
        )  # fmt: skip


def main() -> int:
    """Print the lines."""
    return lab_main(BENCHMARK, __doc__, "edge-of-reach", lines)


if __name__ == "__main__":
    sys.exit(main())
