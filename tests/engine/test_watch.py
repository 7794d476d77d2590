"""Watched forwards of ranks that are threads: whatever their pace, they stop before the same block, or not at all."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tacod.group.arena import Arena
from tacod.group.board import LAST_BLOCK, Blocks, Board
from tacod.rank.forward.watch import Watch
from tacod_client.errors import Cancelled

RANKS = 4
BLOCKS = 9
Ended = tuple[int, int]
"""The forward and the block before which a rank has stopped; (forwards, 0) if it has not."""


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena()
    yield arena
    arena.close()


def rank(board: Board, envelope: int, index: int, forwards: int, skips: bool, idle: bool, seed: int) -> Ended:
    """One rank's forwards; it may skip all blocks but the first of the second forward, or have no part in any."""
    pace = random.Random(seed)
    mine = Watch(board, envelope, index, RANKS, on_gpu=False)
    for forward in range(forwards):
        block = 0
        try:
            mine.begin()
            for block in range(0 if idle else 1 if skips and forward == 1 else BLOCKS):
                mine.before(block, BLOCKS)
                time.sleep(pace.choice((0, 0, 0.001, 0.004)))
            block = LAST_BLOCK
            mine.end()
        except Cancelled:
            return forward, block
    return forwards, 0


def run(arena: Arena, envelope: int, stop_s: float | None, skips: set[int], idle: set[int], seed: int) -> list[Ended]:
    with ThreadPoolExecutor(RANKS) as pool:
        ended = [
            pool.submit(rank, arena.board, envelope, index, 3, index in skips, index in idle, 100 * seed + index)
            for index in range(RANKS)
        ]
        if stop_s is not None:
            time.sleep(stop_s)
            arena.board.ask_to_stop(envelope)
        return [each.result(20) for each in ended]


@pytest.mark.parametrize(
    ("skips", "idle"),
    [
        *((set(), set()), ({0}, set()), ({1, 2}, set()), ({0, 1, 2}, set()), (set(), {2, 3}), ({0}, {3})),
        # Of unequal ranks the first one may be the slowest.
        *((set(), {0}), ({1, 2}, {0, 3})),
    ],
)
def test_all_stop_at_one_block(arena: Arena, skips: set[int], idle: set[int]) -> None:
    """Those that skip blocks, or compute nothing, stop at the end of the same forward, before they meet the others."""
    stopped = 0
    for envelope in range(1, 13):
        ended = run(arena, envelope, random.Random(envelope).random() * 0.06, skips, idle, envelope)
        forwards = {forward for forward, _ in ended}
        assert len(forwards) == 1, ended
        blocks = {block for _, block in ended if block != LAST_BLOCK}
        assert len(blocks) <= 1, ended
        if forwards != {3}:
            stopped += 1
            at_their_end = {index for index, (_, block) in enumerate(ended) if block == LAST_BLOCK}
            if blocks:
                assert at_their_end <= (skips if forwards == {1} else set()) | idle, ended
    assert stopped > 3


def test_nobody_stops_unasked(arena: Arena) -> None:
    """Nor for the stop of an earlier command."""
    for envelope in range(1, 5):
        assert run(arena, envelope, None, {1}, {3 * (envelope % 2)}, envelope) == [(3, 0)] * RANKS
        arena.board.ask_to_stop(envelope)


def test_rank_0_waits_for_one_that_is_far_behind(arena: Arena) -> None:
    """Rank 0 has no exchange with it, and would else be at its end before anybody could ask for a stop."""
    going, reached = threading.Event(), [0]

    def slow() -> None:
        mine = Watch(arena.board, 1, 1, 2, on_gpu=False)
        mine.begin()
        for block in range(BLOCKS):
            mine.before(block, BLOCKS)
            if block == 2:
                going.wait(20)
        mine.end()

    def quick() -> None:
        mine = Watch(arena.board, 1, 0, 2, on_gpu=False, before_block=lambda block: reached.append(block))
        mine.begin()
        for block in range(BLOCKS):
            mine.before(block, BLOCKS)
        mine.end()

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(slow), pool.submit(quick)]
        time.sleep(0.2)
        assert max(reached) <= 4
        going.set()
        assert [each.result(20) for each in both] == [None, None]


def test_the_supervisor_sees_how_far_each_rank_is(arena: Arena) -> None:
    mine = Watch(arena.board, 7, 1, 2, on_gpu=False)
    assert arena.board.blocks(1, 7) is None
    mine.begin()
    mine.before(0, BLOCKS)
    assert arena.board.blocks(1, 7) == Blocks(0, 0, BLOCKS)
    assert arena.board.blocks(1, 8) is None, "of another command"
    assert arena.board.blocks(0, 7) is None
