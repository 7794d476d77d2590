"""A forward that equals an earlier one but for its tensors' bytes is known; what may have changed is looked at."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tacod.execution.manifest import Model
from tacod.execution.scheduler import Job
from tacod.group.arena import Arena
from tacod.group.group import _pack
from tacod.group.work import Alike, Envelope, Forward, as_tensor, read_envelope
from tacod_client.wire import Message, Tensor, encode

from .conftest import PEER, Peer

CONTEXT = Tensor("F32", (2, 512), (bytes(range(256)) * 16,)).with_digest()


def forward(x: bytes = bytes(16), **fields: Any) -> dict[str, Any]:
    arguments = {"x": Tensor("F32", (1, 4), (x,)), "timestep": Tensor("F32", (1,), (x[:4],))}
    return {"model": "m", "plan": "auto", "arguments": {**arguments, "context": CONTEXT.without_bytes()}, **fields}


@pytest.fixture
def asking(peer: Peer) -> Peer:
    """A client of a daemon that holds a model."""
    peer.state.groups.executors[0].manifest.add(Model("m", "/models/m", "i", None))
    return peer


def queue(peer: Peer, body: dict[str, Any], request: int = 9) -> Job:
    """The job of a forward, which is then taken off the queue."""
    peer.send(Message("forward", body, request, peer.session))
    (job,) = peer.state.groups.jobs
    peer.state.groups.cancel(job.id)
    (answer,) = peer.answers()
    assert answer.body["code"] == "Cancelled"
    return job


def arguments_of(job: Job) -> dict[str, Any]:
    assert isinstance(job.body, Forward)
    return job.body.arguments


def test_a_known_forward_is_a_job_like_the_first(asking: Peer) -> None:
    asking.ask("put", {"tensors": [CONTEXT]})
    first, again = queue(asking, forward()), queue(asking, forward(b"0123456789abcdef"), 300)
    assert isinstance(first.body, Forward)
    assert isinstance(again.body, Forward)
    assert again.body.alike is first.body.alike is not None
    assert arguments_of(first) == forward()["arguments"]
    assert arguments_of(again) == forward(b"0123456789abcdef")["arguments"]
    assert (again.request, again.digests, again.nbytes) == (300, [CONTEXT.digest], 20)
    other = queue(asking, forward(plan={"ulysses": 1}))
    assert isinstance(other.body, Forward)
    assert other.body.alike is not first.body.alike


def test_a_known_forward_is_told_what_the_store_lacks(asking: Peer) -> None:
    for _ in range(2):
        assert asking.ask("forward", forward()).body == {"digests": [CONTEXT.digest]}
    asking.ask("put", {"tensors": [CONTEXT]})
    queue(asking, forward())
    store = asking.state.groups.host.store
    store.limit = store.nbytes
    asking.ask("put", {"tensors": [Tensor("U8", (16,), (bytes(16),))]})
    assert CONTEXT.digest not in store
    answer = asking.ask("forward", forward())
    assert (answer.type, answer.body) == ("missing", {"digests": [CONTEXT.digest]})
    asking.ask("put", {"tensors": [CONTEXT]})
    queue(asking, forward())


def test_a_known_forward_of_a_model_that_is_gone_is_refused(asking: Peer) -> None:
    asking.ask("put", {"tensors": [CONTEXT]})
    queue(asking, forward())
    manifest = asking.state.groups.executors[0].manifest
    manifest.remove("m")
    assert asking.ask("forward", forward()).body["code"] == "ModelNotFound"
    manifest.add(Model("m", "/models/m", "i", None))
    queue(asking, forward())


@pytest.mark.parametrize(("limit", "code"), [("message_bytes", "MessageTooLarge"), ("queue_per_user", "QueueFull")])
def test_limits_hold_for_known_forwards(asking: Peer, limit: str, code: str) -> None:
    asking.ask("put", {"tensors": [CONTEXT]})
    asking.send(Message("forward", forward(), 7, asking.session))
    config = asking.state.config
    asking.state.config = config.model_copy(update={"limits": config.limits.model_copy(update={limit: 1})})
    answer = asking.ask("forward", forward())
    assert answer.body["code"] == code
    assert f"limits.{limit}" in answer.body["message"]


def test_places_in_memory_that_is_given_back_are_refused(asking: Peer) -> None:
    asking.ask("put", {"tensors": [CONTEXT]})
    memories = asking.state.groups.host.memories
    memories.limit = 1 << 20
    memory = memories.make(asking.session, 4096)
    body = forward(memory=memory.id, room=[1024, 64])
    body["arguments"]["x"] = Tensor("F32", (1, 4), None, offset=64)
    for _ in range(2):
        assert arguments_of(queue(asking, body)) == body["arguments"]
    assert asking.ask("unshare", {"memory": memory.id}).type == "done"
    assert asking.ask("forward", body).body["details"] == {"argument": "memory"}


def test_another_connection_gains_nothing_by_a_known_forward(asking: Peer) -> None:
    asking.ask("put", {"tensors": [CONTEXT]})
    queue(asking, forward())
    frames = [bytes(each) for each in encode(Message("forward", forward(), 9, asking.session))]
    asking.server._on_message(b"stranger", frames, lambda: (None, None))
    assert asking.state.groups.jobs == []
    assert asking.ask("ping").type == "done"
    asking.send(Message("bye", {}, 1, asking.session))
    asking.server._on_message(PEER, frames, lambda: (None, None))
    assert [answer.type for answer in asking.answers()] == ["unknown_session"]


def test_what_is_known_holds_no_tensors_bytes(asking: Peer) -> None:
    asking.ask("put", {"tensors": [CONTEXT]})
    contents = np.zeros(1 << 18, np.uint8)
    held = weakref.ref(contents)
    body = {"model": "m", "plan": "auto", "arguments": {"x": Tensor("U8", (1 << 18,), (memoryview(contents),))}}
    frames = encode(Message("forward", body, 1, asking.session))
    asking.server._on_message(PEER, frames, lambda: (None, None))
    (job,) = asking.state.groups.jobs
    asking.state.groups.cancel(job.id)
    assert held() is not None
    del job, frames, body, contents
    gc.collect()
    assert held() is None, "somebody holds a view of it"


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("completes", [False, True])
def test_ranks_get_of_a_known_forward_what_they_got_of_the_first(watched: bool, completes: bool) -> None:
    mine = Arena()
    theirs = Arena(os.dup(mine.fd))
    try:
        alike = Alike(())
        for number, x in enumerate((b"a" * 16, b"b" * 16, b"c" * 16), 1):
            arguments = forward(x)["arguments"]
            frames = [frame for each in arguments.values() for frame in each.frames or ()]
            command = Forward("m", "auto", arguments, b"session", alike=alike, frames=frames)
            request = as_tensor(number << 40) if completes else None
            envelope = Envelope(number, command, watched=watched, request=request)
            told = read_envelope(theirs.unpack(_pack(envelope, mine), copy=True))
            assert told == envelope
            assert told.request_id == (number << 40 if completes else None)
            assert list(alike.tails) == [(watched, completes)]
            # What brings more is described whole.
            more = replace(envelope, evict=[b"d" * 32])
            assert read_envelope(theirs.unpack(_pack(more, mine), copy=True)) == more
    finally:
        theirs.close()
        mine.close()


def test_tensors_in_another_order_than_they_stand_are_packed_anew() -> None:
    mine = Arena()
    try:
        alike = Alike(())
        for x in (b"a" * 16, b"b" * 16):
            arguments = forward(x)["arguments"]
            frames = [frame for each in reversed(arguments.values()) for frame in each.frames or ()]
            command = Forward("m", "auto", arguments, b"session", alike=alike, frames=frames)
            assert read_envelope(mine.unpack(_pack(Envelope(1, command), mine), copy=True)).command == command
            assert not alike.tails
    finally:
        mine.close()
