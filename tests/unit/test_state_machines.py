"""The whole supervisor between clients and ranks, in any order of events: who is told what and how often.

Clients, ranks, sockets and the clock are fakes; everything between them is the real thing. The queue alone is in
`test_scheduler`, queue and ranks without clients in `test_executor`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tacod.config import Config
from tacod.daemon import assemble
from tacod.execution.manifest import Model
from tacod.group.group import GroupState
from tacod.serving import sessions as sessions_module
from tacod.serving import verbs as verbs_module
from tacod.serving.access import User
from tacod_client import wire
from tacod_client.errors import OutOfMemory
from tacod_client.wire import Message, Tensor

from .fake_ranks import FACTS, FakeRank, fakes, step

RANKS = 2
QUEUE, QUEUE_PER_USER = 4, 3
CLIENTS, CLIENTS_PER_USER = 3, 2
RETRIES = 1
REFUSES_WORK, COUNTS_AS_GONE = 5, 9
"""Unread messages of a client, instead of hundreds."""
FINAL = ("done", "error", "missing", "unknown_session", "welcome")
X = Tensor("F32", (1, 1, 1, 1), (b"\0\0\0\0",))
SIGMAS = Tensor("F32", (4,), (bytes(16),))
TEXT = Tensor("F32", (1,), (b"\1\0\0\0",)).with_digest()
TIMES = {"compute_s": 0.0, "collective_s": 0.0}
STEP = step(RANKS, sigma=0.5, out=X)
ANSWERS: dict[str, dict[str, Any]] = {"load": {"model": FACTS, "base": FACTS, **TIMES}, "forward": STEP, "sample": STEP}
CONFIG = Config.model_validate(
    {
        "endpoint": "ipc:///tmp/never-bound",
        "heartbeat_s": 5.0,
        "group": {
            "device": "cpu",
            "ranks": RANKS,
            "retries": RETRIES,
            "max_restarts": 8,
            "step_timeout_s": 10.0,
            "load_timeout_s": 20.0,
            "start_timeout_s": 30.0,
        },
        "limits": {
            "queue": QUEUE,
            "queue_per_user": QUEUE_PER_USER,
            "clients": CLIENTS,
            "clients_per_user": CLIENTS_PER_USER,
        },
    }
)


@dataclass
class Peer:
    """A client: one connection, what it asked and what it was told."""

    address: bytes
    user: User
    token: bytes = b""
    stalled: bool = False
    """Reads nothing, and the socket's own queue is full."""
    gone: bool = False
    cut: bool = False
    """Its session was ended, by its bye or because it left too much unread; until it says hello again."""
    asked: list[int] = field(default_factory=list)
    told: dict[int, list[Message]] = field(default_factory=dict)
    jobs: set[int] = field(default_factory=set)
    """Requests that are jobs."""


class ClientSocket:
    """The ROUTER socket on which clients are: nothing to a stalled one, an error for one that is gone."""

    def __init__(self) -> None:
        self.peers: dict[bytes, Peer] = {}
        self.inbox: deque[tuple[bytes, Message]] = deque()
        """What clients have sent."""
        self.incoming: deque[zmq.Frame] = deque()
        """The frames still to come of the message that is being received."""
        self.outgoing: list[bytes] = []
        """The frames so far of the message that is being sent."""

    def setsockopt(self, option: int, value: int) -> None:
        pass

    def bind(self, address: str) -> None:
        pass

    def close(self) -> None:
        pass

    def get(self, option: int) -> int:
        return zmq.POLLIN if self.inbox else 0

    def recv(self, flags: int, copy: bool) -> zmq.Frame:
        if not self.incoming:
            peer, message = self.inbox.popleft()
            self.incoming.extend(zmq.Frame(bytes(frame)) for frame in (peer, *wire.encode(message)))
        frame = self.incoming.popleft()
        frame.more = bool(self.incoming)
        return frame

    def send(self, frame: Any, flags: int, copy: bool, track: bool) -> None:
        """Take the next frame. What is wrong with a peer is said at its address, as ROUTER sockets do."""
        if not self.outgoing:
            peer = self.peers[bytes(frame)]
            if peer.gone:
                raise zmq.ZMQError(zmq.EHOSTUNREACH)
            if peer.stalled:
                raise zmq.Again
        self.outgoing.append(bytes(frame))
        if flags & zmq.SNDMORE:
            return
        address, *frames = self.outgoing
        self.outgoing.clear()
        peer = self.peers[address]
        message = wire.decode([memoryview(each) for each in frames])
        told = peer.told.setdefault(message.id, [])
        if message.type != "alive":
            assert message.id in peer.asked, "an answer to nothing"
            assert not any(each.type in FINAL for each in told), f"{message.type} after the last: {told}"
        if message.type == "progress":
            assert [each.type for each in told[:1]] == ["accepted"]
        if message.type == "welcome":
            peer.token, peer.cut = message.body["session"], False
        told.append(message)


