"""What benchmarks share that turn a laboratory into lines of results; no benchmark itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import print_line
from envs.errors import UserError
from orchestrator.environment import prepare_environment

Lines = Callable[[Path, str], Iterable[dict[str, Any]]]  # of a finished laboratory's study folder; command


def lab_main(benchmark: str, description: str | None, labs: str | Sequence[str], lines: Lines) -> int:
    """Print the lines of the laboratory in `--workdir`; it is run first if it is not there.

    Args:
        labs: its name, or those of several, of which `--labs` takes some.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("offsweep-work"))
    several = [] if isinstance(labs, str) else list(labs)
    if several:
        parser.add_argument("--labs", nargs="+", choices=several, default=several)
    args = parser.parse_args()
    chosen: list[str] = args.labs if several else [str(labs)]
    command = f"python -m benchmarks.{benchmark} --workdir {args.workdir.name}"
    if several and chosen != several:
        command += f" --labs {' '.join(chosen)}"
    prepare_environment()
    from orchestrator.labs import run_lab
    from orchestrator.labs.common import ROWS_FILE

    try:
        for lab in chosen:
            folder = args.workdir / "studies" / lab
            if not (folder / ROWS_FILE).exists():
                run_lab(lab, str(args.workdir), None, None, Console(stderr=True))
            for line in lines(folder, command):
                print_line(line)
    except UserError as error:
        print(f"{benchmark}: {error}", file=sys.stderr)
        return 2
    return 0
