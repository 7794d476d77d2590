"""A long forward, watched: how many blocks are done, and a stop before the same block on all ranks.

The supervisor says with a command whether its forwards are watched (`Envelope.watched`), so all ranks do the same.
Then a rank writes to the `Board` before each block, and waits until rank 0 has decided whether that block begins. On a
GPU the host also waits until the block before the last one is done, as it would otherwise launch all blocks at once,
and none could be stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from tacod.group.board import LAST_BLOCK, Blocks, Board
from tacod_client.errors import Cancelled

__all__ = ["Watch"]

AHEAD = 2
"""Blocks that a GPU has to do, at least, while the host waits: one that runs, and one behind it."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 20e-6, 1e-3
"""How long one look for rank 0's decision and the next are apart."""


class Watch:
    """One rank's part in the forwards of one command."""

    def __init__(
        self,
        board: Board,
        envelope: int,
        rank: int,
        world_size: int,
        on_gpu: bool,
        before_block: Callable[[int], None] = lambda block: None,
    ) -> None:
        """``before_block`` hears the number of each block before it begins."""
        self.board = board
        self.envelope = envelope
        self.rank = rank
        self.world_size = world_size
        self._on_gpu = on_gpu
        self._before_block = before_block
        self._forward = -1
        self._decided = 0
        """Of rank 0: the last block of this forward that it has decided about."""
        self._events: deque[Any] = deque()

    def begin(self) -> None:
        """A further forward of the command begins."""
        self._forward += 1
        self._decided = 0
        self._events.clear()

    def before(self, block: int, blocks: int) -> None:
        """Called before each of a forward's ``blocks``. Raises `Cancelled` on all ranks if they stop here."""
        done = self._done(block) if self._on_gpu else block
        self.board.tell(self.rank, self.envelope, Blocks(self._forward, done, blocks))
        self._before_block(block)
        # About the first one nothing is decided: a forward that has just begun is let begin.
        if block:
            self._agree(block, f"block {block} of {blocks}")
        else:
            self.board.reach(self.rank, self.envelope, self._forward, 0)

    def end(self) -> None:
        """Called behind the last block, or where a step cache skips the others, and by ranks that compute nothing."""
        self._agree(LAST_BLOCK, "its end")

    def _agree(self, block: int, where: str) -> None:
        place = self.envelope, self._forward, block
        self.board.reach(self.rank, *place)
        wait_s = SHORTEST_WAIT_S
        while (goes_on := self._decide(block) if self.rank == 0 else self.board.decided(*place)) is None:
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        if not goes_on:
            raise Cancelled(f"the forward was stopped before {where}")

    def _decide(self, block: int) -> bool | None:
        """As rank 0, decide about a block: true if it begins, false if all stop, None to be asked again.

        Batch groups exchange nothing until their end, so one may be far behind. Rank 0 stays near the last rank, and at
        its own end decides about the blocks that others still have, so that a stop finds nobody far behind.
        """
        board, forward = self.board, (self.envelope, self._forward)
        others = board.others_reached(self.world_size, *forward)
        if block == LAST_BLOCK and others < LAST_BLOCK:
            stop = board.is_asked_to_stop(self.envelope)
            if not stop and others < self._decided:
                return None
            self._decided += 1
            return None if board.decide(*forward, self._decided) else False
        if others < block - 1 and block < LAST_BLOCK:
            return None
        self._decided = block
        return board.decide(*forward, block)

    def _done(self, block: int) -> int:
        """How many blocks the GPU has done; waits until it is not far behind.

        From the second one on, however short they seem: a host launches dozens within a tenth of a second.
        """
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((block, event))
        if len(self._events) < AHEAD:
            return 0
        if len(self._events) > AHEAD:
            self._events.popleft()
        done, oldest = self._events[0]
        oldest.synchronize()
        return int(done)
