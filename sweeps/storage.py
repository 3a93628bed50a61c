"""A study in a database, which several drivers work on at once.

What the drivers have to agree on is written so that it needs no lock and survives a kill between any two writes. It
rests on one promise of Optuna's storages: trials are numbered from 0 without gaps, in the order of their creation,
whoever creates them. The first of several equal claims is therefore the same one for everybody, now and later, and
those behind it give way (`Study.ask`). That a trial has ended is the second: a storage ends it once.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from sweeps._optuna import optuna
from sweeps.errors import StudyError, suggestion

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage, RDBStorage
    from sqlalchemy.engine import URL

PASSWORD = "OFFSWEEP_STORAGE_PASSWORD"  # environment variable
DRIVER_FILE = "driver.id"
CONNECT_SECONDS = 10  # until a server that does not answer counts as unreachable
OUTAGE_SECONDS = 300.0  # that a driver waits for a storage which has gone away
BEAT_SECONDS = 60.0  # between signs of life, at most

_SCHEMES = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}  # scheme -> with the driver package meant
_PACKAGES = {"postgresql": "psycopg[binary]", "mysql": "pymysql"}
_KNOWN = ("postgresql", "mysql", "sqlite", "grpc")


# Where it is


def check_url(text: str) -> None:
    """Whether `study.storage` can be meant, without connecting.

    Raises:
        StudyError: an unknown kind, a password (which would end up in files and in MLflow), a relative path.
    """
    scheme = text.partition("://")[0].partition("+")[0]
    if "://" not in text or scheme not in _KNOWN:
        raise StudyError(
            f"study.storage begins with a scheme and '://', such as postgresql://user@host/database; unknown scheme "
            f"'{scheme if '://' in text else ''}', {suggestion(scheme, _KNOWN)}."
        )
    if scheme == "grpc":
        _grpc_address(text)
        return
    url = _rdb_url(text)
    if url.password is not None or any("password" in key.lower() or "passwd" in key.lower() for key in url.query):
        raise StudyError(
            "study.storage holds a password, which would be written to config.yaml and to MLflow; leave it out and "
            f"set the environment variable {PASSWORD}."
        )
    if scheme == "sqlite" and not (url.database or "").startswith("/"):
        raise StudyError("study.storage must give SQLite's file by its full path, such as sqlite:////data/studies.db.")


def _grpc_address(text: str) -> tuple[str, int]:
    parts = urlsplit(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.username is not None or not host or port is None or parts.path.strip("/"):
        raise StudyError("study.storage must have the form grpc://host:port, without anything else.")
    return host, port


def _rdb_url(text: str) -> URL:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise StudyError(
            "study.storage is not a database URL; its form is postgresql://user@host:port/database."
        ) from None
    return url.set(drivername=_SCHEMES.get(url.drivername, url.drivername))


def open_storage(text: str) -> BaseStorage:
    """Connect to the storage that `study.storage` names; its calls outlast an outage of `OUTAGE_SECONDS`.

    Raises:
        StudyError: in one sentence: a package is missing, nobody answers, or the password is refused.
    """
    check_url(text)
    if text.startswith("grpc://"):
        return cast("BaseStorage", _Patient(_open_grpc(text), text))
    return cast("BaseStorage", _Patient(_open_rdb(text), text))


def _open_grpc(text: str) -> BaseStorage:
    host, port = _grpc_address(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            storage = optuna.storages.GrpcStorageProxy(host=host, port=port)
        except ImportError:
            raise StudyError("study.storage=grpc://... needs grpcio: pip install 'offsweep[storage]'.") from None
    try:
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
    except ConnectionError:
        storage.close()
        raise StudyError(f"Nobody answers at study.storage={text}; start the server, or correct the address.") from None
    return storage


def _open_rdb(text: str) -> BaseStorage:
    from sqlalchemy import event
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    url = _rdb_url(text)
    backend = url.get_backend_name()
    if backend != "sqlite" and (password := os.environ.get(PASSWORD)):
        url = url.set(password=password)
    arguments: dict[str, Any] = {"timeout": 60} if backend == "sqlite" else {"connect_timeout": CONNECT_SECONDS}
    try:
        rdb = _make_tables(
            lambda: optuna.storages.RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": arguments, "pool_pre_ping": True},
            )
        )
    except (ImportError, NoSuchModuleError) as error:
        package = _PACKAGES.get(backend)
        hint = f"pip install '{package}'" if package and isinstance(error, ImportError) else "name another one"
        raise StudyError(f"study.storage={text} needs a database driver that is not installed; {hint}.") from None
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        raise StudyError(f"Cannot open study.storage={text}: {_reason(error)}.") from None
    except RuntimeError as error:  # tables of another version of Optuna
        raise StudyError(f"study.storage={text} cannot be used: {' '.join(str(error).split())}") from None
    if backend == "sqlite":
        # SQLite knows no locked rows, so that a transaction which reads before it writes is locked as a whole
        rdb.engine.dispose()
        event.listen(rdb.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(rdb.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return optuna.storages.get_storage(rdb)


def _make_tables(open_rdb: Callable[[], RDBStorage]) -> RDBStorage:
    """Open a database; of drivers that are the first to do so at the same time, all but one find half of its tables
    made and have to look again."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for attempt in range(8):
        try:
            return open_rdb()
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                raise
            time.sleep(0.1 * 2**attempt)
    return open_rdb()


def _reason(error: BaseException) -> str:
    """What went wrong, in the database's own words, without a password."""
    while isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    password = os.environ.get(PASSWORD)
    return (text.replace(password, "***") if password else text).rstrip(".?")


