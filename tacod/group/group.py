"""The rank group: one command to all ranks, and one answer on which they agree.

The group is the unit of recovery. If a rank dies, hangs or disagrees, all ranks end: SIGKILL, reap, spawn anew.
"""

from __future__ import annotations

import enum
import operator
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tacod import config
from tacod.group.arena import Arena
from tacod.group.board import Blocks, Board
from tacod.group.faults import Faults
from tacod.group.launcher import launcher
from tacod.group.pace import Pace
from tacod.group.ranks import GroupLost, Rank
from tacod.group.shared_memory import SharedMemory
from tacod.group.work import (
    Begun,
    Broken,
    Command,
    Done,
    Envelope,
    Failed,
    Final,
    Forward,
    Progress,
    Raised,
    Ready,
    as_tensor,
    read_done,
    read_report,
)
from tacod_client import wire
from tacod_client.decoder import header_of, tail_of
from tacod_client.errors import EngineError, ProtocolError, TacodError
from tacod_client.wire import Tensor

__all__ = ["Answer", "GroupState", "RankGroup"]

AGREE_S = 5.0
"""After one rank reports a failure, the others have this long to report the same; otherwise they count as stuck."""
EXIT_S = 1.0
"""After one rank reports that it is broken, another one's exit within this time counts as the cause."""
LOOK_S = 0.2
"""How often the supervisor looks how far a watched forward is."""
CACHE_TENSORS = 8192
"""Most client tensors that each rank keeps, however small."""

_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
FinalType = TypeVar("FinalType", bound=Final)


class GroupState(enum.Enum):
    """What the group is doing."""

    DOWN = "down"
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass(frozen=True)
class Answer:
    """The answer of all ranks to one command: what rank 0 reports, or the error on which they agree."""

    elapsed_s: float
    done: Done | None = None
    error: TacodError | None = None


@dataclass
class _Current:
    """The command that the ranks are working on, and their reports about it."""

    id: int
    command: Command
    started_s: float
    answers: dict[int, Final] = field(default_factory=dict)
    """By rank, in the order of arrival."""
    watched: bool = False
    """Whether ranks tell how many blocks they have done."""
    begun: int = 0
    """Forwards after the first that all ranks have begun; each has a time limit of its own."""
    pace: Pace = field(default_factory=Pace)
    stopping: bool = False
    """Whether it was asked to stop: then its time limit is not put off any more."""

    def first(self, kind: type[FinalType]) -> tuple[int, FinalType] | None:
        """The first rank with such an answer, and the answer."""
        return next(((rank, each) for rank, each in sorted(self.answers.items()) if isinstance(each, kind)), None)

    @property
    def broken(self) -> tuple[int, Broken] | None:
        """The rank that was the first to report that it is broken, and its report."""
        return next(((rank, each) for rank, each in self.answers.items() if isinstance(each, Broken)), None)

    @property
    def error(self) -> TacodError | None:
        """An error with which a rank has answered, if there is one."""
        failed = self.first(Failed)
        return failed[1].error if failed is not None else None


