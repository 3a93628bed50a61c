"""Memory of this process and of its device, as the packer counts it.

What a pack needs is the growth of the process over what it held before: the resident set on a CPU (rows of the dataset
that are mapped from elsewhere included, once they are read), the allocator's bytes on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path

import torch

SHARE = 0.8  # of the free memory is planned with: allocators need some slack, and other programs run, too

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ALLOCATION_FAILED = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class OutOfMemory(RuntimeError):
    """A pack does not fit the memory; carries no tensors, as the exceptions it stands for do by their tracebacks."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, Python or Ray says that memory ran out."""
    if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILED):
        return True
    if isinstance(error, Exception) and type(error).__module__.startswith("ray."):
        from ray.exceptions import OutOfMemoryError

        return isinstance(error, OutOfMemoryError)
    return False


def release(device: torch.device) -> None:
    """Give freed memory back, so that what is measured next is not hidden by what was freed before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def in_use(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Let `peak` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the process's own
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size


def peak(device: torch.device) -> int:
    """The most bytes held at once since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def free(device: torch.device) -> int:
    """Bytes that this process could still take: of the GPU, or of the machine and its control group."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    found = [_meminfo("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
        except (OSError, ValueError):  # another version of control groups, or no limit ("max")
            continue
    return min(found)


def _status(field: str) -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _meminfo(field: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
