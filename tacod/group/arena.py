"""Memory that the supervisor and its ranks share: a command's tensors, followed by those of rank 0's report.

Through a socket, every rank would get its own copy of all tensors, though it reads only a part of the large ones. So a
packet goes through the socket and says where the tensors lie; tensors that are small together travel in it. One command
is under way at a time, so each starts at the same place, and nothing needs to be managed. The other ranks' reports fit
in packets: they write nothing here.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

from tacod.group.board import BOARD_BYTES, Board
from tacod_client import wire
from tacod_client.decoder import Decoder
from tacod_client.errors import ProtocolError
from tacod_client.wire import Buffer, Message

__all__ = ["PACKET_BYTES", "Arena"]

PACKET_BYTES = 32 << 10
"""The largest packet: a unix socket takes it whole, at once and without waiting."""
HERE, THERE, WHOLE = b"\0", b"\1", b"\2"
"""How a packet begins: a head follows, or lies in the memory because it is too long; or a head and its tensors follow.
"""
PLACE = struct.Struct("<QQ")
"""Where something begins, and its size in bytes."""
ALIGNED_BYTES = 64
KEPT_BYTES = 512 << 20
"""What the memory keeps between two commands: enough for a step's residuals, but not for a model's patches."""


class Arena:
    """A piece of shared memory, as one process sees it.

    It grows as needed, and is freed when no process has it any more. What was read from it is valid until the next
    command.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("tacod") if fd is None else fd
        """The descriptor that another process needs to share it."""
        self.end = BOARD_BYTES
        """Where the last message's contents end."""
        self.board = Board(self.fd)
        # Mapped from the start, as a mapping takes a descriptor: a process has as many before its first large command
        # as behind it.
        self._memory: mmap.mmap | None = mmap.mmap(self.fd, 0)
        self._decoder = Decoder("forward", "done")

    def close(self) -> None:
        """Unmap and close it."""
        os.close(self.fd)
        self.board.close()
        self._memory = None

    def pack(self, message: Message, start: int = BOARD_BYTES) -> bytes:
        """The packet of a message to a process that shares this memory.

        The tensors are written there, from ``start`` on.
        """
        _, header, *contents = wire.encode(message)
        return self.pack_frames(header, contents, start)

    def pack_frames(self, header: Buffer, contents: Sequence[Buffer], start: int = BOARD_BYTES) -> bytes:
        """As `pack`, of a message's header and its tensors' frames."""
        self.end = start
        sizes = [len(memoryview(each)) for each in contents]
        head = PLACE.pack(start, len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes) + header
        if len(head) + sum(sizes) < PACKET_BYTES:
            return b"".join((WHOLE, head, *contents))
        self._put(contents)
        if len(head) < PACKET_BYTES:
            return HERE + head
        start = self.end
        self._put([head])
        return THERE + PLACE.pack(start, len(head))

    def unpack(self, packet: bytes, copy: bool = False) -> Message:
        """The message of this packet; its tensors are views of this memory, or copies by ``copy``.

        Raises `ProtocolError` for a packet that `pack` can't have made.
        """
        header, start, sizes, behind = self._read_head(packet)
        if packet[:1] == WHOLE:
            header, *contents = _cut(header, sizes)
            self.end = start
        else:
            contents = self._get(start, sizes)
        # Who answers leaves alone what another one may still read.
        self.end = max(self.end, behind)
        return self._decoder.decode([wire.PREAMBLE, header, *(map(bytes, contents) if copy else contents)])

    def _read_head(self, packet: bytes) -> tuple[Buffer, int, Sequence[int], int]:
        """What a head says: the message's header, where its tensors begin, their frames' sizes, and the head's end.

        In a whole packet the frames stand behind the header.
        """
        kind, head = packet[:1], packet[1:]
        behind = 0
        try:
            if kind == THERE:
                start, size = PLACE.unpack(head)
                head = bytes(*self._get(start, [size]))
                behind = self.end
            elif kind not in (HERE, WHOLE):
                raise ProtocolError(f"a packet of kind {kind!r}")
            start, count = PLACE.unpack_from(head)
            sizes = struct.unpack_from(f"<{count}Q", head, PLACE.size)
        except struct.error as error:
            raise ProtocolError(f"a packet of {len(packet)} bytes: {error}") from None
        return head[PLACE.size + 8 * count :], start, sizes, behind

    def span(self, packet: bytes) -> tuple[int, int]:
        """Where what a packet names begins and ends in this memory, for a copy to another one; equal if it is nothing.

        Raises `ProtocolError` as `unpack` does.
        """
        _, start, sizes, behind = self._read_head(packet)
        if packet[:1] == WHOLE:
            return start, start
        return start, max(_lay_out(start, sizes)[1], behind)

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes of a `span`. Raises `ProtocolError` if the memory is shorter."""
        if stop > os.fstat(self.fd).st_size:
            raise ProtocolError(f"a packet names {stop - start} bytes at {start}, behind the shared memory")
        return self._reach(stop)[start:stop]

    def write(self, start: int, contents: Buffer) -> None:
        """Put the bytes of another memory's `span` at the same place."""
        flat = memoryview(contents).cast("B")
        if flat.nbytes:
            self._reach(start + flat.nbytes)[start : start + flat.nbytes] = flat

    def shrink(self) -> None:
        """Give back the memory of a large command; what was read is no longer valid."""
        if self._memory is not None and len(self._memory) > KEPT_BYTES:
            self._memory.madvise(mmap.MADV_REMOVE, KEPT_BYTES, len(self._memory) - KEPT_BYTES)

    def _put(self, contents: Sequence[Buffer]) -> None:
        """Append contents."""
        sizes = [len(memoryview(each)) for each in contents]
        places, self.end = _lay_out(self.end, sizes)
        memory = self._reach(self.end)
        for place, size, each in zip(places, sizes, contents, strict=True):
            memory[place : place + size] = memoryview(each).cast("B")

    def _get(self, start: int, sizes: Sequence[int]) -> list[memoryview]:
        """The contents from ``start`` on."""
        places, self.end = _lay_out(start, sizes)
        if self.end > os.fstat(self.fd).st_size:
            raise ProtocolError(f"a packet names {sum(sizes)} bytes at {start}, behind the shared memory")
        memory = self._reach(self.end)
        return [memory[place : place + size] for place, size in zip(places, sizes, strict=True)]

    def _reach(self, size: int) -> memoryview:
        """The memory, grown to at least this many bytes."""
        if self._memory is None or len(self._memory) < size:
            whole = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
            if os.fstat(self.fd).st_size < whole:
                os.ftruncate(self.fd, whole)
            # The one before goes when nothing read from it is left.
            self._memory = mmap.mmap(self.fd, 0)
        return memoryview(self._memory)


def _cut(packed: Buffer, sizes: Sequence[int]) -> list[memoryview]:
    """A header and the frames behind it. Raises `ProtocolError` if there are fewer bytes than these sizes need."""
    view = memoryview(packed)
    position = len(view) - sum(sizes)
    if position < 0:
        raise ProtocolError(f"a packet lacks {-position} bytes of its tensors")
    parts = [view[:position]]
    for size in sizes:
        parts.append(view[position : position + size])
        position += size
    return parts


def _lay_out(start: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where contents of these sizes begin, one after the other, and where the last one ends."""
    places = []
    for size in sizes:
        start = -(-start // ALIGNED_BYTES) * ALIGNED_BYTES
        places.append(start)
        start += size
    return places, start
