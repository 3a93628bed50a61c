"""Every random draw is a function of (seed of the run, purpose, counters).

Nothing carries generator state from one chunk to the next: a chunk's noise is drawn by a generator made from its
counters. So a run draws the same numbers alone, in any pack, with any number of rollout workers and after any resume,
and a checkpoint needs only the counters. Draws are made on the CPU and shipped to the learner's device, so they do not
depend on the device either; only where they are so large that a GPU would wait for them, a generator of the device
makes them.
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
        device: what draws with it; other devices give other numbers.
    """
    text = repr((int(seed), purpose, tuple(int(c) for c in counters)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
