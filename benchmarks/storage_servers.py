"""Servers that a study can be shared through, or recorded in, on this machine and for one run of the tests or a
benchmark."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
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

    def set_read_only(self, database: str, on: bool) -> None:
        """Have a database refuse to be written to, or not any longer."""
        import psycopg

        address = f"host=127.0.0.1 port={self.port} user=tester password={PASSWORD} dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(
                f'ALTER DATABASE "{database}" SET default_transaction_read_only = {"on" if on else "off"}'
            )
            # it holds for new connections
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])

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


class MlflowServer:
    """An MLflow server over a database, which keeps artifacts in a folder of its own and hands them on (so that clients
    need to see nothing but the server).

    Args:
        store: of the database, with what it needs to be opened.
        folder: of artifacts and of its log.
        words: more of its command line, such as `--allowed-hosts`.
        variables: of its environment.
    """

    def __init__(
        self, store: str, folder: Path, words: Sequence[str] = (), variables: Mapping[str, str] | None = None
    ) -> None:
        self._store, self._folder, self._words = store, folder, list(words)
        self._variables, self.port = dict(variables or {}), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, patience_s: float = 180.0) -> None:
        """Start it, and wait until it answers."""
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": self._store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true", "PGPASSWORD": PASSWORD, **self._variables,
        }  # fmt: skip
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--artifacts-destination",
            (self._folder / "kept").as_uri(),
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", *self._words]
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"the MLflow server does not start: {(self._folder / 'server.log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Kill it, and the workers that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def mlflow_server(
    store: str, words: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[MlflowServer]:
    """A server over a database that is there; its artifacts are gone with it."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-server-"))
    server = None
    try:
        server = MlflowServer(store, folder, words, variables)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
