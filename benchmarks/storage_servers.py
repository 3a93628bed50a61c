"""Servers that a study can be shared through, on this machine and for one run of the tests or the benchmark."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "of-this-run"


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, if they are installed."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A PostgreSQL server with data of its own, run by `nobody` where we are root, by whom it refuses to be run."""

    def __init__(self, programs: Path, folder: Path, durable: bool) -> None:
        self._durable = durable
        self._programs, self._data, self.port = programs, folder / "data", free_port()
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        password = folder / "password"
        password.write_text(PASSWORD)
        if self._user:
            shutil.chown(password, self._user)
        self._call("initdb", "--username=tester", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync")
        self._log = folder / "log"
        self.start()

    def url(self, database: str) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        import psycopg

        address = f"host=127.0.0.1 port={self.port} user=tester password={PASSWORD} dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k '' -c fsync={'on' if self._durable else 'off'}"
        self._call("pg_ctl", "start", "--wait", f"--log={self._log}", f"--options={options}")

    def stop(self, mode: str = "fast") -> None:
        self._call("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def _call(self, program: str, *words: str) -> None:
        command = [str(self._programs / program), f"--pgdata={self._data}", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._user, cwd="/")


@contextmanager
def postgres_server(durable: bool = False) -> Iterator[Postgres]:
    """A server; without `durable` it does not wait for the disk."""
    programs = postgres_programs()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="postgres-test-"))
    try:
        server = Postgres(programs, folder, durable)
        yield server
        server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def grpc_server(folder: Path) -> Iterator[str]:
    """Optuna's own server, over a journal."""
    port = free_port()
    script = (
        "import sys; from optuna.storages import JournalStorage, run_grpc_proxy_server; "
        "from optuna.storages.journal import JournalFileBackend; "
        "run_grpc_proxy_server(JournalStorage(JournalFileBackend(sys.argv[1])), port=int(sys.argv[2]))"
    )
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, str(folder / "server.log"), str(port)],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
