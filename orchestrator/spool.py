"""The spool: what a run wants recorded, appended to a JSON Lines file on local disk before anybody sends it.

The training side writes (`RunSpool`), the tracker reads (`read_records`). This module does not import MLflow,
so a learner can log without paying for it and without ever waiting for a server.

One line is one JSON object with `type` and `time` (milliseconds since 1970, taken when it was logged):

    start      run_name, params, tags, datasets      the run begins, or is resumed
    metrics    step, values                          numbers; "nan", "inf", "-inf" if not finite
    artifact   path, artifact_path                   a file or folder to upload
    tags       tags
    end        status
    close      status, tags                          the same for a run that has not ended, on behalf of a machine that
                                                     cannot say so
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from envs.errors import UserError

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

SUFFIX = ".jsonl"
_RUN_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# What MLflow accepts as the name of a metric, a parameter or a tag (mlflow.utils.validation).
_NAME = re.compile(r"[/\w.\- :]{1,250}")


class SpoolError(UserError):
    """Something cannot be recorded: a name MLflow would refuse, or a file that cannot be written."""


class DatasetRecord(TypedDict, total=False):
    """A dataset that a run trained on. `name` and `digest` are required."""

    name: str
    digest: str  # content hash in hex
    source: str  # where it came from: a URL, an absolute path, or words
    context: str  # what it was used for; "training" if absent
    schema: dict[str, dict[str, Any]]  # column -> {"dtype": numpy name, "shape": list of int, -1 for rows}
    profile: dict[str, Any]  # anything worth showing: rows, returns, provenance


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts.

    Attributes:
        run_name: the name shown in MLflow's table.
        params: hyperparameters and settings, by dotlist key.
        tags: study, trial, seed and whatever runs are searched by.
        datasets: the datasets it trains on.
    """

    run_name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[DatasetRecord, ...] | list[DatasetRecord] = ()


def spool_folder(study_folder: str | Path, own_disk: str | None = None) -> Path:
    """Where the runs of a study are logged.

    Args:
        study_folder: of the study.
        own_disk: a folder of each machine's own; `~` and variables such as `$TMPDIR` mean what they do on the machine
            that asks. None: in the study's folder.
    """
    if own_disk is None:
        return Path(study_folder) / "spool"
    digest = hashlib.sha256(str(study_folder).encode()).hexdigest()[:8]
    folder = Path(os.path.abspath(os.path.expandvars(os.path.expanduser(own_disk))))
    return folder / f"{Path(study_folder).name}-{digest}"


def check_run_key(run_key: str) -> str:
    """The run key itself; SpoolError unless it can name a file (letters, digits, '.', '_' and '-')."""
    if not _RUN_KEY.fullmatch(run_key):
        raise SpoolError(
            f"The run key {run_key!r} cannot name a spool file:"
            " use up to 200 letters, digits, '.', '_' and '-', starting with a letter or a digit."
        )
    return run_key


def check_name(kind: str, name: str) -> str:
    """The name itself; SpoolError if MLflow would refuse it as the name of a `kind`."""
    if not _NAME.fullmatch(name) or posixpath.normpath(name) != name or name[0] == "/" or name.startswith(".."):
        raise SpoolError(
            f"{name!r} cannot name a {kind}: use up to 250 letters, digits, '_', '-', '.', ' ', ':' and '/',"
            " and make it a plain relative path if it has slashes."
        )
    return name


