"""The rank group: what all ranks are told, and the one answer that they give.

The group is the unit of recovery. A rank that dies, hangs or disagrees takes the others with it: SIGKILL all, reap,
spawn anew.
"""

from __future__ import annotations

import enum
import re
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tacod import config
from tacod.group.faults import Faults
from tacod.group.processes import GroupLost, Processes, Rank
from tacod_client.errors import EngineError, ProtocolError, TacodError
from tacod_client.wire import Message, Tensor

__all__ = ["Answer", "RankGroup", "State"]

AGREE_S = 5.0
"""After one rank reports a failure, the others have this long to say the same; else they count as stuck."""
CACHE_TENSORS = 8192
"""Client tensors that each rank keeps, however small."""


_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")


class State(enum.Enum):
    """What the group is doing."""

    DOWN = "down"
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass
class Answer:
    """What all ranks made of one work item: rank 0's body, or the error that they agree on."""

    body: dict[str, Any] = field(default_factory=dict)
    error: TacodError | None = None
    elapsed_s: float = 0.0


class RankGroup:
    """Starts the ranks, hands each work item to all of them, collects one answer.

    The owner polls `sources`, calls `receive` and `check`, and acts on `GroupLost`.
    """

    def __init__(self, settings: config.Group, devices: list[str], folder: Path) -> None:
        self.settings = settings
        self.state = State.DOWN
        self.restarts = 0
        self.faults: Faults | None = None
        """What goes wrong on purpose."""
        self.deadline: float | None = None
        """When the ranks count as stuck, on the monotonic clock."""
        self._work = 0
        self._verb = ""
        self._started_s = 0.0
        self._answers: dict[int, Message] = {}
        self._begun = 0
        """Forwards after the first that all ranks have begun; each has its own time."""
        self._resident: OrderedDict[bytes, int] = OrderedDict()
        self._forgotten: list[str] = []
        self._processes = Processes(devices, folder)

    @property
    def world_size(self) -> int:
        """How many ranks there are to be."""
        return len(self._processes.devices)

    @property
    def ranks(self) -> list[Rank]:
        """Those that run."""
        return self._processes.ranks

    @property
    def sources(self) -> list[int]:
        """File descriptors that become readable when a rank says something, or ends."""
        said = [rank.channel.fileno() for rank in self.ranks if not rank.mute]
        return said + [rank.pidfd for rank in self.ranks]

    def spawn(self) -> None:
        """Start a new epoch of ranks; they report when they are ready."""
        assert self.state is State.DOWN
        self._resident.clear()
        self._forgotten.clear()
        self._processes.spawn(self.settings, self.faults.due("start") if self.faults is not None else None)
        self.state = State.STARTING
        self.deadline = time.monotonic() + self.settings.start_timeout_s

    def kill(self) -> None:
        """End all ranks at once; nothing of them remains."""
        self._processes.kill()
        self.state = State.DOWN
        self.deadline = None

    def check(self, now: float) -> None:
        """Raise `GroupLost` if a rank ended or is over its deadline."""
        self._processes.check(self.ranks)
        if self.deadline is not None and now > self.deadline:
            missing = [rank for rank in self.ranks if not self._has_answered(rank)]
            names = ", ".join(f"rank {rank.index} (pid {rank.process.pid})" for rank in missing)
            self._processes.log_stacks(missing)
            if self.state is State.STARTING:
                raise GroupLost(f"{names} not ready after {self.settings.start_timeout_s:g} s (group.start_timeout_s)")
            raised = self._first("raised")
            if raised is not None:
                raise self._raised(raised)
            error = self._error()
            said = f"; another rank said: {error.message}" if error is not None else ""
            waited_s = now - self._started_s
            raise GroupLost(f"{names} stuck: no answer to {self._verb} within {waited_s:.1f} s{said}", error)

    def _error(self) -> TacodError | None:
        """The error that a rank has answered with, if one has."""
        failed = self._first("failed")
        return None if failed is None else TacodError.from_wire(self._answers[failed].body["error"])

    def _first(self, kind: str) -> int | None:
        """The first rank that has answered so."""
        return min((index for index, answer in self._answers.items() if answer.type == kind), default=None)

    def _raised(self, index: int) -> GroupLost:
        """The loss of the group by what a rank raised."""
        told = self._answers[index].body
        reason = f"rank {index} ({self._processes.devices[index]}) raised:\n{told['traceback']}"
        return GroupLost(reason, cause=_NUMBERS.sub("#", told.get("what", "")))

    def _has_answered(self, rank: Rank) -> bool:
        return rank.ready if self.state is State.STARTING else rank.index in self._answers

    def run(self, verb: str, body: dict[str, Any], tensors: Iterable[Tensor], timeout_s: float) -> None:
        """Hand one work item to every rank. ``tensors`` are the stored ones that ``body`` may name by digest.

        Raises `GroupLost` if a rank is gone.
        """
        assert self.state is State.IDLE
        self._started_s = time.monotonic()
        self._work += 1
        self._verb = verb
        self._answers.clear()
        self._begun = 0
        body = {**body, "store": self._admit(tensors), "evict": self._evict(), "forget": self._forgotten}
        self._forgotten = []
        if self.faults is not None and (fault := self.faults.due(verb)) is not None:
            body["fault"] = fault
        assert self._processes.arena is not None
        packet = self._processes.arena.pack(Message(verb, body, self._work))
        for rank in self.ranks:
            rank.progress, rank.begun = None, 0
            rank.send(packet)
        self.state = State.BUSY
        self.deadline = time.monotonic() + timeout_s

    def forget(self, job: str) -> None:
        """Have the ranks drop what they hold of a sampling run, with the next work item."""
        self._forgotten.append(job)

    def _admit(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those tensors that the ranks don't keep yet: they travel with their bytes, once."""
        fresh = []
        for tensor in tensors:
            assert tensor.digest is not None
            if tensor.digest not in self._resident:
                fresh.append(tensor)
            self._resident[tensor.digest] = tensor.nbytes
            self._resident.move_to_end(tensor.digest)
        return fresh

    def _evict(self) -> list[bytes]:
        """Digests that the ranks are to drop after this work item, least recently used first."""
        evicted = []
        while sum(self._resident.values()) > self.settings.cache_bytes or len(self._resident) > CACHE_TENSORS:
            evicted.append(self._resident.popitem(last=False)[0])
        return evicted

    def receive(self) -> Answer | None:
        """Take in what ranks have sent. Returns the answer when the last rank has answered.

        Raises `GroupLost` if they disagree, or if one says that it is broken.
        """
        for rank in self.ranks:
            while (packet := rank.receive()) is not None:
                answer = self._hear(rank, packet)
                if answer is not None:
                    return answer
        return None

    def _hear(self, rank: Rank, packet: bytes) -> Answer | None:
        assert self._processes.arena is not None
        try:
            message = self._processes.arena.unpack(packet, copy=True)
        except ProtocolError as error:
            raise GroupLost(f"rank {rank.index} sent what can't be read ({error.message})") from None
        if message.type == "ready" and self.state is State.STARTING:
            self._greet(rank, message)
            return None
        asked = self.state is State.BUSY and message.id == self._work and rank.index not in self._answers
        if asked and message.type == "progress":
            before, rank.progress = self.progress, (message.body["done"], message.body["total"])
            if self.progress != before:
                self._extend(time.monotonic() + self.settings.load_timeout_s)
            return None
        if asked and message.type == "begun":
            rank.begun += 1
            self._note_begun()
            return None
        if asked and message.type in ("done", "failed", "raised", "broken"):
            return self._collect(rank, message)
        raise GroupLost(f"rank {rank.index} says what it wasn't asked ({message.type})")

    def _greet(self, rank: Rank, message: Message) -> None:
        rank.ready = True
        rank.memory_used_bytes = message.body["memory_used_bytes"]
        if all(rank.ready for rank in self.ranks):
            self.state = State.IDLE
            self.deadline = None

    @property
    def progress(self) -> tuple[int, int] | None:
        """How far the slowest rank's load is; None if not all have said."""
        known = [rank.progress for rank in self.ranks if rank.progress is not None]
        return min(known) if known and len(known) == len(self.ranks) else None

    def _note_begun(self) -> None:
        """Give a forward that the last rank has begun its own time.

        That counts from the end of the time before it: on a GPU forwards are launched while others still run.
        """
        begun = min(rank.begun for rank in self.ranks if rank.index not in self._answers)
        more, self._begun = max(begun - self._begun, 0), max(begun, self._begun)
        if self.deadline is not None:
            self._extend(self.deadline + more * self.settings.step_timeout_s)

    def _extend(self, deadline: float) -> None:
        # Once a rank has failed, the others have their time to agree, and no more.
        if self.deadline is not None and all(answer.type == "done" for answer in self._answers.values()):
            self.deadline = max(self.deadline, deadline)

    def _collect(self, rank: Rank, message: Message) -> Answer | None:
        self._answers[rank.index] = message
        if message.type == "broken":
            # A rank raises too when another one dies under it, and that is then the reason.
            self._processes.check(rank for rank in self.ranks if rank.index not in self._answers)
            raise self._raised(rank.index)
        rank.memory_used_bytes = message.body["memory_used_bytes"]
        if len(self._answers) < len(self.ranks):
            if message.type != "done" and self.deadline is not None:
                self.deadline = min(self.deadline, time.monotonic() + AGREE_S)
            return None
        self.state = State.IDLE
        self.deadline = None
        if self._processes.arena is not None:
            self._processes.arena.shrink()
        answer = self._agree(time.monotonic() - self._started_s)
        # A result may be large, and the next work item far.
        self._answers.clear()
        return answer

    def _agree(self, elapsed_s: float) -> Answer:
        first = self._answers[0]
        raised = self._first("raised")
        if raised is not None:
            if len({_alike(answer) for answer in self._answers.values()}) > 1:
                raise self._raised(raised)
            error = EngineError(
                f"{self._verb} failed on all ranks alike, which go on: {first.body['what']}; this is a fault of tacod "
                "with such a request: please report it with the daemon's log"
            )
            return Answer(error=error, elapsed_s=elapsed_s)
        codes = {
            (answer.type, answer.body["error"]["code"] if answer.type == "failed" else "")
            for answer in self._answers.values()
        }
        if len(codes) > 1:
            told = "; ".join(f"rank {index}: {answer.type}" for index, answer in sorted(self._answers.items()))
            reason = f"the ranks disagree about one work item ({told})"
            raise GroupLost(reason, self._error(), cause=reason)
        if first.type == "failed":
            return Answer(error=self._error(), elapsed_s=elapsed_s)
        return Answer(body=first.body, elapsed_s=elapsed_s)


def _alike(answer: Message) -> tuple[Any, ...]:
    """What ranks must say alike of an error that they raised, for none of them to wait for another."""
    return (answer.type, *(answer.body.get(key) for key in ("what", "place", "exchanges")))
