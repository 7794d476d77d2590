"""Clients' sessions: a token, an address, and an outbox of messages that are not sent yet."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import zmq

from tacod.serving.access import User
from tacod.serving.guard import Socket
from tacod_client import wire
from tacod_client.errors import QueueFull
from tacod_client.frames import send
from tacod_client.wire import Buffer, Message

__all__ = ["Session", "Sessions"]

log = logging.getLogger(__name__)

UNSENT_MESSAGES = 1024
"""A client that leaves more messages than this unread counts as gone."""


@dataclass
class Session:
    """One client, from its hello to its bye."""

    token: bytes
    peer: bytes
    """Its address on the ROUTER socket, which ends with its connection."""
    name: str
    pid: int
    user: User
    socket: Socket | None = None
    """The daemon's end of its connection."""
    outbox: OrderedDict[object, Sequence[Buffer]] = field(default_factory=OrderedDict)
    """Messages by key, in order. Progress of a job has the job's key, so the latest replaces what was not sent."""

    def post(self, frames: Sequence[Buffer], key: object | None = None) -> None:
        """Put a message in the outbox; it replaces an unsent one with the same ``key``."""
        self.outbox[key if key is not None else object()] = frames

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait for the client to read them."""
        return sum(len(memoryview(frame)) for frames in self.outbox.values() for frame in frames)


class Sessions:
    """All sessions, and the socket by which they are reached.

    At most ``unsent_bytes`` of unread messages are kept for all of them: beyond that, the client with the most of them
    counts as gone. A client's only message waits whatever its size.
    """

    def __init__(self, socket: zmq.Socket[bytes], limit: int, limit_per_user: int, unsent_bytes: int) -> None:
        self.socket = socket
        self.limit = limit
        self.limit_per_user = limit_per_user
        self.unsent_bytes = unsent_bytes
        self._sessions: dict[bytes, Session] = {}
        self.rx_bytes = self.tx_bytes = 0
        """Bytes from clients and to clients since the start."""

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def sockets(self) -> list[int]:
        """The numbers of the sockets of clients that have a session; another thread may ask for them."""
        return [session.socket.number for session in self if session.socket is not None]

    def open(self, peer: bytes, name: str, pid: int, user: User, socket: Socket | None = None) -> Session:
        """A new session for the client at ``peer``, which came by this ``socket``.

        Raises `QueueFull` at a limit.
        """
        if len(self) >= self.limit:
            raise QueueFull(
                f"{len(self)} clients are connected, which is the limit (limits.clients); close one, or raise it",
                limit=self.limit,
            )
        if self.of(user) >= self.limit_per_user:
            raise QueueFull(
                f"{self.of(user)} clients of {user} are connected, which is the limit (limits.clients_per_user); "
                "close one, or raise it",
                limit=self.limit_per_user,
            )
        session = Session(secrets.token_bytes(16), peer, name, pid, user, socket)
        self._sessions[session.token] = session
        return session

    def of(self, user: User) -> int:
        """How many sessions a user has."""
        return sum(session.user == user for session in self._sessions.values())

    def find(self, token: bytes, peer: bytes) -> Session | None:
        """The session with this token, if it belongs to this connection."""
        session = self._sessions.get(token)
        return session if session is not None and session.peer == peer else None

    def get(self, token: bytes) -> Session | None:
        """The session with this token, if there still is one."""
        return self._sessions.get(token)

    def close(self, session: Session) -> None:
        """Forget a session."""
        self._sessions.pop(session.token, None)

    @property
    def pending(self) -> bool:
        """Whether a message waits in an outbox."""
        return any(session.outbox for session in self._sessions.values())

    def flush(self) -> list[Session]:
        """Send what can be sent without waiting. Returns the sessions whose clients are gone or no longer read."""
        gone = [session for session in self if session.outbox and not self.deliver(session)]
        return gone + self._slow([session for session in self if session.outbox and session not in gone])

    def deliver(self, session: Session) -> bool:
        """Send what waits for one client, as far as that can be done without waiting.

        Returns whether the client is still there.
        """
        if session.outbox and session.socket is not None and not session.socket.is_open:
            # Its address may be another peer's now.
            return False
        while session.outbox:
            key, frames = next(iter(session.outbox.items()))
            try:
                self.send(session.peer, frames)
            except zmq.Again:
                break
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                return False
            del session.outbox[key]
        return True

    def _slow(self, sessions: Sequence[Session]) -> list[Session]:
        """Those of these sessions whose clients leave too much unread."""
        slow = [session for session in sessions if len(session.outbox) > UNSENT_MESSAGES]
        unsent = {session.token: session.unsent_bytes for session in sessions if session not in slow}
        while sum(unsent.values()) > self.unsent_bytes:
            most = self._sessions[max(unsent, key=lambda token: unsent[token])]
            if len(unsent) == len(most.outbox) == 1:
                break
            slow.append(most)
            del unsent[most.token]
        return slow

    def reply(self, peer: bytes, token: bytes, message: Message) -> None:
        """Answer a connection, in its session's order if the ``token`` is that of its session.

        Without a session, one that is gone or doesn't read gets nothing.
        """
        session = self.find(token, peer)
        if session is not None:
            session.post(wire.encode(message))
            return
        try:
            self.send(peer, wire.encode(message))
        except zmq.ZMQError:
            log.debug("an answer to a client that is gone or doesn't read was dropped")

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        """Send to one connection without waiting; raises `zmq.Again` or EHOSTUNREACH."""
        send(self.socket, [peer, *frames], zmq.DONTWAIT)
        self.tx_bytes += sum(len(memoryview(frame)) for frame in frames)
