"""A peer on a bare socket, which speaks ZMTP by hand: it can begin a message and never end it."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from types import TracebackType

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""ZMTP 3.0, without security (https://rfc.zeromq.org/spec/23/)."""
MORE, LONG, COMMAND = 1, 2, 4


class BarePeer:
    """A DEALER on a unix socket. ``said`` counts the bytes that the other side has taken."""

    def __init__(self, path: str, timeout_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._connect(path, time.monotonic() + timeout_s)
        self._socket.sendall(GREETING)
        self._hear(len(GREETING))
        ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        self._socket.sendall(bytes([COMMAND, len(ready)]) + ready)
        _, size = self._hear(2)
        self._hear(size)
        self.said = 0

    def _connect(self, path: str, deadline: float) -> None:
        while True:
            try:
                self._socket.connect(path)
            except BlockingIOError:  # many connect at once
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def _hear(self, size: int) -> bytes:
        said = b""
        while len(said) < size:
            more = self._socket.recv(size - len(said))
            assert more, "the other side ended before it had greeted"
            said += more
        return said

    def __enter__(self) -> BarePeer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def say(self, frame: bytes, more: bool = True, times: int = 1) -> bool:
        """Send a frame, once or more often; returns whether the other side is there to take it."""
        flags = LONG | (MORE if more else 0)
        try:
            self._socket.sendall((bytes([flags]) + struct.pack(">Q", len(frame)) + frame) * times)
        except OSError:
            return False
        self.said += len(frame) * times
        return True

    @property
    def cut_off(self) -> bool:
        """Whether the other side has ended the connection."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            try:
                while self._socket.recv(4096):
                    pass
            except ConnectionError:
                pass
            return True
        return False
