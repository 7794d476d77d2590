"""The step cache: if two neighbouring steps of a run begin alike, the second skips most of its blocks.

Every forward runs its first block. If that block adds almost the same to the image's tokens as at the last computed
step of the run, the other blocks' additions are taken from that step. This is the first-block cache of ParaAttention
(Cheng, 2024), related to TeaCache (Liu et al., 2024, arXiv:2411.19108). Skipping makes an error in the result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["MOST_IN_A_ROW", "RUNS", "StepCache", "StepCaches"]

MOST_IN_A_ROW = 4
"""After this many skipped forwards in a row, one is computed in any case."""
RUNS = 4
"""Runs of each model that are kept; the least recently used one is dropped first."""


class StepCache:
    """What one rank keeps of a run's last computed step: two tensors of the size of its image tokens."""

    def __init__(self, threshold: float, level: float) -> None:
        """``threshold`` is the relative change of the first block's residual below which the others are skipped."""
        self.threshold = threshold
        self.level = level
        """The last forward's timestep."""
        self.skipped = False
        """Whether the last forward was skipped but for its first block."""
        self._in_a_row = 0
        self._first: Tensor | None = None
        self._others: Tensor | None = None

    def find(self, first: Tensor, sequence: SequenceParallel) -> Tensor | None:
        """See `BlockCache.find`."""
        self.skipped = self._is_like_the_last(first, sequence)
        if self.skipped:
            self._in_a_row += 1
            return self._others
        self._first, self._others, self._in_a_row = first, None, 0
        return None

    def keep(self, others: Tensor) -> None:
        """See `BlockCache.keep`."""
        self._others = others

    def _is_like_the_last(self, first: Tensor, sequence: SequenceParallel) -> bool:
        # All that this looks at but the tensors' values is alike on all ranks, so that they exchange or don't.
        if self._first is None or self._others is None or self._in_a_row == MOST_IN_A_ROW:
            return False
        sums = [each.abs().sum(dtype=torch.float32) for each in (first - self._first, self._first)]
        # Gathered and then added up in one order, so that every rank compares the same numbers.
        everyones = sequence.whole.gather(torch.stack(sums), [2] * sequence.size, dim=0)
        change, size = everyones.view(-1, 2).sum(0).tolist()
        return bool(change < self.threshold * size)


RunKey = tuple[Hashable, ...]
"""Identifies a run: first its session or job, then what all of its steps have in common."""


class StepCaches:
    """The step caches of one rank. Every rank makes the same calls in the same order, so all keep the same runs."""

    def __init__(self) -> None:
        self._runs: WeakKeyDictionary[nn.Module, OrderedDict[RunKey, StepCache]] = WeakKeyDictionary()

    def find(self, model: nn.Module, run: RunKey, threshold: float, level: float) -> StepCache:
        """The cache of a run of ``model`` at the timestep ``level``; if noise rises, a new run begins."""
        runs = self._runs.setdefault(model, OrderedDict())
        cache = runs.pop(run, None)
        if cache is None or not level <= cache.level:
            cache = StepCache(threshold, level)
        cache.level = level
        runs[run] = cache
        while len(runs) > RUNS:
            runs.popitem(last=False)
        return cache

    def drop(self, *first: Hashable) -> None:
        """Forget the runs whose keys begin with these elements."""
        for runs in self._runs.values():
            for run in [run for run in runs if run[: len(first)] == first]:
                del runs[run]

    def take(self, model: nn.Module, first: Hashable) -> dict[RunKey, StepCache]:
        """Remove and return the caches of those runs of ``model`` whose keys begin with ``first``."""
        runs = self._runs.get(model, OrderedDict[RunKey, StepCache]())
        return {run: runs.pop(run) for run in list(runs) if run[0] == first}

    def put(self, model: nn.Module, taken: dict[RunKey, StepCache]) -> None:
        """Restore caches that were taken, for the same model, loaded again."""
        self._runs.setdefault(model, OrderedDict()).update(taken)

    def clear(self) -> None:
        """Forget all runs."""
        self._runs.clear()

    def __len__(self) -> int:
        """How many runs are kept."""
        return sum(map(len, self._runs.values()))
