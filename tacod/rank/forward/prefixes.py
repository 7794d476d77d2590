"""Prefixes that a rank keeps: what doesn't change from step to step, such as a text's keys and values.

`DiT.prefix` computes one. It depends on the model, the conditioning, the plan and the latents' shape, and on nothing
else, so a forward gives the same bits whether it finds its prefix here or not.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tacod.rank.families.base import DiT

__all__ = ["Prefix", "Prefixes"]


@dataclass(frozen=True, eq=False)
class Prefix:
    """What `DiT.prefix` has given."""

    tensors: Sequence[Tensor]
    most_bytes: int
    """Bytes on the rank that has the most of it, as all ranks know it."""

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(each.nbytes for each in self.tensors)


class Prefixes:
    """The prefixes of one rank, the least recently used out first.

    Every rank makes the same calls in the same order and counts `Prefix.most_bytes`, so all keep the same ones.
    """

    def __init__(self, limit: int) -> None:
        """``limit`` is for the bytes of all of them; a larger prefix is not kept."""
        self.limit = limit
        self.hits = 0
        self.misses = 0
        """How many forwards found their prefix here, and for how many it was computed."""
        self._prefixes: OrderedDict[tuple[weakref.ref[DiT], Hashable], Prefix] = OrderedDict()

    def find(self, dit: DiT, key: Hashable) -> Prefix | None:
        """The prefix of forwards of ``dit`` with this key; None if it must be computed."""
        known = self._prefixes.get((weakref.ref(dit), key))
        if known is None:
            self.misses += 1
            return None
        self.hits += 1
        self._prefixes.move_to_end((weakref.ref(dit), key))
        return known

    def keep(self, dit: DiT, key: Hashable, prefix: Prefix) -> None:
        """Keep what `find` didn't find; others make room for it."""
        if prefix.most_bytes > self.limit:
            return
        self._prefixes[weakref.ref(dit), key] = prefix
        while sum(each.most_bytes for each in self._prefixes.values()) > self.limit:
            self._prefixes.popitem(last=False)

    def drop(self, dit: DiT) -> None:
        """Forget a model's prefixes: it leaves the rank."""
        for key in [key for key in self._prefixes if key[0]() is dit]:
            del self._prefixes[key]

    def clear(self) -> None:
        """Forget all prefixes."""
        self._prefixes.clear()

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(each.nbytes for each in self._prefixes.values())

    def __len__(self) -> int:
        """How many prefixes are kept."""
        return len(self._prefixes)
