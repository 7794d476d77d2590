"""What prctl(2) sets for a process."""

from __future__ import annotations

import ctypes
import signal

__all__ = ["adopt_orphans", "die_with_parent", "name"]

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if this process is stopped.

    The kernel does so only for a parent that ends after this call.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans(adopts: bool) -> None:
    """Whether descendants whose parent ends become children of this process, or as usual of the init process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0)


def name(text: str) -> None:
    """Name the calling thread, and with it the process as ``top`` shows it; 15 bytes of it."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, text.encode())
