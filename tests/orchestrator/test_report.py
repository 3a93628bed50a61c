"""The page of a study: complete in one file, right about the trials, with links to MLflow."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from envs.errors import UserError
from orchestrator.cli import main
from orchestrator.pages import Cell, Page, PageTable, Section
from orchestrator.report import report
from tests.orchestrator.test_reading import make_study


class Reader(HTMLParser):
    """Cells of the tables, addresses that are loaded, and links."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        elif tag == "a":
            self.links.append(known["href"] or "")
        if tag in ("img", "script", "link"):
            self.loaded += [known[key] or "" for key in ("src", "href") if key in known]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    return reader


def test_a_finished_study_is_one_file_with_its_trials_figures_and_links(tmp_path: Path):
    folder = make_study(tmp_path, 24, 24)
    (folder / "tracker.json").write_text(
        json.dumps({"runs": {"t0010-s0": {"run_id": "abc"}, "study": {"run_id": None}}})
    )
    (folder / "config.yaml").write_text("dataset: <tiny> & small\n")
    path = report("made", tmp_path)
    assert path == folder / "report.html"
    page = read(path)
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert len(page.loaded) >= 4
    assert page.links == ["http://127.0.0.1:5000/#/runs/abc"]
    trials = page.tables[-1]
    assert trials[0] == ["rank", "trial", "state", "score", "each seed", "time", "eta", "kind"]
    assert [row[0] for row in trials[1:4]] == ["1", "2", "3"]
    assert trials[1][1:5] == ["22", "complete", "22.0", "22.0"]
    assert trials[-1][2] == "pruned"
    text = path.read_text()
    assert "finished, 24 of 24 trials ended (23 complete, 1 pruned)" in text
    assert "dataset: &lt;tiny&gt; &amp; small" in text
    assert len(page.tables) == 2
    assert page.tables[0][0] == ["parameter", "importance", "searched", "in the best 3"]


@pytest.mark.parametrize(("trials", "finished"), [(3, 0), (3, 1)])
def test_a_study_that_has_only_begun(tmp_path: Path, trials: int, finished: int):
    make_study(tmp_path, trials, finished)
    text = report("made", tmp_path, tmp_path / "out" / "page.html").read_text()
    assert f"{finished} of 3 trials ended" in text


def test_a_page_escapes_what_it_shows():
    section = Section("<b>", [("a", "<i>")], PageTable(["<u>"], [[Cell("<s>", "http://x/?a=1&b=2", 1.5, "best")]], "c"))
    text = Page("t<1>", "s", [section], ["w<2>"]).html()
    assert not re.search(r"<(b|i|u|s)>", text)
    assert 'class="best" data-order="1.5"><a href="http://x/?a=1&amp;b=2">&lt;s&gt;</a>' in text
    assert "w&lt;2&gt;" in text


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_study(tmp_path, 3, 1)
    where = ["--workdir", str(tmp_path)]
    assert main(["report", "made", *where, "--mlflow", "nowhere"]) == 2
    assert "--mlflow 'nowhere' is not an address such as http" in capsys.readouterr().err
    assert main(["report", "mode", *where]) == 2
    assert "there is no study 'mode'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another file"):
        report("made", tmp_path, tmp_path / "file" / "x.html")
    assert not (tmp_path / "studies" / "made" / "report.html").exists()
