"""Packets with descriptors, on unix sockets.

`socket.send_fds` and `socket.recv_fds` ignore their flags in Python 3.11 at least, so they may wait where they
must not.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["recv_fds", "refuse_fds", "send_fds"]

SO_PASSRIGHTS = 83
"""Whether a unix socket takes descriptors; since Linux 6.16."""


def refuse_fds(end: socket.socket) -> None:
    """Have the kernel refuse descriptors that are sent to a socket, if it can.

    Otherwise this process would have to close those that it doesn't take, and their sender says how long that may last
    (``SO_LINGER``).
    """
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def send_fds(end: socket.socket, packet: bytes, descriptors: Sequence[int], flags: int = 0) -> None:
    """Send a packet and descriptors. Raises `OSError`, and by ``MSG_DONTWAIT`` `BlockingIOError` if it would wait."""
    end.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))], flags)


def recv_fds(end: socket.socket, nbytes: int, count: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """A packet of at most ``nbytes``, and at most ``count`` descriptors, which no other program inherits.

    Raises `OSError`, and by ``MSG_DONTWAIT`` `BlockingIOError` if there is none.
    """
    descriptors = array.array("i")
    room = socket.CMSG_LEN(count * descriptors.itemsize)
    packet, ancillary, _, _ = end.recvmsg(nbytes, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, contents in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(contents[: len(contents) // descriptors.itemsize * descriptors.itemsize])
    return packet, list(descriptors)
