"""Memory that a client shares with the ranks: who gets how much of it, and what a forward may say of it."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tacod.execution.manifest import Model
from tacod.execution.memories import COUNT, EARLIER, FORWARDS
from tacod.group.descriptors import SO_PASSRIGHTS
from tacod.serving import memory_socket
from tacod.serving.access import User
from tacod.serving.memory_socket import UNREAD, WAITING
from tacod.serving.server import MESSAGES_A_TURN
from tacod_client import wire
from tacod_client.wire import MEMORY_SOCKET, Message, Tensor, decode, encode

from .conftest import PEER, Peer

LIMIT = 1 << 20
MINE = User(os.geteuid())
X = Tensor("F32", (4, 4), None, offset=0)


@pytest.fixture
def sharing(peer: Peer) -> Peer:
    """A client of this user, which computes with a model."""
    peer.state.groups.host.memories.limit = LIMIT
    peer.state.groups.executors[0].manifest.add(Model("m", "/models/m", "i", None))
    (session,) = peer.state.sessions
    session.user = MINE
    return peer


def connect(peer: Peer) -> socket.socket:
    """A connection to the socket that hands out memory."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(5)
    end.connect(str(peer.state.config.socket_path) + MEMORY_SOCKET)
    return end


def look(peer: Peer) -> None:
    """Have the server answer those who have asked."""
    memory = peer.state.listener.memory
    assert memory is not None
    memory.poll(peer.state.share)


def packet(body: dict[str, Any], session: bytes, kind: str = "share") -> bytes:
    """A packet that asks for memory."""
    return b"".join(map(bytes, encode(Message(kind, body, 0, session))))


def answer(peer: Peer, said: bytes) -> tuple[Message, int | None]:
    """The answer to a packet, and the descriptor that it brings."""
    with connect(peer) as end:
        end.send(said)
        look(peer)
        got, descriptors, _, _ = socket.recv_fds(end, wire.SHARE_BYTES, 4)
        assert end.recv(1) == b"", "the connection ends"
    for extra in descriptors[1:]:
        os.close(extra)
    assert len(descriptors) == 1 + (b"completions" in said) or decode([got[:5], got[5:]]).type == "error"
    return decode([got[:5], got[5:]]), descriptors[0] if descriptors else None


def share(peer: Peer, nbytes: int) -> int:
    """The id of a memory of so many bytes."""
    reply, fd = answer(peer, packet({"nbytes": nbytes}, peer.session))
    assert fd is not None
    os.close(fd)
    number: int = reply.body["memory"]
    return number


def refusal(peer: Peer, said: bytes) -> str:
    """The code of the error that a packet is answered by."""
    reply, fd = answer(peer, said)
    assert (reply.type, fd) == ("error", None)
    code: str = reply.body["code"]
    return code


def forward(x: Any, **more: Any) -> dict[str, Any]:
    """The body of a forward."""
    return {"model": "m", "plan": "auto", "arguments": {"x": x}, **more}


def test_a_memory_has_the_size_that_was_asked_for_and_keeps_it(sharing: Peer) -> None:
    reply, fd = answer(sharing, packet({"nbytes": 5000}, sharing.session))
    assert (reply.type, reply.body["nbytes"]) == ("done", 5000)
    assert fd is not None
    try:
        assert os.fstat(fd).st_size == 5000
        for size in (0, 4096, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with mmap.mmap(fd, 5000) as mapped:
            assert mapped[:] == bytes(5000)
            mapped[:2] = b"ab"
    finally:
        os.close(fd)
    assert sharing.state.groups.host.memories.nbytes == 5000


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"", None),
        (b"x", "ProtocolError"),
        (b"TACO\x01", "ProtocolError"),
        (b"TACO\x09" + bytes(100), "ProtocolError"),
        (packet({"nbytes": 0}, b"{}"), "ProtocolError"),
        (packet({"nbytes": -1}, b"{}"), "ProtocolError"),
        (packet({"nbytes": True}, b"{}"), "ProtocolError"),
        (packet({"nbytes": 2**63}, b"{}"), "ProtocolError"),
        (packet({"nbytes": 8.0}, b"{}"), "ProtocolError"),
        (packet({}, b"{}"), "ProtocolError"),
        (packet({"nbytes": 8, "colour": 1}, b"{}"), "ProtocolError"),
        (packet({"nbytes": 8, "completions": 1}, b"{}"), "ProtocolError"),
        (packet({"completions": True}, b"{}"), "ProtocolError"),
        (packet({"nbytes": LIMIT, "completions": True}, b"{}"), "QueueFull"),
        (packet({"nbytes": 8}, b"{}", "hello"), "ProtocolError"),
        (packet({"nbytes": 8}, b""), "NotAllowed"),
        (packet({"nbytes": 8}, bytes(16)), "NotAllowed"),
        (packet({"nbytes": LIMIT}, b"{}"), "QueueFull"),
    ],
)
def test_a_lie_gets_an_error_and_no_memory(sharing: Peer, said: bytes, code: str | None) -> None:
    said = said.replace(b"\xc4\x02{}", b"\xc4\x10" + sharing.session)
    if code is not None:
        assert refusal(sharing, said) == code
    else:
        with connect(sharing) as end:
            end.send(said)
            look(sharing)
            assert end.recv(1) == b""
    assert sharing.state.groups.host.memories.nbytes == 0
    assert sharing.ask("ping").type == "done"


