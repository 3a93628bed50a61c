import contextlib
import errno
import hashlib
import http.server
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from envs import download as module
from envs.download import DownloadError, download

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFSWEEP_OFFLINE", raising=False)


class Server(http.server.ThreadingHTTPServer):
    """Serves one file at /data.hdf5; the attributes say how badly."""

    daemon_threads = True
    request_queue_size = 50

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"one"'
        self.etags, self.ranges, self.honest = True, True, True
        self.breaks: list[int] = []  # after how many bytes of the file the connection breaks, by request
        self.status, self.content_type, self.delay = 200, "application/octet-stream", 0.0
        self.asked: list[str | None] = []  # the Range of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data.hdf5"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.headers["Range"])
        time.sleep(server.delay)
        start = int(re.sub(r"\D", "", self.headers["Range"])) if self.headers["Range"] and server.ranges else 0
        if server.honest and self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if server.status != 200:
            self.send_error(server.status)
            return
        if start >= len(server.content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.etags:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Type", server.content_type)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        end = server.breaks.pop(0) if server.breaks else len(server.content)
        self.wfile.write(server.content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "BACKOFF_S", 0.0)
    monkeypatch.setattr(module, "CHUNK", 10_000)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "data.hdf5"


def left_behind(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.glob("*"))


def fails(server: Server, path: Path, match: str, **known: object) -> str:
    """Expects one sentence, and returns it."""
    with pytest.raises(DownloadError, match=match) as caught:
        download("my-set", server.url, path, **known)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "my-set" in sentence
    return sentence


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, path):
    seen: list[tuple[int, int | None]] = []
    known = {"size": len(CONTENT), "sha256": SHA256.upper(), "md5": hashlib.md5(CONTENT).hexdigest()}
    assert download("my-set", server.url, path, **known, progress=lambda *at: seen.append(at)) == path
    assert path.read_bytes() == CONTENT
    assert left_behind(path) == ["data.hdf5"]
    assert (seen[0], seen[-1]) == ((0, len(CONTENT)), (len(CONTENT), len(CONTENT)))
    assert sorted(seen) == seen
    assert download("my-set", server.url, path) == path
    assert len(server.asked) == 1


@pytest.mark.parametrize("etags", [True, False])
def test_a_broken_connection_is_resumed(server, path, etags):
    server.etags, server.breaks = etags, [100_000, 180_000]
    download("my-set", server.url, path, size=len(CONTENT), sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=180000-"]


def test_a_server_without_ranges_sends_all_of_it_again(server, path):
    server.ranges, server.breaks = False, [100_000]
    download("my-set", server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("honest", [True, False])
def test_a_file_that_changes_between_two_requests_is_not_glued_together(server, path, honest):
    server.honest = honest  # with False the server sends a part of the other file, whatever If-Range says
    server.breaks = [100_000]

    def change(done: int, total: int | None) -> None:
        if done == 90_000:
            server.content, server.etag = OTHER, '"two"'

    download("my-set", server.url, path, progress=change)
    assert path.read_bytes() == OTHER


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, path, monkeypatch):
    monkeypatch.setattr(module, "RESUMES", 0)
    server.breaks = [120_000]
    sentence = fails(server, path, r"broke off at 0\.1 MB of 0\.3 MB", size=len(CONTENT), sha256=SHA256)
    assert server.url in sentence
    assert str(path) in sentence
    assert left_behind(path) == ["data.hdf5.part"]
    download("my-set", server.url, path, size=len(CONTENT), sha256=SHA256)
    assert server.asked == [None, "bytes=120000-"]
    assert path.read_bytes() == CONTENT
    assert left_behind(path) == ["data.hdf5"]


def test_without_a_checksum_the_next_call_starts_again(server, path, monkeypatch):
    monkeypatch.setattr(module, "RESUMES", 0)
    server.breaks = [120_000]
    fails(server, path, "broke off")
    download("my-set", server.url, path)
    assert server.asked == [None, None]
    assert path.read_bytes() == CONTENT


def test_a_stopped_program_leaves_what_it_has(server, path):
    def stop(done: int, total: int | None) -> None:
        if done > 50_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download("my-set", server.url, path, sha256=SHA256, progress=stop)
    assert left_behind(path) == ["data.hdf5.part"]
    download("my-set", server.url, path, sha256=SHA256)
    assert server.asked == [None, "bytes=60000-"]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_part_that_is_already_whole(server, path, size):
    path.parent.mkdir()
    path.with_name("data.hdf5.part").write_bytes(CONTENT)
    download("my-set", server.url, path, sha256=SHA256, size=size)
    assert path.read_bytes() == CONTENT
    assert server.asked == ([] if size else ["bytes=300000-"])


@pytest.mark.parametrize("left", [CONTENT + b"more", OTHER[:2000]], ids=["longer", "shorter"])
def test_a_part_of_something_else(server, path, left):
    """Longer than the file: started again. Shorter: only the checksum can tell, and then nothing of it stays."""
    path.parent.mkdir()
    path.with_name("data.hdf5.part").write_bytes(left)
    if len(left) < len(CONTENT):
        fails(server, path, "is not the expected file", sha256=SHA256, size=len(CONTENT))
        assert left_behind(path) == []
    download("my-set", server.url, path, sha256=SHA256, size=len(CONTENT))
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("known", "expected", "got"),
    [
        ({"sha256": "0" * 64}, "0" * 64, f"sha256 {SHA256}"),
        ({"md5": "f" * 32}, "f" * 32, f"md5 {hashlib.md5(CONTENT).hexdigest()}"),
        ({"size": 299_999}, "299999", "300000 bytes"),
    ],
    ids=["sha256", "md5", "size"],
)
def test_a_wrong_file_is_refused_and_removed(server, path, known, expected, got):
    sentence = fails(server, path, "is not the expected file", **known)
    assert f"{got} instead of {expected}" in sentence
    assert left_behind(path) == []


