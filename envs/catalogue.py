"""What is known of a dataset without opening it, and how the getting of one is followed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[int, int | None], None]
"""Called with the bytes or rows done and the total (None: not known)."""


@dataclass(frozen=True)
class Entry:
    """One line of `offsweep data list`."""

    name: str
    source: str  # embedded, collected, D4RL, Minari or NeoRL
    env_id: str | None  # that a policy learned from it is scored in
    path: Path | None  # where its rows are, or will be
    present: bool  # its rows are on this machine, or are made here on first use
    size: int | None  # bytes of the file, on disk or to be downloaded; None: not known
    licence: str | None
    cached: bool = False  # in the flat store: opens without being read
