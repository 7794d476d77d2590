"""Tables that forwards use, such as positions: computed once for each size, and kept on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["holding", "table"]

Make = Callable[..., Tensor]
_holders: list[list[Tensor]] = []


def table(kept: int) -> Callable[[Make], Make]:
    """Keep the last ``kept`` results of a function, by its arguments."""

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
    """A context that collects every table used in it, so that a CUDA graph can keep the memory that it reads."""
    held: list[Tensor] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders.remove(held)
