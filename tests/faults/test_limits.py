"""Beyond a bound there is a typed error at once, and what was there before goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from helpers import SD3, SOON_S, Daemon, answered, eventually

from tacod.serving.listener import MAX_FRAME_BYTES
from tacod_client import Cancelled, Client, MessageTooLarge, QueueFull, wire

QUEUE = 3
CLIENTS = 3
MESSAGE_BYTES = 200_000
STORE_BYTES = 6_000
"""Holds one context of 129 tokens."""


@pytest.fixture(scope="module")
def narrow(two_ranks: Daemon) -> Iterator[Daemon]:
    """The daemon with two ranks, while it takes little."""
    settings = {
        "limits.queue": QUEUE,
        "limits.clients": CLIENTS,
        "limits.message_bytes": MESSAGE_BYTES,
        "limits.store_bytes": STORE_BYTES,
    }
    two_ranks.empty()
    with two_ranks.changed(settings):
        yield two_ranks


@pytest.fixture
def client(narrow: Daemon) -> Iterator[Client]:
    with narrow.client() as client:
        yield client


def test_queue_full(narrow: Daemon, client: Client) -> None:
    model = client.load(SD3.file)
    first = SD3.sample(model, 100)
    queued = [SD3.sample(model, 20000) for _ in range(QUEUE - 1)]
    started = time.monotonic()
    with pytest.raises(QueueFull, match=r"limits\.queue"):
        SD3.sample(model, 4)
    with narrow.client() as other, pytest.raises(QueueFull):
        SD3.check(other.load(SD3.file))
    assert time.monotonic() - started < SOON_S
    for job in queued:
        job.cancel()
    assert first.result().isfinite().all()
    SD3.check(model)


def test_store_full(narrow: Daemon, client: Client) -> None:
    """A run holds what it was given until it ends; what finds no room beside that is refused, and harms nothing."""
    model = client.load(SD3.file)
    first = SD3.sample(model, 20000, seed=1)
    next(iter(first))
    with narrow.client() as other:
        started = time.monotonic()
        with pytest.raises(QueueFull, match=r"limits\.store_bytes"):
            SD3.sample(other.load(SD3.file), 4, seed=2).result()
        assert time.monotonic() - started < SOON_S
    assert next(iter(first)).total == 20000
    first.cancel()
    with pytest.raises(Cancelled):
        first.result()
    SD3.check(model, seed=2)


def test_message_too_large(client: Client) -> None:
    model = client.load(SD3.file)
    large = SD3.inputs(batch=200)
    started = time.monotonic()
    with pytest.raises(MessageTooLarge, match=r"limits\.message_bytes") as caught:
        model.forward(**large)
    assert time.monotonic() - started < SOON_S
    assert caught.value.details["limit"] == MESSAGE_BYTES
    SD3.check(model)


def test_upload_too_large(client: Client) -> None:
    model = client.load(SD3.file)
    with pytest.raises(MessageTooLarge, match=r"limits\.message_bytes"):
        model.forward(**SD3.inputs(text=10_000))
    SD3.check(model)


def test_a_client_that_ignores_the_limit_hears_the_same(narrow: Daemon, client: Client) -> None:
    """Tensors that are each small enough, in one message that isn't."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(narrow.endpoint)
        socket.send_multipart(wire.encode(wire.Message("hello", {"client": "t", "pid": 1, "version": "0"})))
        session = answered(socket, 1).body["session"]
        tensor = wire.Tensor("U8", (MESSAGE_BYTES // 2,), (bytes(MESSAGE_BYTES // 2),))
        socket.send_multipart(wire.encode(wire.Message("put", {"tensors": [tensor] * 3}, 5, session)))
        answer = answered(socket, 1)
        assert (answer.id, answer.body["code"]) == (5, "MessageTooLarge")
    finally:
        socket.close()
        context.term()
    SD3.check(client.load(SD3.file))


def test_a_frame_over_the_limit_ends_its_connection_alone(narrow: Daemon, client: Client) -> None:
    model = client.load(SD3.file)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(narrow.endpoint)
        socket.send_multipart([b"TACO\x01", bytes(MAX_FRAME_BYTES + 1)])
        assert not socket.poll(300)
        SD3.check(model)
    finally:
        socket.close()
        context.term()


def test_too_many_clients(narrow: Daemon, client: Client) -> None:
    eventually(lambda: client.status()["clients"] == 1, 5, "the clients of other tests are gone")
    others = [narrow.client() for _ in range(CLIENTS)]
    try:
        for other in others[: CLIENTS - 1]:
            other.ping()
        with pytest.raises(QueueFull, match=r"limits\.clients"):
            others[-1].ping()
        others[0].close()
        eventually(lambda: client.status()["clients"] < CLIENTS, 1, "one has left")
        assert others[-1].ping() < 1
    finally:
        for other in others:
            other.close()
