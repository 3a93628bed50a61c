"""Downloads that resume, check what they got and fail in one sentence.

A file is filled under its name with `.part` appended and gets its own name when its size and checksum are right. The
`.part` stays where the connection broke or the program was stopped, for the next call to go on from it; a wrong file
and one that the disk has no room for are removed.
"""

import errno
import fcntl
import hashlib
import os
import queue
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

from envs.catalogue import Progress
from envs.errors import UserError

REACH_S = 0.9  # for looking up the name and a first connection, so that a missing network is told within a second
CONNECT_S = 5.0  # for the further connections to a server that has been reached
READ_S = 30.0  # without a byte
RESUMES = 5
BACKOFF_S = 0.5  # before the first resume, then twice as long each time
CHUNK = 1 << 20


class DownloadError(UserError):
    """A file cannot be downloaded."""


def download(
    name: str,
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download a file, unless it is there.

    Of processes that ask for the same file at once one downloads it and the others wait for it.

    Args:
        name: of the dataset, for the sentences.
        url: where the file is; http or https, through the proxy that the environment names, if any.
        path: where it is to be; its folder is made.
        size: in bytes, where known.
        sha256, md5: hexadecimal, where known. What an earlier call left is continued only if one is known: nothing
            else would show that the file on the server has changed since.
        progress: called with the bytes done and the total (None: not known).

    Returns:
        `path`.

    Raises:
        DownloadError: no connection, the server refuses, no room, or not the expected file.
    """
    if path.is_file():
        return path
    probe(name, url, path)
    checksums = {"sha256": sha256, "md5": md5}
    part = _Part(path, size, {kind: value.lower() for kind, value in checksums.items() if value})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part:
            if not path.is_file():  # else another process was faster
                _fill(part, name, url, progress or (lambda done, total: None))
                _check_whole(part, name, url, size)
                part.finish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(part, name, part.total) from error
        raise DownloadError(
            f"cannot download '{name}': {path} cannot be written ({error.strerror or error}); choose another folder."
        ) from error
    return path


class _Part:
    """The file being filled: locked against other processes, with the running checksums of its bytes."""

    def __init__(self, final: Path, total: int | None, expected: Mapping[str, str]) -> None:
        self.final, self.path = final, final.with_name(f"{final.name}.part")
        self.total = total  # bytes of the whole file; None: not known
        self.expected = expected  # checksum by kind
        self.spoiled = False  # its bytes are of no use to a later call

    def __enter__(self) -> "_Part":
        while True:
            self.file = open(self.path, "a+b")
            fcntl.flock(self.file, fcntl.LOCK_EX)
            # Who held the lock before may have renamed or removed the file: then there is another one, or none.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                    break
            self.file.close()
        self._reset()
        if self.expected:
            self.file.seek(0)
            while chunk := self.file.read(CHUNK):
                self._count(chunk)
        else:
            self.start_over()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if not self.size or self.spoiled or (kind is not None and issubclass(kind, OSError)):
                self.path.unlink(missing_ok=True)
        finally:
            self.file.close()

    def _reset(self) -> None:
        self.size = 0
        self.hashes = {kind: hashlib.new(kind, usedforsecurity=False) for kind in self.expected}

    def _count(self, chunk: bytes) -> None:
        self.size += len(chunk)
        for running in self.hashes.values():
            running.update(chunk)

    def start_over(self) -> None:
        self.file.truncate(0)  # what is written is appended, so the next byte is the first
        self._reset()

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self._count(chunk)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.path, self.final)


def _fill(part: _Part, name: str, url: str, progress: Progress) -> None:
    """Receive all bytes, resuming where the connection breaks."""
    size = part.total
    first: Mapping[str, str] | None = None  # the headers that came with the bytes in the part
    reason = ""
    for attempt in range(RESUMES + 1):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        if size is not None and part.size >= size:
            if part.size == size:
                return
            part.start_over()
        try:
            with _get(url, part.size, first) as response:
                if response.status_code == 416 and _total(response) == part.size:
                    return  # there is nothing more
                start = _start(response, part.size, first)
                if start is None:  # the server has another file now, or not as many bytes: ask again for all of it
                    part.start_over()
                    first = None
                    continue
                _check_answer(part, name, url, response)
                if start == 0:
                    part.start_over()
                if first is None or start == 0:
                    first = response.headers
                part.total = _total(response)
                if size is not None and part.total not in (None, size):
                    raise _wrong_file(part, name, url, f"{part.total} bytes", f"{size}")
                free = shutil.disk_usage(part.path.parent).free
                if part.total is not None and part.total - part.size > free:
                    raise _no_room(part, name, part.total - part.size)
                progress(part.size, part.total)
                for chunk in response.iter_content(CHUNK):
                    part.write(chunk)
                    progress(part.size, part.total)
            if part.total is None or part.size >= part.total:
                return
            reason = "the server sent less than it announced"
        except requests.RequestException as error:
            reason = _reason(error)
            broken = isinstance(
                error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError
            )
            if first is None or not broken:  # nothing has come yet: waiting would not help
                raise _unreachable(name, url, part.final, urlsplit(url).netloc, reason) from error
    of_total = f" of {_mb(part.total)}" if part.total else ""
    raise DownloadError(
        f"the download of '{name}' broke off at {_mb(part.size)}{of_total} ({reason}): do the same again, or fetch"
        f" {url} elsewhere and put it at {part.final}."
    )


def _get(url: str, offset: int, first: Mapping[str, str] | None) -> requests.Response:
    """Ask for the bytes from `offset` on, or for all if they would not continue those received before."""
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file
    if offset:
        headers["Range"] = f"bytes={offset}-"
        etag = first.get("ETag", "") if first else ""
        unchanged = etag if etag and not etag.startswith("W/") else first.get("Last-Modified") if first else None
        if unchanged:
            headers["If-Range"] = unchanged
    return requests.get(url, headers=headers, stream=True, timeout=(CONNECT_S, READ_S))


def _start(response: requests.Response, offset: int, first: Mapping[str, str] | None) -> int | None:
    """At which byte the answer starts; None when it cannot be used with the bytes received before."""
    if response.status_code == 416:
        return None
    if response.status_code != 206:
        return 0
    headers = response.headers
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    changed = first is not None and any(
        first.get(key, headers.get(key)) != headers.get(key, first.get(key)) for key in ("ETag", "Last-Modified")
    )
    return offset if match and int(match[1]) == offset and not changed else None


def _total(response: requests.Response) -> int | None:
    """Bytes of the whole file, as the answer states them."""
    if response.status_code in (206, 416):
        stated = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        stated = response.headers.get("Content-Length", "")
    return int(stated) if stated.isdecimal() else None


def _check_answer(part: _Part, name: str, url: str, response: requests.Response) -> None:
    elsewhere = f"fetch it elsewhere and put it at {part.final}."
    if response.status_code not in (200, 206):
        status = f"{response.status_code} {response.reason or ''}".strip()
        raise DownloadError(f"cannot download '{name}': the server answers '{status}' to {url}; {elsewhere}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadError(
            f"cannot download '{name}': instead of the file, {url} gives a web page (does this network want a"
            f" log-in?); {elsewhere}"
        )


def _check_whole(part: _Part, name: str, url: str, size: int | None) -> None:
    if not part.size:
        raise DownloadError(
            f"cannot download '{name}': the file at {url} is empty; fetch it elsewhere and put it at {part.final}."
        )
    if size is not None and part.size != size:
        raise _wrong_file(part, name, url, f"{part.size} bytes", f"{size}")
    for kind, expected in part.expected.items():
        got = part.hashes[kind].hexdigest()
        if got != expected:
            raise _wrong_file(part, name, url, f"{kind} {got}", expected)


def probe(name: str, url: str, path: Path) -> None:
    """Connect to the server, or to the proxy, within `REACH_S`; the look-up of a name alone can take far longer.

    Raises:
        DownloadError: it cannot be reached, or $OFFSWEEP_OFFLINE says not to try.
    """
    if os.environ.get("OFFSWEEP_OFFLINE", "0") not in ("", "0"):
        raise DownloadError(
            f"'{name}' is not on this machine, and OFFSWEEP_OFFLINE is set: unset it, or fetch {url} elsewhere and put"
            f" it at {path}."
        )
    proxy = select_proxy(url, get_environ_proxies(url))
    target = urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else url)
    if target.hostname is None:
        raise _unreachable(name, url, path, url, "not an address")
    host = f"the proxy {target.hostname}" if proxy else target.hostname
    deadline = time.monotonic() + REACH_S
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def ask(call: Callable[..., Any], *args: Any) -> None:
        def work() -> None:
            try:
                answers.put((True, call(*args)))
            except (OSError, UnicodeError) as error:
                answers.put((False, error))

        threading.Thread(target=work, daemon=True).start()  # a daemon: a look-up cannot be interrupted

    def answer() -> tuple[bool, Any]:
        return answers.get(timeout=max(0.0, deadline - time.monotonic()))

    try:
        ask(socket.getaddrinfo, target.hostname, target.port or target.scheme, 0, socket.SOCK_STREAM)
        found, result = answer()
        if not found:
            raise _unreachable(name, url, path, host, "its name cannot be looked up")
        addresses, reason = result, ""
        waits = (0.0, REACH_S / 3)  # twice, since a lost packet is sent again only after a second
        for address in addresses:
            for wait in waits:
                ask(_connect, address, wait)
        for _ in range(len(addresses) * len(waits)):
            connected, result = answer()
            if connected:
                return
            reason = result.strerror or str(result)
    except queue.Empty:
        reason = "no answer within a second"
    raise _unreachable(name, url, path, host, reason)


def _connect(address: tuple[Any, ...], wait: float) -> None:
    time.sleep(wait)
    family, kind, protocol, _, where = address
    with socket.socket(family, kind, protocol) as connection:
        connection.settimeout(REACH_S)
        connection.connect(where)


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_S:.0f} s"
    if isinstance(error, requests.Timeout):
        return f"no answer within {READ_S:.0f} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not accepted"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    return str(error)


def _unreachable(name: str, url: str, path: Path, host: str, reason: str) -> DownloadError:
    return DownloadError(
        f"cannot download '{name}': {host} cannot be reached ({reason}); fetch {url} elsewhere and put it at {path}."
    )


def _wrong_file(part: _Part, name: str, url: str, got: str, expected: str) -> DownloadError:
    part.spoiled = True
    return DownloadError(
        f"{url} is not the expected file of '{name}': {got} instead of {expected}; try again, or fetch it elsewhere"
        f" and put it at {part.final}."
    )


def _no_room(part: _Part, name: str, needed: int | None) -> DownloadError:
    folder = part.path.parent
    return DownloadError(
        f"no room for '{name}' in {folder}: it needs {_mb(needed)}, {_mb(shutil.disk_usage(folder).free)} are free;"
        " make room or choose another folder."
    )


def _mb(size: int | None) -> str:
    return "more" if size is None else f"{size / 1e6:.1f} MB"
