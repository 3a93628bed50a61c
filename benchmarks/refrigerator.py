"""The refrigerator laboratory (`offsweep lab refrigerator`, docs/morec.md) as lines of results.

One line for every repetition, controller and way of stepping: `value` is the RMSE in °C of the model's temperatures
against the simulator's over rollouts of 100 steps, `reference` that of the same ensemble without a filter. Then a line
for every repetition and way of the mean one-step error where the dataset has no rows. Read from the work folder of a
finished laboratory, or trained first if it holds none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import record
from benchmarks.labs import lab_main
from orchestrator.config import load_config

BENCHMARK = "refrigerator"


def lines(folder: Path, command: str) -> Iterator[dict[str, Any]]:
    """The lines of the laboratory in a study's folder.

    Raises:
        UserError: it is not finished.
    """
    from agents.refrigerator import DRAW, FILTERED, SURVIVORS
    from orchestrator.labs.common import read_rows
    from orchestrator.labs.refrigerator import MAP_FILE, LabRow, MapRow

    config = load_config([folder / "config.yaml"], [])
    rows, maps = read_rows(folder, LabRow), read_rows(folder, MapRow, MAP_FILE)
    unfiltered = {(row.seed, row.controller): row.rmse for row in rows if row.way == DRAW}
    common = {"reference_is": f"the same ensemble, {DRAW}", "dataset": config.dataset}
    for row in rows:
        yield record(
            BENCHMARK, f"{row.controller}, {row.way}, seed {row.seed}", row.rmse, "RMSE of temperature, °C",
            unfiltered[row.seed, row.controller], config.compute.threads, command, **common, seed=row.seed,
            controller=row.controller, way=row.way, filtered=row.way in (FILTERED, SURVIVORS),
            rmse_by_step=row.rmse_by_step, share_by_step=row.share_by_step if row.way == SURVIVORS else None,
        )  # fmt: skip
    one_step = {row.seed: row for row in maps if row.way == DRAW}
    for point in maps:
        yield record(
            BENCHMARK, f"one step, {point.way}, seed {point.seed}", point.without_data,
            "mean absolute error of temperature where there is no data, °C", one_step[point.seed].without_data,
            config.compute.threads, command, **common, seed=point.seed, way=point.way,
            filtered=point.way == FILTERED, with_data=point.with_data,
        )  # fmt: skip


def main() -> int:
    """Print the lines."""
    return lab_main(BENCHMARK, __doc__, "refrigerator", lines)


if __name__ == "__main__":
    sys.exit(main())
