"""What stands in for a GPU in tests: a recorder with the rules of a CUDA graph, and a device without values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from agents import optim


class RecordedGraph(TorchDispatchMode):
    """Records the operations of a function, and repeats them as a CUDA graph does: the same kernels with the same
    numbers, on the same memory, without running any Python of the function again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        fresh = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in given]
        self.calls.append((func, args, kwargs, fresh))
        return result

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, fresh in self.calls:
                result = func(*args, **kwargs)
                if fresh:
                    for target, value in zip(fresh, _tensors(result), strict=True):
                        target.copy_(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def recorded_graph(work: Callable[[], None]) -> Callable[[], None]:
    """An `agents.chunk.Capture` on the CPU."""
    graph = RecordedGraph()
    with torch.inference_mode(), graph:
        work()
    return graph.replay


class OnlyOnMeta(TorchDispatchMode):
    """Raises where an operation takes data from the CPU: on a GPU that is a copy from the host, or an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs or {})):
            if tensor.device.type != "meta" and tensor.dim() > 0:
                raise AssertionError(f"{func} takes a tensor {tuple(tensor.shape)} of the CPU")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For work on tensors of device "meta", which have no values: whatever looks at a value raises, and so does what
    takes data from the CPU."""

    def adam(params: list[Tensor], grads: list[Tensor], *_: Any, **__: Any) -> None:
        for parameter, gradient in zip(params, grads, strict=True):
            parameter.add_(gradient)

    monkeypatch.setattr(optim, "_fused_adam", adam)  # the kernel does not know the device
    with OnlyOnMeta():
        yield
