"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def shown(name: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for something that takes a while; it appears with the first news and stays silent without any.

    Args:
        name: what is shown beside it.
        unit: "bytes", or what is counted.

    Yields:
        A callback that takes what is done and the total (None: not known).
    """
    amounts: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(unit)]
    if unit == "bytes":
        amounts = [DownloadColumn(), TransferSpeedColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), *amounts, TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    task = bars.add_task(name, total=None)

    def advance(done: int, total: int | None) -> None:
        bars.start()
        bars.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if bars.live.is_started:
            bars.stop()
