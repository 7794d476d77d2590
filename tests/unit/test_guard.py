"""Which connections end when too much memory is held, on real sockets."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import eventually

from tacod.serving import guard as guards
from tacod.serving.guard import Guard, own_bytes, socket_of

PLENTY = 1 << 40


class Door:
    """A socket that listens, and a connection through it: this side and the client's."""

    def __init__(self, stack: ExitStack, path: Path | None = None) -> None:
        self.listener = stack.enter_context(socket.socket(socket.AF_UNIX if path else socket.AF_INET))
        self.listener.bind(str(path) if path else ("127.0.0.1", 0))
        self.listener.listen()
        self.client = stack.enter_context(socket.socket(self.listener.family))
        self.client.connect(self.listener.getsockname())
        self.client.settimeout(10)
        self.end = stack.enter_context(self.listener.accept()[0])

    @property
    def number(self) -> int:
        return socket_of(self.end.fileno())

    @property
    def ended(self) -> bool:
        self.client.setblocking(False)
        try:
            return self.client.recv(1) == b""
        except BlockingIOError:
            return False


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_only_clients_connections_end(stack: ExitStack, tmp_path: Path) -> None:
    """Over a unix socket and over TCP; not what reads the metrics, nor sockets in pairs as the ranks have them."""
    local, remote, metrics = Door(stack, tmp_path / "s"), Door(stack), Door(stack, tmp_path / "metrics")
    pair = [stack.enter_context(each) for each in socket.socketpair()]
    addresses = [str(tmp_path / "s"), remote.listener.getsockname()[1]]
    guard = Guard(-PLENTY, addresses, list)
    stack.callback(guard.close)
    eventually(lambda: local.ended and remote.ended, 10, "clients' connections end")
    assert not metrics.ended
    pair[0].send(b"x")
    assert pair[1].recv(1) == b"x"
    with socket.socket(socket.AF_UNIX) as another:
        another.connect(str(tmp_path / "s"))


def test_strangers_end_first(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger, known = Door(stack, tmp_path / "s"), Door(stack, tmp_path / "t")
    # As if a stranger had held it all.
    monkeypatch.setattr(Guard, "_is_relieved", lambda self: True)
    guard = Guard(-PLENTY, [str(tmp_path / "s"), str(tmp_path / "t")], lambda: [known.number])
    stack.callback(guard.close)
    eventually(lambda: stranger.ended, 10, "the stranger's connection ends")
    guard.limit = PLENTY
    assert not known.ended


def test_who_sends_ends_before_who_waits(stack: ExitStack, tmp_path: Path) -> None:
    waits, sends = Door(stack, tmp_path / "s"), Door(stack, tmp_path / "t")
    sends.client.send(b"more")
    guard = Guard(PLENTY, [str(tmp_path / "s"), str(tmp_path / "t")], lambda: [waits.number, sends.number])
    stack.callback(guard.close)
    found = {each.number: each.busy for each in guard._connections()}
    assert found == {waits.number: False, sends.number: True}


def crowd(stack: ExitStack, path: Path, count: int) -> list[Door]:
    return [Door(stack, path / str(each)) for each in range(count)]


@contextmanager
def descriptors(more: int) -> Iterator[None]:
    """Within, this process can have so many descriptors more than it has."""
    with socket.socket() as probe:
        least = probe.fileno()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (least + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("flood", [1000, 10], ids=["some", "a flood"])
def test_strangers_beyond_a_number_end_where_few_descriptors_are_left(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flood: int
) -> None:
    """libzmq ends the process if it finds none for the next connection."""
    monkeypatch.setattr(guards, "STRANGERS", 8)
    monkeypatch.setattr(guards, "FLOOD", flood)
    doors = crowd(stack, tmp_path, 40)
    known = doors[3]
    addresses = [str(tmp_path / str(each)) for each in range(40)]
    with descriptors(3):
        guard = Guard(PLENTY, addresses, lambda: [known.number])
        stack.callback(guard.close)
        eventually(lambda: sum(door.ended for door in doors) >= 35, 10, "strangers' connections end")
    assert not known.ended


def test_no_descriptor_stays_open_after_a_look(stack: ExitStack, tmp_path: Path) -> None:
    crowd(stack, tmp_path, 3)
    guard = Guard(PLENTY, [], list)
    guard.close()
    before = sorted(guards._descriptors())
    guard._connections()
    guard._turn_strangers_away()
    assert sorted(guards._descriptors()) == before


def test_strangers_that_were_ended_and_are_still_there(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libzmq keeps them while what they sent is unread: memory is looked at all the same."""
    monkeypatch.setattr(guards, "STRANGERS", 1)
    doors = [Door(stack, tmp_path / name) for name in ("a", "b", "c")]
    addresses = [str(tmp_path / name) for name in ("a", "b", "c")]
    guard = Guard(PLENTY, addresses, list)
    stack.callback(guard.close)
    eventually(lambda: all(door.ended for door in doors), 10, "they end")
    looks: list[bool] = []
    monkeypatch.setattr(guard, "_relieve", lambda: looks.append(True))
    guard.limit = -PLENTY
    eventually(lambda: looks, 10, "memory is looked at")
    assert not guard._turn_strangers_away()


def test_what_is_no_socket(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert socket_of(file.fileno()) == 0
    assert socket_of(-1) == 0
    assert socket_of(1 << 20) == 0


def test_own_memory_grows_by_what_is_held() -> None:
    before = own_bytes()
    held = b"x" * (64 << 20)
    assert own_bytes() > before + (50 << 20)
    del held
