"""The grid-world laboratory through the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from agents.tabular import METHODS
from orchestrator.cli import main
from orchestrator.labs.common import read_rows
from orchestrator.labs.grid_world import LabRun


def test_the_lab_learns_tabulates_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "grid-world", "--seeds", "2", "--updates", "60000", "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "a layout of ours: 2 seeds, 60,000 steps in the source, 6,000 in the target; value of the start 0.377" in out
    folder = tmp_path / "labs" / "grid-world"
    assert (folder / "grid_world.png").stat().st_size > 20_000
    rows = read_rows(folder, LabRun)
    assert [(row.method, row.seed) for row in rows] == [(method, seed) for method in METHODS for seed in (0, 1)]
    by_method = {row.method: row for row in rows}
    assert by_method["value filter"].steps_to_goal == 20
    assert (by_method["value filter"].harmless_accepted, by_method["value filter"].harmful_accepted) == (1, 0)
    assert by_method["value filter"].true_value == pytest.approx(0.95**19)
    assert math.isnan(by_method["DARC"].solved_from)
    assert main(["lab", "grid-world", "--seeds", "0", "--workdir", str(tmp_path)]) == 2
