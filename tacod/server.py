"""What clients get to hear: sessions on a ROUTER socket, one method a verb, and the daemon's loop."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import zmq

from tacod import __version__, messages, report
from tacod.config import Config
from tacod.executor import Executor
from tacod.manifest import Model
from tacod.messages import parse
from tacod.monitor import Monitor
from tacod.scheduler import Job, Verb
from tacod.sessions import Session, Sessions
from tacod.store import digests_of, tensors_of
from tacod.uploads import Uploads
from tacod_client import wire
from tacod_client.errors import ArgumentError, JobNotFound, MessageTooLarge, ProtocolError, QueueFull, TacodError
from tacod_client.wire import Message

__all__ = ["Server"]

log = logging.getLogger(__name__)

MESSAGES_A_TURN = 64
"""So that a flood from one client can't keep the ranks waiting."""
OUTBOX_MESSAGES = 256
"""What waits for a client that doesn't read; nothing more is done for it until it does."""


class Server:
    """Everything that the supervisor holds, moved on by `turn`."""

    def __init__(self, config: Config, devices: list[str], preload: Iterable[Model], folder: Path) -> None:
        self.config = config
        self.boot_id = secrets.token_hex(8)
        self.started_s = time.monotonic()
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._bind()
        self.sessions = Sessions(self.socket, config.limits.clients)
        self.executor = Executor(
            config, devices, preload, self._context, folder, on_progress=self._tell_progress, on_end=self._tell_end
        )
        self.monitor = Monitor(
            config.group.device, lambda: [(rank.process.pid, rank.device) for rank in self.executor.group.ranks]
        )
        self.uploads = Uploads(config.models.uploads, config.models.upload_bytes)
        self._next_probe_s = self.started_s + config.heartbeat_s
        self._jobs_made = 0
        self._verbs: dict[str, Callable[[Session, int, Any], dict[str, Any] | None]] = {
            "bye": self._bye,
            "ping": self._ping,
            "put": self._put,
            "begin_upload": self._begin_upload,
            "piece": self._piece,
            "load": self._load,
            "unload": self._unload,
            "forward": self._forward,
            "sample": self._sample,
            "cancel": self._cancel,
            "status": self._status,
            "stats": self._stats,
            "models": self._models,
            "ps": self._ps,
        }

    def _bind(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 2000)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Little is queued in the socket, so that an outbox can still replace stale progress.
        socket.setsockopt(zmq.SNDHWM, 16)
        socket.setsockopt(zmq.MAXMSGSIZE, self.config.limits.message_bytes)
        # A peer that hangs is disconnected, and then the next message to it fails.
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(self.config.heartbeat_s * 500))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(self.config.heartbeat_s * 1000))
        mask = os.umask(0o117)
        try:
            socket.bind(self.config.endpoint)
        finally:
            os.umask(mask)
        return socket

    def close(self) -> None:
        """End the ranks and close the sockets."""
        self.monitor.close()
        self.executor.close()
        self.socket.close()
        self._context.term()

    # --- the loop -------------------------------------------------------------------------------------------------

    def turn(self, wakeup: int) -> None:
        """Wait for something to happen, on the sockets, to a rank or at the file descriptor ``wakeup``; act on it."""
        poller = zmq.Poller()
        group = self.executor.group
        for source in (self.socket, group.socket, wakeup, *group.pidfds):
            poller.register(source, zmq.POLLIN)
        poller.poll(self._patience_ms())
        self._receive()
        self.executor.attend()
        self._probe()
        for session in self.sessions.flush():
            log.info("client %s (pid %d) is gone", session.name, session.pid)
            self._end_session(session)

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
            try:
                peer, *frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            buffers = [frame.buffer for frame in frames]
            self.executor.metrics.rx_bytes += sum(len(buffer) for buffer in buffers)
            self._hear(peer.bytes, buffers)

    def _hear(self, peer: bytes, frames: Sequence[wire.Buffer]) -> None:
        request = 0
        try:
            message = wire.decode(frames)
            request = message.id
            kind = messages.REQUESTS.get(message.type)
            if kind is None:
                known = ", ".join(messages.REQUESTS)
                raise ProtocolError(f"type: unknown message {message.type!r:.40}; known are {known}")
            self._check_size(message)
            body = parse(kind, message.body)
            if isinstance(body, messages.Hello):
                self._hello(peer, request, body)
                return
            session = self.sessions.find(message.session, peer)
            if session is None:
                self._answer(peer, Message("unknown_session", {"boot_id": self.boot_id}, request))
                return
            if len(session.outbox) >= OUTBOX_MESSAGES and message.type not in ("bye", "cancel"):
                raise QueueFull(f"{len(session.outbox)} answers wait for this client to read them; read them first")
            reply = self._verbs[message.type](session, request, body)
            if reply is not None:
                session.post(wire.encode(Message("done", reply, request)))
        except TacodError as error:
            self._answer(peer, Message("error", error.to_wire(), request))

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

    def _end_session(self, session: Session) -> None:
        self.sessions.close(session)
        self.executor.drop(session.token)

    # --- what jobs come to ----------------------------------------------------------------------------------------

    def _tell_progress(self, job: Job, body: dict[str, Any]) -> None:
        session = self.sessions.get(job.session)
        if session is not None:
            session.post(wire.encode(Message("progress", body, job.request)), key=job.id)

    def _tell_end(self, job: Job, answer: dict[str, Any]) -> None:
        session = self.sessions.get(job.session)
        if session is None:
            return
        if job.error is not None:
            session.post(wire.encode(Message("error", job.error.to_wire(), job.request)))
        else:
            session.post(wire.encode(Message("done", self._result(job, answer), job.request)))

    def _result(self, job: Job, answer: dict[str, Any]) -> dict[str, Any]:
        if job.verb is Verb.LOAD:
            model = self.executor.manifest.find(job.model)
            return {"model": model.planned(job.body.asked, self.executor.group.world_size).to_wire()}
        if job.verb is Verb.UNLOAD:
            return {"model": job.model}
        return {
            "out": answer["out"],
            "plan": answer["plan"],
            "ranks": answer["ranks"],
            "steps": job.steps,
            "attempts": job.attempts,
            "timing": job.times,
            "single_rank_s": self.executor.single_rank_s(job),
        }

    # --- verbs ----------------------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, request: int, body: messages.Hello) -> None:
        for old in self.sessions:
            if old.peer == peer:
                self._end_session(old)
        session = self.sessions.open(peer, body.client, body.pid)
        limits = self.config.limits
        welcome = {
            "session": session.token,
            "boot_id": self.boot_id,
            "version": __version__,
            "limits": {"message_bytes": limits.message_bytes, "store_bytes": limits.store_bytes, "queue": limits.queue},
        }
        session.post(wire.encode(Message("welcome", welcome, request)))

    def _bye(self, session: Session, request: int, body: messages.Empty) -> None:
        self._end_session(session)

    def _ping(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        return {"boot_id": self.boot_id}

    def _put(self, session: Session, request: int, body: messages.Put) -> dict[str, Any]:
        for tensor in body.tensors:
            if tensor.frames is None:
                raise ArgumentError("tensors: a tensor to keep must come with its bytes", argument="tensors")
        return {"digests": [self.executor.store.put(tensor) for tensor in body.tensors]}

    def _begin_upload(self, session: Session, request: int, body: messages.BeginUpload) -> dict[str, Any]:
        name, here = self.uploads.begin(body.nbytes, body.digests)
        return {"upload": name, "here": here, "path": str(self.uploads.path(name))}

    def _piece(self, session: Session, request: int, body: messages.Piece) -> dict[str, Any]:
        if body.data.frames is None:
            raise ArgumentError("data: a piece must come with its bytes", argument="data")
        return {"here": self.uploads.add(body.upload, body.offset, b"".join(body.data.frames))}

    def _load(self, session: Session, request: int, body: messages.Load) -> dict[str, Any] | None:
        manifest = self.executor.manifest
        world_size = self.executor.group.world_size
        model = manifest.describe(body.path, body.dtype, body.patches, body.plan, world_size)
        if model.id in manifest:
            return {"model": manifest.find(model.id).planned(model.asked, world_size).to_wire()}
        self._submit(session, request, Verb.LOAD, model.id, model)
        return None

    def _unload(self, session: Session, request: int, body: messages.Unload) -> None:
        self.executor.manifest.find(body.model)
        self._submit(session, request, Verb.UNLOAD, body.model, {"model": body.model})

    def _forward(self, session: Session, request: int, body: messages.Forward) -> None:
        self.executor.manifest.find(body.model)
        self._submit(session, request, Verb.FORWARD, body.model, dict(body))

    def _sample(self, session: Session, request: int, body: messages.Sample) -> None:
        self.executor.manifest.find(body.model)
        if len(body.sigmas.shape) != 1 or body.sigmas.shape[0] < 2:
            raise ArgumentError(
                f"sigmas: expected shape [steps + 1] with at least 1 step, got {list(body.sigmas.shape)}",
                argument="sigmas",
            )
        self._submit(session, request, Verb.SAMPLE, body.model, dict(body), body.sigmas.shape[0] - 1)

    def _submit(self, session: Session, request: int, verb: Verb, model: str, body: Any, steps: int = 1) -> None:
        """Queue a job, or tell the client which tensors the store lacks for it."""
        digests = body.digests if isinstance(body, Model) else digests_of(body)
        missing = self.executor.store.missing(digests)
        if missing:
            session.post(wire.encode(Message("missing", {"digests": missing}, request)))
            return
        self._jobs_made += 1
        job = Job(
            id=f"{self.boot_id[:4]}-{self._jobs_made}",
            session=session.token,
            request=request,
            verb=verb,
            model=model,
            body=body,
            steps=steps,
            digests=digests,
            submitted_s=time.monotonic(),
        )
        self.executor.submit(job)
        if verb is Verb.SAMPLE:
            session.post(wire.encode(Message("accepted", {"job": job.id, "total": steps}, request)))

    def _cancel(self, session: Session, request: int, body: messages.Cancel) -> dict[str, Any]:
        job_id = body.job
        if job_id is None:
            mine = (session.token, body.request)
            job_id = next((job.id for job in self.executor.scheduler.jobs if (job.session, job.request) == mine), None)
        if job_id is None:
            raise JobNotFound(f"request {body.request} is neither queued nor running", request=body.request)
        done = self.executor.cancel(job_id)
        return {"job": job_id, "state": "cancelled" if done else "cancelling"}

    def _models(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        return {"models": [model.to_wire() for model in self.executor.manifest]}

    def _ps(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        scheduler = self.executor.scheduler
        jobs = []
        for job in scheduler.jobs:
            owner = self.sessions.get(job.session)
            jobs.append(
                {
                    "job": job.id,
                    "verb": job.verb.value,
                    "state": "running" if job is scheduler.running else "queued",
                    "model": job.model,
                    "step": job.step,
                    "total": job.steps,
                    "client": f"{owner.name} (pid {owner.pid})" if owner else None,
                    "age_s": round(time.monotonic() - job.submitted_s, 3),
                }
            )
        return {"jobs": jobs}

    def _status(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        return report.status(self)

    def _stats(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        return report.stats(self)
