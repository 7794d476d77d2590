"""Who takes how much of a forward: ranks of unequal speed take unequal shares of its tokens, heads and images.

Shares are whole numbers, one for each rank, so every rank divides alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["ALIKE", "EQUAL", "MOST", "Shares", "apportion", "in_lowest_terms", "measured_shares"]

ALIKE = 0.1
"""Ranks whose times differ by less than this part are as fast as each other: cards of one kind differ by 2 to 3 %."""
JITTER_S = 2e-3
"""And those whose times differ by less than this: a forward so short is measured no better."""
STEPS = 20
"""The share of the slowest rank, so that a measured pace is a multiple of a twentieth of the slowest one's."""
MOST = 1000
"""The largest share that can be asked for."""


@functools.lru_cache(maxsize=4096)
def apportion(n: int, shares: tuple[int, ...], least: int = 0) -> tuple[int, ...]:
    """Divide ``n`` so that the largest part, measured by its share, is as small as it can be.

    This is Jefferson's method of apportionment, also called D'Hondt's (Balinski and Young, Fair Representation, 1982):
    parts are at least the whole numbers below their quotas, and what is left goes one by one to the rank that would
    then be the soonest done, the first of several. The slowest rank decides how long a forward takes, so that is the
    fastest division. Equal shares give n // parts each, and one more to the first n % parts.

    Args:
        n: What there is to divide.
        shares: Of each part, above 0.
        least: The least that a part is given; ``n`` is at least as much for all together.
    """
    held: frozenset[int] = frozenset()
    while True:
        # Those whose quota is below the least get that; the others divide the rest, by whole numbers at first.
        rest = n - least * len(held)
        total = sum(share for part, share in enumerate(shares) if part not in held)
        parts = [least if part in held else rest * share // total for part, share in enumerate(shares)]
        below = frozenset(part for part, size in enumerate(parts) if size < least)
        if not below:
            break
        held |= below
    for _ in range(n - sum(parts)):
        first = min(range(len(parts)), key=lambda part: Fraction(parts[part] + 1, shares[part]))
        parts[first] += 1
    return tuple(parts)


def in_lowest_terms(shares: Sequence[int]) -> tuple[int, ...]:
    """The same shares in the smallest whole numbers."""
    divisor = math.gcd(*shares) or 1
    return tuple(share // divisor for share in shares)


@dataclass(frozen=True)
class Shares:
    """How much of a forward each rank takes, and why."""

    each: tuple[int, ...] = ()
    """Of each rank, in the lowest terms; empty if all take the same."""
    measured: bool = False
    """Whether they are paces that were measured, or what the configuration asks for."""

    @classmethod
    def of(cls, each: Sequence[int], measured: bool = False) -> Shares:
        """Shares from any whole numbers above 0."""
        return cls(in_lowest_terms(each) if len(set(each)) > 1 else (), measured)

    def __str__(self) -> str:
        """For example ``rank 0 is 1.6 times as fast``; empty for equal shares."""
        if not self.each:
            return ""
        slowest = min(self.each)
        by_share: dict[int, list[int]] = {}
        for rank, share in enumerate(self.each):
            if share > slowest:
                by_share.setdefault(share, []).append(rank)
        said = []
        for share, ranks in by_share.items():
            who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {' and '.join(map(str, ranks))}"
            times = f"{share / slowest:.2f}".rstrip("0").rstrip(".")
            verb = ("is" if len(ranks) == 1 else "are") if self.measured else ("takes" if len(ranks) == 1 else "take")
            said.append(f"{who} {verb} {times} times as {'fast' if self.measured else 'much'}")
        return ", ".join(said)


EQUAL = Shares()


def measured_shares(seconds: Sequence[float]) -> Shares:
    """The ranks' paces, for how long each of them took for the same work.

    Ranks within `ALIKE`, or within `JITTER_S`, of the fastest one of them have one pace, the mean of theirs: cards of
    one kind stay equal.
    """
    kinds: list[list[float]] = []
    for took in sorted(seconds):
        if not kinds or took > max(kinds[-1][0] * (1 + ALIKE), kinds[-1][0] + JITTER_S):
            kinds.append([])
        kinds[-1].append(took)
    means = {took: sum(kind) / len(kind) for kind in kinds for took in kind}
    slowest = max(means.values())
    return Shares.of([round(STEPS * slowest / means[took]) for took in seconds], measured=True)
