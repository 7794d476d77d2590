"""The unix socket beside the clients' one, where a client gets memory that it shares with the ranks.

ZeroMQ carries no descriptors. So a client connects here too, sends one packet and gets one, which brings a memory's
descriptor, and if the client asks for it that of its channel.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from tacod.group.descriptors import refuse_fds
from tacod.group.shared_memory import SharedMemory, make_channel
from tacod.serving.access import User
from tacod.serving.unix_socket import UnixSocket
from tacod_client import wire
from tacod_client.endpoint import UNIX_PATH_BYTES
from tacod_client.errors import NotAllowed, ProtocolError, QueueFull, TacodError, Unavailable
from tacod_client.wire import MEMORY_SOCKET, SHARE_BYTES, Message

__all__ = ["MemorySocket", "Share", "memory_path"]

log = logging.getLogger(__name__)

WAITING = 16
"""Most connections that have sent nothing yet; the oldest ends for a new one."""
UNREAD = 16
"""Most answers with descriptors on their way to one user's clients. The kernel counts the descriptors of all sockets
against what the daemon may send, and it sends some to its ranks too."""
REST_S = 0.1
"""How long nobody is let in after the kernel could not."""

Share = Callable[[bytes, User, int, socket.socket | None], SharedMemory]
"""Makes a memory of so many bytes for the session of a token, asked for by a user, and takes over the daemon's end of
its channel. Raises a `TacodError`.
"""


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
        refuse_fds(self._unix.socket)
        self._waiting: list[socket.socket] = []
        self._unread: list[tuple[int, socket.socket]] = []
        """Users, and connections whose client hasn't read its descriptor yet."""
        self._rests_until_s = 0.0

    @property
    def sources(self) -> list[int]:
        """File descriptors that become readable when there is something to do."""
        rests = time.monotonic() < self._rests_until_s
        return [*(() if rests else (self._unix.socket.fileno(),)), *(each.fileno() for each in self._waiting)]

    @property
    def is_unread(self) -> bool:
        """Whether a client has yet to read its descriptor, which nothing at `sources` tells."""
        return bool(self._unread)

    def close(self) -> None:
        """End all connections, and remove the socket."""
        for end in (self._unix.socket, *self._waiting, *(each for _, each in self._unread)):
            end.close()
        self._waiting.clear()
        self._unread.clear()
        self._unix.remove()

    def poll(self, share: Share) -> None:
        """Let clients in, and answer those that have asked."""
        self._forget_read()
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
            if packet:
                self._answer(end, packet, share)
            else:
                end.close()

    def _answer(self, end: socket.socket, packet: bytes, share: Share) -> None:
        # Its credentials from the kernel, as they were when it connected.
        _, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._forget_read()
        unread = sum(user == uid for user, _ in self._unread)
        if _answer(end, packet, uid, share if unread < UNREAD else _refuse):
            # The client is told that this is all, and what it hasn't read is seen on this side.
            with suppress(OSError):
                end.shutdown(socket.SHUT_WR)
            self._unread.append((uid, end))
        else:
            end.close()

    def _forget_read(self) -> None:
        for each in list(self._unread):
            if not struct.unpack("i", fcntl.ioctl(each[1], termios.TIOCOUTQ, bytes(4)))[0]:
                self._unread.remove(each)
                each[1].close()

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


def _refuse(token: bytes, user: User, nbytes: int, channel: socket.socket | None) -> SharedMemory:
    raise QueueFull(
        f"{UNREAD} answers with descriptors are on their way to {user}; read them, or send tensors as frames",
        limit=UNREAD,
    )


def _answer(end: socket.socket, packet: bytes, uid: int, share: Share) -> bool:
    """Answer one packet; returns whether descriptors are on their way."""
    descriptors: list[int] = []
    with ExitStack() as stack:
        try:
            reply = Message("done", _share(packet, User(uid), share, stack, descriptors))
        except TacodError as error:
            reply = Message("error", error.to_wire())
        except Exception as error:
            # Nobody's message ends the others' daemon.
            log.exception("a request for shared memory could not be answered")
            reply = Message("error", Unavailable(f"tacod failed over this request ({type(error).__name__})").to_wire())
        try:
            socket.send_fds(end, [b"".join(map(bytes, wire.encode(reply)))], descriptors)
        except OSError:
            # To one that has gone, or doesn't read, nothing is sent; what was made for it goes with its session.
            return False
    return bool(descriptors)


def _share(packet: bytes, user: User, share: Share, stack: ExitStack, descriptors: list[int]) -> dict[str, int]:
    """Make the memory that a packet asks for. Returns the fields of the answer, whose ``descriptors`` are added.

    What of these is the client's alone is closed by the ``stack``. Raises a `TacodError`.
    """
    token, nbytes, completions = _read(packet)
    ours = theirs = None
    if completions:
        # Without one the client's forwards and their answers go through ZeroMQ.
        with suppress(OSError):
            ours, theirs = make_channel()
            stack.enter_context(theirs)
    try:
        memory = share(token, user, nbytes, ours)
    except BaseException:
        if ours is not None:
            ours.close()
        raise
    descriptors += [memory.fd, *([theirs.fileno()] if theirs is not None else [])]
    return {"memory": memory.id, "nbytes": memory.nbytes}


def _read(packet: bytes) -> tuple[bytes, int, bool]:
    """The session, the bytes that a packet asks for, and whether with completions. Raises `ProtocolError`."""
    head = len(wire.PREAMBLE)
    message = wire.decode([packet[:head], packet[head:]])
    nbytes, completions = message.body.get("nbytes"), message.body.get("completions", False)
    if message.type != "share" or not {"nbytes"} <= set(message.body) <= {"nbytes", "completions"}:
        raise ProtocolError("expected a message 'share' whose body is a map of nbytes, and perhaps completions")
    if type(nbytes) is not int or not 0 < nbytes <= wire.MAX_TENSOR_BYTES:
        raise ProtocolError(f"nbytes: expected a whole number from 1 to {wire.MAX_TENSOR_BYTES}, got {nbytes!r:.40}")
    if type(completions) is not bool:
        raise ProtocolError(f"completions: expected true or false, got {completions!r:.40}")
    if not message.session:
        raise NotAllowed("memory is shared within a session; send its token")
    return message.session, nbytes, completions
