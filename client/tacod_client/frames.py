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
_POLLIN, _SNDMORE, _DONTWAIT, _EVENTS = int(zmq.POLLIN), int(zmq.SNDMORE), int(zmq.DONTWAIT), int(zmq.EVENTS)


def receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """The next message, or None if there is none; without the check, ZeroMQ would raise an exception each time."""
    if not int(socket.get(_EVENTS)) & _POLLIN:
        return None
    try:
        frames = [socket.recv(_DONTWAIT, copy=False)]
    except zmq.Again:
        return None
    # A message comes whole.
    while frames[-1].more:
        frames.append(socket.recv(_DONTWAIT, copy=False))
    return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Buffer], flags: int = 0) -> None:
    """Send a message. Large frames must not change until they are sent."""
    *rest, last = frames
    flags = int(flags)
    for frame in rest:
        socket.send(frame, flags | _SNDMORE, copy=len(memoryview(frame)) < COPIED_BYTES, track=False)
    socket.send(last, flags, copy=len(memoryview(last)) < COPIED_BYTES, track=False)


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
