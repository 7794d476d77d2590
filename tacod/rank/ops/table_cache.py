"""Tables that forwards look things up in, such as positions: made once for a size, and kept on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["holding", "table"]

Make = Callable[..., Tensor]
_holders: list[list[Tensor]] = []


def table(kept: int) -> Callable[[Make], Make]:
    """Keep the last ``kept`` tensors that a function has made, by its arguments."""

    def decorate(make: Make) -> Make:
        known = functools.lru_cache(maxsize=kept)(make)

        @functools.wraps(make)
        def find(*args: Hashable) -> Tensor:
            found = known(*args)
            for holder in _holders:
                holder.append(found)
            return found

        return find

    return decorate


@contextmanager
def holding() -> Iterator[list[Tensor]]:
    """Every table that is used within, to be held for as long as a CUDA graph reads from where they lie."""
    held: list[Tensor] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders.remove(held)
