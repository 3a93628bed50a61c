"""What happened to a run, in words: `log.txt` in its folder, which goes to MLflow under `logs/`."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG_FILE = "log.txt"
ARTIFACT_FOLDER = "logs"


class RunLogs:
    """The logs of a pack's runs. Lines are appended, so that a run that goes on after a kill goes on in the same file.

    Args:
        folders: of the runs, by run key; made when something is said.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)

    def path(self, run_key: str) -> Path:
        return self._folders[run_key] / LOG_FILE

    def say(self, text: str, keys: Iterable[str] | None = None) -> None:
        """Append a line, with the time (UTC), to the logs of some runs; None: of all. A disk that is full does not end
        a training that logs nothing else."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for key in self._folders if keys is None else keys:
            try:
                self._folders[key].mkdir(parents=True, exist_ok=True)
                with open(self.path(key), "a") as file:
                    file.write(f"{stamp} {text}\n")
            except OSError:
                continue

    def failure(self, error: BaseException) -> None:
        """An error with its traceback."""
        self.say("".join(traceback.format_exception(error)).rstrip())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Warnings, of `warnings` and of `logging`, that are given inside become lines, too."""
        handler, root, show = _Handler(self), logging.getLogger(), warnings.showwarning

        def show_and_say(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
            self.say(f"{category.__name__} ({Path(filename).name}:{lineno}): {message}")
            show(message, category, filename, lineno, *rest)

        alone = not root.handlers
        if alone and logging.lastResort is not None:
            root.addHandler(logging.lastResort)  # else ours would keep warnings from standard error
        root.addHandler(handler)
        warnings.showwarning = show_and_say  # type: ignore[assignment]
        try:
            yield
        finally:
            warnings.showwarning = show
            root.removeHandler(handler)
            if alone and logging.lastResort is not None:
                root.removeHandler(logging.lastResort)


class _Handler(logging.Handler):
    def __init__(self, logs: RunLogs) -> None:
        super().__init__(logging.WARNING)
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        self._logs.say(f"{record.levelname} {record.name}: {record.getMessage()}")