class FakeAccess:
    """Knows whose a connection is, and lets all of them in."""

    def __init__(self, peers: dict[bytes, Peer]) -> None:
        self.peers = peers
        self.keys = None
        self.socket = None

    def poll(self) -> None:
        pass

    def close(self) -> None:
        pass

    def user_of(self, frame: zmq.Frame) -> User:
        return self.peers[frame.bytes].user

    def is_admin(self, user: User) -> bool:
        return False


class Context:
    """Makes one socket: the clients'."""

    def __init__(self) -> None:
        self.clients = ClientSocket()

    def socket(self, kind: int) -> ClientSocket:
        return self.clients

    def term(self) -> None:
        pass


class Poller:
    """Says of everything that it can be read."""

    def __init__(self) -> None:
        self.sources: list[Any] = []

    def register(self, source: Any, flags: int) -> None:
        self.sources.append(source)

    def poll(self, timeout_ms: int) -> list[tuple[Any, int]]:
        assert timeout_ms >= 0
        return [(source, zmq.POLLIN) for source in self.sources]


class Events(RuleBasedStateMachine):
    """Clients, ranks and the clock do what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.clock = self.stack.enter_context(fakes())
        logging.disable(logging.CRITICAL)
        self.stack.callback(logging.disable, logging.NOTSET)
        self.context = Context()
        for patch in (
            mock.patch("tacod.serving.listener.zmq.Context", return_value=self.context),
            mock.patch("tacod.serving.server.zmq.Poller", Poller),
            mock.patch("tacod.daemon.Monitor", mock.Mock()),
            mock.patch("tacod.daemon.Guard", mock.Mock()),
            mock.patch("tacod.serving.listener.UnixSocket", mock.Mock()),
            mock.patch("tacod.daemon.time", self.clock),
            mock.patch("tacod.serving.server.time", self.clock),
            mock.patch("tacod.serving.verbs.time", self.clock),
            mock.patch("tacod.serving.listener.Access", return_value=FakeAccess(self.context.clients.peers)),
            mock.patch.object(verbs_module, "OUTBOX_MESSAGES", REFUSES_WORK),
            mock.patch.object(sessions_module, "UNSENT_MESSAGES", COUNTS_AS_GONE),
        ):
            self.stack.enter_context(patch)
        self.ending = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="tacod-"))
        self.stack.callback(shutil.rmtree, self.folder)
        self.peers: list[Peer] = []
        self.requests = 0

    @initialize()
    def begin(self) -> None:
        devices = [f"cpu:{index}" for index in range(RANKS)]
        models = [Model("m", "/models/m", "i", None)]
        self.state, self.server, _ = assemble(CONFIG, "", [devices], [models], self.folder, None, self.ending)
        self.turn()
        self.all_report_ready()
        self.all_finish()
        assert self.state.groups.ready

    def turn(self) -> None:
        self.server.turn(0)
        for peer in self.peers:
            if peer.token and self.state.sessions.get(peer.token) is None:
                peer.cut = True

    # --- clients --------------------------------------------------------------------------------------------------

    def ask(self, peer: Peer, kind: str, body: dict[str, Any] | None = None, is_job: bool = False) -> int:
        self.requests += 1
        peer.asked.append(self.requests)
        if is_job:
            peer.jobs.add(self.requests)
        token = b"" if kind == "hello" else peer.token
        self.context.clients.inbox.append((peer.address, Message(kind, body or {}, self.requests, token)))
        return self.requests

    @property
    def connected(self) -> list[Peer]:
        return [peer for peer in self.peers if not peer.gone]

    def a_peer(self, data: st.DataObject) -> Peer:
        return data.draw(st.sampled_from(self.connected))

    @precondition(lambda self: len(self.connected) < CLIENTS + 2)
    @rule(uid=st.integers(1, 2))
    def connect(self, uid: int) -> None:
        peer = Peer(b"\0" + len(self.peers).to_bytes(4, "big"), User(uid))
        self.peers.append(peer)
        self.context.clients.peers[peer.address] = peer
        before = list(self.state.sessions)
        request = self.ask(peer, "hello", {"client": "test", "pid": 1, "version": "1"})
        self.turn()
        (told,) = peer.told[request]
        full = len(before) >= CLIENTS or sum(each.user == peer.user for each in before) >= CLIENTS_PER_USER
        assert told.type == ("error" if full else "welcome")

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), count=st.integers(1, 3), text=st.booleans())
    def forward(self, data: st.DataObject, count: int, text: bool) -> None:
        peer = self.a_peer(data)
        arguments = {"x": X, **({"context": TEXT.without_bytes()} if text else {})}
        for _ in range(count):
            self.ask(peer, "forward", {"model": "m", "plan": "auto", "arguments": arguments}, is_job=True)
        self.turn()

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def sample(self, data: st.DataObject) -> None:
        body = {"model": "m", "plan": "auto", "sampler": "euler", "seed": 0, "cfg": 1.0, "noise": X, "latent": X}
        body |= {"sigmas": SIGMAS, "positive": {}, "negative": None}
        self.ask(self.a_peer(data), "sample", body, is_job=True)
        self.turn()

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        self.ask(self.a_peer(data), "put", {"tensors": [TEXT]})
        self.turn()

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), kind=st.sampled_from(["ping", "ps", "bad field", "unknown"]), count=st.integers(1, 6))
    def say(self, data: st.DataObject, kind: str, count: int) -> None:
        peer = self.a_peer(data)
        for _ in range(count):
            self.ask(peer, "ping" if kind == "bad field" else kind, {"field": 1} if kind == "bad field" else {})
        self.turn()

    @precondition(lambda self: any(peer.jobs for peer in self.connected))
    @rule(data=st.data(), count=st.integers(1, 3))
    def cancel(self, data: st.DataObject, count: int) -> None:
        peer = data.draw(st.sampled_from([peer for peer in self.connected if peer.jobs]))
        request = data.draw(st.sampled_from(sorted(peer.jobs)))
        for _ in range(count):
            self.ask(peer, "cancel", {"job": None, "request": request})
        self.turn()

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def say_bye(self, data: st.DataObject) -> None:
        peer = self.a_peer(data)
        self.ask(peer, "bye")
        self.turn()
        assert self.state.sessions.get(peer.token) is None

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        self.a_peer(data).gone = True
        self.turn()

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        self.a_peer(data).stalled = True

    @precondition(lambda self: any(peer.stalled for peer in self.connected))
    @rule()
    def read_again(self) -> None:
        for peer in self.peers:
            peer.stalled = False
        self.turn()

    # --- ranks and the clock --------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[FakeRank]:
        return [rank for rank in FakeRank.all if not rank.reaped]

    @rule()
    def all_report_ready(self) -> None:
        for rank in self.alive:
            rank.greet()
        self.turn()

    def answer(self, rank: FakeRank, kind: str = "done", body: dict[str, Any] | None = None) -> None:
        for work in rank.unanswered[:1]:
            rank.answer(kind, ANSWERS[work.type] if body is None else body)

    @rule()
    def complete(self) -> None:
        """Rank 0 tells a client of its result, and has yet to report."""
        for rank in self.alive[:1]:
            rank.complete()

    @rule(times=st.integers(1, 4))
    def all_finish_often(self, times: int) -> None:
        for _ in range(times):
            self.all_finish()

    def all_finish(self) -> None:
        for rank in self.alive:
            self.answer(rank)
        self.turn()

    @rule()
    def all_fail(self) -> None:
        for rank in self.alive:
            if not any(work.type == "load" for work in rank.unanswered):
                self.answer(rank, "failed", {"error": OutOfMemory("no memory").to_wire()})
        self.turn()

    @rule(index=st.integers(0, RANKS - 1))
    def die(self, index: int) -> None:
        for rank in self.alive:
            if rank.index == index:
                rank.die(-9)
        self.turn()
        assert all(rank.code is None for rank in self.alive), "a dead rank takes all others with it"

    @rule(seconds=st.sampled_from([0.01, 1.0, 6.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.turn()

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def one_work_item_is_with_the_ranks(self) -> None:
        waiting = {work.id for rank in self.alive for work in rank.unanswered}
        assert len(waiting) <= 1
        if waiting:
            assert self.state.groups.executors[0].group.state is GroupState.BUSY

    @invariant()
    def bounds_are_kept(self) -> None:
        if not hasattr(self, "state"):
            return
        sessions, jobs = list(self.state.sessions), self.state.groups.unfinished
        assert len(jobs) <= QUEUE
        assert len(sessions) <= CLIENTS
        for user in {session.user for session in sessions}:
            mine = [session.token for session in sessions if session.user == user]
            assert len(mine) <= CLIENTS_PER_USER
            assert sum(job.session in mine for job in jobs) <= QUEUE_PER_USER
        assert all(len(session.outbox) <= COUNTS_AS_GONE for session in sessions)

    @invariant()
    def nobody_else_has_jobs(self) -> None:
        if hasattr(self, "state"):
            executor = self.state.groups.executors[0]
            tokens = {session.token for session in self.state.sessions}
            assert all(job.session in tokens or job.cancelling for job in executor.scheduler.unfinished)

    @invariant()
    def what_was_asked_is_answered_or_still_to_be(self) -> None:
        """A request of a live session was answered once, waits in its outbox, or is a job on its way."""
        if not hasattr(self, "state"):
            return
        jobs = {(job.session, job.request) for job in self.state.groups.jobs}
        for peer in self.connected:
            session = self.state.sessions.get(peer.token) if peer.token else None
            if session is None or peer.cut:
                continue
            kept = [wire.decode([memoryview(bytes(frame)) for frame in each]) for each in session.outbox.values()]
            for request in peer.asked:
                final = [each for each in [*peer.told.get(request, []), *kept] if each.id == request]
                ends = sum(each.type in FINAL for each in final) + ((peer.token, request) in jobs)
                assert ends == 1, f"request {request} has {ends} ends"

    def teardown(self) -> None:
        """However it went, all jobs come to their end, and with the sessions everything goes."""
        try:
            if hasattr(self, "state"):
                self.read_again()
                self.settle()
                self.what_was_asked_is_answered_or_still_to_be()
                for peer in self.connected:
                    self.ask(peer, "bye")
                for peer in self.peers:
                    peer.gone = True
                self.clock.now += 6  # the next sign of life finds that they are gone
                self.turn()
                self.turn()
                executor = self.state.groups.executors[0]
                assert len(self.state.sessions) == 0
                assert executor.scheduler.jobs == []
                assert not executor.store._pins
                assert executor.current is None or executor.current.job is None
                self.ending.close()
                assert self.alive == []
                assert list(self.folder.iterdir()) == []
        finally:
            # The next example listens at the same path.
            self.ending.close()
            self.stack.close()

    def settle(self) -> None:
        """Ranks that behave do what is left."""
        for _ in range(100):
            if not self.state.groups.jobs:
                return
            self.clock.now += 0 if self.alive else 40
            self.turn()
            self.all_report_ready()
            self.all_finish()
        raise AssertionError("jobs that never end")


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
