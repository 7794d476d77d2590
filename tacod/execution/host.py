"""What belongs to the host, and not to one group of ranks: clients' tensors, kept steps, and clients' memories."""

from __future__ import annotations

from tacod.config import Limits
from tacod.execution.kept_steps import KeptSteps
from tacod.execution.memories import Memories
from tacod.execution.store import Store

__all__ = ["Host"]


class Host:
    """Holds each tensor once, whichever group gets the jobs that name it."""

    def __init__(self, limits: Limits) -> None:
        self.store = Store(limits.store_bytes)
        self.kept = KeptSteps(self.store)
        self.memories = Memories(limits.shared_bytes)

    def apply_limits(self, limits: Limits) -> None:
        """Apply other limits."""
        self.store.limit = limits.store_bytes
        self.memories.limit = limits.shared_bytes
