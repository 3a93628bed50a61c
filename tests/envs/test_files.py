import threading
import time
from pathlib import Path

import pytest

from envs.files import locked, write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "folder" / "a.txt"
    write_atomically(path, lambda p: p.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [*path.parent.iterdir()] == [path]


def test_one_at_a_time_and_no_lock_is_left(tmp_path: Path):
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(20):
            with locked(tmp_path / "a.lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 160
    assert not [*tmp_path.iterdir()]