class _Patient:
    """A storage whose calls are made again while its server is away."""

    def __init__(self, storage: BaseStorage, text: str) -> None:
        self._storage, self._text = storage, text

    @property
    def impatient(self) -> BaseStorage:
        return self._storage

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._storage, name)
        if not callable(method):
            return method

        @functools.wraps(method)
        def patient(*args: Any, **kwargs: Any) -> Any:
            began, wait, last = time.monotonic(), 0.1, None
            while True:
                try:
                    return method(*args, **kwargs)
                except optuna.exceptions.UpdateFinishedTrialError:
                    # the call before this one may have gone through before its answer was lost
                    if last is not None and name == "set_trial_state_values":
                        return self._storage.get_trial(args[0]).state == (args[1] if len(args) > 1 else kwargs["state"])
                    raise
                except Exception as error:
                    if not is_outage(error):
                        raise
                    last = error
                if time.monotonic() - began >= OUTAGE_SECONDS:
                    raise StudyError(
                        f"study.storage={self._text} has not answered for {OUTAGE_SECONDS / 60:.3g} minutes "
                        f"({_reason(last)}); nothing is lost: continue with `offsweep resume` when it is back."
                    ) from last
                time.sleep(wait)
                wait = min(2 * wait, 10.0)

        return patient


def is_outage(error: BaseException) -> bool:
    """Whether an error says that the storage's server is away or overloaded, rather than that a call is wrong."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if type(error).__module__.startswith("sqlalchemy"):
        from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        return isinstance(error, (OperationalError, InterfaceError)) or lost
    # gRPC's, whose UNKNOWN stands for what its server cannot get from the database behind it
    code = getattr(error, "code", None)
    return callable(code) and getattr(code(), "name", "") in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN")


# Who works on it


def driver_id(folder: Path) -> str:
    """The identity of the driver whose folder this is; the same after its death."""
    path = folder / DRIVER_FILE
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(f"{name}\n", encoding="utf-8")
    os.replace(temporary, path)
    return name


class Ledger:
    """What the drivers of a study have written down for each other: entries that are only ever added, in one order.

    They are the trials of an Optuna study beside the study itself, since Optuna numbers trials as they are created.
    """

    def __init__(self, storage: BaseStorage, study_name: str) -> None:
        self.storage = storage
        self.name = f"{study_name} (drivers)"
        study = optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True)
        self.study_id = study._study_id

    def add(self, kind: str, driver: str, content: Any) -> None:
        attrs = {"kind": kind, "driver": driver, "content": content}
        self.storage.create_new_trial(
            self.study_id, template_trial=optuna.trial.create_trial(value=0.0, user_attrs=attrs)
        )

    def read(self, kind: str) -> list[tuple[str, Any]]:
        """Driver and content of the entries of a kind, in their order."""
        attrs = [trial.user_attrs for trial in self.storage.get_all_trials(self.study_id, deepcopy=False)]
        return [(one["driver"], one["content"]) for one in attrs if one["kind"] == kind]

    def settle(self, kind: str, driver: str, content: Any) -> tuple[str, Any]:
        """The first entry of a kind, which is this one if there is none yet."""
        if not self.read(kind):
            self.add(kind, driver, content)
        return self.read(kind)[0]


class Heartbeat:
    """Signs of life in the storage, and who of the others gives them.

    No clocks are compared: a driver counts as dead when its sign has not changed over so many of our own beats that
    their intervals make up the minutes given. A process that was itself stopped for a time has not counted meanwhile.
    """

    def __init__(self, ledger: Ledger, driver: str, minutes: float) -> None:
        self._storage = getattr(ledger.storage, "impatient", ledger.storage)  # the next beat is its own retry
        self._study_id, self._driver = ledger.study_id, driver
        self.interval = min(BEAT_SECONDS, minutes * 60 / 10)  # seconds
        self._beats_to_death = math.ceil(minutes * 60 / self.interval)
        self._process, self._count = secrets.token_hex(4), 0
        self._seen: dict[str, Any] = {}  # driver -> its last sign
        self._unchanged: dict[str, int] = {}  # driver -> beats of ours
        self._beats = 0
        self.doubled = False  # another process uses our identity
        self._stop = threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Give a sign and look for those of the others."""
        key = f"sign of {self._driver}"
        signs = self._storage.get_study_user_attrs(self._study_id)
        self.doubled = self.doubled or (self._count > 0 and signs[key][0] != self._process)
        self._storage.set_study_user_attr(self._study_id, key, [self._process, self._count + 1])
        self._count += 1
        self._beats += 1
        for name, sign in signs.items():
            driver = name.removeprefix("sign of ")
            self._unchanged[driver] = self._unchanged.get(driver, 0) + 1 if self._seen.get(driver) == sign else 0
            self._seen[driver] = sign

    def is_dead(self, driver: str | None) -> bool:
        """Whether a driver has been silent for too long; None stands for one that left no name."""
        return self._unchanged.get(driver or "", self._beats) >= self._beats_to_death

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=CONNECT_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self.beat()
            except Exception as error:  # counted by nobody; the driver's own calls find out what is wrong
                if not is_outage(error):
                    raise


def new_trial(
    storage: BaseStorage,
    study_id: int,
    attrs: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    distributions: Mapping[str, BaseDistribution] | None = None,
) -> int:
    """Create a running trial with all it holds in one transaction; returns its number.

    Args:
        attrs: kept with it.
        fixed: values that the sampler is not to choose.
        params, distributions: all of them, where nothing is left to be chosen.
    """
    template = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        params=dict(params or {}),
        distributions=dict(distributions or {}),
        user_attrs=dict(attrs),
        system_attrs={} if fixed is None else {"fixed_params": dict(fixed)},
    )
    template.datetime_start = datetime.now()
    return storage.get_trial_number_from_id(storage.create_new_trial(study_id, template_trial=template))
