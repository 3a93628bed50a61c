"""Ten bad inputs, as a user would give them: what `offsweep data info` says, how it exits and what it leaves."""

from __future__ import annotations

import argparse
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.common import ROOT, print_line, record
from envs.d4rl_sets import d4rl_spec

WRONG_FILE = "halfcheetah-medium-replay-v0"  # D4RL's smallest
COLUMNS = {"observations": 11, "actions": 3, "rewards": 0, "next_observations": 11, "terminals": 0, "timeouts": 0}


@dataclass
class Case:
    """What is typed: a name or path, the environment variables of the process, and the command before it."""

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()


def good_columns(rows: int = 200) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    columns = {c: rng.normal(size=(rows, width) if width else rows).astype(np.float32) for c, width in COLUMNS.items()}
    ends = np.arange(rows) % 50 == 49
    return {**columns, "terminals": np.zeros(rows, bool), "timeouts": ends}


def write(path: Path, columns: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values)
    return path


def missing_key(folder: Path) -> Case:
    columns = good_columns()
    del columns["actions"]
    return Case(str(write(folder / "hopper_medium-v2.hdf5", columns)))


def wrong_dtype(folder: Path) -> Case:
    columns = {**good_columns(), "actions": np.full((200, 3), b"left")}
    return Case(str(write(folder / "hopper_medium-v2.hdf5", columns)))


def truncated_file(folder: Path) -> Case:
    path = write(folder / "hopper_medium-v2.hdf5", good_columns())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return Case(str(path))


def mismatched_lengths(folder: Path) -> Case:
    columns = good_columns()
    columns["rewards"] = columns["rewards"][:-1]
    return Case(str(write(folder / "hopper_medium-v2.hdf5", columns)))


def nan(folder: Path) -> Case:
    columns = good_columns()
    columns["observations"][7, 2] = np.nan
    return Case(str(write(folder / "hopper_medium-v2.hdf5", columns)))


def unknown_name(folder: Path) -> Case:
    return Case("hopper-medum-v2")


def no_network(folder: Path) -> Case:
    # In a network namespace of its own a process has no network, whatever the machine has.
    return Case("hopper-medium-v2", prefix=("unshare", "-rn"))


def no_disk_space(folder: Path) -> Case:
    path, small = write(folder / "hopper_medium-v2.hdf5", good_columns(5000)), folder / "small"
    small.mkdir()
    # A file system of 64 kB, which only this process sees.
    mounted = f'mount -t tmpfs -o size=64k none {small} && "$@"; code=$?; find {small} -type f; exit $code'
    return Case(str(path), {"OFFSWEEP_CACHE": str(small)}, ("unshare", "-rm", "sh", "-c", mounted, "sh"))


def wrong_checksum(folder: Path) -> Case:
    spec = d4rl_spec(WRONG_FILE)
    assert spec is not None
    return Case(spec.name, {"http_proxy": _serve_zeros(spec.size or 0)})


def empty_file(folder: Path) -> Case:
    path = folder / "hopper_medium-v2.hdf5"
    path.touch()
    return Case(str(path))


CASES: tuple[Callable[[Path], Case], ...] = (
    missing_key, wrong_dtype, truncated_file, mismatched_lengths, nan, unknown_name, no_network, no_disk_space,
    wrong_checksum, empty_file,
)  # fmt: skip


def _serve_zeros(size: int) -> str:
    """A proxy on this machine that has a file of `size` zeros for every address; its own address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(bytes(size))

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def try_out(make: Callable[[Path], Case], command: str) -> dict[str, Any]:
    """Run the command line on a bad input."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = make(folder)
        before = {path for path in folder.rglob("*") if path.is_file()}
        no_proxies = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        folders = {"D4RL_DATASET_DIR": str(folder / "d4rl"), "OFFSWEEP_WORKDIR": str(folder / "work")}
        words = [*case.prefix, sys.executable, "-m", "orchestrator", "data", "info", case.name]
        started = time.perf_counter()
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**no_proxies, **folders, **case.variables},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p not in before)
        left += done.stdout.split() if case.prefix else []  # what is left where only that process could look
        message = done.stderr.replace(str(folder), "FOLDER").strip()
    return record(
        "data_bad_inputs", make.__name__, done.returncode, "exit code", 2, 1, command, input=make.__name__,
        typed=f"offsweep data info {case.name.replace(str(folder), 'FOLDER')}", exit_code=done.returncode,
        message=message, lines=len(message.splitlines()), left_behind=left, seconds=seconds,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_bad_inputs", description=__doc__)
    names = [case.__name__ for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    args = parser.parse_args(argv)
    if {"no_network", "no_disk_space"} & {*args.cases} and shutil.which("unshare") is None:
        parser.error("no_network and no_disk_space need Linux's unshare: name the other cases with --cases")
    command = " ".join(["python -m benchmarks.data_bad_inputs", *(sys.argv[1:] if argv is None else argv)])
    for case in CASES:
        if case.__name__ in args.cases:
            print_line(try_out(case, command))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
