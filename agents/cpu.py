"""How a process computes on a CPU."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library


def configure_cpu(threads: int) -> None:
    """Set torch's threads, flush denormal numbers to zero, and let the allocator keep what it has freed.

    By default the GNU C library returns every freed block above 128 KiB to the system, so that each activation of an
    update is mapped and zeroed anew by page faults: measured 25-35 % of an update of ten critics of 3 x 256.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def cpu_name() -> str:
    """The processor, as its maker calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
