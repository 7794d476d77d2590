"""When to start the ranks again, and when to give up: three numbers and a clock."""

from __future__ import annotations

from collections import deque

__all__ = ["RestartPolicy"]


class RestartPolicy:
    """At most ``limit`` restarts within ``window_s``.

    Each waits twice as long as the one before, at most ``longest_s``.
    """

    def __init__(self, limit: int, window_s: float, first_s: float = 0.1, longest_s: float = 10.0) -> None:
        self.limit = limit
        self.window_s = window_s
        self.first_s = first_s
        self.longest_s = longest_s
        self._starts: deque[tuple[float, str]] = deque()

    def next_start(self, now: float, job: str = "") -> float | None:
        """When the ranks may start again after they were lost at ``now``; None to give up.

        All losses under one ``job`` count as one, because the job may have caused them.
        """
        while self._starts and now - self._starts[0][0] > self.window_s:
            self._starts.popleft()
        self.forgive(job)
        if len(self._starts) >= self.limit:
            return None
        # The first restart is immediate: a rank that died once is no reason to keep its user waiting.
        delay = 0.0 if not self._starts else min(self.first_s * 2.0 ** min(len(self._starts) - 1, 64), self.longest_s)
        self._starts.append((now, job))
        return now + delay

    def forgive(self, job: str) -> None:
        """Don't count the losses under this job: it caused them."""
        if job:
            self._starts = deque(each for each in self._starts if each[1] != job)
