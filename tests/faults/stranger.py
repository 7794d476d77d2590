"""A client that says what it likes, on a bare socket."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import zmq
from protocol.test_mutations import TOKEN

from tacod_client.shared import Shared
from tacod_client.wire import MEMORY_SOCKET, Message, decode, encode, join

PING = 123456789
PATIENCE = 50
"""After so many messages it sees whether the daemon still answers as it should."""
ANSWER_S = 30.0
AGAIN_MS = 1000


class Stranger:
    """Says whatever frames it is given, under a session that the daemon knows, until the block ends.

    It says them through ZeroMQ and by the channel of a memory.
    """

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._session = b""
        self._memories = os.fsencode(endpoint.removeprefix("ipc://") + MEMORY_SOCKET)
        self._shared: Shared | None = None
        self.said = self.by_channel = 0
        self.settle()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shared is not None:
            self._shared.close()
        self._socket.close()
        self._context.term()

    def say(self, frames: Sequence[bytes]) -> None:
        """Send these frames, the stand-in for a session's token replaced by the real one."""
        if not frames:
            return
        frames = [frame.replace(TOKEN, self._session or TOKEN) for frame in frames]
        self._socket.send_multipart(frames)
        assert self._shared is not None
        for memory in self._shared._memories:
            assert memory.channel is not None
            # Another message may have given the memory back. Or the daemon is slow to read, or the packet too large.
            try:
                memory.channel.send(join(frames))
                self.by_channel += 1
            except BrokenPipeError:
                self._share()
                break
            except OSError:
                pass
        self.said += 1
        if self.said % PATIENCE == 0:
            self.settle()

    def _share(self) -> None:
        """Have a memory with a channel, if the daemon still knows the session."""
        if self._shared is not None:
            self._shared.close()
        self._shared = Shared(self._memories, self._session, completes=True, forwards=True)
        self._shared.take(1)

    def settle(self) -> None:
        """The daemon answers a good request, whatever it heard before; under a new session if need be."""
        answer = self._ask(Message("ping", {}, PING, self._session))
        if answer.type == "unknown_session":
            # A hello that stayed sound has opened another session in the place of this one.
            welcome = self._ask(Message("hello", {"client": "stranger", "pid": 1, "version": "0"}, PING))
            self._session = welcome.body["session"]
            self._share()
            assert self._shared is not None
            assert self._shared._memories
            answer = self._ask(Message("ping", {}, PING, self._session))
        assert answer.type == "done", answer

    def _ask(self, message: Message) -> Message:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            # To a connection without a session, the daemon drops what is more than its queue takes; so ask again.
            self._socket.send_multipart(encode(message))
            while self._socket.poll(AGAIN_MS):
                answer = decode(self._socket.recv_multipart())
                if answer.id == PING:
                    return answer
        raise AssertionError(f"the daemon doesn't answer {message.type} within {ANSWER_S:g} s")
