"""How one forward is spread over the ranks: a value that can explain itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tacod_client.errors import ArgumentError

__all__ = ["Plan", "check_request", "chunks", "make_plan"]


def chunks(n: int, parts: int) -> list[int]:
    """Split ``n`` into uneven chunks: n // parts each, and one more for the first n % parts."""
    return [n // parts + (part < n % parts) for part in range(parts)]


@dataclass(frozen=True)
class Plan:
    """Sequence parallelism over ``sequence`` of ``world_size`` ranks; 1 means that every rank computes all."""

    world_size: int
    sequence: int
    heads: int
    lengths: tuple[int, ...]
    """Tokens of each stream (text, image); empty before there is a forward to plan."""

    @property
    def tokens(self) -> list[int]:
        """The tokens that each rank of the sequence group holds, over all streams."""
        return [sum(part) for part in zip(*(chunks(length, self.sequence) for length in self.lengths), strict=True)]

    @property
    def reason(self) -> str:
        """What each rank gets, and why."""
        if self.sequence == 1:
            why = "one rank" if self.world_size == 1 else f"as asked; the other {self.world_size - 1} repeat the work"
            return f"{why}; {self.heads} heads"
        heads = chunks(self.heads, self.sequence)
        idle = f", {heads.count(0)} of them without a head to attend" if 0 in heads else ""
        tokens = f"; {sum(self.lengths)} tokens: {_each(self.tokens)}" if self.lengths else ""
        return f"ulysses; {self.heads} heads over {self.sequence} ranks: {_each(heads)}{idle}{tokens}"

    def __str__(self) -> str:
        """For example ``sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; 4608 tokens: 1536 each)``."""
        return f"sequence {self.sequence} ({self.reason})"


def _each(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} each" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))


def check_request(request: Any, world_size: int) -> int:
    """The sequence degree that a plan request comes to: ``"auto"`` or ``{"sequence": 1 or the world size}``.

    Raises `ArgumentError` for what can't be done.
    """
    if request == "auto":
        return world_size
    if isinstance(request, dict) and set(request) == {"sequence"} and type(request["sequence"]) is int:
        if request["sequence"] in (1, world_size):
            return int(request["sequence"])
        raise ArgumentError(
            f"plan: sequence {request['sequence']} on {world_size} ranks: this version uses all ranks or one; "
            f'ask for "auto", {{"sequence": {world_size}}} or {{"sequence": 1}}',
            argument="plan",
        )
    raise ArgumentError(f'plan: expected "auto" or {{"sequence": n}}, got {request!r:.80}', argument="plan")


def make_plan(request: Any, world_size: int, heads: int, lengths: Sequence[int]) -> Plan:
    """The plan for one forward.

    Raises `ArgumentError` for a request that can't be done.
    """
    return Plan(world_size, check_request(request, world_size), heads, tuple(lengths))
