"""What a client's calls of one model came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ModelStats"]


@dataclass
class ModelStats:
    """What this client's calls of one model added up to; the parts of a step sum to `seconds`."""

    forwards: int = 0
    samples: int = 0
    steps: int = 0
    parallel_steps: int = 0
    retries: int = 0
    seconds: float = 0.0
    """Wall time in this client's calls."""
    queue_s: float = 0.0
    wire_s: float = 0.0
    """All that is neither waiting for a turn nor computing: both sockets, copies, the daemon."""
    compute_s: float = 0.0
    collective_s: float = 0.0
    ranks: int = 0
    plan: str = ""

    def add(self, answer: Mapping[str, Any], elapsed_s: float) -> None:
        """Count one answered call."""
        timing = answer["timing"]
        self.steps += answer["steps"]
        self.parallel_steps += answer["steps"] if answer["ranks"] > 1 else 0
        self.retries += answer["attempts"] - 1
        self.seconds += elapsed_s
        self.queue_s += timing["queue_s"]
        self.compute_s += timing["compute_s"]
        self.collective_s += timing["collective_s"]
        self.wire_s += max(0.0, elapsed_s - timing["queue_s"] - timing["compute_s"] - timing["collective_s"])
        self.ranks, self.plan = answer["ranks"], answer["plan"]
