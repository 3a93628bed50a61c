"""The penalties laboratories (`offsweep lab penalties`, `penalties-halfcheetah`, docs/studies.md) as lines of results.

One line for every penalty and size of the ensemble: `value` is Spearman's correlation with the model's true error over
imagined states of 20 steps, mean over policies and repetitions, `reference` that of MOPO's penalty in the same
ensembles. Read from the work folder of finished laboratories, or trained first if it holds none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import record
from benchmarks.labs import lab_main
from orchestrator.config import load_config

BENCHMARK = "penalty_quality"
STATISTICS = ("pearson", "spearman_mean", "auroc", "ause", "inside_1", "inside_2")
LABS = ("penalties", "penalties-halfcheetah")


def lines(folder: Path, command: str) -> Iterator[dict[str, Any]]:
    """The lines of the laboratory in a study's folder.

    Raises:
        UserError: it is not finished.
    """
    from agents.penalties import PENALTIES
    from orchestrator.labs.common import read_rows
    from orchestrator.labs.penalties import ALL_STEPS, LENGTH, LabRow, mean

    config, rows = load_config([folder / "config.yaml"], []), read_rows(folder, LabRow)
    robot = config.dataset.removeprefix("embedded/").split("-")[0]
    whole = [row for row in rows if row.step == ALL_STEPS]
    for members in sorted({row.members for row in rows}):
        references = [r for r in whole if r.imagined and (r.penalty, r.members) == ("max_aleatoric", members)]
        for penalty in PENALTIES:
            mine = [row for row in whole if (row.penalty, row.members) == (penalty, members)]
            imagined = [row for row in mine if row.imagined]
            yield record(
                BENCHMARK, f"{robot}/{penalty}/N{members}", mean(imagined, "spearman"), "Spearman's correlation",
                mean(references, "spearman"), config.compute.threads, command,
                reference_is="max_aleatoric in the same ensembles", dataset=config.dataset, penalty=penalty,
                members=members, steps=LENGTH, seeds=_seeds(imagined),
                **{name: mean(imagined, name) for name in STATISTICS},
                states=sum(row.states for row in imagined),
                spearman_by_scenario=_by_scenario(mine, "spearman"), pearson_by_scenario=_by_scenario(mine, "pearson"),
                spearman_by_seed=[mean([r for r in imagined if r.seed == s], "spearman") for s in _seeds(imagined)],
                spearman_by_step={
                    str(step): mean([r for r in rows if (r.penalty, r.members, r.step) == (penalty, members, step)],
                                    "spearman")
                    for step in sorted({row.step for row in rows} - {ALL_STEPS})
                },
            )  # fmt: skip


def _seeds(rows: list[Any]) -> list[int]:
    return sorted({row.seed for row in rows})


def _by_scenario(rows: list[Any], statistic: str) -> dict[str, float]:
    from orchestrator.labs.penalties import mean

    scenarios = dict.fromkeys(row.scenario for row in rows)
    return {one: mean([row for row in rows if row.scenario == one], statistic) for one in scenarios}


def main() -> int:
    """Print the lines."""
    return lab_main(BENCHMARK, __doc__, LABS, lines)


if __name__ == "__main__":
    sys.exit(main())