class RunSpool:
    """Appends what one run logs to `folder/<run_key>.jsonl`.

    Every call writes whole lines with one `write`, so a killed process loses nothing that was logged and at
    most the line being written. A line that a dead writer left torn is closed by the next writer; the reader
    skips it.

    A resumed run opens the same spool and logs the steps since its checkpoint again; the tracker drops what
    it has sent already. For that the steps of one metric must ascend within one life of the run.

    Args:
        folder: the study's spool folder; made if absent.
        run_key: identity of the run, the same after every resume.

    Raises:
        SpoolError: the key cannot name a file. Every method raises it when the file cannot be written.
    """

    def __init__(self, folder: str | Path, run_key: str) -> None:
        self.run_key = check_run_key(run_key)
        self.path = Path(folder) / f"{run_key}{SUFFIX}"
        self._file: int | None = None
        self._torn = False
        self._checked: set[str] = set()

    def start(self, info: RunInfo) -> None:
        """Announces the run, or that it goes on: call it in every process that trains the run."""
        for name in info.params:
            check_name("parameter", name)
        for name in info.tags:
            check_name("tag", name)
        for dataset in info.datasets:
            _check_dataset(dataset)
        self._write(
            "start",
            run_name=info.run_name,
            params={name: str(value) for name, value in info.params.items()},
            tags={name: str(value) for name, value in info.tags.items()},
            datasets=[dict(dataset) for dataset in info.datasets],
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers of one step; anything `float()` takes (a tensor of one element too).

        NaN and infinities are kept, so that a diverging run shows: MLflow stores NaN as such and an infinity
        as the largest finite number of its sign.
        """
        if not values:
            return
        for name in values:
            if name not in self._checked:
                self._checked.add(check_name("metric", name))
        self._write("metrics", step=int(step), values={name: _number(value) for name, value in values.items()})

    def artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Asks for the upload of a file or a whole folder, into the folder `artifact_path` of the run's
        artifacts.

        The upload happens later and sends what is there by then; do not delete the file.
        """
        if artifact_path is not None:
            check_name("folder of artifacts", artifact_path)
        self._write("artifact", path=os.path.abspath(local_path), artifact_path=artifact_path)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; a later value replaces an earlier one."""
        for name in tags:
            check_name("tag", name)
        if tags:
            self._write("tags", tags={name: str(value) for name, value in tags.items()})

    def end(self, status: RunStatus = "FINISHED") -> None:
        """Ends the run (`start` opens it again) and closes the file."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise SpoolError(f"A run cannot end as {status!r}: use FINISHED, FAILED or KILLED.")
        self._write("end", status=status)
        self.close()

    def close_run(self, status: RunStatus, tags: Mapping[str, str]) -> None:
        """Ends a run that was logged on another machine, unless it has ended by the time that this is sent."""
        for name in tags:
            check_name("tag", name)
        self._write("close", status=status, tags={name: str(value) for name, value in tags.items()})
        self.close()

    def unsent(self, offset: int) -> str:
        """The whole lines behind a byte offset, for `take_in`; also of a file that is being written and that somebody
        has removed."""
        try:
            file = os.open(self.path, os.O_RDONLY) if self._file is None else self._file
        except FileNotFoundError:
            return ""
        try:
            content = os.pread(file, max(0, os.fstat(file).st_size - offset), offset)
        finally:
            if file != self._file:
                os.close(file)
        return content[: content.rfind(b"\n") + 1].decode()

    def take_in(self, lines: str) -> None:
        """Appends lines that the run has logged on another machine, which may be gone before it has sent them; those
        that are here already are left out."""
        try:
            here = set(self.path.read_bytes().splitlines())
        except FileNotFoundError:
            here = set()
        for line in lines.encode().splitlines():
            if line not in here:
                self._append(line + b"\n")

    def close(self) -> None:
        """Closes the file; the next call opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> RunSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # A spool travels to an actor by name; the file descriptor stays behind.
        return {**self.__dict__, "_file": None, "_torn": False}

    def _write(self, kind: str, **content: Any) -> None:
        record = {"type": kind, "time": time.time_ns() // 1_000_000, **content}
        try:
            line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise SpoolError(f"A {kind} record of run {self.run_key} cannot be written as JSON: {error}.") from error
        self._append(line)

    def _append(self, line: bytes) -> None:
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            if self._torn:
                line = b"\n" + line
            self._torn = True
            while line:  # more than one turn only where the disk fills up
                line = line[os.write(self._file, line) :]
            self._torn = False
        except OSError as error:
            raise SpoolError(
                f"Cannot write the spool file {self.path} ({error.strerror}): make room or mend the folder's"
                " permissions, then resume."
            ) from error

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        # Closing a torn line instead of cutting it off never shortens a file that somebody may be reading.
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"


def read_records(path: str | Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Reads the whole lines of a spool file from a byte offset.

    Yields:
        (record, offset behind its line); the record is None where the line is damaged. A last line without
        its line break is still being written (or torn) and is left alone.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield (record if isinstance(record, dict) and "type" in record else None), offset


def last_record(path: str | Path, block: int = 1 << 14) -> dict[str, Any] | None:
    """The last record of a spool file that is whole; None where there is none.

    Args:
        block: bytes that are read at first; twice as many as long as they hold none.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            start = max(0, size - block)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")[1 if start else 0 : -1]
            for line in reversed(lines):
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict) and "type" in record:
                        return record
            if not start:
                return None
            block *= 2


def count_lines(path: str | Path, offset: int = 0) -> int:
    """Number of whole lines behind a byte offset."""
    count = 0
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(1 << 20):
            count += block.count(b"\n")
    return count


def _number(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _check_dataset(dataset: DatasetRecord) -> None:
    unknown = set(dataset) - set(DatasetRecord.__annotations__)
    if unknown:
        raise SpoolError(
            f"A dataset record has no field {', '.join(map(repr, sorted(unknown)))};"
            f" it has {', '.join(DatasetRecord.__annotations__)}."
        )
    for required in ("name", "digest"):
        if not dataset.get(required):
            raise SpoolError(f"A dataset record needs a {required}.")
