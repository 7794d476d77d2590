"""How long forwards take: what tells long ones, which are watched while they run, from others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

__all__ = ["LONG_S", "Paces"]

LONG_S = 0.5
"""From this time on a forward is long: a click on Cancel should not have to wait for its end."""
KINDS = 1024
"""Kinds of forward that are remembered."""


class Paces:
    """Seconds of the last forward of each kind."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()

    def note(self, kind: Hashable, seconds: float) -> None:
        """A forward of this kind took so long."""
        self._seconds[kind] = seconds
        self._seconds.move_to_end(kind)
        while len(self._seconds) > KINDS:
            self._seconds.popitem(last=False)

    def may_be_long(self, kind: Hashable) -> bool:
        """Whether a forward of this kind is long, as far as can be told; an unknown one may be."""
        return self._seconds.get(kind, LONG_S) >= LONG_S
