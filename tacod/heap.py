"""The C library's heap, told to keep what is asked for again at every step."""

from __future__ import annotations

import ctypes
from contextlib import suppress

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers for them (mallopt(3))."""
KEPT_BYTES = 64 << 20
"""Free memory at the heap's end that isn't given back."""
HEAP_BYTES = 32 << 20
"""Blocks up to this size come from the heap; glibc takes no larger one here. Others are mapped, and unmapped again."""


def keep_freed_memory() -> None:
    """Have freed blocks of a latent's size used again.

    By default the kernel takes them back and, at every step, finds and clears each of their pages anew, which costs
    more than to copy what they hold. Without glibc nothing is changed.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
