"""One client's connection to the daemon: a session, requests with their replies, and reconnection.

A restarted daemon knows neither the session nor earlier requests. So every request without a final reply is sent again
in a new session. That is safe, because a forward is a pure function and a load is idempotent.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import zmq

from tacod_client import frames, wire
from tacod_client.decoder import Decoder
from tacod_client.endpoint import Endpoint, find_endpoint
from tacod_client.errors import (
    ConnectionFailed,
    ConnectionLost,
    MessageTooLarge,
    NotAllowed,
    ProtocolError,
    TacodError,
    Unavailable,
)
from tacod_client.request import Request
from tacod_client.shared import Shared
from tacod_client.text import encodable
from tacod_client.version import __version__
from tacod_client.wire import Message

__all__ = ["Connection"]

log = logging.getLogger(__name__)

PING_S = 0.5
"""After this long without a message from the daemon, it is pinged."""
SILENCE_S = 3.0
"""After this long without an answer, the connection counts as dead, and a new one is made."""
SLICE_S = 0.02
"""How long one wait lasts before `on_wait` is called: a click on Cancel is noticed within this time."""
STOPPING_S = 0.25
"""How often a daemon that is about to stop is asked again."""
SETTLE_S = 1.0
"""How long to wait for the answers that follow completions: they come at once, unless a rank hangs."""
WORK = ("load", "forward", "call", "sample")


class Connection:
    """A DEALER socket, a session on it, and the requests that wait for replies.

    Usable from several threads: each wait holds the socket for at most `SLICE_S`.
    """

    def __init__(
        self,
        endpoint: str | None,
        timeout_s: float,
        reconnect_s: float,
        on_wait: Callable[[], None] | None,
        key: str | os.PathLike[str] | None = None,
        server_key: str | os.PathLike[str] | None = None,
    ) -> None:
        self.endpoint = find_endpoint(endpoint)
        self._endpoint = Endpoint(self.endpoint, key, server_key)
        self.timeout_s = timeout_s
        self.reconnect_s = reconnect_s
        self.on_wait = on_wait
        self.boot_id = ""
        """Identifies the run of the daemon that this session is with; it changes when the daemon is restarted."""
        self.limits: dict[str, int] = {}
        self.shared: Shared | None = None
        """The memory that this session shares with the ranks, where the daemon offers that."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        """Waits for messages on the socket, and for completions."""
        self._polled: tuple[int, ...] = ()
        """The descriptors of the channels at which it waits for completions."""
        self._decoder = Decoder("completion")
        self._session = b""
        self._ids = 0
        self._waiting: dict[int, Request] = {}
        self._heard_s = 0.0
        self._pinged_s = 0.0
        self._has_worked = False
        """Whether this daemon has done work for this client: if it then stops, the client waits for the next one."""
        self._unanswered_s: float | None = None
        """When the first of the unanswered pings was sent; None if there is none."""
        self._lock = threading.RLock()
        self._closed = False

    def close(self) -> None:
        """Say goodbye and close the socket; the daemon cancels what this client still has queued.

        Calls that have returned are settled before.
        """
        self.settle()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._socket is not None:
                with suppress(zmq.ZMQError):
                    self._socket.send_multipart(wire.encode(Message("bye", {}, 0, self._session)), zmq.DONTWAIT)
                self._endpoint.close(self._socket, linger_ms=200)
                self._socket = None
            self._end_sharing()
            self._context.term()

    # --- requests -------------------------------------------------------------------------------------------------

    def ask(self, kind: str, build: Callable[[], dict[str, Any]] = dict) -> Message:
        """Send a request and wait for its one reply; it is sent again if the daemon is restarted in between.

        What it asks about is as of after all forwards that have returned, if their answers come in time. Raises the
        `TacodError` that the daemon answers, `ConnectionFailed` or `ConnectionLost`.
        """
        if kind != "cancel":
            self.settle()
        request = self.start(kind, build)
        answered = False
        try:
            reply = next(self.replies(request))
            answered = True
            return reply
        except TacodError:
            answered = True
            raise
        finally:
            if not answered:
                self.cancel(request)
            self.forget(request)

    def start(self, kind: str, build: Callable[[], dict[str, Any]]) -> Request:
        """Send a request; its replies come through `replies`."""
        request = Request(kind, build)
        with self._lock:
            met_before = bool(self.boot_id)
            try:
                self._send(request)
            except ConnectionFailed:
                if self._closed or not met_before:
                    raise
                # The daemon was there and may be restarting: `replies` keeps asking for `reconnect_s`.
                request.lost = True
        return request

    def cancel(self, request: Request) -> None:
        """Have the daemon cancel a request, without waiting for its answer."""
        with self._lock:
            if not request.lost:
                self._tell("cancel", {"job": None, "request": request.id})

    def unshare(self, shared: Shared, memories: Iterable[int]) -> None:
        """Give memories back, without waiting for the answers; those of a session that has ended are freed already."""
        with self._lock:
            for memory in memories if shared is self.shared else ():
                self._tell("unshare", {"memory": memory})

    def _tell(self, kind: str, body: dict[str, Any]) -> None:
        """Send a request whose answer nobody waits for, if that can be done at once."""
        with suppress(zmq.ZMQError):
            if self._socket is not None:
                self._socket.send_multipart(wire.encode(Message(kind, body, 0, self._session)), zmq.DONTWAIT)

    def forget(self, request: Request) -> None:
        """Ignore a request's further replies; if it is completed, its answer is still taken in."""
        with self._lock:
            if not request.completed:
                self._waiting.pop(request.id, None)

    def settle(self) -> None:
        """Take in the answers of requests that are completed by now, which are on their way.

        Whoever waits for a reply takes them in too. What doesn't come within `SETTLE_S` is late: from then on this only
        looks whether it is there.
        """
        until = time.monotonic() + SETTLE_S
        with self._lock:
            pending = [each for each in self._waiting.values() if each.completed]
        while pending:
            with self._lock:
                self._listen()
            pending = [each for each in pending if each.completed]
            if time.monotonic() > until or all(each.late for each in pending):
                for each in pending:
                    each.late = True
                return
            # Another thread that waits for the lock gets it now.
            time.sleep(1e-4)

    def replies(self, request: Request) -> Iterator[Message]:
        """The replies to a request as they come, without end.

        A daemon that stops refuses work, and may be back soon. If it has done work for this client, this waits for it
        as for a lost connection. Raises the error that the daemon answers.
        """
        deadline = time.monotonic() + self.reconnect_s
        stopping = ""
        """Which run of the daemon has refused it, because it ends."""
        while True:
            with self._lock:
                if self._closed and not request.replies:
                    raise ConnectionFailed("this client is closed; make a new one")
                if not request.replies:
                    self._listen()
                if request.lost:
                    self._resend(request, deadline)
                elif self.boot_id != stopping:
                    deadline = time.monotonic() + self.reconnect_s
                reply = request.replies.popleft() if request.replies else None
            if reply is None:
                # Another thread that waits for the lock gets it now.
                time.sleep(1e-4)
                if self.on_wait is not None:
                    self.on_wait()
            elif reply.type == "error":
                error = TacodError.from_wire(reply.body)
                if not self._will_come_back(error) or time.monotonic() > deadline:
                    raise error
                stopping = self.boot_id
                self.pause(STOPPING_S)
                request.lost = True
            else:
                self._has_worked |= reply.type in ("done", "completion") and request.kind in WORK
                yield reply

    def _will_come_back(self, error: TacodError) -> bool:
        return self._has_worked and isinstance(error, Unavailable) and bool(error.details.get("stopping"))

    def pause(self, seconds: float) -> None:
        """Wait like a call, with `on_wait` called."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(SLICE_S)
            if self.on_wait is not None:
                self.on_wait()

    # --- the socket -----------------------------------------------------------------------------------------------

    def _send(self, request: Request) -> None:
        self._ensure_session()
        self._waiting.pop(request.id, None)
        self._ids += 1
        # What was said to an earlier session may name memory that went with it.
        request.send_as(self._ids)
        body = request.build()
        parts = wire.encode(Message(request.kind, body, request.id, self._session))
        size = sum(len(memoryview(part)) for part in parts[2:])
        limit = self.limits.get("message_bytes", size)
        if size > limit:
            raise MessageTooLarge(
                f"{request.kind}: {size} bytes of tensors; the daemon takes {limit} (limits.message_bytes); "
                "send a smaller batch, or raise the limit",
                limit=limit,
            )
        self._waiting[request.id] = request
        memory = body.get("memory") if request.kind == "forward" else None
        if memory is not None and self.shared is not None and self.shared.send(memory, parts):
            return
        try:
            frames.send(self._socket_now(), parts)
        except zmq.Again:
            self._drop_session()
            raise ConnectionFailed(f"tacod at {self.endpoint} takes no messages") from None

    def _resend(self, request: Request, deadline: float) -> None:
        try:
            self._send(request)
        except ConnectionFailed as error:
            if time.monotonic() > deadline:
                raise ConnectionLost(
                    f"tacod at {self.endpoint} went away and did not come back within {self.reconnect_s:g} s; "
                    "see `systemctl status tacod` and `journalctl -u tacod`"
                ) from error
            request.lost = True
            time.sleep(SLICE_S)

    def _socket_now(self) -> zmq.Socket[bytes]:
        if self._closed:
            raise ConnectionFailed("this client is closed; make a new one")
        if self._socket is None:
            self._socket = self._endpoint.open(self._context, self.timeout_s)
            self._wait_for(())
            self._socket.setsockopt(zmq.SNDTIMEO, int(SILENCE_S * 1000))
            self._heard_s = self._pinged_s = time.monotonic()
            self._unanswered_s = None
        return self._socket

    def _ensure_session(self) -> None:
        if self._session and self._socket is not None:
            return
        self._drop_session()
        self._socket_now()
        self._ids += 1
        hello = Request("hello", dict)
        hello.id = self._ids
        self._waiting[hello.id] = hello
        body = {
            "client": encodable(os.path.basename(sys.argv[0] or "python")),
            "pid": os.getpid(),
            "version": __version__,
        }
        deadline = time.monotonic() + self.timeout_s
        try:
            self._socket_now().send_multipart(wire.encode(Message("hello", body, hello.id)))
            while not hello.replies:
                self._read(SLICE_S)
                self._endpoint.check()
                if self.on_wait is not None:
                    self.on_wait()
                if time.monotonic() > deadline:
                    raise zmq.Again
        except (ConnectionFailed, NotAllowed):
            self._drop_session()
            raise
        except zmq.Again:
            self._drop_session()
            raise ConnectionFailed(
                f"tacod at {self.endpoint} does not answer within {self.timeout_s:g} s; see `systemctl status tacod`"
            ) from None
        finally:
            self._waiting.pop(hello.id, None)
        reply = hello.replies.popleft()
        if reply.type == "error":
            self._drop_session()
            raise TacodError.from_wire(reply.body)
        self._session = reply.body["session"]
        self.boot_id = reply.body["boot_id"]
        self.limits = reply.body["limits"]
        path = self._endpoint.memory_path(reply.body.get("memory"))
        offers = [reply.body.get(each) is True for each in ("completions", "forwards")]
        self.shared = Shared(path, self._session, *offers) if path is not None else None

    def _drop_session(self) -> None:
        """Give up the socket and the session; every open request is lost and will be sent again."""
        self._session = b""
        self._end_sharing()
        if self._socket is not None:
            self._endpoint.close(self._socket, linger_ms=0)
            self._socket = None
        for request in self._waiting.values():
            request.lost = True

    def _end_sharing(self) -> None:
        """What was shared in this session goes with it, and so do the answers of requests that are completed."""
        if self.shared is not None:
            self.shared.close()
            self.shared = None
        for request in [each for each in self._waiting.values() if each.completed]:
            del self._waiting[request.id]
            request.end(None)

    def _wait_for(self, channels: tuple[int, ...]) -> None:
        """From now on, wait for messages and for completions at these descriptors."""
        self._polled, self._poller = channels, zmq.Poller()
        for source in (self._socket, *channels):
            self._poller.register(source, zmq.POLLIN)

    def _listen(self) -> None:
        """Wait one slice for messages, and check whether the daemon is still there."""
        if self._socket is None:
            return
        self._read(SLICE_S)
        now = time.monotonic()
        if self._unanswered_s is not None and now - self._unanswered_s > SILENCE_S:
            self._drop_session()
        elif now - max(self._heard_s, self._pinged_s) > PING_S:
            # Silence counts from a question on: between two calls nobody listens, however long that takes.
            self._pinged_s = now
            self._unanswered_s = now if self._unanswered_s is None else self._unanswered_s
            with suppress(zmq.Again):
                ping = wire.encode(Message("ping", {}, 0, self._session))
                self._socket_now().send_multipart(ping, zmq.DONTWAIT)

    def _read(self, wait_s: float) -> None:
        socket, shared = self._socket_now(), self.shared
        if shared is not None and shared.channels is not self._polled:
            self._wait_for(shared.channels)
        ready = self._poller.poll(int(wait_s * 1000))
        if shared is not None and any(source is not socket for source, _ in ready):
            for packet in shared.receive():
                self._complete(packet)
        if not any(source is socket for source, _ in ready):
            return
        # What a message says may end the session, and the socket with it.
        while self._socket is socket:
            parts = frames.receive(socket)
            if parts is None:
                return
            self._heard_s = time.monotonic()
            self._unanswered_s = None
            if not self._session:
                # The first word on a connection.
                frames.widen(parts[0])
            self._take(wire.decode([part.buffer for part in parts]))

    def _take(self, message: Message) -> None:
        if message.type == "unknown_session":
            self._drop_session()
        elif message.id in self._waiting and self._waiting[message.id].take(message):
            del self._waiting[message.id]

    def _complete(self, packet: bytes) -> None:
        """Take in a completion. One that can't be read is no loss, as the answer comes too."""
        head = len(wire.PREAMBLE)
        try:
            message = self._decoder.decode([packet[:head], packet[head:]])
        except ProtocolError as error:
            log.debug("a completion that can't be read: %s", error.message)
            return
        request = self._waiting.get(message.id)
        if request is not None and message.type == "completion" and "out" in message.body:
            request.complete(message)