@pytest.mark.parametrize("user", [User(os.geteuid() + 1), User(key=b"k", name="carol")], ids=["another uid", "a key"])
def test_anothers_token_gets_nothing(sharing: Peer, user: User) -> None:
    (session,) = sharing.state.sessions
    session.user = user
    assert refusal(sharing, packet({"nbytes": 8}, sharing.session)) == "NotAllowed"


def test_a_session_has_few_and_leaves_half_to_others(sharing: Peer) -> None:
    assert refusal(sharing, packet({"nbytes": LIMIT // 2 + 1}, sharing.session)) == "QueueFull"
    share(sharing, LIMIT // 4)
    assert refusal(sharing, packet({"nbytes": LIMIT // 4 + 1}, sharing.session)) == "QueueFull"
    memories = sharing.state.groups.host.memories
    memories.make(b"other", 3 * LIMIT // 8)
    assert memories.nbytes == 5 * LIMIT // 8
    for _ in range(COUNT - 1):
        share(sharing, 1)
    assert refusal(sharing, packet({"nbytes": 1}, sharing.session)) == "QueueFull"


def test_what_is_given_back_is_free_for_others(sharing: Peer) -> None:
    number = share(sharing, LIMIT // 2)
    assert sharing.ask("unshare", {"memory": number}).type == "done"
    assert sharing.state.groups.host.memories.nbytes == 0
    for gone in (number, 99, -1):
        assert sharing.ask("unshare", {"memory": gone}).body["code"] == "ArgumentError"
    share(sharing, LIMIT // 2)


def test_a_flood_of_connections_and_descriptors_keeps_nobody_out(sharing: Peer) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    idle = []
    for _ in range(8 * WAITING):
        idle.append(connect(sharing))
        look(sharing)
    with open(os.devnull) as file:
        for end in idle[-WAITING:]:
            with suppress(PermissionError):  # a newer kernel refuses descriptors
                socket.send_fds(end, [b"junk"], [file.fileno()] * 100)
        look(sharing)
    number = share(sharing, 4096)
    for end in idle:
        end.close()
    look(sharing)
    assert sharing.ask("unshare", {"memory": number}).type == "done"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_descriptors_that_nobody_reads_are_few(sharing: Peer) -> None:
    """The kernel lets a user's processes send only so many, and the daemon sends some to its ranks."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    ends = []
    for _ in range(UNREAD):
        ends.append(connect(sharing))
        ends[-1].send(packet({"nbytes": 4096}, sharing.session))
        look(sharing)
        for number in list(sharing.state.groups.host.memories._held):
            assert sharing.ask("unshare", {"memory": number}).type == "done"
    assert refusal(sharing, packet({"nbytes": 4096}, sharing.session)) == "QueueFull"
    _, descriptors, _, _ = socket.recv_fds(ends[0], wire.SHARE_BYTES, 1)
    os.close(descriptors[0])
    number = share(sharing, 4096)
    assert sharing.ask("unshare", {"memory": number}).type == "done"
    for end in ends:
        end.close()
    look(sharing)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def channel(peer: Peer) -> tuple[int, socket.socket]:
    """The id of a memory of 4096 bytes, and the client's end of its channel."""
    with connect(peer) as end:
        end.send(packet({"nbytes": 4096, "completions": True}, peer.session))
        look(peer)
        got, descriptors, _, _ = socket.recv_fds(end, wire.SHARE_BYTES, 4)
    reply = decode([got[:5], got[5:]])
    assert (reply.type, len(descriptors)) == ("done", 2)
    os.close(descriptors[0])
    return reply.body["memory"], socket.socket(fileno=descriptors[1])


def hear(peer: Peer) -> None:
    """Have the server read what has come by channels."""
    memories = peer.state.groups.host.memories
    peer.server._hear(memories.receive(memories.sources, MESSAGES_A_TURN))


@pytest.fixture
def turn(sharing: Peer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Has the server act on what is ready, as its loop does; there are no ranks."""
    monkeypatch.setattr(sharing.state.groups, "poll", lambda: None)
    with ExitStack() as stack:
        wakeup, waker = map(stack.enter_context, socket.socketpair())
        waker.send(b"now")
        yield lambda: sharing.server.turn(wakeup.fileno())


def by_channel(theirs: socket.socket, message: Message) -> None:
    """Send a message as a client does that goes past ZeroMQ."""
    theirs.send(wire.join(encode(message)))


def test_a_channel_ends_with_its_memory(sharing: Peer) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    number, theirs = channel(sharing)
    with theirs:
        memory = sharing.state.groups.host.memories.find(sharing.session, number)
        assert memory.channel is not None
        assert memory.descriptors == [memory.fd, memory.channel.fileno()]
        with memory.channel.dup() as ranks:
            sent = 0
            with suppress(BlockingIOError):
                while sent < 1000:
                    ranks.send(bytes([sent % 256]), socket.MSG_DONTWAIT)
                    sent += 1
            assert 8 <= sent < 100, "what a client leaves unread is little"
            assert [theirs.recv(9) for _ in range(sent)] == [bytes([each % 256]) for each in range(sent)]
            assert sharing.ask("unshare", {"memory": memory.id}).type == "done"
            assert theirs.recv(9) == b"", "the daemon's end is closed, though a rank has it"
            with pytest.raises(BrokenPipeError):
                theirs.send(b"nobody reads it")
        hear(sharing)
    look(sharing)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_forward_by_a_channel_is_one_like_others(sharing: Peer, turn: Callable[[], None]) -> None:
    number, theirs = channel(sharing)
    timestep = Tensor("F32", (1,), (bytes(4),))
    body = {"model": "m", "plan": "auto", "arguments": {"x": X, "timestep": timestep}, "memory": number}
    with theirs:
        for request in (5, 6):
            by_channel(theirs, Message("forward", body, request, sharing.session))
        turn()
        jobs = sharing.state.groups.jobs
        assert [(each.session, each.request, each.model) for each in jobs] == [
            (sharing.session, request, "m") for request in (5, 6)
        ]
        assert [bytes(*each.body.arguments["timestep"].frames) for each in jobs] == 2 * [bytes(4)]
        by_channel(theirs, Message("forward", {**body, "room": [0, 64]}, 7, sharing.session))
        turn()
        (told,) = sharing.answers()
        assert (told.id, told.body["code"]) == (7, "ArgumentError")
        by_channel(theirs, Message("forward", body, 8, sharing.session))
        turn()
        (told,) = sharing.answers()
        assert (told.id, told.body["code"]) == (8, "QueueFull")


@pytest.mark.parametrize(("kind", "codes"), [("cancel", ["Cancelled", None]), ("unshare", [None]), ("bye", [])])
def test_what_a_client_says_of_a_forward_comes_behind_it(sharing: Peer, kind: str, codes: list[Any]) -> None:
    """Though the server looked at the channel before the forward came."""
    number, theirs = channel(sharing)
    about = {"cancel": {"job": None, "request": 5}, "unshare": {"memory": number}}.get(kind, {})
    submitted = []
    submit = sharing.state.groups.submit
    sharing.state.groups.submit = lambda job, *more: (submitted.append(job.request), submit(job, *more))
    with theirs:
        hear(sharing)
        by_channel(theirs, Message("forward", forward(X, memory=number), 5, sharing.session))
        sharing.send(Message(kind, about, 6, sharing.session))
        assert [each.body.get("code") for each in sharing.answers(len(codes))] == codes
    assert submitted == [5]
    assert len(sharing.state.groups.jobs) == (kind == "unshare")


def test_the_server_looks_at_what_is_ready_alone(sharing: Peer, turn: Callable[[], None]) -> None:
    """At descriptors that a client hasn't read, too, for which nothing becomes ready."""
    state, looked = sharing.state, []
    memory, access = state.listener.memory, state.listener.access
    assert memory is not None
    for owner, method in ((access, "poll"), (sharing.server, "_receive"), (memory, "poll")):
        act = getattr(owner, method)
        name = f"{type(owner).__name__}.{method}"
        setattr(owner, method, lambda *given, act=act, name=name: (looked.append(name), act(*given)))
    turn()
    assert looked == []
    with connect(sharing) as end:
        end.send(packet({"nbytes": 4096}, sharing.session))
        turn()
        turn()
        assert looked == 2 * ["MemorySocket.poll"]
        _, descriptors, _, _ = socket.recv_fds(end, wire.SHARE_BYTES, 1)
        os.close(descriptors[0])
        turn()
        turn()
        assert looked == 3 * ["MemorySocket.poll"]
    sharing.socket.send_multipart(encode(Message("ping", {}, 5, sharing.session)))
    while "Server._receive" not in looked:
        turn()
    assert [each.id for each in sharing.answers()] == [5]
    assert looked == [*3 * ["MemorySocket.poll"], "Server._receive"]


def test_what_comes_before_a_cancel_has_its_limit(sharing: Peer) -> None:
    """A turn ends with as many messages as it may have, by whichever way they came."""
    number, theirs = channel(sharing)
    memories = sharing.state.groups.host.memories
    refused = Message("forward", {**forward(X, memory=number), "model": "none"}, 5, sharing.session)
    cancel = {"job": None, "request": 5}
    with theirs:
        theirs.setblocking(False)
        for _ in range(EARLIER + 2 * FORWARDS):
            by_channel(theirs, refused)
        sharing.send(Message("cancel", cancel, 6, sharing.session))
        assert [each.id for each in sharing.answers(EARLIER + 1)] == [*EARLIER * [5], 6]
        assert len(memories.receive_of(sharing.session)) == 2 * FORWARDS
        for _ in range(EARLIER):
            by_channel(theirs, refused)
        for request in (7, 8):
            sharing.socket.send_multipart(encode(Message("cancel", cancel, request, sharing.session)))
        assert sharing.state.listener.socket.poll(5000)
        time.sleep(0.1)
        sharing.server._receive()
        assert [each.id for each in sharing.answers(EARLIER + 1)] == [*EARLIER * [5], 7]
        assert sharing.state.listener.socket.poll(0), "the next one waits for another turn"


def test_a_revoked_memory_takes_no_more_forwards(sharing: Peer) -> None:
    """Though a job has it still, and its completion may come."""
    number, theirs = channel(sharing)
    memory = sharing.state.groups.host.memories.find(sharing.session, number)
    with theirs:
        by_channel(theirs, Message("forward", forward(X, memory=number), 5, sharing.session))
        assert sharing.ask("unshare", {"memory": number}).type == "done"
        with pytest.raises(BrokenPipeError):
            by_channel(theirs, Message("forward", forward(X, memory=number), 6, sharing.session))
        assert memory.channel is not None
        memory.channel.send(b"a completion")
        assert theirs.recv(99) == b"a completion"
        assert sharing.state.groups.host.memories.sources == []


def test_a_channel_that_is_closed_with_completions_unread(sharing: Peer) -> None:
    """Its forwards are heard nevertheless, which the kernel gives behind the error."""
    number, theirs = channel(sharing)
    memory = sharing.state.groups.host.memories.find(sharing.session, number)
    assert memory.channel is not None
    memory.channel.send(b"a completion")
    with theirs:
        for request in (5, 6):
            by_channel(theirs, Message("forward", forward(X, memory=number), request, sharing.session))
    hear(sharing)
    assert [each.request for each in sharing.state.groups.jobs] == [5, 6]
    assert sharing.state.groups.host.memories.sources == []


@pytest.mark.parametrize("kind", ["hello", "bye", "ping", "put", "unshare", "cancel", "sample", "drain", "nonsense"])
def test_nothing_but_forwards_comes_by_a_channel(sharing: Peer, kind: str) -> None:
    number, theirs = channel(sharing)
    with theirs:
        by_channel(theirs, Message(kind, {"memory": number}, 5, sharing.session))
        hear(sharing)
        (told,) = sharing.answers()
    assert (told.id, told.body["code"]) == (5, "ProtocolError")
    assert sharing.state.groups.host.memories.find(sharing.session, number)
    assert sharing.ask("ping").type == "done"


def test_junk_in_a_channel_gets_an_error(sharing: Peer) -> None:
    number, theirs = channel(sharing)
    whole = wire.join(encode(Message("forward", forward(X, memory=number), 5, sharing.session)))
    with theirs:
        for junk in (b"x", bytes(4), bytes(400), b"\xff" * 99, whole[:-1], whole + b"x", bytes(2 * wire.FORWARD_BYTES)):
            theirs.send(junk)
            hear(sharing)
            (told,) = sharing.answers()
            assert told.body["code"] == "ProtocolError"


def test_descriptors_that_nobody_asked_for_are_refused_or_closed(sharing: Peer) -> None:
    """To close them takes as long as their sender likes, so kernels that can refuse them do."""
    number, theirs = channel(sharing)
    look(sharing)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
            refused: Any = pytest.raises(PermissionError)
        except OSError:
            refused = nullcontext()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with theirs, open(os.devnull) as file:
        whole = wire.join(encode(Message("forward", forward(X, memory=number), 5, sharing.session)))
        with refused:
            socket.send_fds(theirs, [whole], [file.fileno()] * 50)
            theirs.send(b"")
        with connect(sharing) as asking, refused:
            socket.send_fds(asking, [packet({"nbytes": 8}, sharing.session)], [file.fileno()] * 50)
        hear(sharing)
        look(sharing)
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1


def test_a_channel_serves_its_session_alone(sharing: Peer) -> None:
    number, theirs = channel(sharing)
    other = sharing.state.sessions.open(b"other", "test", 8, MINE)
    with theirs:
        by_channel(theirs, Message("forward", forward(X, memory=number), 5, other.token))
        hear(sharing)
        (told,) = sharing.answers()
    assert (told.type, told.id) == ("unknown_session", 5)
    assert sharing.state.groups.jobs == []


def test_a_flood_in_a_channel_waits_and_a_closed_one_is_left_alone(sharing: Peer) -> None:
    memories = sharing.state.groups.host.memories
    _, theirs = channel(sharing)
    with theirs:
        for _ in range(3 * FORWARDS):
            theirs.send(b"x")
        for _ in range(3):
            assert len(memories.receive(memories.sources, 64)) == FORWARDS
        assert memories.receive([], 64) == memories.receive(memories.sources, 64) == []
        assert len(memories.sources) == 1
    assert memories.receive(memories.sources, 64) == []
    assert memories.sources == [], "its end would be readable for ever"


def test_floods_in_channels_have_their_turns(sharing: Peer) -> None:
    memories = sharing.state.groups.host.memories
    with ExitStack() as stack:
        ends = [stack.enter_context(channel(sharing)[1]) for _ in range(3)]
        for number, theirs in enumerate(ends):
            for _ in range(2 * FORWARDS):
                theirs.send(bytes([number]))
        heard = [memories.receive(memories.sources, FORWARDS + 1) for _ in range(3)]
    assert [len(each) for each in heard] == 3 * [FORWARDS + 1]
    assert [{packet for _, packet in each} for each in heard] == [{b"\0", b"\1"}, {b"\2", b"\0"}, {b"\1", b"\2"}]


def test_after_an_empty_packet_a_channel_takes_no_more(sharing: Peer) -> None:
    """What the client says then goes through ZeroMQ, and is not lost."""
    number, theirs = channel(sharing)
    with theirs:
        theirs.send(b"")
        hear(sharing)
        with pytest.raises(BrokenPipeError):
            by_channel(theirs, Message("forward", forward(X, memory=number), 5, sharing.session))
    assert sharing.state.groups.host.memories.sources == []


def test_without_a_pair_of_sockets_it_is_a_memory_alone(sharing: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(memory_socket, "make_channel", fail)
    with connect(sharing) as end:
        end.send(packet({"nbytes": 4096, "completions": True}, sharing.session))
        look(sharing)
        got, descriptors, _, _ = socket.recv_fds(end, wire.SHARE_BYTES, 4)
    assert decode([got[:5], got[5:]]).type == "done"
    assert len(descriptors) == 1
    os.close(descriptors[0])


@pytest.fixture
def memory(sharing: Peer) -> int:
    """The id of a memory of 4096 bytes."""
    return share(sharing, 4096)


@pytest.mark.parametrize(
    ("x", "room", "argument"),
    [
        (Tensor("F32", (4, 4), None, offset=4096), None, "x"),
        (Tensor("F32", (4, 4), None, offset=1 << 40), None, "x"),
        (Tensor("F32", (1025,), None, offset=0), None, "x"),
        (Tensor("F32", (1 << 37,), None, offset=64), None, "x"),
        ([X, Tensor("F32", (4, 4), None, offset=4096)], None, "x"),
        (X, [4096, 1], "room"),
        (X, [2**62, 2**62], "room"),
        (X, [128, 4096 - 127], "room"),
        (X, [100, 8], "room"),
        (X, [0, 8], "room"),
        ([X, Tensor("F32", (64,), None, offset=256)], [128, 129], "room"),
    ],
)
def test_places_out_of_range_are_refused(sharing: Peer, memory: int, x: Any, room: Any, argument: str) -> None:
    told = sharing.ask("forward", forward(x, memory=memory, room=room))
    assert (told.body["code"], told.body["details"]) == ("ArgumentError", {"argument": argument})
    assert sharing.state.groups.jobs == []


def test_places_without_their_memory_are_refused(sharing: Peer, memory: int) -> None:
    other = sharing.state.groups.host.memories.make(b"other", 4096).id
    for body in (
        forward(X),
        forward(X, memory=None),
        forward(X, memory=other),
        forward(X, memory=memory + 99),
        forward(Tensor("F32", (1,), (bytes(4),)), room=[0, 64]),
        {"model": "m", "plan": "auto", "arguments": {"x": [], "timestep": X}, "memory": memory},
        {"model": "m", "plan": "auto", "arguments": {"x": X, "control": {"tensors": [X]}}, "memory": memory},
    ):
        assert sharing.ask("forward", body).body["code"] == "ArgumentError"
    for kind, fields in (
        ("put", {"tensors": [X]}),
        ("call", {"model": "m", "method": "m", "arguments": {"context": X}}),
        ("piece", {"upload": "u", "offset": 0, "data": X}),
        ("load", {"path": "m", "dtype": None, "patches": [{"diff": X}], "plan": "auto"}),
    ):
        assert sharing.ask(kind, fields).body["code"] == "ProtocolError", kind


@pytest.mark.parametrize("offset", [-64, 1, 63, 2**40 + 64, 0.0, True, None, "0"])
def test_an_offset_that_is_none_is_no_tensor(sharing: Peer, memory: int, offset: Any) -> None:
    (frame,) = encode(Message("forward", forward(X, memory=memory), 9, sharing.session))[1:]
    key = msgpack.packb("offset")
    bent = bytes(frame).replace(key + b"\0", key + msgpack.packb(offset))
    assert bent != frame
    sharing.server._on_message(PEER, [wire.PREAMBLE, bent], lambda: (User(0), None))
    (told,) = sharing.answers()
    assert (told.body["code"], "tensors[0].offset" in told.body["message"]) == ("ProtocolError", True)


def test_a_memory_that_is_given_back_stays_for_the_forward_that_names_it(sharing: Peer, memory: int) -> None:
    memories = sharing.state.groups.host.memories
    sharing.send(Message("forward", forward(X, memory=memory, room=[64, 64]), 10, sharing.session))
    assert sharing.ask("unshare", {"memory": memory}).type == "done"
    assert memories.nbytes == 4096
    assert sharing.ask("forward", forward(X, memory=memory)).body["code"] == "ArgumentError"
    sharing.send(Message("cancel", {"job": None, "request": 10}, 11, sharing.session))
    assert [each.body.get("code") for each in sharing.answers(2)] == ["Cancelled", None]
    assert memories.nbytes == 0


def test_a_sessions_memories_end_with_it(sharing: Peer, memory: int) -> None:
    sharing.send(Message("forward", forward(X, memory=memory), 10, sharing.session))
    sharing.send(Message("bye", {}, 11, sharing.session))
    assert sharing.state.groups.host.memories.nbytes == 0
    assert refusal(sharing, packet({"nbytes": 8}, sharing.session)) == "NotAllowed"


def test_who_gets_no_memory_is_not_told_of_it(peer: Peer) -> None:
    for user, offered in ((User(0), True), (User(key=b"k", name="carol"), False)):
        hello = [bytes(each) for each in encode(Message("hello", {"client": "t", "pid": 7, "version": "0"}, 1))]
        peer.server._on_message(PEER, hello, lambda user=user: (user, None))  # type: ignore[misc]
        (welcome,) = peer.answers()
        assert ("memory" in welcome.body) == ("completions" in welcome.body) == offered


def test_the_socket_goes_with_the_daemon_and_is_its_groups(peer: Peer) -> None:
    path = peer.state.config.socket_path
    beside = path.with_name(path.name + MEMORY_SOCKET)
    assert beside.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o660
    memory = peer.state.listener.memory
    assert memory is not None
    with closing(connect(peer)):
        memory.close()
    assert not beside.exists()
