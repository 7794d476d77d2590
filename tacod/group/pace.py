"""The time limit of a long forward's next block, by how long the ones before it took."""

from __future__ import annotations

from tacod.group.board import Blocks

__all__ = ["LEAST_PATIENCE_S", "Pace"]

PATIENCE = 20.0
"""A block counts as stuck after so many times the longest time of earlier ones."""
LEAST_PATIENCE_S = 30.0
"""A block has at least this long, or `group.step_timeout_s` if that is less."""


class Pace:
    """How a watched forward has advanced, as the supervisor saw it."""

    def __init__(self) -> None:
        self.blocks: Blocks | None = None
        """How far the slowest rank was at the last look."""
        self.advanced_s = 0.0
        """When it came there."""
        self.longest_s = 0.0
        """The longest time between two such moments within one forward."""

    def follow(self, blocks: Blocks | None, now: float, step_timeout_s: float) -> float | None:
        """If it has advanced, the moment until which the next block has time; else None."""
        if blocks is None or blocks == self.blocks:
            return None
        if self.blocks is not None and self.blocks.forward == blocks.forward:
            self.longest_s = max(self.longest_s, now - self.advanced_s)
        self.blocks, self.advanced_s = blocks, now
        if not self.longest_s:
            return now + step_timeout_s
        return now + max(min(LEAST_PATIENCE_S, step_timeout_s), PATIENCE * self.longest_s)
