"""Memory that a client shares with the ranks: the supervisor makes it, hands it out and takes it back."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

__all__ = ["SharedMemory"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class SharedMemory:
    """A piece of memory of a fixed size, by its descriptor; the supervisor reads and writes none of its bytes.

    It is sealed: nobody who has the descriptor can make it smaller, so no reader takes a SIGBUS.
    """

    id: int
    nbytes: int
    fd: int

    @staticmethod
    def make(number: int, nbytes: int) -> SharedMemory:
        """A memory of zeros. Raises `OSError` if there can be none."""
        fd = os.memfd_create("tacod-client", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return SharedMemory(number, nbytes, fd)

    def free(self) -> None:
        """Free its pages now, though others may still have it mapped, and close it."""
        with mmap.mmap(self.fd, self.nbytes) as mapped:
            mapped.madvise(mmap.MADV_REMOVE)
        os.close(self.fd)
