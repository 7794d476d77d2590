"""Counts and times of what the daemon did; `tacoctl stats` and Prometheus both read them here."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from prometheus_client import Histogram

__all__ = ["Metrics", "StepTimes"]


@dataclass(frozen=True)
class StepTimes:
    """Where the seconds of one step went; they add up to the whole step."""

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


PARTS = tuple(part.name for part in fields(StepTimes))


COUNTS = (
    "forwards_total",
    "parallel_forwards_total",
    "skipped_forwards_total",
    "prefix_hits",
    "prefix_misses",
    "retried_forwards",
    "steps_total",
)
"""Counts that add up over groups."""


class Metrics:
    """Totals since the daemon's start, and the times of the last `WINDOW` steps."""

    WINDOW = 1024
    STEP_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
    LOAD_BOUNDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)

    def __init__(self) -> None:
        self.forwards_total = 0
        self.parallel_forwards_total = 0
        self.skipped_forwards_total = 0
        self.prefix_hits = 0
        self.prefix_misses = 0
        """Forwards that found their prefix computed, and those for which it was computed."""
        self.retried_forwards = 0
        self.jobs_total: Counter[str] = Counter(result=0, failed=0, cancelled=0)
        self.steps_total = 0
        self.steps = _histogram("tacod_step_seconds", "Seconds of a step, waiting included.", self.STEP_BOUNDS)
        """Seconds of every step."""
        self.loads = _histogram("tacod_load_seconds", "Seconds that loads took in the ranks.", self.LOAD_BOUNDS)
        """Seconds of every load that a rank group did, those after a restart too."""
        self.part_seconds = dict.fromkeys(PARTS, 0.0)
        """Seconds of all steps, by part."""
        self._recent: deque[StepTimes] = deque(maxlen=self.WINDOW)

    @classmethod
    def sum(cls, parts: Iterable[Metrics]) -> Metrics:
        """Those of several groups together, but for their histograms."""
        whole = cls()
        whole._recent = deque()
        for part in parts:
            for name in COUNTS:
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            whole.jobs_total.update(part.jobs_total)
            for name, seconds in part.part_seconds.items():
                whole.part_seconds[name] += seconds
            whole._recent.extend(part._recent)
        return whole

    def add_step(
        self,
        times: StepTimes,
        forwards: int,
        ranks: int,
        skipped: int = 0,
        prefix_hits: int = 0,
        prefix_misses: int = 0,
    ) -> None:
        """One step of a forward or sampling job is done, with so many forwards in it, some of them mostly skipped."""
        self._recent.append(times)
        self.steps_total += 1
        self.steps.observe(times.total_s)
        for part in PARTS:
            self.part_seconds[part] += getattr(times, part)
        self.forwards_total += forwards
        self.skipped_forwards_total += skipped
        self.prefix_hits += prefix_hits
        self.prefix_misses += prefix_misses
        if ranks > 1:
            self.parallel_forwards_total += forwards

    def totals(self) -> dict[str, Any]:
        """The statistics that only grow."""
        return {
            "forwards_total": self.forwards_total,
            "parallel_forwards_total": self.parallel_forwards_total,
            "skipped_forwards_total": self.skipped_forwards_total,
            "prefix": {"hits": self.prefix_hits, "misses": self.prefix_misses},
            "jobs_total": dict(self.jobs_total),
            "retried_forwards": self.retried_forwards,
        }

    def to_wire(self) -> dict[str, Any]:
        """The stats; seconds are means over the last `WINDOW` steps, percentiles likewise."""
        seconds = sorted(step.total_s for step in self._recent)
        return {
            **self.totals(),
            "step_s": {
                "mean": _mean(seconds),
                "p50": _percentile(seconds, 0.50),
                "p95": _percentile(seconds, 0.95),
                "count": self.steps_total,
            },
            **{part: _mean([getattr(step, part) for step in self._recent]) for part in PARTS},
        }


def _histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, buckets=bounds, registry=None)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _percentile(ordered: list[float], share: float) -> float:
    """The nearest-rank percentile of sorted values; 0 of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
