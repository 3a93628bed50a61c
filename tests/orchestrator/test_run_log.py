"""The log of a run: what is said, warnings, and what a full disk does."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from orchestrator.run_log import RunLogs


def test_what_is_said_and_warned_of_goes_to_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logs = RunLogs({"a": tmp_path / "a", "b": tmp_path / "b"})
    logs.say("begins")
    logs.say("only here", ["a"])
    shown = warnings.showwarning
    with logs.listening(), warnings.catch_warnings(record=False):
        warnings.simplefilter("always")
        logging.getLogger("somewhere").warning("hot")
        logging.getLogger("somewhere").info("cold")
    assert warnings.showwarning is shown
    text = logs.path("b").read_text()
    assert text.splitlines()[0].endswith("Z begins")
    assert "WARNING somewhere: hot" in text
    assert "cold" not in text
    assert "only here" not in text
    assert "only here" in logs.path("a").read_text()


def test_a_full_disk_ends_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    RunLogs({"a": tmp_path / "file" / "a"}).say("lost")