class RankGroup:
    """Starts the ranks, gives each command to all of them, collects one answer.

    The owner polls `sources`, calls `receive` and `check`, and acts on `GroupLost`.
    """

    def __init__(
        self, settings: config.Group, devices: list[str], folder: Path, comfyui: str | None = None, beside: int = 0
    ) -> None:
        """``comfyui`` is the folder of the ComfyUI whose networks the ranks may run.

        ``beside`` is how many ranks of other groups use the same cores.
        """
        self.settings = settings
        self.state = GroupState.DOWN
        self.asked = len(devices)
        """The configured number of ranks."""
        self.restarts = 0
        self.faults: Faults | None = None
        """Faults on purpose, in tests."""
        self.deadline: float | None = None
        """When the ranks count as stuck, on the monotonic clock."""
        self._commands = 0
        """How many commands were given since the start; a command's number is its envelope's id."""
        self._current: _Current | None = None
        self._resident: OrderedDict[bytes, int] = OrderedDict()
        self._forgotten: list[str] = []
        self._mapped: set[int] = set()
        """Ids of the memories shared with clients that the ranks have."""
        self._unmapped: list[int] = []
        self._launcher = launcher(settings, devices, folder, comfyui, beside)

    @property
    def world_size(self) -> int:
        """The number of ranks that there are or are to be; on Ray fewer than configured, after a host was lost."""
        return len(self._launcher.devices)

    @property
    def may_grow(self) -> bool:
        """Whether new ranks would be more than there are."""
        return self._launcher.room is not None

    @property
    def ranks(self) -> Sequence[Rank]:
        """The running ranks."""
        return self._launcher.ranks

    @property
    def local_devices(self) -> list[tuple[int, str]]:
        """Pid and device of each rank on this machine."""
        return [(rank.process.pid, rank.device) for rank in self.ranks if not rank.host]

    @property
    def sources(self) -> list[int]:
        """File descriptors that become readable when a rank begins, reports or ends."""
        return self._launcher.sources

    def spawn(self) -> None:
        """Start a new epoch of ranks; they report when they are ready."""
        assert self.state is GroupState.DOWN
        self._resident.clear()
        self._forgotten.clear()
        self._mapped.clear()
        self._unmapped.clear()
        self._launcher.spawn(self.settings, self.faults.due("start") if self.faults is not None else None)
        self.state = GroupState.STARTING
        self.deadline = time.monotonic() + self.settings.start_timeout_s

    def kill(self) -> Answer | None:
        """End all ranks at once; nothing of them remains.

        Returns the answer to the command that they had, if rank 0 completed it: the client may have the result.
        """
        current, self._current = self._current, None
        # Until rank 0 has ended it may complete its command. The launcher then closes the arena.
        board = Board(self._launcher.arena.fd) if current is not None and self._launcher.arena is not None else None
        self._launcher.kill()
        self.state = GroupState.DOWN
        self.deadline = None
        if current is None or board is None:
            return None
        try:
            return _completed(current, board)
        finally:
            board.close()

    @property
    def completed_s(self) -> float | None:
        """When rank 0 completed the command under way, whose client may have the result; None if it hasn't."""
        current, arena = self._current, self._launcher.arena
        return arena.board.completed_s(current.id) if current is not None and arena is not None else None

    def close(self) -> None:
        """End all ranks, and what they are forked from."""
        self.kill()
        self._launcher.close()

    def check(self, now: float) -> None:
        """Raise `GroupLost` if a rank ended or is over its deadline."""
        broken = self._current.broken if self._current is not None else None
        self._follow_pace(now)
        # One that is broken ends too, and is not the cause of itself.
        self._launcher.check(rank for rank in self.ranks if broken is None or not self._has_answered(rank))
        if self.deadline is not None and now > self.deadline:
            if broken is not None:
                raise self._raised(*broken)
            missing = [rank for rank in self.ranks if not self._has_answered(rank)]
            names = ", ".join(f"rank {rank.index} (pid {rank.process.pid})" for rank in missing)
            self._launcher.log_stacks(missing)
            if self.state is GroupState.STARTING:
                reason = f"not ready after {self.settings.start_timeout_s:g} s (group.start_timeout_s)"
                if not names:
                    names = f"{self.world_size} ranks"
                    reason += f"; {self._launcher.starter} has not done so"
                raise GroupLost(f"{names} {reason}")
            current = self._current
            assert current is not None
            if (raised := current.first(Raised)) is not None:
                raise self._raised(*raised)
            info = f"; another rank reported: {current.error.message}" if current.error is not None else ""
            waited_s = now - current.started_s
            reason = f"{names} stuck: no answer to {current.command.verb} within {waited_s:.1f} s"
            if (blocks := current.pace.blocks) is not None:
                reason += f", and none further than block {blocks.done} of {blocks.total}"
                reason += f" for {now - current.pace.advanced_s:.1f} s"
            reason += info
            raise GroupLost(reason, current.error)

    def _raised(self, index: int, report: Raised | Broken) -> GroupLost:
        """The loss of the group because of an error that a rank raised."""
        reason = f"rank {index} ({self._launcher.devices[index]}) raised:\n{report.traceback}"
        return GroupLost(reason, cause=_NUMBERS.sub("#", report.what))

    def _has_answered(self, rank: Rank) -> bool:
        if self.state is GroupState.STARTING:
            return rank.ready
        return self._current is not None and rank.index in self._current.answers

    def run(
        self,
        command: Command,
        tensors: Iterable[Tensor],
        timeout_s: float,
        watched: bool = False,
        memory: SharedMemory | None = None,
        request: int | None = None,
    ) -> None:
        """Give one command to every rank. ``tensors`` are the stored ones that it may name by digest.

        The ranks get the descriptors of the ``memory`` shared with a client that it names, if they don't have them.
        With the id of the client's ``request``, rank 0 tells the client of the completion.
        The ranks have ``timeout_s`` for it. Where it is ``watched``, they have it for the first block of a forward, and
        then for each further one as long as `Pace` says. Raises `GroupLost` if a rank is gone.
        """
        assert self.state is GroupState.IDLE
        self._commands += 1
        self._current = _Current(self._commands, command, time.monotonic(), watched=watched)
        fresh = memory if memory is not None and memory.id not in self._mapped else None
        envelope = Envelope(
            self._commands,
            command,
            store=self._admit(tensors),
            forget=self._forgotten,
            evict=self._evict(),
            fault=self.faults.due(command.verb) if self.faults is not None else None,
            watched=watched,
            mapped=[fresh.id, fresh.nbytes] if fresh is not None else None,
            unmapped=self._unmapped,
            request=as_tensor(request) if request is not None else None,
        )
        self._forgotten, self._unmapped = [], []
        assert self._launcher.arena is not None
        packet = _pack(envelope, self._launcher.arena)
        for rank in self.ranks:
            rank.progress, rank.begun = None, 0
        self._launcher.send(packet, command, watched, fresh.descriptors if fresh is not None else [])
        if fresh is not None:
            self._mapped.add(fresh.id)
        self.state = GroupState.BUSY
        self.deadline = time.monotonic() + timeout_s

    def forget(self, job: str) -> None:
        """With the next command, have the ranks drop a sampling run."""
        self._forgotten.append(job)

    def unmap(self, memory: int) -> None:
        """With the next command, have the ranks drop a memory shared with a client."""
        if memory in self._mapped:
            self._mapped.remove(memory)
            self._unmapped.append(memory)

    def _admit(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those tensors that the ranks don't keep yet: they are sent with their bytes, once."""
        fresh = []
        for tensor in tensors:
            assert tensor.digest is not None
            if tensor.digest not in self._resident:
                fresh.append(tensor)
            self._resident[tensor.digest] = tensor.nbytes
            self._resident.move_to_end(tensor.digest)
        return fresh

    def _evict(self) -> list[bytes]:
        """Digests of the tensors that the ranks drop after this command, least recently used first."""
        evicted: list[bytes] = []
        while sum(self._resident.values()) > self.settings.cache_bytes or len(self._resident) > CACHE_TENSORS:
            evicted.append(self._resident.popitem(last=False)[0])
        return evicted

    def receive(self) -> Answer | None:
        """Take in what ranks have sent. Returns the answer when the last rank has answered.

        Raises `GroupLost` if they disagree, or if one says that it is broken.
        """
        before = self._launcher.sent
        for rank, packet in self._launcher.receive():
            answer = self._on_message(rank, packet)
            if answer is not None:
                return answer
        if self._launcher.sent != before:
            self._extend(time.monotonic() + self.settings.load_timeout_s)
        return None

    def _on_message(self, rank: Rank, packet: bytes) -> Answer | None:
        assert self._launcher.arena is not None
        current = self._current
        try:
            message = self._launcher.arena.unpack(packet, copy=True)
            report = read_report(message, current.command if current is not None else None)
        except ProtocolError as error:
            raise GroupLost(f"rank {rank.index} sent what can't be read ({error.message})") from None
        if isinstance(report, Ready):
            if self.state is GroupState.STARTING:
                self._on_ready(rank, report)
                return None
        elif current is not None and message.id == current.id and rank.index not in current.answers:
            if isinstance(report, Progress):
                self._on_progress(rank, report)
            elif isinstance(report, Begun):
                rank.begun += 1
                self._on_begun(current)
            else:
                return self._collect(current, rank, report)
            return None
        raise GroupLost(f"rank {rank.index} sent what it wasn't asked for ({message.type})")

    def _on_ready(self, rank: Rank, report: Ready) -> None:
        rank.ready = True
        rank.memory_used_bytes = report.memory_used_bytes
        if len(self.ranks) == self.world_size and all(rank.ready for rank in self.ranks):
            self.state = GroupState.IDLE
            self.deadline = None

    def stop(self) -> None:
        """Have the ranks stop a watched forward before its next block; they then report `Cancelled`.

        If they hang, they have `group.step_timeout_s` for it, or the time of three blocks where those take longer. A
        load stops if its files are still being sent to other hosts; else it goes on.
        """
        current = self._current
        if current is None or current.stopping or self._launcher.arena is None:
            return
        self._launcher.arena.board.ask_to_stop(current.id)
        if not current.watched:
            return
        current.stopping = True
        if self.deadline is not None:
            limit_s = max(self.settings.step_timeout_s, 3 * current.pace.longest_s)
            self.deadline = min(self.deadline, time.monotonic() + limit_s)

    @property
    def look_at(self) -> float | None:
        """When `check` is to look how far a watched forward is; None if there is none."""
        watched = self._current is not None and self._current.watched and self.state is GroupState.BUSY
        return time.monotonic() + LOOK_S if watched else None

    @property
    def blocks(self) -> Blocks | None:
        """How far the slowest rank is with a watched forward; None before one has begun, and if there is none."""
        current, arena = self._current, self._launcher.arena
        if current is None or not current.watched or arena is None:
            return None
        told = (arena.board.blocks(rank.index, current.id) for rank in self.ranks if not self._has_answered(rank))
        return min((each for each in told if each is not None), default=None)

    def _follow_pace(self, now: float) -> None:
        """Give a watched forward's next block a time limit, by how long earlier ones took."""
        current = self._current
        if current is None:
            return
        until = current.pace.follow(self.blocks, now, self.settings.step_timeout_s)
        if until is not None and self._may_extend:
            self.deadline = until

    @property
    def progress(self) -> Progress | None:
        """The progress of the slowest rank's load, or before that, of sending its files; None until there is any."""
        known = [rank.progress for rank in self.ranks if rank.progress is not None]
        if len(known) < len(self.ranks):
            return self._launcher.sent
        return min(known, key=lambda each: (each.done, each.total), default=None)

    def _on_progress(self, rank: Rank, report: Progress) -> None:
        before, rank.progress = self.progress, report
        if self.progress != before:
            self._extend(time.monotonic() + self.settings.load_timeout_s)

    def _on_begun(self, current: _Current) -> None:
        """When the last rank has begun a forward, give that forward a time limit of its own.

        It counts from the end of the limit before it: on a GPU, forwards are launched while others still run.
        """
        begun = min(rank.begun for rank in self.ranks if rank.index not in current.answers)
        more, current.begun = max(begun - current.begun, 0), max(begun, current.begun)
        if self.deadline is not None:
            self._extend(self.deadline + more * self.settings.step_timeout_s)

    @property
    def _may_extend(self) -> bool:
        """Once a rank has failed, the others have their time to agree, and no more; so it is after a stop."""
        current = self._current
        if current is None:
            return True
        return not current.stopping and all(isinstance(answer, Done) for answer in current.answers.values())

    def _extend(self, deadline: float) -> None:
        if self.deadline is not None and self._may_extend:
            self.deadline = max(self.deadline, deadline)

    def _collect(self, current: _Current, rank: Rank, report: Final) -> Answer | None:
        current.answers[rank.index] = report
        if not isinstance(report, Broken):
            rank.memory_used_bytes = report.memory_used_bytes
        if isinstance(report, Done):
            rank.prefix_bytes = report.prefix_bytes
        if len(current.answers) < len(self.ranks):
            if not isinstance(report, Done) and self.deadline is not None:
                # An exchange breaks off as soon as the kernel closes a dying rank's sockets, which may be well before
                # that rank's exit can be seen.
                patience_s = EXIT_S if isinstance(report, Broken) else AGREE_S
                self.deadline = min(self.deadline, time.monotonic() + patience_s)
            return None
        if current.broken is not None:
            raise self._raised(*current.broken)
        arena = self._launcher.arena
        assert arena is not None
        answer = self._agree(current, time.monotonic() - current.started_s)
        answer = _completed(current, arena.board) or answer
        self.state = GroupState.IDLE
        self.deadline = None
        arena.shrink()
        self._current = None
        return answer

    def _agree(self, current: _Current, elapsed_s: float) -> Answer:
        if (raised := current.first(Raised)) is not None:
            if len(set(map(_alike, current.answers.values()))) > 1:
                raise self._raised(*raised)
            error = EngineError(
                f"{current.command.verb} failed on all ranks alike, which go on: {raised[1].what}; this is a fault of "
                "tacod with such a request: please report it with the daemon's log"
            )
            return Answer(elapsed_s, error=error)
        if len(set(map(_alike, current.answers.values()))) > 1:
            kinds = "; ".join(f"rank {index}: {answer.kind}" for index, answer in sorted(current.answers.items()))
            reason = f"the ranks disagree about one work item ({kinds})"
            raise GroupLost(reason, current.error, cause=reason)
        first = current.answers[0]
        return Answer(elapsed_s, first if isinstance(first, Done) else None, current.error)


def _pack(envelope: Envelope, arena: Arena) -> bytes:
    """The packet of an envelope; those of alike forwards are described once."""
    command = envelope.command
    if not isinstance(command, Forward) or command.alike is None or not envelope.is_plain:
        return arena.pack(envelope.message())
    tails, kind = command.alike.tails, (envelope.watched, envelope.request is not None)
    frames = [*command.frames, *(envelope.request.frames or () if envelope.request is not None else ())]
    tail = tails.get(kind)
    if tail is not None:
        return arena.pack_frames(header_of(command.verb, envelope.id, tail), frames)
    _, header, *contents = wire.encode(envelope.message())
    # Whoever lists tensors in another order than they stand in is packed anew each time.
    if len(contents) == len(frames) and all(map(operator.is_, contents, frames)):
        tails[kind] = tail_of(bytes(header), command.verb)
    return arena.pack_frames(header, contents)


def _completed(current: _Current, board: Board) -> Answer | None:
    """The answer to a command that rank 0 has completed, whatever became of the ranks then; None if it hasn't.

    Its time ends with the completion.
    """
    completed_s = board.completed_s(current.id)
    if completed_s is None:
        return None
    elapsed_s = completed_s - current.started_s
    done = current.answers.get(0)
    if not isinstance(done, Done):
        # Rank 0 had no time to say how long it computed.
        done = replace(read_done(board.report, current.command), compute_s=elapsed_s)
    return Answer(elapsed_s, done)


def _alike(answer: Final) -> tuple[Any, ...]:
    """What ranks must answer alike; for an error that they raised this includes place and exchanges.

    If these agree, no rank waits for another.
    """
    if isinstance(answer, Raised):
        return answer.kind, answer.what, answer.place, answer.exchanges
    return answer.kind, type(answer.error) if isinstance(answer, Failed) else None
