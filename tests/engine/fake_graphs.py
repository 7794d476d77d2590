"""CUDA graphs on a CPU: operations are recorded with their tensors, and a replay computes them again in place.

As on a GPU, a replay reads nothing but the memory of the capture, and reading a number of it on the host is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tacod.rank.forward import captured, graphs


class RecordedGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    spoils = 0.0
    """By how much replays change what they compute: a fault."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if hasattr(new, "wait") and not isinstance(new, Tensor):
                    new.wait()
                elif isinstance(old, Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                    if self.spoils and old.is_floating_point():
                        old.mul_(1 + self.spoils)


class Recording(TorchDispatchMode):
    """In the place of `torch.cuda.graph`."""

    def __init__(self, graph: RecordedGraph, **_: Any) -> None:
        super().__init__()
        self._graph = graph

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else its first operation imports PyTorch's compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self._graph.operations.append((func, args, kwargs or {}, out))
        return out


@contextmanager
def graphs_on_cpu() -> Iterator[None]:
    """A context in which forwards on a CPU become graphs."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(graphs, "_is_on_gpu", return_value=True))
        patches.enter_context(mock.patch.object(captured, "_undone_if_it_breaks_off", nullcontext))
        for name, stand_in in (
            ("CUDAGraph", RecordedGraph),
            ("graph", Recording),
            ("graph_pool_handle", lambda: "pool"),
            ("synchronize", lambda: None),
            ("current_stream", lambda: None),
            ("set_stream", lambda stream: None),
        ):
            patches.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        yield
