"""Watches the supervisor's memory: over its limit, connections end until it holds less.

Decoded and queued messages are counted where they are kept. But libzmq receives a whole message before anybody sees it,
and limits each frame but not their number: a peer that never ends its message could fill the memory. This module sees
that in the process's own memory, twenty times a second. Whose memory it was shows when a connection ends.

Nor does libzmq limit how many connect, and where there is no descriptor left for the next one it ends the process. So
this module ends connections without a session, too, beyond a number of them. It needs one descriptor for that.
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
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tacod.heap import give_back

__all__ = ["Guard", "Socket", "own_bytes", "socket_of"]

log = logging.getLogger(__name__)

LOOK_S = 0.05
IN_VAIN_S = 1.0
"""How long no connection is ended after ending all of them did not help."""
LOGGED_S = 1.0
"""Strangers' ends are logged once in this time, so that strangers don't decide how much is logged."""
GONE_S = 0.3
"""How long an ended connection's memory may take to be free."""
STRANGERS = 256
"""Most connections without a session at the same time: each costs a descriptor and some memory."""
FLOOD = 2 * STRANGERS
"""Beyond so many, each further one ends as it is found, however young it is."""
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

    def end(self) -> None:
        """End the connection; libzmq then frees all that it held for it."""
        with suppress(OSError), _copy(self.fd) as (number, end):
            if number == self.number:
                end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Connection(Socket):
    """One client's connection."""

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
        self._next_line_s = 0.0
        self._ended: set[int] = set()
        """The sockets of the strangers that were ended last."""
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
                while self._turn_strangers_away() and self.over <= 0 and not self._stop.is_set():
                    pass
                if self.over > 0:
                    self._relieve()
            except Exception:
                # It is tried again; and no work depends on it.
                log.exception("memory and connections could not be looked at")

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
        ended = 0
        for group in groups:
            for connection in group:
                connection.end()
            ended += len(group)
            if group and self._is_relieved():
                break
        log.warning("%d of %d connections ended, %d MiB over now", ended, len(connections), max(self.over, 0) >> 20)
        if self.over > 0:
            self._stop.wait(IN_VAIN_S)

    def _is_relieved(self) -> bool:
        """Whether ending connections was enough, after their memory had the time to become free."""
        for _ in range(int(GONE_S / LOOK_S)):
            if self._stop.wait(LOOK_S):
                return True
            give_back()
            if self.over <= 0:
                return True
        return False

    def _turn_strangers_away(self) -> bool:
        """End connections without a session if there are too many, the oldest first; returns whether there were others.

        libzmq may keep one that was ended until what it has received is read.
        """
        known = set(self._sessions())
        descriptors = _descriptors()
        if len(descriptors) <= STRANGERS + len(known):
            return False
        strangers: list[Socket] = []
        ended = set()
        for each in descriptors:
            with suppress(OSError), _copy(each) as (number, end):
                if number in known or not self._is_clients(end):
                    continue
                if len(strangers) < FLOOD:
                    strangers.append(Socket(each, number))
                else:
                    end.shutdown(socket.SHUT_RDWR)
                    ended.add(number)
        if len(strangers) <= STRANGERS:
            return False
        if (now := time.monotonic()) >= self._next_line_s:
            self._next_line_s = now + LOGGED_S
            log.warning("%d connections without a session: the oldest end", len(strangers) + len(ended))
        for stranger in sorted(strangers, key=lambda each: each.number)[: len(strangers) - STRANGERS // 2]:
            stranger.end()
            ended.add(stranger.number)
        others = ended - self._ended
        self._ended = ended
        return bool(others)

    def _connections(self) -> list[Connection]:
        found = []
        for each in _descriptors():
            with suppress(OSError), _copy(each) as (number, end):
                if self._is_clients(end):
                    busy = _waiting(end, termios.FIONREAD) or _waiting(end, termios.TIOCOUTQ)
                    found.append(Connection(each, number, busy))
        return found

    def _is_clients(self, end: socket.socket) -> bool:
        if end.type != socket.SOCK_STREAM or end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        address = end.getsockname()
        return (address if end.family == socket.AF_UNIX else address[1]) in self._addresses


def _descriptors() -> list[int]:
    with os.scandir("/proc/self/fd") as found:
        return [int(each.name) for each in found]


@contextmanager
def _copy(fd: int) -> Iterator[tuple[int, socket.socket]]:
    """The number of the socket behind a descriptor, and the socket by a descriptor of our own.

    Raises `OSError`, also if it is no socket.
    """
    # libzmq may close it, and another thread open something else by its number: hence a copy, then a look.
    copy = os.dup(fd)
    try:
        end = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with end:
        yield socket_of(copy), end


def _waiting(end: socket.socket, which: int) -> bool:
    count = array.array("i", [0])
    with suppress(OSError):
        fcntl.ioctl(end, which, count)
    return count[0] > 0
