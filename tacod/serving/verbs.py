"""Clients' requests, a method for each verb: each request is checked, and answered or queued as a job."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from tacod import __version__
from tacod.config import ConfigError
from tacod.execution.executor import Executor
from tacod.execution.manifest import Manifest, Model
from tacod.execution.memories import check_places
from tacod.execution.scheduler import Job, Verb, Work
from tacod.execution.store import Named, digests_of, tensors_of, without_claims
from tacod.group.work import Alike, Forward, MethodCall, Sample, Unload
from tacod.lifecycle import Lifecycle
from tacod.observe.baselines import shapes_of
from tacod.serving import messages, report
from tacod.serving.access import User
from tacod.serving.admission import check_admission
from tacod.serving.guard import Socket
from tacod.serving.server import Admit
from tacod.serving.sessions import Session
from tacod.serving.state import State
from tacod_client import wire
from tacod_client.errors import (
    ArgumentError,
    ConfigInvalid,
    JobNotFound,
    MessageTooLarge,
    NotAllowed,
    ProtocolError,
    QueueFull,
)
from tacod_client.wire import MAX_STEPS, Message, map_tensors

__all__ = ["Verbs"]

log = logging.getLogger(__name__)

ADDRESS_BYTES = 5
"""Of an address that libzmq itself gives a peer: a zero and a number. Any other is what the peer says that it is."""
OUTBOX_MESSAGES = 256
"""Most unread replies of a client; requests beyond that are refused."""


@dataclass(frozen=True, eq=False)
class _Known:
    """What was found out about forwards of one form. It doesn't depend on the daemon's state.

    It holds none of their tensors' bytes.
    """

    named: Named
    alike: Alike


class Verbs:
    """The daemon's verbs. A method that returns None is answered later, when its job ends."""

    def __init__(self, state: State, lifecycle: Lifecycle) -> None:
        self.state = state
        self.lifecycle = lifecycle
        self._jobs_made = 0

    def answer(self, peer: bytes, message: Message, admit: Admit | None) -> None:
        """Do what a client's message asks; raises a `TacodError` if it can't be done."""
        known = message.form.known if message.form is not None else None
        if isinstance(known, _Known):
            # Its body was checked when the first one of its form came.
            self._check_size(known.named.nbytes)
            session = self._session(peer, message)
            if session is not None:
                self._forward(session, message, known)
            return
        kind = messages.REQUESTS.get(message.type)
        if kind is None:
            names = ", ".join(messages.REQUESTS)
            raise ProtocolError(f"type: unknown message {message.type!r:.40}; known are {names}")
        tensors = list(tensors_of(message.body))
        self._check_size(sum(tensor.nbytes for tensor in tensors if tensor.frames is not None))
        if any(each.frames is not None and each.digest is not None for each in tensors):
            message = replace(message, body=without_claims(message.body), form=None)
        body = messages.parse(kind, message.body)
        if isinstance(body, messages.Hello):
            assert admit is not None
            self.hello(peer, message.id, body, *admit())
            return
        session = self._session(peer, message)
        if session is None:
            return
        if isinstance(body, messages.Forward):
            known = self._learn(session, body)
            if message.form is not None:
                message.form.known = known
            self._forward(session, message, known)
            return
        if any(each.offset is not None for each in tensors):
            raise ProtocolError(f"{message.type}: no tensor of it may lie in shared memory; send it as frames")
        reply: dict[str, Any] | None = getattr(self, message.type)(session, message.id, body)
        if reply is not None:
            session.post(wire.encode(Message("done", reply, message.id)))

    def _session(self, peer: bytes, message: Message) -> Session | None:
        """The session of a message; None if there is none, which its client has been told then."""
        sessions = self.state.sessions
        session = sessions.find(message.session, peer)
        if session is None:
            unknown = Message("unknown_session", {"boot_id": self.state.boot_id}, message.id)
            sessions.reply(peer, message.session, unknown)
            return None
        if len(session.outbox) >= OUTBOX_MESSAGES and message.type not in ("bye", "cancel"):
            raise QueueFull(f"{len(session.outbox)} answers wait for this client to read them; read them first")
        return session

    def _check_size(self, size: int) -> None:
        limit = self.state.config.limits.message_bytes
        if size > limit:
            raise MessageTooLarge(
                f"a message of {size} bytes; limits.message_bytes is {limit}; send smaller batches or raise it",
                limit=limit,
            )

    def hello(self, peer: bytes, request: int, body: messages.Hello, user: User | None, socket: Socket | None) -> None:
        """Open a session; the only verb that needs none."""
        if len(peer) != ADDRESS_BYTES or peer[0] != 0:
            raise ProtocolError(
                "hello: this client's ZeroMQ socket has a routing id of its own, which another client could have after "
                "it; set no routing id"
            )
        for old in self.state.sessions:
            if old.peer == peer:
                self.state.end_session(old)
        if user is None:
            raise NotAllowed("this client's key was taken off the allow-list; ask the operator for another")
        # It is shown in logs and terminals.
        name = "".join(each if each.isprintable() else "?" for each in body.client)
        session = self.state.sessions.open(peer, name, body.pid, user, socket)
        log.info("client %s (pid %d, %s) is here", session.name, session.pid, user)
        limits = self.state.config.limits
        welcome: dict[str, Any] = {
            "session": session.token,
            "boot_id": self.state.boot_id,
            "version": __version__,
            "limits": {"message_bytes": limits.message_bytes, "store_bytes": limits.store_bytes, "queue": limits.queue},
        }
        has_memory = self.state.listener.memory is not None and self.state.groups.host.memories.limit
        if session.user.uid is not None and has_memory:
            welcome["memory"] = wire.MEMORY_SOCKET
            welcome["completions"] = welcome["forwards"] = True
        session.post(wire.encode(Message("welcome", welcome, request)))

    def bye(self, session: Session, request: int, body: messages.Empty) -> None:
        """End the session and its queued jobs."""
        self.state.end_session(session)

    def ping(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        """Answer, to show that the daemon lives."""
        return {"boot_id": self.state.boot_id}

    def put(self, session: Session, request: int, body: messages.Put) -> dict[str, Any]:
        """Store tensors by content."""
        for tensor in body.tensors:
            if tensor.frames is None:
                raise ArgumentError("tensors: a tensor to keep must come with its bytes", argument="tensors")
        return {"digests": self.state.groups.host.store.put_all(body.tensors, session.token, time.monotonic())}

    def begin_upload(self, session: Session, request: int, body: messages.BeginUpload) -> dict[str, Any]:
        """Announce a model file."""
        uploads = self.state.uploads
        name, here = uploads.begin(body.nbytes, body.digests, session.token)
        return {
            "upload": name,
            "here": here,
            "unchecked": uploads.unchecked(name),
            "path": str(uploads.path(name)),
        }

    def piece(self, session: Session, request: int, body: messages.Piece) -> dict[str, Any]:
        """Take a piece of an announced file."""
        if body.data.frames is None:
            raise ArgumentError("data: a piece must come with its bytes", argument="data")
        piece = b"".join(body.data.frames)
        return {"here": self.state.uploads.add(body.upload, body.offset, piece, session.token)}

    def load(self, session: Session, request: int, body: messages.Load) -> dict[str, Any] | None:
        """Queue the load of a model."""
        for path in (body.path, *(patch.get("path") for patch in body.patches or () if isinstance(patch, dict))):
            if isinstance(path, str):
                self.state.uploads.check(path)

        def describe(manifest: Manifest, ranks: int) -> Model:
            return manifest.describe(body.path, body.dtype, body.patches, body.plan, ranks, body.weights)

        executor, model = self.state.groups.place(session.token, describe)
        reply = None
        if model.id in executor.manifest:
            executor.residency.note_used(model.id, session.token, time.monotonic())
            reply = report.loaded(executor, model)
        else:
            stored = replace(model, patches=self._stored(session, model.patches))
            self._submit(session, request, Verb.LOAD, model.id, stored, Named.of(stored.patches), executor=executor)
        # Unless its patches' tensors are to come first.
        self.state.uploads.note_load(self.state.groups.files.intersection(model.file_paths))
        return reply

    def _stored(self, session: Session, patches: Any) -> Any:
        """Patches whose tensors are all in the store, and named by digest: a model may be kept for long."""
        store, now = self.state.groups.host.store, time.monotonic()
        inline = [tensor for tensor in tensors_of(patches) if tensor.frames is not None]
        named = map_tensors(patches, lambda each: each.with_digest().without_bytes())
        if inline:
            store.claim(session.token, digests_of(named), now)
            store.put_all(inline, session.token, now)
        return named

    def unload(self, session: Session, request: int, body: messages.Unload) -> None:
        """Queue the unloading of a model."""
        self.state.groups.check_model(body.model)
        self._submit(session, request, Verb.UNLOAD, body.model, Unload(body.model), Named.of(None))

    def _learn(self, session: Session, body: messages.Forward) -> _Known:
        """What holds for all forwards that differ from this one in tensors' bytes alone.

        Raises `ArgumentError` for places in shared memory that can't be, and `ModelNotFound`.
        """
        self.state.groups.check_model(body.model)
        latents = list(tensors_of(body.arguments.get("x")))
        rest = tensors_of({name: each for name, each in body.arguments.items() if name != "x"})
        if any(each.offset is not None for each in rest):
            raise ArgumentError("arguments: only x may lie in shared memory; send others as frames", argument="x")
        if body.memory is not None:
            # A memory never changes its size, and no other one gets its id.
            check_places(self.state.groups.host.memories.find(session.token, body.memory), latents, body.room)
        elif body.room is not None or any(each.offset is not None for each in latents):
            raise ArgumentError("memory: missing, though the message has places in one", argument="memory")
        alike = Alike(shapes_of(body.arguments))
        return _Known(Named.of([body.plan, body.arguments]), alike)

    def _forward(self, session: Session, message: Message, known: _Known) -> None:
        """Queue a forward whose body has been checked."""
        body = message.body
        model, memory = body["model"], body.get("memory")
        self.state.groups.check_model(model)
        if memory is not None:
            self.state.groups.host.memories.find(session.token, memory)
        # Of a message without a form the tensors have been changed.
        alike, frames = (None, ()) if message.form is None else (known.alike, message.frames)
        room = body.get("room")
        work = Forward(model, body["plan"], body["arguments"], session.token, memory, room, alike, frames)
        self._submit(session, message.id, Verb.FORWARD, model, work, known.named)

    def unshare(self, session: Session, request: int, body: messages.Unshare) -> dict[str, Any]:
        """Take a shared memory back."""
        self.state.groups.host.memories.give_back(session.token, body.memory)
        return {}

    def call(self, session: Session, request: int, body: messages.Call) -> None:
        """Queue a call of a network's method outside of the forward."""
        self.state.groups.check_model(body.model)
        self._submit(session, request, Verb.CALL, body.model, MethodCall(**dict(body)), Named.of(dict(body)))

    def sample(self, session: Session, request: int, body: messages.Sample) -> None:
        """Queue a sampling run."""
        self.state.groups.check_model(body.model)
        if len(body.sigmas.shape) != 1 or body.sigmas.shape[0] < 2:
            raise ArgumentError(
                f"sigmas: expected shape [steps + 1] with at least 1 step, got {list(body.sigmas.shape)}",
                argument="sigmas",
            )
        steps = body.sigmas.shape[0] - 1
        if steps > MAX_STEPS:
            raise ArgumentError(f"sigmas: {steps} steps; give {MAX_STEPS} at most", argument="sigmas")
        self._submit(session, request, Verb.SAMPLE, body.model, Sample(**dict(body)), Named.of(dict(body)), steps)

    def _submit(
        self,
        session: Session,
        request: int,
        verb: Verb,
        model: str,
        body: Work,
        named: Named,
        steps: int = 1,
        executor: Executor | None = None,
    ) -> None:
        """Queue a job, or reply with those ``named`` tensors that the store lacks.

        A load goes to the group of ``executor``.
        """
        store = self.state.groups.host.store
        store.check_fits(named.sizes)
        missing = store.missing(named.digests)
        if missing:
            store.claim(session.token, named.digests, time.monotonic())
            session.post(wire.encode(Message("missing", {"digests": missing}, request)))
            return
        store.disclaim(session.token)
        store.check(named.tensors)
        check_admission(self.state, session, named)
        self._jobs_made += 1
        job = Job(
            id=f"{self.state.boot_id[:4]}-{self._jobs_made}",
            session=session.token,
            request=request,
            verb=verb,
            model=model,
            body=body,
            steps=steps,
            nbytes=named.nbytes,
            digests=named.digests,
            submitted_s=time.monotonic(),
        )
        self.state.groups.submit(job, executor)
        if verb is Verb.SAMPLE:
            session.post(wire.encode(Message("accepted", {"job": job.id, "total": steps}, request)))

    def cancel(self, session: Session, request: int, body: messages.Cancel) -> dict[str, Any]:
        """Cancel a job; another user's only for an admin."""
        job_id = body.job
        for job in self.state.groups.jobs:
            owner = self.state.sessions.get(job.session)
            if job.id == job_id and owner is not None and owner.user != session.user:
                self._check_admin(session, f"cancel a job of {owner.user}")
        if job_id is None:
            mine = (session.token, body.request)
            job_id = next((job.id for job in self.state.groups.jobs if (job.session, job.request) == mine), None)
        if job_id is None:
            raise JobNotFound(f"request {body.request} is neither queued nor running", request=body.request)
        done = self.state.groups.cancel(job_id)
        return {"job": job_id, "state": "cancelled" if done else "cancelling"}

    def _check_admin(self, session: Session, what: str) -> None:
        if not self.state.listener.access.is_admin(session.user):
            how = "use sudo" if session.user.uid is not None else "curve.admins lacks this key"
            raise NotAllowed(f"{session.user} may not {what}: that is for root and for tacod's own user; {how}")

    def reload(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        """Read the configuration again."""
        self._check_admin(session, "reload")
        try:
            return {"changed": self.lifecycle.reload()}
        except ConfigError as error:
            raise ConfigInvalid(f"not reloaded: {error}") from None

    def drain(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        """Finish running work, refuse new work, and stop."""
        self._check_admin(session, "drain")
        log.info("%s (pid %d, %s) asks to drain", session.name, session.pid, session.user)
        return {"jobs": self.lifecycle.drain()}

    def models(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        """The loaded models."""
        return {"models": report.models(self.state)}

    def ps(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        """The running jobs and the queued ones."""
        return {"jobs": report.jobs(self.state)}

    def status(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        """The state of the daemon now."""
        return report.status(self.state)

    def stats(self, session: Session, request: int, body: messages.Empty) -> dict[str, Any]:
        """Counts and times since the start."""
        return report.stats(self.state)
