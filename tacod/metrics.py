"""Counts and times of what the daemon did, for ``tacoctl stats``."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

__all__ = ["Metrics", "StepTimes"]


@dataclass(frozen=True)
class StepTimes:
    """Where the seconds of one step went; they add up to the step."""

    queue_s: float
    """Waiting for a turn."""
    wire_s: float
    """Between supervisor and ranks: sending, receiving, waiting for the slowest."""
    compute_s: float
    """In the model, on rank 0."""
    collective_s: float
    """In exchanges between ranks, on rank 0."""

    @property
    def total_s(self) -> float:
        """From the step's readiness to its end."""
        return self.queue_s + self.wire_s + self.compute_s + self.collective_s


class Metrics:
    """Totals since the daemon's start, and the times of the last `WINDOW` steps."""

    WINDOW = 1024

    def __init__(self) -> None:
        self.forwards_total = 0
        self.parallel_forwards_total = 0
        self.retried_forwards = 0
        self.jobs_total: Counter[str] = Counter(result=0, failed=0, cancelled=0)
        self.rx_bytes = 0
        self._steps: deque[StepTimes] = deque(maxlen=self.WINDOW)
        self._steps_total = 0

    def add_step(self, times: StepTimes, forwards: int, ranks: int) -> None:
        """One step of a forward or sampling job is done, with so many forwards in it."""
        self._steps.append(times)
        self._steps_total += 1
        self.forwards_total += forwards
        if ranks > 1:
            self.parallel_forwards_total += forwards

    def to_wire(self) -> dict[str, Any]:
        """The stats; seconds are means over the last `WINDOW` steps, percentiles likewise."""
        totals = sorted(step.total_s for step in self._steps)
        return {
            "forwards_total": self.forwards_total,
            "parallel_forwards_total": self.parallel_forwards_total,
            "jobs_total": dict(self.jobs_total),
            "step_s": {
                "mean": _mean(totals),
                "p50": _percentile(totals, 0.50),
                "p95": _percentile(totals, 0.95),
                "count": self._steps_total,
            },
            "queue_s": _mean([step.queue_s for step in self._steps]),
            "wire_s": _mean([step.wire_s for step in self._steps]),
            "compute_s": _mean([step.compute_s for step in self._steps]),
            "collective_s": _mean([step.collective_s for step in self._steps]),
            "rx_bytes": self.rx_bytes,
            "retried_forwards": self.retried_forwards,
        }


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _percentile(ordered: list[float], share: float) -> float:
    """The nearest-rank percentile of sorted values; 0 of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
