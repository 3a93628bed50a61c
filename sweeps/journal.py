"""A study's record on disk: Optuna's journal, with groups of operations that are written whole or not at all.

The file is one JSON object per line, as `optuna.storages.journal.JournalFileBackend` writes it, and can be
read by Optuna's own tools. Two things are different, both because a driver may be killed at any byte:

* What belongs together (a new trial with all its parameters) is one write, and each of its lines says which
  part it is (`"group": [index, size]`). `mend` cuts an incomplete group as well as a torn line, so that a
  trial that nobody was given does not exist, and asking again gives the same one.
* There is no lock per line. Optuna's would outlive a killed driver, and the study's own lock admits only one
  writer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from sweeps.errors import StudyError


class Journal(BaseJournalBackend):
    """Optuna journal backend on one local file; one writer, any number of readers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = [0]  # where line n begins, for the complete lines read so far and the one after them
        self._pending: list[dict[str, Any]] | None = None  # operations of the open group

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Operations from the given number on, those of the open group included."""
        first = min(log_number_from, len(self._offsets) - 1)
        group: list[dict[str, Any]] = []
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offsets[first])
                offset = self._offsets[first]
                ends: list[int] = []
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written, or torn
                    offset += len(line)
                    operation = _parse(line, self._path)
                    index, size = operation.pop("group", (0, 1))
                    ends.append(offset)
                    group.append(operation)
                    if index + 1 < size:
                        continue  # a reader beside the writer sees whole groups only
                    for operation, end in zip(group, ends, strict=True):
                        if first + 1 == len(self._offsets):
                            self._offsets.append(end)
                        if first >= log_number_from:
                            yield operation
                        first += 1
                    group, ends = [], []
        if self._pending is not None:
            yield from self._pending[max(0, log_number_from - (len(self._offsets) - 1)) :]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write operations, or keep them until the open group ends.

        Raises:
            StudyError: the file cannot be written; it is then as it was before.
        """
        if self._pending is None:
            self._write(logs)
        else:
            self._pending += [json.loads(json.dumps(log)) for log in logs]

    @property
    def in_group(self) -> bool:
        """Whether a group is open."""
        return self._pending is not None

    @contextmanager
    def group(self) -> Iterator[None]:
        """Everything appended inside is one write at the end; nothing is written if the body raises."""
        self._pending = []
        try:
            yield
            operations = self._pending
        finally:
            self._pending = None
        size = len(operations)
        self._write([{**op, "group": [index, size]} if size > 1 else op for index, op in enumerate(operations)])

    def _write(self, operations: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(operation, separators=(",", ":")) + "\n" for operation in operations)
        data = memoryview(text.encode())
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    while data:
                        data = data[os.write(descriptor, data) :]
                    os.fsync(descriptor)
                except BaseException:
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StudyError(
                f"Cannot write {self._path} ({error.strerror}); what it holds is intact, so make room or fix "
                "the permissions and resume the study."
            ) from error


def mend(path: Path) -> int:
    """Cut what a killed writer left unfinished at the end of a journal: a torn line, an incomplete group.

    Returns:
        Number of bytes cut. Nothing that was ever acted upon is lost: the writer goes on only after a whole
        write.
    """
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            index, size = _parse(data[start:end], path).get("group", (0, 1))
            if index + 1 < size:
                for _ in range(index + 1):
                    end = data.rfind(b"\n", 0, end - 1) + 1
        if end < len(data):
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
    return len(data) - end


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        operation = json.loads(line)
        if not isinstance(operation, dict):
            raise ValueError
    except ValueError as error:
        raise StudyError(f"{path} is damaged: a line of it is not JSON; restore the file from a copy.") from error
    return operation
