"""Memory that a client shares with the ranks: the supervisor makes it, hands it out and takes it back.

With it may go a channel, a pair of sockets: by it the client sends forwards whose latents lie in the memory to the
supervisor, and rank 0 tells the client of completions, of each result that it has put there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from tacod.group.descriptors import refuse_fds

__all__ = ["SharedMemory", "make_channel"]

COMPLETIONS_BYTES = 16 << 10
"""What the kernel is to keep of a client's unread completions: a dozen, as it counts."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class SharedMemory:
    """A piece of memory of a fixed size, by its descriptor; the supervisor reads and writes none of its bytes.

    It is sealed: nobody who has the descriptor can make it smaller, so no reader takes a SIGBUS.
    """

    id: int
    nbytes: int
    fd: int
    channel: socket.socket | None = None
    """The daemon's end of its channel, at which the supervisor reads and rank 0 writes; None if it has none."""

    @property
    def descriptors(self) -> list[int]:
        """What the ranks get."""
        return [self.fd] if self.channel is None else [self.fd, self.channel.fileno()]

    @staticmethod
    def make(number: int, nbytes: int, channel: socket.socket | None = None) -> SharedMemory:
        """A memory of zeros, which takes over the ``channel``. Raises `OSError` if there can be none."""
        fd = os.memfd_create("tacod-client", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return SharedMemory(number, nbytes, fd, channel)

    def free(self) -> None:
        """Free its pages now, though others may still have it mapped, and close it."""
        with mmap.mmap(self.fd, self.nbytes) as mapped:
            mapped.madvise(mmap.MADV_REMOVE)
        os.close(self.fd)
        if self.channel is not None:
            # Ranks have it until their next command. For the client it ends now.
            with suppress(OSError):
                self.channel.shutdown(socket.SHUT_RDWR)
            self.channel.close()


def make_channel() -> tuple[socket.socket, socket.socket]:
    """The daemon's end of a channel, at which nobody waits, and the client's. Raises `OSError` if there can be none."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    refuse_fds(ours)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, COMPLETIONS_BYTES)
    return ours, theirs
