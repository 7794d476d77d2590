"""Who has which part of a forward: the layout of ranks, and each one's images, tokens and heads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tacod.shares import EQUAL, Shares, apportion, in_lowest_terms

__all__ = ["Layout", "Shape", "fastest_alone", "layouts", "tokens_of"]


@dataclass(frozen=True)
class Layout:
    """A number of groups along the batch, each with ``ulysses`` × ``ring`` ranks that share a sequence."""

    batch: int
    ulysses: int
    ring: int
    shares: tuple[int, ...] = ()
    """How much each of all ranks takes, 0 if it is left idle; empty if the first ranks take the same."""

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    @property
    def ranks(self) -> int:
        """Ranks that have something to do."""
        return self.batch * self.sequence

    @functools.cached_property
    def members(self) -> tuple[int, ...]:
        """The ranks that have something to do, in the order of their seats: group by group, run by run."""
        if not self.shares:
            return tuple(range(self.ranks))
        return tuple(rank for rank, share in enumerate(self.shares) if share)

    def group_shares(self, group: int) -> tuple[int, ...]:
        """The shares of the ranks of one batch group, in the order of their seats."""
        members = self.members[group * self.sequence : (group + 1) * self.sequence]
        return tuple(self.shares[rank] if self.shares else 1 for rank in members)

    def head_shares(self, group: int) -> tuple[int, ...]:
        """The shares of heads of each place in a Ulysses run: those of all ranks that a ring joins there."""
        shares = self.group_shares(group)
        return tuple(sum(shares[place :: self.ulysses]) for place in range(self.ulysses))

    def images(self, batch: int) -> tuple[int, ...]:
        """How many of ``batch`` images each batch group takes: one at least, if there are as many."""
        shares = tuple(sum(self.group_shares(group)) for group in range(self.batch))
        return apportion(batch, shares, least=int(batch >= self.batch))

    def __str__(self) -> str:
        parts = [f"batch {self.batch}"] if self.batch > 1 else []
        if self.ring == 1 or self.ulysses == 1:
            kind = "ring" if self.ring > 1 else "ulysses"
            return " × ".join([*parts, f"sequence {self.sequence} ({kind})" if self.sequence > 1 else "sequence 1"])
        return " × ".join([*parts, f"sequence {self.sequence} (ulysses {self.ulysses} × ring {self.ring})"])


@dataclass(frozen=True)
class Shape:
    """What a forward looks like to the planner."""

    heads: int
    width: int
    batch: int = 1
    lengths: tuple[int, ...] = ()
    """Tokens of each stream (text, image); empty before there is a forward to plan."""


def tokens_of(lengths: Sequence[int], shares: tuple[int, ...]) -> list[int]:
    """How many tokens ranks with these shares hold, over all streams."""
    return [sum(part) for part in zip(*(apportion(length, shares) for length in lengths), strict=True)]


def layouts(world_size: int, batch: int, shares: tuple[int, ...], free: bool = False) -> Iterator[Layout]:
    """Every layout; of unequal ranks it has the fastest ones. With ``free`` they may also share equally."""
    by_pace = sorted(range(len(shares)), key=lambda rank: -shares[rank])
    for groups in range(1, min(batch, world_size) + 1):
        for ulysses in range(1, world_size // groups + 1):
            for ring in range(1, world_size // groups // ulysses + 1):
                layout = Layout(groups, ulysses, ring)
                busy = set(by_pace[: layout.ranks])
                mine = [share if rank in busy else 0 for rank, share in enumerate(shares)]
                even = [min(share, 1) for share in mine]
                first = (1,) * layout.ranks + (0,) * (world_size - layout.ranks)
                for each in dict.fromkeys(map(in_lowest_terms, (mine, even) if free else (mine,))):
                    yield replace(layout, shares=each if each != first else ())


def fastest_alone(shares: Shares = EQUAL) -> Layout:
    """The layout in which the fastest rank, or the first one of several, computes everything."""
    return next(layouts(len(shares.each) or 1, 1, shares.each))
