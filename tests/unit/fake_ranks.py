"""Ranks without processes: a transport and a clock in a test's hands."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import zmq

from tacod.arena import Arena
from tacod_client import wire
from tacod_client.wire import Message

__all__ = ["FACTS", "Context", "FakeRank", "descriptors", "fakes", "step"]

FACTS = {"family": "sd3", "parameters": 1, "weight_bytes": 1, "dtype": "fp32", "heads": 3, "width": 48}
"""What a rank tells of a loaded model."""


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


class Socket:
    """The ranks' ROUTER socket: keeps what is sent, gives what a test says that ranks have sent."""

    def __init__(self) -> None:
        self.sent: dict[bytes, list[Message]] = {}
        self.inbox: deque[tuple[bytes, Message]] = deque()
        self.gone: set[bytes] = set()

    def setsockopt(self, option: int, value: int) -> None:
        pass

    def bind(self, address: str) -> None:
        pass

    def close(self) -> None:
        pass

    def send_multipart(self, frames: Sequence[Any], flags: int = 0, copy: bool = True) -> None:
        peer, *rest = frames
        if peer in self.gone:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        arena = arena_of(peer)
        assert arena is not None
        self.sent.setdefault(peer, []).append(arena.unpack([memoryview(frame) for frame in rest], copy=True))

    def get(self, option: int) -> int:
        return zmq.POLLIN if self.inbox else 0

    def recv_multipart(self, flags: int, copy: bool) -> list[zmq.Frame]:
        if not self.inbox:
            raise zmq.Again
        peer, message = self.inbox.popleft()
        arena = arena_of(peer)
        frames = wire.encode(message) if arena is None else arena.pack(message, arena.end)
        return [zmq.Frame(peer), *(zmq.Frame(bytes(frame)) for frame in frames)]


class Context:
    """Makes that one socket."""

    def __init__(self) -> None:
        self.made = Socket()

    def socket(self, kind: int) -> Socket:
        return self.made


class FakeRank:
    """What `subprocess.Popen` gives: a process that ends when a test says so."""

    all: ClassVar[list[FakeRank]] = []

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        options = dict(zip(command[3::2], command[4::2], strict=True))
        self.index = int(options["--rank"])
        self.epoch = options["--epoch"]
        self.arena: Arena | None = Arena(int(options["--arena"]))
        self.pid = 100 + len(self.all)
        self.peer = f"{self.epoch} {self.index}".encode()
        self.code: int | None = None
        self.reaped = False
        self.greeted = False
        """Whether it has said that it is ready."""
        self.answered = 0
        """The last work item that it has answered."""
        self.all.append(self)

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        if self.code is None:
            self.code = -9

    def wait(self) -> int:
        assert self.code is not None, "waits for a process that lives"
        self.reaped = True
        self.arena = None
        return self.code

    def send_signal(self, number: int) -> None:
        pass


def arena_of(peer: bytes) -> Arena | None:
    """What the rank at this address shares with the supervisor, while it lives."""
    return next((rank.arena for rank in FakeRank.all if rank.peer == peer), None)


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

    def pidfd_open(pid: int) -> int:
        return os.open(os.devnull, os.O_RDONLY)

    with (
        mock.patch("tacod.processes.subprocess", SimpleNamespace(Popen=FakeRank, DEVNULL=None)),
        mock.patch("tacod.processes.os.pidfd_open", pidfd_open),
        mock.patch("tacod.processes.time", clock),
        mock.patch("tacod.group.time", clock),
        mock.patch("tacod.executor.time", clock),
    ):
        yield clock
