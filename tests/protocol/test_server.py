"""The server hears damaged messages from a client that has a session, without ranks: nothing but answers come of it."""

from __future__ import annotations

import errno
import gc
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from helpers import FLUX, answered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.fake_ranks import Clock

from tacod import daemon, lifecycle
from tacod.config import Config
from tacod.daemon import assemble
from tacod.execution.manifest import Model
from tacod.serving import listener
from tacod.serving.access import User
from tacod_client.wire import Message, Tensor, encode

from .conftest import PEER, Peer
from .test_mutations import VALID, damage

PING = 123456789


@pytest.mark.parametrize("part", ["UnixSocket", "Sessions", "Groups", "Monitor", "Uploads", "Guard", "Verbs"])
def test_a_server_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(listener if part == "UnixSocket" else daemon, part, fail)
    config = Config.model_validate({"endpoint": f"ipc://{tmp_path}/s", "group": {"device": "cpu"}})
    contexts = []
    make = zmq.Context
    monkeypatch.setattr(listener.zmq, "Context", lambda: contexts.append(make()) or contexts[-1])
    with ExitStack() as ending, pytest.raises(OSError, match="Too many open files"):
        assemble(config, "", [["cpu:0"]], [[]], tmp_path, None, ending)
    assert [context.closed for context in contexts] == [True]
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(VALID), st.binary(min_size=4, max_size=8), st.booleans())
def test_damage_costs_its_sender_an_error_and_nothing_else(
    peer: Peer, frames: list[bytes], accidents: bytes, known: bool
) -> None:
    if known:
        frames = [frame.replace(bytes(range(16)), peer.session) for frame in frames]
    for start in range(0, len(accidents) - 3, 4):
        frames = damage(frames, accidents[start : start + 4])
    peer.server._on_message(PEER, frames, lambda: (User(0), None))
    peer.send(Message("ping", {}, PING, peer.session))
    said: list[Message] = []
    while not said or said[-1].id != PING:
        said += peer.answers()
    # A hello that stayed sound has opened a new session in the place of the connection's old one.
    (session,) = peer.state.sessions
    assert said[-1].type == ("done" if session.token == peer.session else "unknown_session")
    peer.session = session.token


def test_each_fault_has_its_own_error(peer: Peer) -> None:
    large = Tensor("U8", (2 << 20,), (bytes(2 << 20),))
    for kind, body, code in (
        ("dance", {}, "ProtocolError"),
        ("ping", {"colour": 1}, "ArgumentError"),
        ("put", {"tensors": [large]}, "MessageTooLarge"),
        ("put", {"tensors": [Tensor("U8", (1,), None, bytes(32))]}, "ArgumentError"),
        ("load", {"path": "/etc/passwd", "dtype": None, "patches": None, "plan": "auto"}, "ModelNotAllowed"),
        ("unload", {"model": "none"}, "ModelNotFound"),
        ("forward", {"model": "none", "plan": "auto", "arguments": {}}, "ModelNotFound"),
        ("call", {"model": "none", "method": "m", "arguments": {}}, "ModelNotFound"),
        ("cancel", {"job": "none", "request": None}, "JobNotFound"),
        ("cancel", {"job": None, "request": 5}, "JobNotFound"),
        ("cancel", {"job": None, "request": None}, "JobNotFound"),
    ):
        answer = peer.ask(kind, body)
        assert (answer.type, answer.body["code"]) == ("error", code), kind


