"""What benchmarks share that turn a laboratory into lines of results; no benchmark itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import print_line
from envs.errors import UserError
from orchestrator.environment import prepare_environment

Lines = Callable[[Path, str], Iterable[dict[str, Any]]]  # of a finished laboratory's study folder; command


def lab_main(benchmark: str, description: str | None, lab: str, lines: Lines) -> int:
    """Print the lines of the laboratory in `--workdir`; it is run first if it is not there.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("offsweep-work"))
    args = parser.parse_args()
    folder = args.workdir / "studies" / lab
    prepare_environment()
    from orchestrator.labs import run_lab
    from orchestrator.labs.common import ROWS_FILE

    try:
        if not (folder / ROWS_FILE).exists():
            run_lab(lab, str(args.workdir), None, None, Console(stderr=True))
        for line in lines(folder, f"python -m benchmarks.{benchmark} --workdir {args.workdir.name}"):
            print_line(line)
    except UserError as error:
        print(f"{benchmark}: {error}", file=sys.stderr)
        return 2
    return 0
