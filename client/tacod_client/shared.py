"""Memory that this client shares with the daemon's ranks.

The daemon makes the memory and hands out its descriptor on a unix socket beside the first (docs/protocol.md). With it
comes an end of a channel: by it a rank tells of completions (a result lies there), and forwards go to the daemon, past
ZeroMQ's threads. Whatever goes wrong here, tensors travel as frames, and messages by ZeroMQ: sharing only saves time.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Sequence

from tacod_client import wire
from tacod_client.errors import ProtocolError, TacodError
from tacod_client.wire import Message

__all__ = ["Memory", "Shared", "aligned"]

log = logging.getLogger(__name__)

ASK_S = 1.0
"""How long to wait for the daemon to hand out a memory."""
AGAIN_S = 10.0
"""How long not to ask again after that was refused."""
LEAST_MEMORY_BYTES = 1 << 20


class Memory:
    """One memory and the places in it that are in use."""

    def __init__(self, number: int, nbytes: int, fd: int) -> None:
        """It doesn't keep the descriptor ``fd``."""
        self.channel: socket.socket | None = None
        """Where a rank tells of results that lie here, and forwards go whose latents lie here; never waited at."""
        self.number = number
        self.nbytes = nbytes
        self.retired = False
        """Whether no more places are given out: ranks may still read or write one that its request has left."""
        self.view = memoryview(mmap.mmap(fd, nbytes))
        self._used: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int | None:
        """The offset of a free place; None if there is none."""
        start = 0
        for offset, size in self._used:
            if offset - start >= nbytes:
                break
            start = aligned(offset + size, mmap.PAGESIZE)
        if self.retired or start + nbytes > self.nbytes:
            return None
        self._used = sorted([*self._used, (start, nbytes)])
        return start

    def release(self, offset: int) -> None:
        """A place is free again."""
        self._used = [each for each in self._used if each[0] != offset]

    @property
    def idle(self) -> bool:
        """Whether no place is in use."""
        return not self._used


class Shared:
    """The memories of one session; usable from several threads."""

    def __init__(self, path: bytes, session: bytes, completes: bool = False, forwards: bool = False) -> None:
        """``path`` is that of the socket that hands out memory, with channels if the daemon ``completes``.

        ``forwards`` says whether it takes them by channels.
        """
        self.channels: tuple[int, ...] = ()
        """The descriptors that become readable when a completion comes; another tuple whenever they change."""
        self._completes = completes
        self._forwards = forwards
        self._pid = os.getpid()
        self._path = path
        self._session = session
        self._memories: list[Memory] = []
        self._lock = threading.Lock()
        self._hearing = threading.Lock()
        """Held while channels are used, and while memories come and go; never while the daemon is asked."""
        self._ask_at_s = 0.0

    def take(self, nbytes: int) -> tuple[Memory, int, list[int]] | None:
        """A memory with a free place and the place's offset, and the ids of memories to give back; None for frames."""
        with self._lock:
            for memory in self._memories:
                if (offset := memory.take(nbytes)) is not None:
                    return memory, offset, []
            if time.monotonic() < self._ask_at_s:
                return None
            # Those that are too small for what comes now make room.
            useless = [each for each in self._memories if each.idle and not each.retired and each.nbytes < nbytes]
            try:
                memory = self._ask(max(LEAST_MEMORY_BYTES, 1 << (nbytes - 1).bit_length()))
            except (OSError, ValueError, KeyError, TacodError) as error:
                log.debug("no shared memory: %s", error)
                self._ask_at_s = time.monotonic() + AGAIN_S
                return None
            with self._hearing:
                self._memories.append(memory)
                self._note_channels()
            for each in useless:
                self._remove(each)
            offset = memory.take(nbytes)
            assert offset is not None
            return memory, offset, [each.number for each in useless]

    def release(self, memory: Memory, offset: int, answered: bool) -> list[int]:
        """A request is through with its place; returns the ids of memories to give back.

        Unless the request was ``answered``, the ranks may still work on it: then the place is never used again.
        """
        with self._lock:
            memory.retired = memory.retired or not answered
            memory.release(offset)
            if memory.retired and memory.idle and memory in self._memories:
                self._remove(memory)
                return [memory.number]
            return []

    def receive(self) -> list[bytes]:
        """The completions that have come, as packets. A socket that is closed is given up."""
        packets = []
        with self._hearing:
            for memory in self._memories:
                end = memory.channel
                try:
                    while end is not None and (packet := end.recv(wire.COMPLETION_BYTES)):
                        packets.append(packet)
                except BlockingIOError:
                    continue
                except OSError as error:
                    log.debug("no more completions: %s", error)
                if end is not None:
                    end.close()
                    memory.channel = None
                    self._note_channels()
        return packets

    def send(self, number: int, frames: Sequence[wire.Buffer]) -> bool:
        """Send a forward by the channel of the memory that it names; returns whether that could be done at once."""
        nbytes = sum(len(memoryview(each)) + wire.SIZE_BYTES for each in frames)
        if not self._forwards or nbytes > wire.FORWARD_BYTES or os.getpid() != self._pid:
            # A child of this process has the channel too, but not the session.
            return False
        with self._hearing:
            end = next((each.channel for each in self._memories if each.number == number), None)
            try:
                return end is not None and end.send(wire.join(frames), socket.MSG_NOSIGNAL) > 0
            except OSError as error:
                # The daemon is slow to read, or has ended the session.
                log.debug("a forward doesn't go by its memory's channel: %s", error)
                return False

    def close(self) -> None:
        """Use the channels no more; the session has ended."""
        with self._lock:
            for memory in list(self._memories):
                self._remove(memory)

    def _remove(self, memory: Memory) -> None:
        with self._hearing:
            self._memories.remove(memory)
            if memory.channel is not None:
                memory.channel.close()
            self._note_channels()

    def _note_channels(self) -> None:
        ends = (each.channel for each in self._memories)
        self.channels = tuple(end.fileno() for end in ends if end is not None)

    def _ask(self, nbytes: int) -> Memory:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.settimeout(ASK_S)
            asking.connect(self._path)
            asked: dict[str, int] = {"nbytes": nbytes, **({"completions": True} if self._completes else {})}
            asking.send(b"".join(map(bytes, wire.encode(Message("share", asked, 0, self._session)))))
            packet, descriptors, _, _ = socket.recv_fds(asking, wire.SHARE_BYTES, 2)
        try:
            head = len(wire.PREAMBLE)
            reply = wire.decode([packet[:head], packet[head:]])
            if reply.type == "error":
                raise TacodError.from_wire(reply.body)
            if not descriptors or not nbytes <= reply.body["nbytes"] <= os.fstat(descriptors[0]).st_size:
                raise ProtocolError("the daemon's answer brings no memory of that size")
            memory = Memory(reply.body["memory"], reply.body["nbytes"], descriptors[0])
            if len(descriptors) > 1:
                memory.channel = socket.socket(fileno=descriptors.pop())
                # Whatever `socket.setdefaulttimeout` says in its caller's process.
                memory.channel.setblocking(False)
                memory.channel.set_inheritable(False)
            return memory
        finally:
            for each in descriptors:
                os.close(each)


def aligned(number: int, to: int) -> int:
    """The next multiple of ``to``."""
    return -(-number // to) * to
