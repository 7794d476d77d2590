"""What clients send takes bounded memory of the supervisor, and it is given back when they are gone."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import zmq
from helpers import SD3, Daemon, answered, eventually

from tacod.serving.guard import STRANGERS
from tacod_client import Client, wire
from tacod_client.wire import Message

from .bare import BarePeer

MIB = 1 << 20
STORE_BYTES = 16 * MIB
MESSAGE_BYTES = 8 * MIB
HELD_BYTES = STORE_BYTES + 4 * MESSAGE_BYTES + 256 * MIB
"""The least that limits.memory_bytes may be, and its default."""
BETWEEN_BYTES = 600 * MIB
"""What may come between two looks on a machine that is busy with other things."""
LEFT_BYTES = 100 * MIB
GIVEN_BACK_S = 10.0


@pytest.fixture(scope="module")
def small(patient: Daemon) -> Iterator[Daemon]:
    """A daemon that holds little, and whose clients needn't answer."""
    with patient.changed({"limits.store_bytes": STORE_BYTES, "limits.message_bytes": MESSAGE_BYTES}):
        with patient.client() as client:
            SD3.check(client.load(SD3.file))
        yield patient


@pytest.fixture
def client(small: Daemon) -> Iterator[Client]:
    """A good client, for which all goes on as before."""
    with small.client() as client:
        model = client.load(SD3.file)
        SD3.check(model)
        yield client
        SD3.check(model)


def own(daemon: Daemon) -> int:
    """The supervisor's own memory."""
    memory = psutil.Process(daemon.pid).memory_info()
    return int(memory.rss - memory.shared)


def check_given_back(daemon: Daemon, before: int) -> None:
    """It is back to where it was, or soon will be."""
    eventually(lambda: own(daemon) < before + LEFT_BYTES, 2 * GIVEN_BACK_S, "the memory is given back")


def send(daemon: Daemon, messages: int, frames: int, nbytes: int) -> None:
    """Messages that are refused, each once the one before was."""
    frame = bytes(nbytes)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(daemon.endpoint)
        for _ in range(messages):
            socket.send_multipart([b"TACO\x01", *[frame] * frames], copy=False)
            assert answered(socket, 60).type == "error"


@pytest.mark.parametrize(("messages", "frames", "mib"), [(6, 1, 64), (1, 4, 64), (20, 1, 8)])
def test_refused_messages(small: Daemon, client: Client, messages: int, frames: int, mib: int) -> None:
    """Also those of frames that would lie in the heap, and stay there."""
    before = own(small)
    send(small, messages, frames, mib * MIB)
    check_given_back(small, before)


@pytest.mark.parametrize("nbytes", [16 << 10, MIB, 64 * MIB])
def test_a_message_that_never_ends(small: Daemon, client: Client, nbytes: int) -> None:
    """libzmq has no bound for it, so its connection ends; the good client's job is done all the same."""
    before, most = own(small), 0
    with BarePeer(str(small.socket)) as peer:
        times = max(1, MIB // nbytes)
        while peer.say(bytes(nbytes), times=times):
            most = max(most, own(small))
            assert peer.said < 10 * HELD_BYTES, "it takes whatever it is told"
    assert most < before + HELD_BYTES + BETWEEN_BYTES
    assert "limits.memory_bytes" in small.log
    check_given_back(small, before)


def test_many_that_each_hold_a_little(small: Daemon, client: Client) -> None:
    before = own(small)
    with ExitStack() as stack:
        peers = [stack.enter_context(BarePeer(str(small.socket))) for _ in range(40)]
        for peer in peers:
            peer.say(bytes(8 * MIB - 1), times=2)
        eventually(lambda: own(small) < before + HELD_BYTES, 20, "it holds no more than it may")
    check_given_back(small, before)


def test_one_with_a_session_that_holds_too_much(small: Daemon, client: Client) -> None:
    """And then waits, so that nothing shows whose it is; the good client may be cut off too, and comes back."""
    before = own(small)
    with BarePeer(str(small.socket)) as peer:
        header, body = wire.encode(Message("hello", {"client": "t", "pid": 1, "version": "0"}, 1))
        peer.say(bytes(header))
        peer.say(bytes(body), more=False)
        eventually(lambda: client.status()["clients"] == 2, 10, "it has a session")
        for _ in range(3 * HELD_BYTES // (4 * MIB)):
            if not peer.say(bytes(4 * MIB)):
                break
        eventually(lambda: peer.cut_off or own(small) < before + HELD_BYTES, 20, "it holds no more than it may")
    check_given_back(small, before)


def test_more_strangers_than_there_may_be(small: Daemon, client: Client) -> None:
    with ExitStack() as stack:
        for _ in range(STRANGERS + 100):
            stack.enter_context(BarePeer(str(small.socket)))
        connections = psutil.Process(small.pid)
        eventually(lambda: connections.num_fds() < STRANGERS + 80, 20, "there are fewer")
    assert "connections without a session" in small.log


def test_a_daemon_takes_all_the_descriptors_that_it_may_have(models: Path) -> None:
    """A shell's default of 1024 is soon too few, and libzmq ends the process over the next connection then."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    daemon = Daemon(1, [models])
    daemon.wrapper = ["prlimit", f"--nofile={STRANGERS}:{most}"]
    with daemon, daemon.client() as client, ExitStack() as stack:
        process = psutil.Process(daemon.pid)
        assert process.rlimit(resource.RLIMIT_NOFILE) == (most, most)
        for _ in range(STRANGERS + 100):
            stack.enter_context(BarePeer(str(daemon.socket)))
        eventually(lambda: process.num_fds() < STRANGERS + 80, 20, "there are fewer")
        SD3.check(client.load(SD3.file))
