"""The time that a rank spends in exchanges."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Clock"]


class Clock:
    """How long this rank was in collectives: wall time on a CPU; on a GPU the device's own, which it adds up itself.

    Of a transfer that goes on while the rank computes, only what it still waits for counts.
    """

    def __init__(self) -> None:
        self.begun = 0
        """Exchanges of any kind that this rank has begun; ranks that have begun the same ones wait for nothing."""
        self._seconds = 0.0
        self._counter: Tensor | None = None
        self._seen: Tensor | None = None
        """What it showed when the host last waited for the GPU."""
        self._counted = 0

    @property
    def counter(self) -> Tensor:
        """The nanoseconds on the current GPU, int64 [1]: kernels add to it, those of a graph at each replay."""
        if self._counter is None:
            self._counter = torch.zeros(1, dtype=torch.int64, device="cuda")
        return self._counter

    @contextmanager
    def counting(self, on_gpu: bool) -> Iterator[None]:
        """Within, a collective or the wait for one."""
        if not on_gpu:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        self._mark(-1)
        try:
            yield
        finally:
            # One mark alone would count for ages.
            self._mark(1)

    def _mark(self, sign: int) -> None:
        from tacod.rank.ops import kernels

        kernels.count_time(self.counter, sign)

    def wait(self) -> None:
        """Until the current GPU is done with what this stream was given; `take_s` counts up to here."""
        if self._counter is not None:
            if self._seen is None:
                self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=True)
            self._seen.copy_(self._counter, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        if self._seen is not None:
            before, self._counted = self._counted, int(self._seen)
            self._seconds += (self._counted - before) / 1e9

    def take_s(self) -> float:
        """Seconds since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken
