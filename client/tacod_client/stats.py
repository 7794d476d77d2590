"""The statistics of a client's calls of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "ModelStats"]

DAEMONS = ("queue", "wire", "compute", "collective")
"""The parts of a call's time that the daemon tells."""
PARTS = (*DAEMONS, "client")
"""All of them."""


@dataclass(frozen=True)
class Call:
    """One answered call: seconds of wall time, and its five parts."""

    seconds: float
    queue_s: float
    wire_s: float
    compute_s: float
    collective_s: float
    steps: int
    attempts: int
    ranks: int
    plan: str
    single_rank_s: float | None
    """Seconds of the same work on one rank, if the daemon knows."""
    skipped: int = 0
    """Forwards that the step cache mostly skipped."""
    client_s: float = 0.0


@dataclass
class ModelStats:
    """Sums over this client's calls of one model; the parts add up to `seconds`."""

    forwards: int = 0
    samples: int = 0
    steps: int = 0
    parallel_steps: int = 0
    skipped: int = 0
    retries: int = 0
    seconds: float = 0.0
    """Wall time in this client's calls."""
    queue_s: float = 0.0
    wire_s: float = 0.0
    """Seconds between the daemon and its ranks, there and back."""
    compute_s: float = 0.0
    collective_s: float = 0.0
    client_s: float = 0.0
    """The rest: this client, its socket, and what the daemon does before it queues a job and after its end."""
    ranks: int = 0
    plan: str = ""
    last: Call | None = None

    def add_untold(self, elapsed_s: float) -> None:
        """Count a forward whose result came, while the daemon ended before it told the split of the time.

        All of it counts as `client_s`, and the forward as one like the last.
        """
        timing = {f"{part}_s": 0.0 for part in DAEMONS}
        self.add({"timing": timing, "steps": 1, "attempts": 1, "ranks": self.ranks, "plan": self.plan}, elapsed_s)

    def add(self, answer: Mapping[str, Any], elapsed_s: float) -> None:
        """Count one answered call."""
        timing = answer["timing"]
        call = Call(
            seconds=elapsed_s,
            queue_s=timing["queue_s"],
            wire_s=timing["wire_s"],
            compute_s=timing["compute_s"],
            collective_s=timing["collective_s"],
            steps=answer["steps"],
            attempts=answer["attempts"],
            ranks=answer["ranks"],
            plan=answer["plan"],
            single_rank_s=answer.get("single_rank_s"),
            skipped=answer.get("skipped", 0),
            client_s=max(0.0, elapsed_s - sum(timing[f"{part}_s"] for part in DAEMONS)),
        )
        self.steps += call.steps
        self.parallel_steps += call.steps if call.ranks > 1 else 0
        self.skipped += call.skipped
        self.retries += call.attempts - 1
        self.seconds += call.seconds
        self.queue_s += call.queue_s
        self.wire_s += call.wire_s
        self.compute_s += call.compute_s
        self.collective_s += call.collective_s
        self.client_s += call.client_s
        self.ranks, self.plan, self.last = call.ranks, call.plan, call
