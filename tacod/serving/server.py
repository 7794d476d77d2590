"""Client-facing ROUTER socket and the daemon's event loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import zmq

from tacod.heap import Leftovers
from tacod.serving.access import User
from tacod.serving.guard import Socket, socket_of
from tacod.serving.state import State
from tacod_client import wire
from tacod_client.decoder import Decoder
from tacod_client.errors import ProtocolError, TacodError
from tacod_client.frames import receive, widen
from tacod_client.wire import Message

__all__ = ["Admit", "AnswerMessage", "Server"]

log = logging.getLogger(__name__)

MESSAGES_A_TURN = 64
"""Most messages read in a turn, and most that come by channels, so that a client's flood can't keep the ranks waiting.
"""
BEHIND = ("cancel", "unshare", "bye")
"""What a client says after forwards, which may wait in a channel."""

_Source = zmq.Socket[bytes] | int
Admit = Callable[[], tuple[User | None, Socket | None]]
"""Admits a newcomer: its user, None if the key is no longer allowed, and its socket, None if that is gone."""
AnswerMessage = Callable[[bytes, Message, Admit | None], None]
"""Answers a message of the client at an address; there is no `Admit` for one that came by a channel. Raises a
`TacodError` to refuse it.
"""


class Server:
    """Receives clients' messages, moves the ranks' work on and sends waiting messages, a `turn` at a time."""

    def __init__(self, state: State, answer: AnswerMessage) -> None:
        self._state = state
        self._answer = answer
        self._socket = state.listener.socket
        self._access = state.listener.access
        self._leftovers = Leftovers()
        self._decoder = Decoder("forward")
        self._poller = zmq.Poller()
        self._sources: list[_Source] = []
        """What `_poller` waits for."""
        self._next_probe_s = state.started_s + state.config.heartbeat_s

    def turn(self, wakeup: int) -> None:
        """Wait for an event on the sockets, of a rank or at the file descriptor ``wakeup``, and act on it."""
        state = self._state
        memory = state.listener.memory
        own = memory.sources if memory is not None else []
        channels = state.groups.host.memories.sources
        sources: list[_Source] = [self._socket, self._access.socket, wakeup, *own, *channels, *state.groups.sources]
        if sources != self._sources:
            self._sources, self._poller = sources, zmq.Poller()
            for source in sources:
                self._poller.register(source, zmq.POLLIN)
        ready = {source for source, _ in self._poller.poll(self._patience_ms())}
        if self._access.socket in ready:
            self._access.poll()
        self._hear(state.groups.host.memories.receive(ready, MESSAGES_A_TURN))
        if self._socket in ready:
            self._receive()
        if memory is not None and (memory.is_unread or not ready.isdisjoint(own)):
            memory.poll(state.share)
        state.groups.poll()
        self._probe()
        for session in state.sessions.flush():
            log.info("client %s (pid %d, %s) is gone", session.name, session.pid, session.user)
            state.end_session(session)
        self._leftovers.attend(time.monotonic(), state.sessions.rx_bytes + state.sessions.tx_bytes)

    def _patience_ms(self) -> int:
        moments = (self._next_probe_s, *self._state.groups.wakes_at)
        wait_s = min(1.0, *(moment - time.monotonic() for moment in moments))
        if self._state.sessions.pending:
            wait_s = min(wait_s, 0.01)
        return max(0, int(wait_s * 1000) + 1)

    def _probe(self) -> None:
        """Send something to every client now and then, to notice those that are gone."""
        now = time.monotonic()
        if now >= self._next_probe_s:
            self._next_probe_s = now + self._state.config.heartbeat_s
            for session in self._state.sessions:
                session.post(wire.encode(Message("alive")), key="alive")

    def _receive(self) -> None:
        left = MESSAGES_A_TURN
        while left > 0:
            received = receive(self._socket)
            if received is None:
                return
            peer, *frames = received
            buffers = [frame.buffer for frame in frames]
            self._state.sessions.rx_bytes += sum(len(buffer) for buffer in buffers)
            left -= self._on_message(peer.bytes, buffers, lambda first=peer: self._admit(first))  # type: ignore[misc]

    def _hear(self, forwards: Iterable[tuple[bytes, bytes]]) -> None:
        """Answer packets that came by channels, each with its session."""
        sessions = self._state.sessions
        for owner, packet in forwards:
            session = sessions.get(owner)
            if session is not None:
                sessions.rx_bytes += len(packet)
                self._on_message(session.peer, wire.cut(packet), None)

    def _admit(self, first: zmq.Frame) -> tuple[User | None, Socket | None]:
        """Make room for what is sent to a newcomer, known by the ``first`` frame that it sent."""
        widen(first)
        socket = None
        with suppress(zmq.ZMQError):
            fd = int(first.get(zmq.SRCFD))
            if number := socket_of(fd):
                socket = Socket(fd, number)
        return self._access.user_of(first), socket

    def _on_message(self, peer: bytes, frames: Sequence[wire.Buffer], admit: Admit | None) -> int:
        """Have a message answered, and the forwards that come before it; ``admit`` is None if it came by a channel.

        Returns how many these are together.
        """
        request, token, answered = 0, b"", 1
        try:
            message = self._decoder.decode(frames)
            request, token = message.id, message.session
            if admit is None and message.type != "forward":
                raise ProtocolError(f"{message.type}: only forwards come by a memory's channel; send it through ZeroMQ")
            if message.type in BEHIND:
                earlier = self._state.groups.host.memories.receive_of(message.session)
                answered += len(earlier)
                self._hear(earlier)
            self._answer(peer, message, admit)
        except TacodError as error:
            self._refuse(peer, token, request, error)
        except Exception as error:
            # Nobody's message ends the others' daemon.
            log.exception("a message could not be answered")
            info = f"tacod failed over this message ({type(error).__name__}); its log says where; please report it"
            self._refuse(peer, token, request, TacodError(info))
        return answered

    def _refuse(self, peer: bytes, token: bytes, request: int, error: TacodError) -> None:
        self._state.sessions.reply(peer, token, Message("error", error.to_wire(), request))
