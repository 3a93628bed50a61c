"""CUDA graphs: work on a GPU that is captured once and then replayed, so that the host launches it as one.

What is captured must be a function of tensors at fixed addresses that takes nothing from the host and tells it nothing.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

WARM_UP = 3  # calls (or periods of them) that are executed as they are written before anything is captured

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Does what a function of fixed tensors does, once, and gives a function that does it again."""


class CaptureError(RuntimeError):
    """The work could not be captured; nothing of it has been executed."""


def default_capture(device: torch.device | str) -> Capture | None:
    """CUDA graphs on CUDA, unless the environment variable OFFSWEEP_CUDA_GRAPHS is 0; None on other devices."""
    if torch.device(device).type != "cuda" or os.environ.get("OFFSWEEP_CUDA_GRAPHS") == "0":
        return None
    return partial(cuda_graph, pool=torch.cuda.graph_pool_handle())


def cuda_graph(work: Callable[[], None], pool: Any = None) -> Callable[[], None]:
    """Capture `work` and do it once; returns what does it again."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(str(error).splitlines()[0]) from error
    graph.replay()
    replay: Callable[[], None] = graph.replay
    return replay


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Off the default stream: what is done first there must not be part of a capture (set-up of the libraries)."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def warn_eager(error: CaptureError) -> None:
    """Say that work is executed as it is written."""
    warnings.warn(f"work is not captured as a CUDA graph, which is slower: {error}", stacklevel=3)
