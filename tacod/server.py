"""The supervisor's loop: clients on one socket, ranks on another, and the scheduler in between."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zmq

from tacod import __version__, messages
from tacod.config import Config
from tacod.group import Answer, GroupLost, RankGroup, State
from tacod.manifest import Manifest, Model
from tacod.messages import parse
from tacod.metrics import Metrics, StepTimes
from tacod.notify import notify
from tacod.restarts import RestartPolicy
from tacod.scheduler import Job, Outcome, Scheduler, Verb
from tacod.sessions import Session, Sessions
from tacod.store import Store
from tacod_client import wire
from tacod_client.errors import (
    ArgumentError,
    JobNotFound,
    MessageTooLarge,
    ModelNotFound,
    ProtocolError,
    TacodError,
    Unavailable,
)
from tacod_client.wire import Message, Tensor

__all__ = ["Server"]

log = logging.getLogger(__name__)


class Server:
    """Everything that the supervisor holds, moved on by `turn`."""

    def __init__(self, config: Config, devices: list[str], preload: Iterable[Model], folder: Path) -> None:
        self.config = config
        self.boot_id = secrets.token_hex(8)
        self.started_s = time.monotonic()
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self._bind()
        self.sessions = Sessions(self.socket, config.limits.clients)
        self.store = Store(config.limits.store_bytes)
        self.manifest = Manifest(config.models.roots)
        self.metrics = Metrics()
        self.scheduler = Scheduler(config.limits.queue, config.group.retries)
        self.group = RankGroup(config.group, devices, self.context, folder)
        self.restarts = RestartPolicy(config.group.max_restarts, config.group.restart_window_s)
        self.given_up: str | None = None
        """Why the ranks are not started again, once that is so."""
        self._restore = list(preload)
        self._restoring: Model | None = None
        self._spawn_at: float | None = self.started_s
        self._ready_told = False
        self._step_ready_s: dict[str, float] = {}
        """When each started job's next step could have begun."""
        self._queue_s = 0.0
        self._next_probe_s = self.started_s + config.heartbeat_s
        self._jobs_made = 0
        self._verbs: dict[str, Callable[[Session, int, Any], dict[str, Any] | None]] = {
            "bye": self._bye,
            "ping": self._ping,
            "put": self._put,
            "load": self._load,
            "unload": self._unload,
            "forward": self._forward,
            "sample": self._sample,
            "cancel": self._cancel,
            "status": lambda session, request, body: self.status(),
            "stats": lambda session, request, body: self.stats(),
            "models": lambda session, request, body: {"models": [model.to_wire() for model in self.manifest]},
            "ps": self._ps,
        }

    def _bind(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self.context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 500)
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
        self.group.close()
        self.socket.close()
        self.context.term()

    # --- the loop -------------------------------------------------------------------------------------------------

    def turn(self, wakeup: int) -> None:
        """Wait for something to happen, on the sockets, to a rank or at the file descriptor ``wakeup``; act on it."""
        poller = zmq.Poller()
        for source in (self.socket, self.group.socket, wakeup, *self.group.pidfds):
            poller.register(source, zmq.POLLIN)
        poller.poll(self._patience_ms())
        now = time.monotonic()
        self._attend_group(now)
        self._receive()
        self._dispatch()
        self._probe(now)
        for session in self.sessions.flush():
            log.info("client %s (pid %d) is gone", session.name, session.pid)
            self._end_session(session)

    def _patience_ms(self) -> int:
        now = time.monotonic()
        moments = [self._next_probe_s, self.group.deadline, self._spawn_at]
        wait = min(moment - now for moment in moments if moment is not None)
        if self.sessions.pending:
            wait = min(wait, 0.01)
        return max(0, int(min(wait, 1.0) * 1000) + 1)

    def _probe(self, now: float) -> None:
        if now >= self._next_probe_s:
            self._next_probe_s = now + self.config.heartbeat_s
            for session in self.sessions:
                session.post(wire.encode(Message("alive")), key="alive")

    def _attend_group(self, now: float) -> None:
        try:
            answer = self.group.receive()
            if answer is not None:
                self._take_answer(answer, now)
            self.group.check(now)
        except GroupLost as lost:
            self._lose_group(str(lost), now)
        if self._spawn_at is not None and now >= self._spawn_at:
            self._spawn_at = None
            self.group.spawn()
            notify(f"STATUS=starting {self.group.world_size} ranks")

    def _lose_group(self, reason: str, now: float) -> None:
        log.error("%s; ending all ranks", reason)
        running = self.scheduler.running
        if running is not None and running.verb in (Verb.FORWARD, Verb.SAMPLE):
            self.metrics.retried_forwards += 1
        self.group.kill()
        self._end_jobs(self.scheduler.lose_group(reason))
        self._restoring = None
        self._restore = list(self.manifest) + [model for model in self._restore if model.id not in self.manifest]
        self._spawn_at = self.restarts.next_start(now)
        if self._spawn_at is None:
            self._give_up(reason)
        else:
            self.group.restarts += 1
            notify("STATUS=restarting the ranks")

    def _give_up(self, reason: str) -> None:
        limits = self.config.group
        self.given_up = (
            f"the ranks failed more than {limits.max_restarts} times in {limits.restart_window_s:g} s "
            f"(group.max_restarts); last: {reason}"
        )
        log.critical("%s", self.given_up)
        self._end_jobs(self.scheduler.fail_all(Unavailable(self.given_up)))

    def abort(self, error: TacodError) -> None:
        """End all jobs with ``error``, and the ranks with them."""
        self.group.kill()
        self._end_jobs(self.scheduler.fail_all(error))
        self.sessions.flush()

    # --- work -----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        if self.group.state is not State.IDLE:
            return
        if self._restore:
            self._restoring = self._restore.pop(0)
            log.info("loading %s", self._restoring.path)
            self.group.run("load", self._restoring.work(), (), self.config.group.load_timeout_s)
            return
        if not self._ready_told:
            self._ready_told = True
            log.info("ready on %s with %d ranks", self.config.endpoint, self.group.world_size)
            notify("READY=1")
        job = self.scheduler.next(time.monotonic())
        if job is None:
            return
        if job.model is not None and job.verb is not Verb.LOAD and job.model not in self.manifest:
            self._end_jobs([self.scheduler.fail_step(_not_loaded(job.model))])
            return
        self._start_step(job)

    def _start_step(self, job: Job) -> None:
        now = time.monotonic()
        self._queue_s = now - self._step_ready_s.pop(job.id, job.submitted_s)
        group = self.config.group
        if job.verb is Verb.SAMPLE:
            body = {"job": job.id, "step": job.step, **(job.body if job.step == 0 else {})}
            timeout_s = group.step_timeout_s
        else:
            body = job.body
            timeout_s = group.load_timeout_s if job.verb is Verb.LOAD else group.step_timeout_s
        stored = [self.store.get(digest) for digest in _digests(body)]
        self.group.run(job.verb.value, body, stored, timeout_s)

    def _take_answer(self, answer: Answer, now: float) -> None:
        if self._restoring is not None:
            self._take_restored(self._restoring, answer)
            self._restoring = None
            return
        job = self.scheduler.running
        assert job is not None
        if answer.error is not None:
            self._end_jobs([self.scheduler.fail_step(answer.error)])
            return
        if job.verb in (Verb.FORWARD, Verb.SAMPLE):
            self._note_step(job, answer)
        if job.verb is Verb.LOAD:
            assert job.model is not None
            model = Model(job.model, job.body["path"], job.body["identity"], job.body["dtype"])
            self.manifest.add(model.loaded(answer.body["model"], answer.elapsed_s, self.group.world_size))
        elif job.verb is Verb.UNLOAD:
            assert job.model is not None
            self.manifest.remove(job.model)
        ended = self.scheduler.finish_step()
        if ended is None or job.outcome is Outcome.RESULT and job.verb is Verb.SAMPLE:
            self._tell_progress(job, answer, now)
        if ended is None:
            self._step_ready_s[job.id] = now
        else:
            self._end_jobs([ended], answer.body)

    def _take_restored(self, model: Model, answer: Answer) -> None:
        if answer.error is None:
            self.manifest.add(model.loaded(answer.body["model"], answer.elapsed_s, self.group.world_size))
        else:
            log.error("%s can't be loaded again: %s", model.path, answer.error.message)
            self.manifest.remove(model.id)

    def _note_step(self, job: Job, answer: Answer) -> None:
        busy = answer.body["compute_s"] + answer.body["collective_s"]
        times = StepTimes(
            queue_s=self._queue_s,
            wire_s=max(answer.elapsed_s - busy, 0.0),
            compute_s=answer.body["compute_s"],
            collective_s=answer.body["collective_s"],
        )
        for name, seconds in vars(times).items():
            job.times[name] = job.times.get(name, 0.0) + seconds
        self.metrics.add_step(times, answer.body["forwards"], answer.body["ranks"])
        assert job.model is not None
        self.manifest.note_plan(job.model, answer.body["plan"])

    def _tell_progress(self, job: Job, answer: Answer, now: float) -> None:
        session = self.sessions.get(job.session)
        if session is not None and job.started_s is not None:
            body = {
                "job": job.id,
                "step": job.step,
                "total": job.steps,
                "sigma": answer.body["sigma"],
                "elapsed_s": now - job.started_s,
            }
            session.post(wire.encode(Message("progress", body, job.request)), key=job.id)

    def _end_jobs(self, jobs: Iterable[Job], result: dict[str, Any] | None = None) -> None:
        """Every ended job passes here, once: its pins go, its client hears of it."""
        for job in jobs:
            assert job.outcome is not None
            self.metrics.jobs_total[job.outcome.value] += 1
            self.store.unpin(_digests(job.body))
            self._step_ready_s.pop(job.id, None)
            if job.verb is Verb.SAMPLE and job.outcome is not Outcome.RESULT:
                self.group.forget(job.id)
            session = self.sessions.get(job.session)
            if session is None:
                continue
            if job.error is not None:
                self._tell_error(session, job.request, job.error)
            else:
                session.post(wire.encode(Message("done", self._result(job, result or {}), job.request)))

    def _result(self, job: Job, answer: dict[str, Any]) -> dict[str, Any]:
        assert job.model is not None
        if job.verb is Verb.LOAD:
            return {"model": self.manifest.find(job.model).to_wire()}
        if job.verb is Verb.UNLOAD:
            return {"model": job.model}
        return {
            "out": answer["out"],
            "plan": answer["plan"],
            "ranks": answer["ranks"],
            "steps": job.steps,
            "attempts": job.attempts,
            "timing": job.times,
        }

    # --- clients --------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        # A bounded number a turn, so that a flood from one client can't keep the ranks waiting.
        for _ in range(64):
            try:
                peer, *frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            buffers = [frame.buffer for frame in frames]
            self.metrics.rx_bytes += sum(len(buffer) for buffer in buffers)
            self._hear(peer.bytes, buffers)

    def _hear(self, peer: bytes, frames: list[wire.Buffer]) -> None:
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
                self._send_now(peer, Message("unknown_session", {"boot_id": self.boot_id}, request))
                return
            reply = self._verbs[message.type](session, request, body)
            if reply is not None:
                session.post(wire.encode(Message("done", reply, request)))
        except TacodError as error:
            self._send_now(peer, Message("error", error.to_wire(), request))

    def _check_size(self, message: Message) -> None:
        limit = self.config.limits.message_bytes
        size = sum(tensor.nbytes for tensor in _tensors(message.body) if tensor.frames is not None)
        if size > limit:
            raise MessageTooLarge(
                f"a message of {size} bytes; limits.message_bytes is {limit}; send smaller batches or raise it",
                limit=limit,
            )

    def _send_now(self, peer: bytes, message: Message) -> None:
        """Answer a connection that has no session to post to."""
        try:
            self.sessions.send(peer, wire.encode(message))
        except zmq.ZMQError:
            log.debug("an answer to a client that is gone or doesn't listen was dropped")

    def _tell_error(self, session: Session, request: int, error: TacodError) -> None:
        session.post(wire.encode(Message("error", error.to_wire(), request)))

    def _end_session(self, session: Session) -> None:
        self.sessions.close(session)
        self._end_jobs(self.scheduler.drop(session.token))

    def _hello(self, peer: bytes, request: int, body: messages.Hello) -> None:
        session = self.sessions.open(peer, body.client, body.pid)
        limits = self.config.limits
        welcome = {
            "session": session.token,
            "boot_id": self.boot_id,
            "version": __version__,
            "limits": {"message_bytes": limits.message_bytes, "store_bytes": limits.store_bytes, "queue": limits.queue},
        }
        session.post(wire.encode(Message("welcome", welcome, request)))

    def _bye(self, session: Session, request: int, body: Any) -> None:
        self._end_session(session)

    def _ping(self, session: Session, request: int, body: Any) -> dict[str, Any]:
        return {"boot_id": self.boot_id}

    def _put(self, session: Session, request: int, body: messages.Put) -> dict[str, Any]:
        return {"digests": [self.store.put(_with_bytes(tensor, "tensors")) for tensor in body.tensors]}

    def _load(self, session: Session, request: int, body: messages.Load) -> dict[str, Any] | None:
        model = self.manifest.describe(body.path, body.dtype, body.patches, body.plan, self.group.world_size)
        if model.id in self.manifest:
            return {"model": self.manifest.find(model.id).to_wire()}
        self._submit(session, request, Verb.LOAD, model.id, model.work())
        return None

    def _unload(self, session: Session, request: int, body: messages.Unload) -> None:
        self.manifest.find(body.model)
        self._submit(session, request, Verb.UNLOAD, body.model, {"model": body.model})

    def _forward(self, session: Session, request: int, body: messages.Forward) -> dict[str, Any] | None:
        self.manifest.find(body.model)
        return self._submit(session, request, Verb.FORWARD, body.model, dict(body))

    def _sample(self, session: Session, request: int, body: messages.Sample) -> dict[str, Any] | None:
        self.manifest.find(body.model)
        if len(body.sigmas.shape) != 1 or body.sigmas.shape[0] < 2:
            raise ArgumentError(
                f"sigmas: expected shape [steps + 1] with at least 1 step, got {list(body.sigmas.shape)}",
                argument="sigmas",
            )
        return self._submit(session, request, Verb.SAMPLE, body.model, dict(body), body.sigmas.shape[0] - 1)

    def _submit(
        self, session: Session, request: int, verb: Verb, model: str, body: dict[str, Any], steps: int = 1
    ) -> dict[str, Any] | None:
        """Queue a job, or answer with the digests of the tensors that the store lacks."""
        digests = list(_digests(body))
        missing = self.store.missing(digests)
        if missing:
            session.post(wire.encode(Message("missing", {"digests": list(dict.fromkeys(missing))}, request)))
            return None
        if self.given_up is not None:
            raise Unavailable(self.given_up)
        self._jobs_made += 1
        job = Job(
            id=f"{self.boot_id[:4]}-{self._jobs_made}",
            session=session.token,
            request=request,
            verb=verb,
            body=body,
            steps=steps,
            model=model,
            submitted_s=time.monotonic(),
        )
        self.scheduler.submit(job)
        self.store.pin(digests)
        if verb is Verb.SAMPLE:
            session.post(wire.encode(Message("accepted", {"job": job.id, "total": steps}, request)))
        return None

    def _cancel(self, session: Session, request: int, body: messages.Cancel) -> dict[str, Any]:
        job_id = body.job
        if job_id is None:
            mine = [job for job in self.scheduler.jobs if (job.session, job.request) == (session.token, body.request)]
            if not mine:
                raise JobNotFound(f"request {body.request} is neither queued nor running", request=body.request)
            job_id = mine[0].id
        ended = self.scheduler.cancel(job_id)
        self._end_jobs(ended)
        return {"job": job_id, "state": "cancelled" if ended else "cancelling"}

    def _ps(self, session: Session, request: int, body: Any) -> dict[str, Any]:
        now = time.monotonic()
        jobs = []
        for job in self.scheduler.jobs:
            owner = self.sessions.get(job.session)
            jobs.append(
                {
                    "job": job.id,
                    "verb": job.verb.value,
                    "state": "running" if job is self.scheduler.running else "queued",
                    "model": job.model,
                    "step": job.step,
                    "total": job.steps,
                    "client": f"{owner.name} (pid {owner.pid})" if owner else None,
                    "age_s": round(now - job.submitted_s, 3),
                }
            )
        return {"jobs": jobs}

    # --- what it tells --------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``starting``, ``ready``, ``degraded`` (the ranks are being replaced or were given up) or ``draining``."""
        if self.scheduler.draining:
            return "draining"
        if self.given_up is not None or (self._ready_told and self.group.state in (State.DOWN, State.STARTING)):
            return "degraded"
        return "ready" if self._ready_told else "starting"

    def status(self) -> dict[str, Any]:
        """The body of ``status``."""
        ranks = [
            {
                "rank": rank.index,
                "pid": rank.process.pid,
                "device": rank.device,
                "memory_used_bytes": rank.memory_used_bytes,
            }
            for rank in self.group.ranks
        ]
        return {
            "state": self.state,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self.started_s, 3),
            "boot_id": self.boot_id,
            "endpoint": self.config.endpoint,
            "group": {
                "device": self.config.group.device,
                "world_size": self.group.world_size,
                "restarts": self.group.restarts,
                "ranks": ranks,
            },
            "models": [model.to_wire() for model in self.manifest],
            "queue": {"running": int(self.scheduler.running is not None), "queued": len(self.scheduler)},
            "clients": len(self.sessions),
        }

    def stats(self) -> dict[str, Any]:
        """The body of ``stats``."""
        self.metrics.tx_bytes = self.sessions.tx_bytes
        return {
            **self.metrics.to_wire(),
            "store": {"bytes": self.store.nbytes, "hits": self.store.hits, "misses": self.store.misses},
            "group_restarts": self.group.restarts,
        }


def _not_loaded(model: str) -> ModelNotFound:
    return ModelNotFound(f"model {model!r} was unloaded before its turn came; load it again", model=model)


def _tensors(value: Any) -> Iterable[Tensor]:
    """All tensors of a body."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)


def _digests(body: Any) -> list[bytes]:
    """The digests of those tensors of a body that travelled without their bytes."""
    return [tensor.digest for tensor in _tensors(body) if tensor.frames is None and tensor.digest is not None]


def _with_bytes(tensor: Tensor, argument: str) -> Tensor:
    if tensor.frames is None:
        raise ArgumentError(f"{argument}: a tensor to keep must come with its bytes", argument=argument)
    return tensor