@pytest.mark.parametrize("status", [403, 404, 503])
def test_an_error_of_the_server(server, path, status):
    server.status = status
    sentence = fails(server, path, f"the server answers '{status} ")
    assert server.url in sentence
    assert str(path) in sentence
    assert len(server.asked) == 1
    assert left_behind(path) == []


def test_the_log_in_page_of_a_network_is_not_the_file(server, path):
    server.content, server.content_type = b"<html>Welcome</html>", "text/html; charset=utf-8"
    fails(server, path, "gives a web page")
    assert left_behind(path) == []


def test_an_empty_file_is_refused(server, path):
    server.content = b""
    fails(server, path, "is empty")
    assert left_behind(path) == []


def test_no_room_is_noticed_before_anything_is_written(server, path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000))
    sentence = fails(server, path, r"needs 0\.3 MB, 0\.1 MB are free")
    assert str(path.parent) in sentence
    assert left_behind(path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(server, path, monkeypatch, code):
    write = module._Part.write

    def full(part: module._Part, chunk: bytes) -> None:
        if part.size > 50_000:
            raise OSError(code, "full")
        write(part, chunk)

    monkeypatch.setattr(module._Part, "write", full)
    fails(server, path, r"no room for 'my-set' in .*folder: it needs 0\.3 MB")
    assert left_behind(path) == []


def test_a_folder_that_cannot_be_made(server, path):
    path.parent.write_text("a file where the folder should be")
    fails(server, path, "cannot be written")


def cannot_reach(url: str, path: Path, match: str) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError, match=match) as caught:
        download("my-set", url, path)
    assert time.monotonic() - start < 1.5
    assert all(words in str(caught.value) for words in ("'my-set'", "cannot be reached", url, str(path)))
    assert not path.parent.exists()


def test_without_a_network_one_sentence_within_a_second(path):
    cannot_reach("http://nohost.invalid/data.hdf5", path, r"nohost\.invalid cannot be reached")


def test_a_look_up_that_hangs_is_not_waited_for(path, monkeypatch):
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_: time.sleep(5))
    cannot_reach("http://nohost.invalid/data.hdf5", path, "no answer within a second")


def test_a_server_that_does_not_answer_is_not_waited_for(path):
    with socket.socket() as listening, contextlib.ExitStack() as waiting:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):  # the queue of a server that accepts nothing is full after this
            connection = waiting.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(listening.getsockname())
        cannot_reach(f"http://127.0.0.1:{listening.getsockname()[1]}/data.hdf5", path, "no answer within a second")


def test_a_port_without_a_server(path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        cannot_reach(f"http://127.0.0.1:{taken.getsockname()[1]}/data.hdf5", path, "refused")


def test_a_proxy_is_asked_instead_of_the_server(server, path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.server_port}")
    download("my-set", "http://nohost.invalid/data.hdf5", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    shutil.rmtree(path.parent)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{taken.getsockname()[1]}")
        cannot_reach(server.url, path, r"the proxy 127\.0\.0\.1 cannot be reached")


def test_of_several_at_once_one_downloads(server, path):
    server.delay = 0.1
    failures: list[Exception] = []

    def work() -> None:
        try:
            download("my-set", server.url, path, size=len(CONTENT), sha256=SHA256)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(server.asked) == 1
    assert path.read_bytes() == CONTENT
    assert left_behind(path) == ["data.hdf5"]


def test_who_waited_for_a_failed_download_starts_his_own(server, path):
    """The part that the first one removes must not be the file that the second one fills."""
    server.delay, server.content = 0.1, OTHER
    outcomes: list[object] = []

    def repair(done: int, total: int | None) -> None:
        if done == total:
            server.content = CONTENT

    def work() -> None:
        try:
            outcomes.append(download("my-set", server.url, path, sha256=SHA256, progress=repair))
        except DownloadError as error:
            outcomes.append("is not the expected file" in str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True, path]
    assert path.read_bytes() == CONTENT
    assert left_behind(path) == ["data.hdf5"]
