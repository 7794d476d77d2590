"""Forwards that were captured as CUDA graphs, with the memory that the graphs read and write."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tacod.rank.families.base import Output
from tacod.rank.forward.run import Call, clone, run
from tacod.rank.ops.table_cache import holding
from tacod.rank.parallel.topology import Topology

__all__ = ["TRIES", "Captured", "Graph", "Without"]

TRIES = 8
"""How often a kind of forward is to be captured, of a network that keeps other things after it; then it is given up."""


class Captured:
    """What the graphs of one kind of forward share: memory of their own for inputs, prefix and tables."""

    fault = ""
    """Why it may not be used, although it was captured; empty if nothing is known against it."""

    def __init__(self, call: Call, pool: Any) -> None:
        self.pool = pool
        self._prefix = call.prefix and replace(call.prefix, tensors=[each.clone() for each in call.prefix.tensors])
        self._copied = call.prefix and weakref.ref(call.prefix)
        """The prefix that `_prefix` is a copy of."""
        self._inputs = call.inputs.map(torch.clone)
        self._tables: list[Tensor] = []

    @property
    def most_bytes(self) -> int:
        """Bytes of its prefix on the rank that has the most of it."""
        return 0 if self._prefix is None else self._prefix.most_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of its prefix on this rank."""
        return 0 if self._prefix is None else self._prefix.nbytes

    def _own(self, call: Call) -> Call:
        """The call with this memory as inputs and prefix; not to be kept, or the model would never be freed."""
        return replace(call, inputs=self._inputs, prefix=self._prefix)

    @contextmanager
    def _capturing(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A context whose work on the GPU is captured, and not done, for the graph that it gives."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        try:
            # NCCL's own thread may look at events meanwhile.
            capture = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
            with holding() as tables, _undone_if_it_breaks_off(self.pool), capture:
                yield graph
            self._tables += tables
        finally:
            # A capture that fails doesn't leave its own.
            torch.cuda.set_stream(stream)

    def _load(self, call: Call) -> None:
        """Put another forward's inputs and prefix where the graphs read them."""
        self._inputs.copy_(call.inputs)
        if call.prefix is not None and self._prefix is not None and self._copied and call.prefix is not self._copied():
            for mine, theirs in zip(self._prefix.tensors, call.prefix.tensors, strict=True):
                mine.copy_(theirs)
            self._copied = weakref.ref(call.prefix)


class Graph(Captured):
    """A whole forward as one graph."""

    def __init__(self, call: Call, topology: Topology, pool: Any) -> None:
        super().__init__(call, pool)
        with self._capturing() as self._graph:
            self._out = run(self._own(call), topology)

    def replay(self, call: Call) -> Output:
        """The forward with other inputs of this kind."""
        self._load(call)
        self._graph.replay()
        return clone(self._out)


@dataclass
class Without:
    """A kind of forward that has no graph, yet or ever."""

    tries: int = 0
    """How often it was to be captured; after `TRIES` it has none ever."""

    @property
    def may_come(self) -> bool:
        """Whether it may be captured."""
        return self.tries < TRIES


@contextmanager
def _undone_if_it_breaks_off(pool: Any) -> Iterator[None]:
    """A context for a capture. If the driver breaks it off, PyTorch's allocator and random numbers forget it.

    `torch.cuda.graph` leaves both as within a capture (pytorch/pytorch#171263): then nothing that was cached is freed
    where memory is short, the pool stays, and to draw a random number is an error.
    """
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    state = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(state)
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:
            # The capture has ended in good order.
            pass
        else:
            torch._C._cuda_releasePool(device, pool)
        raise
