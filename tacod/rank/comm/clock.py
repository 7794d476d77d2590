"""The time that a rank spends in exchanges."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Clock"]


class Clock:
    """How long this rank was in exchanges: wall time on a CPU, the device's own time on a GPU.

    If a rank computes during a transfer, only the time that it still waits counts.
    """

    def __init__(self) -> None:
        self.begun = 0
        """How many exchanges this rank has begun. Ranks with equal numbers don't wait for each other."""
        self._seconds = 0.0
        self._counter: Tensor | None = None
        self._seen: Tensor | None = None
        """The counter's value when the host last waited for the GPU."""
        self._counted = 0

    @property
    def counter(self) -> Tensor:
        """The nanoseconds on the current GPU, int64 [1]. Kernels add to it, also at each replay of a graph."""
        if self._counter is None:
            self._counter = torch.zeros(1, dtype=torch.int64, device="cuda")
        return self._counter

    @contextmanager
    def counting(self, on_gpu: bool) -> Iterator[None]:
        """A context for a collective, or for the wait for one."""
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
        """Wait until the current GPU has finished this stream's work; `take_s` counts up to here."""
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
