"""What clients get to hear: sessions on a ROUTER socket, and the daemon's loop."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from tacod.config import Config, ConfigError
from tacod.execution.executor import Executor
from tacod.execution.manifest import Model
from tacod.execution.scheduler import Job
from tacod.execution.store import tensors_of, without_claims
from tacod.group.work import Stepped
from tacod.heap import Leftovers
from tacod.observe.monitor import Monitor
from tacod.serving import messages
from tacod.serving.access import ZAP_DOMAIN, Access, Keys, User
from tacod.serving.guard import Guard, socket_of
from tacod.serving.messages import parse
from tacod.serving.sessions import Session, Sessions
from tacod.serving.unix_socket import PathTaken, UnixSocket
from tacod.serving.uploads import Uploads
from tacod.serving.verbs import Verbs
from tacod_client import wire
from tacod_client.errors import (
    MessageTooLarge,
    ProtocolError,
    QueueFull,
    TacodError,
)
from tacod_client.frames import receive, widen
from tacod_client.wire import Message

if TYPE_CHECKING:
    from tacod.lifecycle import Lifecycle

__all__ = ["Server"]

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 8 * wire.FRAME_BYTES
"""Largest frame that is read at all, so that a client which doesn't split tensors is told so before it is cut off."""
REBIND_S = 2.0
"""How long a port that was given up may take to be free."""
MESSAGES_A_TURN = 64
"""So that a flood from one client can't keep the ranks waiting."""
OUTBOX_MESSAGES = 256
"""What waits for a client that doesn't read; nothing more is done for it until it does."""


