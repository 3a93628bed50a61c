"""Laboratories: a paper's experiment on a toy task as a study of listed trials, its table and its figure.

A laboratory is a module here and a study in `sweeps/studies` of the same name. The module has

- `ABOUT`: what it shows, in a line;
- `options(seeds, updates)`: what the numbers of the command line change of the study, as a configuration;
- `show(config, study, spool, console)`: called when all trials have ended; prints the table and leaves `lab.csv` and
  the figure in the study's folder, both also as artifacts.

and, where tables are made of it,

- `table_values(folder, row, column)`: what it has measured for a cell, by seed, from the files in its study's folder.

A laboratory that takes seconds needs no study: instead of `options` and `show` it has

- `run(workdir, seeds, updates, console)`: does it all, in this process, and leaves both files in a folder of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from envs.errors import UserError
from orchestrator import launch
from orchestrator.config import load_config
from orchestrator.labs.common import ROWS_FILE
from orchestrator.spool import RunSpool
from sweeps.study import Study

LABS = ("edge-of-reach", "grid-world", "penalties", "penalties-halfcheetah", "refrigerator")
STUDIES = Path(__file__).parent.parent.parent / "sweeps" / "studies"


def list_labs(console: Console) -> None:
    """Print what there is."""
    for name in LABS:
        console.print(f"{name}: {_module(name).ABOUT}", highlight=False)


def run_lab(name: str, workdir: str, seeds: int | None, updates: int | None, console: Console) -> Sequence[Any]:
    """Train what is not trained yet, and show it.

    Args:
        seeds: how often everything is repeated; None: as the study's file says.
        updates: of every run; None: likewise.

    Returns:
        The rows of lab.csv.

    Raises:
        UserError: there is no such lab, a number makes no sense, or the study in the work folder is another one.
    """
    if name not in LABS:
        raise UserError(f"unknown lab {name!r}; known: {', '.join(LABS)}")
    for option, value in (("--seeds", seeds), ("--updates", updates)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} must be at least 1")
    lab, file = _module(name), _file(name)
    if hasattr(lab, "run"):
        results: Sequence[Any] = lab.run(workdir, seeds, updates, console)
        return results
    config = load_config([{"workdir": workdir}, file, lab.options(seeds, updates)], [])
    rows: list[Any] = []

    def report(study: Study, spool: RunSpool) -> None:
        rows.extend(lab.show(config, study, spool, console))

    if (Path(workdir) / "studies" / config.study.name / "config.yaml").exists():
        launch.resume(config.study.name, Path(workdir), [], console, asked=config, report=report)
    else:
        launch.start(config, console, report)
    return rows


def lab_values(name: str, workdir: Path, row: str, column: str) -> dict[int, float]:
    """What a laboratory has measured for a cell of a table, by seed; nothing where it has not ended in this work
    folder.

    Args:
        row, column: what is read of its results: see the laboratory's `table_values`.

    Raises:
        UserError: there is no such lab, no table is made of it, or it has nothing of that name.
    """
    if name not in LABS or not hasattr(_module(name), "table_values"):
        raise UserError(f"no table is made of a lab {name!r}")
    folder = workdir / "studies" / study_name(name)
    if not (folder / ROWS_FILE).exists():
        return {}
    found: dict[int, float] = _module(name).table_values(folder, row, column)
    if not found:
        raise UserError(f"lab {name} has measured nothing called {column!r}{f' of {row!r}' if row else ''}")
    return found


def study_name(lab: str) -> str:
    """Of the study that a laboratory's file describes."""
    name: str = yaml.safe_load(_file(lab).read_text())["study"]["name"]
    return name


def _file(name: str) -> Path:
    return STUDIES / f"{name.replace('-', '_')}.yaml"


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
