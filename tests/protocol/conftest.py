"""A server without ranks, and a client's bare socket at its other end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from tacod.config import Config
from tacod.daemon import assemble
from tacod.serving.access import User
from tacod.serving.server import Server
from tacod.serving.state import State
from tacod_client.wire import Message, decode, encode

PEER = b"\0peer"
"""An address of the form that libzmq itself gives."""


class Peer:
    """A client's bare socket, its session, and the server at the other end."""

    def __init__(self, server: Server, state: State, socket: zmq.Socket[bytes]) -> None:
        self.server = server
        self.state = state
        self.socket = socket
        self.send(Message("hello", {"client": "test", "pid": 7, "version": "0"}, 1))
        (welcome,) = self.answers()
        self.session: bytes = welcome.body["session"]

    def send(self, message: Message) -> None:
        """Have the server hear a message, as from its socket."""
        self.server._on_message(PEER, [bytes(frame) for frame in encode(message)], lambda: (User(0), None))

    def ask(self, kind: str, body: dict[str, Any] | None = None, request: int = 9) -> Message:
        """A request and its one answer."""
        self.send(Message(kind, body or {}, request, self.session))
        (answer,) = self.answers()
        assert answer.id == request
        return answer

    def answers(self, count: int = 1) -> list[Message]:
        """The next answers."""
        deadline = time.monotonic() + 5
        got: list[Message] = []
        while len(got) < count:
            assert time.monotonic() < deadline
            self.state.sessions.flush()
            if self.socket.poll(1):
                got.append(decode(self.socket.recv_multipart()))
        return got


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    config = Config.model_validate(
        {
            "endpoint": f"ipc://{tmp_path}/s",
            "group": {"device": "cpu"},
            "limits": {"message_bytes": 1 << 20, "queue": 2, "clients": 1 << 20},
        }
    )
    with ExitStack() as ending, zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        state, server, _ = assemble(config, "", [["cpu:0"]], [[]], tmp_path, None, ending)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IDENTITY, PEER)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(config.endpoint)
        socket.send(b"here")
        state.listener.socket.recv_multipart()
        yield Peer(server, state, socket)
