"""`python -m benchmarks.run [NAME ...] [-- OPTIONS]`: run benchmarks and keep what they print.

Without names the quick ones run. Options behind `--` go to the benchmark, which must then be a single one. The results
of a benchmark replace its earlier ones when it has ended well, and only then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, parse_line
from envs.errors import UserError
from orchestrator.artifacts import write_text

QUICK = ("learner_speed",)  # some minutes
NO_BENCHMARKS = ("common", "made_up_objectives", "run", "simulation", "storage_servers", "studies")
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem not in NO_BENCHMARKS)


def run_benchmark(name: str, options: Sequence[str], folder: Path) -> Path:
    """Run one benchmark in a process of its own, showing its lines as they come.

    Returns:
        The file written, `folder/<name>.jsonl`.

    Raises:
        UserError: it failed or printed something else than lines of results; the file is then left as it was.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            lines.append(text)
    path = folder / f"{name}.jsonl"
    if process.returncode != 0:
        raise UserError(f"benchmark {name} ended with exit code {process.returncode}; {path.name} is left as it was")
    for text in lines:
        parse_line(text, name)
    if not lines:
        raise UserError(f"benchmark {name} printed no results; {path.name} is left as it was")
    write_text(path, "".join(lines))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    options = words[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run benchmarks, keep results.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    args = parser.parse_args(words[:cut])
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(NAMES)}")
    names = args.names or list(QUICK)
    if options and len(names) != 1:
        parser.error("options behind -- need a single benchmark")
    failed = False
    for name in names:
        try:
            path = run_benchmark(name, options, args.out)
        except UserError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            failed = True
        else:
            print(f"wrote {path}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
