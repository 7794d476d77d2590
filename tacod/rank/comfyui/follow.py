"""Follows a long forward of a network that calls its blocks itself: how many are done, and a stop before the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tacod.rank.families.trunk import BlockWatch

__all__ = ["count_blocks", "followed"]


@dataclass
class _Count:
    blocks: int
    watch: BlockWatch
    begun: int = 0


_now: list[_Count] = []
"""The forward that runs, if it is watched."""


def count_blocks(blocks: Sequence[nn.Module]) -> None:
    """Have each of a network's blocks be counted as it begins, in those of its copies too."""

    # A plain function, so that copies share it.
    def before(module: nn.Module, args: Any) -> None:
        # A network may run a block twice, and then nothing is said of the last ones.
        if _now and _now[-1].begun < _now[-1].blocks:
            _now[-1].begun += 1
            _now[-1].watch.before(_now[-1].begun - 1, _now[-1].blocks)

    for block in blocks:
        block.register_forward_pre_hook(before)


@contextmanager
def followed(blocks: int, watch: BlockWatch | None) -> Iterator[None]:
    """A context in which a network of so many blocks runs once, and ``watch`` hears of each, if there is one."""
    if watch is None:
        yield
        return
    _now.append(_Count(blocks, watch))
    try:
        yield
    finally:
        _now.pop()
