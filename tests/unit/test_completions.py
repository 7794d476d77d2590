"""A completion is final: what rank 0 has noted and told is not undone, whatever becomes of the ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tacod.execution.scheduler import Job, Outcome, Verb
from tacod.group import board as board_module
from tacod.group.board import REPORT_BYTES, Board
from tacod.group.group import AGREE_S
from tacod.group.shared_memory import make_channel
from tacod.group.work import Done, Envelope, Forward, Stepped, as_tensor, pack_done, read_done
from tacod.rank.completion import Completion
from tacod_client import wire
from tacod_client.errors import JobNotFound, OutOfMemory
from tacod_client.wire import Message, Tensor

from .fake_ranks import COMPLETED
from .test_executor import BASE, Walk, raised

OUT = Tensor("BF16", (2, 3), None, offset=128)
STEP = Stepped("sequence 3", 3, 1, 0, out=OUT)
FORWARD = Forward("m", "auto", {}, b"s", memory=1, room=[128, 64])
ENVELOPE = Envelope(5, FORWARD, request=as_tensor(7))
NO_MEMORY = {"error": OutOfMemory("no memory").to_wire()}


# --- the supervisor ---------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    """Ranks that are at a forward."""
    with ExitStack() as stack:
        walk = Walk(stack, tmp_path)
        monkeypatch.setattr(board_module, "time", SimpleNamespace(monotonic_ns=lambda: int(walk.clock.now * 1e9)))
        walk.ready()
        walk.submit(Verb.LOAD, BASE)
        walk.answer()
        walk.submit(Verb.FORWARD, BASE, "f")
        walk.ended.clear()
        assert walk.work.type == "forward"
        yield walk


def ended_well(walk: Walk) -> Job:
    """The forward, which has ended with its result, at its first attempt."""
    (job,) = walk.ended
    assert (job.id, job.outcome, job.attempts) == ("f", Outcome.RESULT, 1)
    assert walk.executor.records.metrics.retried_forwards == 0
    return job


@pytest.mark.parametrize(("rank", "reported"), [(0, 0), (1, 0), (1, 1), (2, 1)])
def test_ranks_that_are_lost_behind_it_are_replaced_and_that_is_all(busy: Walk, rank: int, reported: int) -> None:
    busy.clock.now += 2
    busy.alive[0].complete()
    busy.clock.now += 1
    busy.answer(ranks=reported)
    gone = busy.alive
    gone[rank].die(-9)
    busy.executor.poll()
    assert all(each.reaped for each in gone)
    job = ended_well(busy)
    told = {"compute_s": 0.1, "collective_s": 0.1, "wire_s": 1.8} if reported else {"compute_s": 2.0}
    assert {name: job.times[name] for name in told} == pytest.approx(told)
    assert sum(job.times.values()) - job.times["queue_s"] == pytest.approx(2.0), "the time ends with it"
    busy.ready()
    busy.answer()
    assert busy.executor.group.restarts == 1
    assert busy.executor.scheduler.jobs == []


def test_its_result_is_told(busy: Walk) -> None:
    told: list[Any] = []
    busy.executor._on_end = lambda executor, job, result: told.append(result)
    busy.alive[0].complete()
    busy.alive[0].die(-9)
    busy.executor.poll()
    assert told == [COMPLETED]


def test_rank_0_may_complete_until_it_has_ended(busy: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one's loss was noticed before, and the client was told after that."""
    first = busy.alive[0]
    die = first.die

    def complete_and_die(code: int) -> None:
        first.complete()
        die(code)

    monkeypatch.setattr(first, "die", complete_and_die)
    busy.alive[1].die(-9)
    busy.executor.poll()
    ended_well(busy)


def test_a_completion_is_of_one_command(busy: Walk) -> None:
    busy.alive[0].complete()
    busy.answer()
    ended_well(busy)
    busy.submit(Verb.FORWARD, BASE, "next")
    busy.alive[1].die(-9)
    busy.executor.poll()
    (job,) = busy.executor.scheduler.jobs
    assert (job.id, job.attempts) == ("next", 2)


@pytest.mark.parametrize("other", [("raised", raised()), ("failed", NO_MEMORY)], ids=["raised", "failed"])
def test_ranks_that_disagree_behind_it_are_replaced(busy: Walk, other: tuple[str, Any]) -> None:
    gone = busy.alive
    busy.alive[0].complete()
    busy.answer(ranks=1)
    for rank in busy.alive[1:]:
        rank.answer(*other)
    busy.executor.poll()
    assert all(rank.reaped for rank in gone)
    ended_well(busy)


def test_a_rank_that_finds_no_memory_behind_it_has_new_ones_hold_fewer_blocks(busy: Walk) -> None:
    """One that is left idle, say: otherwise each forward would cost a restart, and in the end the ranks."""
    policy = busy.executor._restarts
    for fewer in (1, 2):
        busy.alive[0].complete()
        busy.answer(ranks=1)
        for rank in busy.alive[1:]:
            rank.answer("failed", {"error": OutOfMemory("no memory", shrinks=True).to_wire()})
        busy.executor.poll()
        ended_well(busy)
        assert not policy._starts, "it is no fault of the ranks"
        busy.ready()
        assert (busy.work.type, busy.work.body["fewer"]) == ("load", fewer)
        busy.answer()
        busy.submit(Verb.FORWARD, BASE, "f")
        busy.ended.clear()


