"""Memory that reader threads fill: a host's directly, a GPU's through pinned buffers."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor

__all__ = ["GpuMemory", "Memory"]

Read = Callable[[memoryview], None]
"""Fills host memory, or raises."""


class Memory:
    """A host's memory. `fill` may be called from any thread, everything else from one."""

    def allocate(self, size: int) -> Tensor:
        """New memory of ``size`` bytes to be filled: uint8, one dimension."""
        return torch.empty(size, dtype=torch.uint8)

    def fill(self, place: Tensor, read: Read) -> None:
        """Read into a slice of allocated memory."""
        read(place.numpy().data)

    def arrive(self) -> None:
        """Called after `fill` and before the bytes are used, in the current stream."""

    def close(self) -> None:
        """Called when no thread fills any more; afterwards no copy is under way."""


class GpuMemory(Memory):
    """A GPU's memory, filled through ``count`` pinned buffers of ``size`` bytes, at least one for each thread.

    A thread reads into a buffer and leaves it to be copied, on a stream beside the current one, while it reads into the
    next. The two streams wait for each other, so that the allocator, which knows the current one alone, may hand out
    memory that was in use there.
    """

    def __init__(self, device: torch.device, count: int, size: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: SimpleQueue[tuple[Tensor, torch.cuda.Event]] = SimpleQueue()
        for _ in range(count):
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._buffers.put((buffer, torch.cuda.Event(blocking=True)))  # type: ignore[no-untyped-call]

    def allocate(self, size: int) -> Tensor:
        """See `Memory.allocate`; what the current stream still does there comes before the copies."""
        place = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return place

    def fill(self, place: Tensor, read: Read) -> None:
        """See `Memory.fill`; returns when the copy is queued. ``place`` is of a buffer's size at most."""
        buffer, copied = self._buffers.get()
        try:
            copied.synchronize()
            part = buffer[: len(place)]
            read(part.numpy().data)
            # A thread has neither the loader's stream nor its mode.
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                place.copy_(part, non_blocking=True)
                copied.record(self._stream)
        finally:
            self._buffers.put((buffer, copied))

    def arrive(self) -> None:
        """See `Memory.arrive`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        """See `Memory.close`."""
        self._stream.synchronize()
