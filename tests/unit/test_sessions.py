"""Sessions and their outboxes, on a real ROUTER socket: nothing is lost, nobody waits for a slow client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tacod.serving.access import User
from tacod.serving.sessions import Session, Sessions
from tacod_client.errors import QueueFull

HIGH_WATER = 4
LARGE = b"x" * 200_000
"""More than a unix socket's buffers take, so that a client that doesn't read holds up its pipe."""

ANYONE = User(1000)
Connect = Callable[[str], "zmq.Socket[bytes]"]


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def sessions(context: zmq.Context[Any], tmp_path: Path) -> Iterator[Sessions]:
    """Sessions on a socket that is set up as the server's is."""
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.bind(f"ipc://{tmp_path}/s")
    with socket:
        yield Sessions(socket, limit=3, limit_per_user=2, unsent_bytes=1 << 30)


@pytest.fixture
def connect(context: zmq.Context[Any], sessions: Sessions) -> Iterator[Connect]:
    """A client's socket, once the server has heard it."""
    sockets = []

    def connect(name: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        sockets.append(socket)
        socket.setsockopt(zmq.IDENTITY, name.encode())
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(sessions.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())
        socket.send(b"hello")
        assert sessions.socket.recv_multipart() == [name.encode(), b"hello"]
        return socket

    yield connect
    for socket in sockets:
        socket.close(linger=0)


def drain(sessions: Sessions, socket: zmq.Socket[bytes], count: int) -> list[bytes]:
    """The next so many messages that arrive, while the server keeps flushing."""
    got = []
    deadline = time.monotonic() + 10
    while len(got) < count:
        assert time.monotonic() < deadline, f"only {len(got)} of {count} came"
        assert sessions.flush() == []
        if socket.poll(1):
            got.append(socket.recv_multipart()[0])
    return got


def block(sessions: Sessions, session: Session) -> int:
    """Send a client that doesn't read more than the socket takes; returns how many messages that were."""
    for count in range(1000):
        session.post([b"%d" % count, LARGE])
        sessions.flush()
        time.sleep(0.001)
        if session.outbox:
            time.sleep(0.05)
            sessions.flush()
            if session.outbox:
                return count + 1
    raise AssertionError("the socket takes everything")


def test_token_opens_its_session_on_its_connection_only(sessions: Sessions) -> None:
    one = sessions.open(b"peer1", "comfy", 7, ANYONE)
    two = sessions.open(b"peer2", "comfy", 7, ANYONE)
    assert len(one.token) == 16
    assert one.token != two.token
    assert sessions.find(one.token, b"peer1") is one
    assert sessions.find(one.token, b"peer2") is None
    assert sessions.find(b"", b"peer1") is None
    assert sessions.find(b"guess", b"peer1") is None
    assert sessions.get(one.token) is one


def test_closed_session_is_unknown(sessions: Sessions) -> None:
    session = sessions.open(b"peer", "comfy", 7, ANYONE)
    sessions.close(session)
    sessions.close(session)
    assert sessions.find(session.token, b"peer") is None
    assert sessions.get(session.token) is None
    assert len(sessions) == 0


def test_clients_are_bounded_and_leave_room_when_they_go(sessions: Sessions) -> None:
    opened = [sessions.open(b"%d" % n, "comfy", n, User(n)) for n in range(3)]
    with pytest.raises(QueueFull, match=r"limits\.clients") as caught:
        sessions.open(b"3", "comfy", 3, ANYONE)
    assert caught.value.details == {"limit": 3}
    sessions.close(opened[0])
    sessions.open(b"3", "comfy", 3, ANYONE)


def test_one_user_leaves_room_for_others(sessions: Sessions) -> None:
    for n in range(2):
        sessions.open(b"%d" % n, "comfy", n, ANYONE)
    with pytest.raises(QueueFull, match=r"uid 1000 .*limits\.clients_per_user"):
        sessions.open(b"2", "comfy", 2, ANYONE)
    sessions.open(b"2", "comfy", 2, User(1001))


def test_messages_arrive_in_order(sessions: Sessions, connect: Connect) -> None:
    socket = connect("a")
    session = sessions.open(b"a", "comfy", 7, ANYONE)
    for n in range(3):
        session.post([b"%d" % n])
    assert sessions.pending
    assert drain(sessions, socket, 3) == [b"0", b"1", b"2"]
    assert not sessions.pending
    assert sessions.tx_bytes == 3


def test_unsent_progress_is_replaced_by_the_latest() -> None:
    session = Session(b"token", b"peer", "comfy", 7, ANYONE)
    session.post([b"accepted"])
    for step in range(5):
        session.post([b"progress %d" % step], key="job-1")
    session.post([b"other progress"], key="job-2")
    session.post([b"done"])
    assert list(session.outbox.values()) == [[b"accepted"], [b"progress 4"], [b"other progress"], [b"done"]]


def test_results_are_never_replaced() -> None:
    session = Session(b"token", b"peer", "comfy", 7, ANYONE)
    for _ in range(5):
        session.post([b"done"])
    assert len(session.outbox) == 5


def test_slow_client_gets_every_result_in_order_and_the_latest_progress(sessions: Sessions, connect: Connect) -> None:
    socket = connect("slow")
    session = sessions.open(b"slow", "comfy", 7, ANYONE)
    sent = block(sessions, session)
    for step in range(100):
        session.post([b"progress %d" % step], key="job")
        sessions.flush()
    session.post([b"done"])
    assert drain(sessions, socket, sent + 2) == [*(b"%d" % n for n in range(sent)), b"progress 99", b"done"]


def test_slow_client_delays_nobody(sessions: Sessions, connect: Connect) -> None:
    connect("slow")
    quick = connect("quick")
    block(sessions, sessions.open(b"slow", "comfy", 7, ANYONE))
    sessions.open(b"quick", "comfy", 8, ANYONE).post([b"here"])
    assert drain(sessions, quick, 1) == [b"here"]


def test_client_that_never_reads_is_given_up(sessions: Sessions, connect: Connect) -> None:
    connect("deaf")
    session = sessions.open(b"deaf", "comfy", 7, ANYONE)
    block(sessions, session)
    sessions.unsent_bytes = 1 << 20
    flushed = []
    for _ in range(20):
        session.post([LARGE])
        flushed.append(sessions.flush())
    assert flushed[0] == []
    assert flushed[-1] == [session]


def test_one_message_of_any_size_waits_for_its_client(sessions: Sessions, connect: Connect) -> None:
    connect("slow")
    session = sessions.open(b"slow", "comfy", 7, ANYONE)
    block(sessions, session)
    session.outbox.clear()
    sessions.unsent_bytes = 10
    session.post([LARGE])
    assert sessions.flush() == []


def test_who_leaves_most_unread_goes_when_it_is_too_much_in_all(sessions: Sessions, connect: Connect) -> None:
    """Each on its own would be within what is kept."""
    connect("some")
    connect("most")
    some = sessions.open(b"some", "comfy", 7, ANYONE)
    most = sessions.open(b"most", "comfy", 8, User(1001))
    for session in (some, most):
        block(sessions, session)
        session.outbox.clear()
    sessions.unsent_bytes = 5 * len(LARGE)
    for session, messages in ((some, 2), (most, 3)):
        for _ in range(messages):
            session.post([LARGE])
    assert sessions.flush() == []
    some.post([b"one byte more"])
    assert sessions.flush() == [most]


def test_client_that_is_gone_is_told_by_the_next_message(sessions: Sessions, connect: Connect) -> None:
    socket = connect("gone")
    stays = connect("stays")
    session = sessions.open(b"gone", "comfy", 7, ANYONE)
    other = sessions.open(b"stays", "comfy", 8, ANYONE)
    socket.close(linger=0)
    deadline = time.monotonic() + 5
    gone: list[Session] = []
    while not gone:
        assert time.monotonic() < deadline
        session.post([b"alive"], key="alive")
        gone = sessions.flush()
        time.sleep(0.01)
    assert gone == [session]
    other.post([b"here"])
    sessions.close(session)
    assert drain(sessions, stays, 1) == [b"here"]


def test_peer_that_never_was_is_gone(sessions: Sessions) -> None:
    session = sessions.open(b"nobody", "comfy", 7, ANYONE)
    assert sessions.flush() == [], "nothing to say, nothing to learn"
    session.post([b"alive"])
    assert sessions.flush() == [session]
