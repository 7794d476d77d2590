"""Ranks without processes: what they say, when they end and what time it is are in a test's hands."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from tacod.execution.manifest import Model
from tacod.execution.scheduler import Verb
from tacod.group.arena import PACKET_BYTES, Arena
from tacod.group.work import NUMBERS, Done, Forward, MethodCall, Sample, Stepped, Unload, pack_done
from tacod_client.wire import Message, Tensor

__all__ = ["COMPLETED", "FACTS", "FakeRank", "body_of", "descriptors", "fakes", "step"]

SESSION = b"s"
TENSOR = Tensor("F32", (1,), (b"\0\0\0\0",))

FACTS = {
    "family": "sd3",
    "parameters": 1,
    "weight_bytes": 1,
    "dtype": "fp32",
    "heads": 3,
    "width": 48,
    "sampling": {"channels": 16, "prediction": "flow"},
}
"""What a rank tells of a loaded model."""


COMPLETED = Stepped("p", 1, 1, 0, out=Tensor("F32", (1,), None, offset=64))
"""The result of a forward that is completed."""


def body_of(verb: Verb, model: Model) -> Model | Unload | Forward | MethodCall | Sample:
    """What a job of this verb is about."""
    return {
        Verb.LOAD: model,
        Verb.UNLOAD: Unload(model.id),
        Verb.FORWARD: Forward(model.id, "auto", {}, SESSION),
        Verb.CALL: MethodCall(model.id, "preprocess_text_embeds", {}),
        Verb.SAMPLE: Sample(model.id, "auto", "euler", 0, 1.0, TENSOR, TENSOR, TENSOR, {}, None),
    }[verb]


def step(ranks: int, **more: Any) -> dict[str, Any]:
    """What a rank tells of a forward on so many."""
    times = {"compute_s": 0.1, "collective_s": 0.1}
    return {"plan": "p", "ranks": ranks, "forwards": 1, "skipped": 0, **times, **more}


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeForkServer:
    """What `tacod.group.fork_server.ForkServer` is: it has the ranks at once, and ends when a test says so."""

    sources: ClassVar[list[int]] = []
    pid = 99

    def __init__(self, device: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._forked: list[FakeRank] = []

    def fork(self, rank: int, arguments: Sequence[str], channel: int, arena: int) -> None:
        self._forked.append(FakeRank(rank, arguments, channel, arena))

    def forked(self) -> list[tuple[int, FakeRank]]:
        found, self._forked = self._forked, []
        return [(rank.index, rank) for rank in found]

    def poll(self) -> int | None:
        return None

    def stop(self) -> None:
        for _, rank in self.forked():
            rank.kill()
            rank.wait()


NUMBERED = "memory_used_bytes", "compute_s", "collective_s", "prefix_bytes"
"""What stands in the bytes of a rank's report, in this order."""


class FakeRank:
    """What `tacod.group.fork_server.Child` is: a process that speaks and ends when a test says so."""

    all: ClassVar[list[FakeRank]] = []

    def __init__(self, rank: int, arguments: Sequence[str], channel: int, arena: int) -> None:
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        self.index = rank
        self.generation = options["--rendezvous"]
        self.pid = 100 + len(self.all)
        self.fd = os.open(os.devnull, os.O_RDONLY)
        self.code: int | None = None
        self.reaped = False
        self.greeted = False
        """Whether it has said that it is ready."""
        self.answered = 0
        """The last work item that it has answered."""
        self._heard: list[Message] = []
        self._arena = Arena(arena)
        # The supervisor closes what it gives to a process.
        self._channel = socket.socket(fileno=os.dup(channel))
        self._channel.setblocking(False)
        self.all.append(self)

    @property
    def heard(self) -> list[Message]:
        """All that it was told."""
        with suppress(OSError):
            while packet := self._channel.recv(PACKET_BYTES):
                self._heard.append(self._arena.unpack(packet, copy=True))
        return self._heard

    @property
    def unanswered(self) -> list[Message]:
        """The work items that it was told of and has not answered."""
        return [work for work in self.heard if work.id > self.answered]

    def greet(self) -> None:
        """Say once that it is ready."""
        if self.code is None and not self.greeted:
            self.greeted = True
            self.say("ready", {"memory_used_bytes": 1})

    def answer(self, kind: str, body: dict[str, Any]) -> None:
        """Say what became of the work item."""
        for work in self.unanswered:
            self.answered = work.id
            told = {"memory_used_bytes": 1, **body}
            if kind == "done":
                numbers = NUMBERS.pack(*(told.pop(name, 0) for name in NUMBERED))
                told["numbers"] = Tensor("U8", (len(numbers),), (numbers,))
            self.say(kind, told, work.id)

    def complete(self) -> bool:
        """As rank 0, note a forward's completion before the report; returns whether there is a forward."""
        for work in self.unanswered:
            if work.type == "forward":
                self._arena.board.note_report(pack_done(Done(1, 0.0, 0.0, COMPLETED)))
                self._arena.board.complete(work.id)
                return True
        return False

    def say(self, kind: str, body: dict[str, Any], work: int = 0) -> None:
        """Say whatever it may be."""
        self._channel.send(self._arena.pack(Message(kind, body, work), self._arena.end))

    def hang_up(self) -> None:
        """Close the channel."""
        self._channel.close()

    def die(self, code: int) -> None:
        """End."""
        if self.code is None:
            self.code = code
            self.hang_up()

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.die(-9)

    def wait(self) -> int:
        assert self.code is not None, "waits for a process that lives"
        self.reaped = True
        os.close(self.fd)
        del self._arena
        return self.code

    def send_signal(self, number: int) -> None:
        pass


def descriptors() -> tuple[int, int]:
    """How many files this process has open, and how many memories that others may share, which may be mapped too."""
    files, memories = 0, set()
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of this loop
            if str(each.readlink()).startswith("/memfd:tacod"):
                memories.add(each.stat().st_ino)
            else:
                files += 1
    return files, len(memories)


@contextmanager
def fakes() -> Iterator[Clock]:
    """Within, a group starts such ranks and reads this clock."""
    clock = Clock()
    FakeRank.all.clear()

    with (
        mock.patch("tacod.group.processes.ForkServer", FakeForkServer),
        mock.patch("tacod.group.processes.time", clock),
        mock.patch("tacod.group.group.time", clock),
        mock.patch("tacod.execution.executor.time", clock),
    ):
        yield clock
