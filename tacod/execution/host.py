"""What belongs to the host, and not to one group of ranks: clients' tensors, kept steps, and clients' memories."""

from __future__ import annotations

from tacod.config import Config
from tacod.execution.kept_steps import KeptSteps
from tacod.execution.memories import Memories
from tacod.execution.store import Store

__all__ = ["Host"]


class Host:
    """Holds each tensor once, whichever group gets the jobs that name it."""

    def __init__(self, config: Config) -> None:
        self.store = Store(config.limits.store_bytes)
        self.kept = KeptSteps(self.store)
        self.memories = Memories(config.shared_bytes)

    def apply_config(self, config: Config) -> None:
        """Apply other limits."""
        self.store.limit = config.limits.store_bytes
        self.memories.limit = config.shared_bytes
