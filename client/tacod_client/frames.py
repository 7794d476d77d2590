"""Frames on a ZeroMQ socket, received and sent with few copies, system calls and threads."""

from __future__ import annotations

import os
import socket as sockets
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import zmq

from tacod_client.wire import Buffer

__all__ = ["COPIED_BYTES", "receive", "send", "widen"]

COPIED_BYTES = 1 << 20
"""Frames below this size are copied to be sent: for a larger one pyzmq has a thread that lets go of it, and to wake
that costs more than the copy."""
SEND_BUFFER_BYTES = 2 << 20
"""What the kernel is to hold of a unix socket's unread bytes. By default it is less than half a latent, and for every
piece of the rest both sides' threads have to wake."""

# pyzmq's own are enums, with which Python takes a while to reckon.
_POLLIN, _SNDMORE = int(zmq.POLLIN), int(zmq.SNDMORE)


def receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """The next message, or None if there is none; without the check, ZeroMQ would raise an exception each time."""
    if not int(socket.get(zmq.EVENTS)) & _POLLIN:
        return None
    try:
        return socket.recv_multipart(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return None


def send(socket: zmq.Socket[bytes], frames: Sequence[Buffer], flags: int = 0) -> None:
    """Send a message. Large frames must not change until they are sent."""
    socket.copy_threshold = COPIED_BYTES
    *rest, last = frames
    flags = int(flags)
    for frame in rest:
        socket.send(frame, flags | _SNDMORE, copy=False, track=False)
    socket.send(last, flags, copy=False, track=False)


def widen(frame: zmq.Frame) -> None:
    """Make the send buffer of the unix socket that a frame came through large enough for a latent."""
    # The kernel gives what it may (net.core.wmem_max). Over TCP it finds the best size itself.
    with suppress(OSError, zmq.ZMQError), ExitStack() as stack:
        fd = os.dup(int(frame.get(zmq.SRCFD)))
        stack.callback(os.close, fd)
        same = sockets.socket(fileno=fd)
        stack.callback(same.detach)
        if same.family == sockets.AF_UNIX:
            same.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, SEND_BUFFER_BYTES)
