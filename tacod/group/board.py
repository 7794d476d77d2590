"""What the supervisor and its ranks share at the beginning of their arena: how far a forward is, its stop, its end.

A rank writes how many blocks it has done; the supervisor reads that. The supervisor asks for a stop; rank 0 decides
at which block, and every rank stops there. No rank begins a block before rank 0 has decided about it, so that all stop
before the same one, whatever their pace. Each number is written by one process, and whole.

Rank 0 notes here that it has completed a command before it tells the client. The supervisor reads that when ranks are
lost: what is completed isn't done again.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["BOARD_BYTES", "LAST_BLOCK", "REPORT_BYTES", "Blocks", "Board"]

BOARD_BYTES = 20 << 10
REPORT_BYTES = 4 << 10
"""The longest report of a completed command, which lies at the board's end."""
_STOP, _DECISION, _COMPLETED, _RANKS = 0, 8, 16, 64
"""Places of the numbers of 8 bytes. What different processes write lies in different cache lines."""
_EACH = 8
_ENVELOPE, _FORWARD, _DONE, _TOTAL, _REACHED = range(5)
_NUMBER, _AT, _SIZE = range(3)
"""Of a completed command: its number, when it was completed, and the size of its report."""
_BLOCK_BITS, _FORWARD_BITS = 16, 16
LAST_BLOCK = (1 << _BLOCK_BITS) - 1
"""Stands for the end of a forward, behind all of its blocks."""


@dataclass(frozen=True, order=True)
class Blocks:
    """How far a rank is within a command."""

    forward: int
    """Counts the command's forwards from 0."""
    done: int
    total: int
    """Blocks of this forward."""


def _position(envelope: int, forward: int, block: int) -> int:
    """A number that rises in the order in which a rank comes to blocks."""
    place = (forward % (1 << _FORWARD_BITS)) << _BLOCK_BITS | min(block, LAST_BLOCK)
    return envelope << (_FORWARD_BITS + _BLOCK_BITS) | place


class Board:
    """The numbers as one process sees them; ``fd`` is the arena's."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size < BOARD_BYTES:
            os.ftruncate(fd, BOARD_BYTES)
        self._memory = mmap.mmap(fd, BOARD_BYTES)
        self._numbers = memoryview(self._memory).cast("q")

    def close(self) -> None:
        """Unmap it."""
        self._numbers.release()
        self._memory.close()

    # --- copies on several hosts ------------------------------------------------------------------------------------

    def copy(self, ranks: int) -> bytes:
        """All numbers of so many ranks, for `take` on another host."""
        return bytes(self._memory[: 8 * (_RANKS + _EACH * ranks)])

    def take(self, copy: bytes, ranks: Iterable[int], stop: bool = False, decision: bool = False) -> None:
        """Take the numbers of these ranks from a `copy`, and the supervisor's stop or rank 0's decision if asked to."""
        numbers = memoryview(copy).cast("q")
        for rank in ranks:
            at = _RANKS + _EACH * rank
            # In the order in which `tell` writes them.
            for each in (_FORWARD, _DONE, _TOTAL, _ENVELOPE, _REACHED):
                self._numbers[at + each] = numbers[at + each]
        for place, wanted in ((_STOP, stop), (_DECISION, decision)):
            if wanted:
                self._numbers[place] = numbers[place]

    # --- the supervisor ---------------------------------------------------------------------------------------------

    @property
    def asked_to_stop(self) -> int:
        """The last command whose stop was asked for."""
        return self._numbers[_STOP]

    def ask_to_stop(self, envelope: int) -> None:
        """Have the ranks stop this command's forward at a block, if they are not past its last one."""
        self._numbers[_STOP] = envelope

    def blocks(self, rank: int, envelope: int) -> Blocks | None:
        """How far a rank is with this command; None if it has not begun a forward that is watched."""
        at = _RANKS + _EACH * rank
        if self._numbers[at + _ENVELOPE] != envelope:
            return None
        return Blocks(*(self._numbers[at + each] for each in (_FORWARD, _DONE, _TOTAL)))

    def completed_s(self, envelope: int) -> float | None:
        """When rank 0 completed this command, on the monotonic clock; None if it hasn't."""
        if self._numbers[_COMPLETED + _NUMBER] != envelope:
            return None
        return self._numbers[_COMPLETED + _AT] / 1e9

    @property
    def report(self) -> bytes:
        """Rank 0's report of the command that it completed last."""
        return self._memory[BOARD_BYTES - REPORT_BYTES :][: self._numbers[_COMPLETED + _SIZE]]

    # --- a rank -----------------------------------------------------------------------------------------------------

    def tell(self, rank: int, envelope: int, blocks: Blocks) -> None:
        """Note how far this rank is."""
        at = _RANKS + _EACH * rank
        self._numbers[at + _FORWARD] = blocks.forward
        self._numbers[at + _DONE] = blocks.done
        self._numbers[at + _TOTAL] = blocks.total
        self._numbers[at + _ENVELOPE] = envelope

    def note_report(self, report: bytes) -> None:
        """As rank 0, put down the report of a command that is about to be completed, of `REPORT_BYTES` at most."""
        start = BOARD_BYTES - REPORT_BYTES
        self._memory[start : start + len(report)] = report
        self._numbers[_COMPLETED + _SIZE] = len(report)

    def complete(self, envelope: int) -> None:
        """Note, as rank 0, that this command is completed: its result is there, and its report was noted."""
        self._numbers[_COMPLETED + _AT] = time.monotonic_ns()
        self._numbers[_COMPLETED + _NUMBER] = envelope

    def reach(self, rank: int, envelope: int, forward: int, block: int) -> None:
        """Note which block this rank has come to."""
        self._numbers[_RANKS + _EACH * rank + _REACHED] = _position(envelope, forward, block)

    def others_reached(self, world_size: int, envelope: int, forward: int) -> int:
        """The least block of a forward to which the ranks other than 0 have come; -1 if one has not begun it."""
        first = _position(envelope, forward, 0)
        reached = (self._numbers[_RANKS + _EACH * rank + _REACHED] for rank in range(1, world_size))
        return max(min(reached, default=first + LAST_BLOCK) - first, -1)

    def is_asked_to_stop(self, envelope: int) -> bool:
        """Whether the supervisor has asked for a stop of this command's forward."""
        return self._numbers[_STOP] == envelope

    def decide(self, envelope: int, forward: int, block: int) -> bool:
        """Decide, as rank 0, whether ranks begin this block. Returns false if they stop here."""
        stop = self.is_asked_to_stop(envelope)
        self._numbers[_DECISION] = _position(envelope, forward, block) << 1 | stop
        return not stop

    def decided(self, envelope: int, forward: int, block: int) -> bool | None:
        """Whether this rank begins this block: false if all stop, None while rank 0 has not decided about it."""
        decision, mine = self._numbers[_DECISION], _position(envelope, forward, block)
        place, stop = decision >> 1, decision & 1
        if stop and place <= mine and place >= _position(envelope, 0, 0):
            return False
        return True if place >= mine else None