class Server:
    """Everything that the supervisor holds, moved on by `turn`."""

    def __init__(
        self, config: Config, devices: list[str], preload: Iterable[Model], folder: Path, keys: Keys | None = None
    ) -> None:
        self.config = config
        self.boot_id = secrets.token_hex(8)
        self.started_s = time.monotonic()
        self.lifecycle: Lifecycle | None = None
        """Whom operators' verbs go to."""
        self._next_probe_s = self.started_s + config.heartbeat_s
        # What can't be made takes with it what was.
        with ExitStack() as made:
            self._context: zmq.Context[Any] = zmq.Context()
            made.callback(self._context.term)
            # Before the first client can come.
            self.access = Access(self._context, keys)
            made.callback(self.access.close)
            self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
            made.callback(self.socket.close)
            self._bind(made)
            self.sessions = Sessions(
                self.socket, config.limits.clients, config.limits.clients_per_user, config.limits.share_bytes
            )
            self.executor = Executor(
                config, devices, preload, folder, on_progress=self._tell_progress, on_end=self._tell_end
            )
            made.callback(self.executor.close)
            self.monitor = Monitor(
                config.group.device, lambda: [(rank.process.pid, rank.device) for rank in self.executor.group.ranks]
            )
            made.callback(self.monitor.close)
            self.uploads = Uploads(config.models.uploads, config.models.upload_bytes, lambda: self.executor.files)
            self._leftovers = Leftovers()
            self._guard = Guard(config.limits.held_bytes, self._addresses(), self.sessions.sockets)
            made.callback(self._guard.close)
            self._verbs = Verbs(self)
            self._made = made.pop_all()

    def _bind(self, made: ExitStack) -> None:
        socket = self.socket
        socket.setsockopt(zmq.LINGER, 2000)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Little is queued in the socket, so that an outbox can still replace stale progress.
        socket.setsockopt(zmq.SNDHWM, 16)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        # Nor are many messages of each client, whatever their size; further ones wait at its end.
        socket.setsockopt(zmq.RCVHWM, 16)
        # A peer that hangs is disconnected, and then the next message to it fails.
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(self.config.heartbeat_s * 500))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(self.config.heartbeat_s * 1000))
        # So is one that connects and doesn't say who it is.
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(max(1.0, self.config.heartbeat_s) * 1000))
        try:
            self._unix = UnixSocket(self.config.socket_path)
        except PathTaken as error:
            raise ConfigError(f"endpoint: {error}") from None
        made.callback(self._unix.remove)
        self._unix_address = self._unix.socket.getsockname()
        # By its number: ZeroMQ would remove whatever is at the path.
        socket.setsockopt(zmq.USE_FD, self._unix.socket.detach())
        socket.bind(b"ipc://" + os.fsencode(self.config.socket_path))  # type: ignore[arg-type]
        socket.setsockopt(zmq.USE_FD, -1)
        if self.config.curve is not None and self.access.keys is not None:
            try:
                _bind_tcp(socket, self.config.curve.listen, self.access.keys)
            except zmq.ZMQError as error:
                raise ConfigError(f"curve.listen: {self.config.curve.listen}: {error.strerror}") from None

    def _addresses(self) -> list[object]:
        """What clients' connections have on this side."""
        curve = self.config.curve
        return [self._unix_address, *([int(curve.listen.rpartition(":")[2])] if curve is not None else [])]

    def go_by(self, config: Config, preload: Iterable[Model], keys: Keys | None) -> None:
        """Go by another configuration, of which what can't change is the same."""
        self.config = config
        self.sessions.limit, self.sessions.limit_per_user = config.limits.clients, config.limits.clients_per_user
        self.sessions.unsent_bytes = config.limits.share_bytes
        self._guard.limit = config.limits.held_bytes
        self.uploads.go_by(config.models.uploads, config.models.upload_bytes)
        self.executor.go_by(config, preload)
        old, self.access.keys = self.access.keys, keys
        for session in self.sessions:
            if not self.access.knows(session.user):
                log.info("client %s (pid %d, %s) is allowed no more", session.name, session.pid, session.user)
                self.end_session(session)
        if config.curve is not None and keys is not None and old is not None and keys.secret != old.secret:
            # Connections under the old key end with it.
            self.socket.unbind(config.curve.listen)
            _bind_tcp(self.socket, config.curve.listen, keys)

    def close(self) -> None:
        """End the ranks and close the sockets."""
        self._made.close()

    # --- the loop -------------------------------------------------------------------------------------------------

    def turn(self, wakeup: int) -> None:
        """Wait for something to happen, on the sockets, to a rank or at the file descriptor ``wakeup``; act on it."""
        poller = zmq.Poller()
        for source in (self.socket, self.access.socket, wakeup, *self.executor.group.sources):
            poller.register(source, zmq.POLLIN)
        poller.poll(self._patience_ms())
        self.access.attend()
        self._receive()
        self.executor.attend()
        self._probe()
        for session in self.sessions.flush():
            log.info("client %s (pid %d, %s) is gone", session.name, session.pid, session.user)
            self.end_session(session)
        self._leftovers.attend(time.monotonic(), self.executor.metrics.rx_bytes + self.sessions.tx_bytes)

    def _patience_ms(self) -> int:
        wait_s = min(1.0, *(moment - time.monotonic() for moment in (self._next_probe_s, *self.executor.wakes_at)))
        if self.sessions.pending:
            wait_s = min(wait_s, 0.01)
        return max(0, int(wait_s * 1000) + 1)

    def _probe(self) -> None:
        """Say something to every client now and then: that is how one that is gone is noticed."""
        now = time.monotonic()
        if now >= self._next_probe_s:
            self._next_probe_s = now + self.config.heartbeat_s
            for session in self.sessions:
                session.post(wire.encode(Message("alive")), key="alive")

    def _receive(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            received = receive(self.socket)
            if received is None:
                return
            peer, *frames = received
            buffers = [frame.buffer for frame in frames]
            self.executor.metrics.rx_bytes += sum(len(buffer) for buffer in buffers)
            self._hear(peer.bytes, buffers, lambda first=peer: self._meet(first))  # type: ignore[misc]

    def _meet(self, first: zmq.Frame) -> tuple[User | None, int]:
        """Make room for what a newcomer, known by a frame that it sent, will be told.

        Returns whose it is, and by which socket it came: 0 if that is gone already.
        """
        widen(first)
        number = 0
        with suppress(zmq.ZMQError):
            number = socket_of(int(first.get(zmq.SRCFD)))
        return self.access.user_of(first), number

    def _hear(self, peer: bytes, frames: Sequence[wire.Buffer], meet: Callable[[], tuple[User | None, int]]) -> None:
        request, token = 0, b""
        try:
            message = wire.decode(frames)
            request, token = message.id, message.session
            kind = messages.REQUESTS.get(message.type)
            if kind is None:
                known = ", ".join(messages.REQUESTS)
                raise ProtocolError(f"type: unknown message {message.type!r:.40}; known are {known}")
            self._check_size(message)
            body = parse(kind, without_claims(message.body))
            if isinstance(body, messages.Hello):
                self._verbs.hello(peer, request, body, *meet())
                return
            session = self.sessions.find(message.session, peer)
            if session is None:
                self._answer(peer, Message("unknown_session", {"boot_id": self.boot_id}, request))
                return
            if len(session.outbox) >= OUTBOX_MESSAGES and message.type not in ("bye", "cancel"):
                raise QueueFull(f"{len(session.outbox)} answers wait for this client to read them; read them first")
            reply = self._verbs.answer(message.type, session, request, body)
            if reply is not None:
                session.post(wire.encode(Message("done", reply, request)))
        except TacodError as error:
            self._refuse(peer, token, request, error)
        except Exception as error:
            # Nobody's message ends the others' daemon.
            log.exception("a message could not be answered")
            told = f"tacod failed over this message ({type(error).__name__}); its log says where; please report it"
            self._refuse(peer, token, request, TacodError(told))

    def _refuse(self, peer: bytes, token: bytes, request: int, error: TacodError) -> None:
        refusal = Message("error", error.to_wire(), request)
        session = self.sessions.find(token, peer)
        if session is not None:
            session.post(wire.encode(refusal))
        else:
            self._answer(peer, refusal)

    def _check_size(self, message: Message) -> None:
        limit = self.config.limits.message_bytes
        size = sum(tensor.nbytes for tensor in tensors_of(message.body) if tensor.frames is not None)
        if size > limit:
            raise MessageTooLarge(
                f"a message of {size} bytes; limits.message_bytes is {limit}; send smaller batches or raise it",
                limit=limit,
            )

    def _answer(self, peer: bytes, message: Message) -> None:
        """Answer a connection outside of a session's order; one that doesn't listen gets nothing."""
        try:
            self.sessions.send(peer, wire.encode(message))
        except zmq.ZMQError:
            log.debug("an answer to a client that is gone or doesn't listen was dropped")

    def end_session(self, session: Session) -> None:
        """Forget a client, and end what it has queued."""
        self.sessions.close(session)
        self.executor.drop(session.token)
        self.uploads.release(session.token)

    # --- what jobs come to ----------------------------------------------------------------------------------------

    def _tell_progress(self, job: Job, body: dict[str, Any]) -> None:
        session = self.sessions.get(job.session)
        if session is not None:
            session.post(wire.encode(Message("progress", body, job.request)), key=job.id)

    def _tell_end(self, job: Job, step: Stepped | None) -> None:
        session = self.sessions.get(job.session)
        if session is None:
            return
        if job.error is not None:
            session.post(wire.encode(Message("error", job.error.to_wire(), job.request)))
        else:
            session.post(wire.encode(Message("done", self._result(job, step), job.request)))

    def _result(self, job: Job, step: Stepped | None) -> dict[str, Any]:
        if isinstance(job.body, Model):
            model = self.executor.manifest.find(job.model)
            return {"model": model.planned(job.body.asked, self.executor.group.world_size).to_wire()}
        if step is None:
            return {"model": job.model}
        return {
            "out": step.out,
            "plan": step.plan,
            "ranks": step.ranks,
            "steps": job.steps,
            "skipped": job.skipped,
            "attempts": job.attempts,
            "timing": job.times,
            "single_rank_s": self.executor.single_rank_s(job),
        }


def _bind_tcp(socket: zmq.Socket[bytes], listen: str, keys: Keys) -> None:
    """Serve TCP too. What is set here is for what is bound from here on: the unix socket asks for no keys."""
    socket.curve_server = True
    socket.curve_secretkey = keys.secret
    socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    # Were nobody there to be asked, nobody would come in.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.IPV6, "[" in listen)
    deadline = time.monotonic() + REBIND_S
    while True:
        try:
            socket.bind(listen)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                raise
            # An unbind takes a moment.
            time.sleep(0.01)
        else:
            return