@pytest.mark.parametrize("other", [("raised", raised()), ("failed", NO_MEMORY)], ids=["raised", "failed"])
def test_an_error_of_all_behind_it_is_none(busy: Walk, other: tuple[str, Any]) -> None:
    ranks = busy.alive
    busy.alive[0].complete()
    busy.answer(*other)
    ended_well(busy)
    assert busy.alive == ranks


def test_a_rank_that_hangs_behind_it(busy: Walk) -> None:
    busy.alive[0].complete()
    busy.answer(ranks=1)
    busy.clock.now += busy.executor.settings.step_timeout_s + AGREE_S
    busy.executor.poll()
    ended_well(busy)


def test_the_end_of_the_daemon_behind_it(busy: Walk) -> None:
    busy.submit(Verb.FORWARD, BASE, "waits")
    busy.alive[0].complete()
    busy.executor.abort(OutOfMemory("stops"))
    assert [(job.id, job.outcome) for job in busy.ended] == [("f", Outcome.RESULT), ("waits", Outcome.FAILED)]


def test_it_is_no_longer_to_be_cancelled_nor_dropped(busy: Walk) -> None:
    busy.alive[0].complete()
    with pytest.raises(JobNotFound):
        busy.executor.cancel("f")
    busy.executor.drop(b"a")
    assert busy.ended == []
    busy.answer()
    ended_well(busy)


def test_one_that_is_being_cancelled_stays_so(busy: Walk) -> None:
    busy.executor.cancel("f")
    busy.alive[0].complete()
    busy.answer()
    (job,) = busy.ended
    assert job.outcome is Outcome.CANCELLED


def test_it_counts_towards_no_limit(busy: Walk) -> None:
    limit = busy.executor.scheduler.limit
    for number in range(limit - 1):
        busy.submit(Verb.FORWARD, BASE, f"waits {number}")
    assert len(busy.executor.scheduler.unfinished) == limit
    busy.alive[0].complete()
    assert len(busy.executor.scheduler.unfinished) == limit - 1
    busy.submit(Verb.FORWARD, BASE, "one more")
    assert len(busy.executor.scheduler.jobs) == limit + 1


# --- rank 0 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def board() -> Iterator[Board]:
    fd = os.memfd_create("board")
    board = Board(fd)
    yield board
    board.close()
    os.close(fd)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The ranks' end and the client's."""
    ours, theirs = make_channel()
    with ours, theirs:
        theirs.setblocking(False)
        yield ours, theirs


Ends = tuple[socket.socket, socket.socket]


def test_the_client_is_told_when_the_result_is_there(board: Board, ends: Ends) -> None:
    moments: list[tuple[str, bool]] = []
    completion = Completion(
        board, ENVELOPE, ends[0], lambda when: moments.append((when, board.completed_s(5) is not None))
    )
    completion.prepare(STEP, 9)
    assert board.completed_s(5) is None
    with pytest.raises(BlockingIOError):
        ends[1].recv(wire.COMPLETION_BYTES)
    completion.send()
    assert moments == [("written", False)]
    packet = ends[1].recv(wire.COMPLETION_BYTES)
    assert wire.decode([packet[:5], packet[5:]]) == Message("completion", {"out": OUT}, 7)
    assert board.completed_s(5) is not None
    assert board.completed_s(4) is None
    assert read_done(board.report, FORWARD) == Done(9, 0.0, 0.0, STEP)


@pytest.mark.parametrize(
    "result",
    [
        None,
        replace(STEP, out=None),
        replace(STEP, out=Tensor("F32", (1,), (bytes(4),))),
        replace(STEP, out=[OUT, Tensor("F32", (1,), (bytes(4),))]),
        replace(STEP, plan="x" * REPORT_BYTES),
        replace(STEP, out=[OUT] * 200),
    ],
    ids=["none", "no output", "frames", "one in frames", "a long plan", "many latents"],
)
def test_what_does_not_lie_in_the_memory_alone_is_not_completed(
    board: Board, ends: Ends, result: Stepped | None
) -> None:
    completion = Completion(board, ENVELOPE, ends[0])
    completion.prepare(result, 9)
    completion.send()
    assert board.completed_s(5) is None
    with pytest.raises(BlockingIOError):
        ends[1].recv(wire.COMPLETION_BYTES)


@pytest.mark.parametrize("does", ["doesn't read", "has closed it"])
def test_a_client_that_does_not_hear_holds_up_nobody(board: Board, ends: Ends, does: str) -> None:
    if does == "has closed it":
        ends[1].close()
    for number in range(100):
        completion = Completion(board, replace(ENVELOPE, id=number), ends[0])
        completion.prepare(STEP, 9)
        completion.send()
        assert board.completed_s(number) is not None


def test_a_report_is_packed_with_its_numbers() -> None:
    done = Done(1 << 40, 0.5, 0.25, replace(STEP, out=[OUT, replace(OUT, offset=192)]), 3)
    assert read_done(pack_done(done), FORWARD) == done
