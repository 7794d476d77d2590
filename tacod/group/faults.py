"""Faults on purpose, for tests: which one is due with which work."""

from __future__ import annotations

from collections import Counter

from tacod.config import Testing
from tacod.group.work import Fault

__all__ = ["Faults"]


class Faults:
    """Counts the work that goes to the ranks. It is done here, because ranks that fail forget."""

    def __init__(self, testing: Testing) -> None:
        self._faults = testing.faults
        self._seen: Counter[str] = Counter()

    def due(self, at: str) -> Fault | None:
        """What goes wrong in the work that starts now, if anything does."""
        count = self._seen[at]
        self._seen[at] += 1
        for fault in self._faults:
            if fault.at == at and (count == fault.skip or (fault.always and count > fault.skip)):
                return Fault(fault.kind, fault.when, fault.rank)
        return None
