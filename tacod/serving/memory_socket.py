"""The unix socket beside the clients' one, where a client gets memory that it shares with the ranks.

ZeroMQ carries no descriptors. So a client connects here too, sends one packet and gets one, which brings a descriptor.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tacod.group.shared_memory import SharedMemory
from tacod.serving.access import User
from tacod.serving.unix_socket import UnixSocket
from tacod_client import wire
from tacod_client.endpoint import UNIX_PATH_BYTES
from tacod_client.errors import NotAllowed, ProtocolError, TacodError, Unavailable
from tacod_client.wire import MEMORY_SOCKET, SHARE_BYTES, Message

__all__ = ["MemorySocket", "Share", "memory_path"]

log = logging.getLogger(__name__)

WAITING = 16
"""Most connections that have sent nothing yet; the oldest ends for a new one."""
REST_S = 0.1
"""How long nobody is let in after the kernel could not."""

Share = Callable[[bytes, User, int], SharedMemory]
"""Makes a memory of so many bytes for the session of a token, asked for by a user. Raises a `TacodError`."""


def memory_path(path: Path) -> Path | None:
    """The socket's path beside that of the clients' socket; None if a unix socket can't have such a long one."""
    beside = path.with_name(path.name + MEMORY_SOCKET)
    return beside if len(os.fsencode(beside)) <= UNIX_PATH_BYTES else None


class MemorySocket:
    """Hands out memories, to clients that have a session.

    Raises `PathTaken` if the socket can't be there.
    """

    def __init__(self, path: Path) -> None:
        self._unix = UnixSocket(path, socket.SOCK_SEQPACKET)
        self._unix.socket.setblocking(False)
        self._waiting: list[socket.socket] = []
        self._rests_until_s = 0.0

    @property
    def sources(self) -> list[int]:
        """File descriptors that become readable when there is something to do."""
        rests = time.monotonic() < self._rests_until_s
        return [*(() if rests else (self._unix.socket.fileno(),)), *(each.fileno() for each in self._waiting)]

    def close(self) -> None:
        """End all connections, and remove the socket."""
        for end in (self._unix.socket, *self._waiting):
            end.close()
        self._waiting.clear()
        self._unix.remove()

    def poll(self, share: Share) -> None:
        """Let clients in, and answer those that have asked."""
        try:
            self._accept()
        except OSError as error:
            log.warning("nobody gets shared memory for a moment: %s", error.strerror)
            self._rests_until_s = time.monotonic() + REST_S
        for end in list(self._waiting):
            try:
                packet = end.recv(SHARE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                packet = b""
            self._waiting.remove(end)
            with end:
                if packet:
                    _answer(end, packet, share)

    def _accept(self) -> None:
        if time.monotonic() < self._rests_until_s:
            return
        with suppress(BlockingIOError):
            for _ in range(WAITING):
                end, _ = self._unix.socket.accept()
                end.setblocking(False)
                self._waiting.append(end)
                if len(self._waiting) > WAITING:
                    self._waiting.pop(0).close()


def _answer(end: socket.socket, packet: bytes, share: Share) -> None:
    descriptors = []
    try:
        # Its credentials from the kernel, as they were when it connected.
        _, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        memory = share(*_read(packet, User(uid)))
        reply = Message("done", {"memory": memory.id, "nbytes": memory.nbytes})
        descriptors.append(memory.fd)
    except TacodError as error:
        reply = Message("error", error.to_wire())
    except Exception as error:
        # Nobody's message ends the others' daemon.
        log.exception("a request for shared memory could not be answered")
        reply = Message("error", Unavailable(f"tacod failed over this request ({type(error).__name__})").to_wire())
    with suppress(OSError):
        # To one that has gone, or doesn't read, nothing is sent; what was made for it goes with its session.
        socket.send_fds(end, [b"".join(map(bytes, wire.encode(reply)))], descriptors)


def _read(packet: bytes, user: User) -> tuple[bytes, User, int]:
    """The session, the user and the bytes that a packet asks for. Raises `ProtocolError`."""
    head = len(wire.PREAMBLE)
    message = wire.decode([packet[:head], packet[head:]])
    nbytes = message.body.get("nbytes")
    if message.type != "share" or set(message.body) != {"nbytes"}:
        raise ProtocolError("expected a message 'share' whose body is a map of nbytes")
    if type(nbytes) is not int or not 0 < nbytes <= wire.MAX_TENSOR_BYTES:
        raise ProtocolError(f"nbytes: expected a whole number from 1 to {wire.MAX_TENSOR_BYTES}, got {nbytes!r:.40}")
    if not message.session:
        raise NotAllowed("memory is shared within a session; send its token")
    return message.session, user, nbytes
