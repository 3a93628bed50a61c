"""A cluster of real Ray nodes on this machine, as `docs/cluster.md` starts it: a head and a worker by `ray start`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator.environment import ROOT

pytestmark = pytest.mark.slow
START_S, COMMAND_S = 120, 300
TINY = [
    "method=bc", "dataset=embedded/pendulum-medium-v0,first=2000", "method.hidden=[16,16]", "method.num_updates=20",
    "method.updates_per_epoch=10", "method.batch_size=32", "evaluation.episodes=1", "evaluation.every_epochs=2",
]  # fmt: skip


class Nodes(NamedTuple):
    """What a driver has to know of a cluster."""

    address: str
    environment: dict[str, str]
    folder: Path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes with a token and a folder of Ray's own each, whose Python would import another `agents`."""
    folder = Path(tempfile.mkdtemp(prefix="osw-", dir="/tmp"))  # Ray's sockets need short paths
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    shadow = folder / "shadow" / "agents"  # as a machine with other code has it
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("")
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(folder / "shadow"),
    }  # fmt: skip
    port = _free_port()
    address = f"127.0.0.1:{port}"
    joins = [["--head", f"--port={port}", "--include-dashboard=false"], [f"--address={address}"]]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "start.log").open("wb") as log:
            for name, join in zip(("head", "worker"), joins, strict=True):
                # --block: the processes of the node end with this one
                command = [shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray", "start", "--block"]
                options = ["--num-cpus=1", f"--temp-dir={folder / name}"]
                started.append(subprocess.Popen(
                    [*command, *join, *options], env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, start_new_session=True,
                ))  # fmt: skip
                _wait_for(folder / "start.log", len(started), started[-1])
        yield Nodes(address, {**environment, "PYTHONPATH": str(ROOT)}, folder)
    finally:
        for process in started:
            _end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(log: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while log.read_text(errors="replace").count("Ray runtime started") < count:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End a node: what it has started goes with it, and what is left is known by the folder in its command."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (place / "cmdline").read_bytes():
                os.kill(int(place.name), signal.SIGKILL)
    process.wait(timeout=20)


def offsweep(nodes: Nodes, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of offsweep, called outside the checkout."""
    cwd = nodes.folder / "elsewhere"
    cwd.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], env=nodes.environment, cwd=cwd, capture_output=True, text=True,
        timeout=COMMAND_S, check=False,
    )  # fmt: skip


def test_a_live_cluster_is_checked(nodes: Nodes):
    work = nodes.folder / "checked"
    done = offsweep(nodes, "cluster", "check", "--live", "--address", nodes.address, "--workdir", str(work), "--json")
    assert done.returncode == 0, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert "2 answer" in found["nodes"]["text"]
    assert "token" in found["authentication"]["text"]
    assert "the driver ships its own" in found["code"]["text"]
    assert "2 nodes write there" in found[f"work folder {work}"]["text"]
    assert not work.exists()  # nothing is left behind


def test_a_training_runs_on_nodes_that_have_other_code(nodes: Nodes):
    work = nodes.folder / "work"
    options = ["--workdir", str(work), "num_seeds=2", "compute.runs_per_pack=1", f"compute.address={nodes.address}"]
    done = offsweep(nodes, "train", *TINY, "study.name=there", "compute.num_learners=2", *options)
    assert done.returncode == 0, done.stderr
    # the numbers are those of a process without Ray
    here = ["--workdir", str(work), "num_seeds=2", "compute.runs_per_pack=1", "compute.num_learners=0"]
    assert offsweep(nodes, "train", *TINY, "study.name=here", *here).returncode == 0
    there, alone = (
        {path.parent.name: path.read_bytes() for path in (work / "studies" / name / "runs").glob("*/policy.npz")}
        for name in ("there", "here")
    )
    assert len(there) == 2
    assert there == alone


def test_a_driver_without_the_token_is_not_let_in(nodes: Nodes):
    strange = nodes.folder / "strange"
    strange.write_text(secrets.token_hex(32))
    for change in ({"RAY_AUTH_TOKEN_PATH": str(strange)}, {"RAY_AUTH_MODE": "disabled"}):
        outside = nodes._replace(environment={**nodes.environment, **change})
        done = offsweep(outside, "cluster", "check", "--live", "--address", nodes.address)
        assert done.returncode == 2, done.stdout
        mode = outside.environment["RAY_AUTH_MODE"]
        assert f"does not let this driver in, whose RAY_AUTH_MODE is {mode}" in done.stderr
