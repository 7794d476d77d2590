"""The C library's heap: keeps memory that every step needs again, and gives back what a burst has left."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

__all__ = ["Leftovers", "give_back", "keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers for them (mallopt(3))."""
KEPT_BYTES = 64 << 20
"""Free memory at the heap's end that isn't given back."""
HEAP_BYTES = 32 << 20
"""Blocks up to this size come from the heap; glibc takes no larger one here. Others are mapped, and unmapped again."""
LOOK_S = 3.0
"""How often `Leftovers` looks."""


def keep_freed_memory() -> None:
    """Keep freed blocks of a latent's size for reuse.

    By default the kernel takes them back, and at every step finds and clears each of their pages again, which costs
    more than copying their contents. Without glibc this does nothing.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Give the kernel every free page of the heap, in all of its arenas (malloc_trim(3)); nothing without glibc."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _info(number: type[ctypes.c_uint] | type[ctypes.c_size_t]) -> type[ctypes.Structure]:
    fields = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    return type("Info", (ctypes.Structure,), {"_fields_": [(name, number) for name in fields]})


INFO = {"mallinfo2": _info(ctypes.c_size_t), "mallinfo": _info(ctypes.c_uint)}
"""The results of glibc's functions of these names (mallinfo(3)); the older one counts only up to 4 GiB and wraps
around."""


def _free_bytes() -> int:
    """Free bytes in the heap; 0 without glibc."""
    library = ctypes.CDLL(None)
    for name, info in INFO.items():
        with suppress(AttributeError):
            ask = getattr(library, name)
            ask.restype = info
            return int(ask().fordblks)
    return 0


class Leftovers:
    """Gives back memory that a burst of messages has left in the heap, but none that steps use again and again."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._seen = 0
        self._moved = 0

    def attend(self, now: float, passed: int) -> None:
        """Look, if it is time: ``now`` on the monotonic clock, ``passed`` bytes have come and gone so far.

        Memory that is free although less than that passed through since the last look is no step's.
        """
        if now < self._next_s:
            return
        self._next_s = now + LOOK_S
        before, self._moved, self._seen = self._moved, passed - self._seen, passed
        if before > KEPT_BYTES + self._moved:
            # What errors and callbacks refer to in circles goes now, and not when many more objects have come.
            gc.collect()
        if _free_bytes() > KEPT_BYTES + self._moved:
            give_back()
