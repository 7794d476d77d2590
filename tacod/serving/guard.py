"""Watches the supervisor's memory: over its limit, connections end until it holds less.

Decoded and queued messages are counted where they are kept. But libzmq receives a whole message before anybody sees it,
and limits each frame but not their number: a peer that never ends its message could fill the memory. This module sees
that in the process's own memory, twenty times a second. Whose memory it was shows when a connection ends.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import socket
import stat
import termios
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tacod.heap import give_back

__all__ = ["Guard", "Socket", "own_bytes", "socket_of"]

log = logging.getLogger(__name__)

LOOK_S = 0.05
IN_VAIN_S = 1.0
"""How long no connection is ended after ending all of them did not help."""
GONE_S = 0.3
"""How long an ended connection's memory may take to be free."""
STRANGERS = 256
"""Most connections without a session at the same time: each costs a descriptor and some memory."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def own_bytes() -> int:
    """This process's memory without what it shares with the ranks and without its program's files."""
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * _PAGE_BYTES


def socket_of(fd: int) -> int:
    """The number of the socket behind a descriptor, which no other open socket has; 0 if it is no socket or closed."""
    try:
        found = os.fstat(fd)
    except OSError:
        return 0
    return found.st_ino if stat.S_ISSOCK(found.st_mode) else 0


@dataclass(frozen=True)
class Socket:
    """The daemon's end of a connection."""

    fd: int
    """libzmq's own descriptor, which may be closed and another's by now."""
    number: int

    @property
    def is_open(self) -> bool:
        """Whether the connection is still there."""
        return socket_of(self.fd) == self.number


@dataclass(frozen=True)
class Connection:
    """One client's connection, with a descriptor of our own for its socket."""

    end: socket.socket
    number: int
    busy: bool
    """Whether bytes wait in it: its client sends faster than tacod reads, or doesn't read."""


class Guard:
    """Ends connections, on a thread of its own, while the process holds more than ``limit`` bytes beyond its start.

    ``addresses`` are the daemon's ends of clients' connections: a unix socket's path, or a TCP port. ``sessions`` gives
    the sockets (`socket_of`) that have a session. Those without a session end first, then those with waiting bytes,
    then the youngest. A client that was not at fault connects again and repeats its request.
    """

    def __init__(self, limit: int, addresses: Collection[object], sessions: Callable[[], Iterable[int]]) -> None:
        self.limit = limit
        self._addresses = addresses
        self._sessions = sessions
        self._base = own_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    @property
    def over(self) -> int:
        """Bytes beyond the limit; negative below it."""
        return own_bytes() - self._base - self.limit

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                if self.over > 0:
                    self._relieve()
                self._turn_strangers_away()
            except Exception:
                # It is tried again; and no work depends on it.
                log.exception("the memory could not be looked at")

    def _relieve(self) -> None:
        give_back()
        if (over := self.over) <= 0:
            return
        log.warning("%d MiB are held over limits.memory_bytes: connections end until they are free", over >> 20)
        connections = self._connections()
        known = set(self._sessions())
        strangers = [each for each in connections if each.number not in known]
        clients = [each for each in connections if each.number in known]
        groups = [strangers, *([each] for each in sorted(clients, key=lambda each: (not each.busy, -each.number)))]
        try:
            ended = 0
            for group in groups:
                for connection in group:
                    _end(connection.end)
                ended += len(group)
                if group and self._is_relieved():
                    break
            log.warning("%d of %d connections ended, %d MiB over now", ended, len(connections), max(self.over, 0) >> 20)
            if self.over > 0:
                self._stop.wait(IN_VAIN_S)
        finally:
            for connection in connections:
                connection.end.close()

    def _is_relieved(self) -> bool:
        """Whether ending connections was enough, after their memory had the time to become free."""
        for _ in range(int(GONE_S / LOOK_S)):
            if self._stop.wait(LOOK_S):
                return True
            give_back()
            if self.over <= 0:
                return True
        return False

    def _turn_strangers_away(self) -> None:
        known = set(self._sessions())
        if len(_descriptors()) <= STRANGERS + len(known):
            return
        connections = self._connections()
        strangers = sorted((each for each in connections if each.number not in known), key=lambda each: each.number)
        if len(strangers) > STRANGERS:
            log.warning("%d connections without a session: the oldest end", len(strangers))
            for connection in strangers[: len(strangers) - STRANGERS // 2]:
                _end(connection.end)
        for connection in connections:
            connection.end.close()

    def _connections(self) -> list[Connection]:
        found = []
        for each in _descriptors():
            with suppress(OSError):
                # libzmq may close it, and another thread open something else by its number: hence a copy, then a look.
                fd = os.dup(each)
                number = socket_of(fd)
                end = socket.socket(fileno=fd) if number else None
                if end is None:
                    os.close(fd)
                elif self._is_clients(end):
                    busy = _waiting(end, termios.FIONREAD) or _waiting(end, termios.TIOCOUTQ)
                    found.append(Connection(end, number, busy))
                else:
                    end.close()
        return found

    def _is_clients(self, end: socket.socket) -> bool:
        if end.type != socket.SOCK_STREAM or end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        address = end.getsockname()
        return (address if end.family == socket.AF_UNIX else address[1]) in self._addresses


def _descriptors() -> list[int]:
    return [int(each.name) for each in Path("/proc/self/fd").iterdir()]


def _end(end: socket.socket) -> None:
    """End a connection by its descriptor; libzmq then frees all that it held for it."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _waiting(end: socket.socket, which: int) -> bool:
    count = array.array("i", [0])
    with suppress(OSError):
        fcntl.ioctl(end, which, count)
    return count[0] > 0
