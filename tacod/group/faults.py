"""Faults on purpose, for tests: which one is due with which work."""

from __future__ import annotations

from collections import Counter

from tacod.config import Testing
from tacod.group.work import Fault

__all__ = ["Faults"]


class Faults:
    """Counts the work that goes to the ranks. The supervisor does this, because ranks that fail lose their counts."""

    def __init__(self, testing: Testing, group: str) -> None:
        """Those of the ranks of a ``group``."""
        self._faults = [fault for fault in testing.faults if fault.group in (None, group)]
        self._seen: Counter[str] = Counter()

    def due(self, at: str) -> Fault | None:
        """The fault of the work that starts now, if one is due."""
        count = self._seen[at]
        self._seen[at] += 1
        for fault in self._faults:
            if fault.at == at and (count == fault.skip or (fault.always and count > fault.skip)):
                return Fault(fault.kind, fault.when, fault.rank, fault.block, fault.seconds)
        return None