def test_jobs_that_wait_hold_their_share_of_the_memory(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is within limits.message_bytes, and the queue has room."""
    peer.state.groups.executors[0].manifest.add(Model("m", "/models/m", "i", None))
    monkeypatch.setattr(type(peer.state.config.limits), "share_bytes", 3000)
    large = Tensor("U8", (2000,), (bytes(2000),))
    body = {"model": "m", "plan": "auto", "arguments": {"x": large}}
    peer.send(Message("forward", body, 10, peer.session))
    answer = peer.ask("forward", body)
    assert (answer.body["code"], answer.body["details"]) == ("QueueFull", {"limit": 3000})
    assert "limits.memory_bytes" in answer.body["message"]
    # What is small still finds room, and so does what comes alone.
    peer.send(Message("forward", {**body, "arguments": {}}, 12, peer.session))
    assert peer.ask("ping").type == "done"
    assert [job.nbytes for job in peer.state.groups.jobs] == [2000, 0]


def test_tensors_that_come_with_a_load_are_the_stores(peer: Peer, tmp_path: Path) -> None:
    """They stay as long as the model does, so they count."""
    file = FLUX.save(tmp_path)
    peer.state.groups.executors[0].manifest.roots = [str(tmp_path)]
    up, alpha = Tensor("F32", (2048,), (bytes(8192),)), Tensor("F32", (), (bytes(4),))
    patch = {"key": "img_in.weight", "kind": "lora", "up": up, "down": up, "alpha": alpha}
    body = {"path": str(file), "dtype": None, "patches": [patch], "plan": "auto"}
    peer.send(Message("load", body, 10, peer.session))
    (job,) = peer.state.groups.jobs
    assert job.digests == [up.with_digest().digest, alpha.with_digest().digest]
    assert peer.state.groups.host.store.nbytes == 8192 + 4


def test_errors_hold_nothing_of_their_messages(peer: Peer) -> None:
    """An error refers to the frames of its traceback, and these to what they worked on."""
    contents = memoryview(np.zeros(1 << 20, np.uint8))
    left = weakref.ref(contents.obj)
    gc.disable()
    try:
        for frames in ([b"TACO\x01", contents], [b"TACO\x01", *encode(Message("ping", {}, 1))[1:], contents]):
            peer.server._on_message(PEER, frames, lambda: (User(0), None))
        assert len(peer.answers(2)) == 2
        del contents, frames
        assert left() is None
    finally:
        gc.enable()


def test_unreadable_message_is_answered_with_id_0(peer: Peer) -> None:
    peer.server._on_message(PEER, [b"TACO\x01", b"\xc1"], lambda: (User(0), None))
    (answer,) = peer.answers()
    assert (answer.type, answer.id, answer.body["code"]) == ("error", 0, "ProtocolError")


def test_wrong_version_is_answered_in_the_right_one(peer: Peer) -> None:
    peer.server._on_message(PEER, [b"TACO\x09", b"whatever version 9 has here"], lambda: (User(0), None))
    (answer,) = peer.answers()
    assert answer.body["details"] == {"version": 1}


def test_unknown_session_is_told_the_boot_id(peer: Peer) -> None:
    peer.session = b"of another boot"
    answer = peer.ask("ping")
    assert (answer.type, answer.body) == ("unknown_session", {"boot_id": peer.state.boot_id})


def test_bye_ends_the_session_in_silence(peer: Peer) -> None:
    peer.send(Message("bye", {}, 4, peer.session))
    assert peer.ask("ping").type == "unknown_session"


def test_stored_tensors_are_answered_by_their_digests(peer: Peer) -> None:
    tensor = Tensor("U8", (2,), (b"ab",))
    answer = peer.ask("put", {"tensors": [tensor, tensor]})
    assert answer.body == {"digests": [tensor.with_digest().digest] * 2}


def test_a_fault_of_ours_costs_one_answer(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the daemon, and with it everybody's work."""

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("nobody thought of this")

    with monkeypatch.context() as patch:
        patch.setattr(peer.server, "_answer", fail)
        answer = peer.ask("ping")
    assert (answer.type, answer.body["code"]) == ("error", "TacodError")
    assert "ZeroDivisionError" in answer.body["message"]
    assert peer.ask("ping").type == "done"


def test_a_name_writes_one_line(peer: Peer) -> None:
    """It is shown in logs, and on operators' terminals."""
    peer.send(Message("hello", {"client": "a\nb\x1b[31m\u202e c", "pid": 7, "version": "0"}, 1))
    (session,) = peer.state.sessions
    assert session.name == "a?b?[31m? c"


HELLO = Message("hello", {"client": "test", "pid": 7, "version": "0"}, 1)


def connected(peer: Peer, context: zmq.Context[Any], address: bytes, message: Message) -> zmq.Socket[bytes]:
    """A bare socket that claims an address, after the server has heard a message from it."""
    while True:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTING_ID, address)
        socket.connect(peer.state.config.endpoint)
        socket.send_multipart(encode(message))
        if peer.state.listener.socket.poll(1000):
            peer.server._receive()
            return socket
        # libzmq ignores it while it still takes leave of another with that address.
        socket.close()


@pytest.mark.parametrize("address", [b"mine", b"\0abc", b"\0abcde", b"12345"])
def test_who_sets_a_routing_id_gets_no_session(peer: Peer, address: bytes) -> None:
    """The next one who sets the same could get what is meant for the first."""
    with zmq.Context() as context, connected(peer, context, address, HELLO) as socket:
        answer = answered(socket, 10)
    assert answer.type == "error"
    assert answer.body["code"] == "ProtocolError"
    assert "set no routing id" in answer.body["message"]
    assert len(peer.state.sessions) == 1


def test_what_is_meant_for_a_client_that_is_gone_goes_to_nobody(peer: Peer) -> None:
    """Even if another connection has its address by now."""
    address = b"\0gone"
    with zmq.Context() as context:
        connected(peer, context, address, HELLO).close()
        _, session = peer.state.sessions
        assert session.peer == address
        with connected(peer, context, address, Message("ping", {}, PING, bytes(16))) as other:
            assert answered(other, 10).type == "unknown_session"
            session.post(encode(Message("done", {}, 2)))
            assert peer.state.sessions.flush() == [session]
            peer.state.sessions.close(session)
            peer.state.sessions.send(address, encode(Message("done", {}, PING)))
            assert answered(other, 10).id == PING


def test_who_does_not_read_keeps_no_daemon_without_ranks(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last message waits as long as after draining."""
    clock = Clock()
    monkeypatch.setattr(lifecycle, "time", clock)
    life = lifecycle.Lifecycle(peer.state, "")
    (session,) = peer.state.sessions
    session.post(encode(Message("error", {}, 2)))
    assert life.turn() is None
    peer.state.groups.executors[0].given_up = "they failed too often"
    assert life.turn() is None
    clock.now += lifecycle.FAREWELL_S - 0.1
    assert life.turn() is None
    clock.now += 0.2
    assert life.turn() == 1
