"""How much the supervisor holds, watched: over its limit, connections end until it holds less.

What is decoded and queued is counted where it is kept. But libzmq takes in a message whole before anybody sees it, and
bounds each frame but not how many there are; so a peer that never ends its message could have it hold anything. Here
that is seen by the process's own memory, twenty times a second, and whose it is by what goes when a connection ends.
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

__all__ = ["Guard", "own_bytes", "socket_of"]

log = logging.getLogger(__name__)

LOOK_S = 0.05
IN_VAIN_S = 1.0
"""How long nobody is cut off after all were, and it did not help."""
GONE_S = 0.3
"""How long what a connection held may take to be free, once it has ended."""
STRANGERS = 256
"""Connections without a session that there may be at once: each costs a descriptor and some memory."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def own_bytes() -> int:
    """The memory that this process has to itself: without what it shares with the ranks, and its program's files."""
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * _PAGE_BYTES


def socket_of(fd: int) -> int:
    """Which socket a descriptor is: a number that no other one has meanwhile. 0 if it is none or closed."""
    try:
        found = os.fstat(fd)
    except OSError:
        return 0
    return found.st_ino if stat.S_ISSOCK(found.st_mode) else 0


@dataclass(frozen=True)
class Connection:
    """One client's connection, with a descriptor of our own for it."""

    end: socket.socket
    number: int
    busy: bool
    """Whether bytes wait in it: its client sends faster than we take, or doesn't read."""


class Guard:
    """Ends connections, on a thread of its own, while the process holds more than ``limit`` bytes beyond its start.

    ``addresses`` are what clients' connections have on this side: a unix socket's path, or a TCP port. ``sessions``
    gives the sockets (`socket_of`) that have a session. The others end first, then those in which bytes wait, then the
    youngest. Whom that hits without reason comes back and asks again.
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
        """Watch no more."""
        self._stop.set()
        self._thread.join()

    @property
    def over(self) -> int:
        """How many bytes are held beyond the limit, or less than none."""
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
        """Whether that was enough, once what was held had the time to go."""
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
    """End a connection under libzmq's hands, which then forgets all that it had of it."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _waiting(end: socket.socket, which: int) -> bool:
    count = array.array("i", [0])
    with suppress(OSError):
        fcntl.ioctl(end, which, count)
    return count[0] > 0
