"""Memory that the supervisor and its ranks have in common: a work item's tensors, and after them its answer's.

Through a socket every rank would get a copy of its own of all of them, though of the large ones it reads only a part.
One work item is under way at a time, so each begins where the one before began, and nothing is to be managed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

from tacod_client import wire
from tacod_client.errors import ProtocolError
from tacod_client.wire import Buffer, Message

__all__ = ["Arena"]

ALIGNED_BYTES = 64
KEPT_BYTES = 512 << 20
"""What stays between two work items: a step's residuals, but not a model's patches."""


class Arena:
    """One such stretch of memory, as one process sees it; it grows as needed and ends with the last that holds it.

    What was read from it is good until the next work item.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("tacod") if fd is None else fd
        """By which another process can share it."""
        self.end = 0
        """Where the tensors of the last message end."""
        self._memory: mmap.mmap | None = None

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
        self._memory = None

    def pack(self, message: Message, start: int = 0) -> list[Buffer]:
        """The frames of a message for one who shares this memory; its tensors lie there, from ``start`` on."""
        preamble, header, *contents = wire.encode(message)
        if not contents:
            return [preamble, header]
        sizes = [len(memoryview(each)) for each in contents]
        places, self.end = _lay_out(start, sizes)
        memory = self._reach(self.end)
        for place, size, each in zip(places, sizes, contents, strict=True):
            memory[place : place + size] = memoryview(each).cast("B")
        return [preamble, header, struct.pack(f"<{len(sizes) + 1}Q", start, *sizes)]

    def unpack(self, frames: Sequence[Buffer], copy: bool = False) -> Message:
        """The message of these frames, with its tensors where they lie or, to be kept, a ``copy`` of them.

        Raises `ProtocolError` for what `pack` can't have made.
        """
        if len(frames) != 3:
            self.end = 0
            return wire.decode(frames)
        preamble, header, told = frames
        if not len(told) or len(told) % 8:
            raise ProtocolError(f"frame 2: {len(told)} bytes don't tell where tensors lie")
        start, *sizes = struct.unpack(f"<{len(told) // 8}Q", told)
        places, self.end = _lay_out(start, sizes)
        if self.end > os.fstat(self.fd).st_size:
            raise ProtocolError(f"frame 2: tensors of {sum(sizes)} bytes at {start} end behind the memory in common")
        memory = self._reach(self.end)
        contents: list[Buffer] = [memory[place : place + size] for place, size in zip(places, sizes, strict=True)]
        return wire.decode([preamble, header, *(map(bytes, contents) if copy else contents)])

    def shrink(self) -> None:
        """Give back what a large work item took; what was read is good no longer."""
        if self._memory is not None and len(self._memory) > KEPT_BYTES:
            self._memory.madvise(mmap.MADV_REMOVE, KEPT_BYTES, len(self._memory) - KEPT_BYTES)

    def _reach(self, size: int) -> memoryview:
        """The memory, of so many bytes at least."""
        if self._memory is None or len(self._memory) < size:
            whole = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
            if os.fstat(self.fd).st_size < whole:
                os.ftruncate(self.fd, whole)
            # The one before goes when nothing read from it is left.
            self._memory = mmap.mmap(self.fd, 0)
        return memoryview(self._memory)


def _lay_out(start: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where contents of these sizes begin, one after the other, and where the last one ends."""
    places = []
    for size in sizes:
        start = -(-start // ALIGNED_BYTES) * ALIGNED_BYTES
        places.append(start)
        start += size
    return places, start
