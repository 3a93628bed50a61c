"""A table's outputs, from made-up runs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from envs.errors import UserError
from orchestrator.table_outputs import csv_text, latex, markdown, page, print_table, save_all, to_json
from sweeps.table_results import RunScores, TableResult, table_result
from sweeps.tables import Table, load_table, scaled

REFERENCES = """table,dataset,method,mean,spread,spread_kind,seeds,source,note
t,a_1,plain,50,4,std,4,"A & B, Table 1",
t,a_1,theirs,40,,,,"A & B, Table 1",
t,b|2,100% sure,,,,,,not read
"""
TABLE = """
title: "Methods & data"
paper: none
metric: score
unit: score
reference: t
tuning: "20 trials each"
protocol: {seeds: 3, updates: 40, updates_per_epoch: 20, episodes: 5, evaluations: 2, selection: last}
rows:
  - {name: a_1, dataset: embedded/pendulum-medium-v0}
  - {name: b|2, dataset: embedded/pendulum-medium-v0}
columns:
  - {name: plain, settings: {method: td3_bc}}
  - {name: 100% sure, settings: {method: td3_bc, method.alpha: 1.0}}
  - {name: theirs, reference_only: not implemented}
"""


def runs(*values: float, outcome: str = "finished") -> list[RunScores]:
    return [
        RunScores(seed, [20, 40], [v - 1, v], f"id{seed}", "7", "s", outcome, "0123", {"fqe": [2.0, 1.0]})
        for seed, v in enumerate(values)
    ]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    (tmp_path / "t.csv").write_text(REFERENCES)
    (tmp_path / "t.yaml").write_text(TABLE)
    return load_table(tmp_path / "t.yaml")


@pytest.fixture
def result(table: Table) -> TableResult:
    """One cell whole, one of another level, one with a run that diverged, one that was not run."""
    found = {
        ("a_1", "plain"): runs(50.0, 52.0, 54.0), ("a_1", "100% sure"): runs(20.0, 21.0),
        ("b|2", "plain"): [*runs(10.0, 12.0), *runs(0, 0, 5, outcome="diverged")[2:]],
    }  # fmt: skip
    return table_result(table, found, ["a doubt"])


def test_cells_say_what_is_known_of_them(result: TableResult):
    whole, partial, lost = (result.cell(*key) for key in (("a_1", "plain"), ("a_1", "100% sure"), ("b|2", "plain")))
    assert (whole.mean, whole.std, whole.state) == (52.0, 2.0, "")
    assert whole.is_best
    assert not partial.is_best
    assert whole.verdict.name == "reproduced"
    assert partial.state == "2 of 3 runs"
    assert lost.mean is None
    assert lost.state == "1 diverged"
    assert lost.verdict.why == "1 of 3 runs diverged"
    assert whole.by_selection == {
        "last": [50.0, 52.0, 54.0], "best": [50.0, 52.0, 54.0], "offline:fqe": [49.0, 51.0, 53.0],
    }  # fmt: skip
    assert result.counts == {"reproduced": 1, "not comparable": 2, "not run": 1}
    assert result.aggregates.why_none == "no row has all runs of plain, 100% sure"


def test_cells_that_cannot_be_told_apart_from_the_best_are_best(table: Table):
    found = {("a_1", "plain"): runs(50.0, 60.0, 40.0), ("a_1", "100% sure"): runs(49.0, 41.0, 56.0)}
    result = table_result(table, found)
    assert result.cell("a_1", "plain").is_best
    assert result.cell("a_1", "100% sure").is_best
    assert result.aggregates.rows == ["a_1"]
    plain, sure = result.aggregates.columns
    assert float(plain.iqm.value) == pytest.approx(50.0)  # the middle one of three
    assert plain.optimality_gap is not None
    assert float(plain.optimality_gap.value) == pytest.approx(50.0)
    assert plain.improvement is not None  # of the last column over it: 41 > 40, 49 > 40, 56 > 50, 56 > 40 of nine pairs
    assert float(plain.improvement.value) == pytest.approx(4 / 9)
    assert sure.improvement is None
    curve = dict(result.budget_curves["plain"])
    assert curve[1] == pytest.approx(50.0)
    assert curve[2] == pytest.approx((40 + 3 * 50 + 5 * 60) / 9)
    assert len(result.budget_curves["all columns"]) == 6


def test_a_run_is_read_where_its_column_says(tmp_path: Path, table: Table):
    text = TABLE.replace("method: td3_bc}}", "method: td3_bc}, read_at: 20}", 1)
    (tmp_path / "t.yaml").write_text(text)
    found = {("a_1", "plain"): runs(50.0, 60.0, 40.0)}
    assert table_result(load_table(tmp_path / "t.yaml"), found).cell("a_1", "plain").values == [49.0, 59.0, 39.0]
    (tmp_path / "t.yaml").write_text(text.replace("read_at: 20", "read_at: 40"))
    with pytest.raises(UserError, match="read_at must be a multiple of 20 below its 40 updates"):
        load_table(tmp_path / "t.yaml")


def texts(result: TableResult) -> dict[str, str]:
    terminal = io.StringIO()
    print_table(Console(file=terminal, width=160), result, cells=True)
    return {
        "terminal": terminal.getvalue(), "markdown": markdown(result, "table.html"), "latex": latex(result),
        "csv": csv_text(result), "json": json.dumps(to_json(result)), "html": page(result, "http://mlflow:5000").html(),
    }  # fmt: skip


def test_every_output_has_the_numbers_and_none_that_are_none(result: TableResult):
    for name, text in texts(result).items():
        assert "52.0" in text, name
        assert re.search(r"[> ,]nan\b", text.lower()) is None, name
        assert "20 trials each" in text or name == "csv", name
        assert "A & B" in text or r"A \& B" in text or "A &amp; B" in text, name


def test_every_output_of_a_reduced_table_says_so(result: TableResult):
    reduced = table_result(
        scaled(result.table, 0.5), {key: list(cell.runs) for key, cell in result.cells.items()}, result.doubts
    )
    for name, text in texts(reduced).items():
        assert "REDUCED: 0.5 of the updates" in text or name == "csv", name
    assert {row["scale"] for row in csv.DictReader(io.StringIO(csv_text(reduced)))} == {"0.5"}
    assert "reproduced" not in {cell.verdict.name for cell in reduced.cells.values()}


def test_numbers_lead_to_their_runs(result: TableResult):
    html = texts(result)["html"]
    assert 'href="#cell-0-0"' in html
    assert '<details id="cell-0-0">' in html
    assert 'href="http://mlflow:5000/#/runs/id1"' in html
    assert "compare-runs?runs=%5B%22id0%22%2C%20%22id1%22%2C%20%22id2%22%5D&amp;experiments=%5B%227%22%5D" in html
    assert "](table.html#cell-0-0)" in markdown(result, "table.html")
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert rows[0]["run_ids"] == "id0 id1 id2"


def test_what_a_laboratory_measured_has_no_links(table: Table):
    found = {("a_1", "plain"): [RunScores(seed, [0], [1.0 + seed]) for seed in range(3)]}
    html = page(table_result(table, found), "http://mlflow:5000").html()
    assert "http://mlflow" not in html


def test_latex_escapes_names(result: TableResult):
    text = latex(result)
    assert r"a\_1" in text
    assert r"100\% sure" in text
    assert r"\textbf{52.0 $\pm$ 2.0}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(result: TableResult, tmp_path: Path):
    (tmp_path / "a.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
        + latex(result)
        + "\\end{document}\n"
    )
    subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "a.pdf").stat().st_size


def test_outputs_are_written_where_they_can_be(result: TableResult, tmp_path: Path):
    assert [path.name for path in save_all(result, tmp_path / "out", "http://mlflow:5000")] == [
        "table.md", "table.tex", "table.csv", "table.json", "table.html",
    ]  # fmt: skip
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert not any(isinstance(v, float) and math.isnan(v) for cell in content["cells"] for v in cell.values())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        save_all(result, tmp_path / "file", "http://mlflow:5000")
