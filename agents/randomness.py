"""Every random draw is a function of (seed of the run, purpose, counters).

Nothing carries generator state from one chunk to the next: a chunk's noise is drawn by a generator made from its
counters. So a run draws the same numbers alone, in any pack, with any number of rollout workers and after any resume,
and a checkpoint needs only the counters. What is drawn often (noise, row numbers) is drawn on the learner's
device: a run on a CPU and one on a GPU start from the same parameters and then draw other numbers.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose of one run.

    Args:
        seed: the run's seed.
        purpose: what is drawn, e.g. "init", "updates", "rollout".
        counters: epoch, shard, ...: distinct counters give independent streams.
        device: where it draws.
    """
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *counters))


def derived_seed(seed: int, purpose: str, *counters: int) -> int:
    """A number of 63 bits for one purpose of one run (see `generator`)."""
    text = repr((int(seed), purpose, tuple(int(c) for c in counters)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
