"""Every random draw is a function of (seed of the run, purpose, counters).

Nothing carries generator state from one chunk to the next: a chunk's noise is drawn by a generator made from its
counters. So a run draws the same numbers alone, in any pack, with any number of rollout workers and after any resume,
and a checkpoint needs only the counters. Draws are made on the CPU and shipped to the learner's device, so they do not
depend on the device either.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A fresh CPU generator for one purpose of one run.

    Args:
        seed: the run's seed.
        purpose: what is drawn, e.g. "init", "updates", "rollout".
        counters: epoch, shard, ...: distinct counters give independent streams.
    """
    text = repr((int(seed), purpose, tuple(int(c) for c in counters)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
