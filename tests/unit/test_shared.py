"""The client's side of shared memory: places are given out and taken back, and frames serve where there are none."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tacod.group.shared_memory import SharedMemory, make_channel
from tacod_client import shared as shared_module
from tacod_client import wire
from tacod_client.errors import ArgumentError, ProtocolError, QueueFull
from tacod_client.latents import LEAST_BYTES, Latents
from tacod_client.shared import LEAST_MEMORY_BYTES, Shared
from tacod_client.tensors import from_wire
from tacod_client.wire import Message, Tensor

PAGE = 4096


class Giver:
    """Hands out memories as the daemon does, or says what a test has it say."""

    def __init__(self, path: Path) -> None:
        self.path = os.fsencode(path)
        self.made: list[SharedMemory] = []
        self.says: Message | None = None
        self.limit = 1 << 30
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.bind(self.path)
        self._end.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                end, _ = self._end.accept()
                with end:
                    said = end.recv(wire.SHARE_BYTES)
                    body = wire.decode([said[:5], said[5:]]).body
                    nbytes, completions = body["nbytes"], body.get("completions", False)
                    fds = []
                    reply = self.says
                    if reply is None and nbytes <= self.limit:
                        ours, theirs = make_channel() if completions else (None, None)
                        made = SharedMemory.make(len(self.made) + 1, nbytes, ours)
                        self.made.append(made)
                        fds = [made.fd, *([theirs.fileno()] if theirs else [])]
                        reply = Message("done", {"memory": self.made[-1].id, "nbytes": nbytes})
                    elif reply is None:
                        reply = Message("error", QueueFull("no").to_wire())
                    socket.send_fds(end, [b"".join(map(bytes, wire.encode(reply)))], fds)
                    if len(fds) > 1:
                        theirs.close()

    def tell(self, packet: bytes, memory: int = 1) -> None:
        """Send a completion on a memory's socket."""
        with socket.socket(fileno=os.dup(self.made[memory - 1].descriptors[1])) as end:
            end.send(packet)

    def hear(self, memory: int) -> bytes:
        """What comes next by a memory's channel."""
        return os.read(self.made[memory - 1].descriptors[1], 1 << 20)

    def close(self) -> None:
        self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()
        self._thread.join()
        for each in self.made:
            each.free()


class FakeConnection:
    """What `Latents` sees of a connection."""

    def __init__(self, path: bytes | None) -> None:
        self.shared = Shared(path, b"s") if path is not None else None
        self.given_back: list[int] = []

    def unshare(self, shared: Shared, memories: list[int]) -> None:
        self.given_back += memories if shared is self.shared else []


@pytest.fixture
def giver() -> Iterator[Giver]:
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        giver = Giver(Path(folder, "s.memory"))
        yield giver
        giver.close()


def test_places_lie_apart_and_are_used_again(giver: Giver) -> None:
    shared = Shared(giver.path, b"s")
    taken = [shared.take(PAGE - 1) for _ in range(5)]
    assert all(each is not None for each in taken)
    places = [each[1] for each in taken if each is not None]
    assert places == [0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]
    memory = taken[0][0] if taken[0] is not None else None
    assert memory is not None
    assert shared.release(memory, 2 * PAGE, answered=True) == []
    larger, same = shared.take(2 * PAGE), shared.take(PAGE)
    assert larger is not None
    assert same is not None
    assert (larger[1], same[1]) == (5 * PAGE, 2 * PAGE)
    assert len(giver.made) == 1


def test_a_place_that_was_not_answered_is_never_used_again(giver: Giver) -> None:
    shared = Shared(giver.path, b"s")
    first, second = shared.take(10), shared.take(10)
    assert first is not None
    assert second is not None
    assert shared.release(first[0], first[1], answered=False) == []
    third = shared.take(10)
    assert third is not None
    assert third[0] is not first[0]
    assert shared.release(second[0], second[1], answered=True) == [1], "nobody uses it any more"


def test_a_larger_request_has_the_smaller_memory_go(giver: Giver) -> None:
    shared = Shared(giver.path, b"s")
    small = shared.take(PAGE)
    assert small is not None
    shared.release(small[0], small[1], answered=True)
    large = shared.take(3 * LEAST_MEMORY_BYTES)
    assert large is not None
    assert large[1:] == (0, [1])
    assert large[0].nbytes == 4 * LEAST_MEMORY_BYTES


