"""Faults on purpose, for tests: which one is due with which work."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tacod.config import Testing

__all__ = ["Faults"]


class Faults:
    """Counts the work that goes to the ranks. It is done here, because ranks that fail forget."""

    def __init__(self, testing: Testing) -> None:
        self._faults = testing.faults
        self._seen: Counter[str] = Counter()

    def due(self, at: str) -> dict[str, Any] | None:
        """What goes wrong in the work that starts now, if anything does."""
        count = self._seen[at]
        self._seen[at] += 1
        for fault in self._faults:
            if fault.at == at and (count == fault.skip or (fault.always and count > fault.skip)):
                return fault.model_dump(include={"kind", "when", "rank"})
        return None
