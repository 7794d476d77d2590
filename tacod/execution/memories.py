"""The memories that clients share with the ranks: whose they are, which jobs use them, and how much there may be."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass

from tacod.group.shared_memory import SharedMemory
from tacod.group.work import Forward
from tacod_client.errors import ArgumentError, QueueFull, Unavailable
from tacod_client.wire import ALIGNED_BYTES, FORWARD_BYTES, Tensor

__all__ = ["Memories", "check_places"]

log = logging.getLogger(__name__)

COUNT = 4
"""Most memories of one session."""
FORWARDS = 4
"""Most forwards that are taken from one channel in a turn."""
EARLIER = 64
"""Most forwards that are taken from one channel before what is said behind them; docs/protocol.md has it."""


@dataclass
class _Held:
    """A memory and its use."""

    memory: SharedMemory
    owner: bytes
    jobs: int = 0
    """Queued and running jobs that name it."""
    hears: bool = True
    """Whether forwards may still come by its channel."""
    revoked: bool = False
    """Whether its owner gave it back or is gone; it is freed when no job names it."""

    def end_forwards(self) -> None:
        """No more come by its channel: a client that sends one there is told by the kernel."""
        self.hears = False
        if self.memory.channel is not None:
            with suppress(OSError):
                self.memory.channel.shutdown(socket.SHUT_RD)


class Memories:
    """Makes and frees memories.

    All together have at most ``limit`` bytes. A session may take half of what the others leave, so there is always room
    for one more.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.on_freed: list[Callable[[int], None]] = []
        """Called with the id of each that is freed."""
        self._held: dict[int, _Held] = {}
        self._made = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all memories, those among them that wait for a job's end."""
        return sum(held.memory.nbytes for held in self._held.values())

    def make(self, owner: bytes, nbytes: int, channel: socket.socket | None = None) -> SharedMemory:
        """A memory for the session ``owner``, which takes over the daemon's end of a ``channel`` (`make_channel`).

        Raises `QueueFull` at a limit, `Unavailable` if the kernel gives none.
        """
        mine = [held.memory.nbytes for held in self._held.values() if held.owner == owner]
        room = (self.limit - (self.nbytes - sum(mine))) // 2 - sum(mine)
        if len(mine) >= COUNT or nbytes > room:
            raise QueueFull(
                f"this client shares {len(mine)} memories of {sum(mine)} bytes; it may have {COUNT}, and "
                f"{max(room, 0)} bytes more (limits.shared_bytes = {self.limit}); give one back, or send tensors as "
                "frames",
                limit=self.limit,
            )
        self._made += 1
        try:
            memory = SharedMemory.make(self._made, nbytes, channel)
        except OSError as error:
            raise Unavailable(f"no memory to share: {error.strerror}; send tensors as frames") from None
        self._held[memory.id] = _Held(memory, owner)
        return memory

    @property
    def sources(self) -> list[int]:
        """The channels by which forwards may come, as file descriptors in order."""
        hearing = [held.memory.channel for held in self._held.values() if held.hears]
        return sorted(each.fileno() for each in hearing if each is not None)

    def receive(self, ready: Container[object], most: int) -> list[tuple[bytes, bytes]]:
        """Forwards that have come at those `sources` that are ``ready``: of each its session and its packet."""
        forwards: list[tuple[bytes, bytes]] = []
        for number, held in list(self._held.items()):
            channel = held.memory.channel
            if channel is not None and channel.fileno() in ready and len(forwards) < most:
                forwards += [(held.owner, packet) for packet in _read(held, min(FORWARDS, most - len(forwards)))]
                # Others come first in the next turn.
                self._held[number] = self._held.pop(number)
        return forwards

    def receive_of(self, owner: bytes) -> list[tuple[bytes, bytes]]:
        """The first `EARLIER` of each channel that a session has sent by now, as `receive` gives them."""
        mine = [held for held in self._held.values() if held.owner == owner]
        return [(owner, packet) for held in mine for packet in _read(held, EARLIER)]

    def find(self, owner: bytes, number: int) -> SharedMemory:
        """A session's memory by its id. Raises `ArgumentError`."""
        held = self._held.get(number)
        if held is None or held.owner != owner or held.revoked:
            raise ArgumentError(f"memory: this session shares no memory {number}; ask for one", argument="memory")
        return held.memory

    def named_by(self, body: object) -> SharedMemory | None:
        """The memory that a job's body names."""
        number = body.memory if isinstance(body, Forward) else None
        return self._held[number].memory if number is not None else None

    def pin(self, body: object) -> None:
        """Keep the memory that a job's body names until `unpin`."""
        if (memory := self.named_by(body)) is not None:
            self._held[memory.id].jobs += 1

    def unpin(self, body: object) -> None:
        """Undo one `pin`."""
        if (memory := self.named_by(body)) is not None:
            self._held[memory.id].jobs -= 1
            self._free_unused(self._held[memory.id])

    def give_back(self, owner: bytes, number: int) -> None:
        """A session gives a memory back; jobs that name it go on. Raises `ArgumentError`."""
        self._revoke(self._held[self.find(owner, number).id])

    def revoke(self, owner: bytes) -> None:
        """Take back all memories of a session that has ended."""
        for held in [held for held in self._held.values() if held.owner == owner]:
            self._revoke(held)

    def close(self) -> None:
        """Free all of them."""
        for held in list(self._held.values()):
            held.jobs = 0
            self._revoke(held)

    def _revoke(self, held: _Held) -> None:
        held.revoked = True
        held.end_forwards()
        self._free_unused(held)

    def _free_unused(self, held: _Held) -> None:
        if held.revoked and not held.jobs:
            del self._held[held.memory.id]
            held.memory.free()
            for tell in self.on_freed:
                tell(held.memory.id)


def _read(held: _Held, most: int) -> Iterator[bytes]:
    """Packets that have come by a memory's channel."""
    channel = held.memory.channel
    if channel is None or not held.hears:
        return
    for _ in range(most):
        try:
            packet = channel.recv(FORWARD_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:  # it was closed with completions unread; what had been sent before comes next
            continue
        except OSError as error:
            log.warning("a client's channel is given up: %s", error.strerror)
            packet = b""
        if not packet:
            held.end_forwards()
            return
        yield packet


def check_places(memory: SharedMemory, latents: list[Tensor], room: list[int] | None) -> None:
    """Check that tensors, and the ``room`` (offset and size) for a result, lie in a memory, the room apart from them.

    Raises `ArgumentError`, naming ``x`` or ``room``.
    """
    places = [(tensor.offset, tensor.nbytes) for tensor in latents if tensor.offset is not None]
    for offset, nbytes in places:
        if offset + nbytes > memory.nbytes:
            raise ArgumentError(
                f"x: {nbytes} bytes at {offset} lie behind the end of memory {memory.id}, which has {memory.nbytes}",
                argument="x",
            )
    if room is None:
        return
    start, size = room
    if start % ALIGNED_BYTES or start + size > memory.nbytes:
        raise ArgumentError(
            f"room: {size} bytes at {start}; it begins at a multiple of {ALIGNED_BYTES}, and ends within the "
            f"{memory.nbytes} bytes of memory {memory.id}",
            argument="room",
        )
    if any(start < offset + nbytes and offset < start + size for offset, nbytes in places):
        raise ArgumentError("room: it overlaps x, which ranks may have to read again", argument="room")
