"""Clients' requests, a method for each verb: each request is checked, and answered or queued as a job."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tacod import __version__
from tacod.config import ConfigError
from tacod.execution.executor import Executor
from tacod.execution.manifest import Manifest, Model
from tacod.execution.memories import check_places
from tacod.execution.scheduler import Job, Verb, Work
from tacod.execution.store import COUNT, digests_of, tensors_of, without_claims
from tacod.group.work import Forward, MethodCall, Sample, Unload
from tacod.lifecycle import Lifecycle
from tacod.serving import messages, report
from tacod.serving.access import User
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
from tacod_client.wire import MAX_STEPS, Message, Tensor, map_tensors

__all__ = ["Verbs"]

log = logging.getLogger(__name__)

OUTBOX_MESSAGES = 256
"""Most unread replies of a client; requests beyond that are refused."""


class Verbs:
    """The daemon's verbs. A method that returns None is answered later, when its job ends."""

    def __init__(self, state: State, lifecycle: Lifecycle) -> None:
        self.state = state
        self.lifecycle = lifecycle
        self._jobs_made = 0

    def answer(self, peer: bytes, message: Message, admit: Admit) -> None:
        """Do what a client's message asks; raises a `TacodError` if it can't be done."""
        kind = messages.REQUESTS.get(message.type)
        if kind is None:
            known = ", ".join(messages.REQUESTS)
            raise ProtocolError(f"type: unknown message {message.type!r:.40}; known are {known}")
        tensors = list(tensors_of(message.body))
        self._check_size(tensors)
        claims = any(each.frames is not None and each.digest is not None for each in tensors)
        body = messages.parse(kind, without_claims(message.body) if claims else message.body)
        if isinstance(body, messages.Hello):
            self.hello(peer, message.id, body, *admit())
            return
        sessions = self.state.sessions
        session = sessions.find(message.session, peer)
        if session is None:
            unknown = Message("unknown_session", {"boot_id": self.state.boot_id}, message.id)
            sessions.reply(peer, message.session, unknown)
            return
        if len(session.outbox) >= OUTBOX_MESSAGES and message.type not in ("bye", "cancel"):
            raise QueueFull(f"{len(session.outbox)} answers wait for this client to read them; read them first")
        if not isinstance(body, messages.Forward) and any(each.offset is not None for each in tensors):
            raise ProtocolError(f"{message.type}: no tensor of it may lie in shared memory; send it as frames")
        reply: dict[str, Any] | None = getattr(self, message.type)(session, message.id, body)
        if reply is not None:
            session.post(wire.encode(Message("done", reply, message.id)))

    def _check_size(self, tensors: Sequence[Tensor]) -> None:
        limit = self.state.config.limits.message_bytes
        size = sum(tensor.nbytes for tensor in tensors if tensor.frames is not None)
        if size > limit:
            raise MessageTooLarge(
                f"a message of {size} bytes; limits.message_bytes is {limit}; send smaller batches or raise it",
                limit=limit,
            )

    def hello(self, peer: bytes, request: int, body: messages.Hello, user: User | None, socket: int) -> None:
        """Open a session; the only verb that needs none."""
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
        welcome = {
            "session": session.token,
            "boot_id": self.state.boot_id,
            "version": __version__,
            "limits": {"message_bytes": limits.message_bytes, "store_bytes": limits.store_bytes, "queue": limits.queue},
        }
        has_memory = self.state.listener.memory is not None and self.state.groups.host.memories.limit
        if session.user.uid is not None and has_memory:
            welcome["memory"] = wire.MEMORY_SOCKET
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
            self._submit(session, request, Verb.LOAD, model.id, stored, stored.patches, executor=executor)
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
        self._submit(session, request, Verb.UNLOAD, body.model, Unload(body.model), dict(body))

    def forward(self, session: Session, request: int, body: messages.Forward) -> None:
        """Queue a forward."""
        self.state.groups.check_model(body.model)
        self._check_memory(session, body)
        forward = Forward(body.model, body.plan, body.arguments, session.token, body.memory, body.room)
        self._submit(session, request, Verb.FORWARD, body.model, forward, dict(body))

    def _check_memory(self, session: Session, body: messages.Forward) -> None:
        """Check the places in shared memory that a forward names. Raises `ArgumentError`."""
        latents = list(tensors_of(body.arguments.get("x")))
        rest = tensors_of({name: each for name, each in body.arguments.items() if name != "x"})
        if any(each.offset is not None for each in rest):
            raise ArgumentError("arguments: only x may lie in shared memory; send others as frames", argument="x")
        if body.memory is not None:
            check_places(self.state.groups.host.memories.find(session.token, body.memory), latents, body.room)
        elif body.room is not None or any(each.offset is not None for each in latents):
            raise ArgumentError("memory: missing, though the message has places in one", argument="memory")

    def unshare(self, session: Session, request: int, body: messages.Unshare) -> dict[str, Any]:
        """Take a shared memory back."""
        self.state.groups.host.memories.give_back(session.token, body.memory)
        return {}

    def call(self, session: Session, request: int, body: messages.Call) -> None:
        """Queue a call of a network's method outside of the forward."""
        self.state.groups.check_model(body.model)
        self._submit(session, request, Verb.CALL, body.model, MethodCall(**dict(body)), dict(body))

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
        self._submit(session, request, Verb.SAMPLE, body.model, Sample(**dict(body)), dict(body), steps)

    def _submit(
        self,
        session: Session,
        request: int,
        verb: Verb,
        model: str,
        body: Work,
        named: Any,
        steps: int = 1,
        executor: Executor | None = None,
    ) -> None:
        """Queue a job, or reply with those tensors of ``named`` that the store lacks.

        A load goes to the group of ``executor``.
        """
        store = self.state.groups.host.store
        named = list(tensors_of(named))
        digests = digests_of(named)
        store.check_fits(named)
        missing = store.missing(digests)
        if missing:
            store.claim(session.token, digests, time.monotonic())
            session.post(wire.encode(Message("missing", {"digests": missing}, request)))
            return
        store.disclaim(session.token)
        store.check(named)
        self._check_share(session, digests)
        limit = self.state.config.limits.queue_per_user
        if self._jobs_of(session.user) >= limit:
            raise QueueFull(
                f"{limit} jobs of {session.user} are queued, which is the limit (limits.queue_per_user); wait for one",
                limit=limit,
            )
        nbytes = sum(tensor.nbytes for tensor in named if tensor.frames is not None)
        self._check_room(nbytes)
        self._jobs_made += 1
        job = Job(
            id=f"{self.state.boot_id[:4]}-{self._jobs_made}",
            session=session.token,
            request=request,
            verb=verb,
            model=model,
            body=body,
            steps=steps,
            nbytes=nbytes,
            digests=digests,
            submitted_s=time.monotonic(),
        )
        self.state.groups.submit(job, executor)
        if verb is Verb.SAMPLE:
            session.post(wire.encode(Message("accepted", {"job": job.id, "total": steps}, request)))

    def _check_share(self, session: Session, digests: list[bytes]) -> None:
        """Check that one client's jobs leave room in the store: all but the first may need half of it together.

        Raises `QueueFull`.
        """
        store = self.state.groups.host.store
        mine = {each for job in self.state.groups.jobs if job.session == session.token for each in job.digests}
        if not mine or mine.issuperset(digests):
            return
        all_of = mine.union(digests)
        held, limit = store.size_of(all_of), store.limit // 2
        if held > limit or len(all_of) > COUNT // 2:
            raise QueueFull(
                f"this client's jobs would need {held} bytes and {len(all_of)} tensors of the store, and may need half "
                f"of it: {limit} bytes (limits.store_bytes) and {COUNT // 2} tensors; wait for one to end",
                limit=limit,
            )

    def _check_room(self, nbytes: int) -> None:
        """Raise `QueueFull` if queued jobs' own tensors and this many bytes more exceed their share of the memory."""
        limit = self.state.config.limits.share_bytes
        queued = sum(job.nbytes for job in self.state.groups.jobs)
        if queued and queued + nbytes > limit:
            raise QueueFull(
                f"queued jobs hold {queued} bytes of tensors, and {nbytes} more are over their share of "
                f"limits.memory_bytes, {limit}; wait for one to end",
                limit=limit,
            )

    def _jobs_of(self, user: User) -> int:
        owners = (self.state.sessions.get(job.session) for job in self.state.groups.jobs)
        return sum(owner is not None and owner.user == user for owner in owners)

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