@pytest.mark.parametrize(
    "says",
    [
        Message("error", QueueFull("no more").to_wire()),
        Message("done", {"memory": 1, "nbytes": 1 << 40}),
        Message("done", {}),
        Message("welcome", {}),
    ],
    ids=["an error", "no descriptor", "no fields", "another word"],
)
def test_a_refusal_is_asked_about_once(giver: Giver, says: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(giver.path, b"s")
    giver.says = says
    assert shared.take(PAGE) is None
    giver.says = None
    assert shared.take(PAGE) is None
    assert giver.made == []
    monkeypatch.setattr(shared_module.time, "monotonic", lambda: 1e12)
    assert shared.take(PAGE) is not None


def test_completions_of_all_memories_are_heard_until_they_are_given_back(giver: Giver) -> None:
    shared = Shared(giver.path, b"s", completes=True)
    assert shared.channels == ()
    first, second = shared.take(LEAST_MEMORY_BYTES), shared.take(LEAST_MEMORY_BYTES)
    assert first is not None
    assert second is not None
    both = shared.channels
    assert len(both) == 2
    assert shared.receive() == []
    giver.tell(b"one")
    giver.tell(b"two")
    giver.tell(b"three", memory=2)
    assert shared.receive() == [b"one", b"two", b"three"]
    assert shared.channels is both
    assert shared.release(second[0], second[1], answered=False) == [2]
    assert shared.channels == both[:1]
    giver.tell(b"four")
    assert shared.receive() == [b"four"]
    assert first[0].channel is not None
    assert not first[0].channel.get_inheritable(), "programs that its process starts get no descriptor of it"
    first[0].channel.shutdown(socket.SHUT_RDWR)
    assert shared.receive() == []
    assert shared.channels == (), "a socket that is closed would be readable for ever"
    shared.close()


def test_nobody_waits_for_completions_whatever_sockets_do_by_default(giver: Giver) -> None:
    """Programs set a timeout for all sockets, some packs of ComfyUI's among them."""
    shared = Shared(giver.path, b"s", completes=True)
    socket.setdefaulttimeout(0.5)
    try:
        assert shared.take(PAGE) is not None
    finally:
        socket.setdefaulttimeout(None)
    giver.tell(b"one")
    assert shared.receive() == [b"one"]
    assert len(shared.channels) == 1, "a wait would have ended as a broken socket does"
    giver.tell(b"two")
    assert shared.receive() == [b"two"]
    shared.close()


def test_forwards_go_by_the_channel_of_their_memory(giver: Giver) -> None:
    shared = Shared(giver.path, b"s", completes=True, forwards=True)
    first, second = shared.take(LEAST_MEMORY_BYTES), shared.take(LEAST_MEMORY_BYTES)
    assert first is not None
    assert second is not None
    assert shared.send(2, [b"head", b"", memoryview(b"body")])
    assert shared.send(1, [b"other"])
    assert wire.cut(giver.hear(2)) == [b"head", b"", b"body"]
    assert wire.cut(giver.hear(1)) == [b"other"]
    longest = wire.FORWARD_BYTES - wire.SIZE_BYTES
    assert shared.send(1, [bytes(longest)])
    assert len(giver.hear(1)) == wire.FORWARD_BYTES
    assert not shared.send(1, [bytes(longest + 1)]), "it would be cut off"
    assert not shared.send(3, [b"of another session"])
    sent = 0
    while shared.send(1, [bytes(longest)]):
        sent += 1
    assert sent > 4, "what the daemon is slow to read goes through ZeroMQ"
    shared.release(second[0], second[1], answered=False)
    assert not shared.send(2, [b"given back"])
    shared.close()
    assert not shared.send(1, [b"the session has ended"])


def test_a_forward_to_a_closed_channel_is_not_sent(giver: Giver) -> None:
    shared = Shared(giver.path, b"s", completes=True, forwards=True)
    assert shared.take(PAGE) is not None
    giver.made.pop().free()
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        assert not shared.send(1, [b"which would end this process"])
    finally:
        signal.signal(signal.SIGPIPE, before)
    shared.close()


def test_a_forked_child_sends_nothing_by_its_parents_channel(giver: Giver, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(giver.path, b"s", completes=True, forwards=True)
    assert shared.take(PAGE) is not None
    monkeypatch.setattr(shared_module.os, "getpid", lambda: 1)
    assert not shared.send(1, [b"head"])
    monkeypatch.undo()
    assert shared.send(1, [b"head"])
    shared.close()


def test_an_older_daemon_gives_a_memory_alone_or_hears_nothing_there(giver: Giver) -> None:
    shared = Shared(giver.path, b"s", forwards=True)
    assert shared.take(PAGE) is not None
    assert giver.made[0].channel is None
    assert (shared.channels, shared.receive()) == ((), [])
    assert not shared.send(1, [b"head"])
    deaf = Shared(giver.path, b"s", completes=True)
    assert deaf.take(PAGE) is not None
    assert not deaf.send(2, [b"head"])
    deaf.close()


def test_a_memory_of_another_size_is_none(giver: Giver) -> None:
    """Were it mapped, to write there would end this process."""
    shared = Shared(giver.path, b"s")
    small = SharedMemory.make(1, PAGE)
    real = socket.send_fds

    def send(end: socket.socket, buffers: list[bytes], fds: list[int]) -> int:
        return real(end, buffers, [small.fd] * len(fds))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "send_fds", send)
        assert shared.take(2 * LEAST_MEMORY_BYTES) is None
    small.free()


def test_without_a_socket_it_is_frames(tmp_path: Path) -> None:
    for path in (None, os.fsencode(tmp_path / "nobody")):
        latents = Latents(FakeConnection(path), torch.ones(LEAST_BYTES // 4))  # type: ignore[arg-type]
        x, fields = latents.pack()
        assert fields == {}
        assert torch.equal(from_wire(x, "torch"), torch.ones(LEAST_BYTES // 4))
        latents.close(answered=True)


def placed(connection: FakeConnection, tensor: Tensor, fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in shared memory."""
    assert connection.shared is not None
    assert tensor.offset is not None
    (memory,) = (each for each in connection.shared._memories if each.number == fields["memory"])
    return np.frombuffer(memory.view[tensor.offset : tensor.offset + tensor.nbytes], np.uint8)


WIDE = torch.arange(2 * 96 * 128, dtype=torch.float32).reshape(2, 96, 128)


@pytest.mark.parametrize(
    "x",
    [
        WIDE,
        WIDE.to(torch.bfloat16).repeat(2, 1, 1),
        WIDE.transpose(1, 2),
        WIDE.numpy(),
        WIDE.numpy().astype(">f4"),
        WIDE.numpy()[:, ::-1],
        torch.complex(WIDE, -WIDE).conj().imag,
        WIDE.clone().requires_grad_(),
    ],
    ids=["fp32", "bf16", "strided", "numpy", "big-endian", "numpy strided", "negated", "with a gradient"],
)
def test_latents_lie_there_as_their_frames_would(giver: Giver, x: Any) -> None:
    connection = FakeConnection(giver.path)
    latents = Latents(connection, x)  # type: ignore[arg-type]
    packed, fields = latents.pack()
    framed, _ = Latents(FakeConnection(None), x).pack()  # type: ignore[arg-type]
    assert (packed.dtype, packed.shape, packed.frames) == (framed.dtype, framed.shape, None)
    assert placed(connection, packed, fields).tobytes() == b"".join(framed.frames)
    start, size = fields["room"]
    assert start >= packed.offset + packed.nbytes
    assert size >= 4 * framed.nbytes // wire.DTYPES[framed.dtype]


def test_small_and_odd_latents_are_frames(giver: Giver) -> None:
    connection = FakeConnection(giver.path)
    assert Latents(connection, torch.ones(LEAST_BYTES // 4 - 1)).pack()[1] == {}  # type: ignore[arg-type]
    for odd in (torch.zeros(LEAST_BYTES, dtype=torch.complex64), np.zeros(LEAST_BYTES, np.complex64)):
        with pytest.raises(ArgumentError):
            Latents(connection, odd).pack()  # type: ignore[arg-type]
    assert giver.made == []


def test_several_latents_lie_behind_each_other(giver: Giver) -> None:
    connection = FakeConnection(giver.path)
    several = [torch.full((LEAST_BYTES + 4,), 1, dtype=torch.uint8), torch.full((7,), 2, dtype=torch.uint8)]
    latents = Latents(connection, several)  # type: ignore[arg-type]
    (one, two), fields = latents.pack()
    assert two.offset == -(-(one.offset + one.nbytes) // 64) * 64
    assert set(placed(connection, one, fields)) == {1}
    assert set(placed(connection, two, fields)) == {2}


def test_a_new_session_has_a_new_memory(giver: Giver) -> None:
    connection = FakeConnection(giver.path)
    latents = Latents(connection, WIDE)  # type: ignore[arg-type]
    first = latents.pack()
    assert latents.pack() == first, "the same session has it already"
    connection.shared = None
    x, fields = latents.pack()
    assert (x.offset, fields) == (None, {})
    assert b"".join(x.frames) == WIDE.numpy().tobytes()
    connection.shared = Shared(giver.path, b"t")
    assert latents.pack()[1]["memory"] == 2
    latents.close(answered=False)
    assert connection.given_back == [2]


def test_freed_memory_is_noticed_and_an_empty_latent_is_a_frame(giver: Giver) -> None:
    latents = Latents(FakeConnection(giver.path), WIDE)  # type: ignore[arg-type]
    assert not latents.is_gone
    latents.pack()
    assert not latents.is_gone
    with mmap.mmap(giver.made[0].fd, giver.made[0].nbytes) as mapped:
        mapped.madvise(mmap.MADV_REMOVE)
    assert latents.is_gone
    latents.stop_sharing()
    assert not latents.is_gone
    assert latents.pack()[1] == {}
    assert Latents(FakeConnection(giver.path), [WIDE, WIDE[:0]]).pack()[1] == {}  # type: ignore[arg-type]


def test_an_output_where_none_was_asked_for_is_refused(giver: Giver) -> None:
    connection = FakeConnection(giver.path)
    latents = Latents(connection, WIDE)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="none was asked for"):
        latents.result(Tensor("F32", (4,), None, offset=0))
    _, fields = latents.pack()
    start, size = fields["room"]
    out = latents.result([Tensor("F32", (4,), None, offset=start + 64)])
    assert b"".join(out[0].frames) == bytes(16)
    for offset in (start - 64, start + size, 1 << 40):
        with pytest.raises(ProtocolError, match="none was asked for"):
            latents.result(Tensor("F32", (4,), None, offset=offset))
