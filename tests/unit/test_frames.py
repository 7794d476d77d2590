"""Messages go in and out whole, whatever holds their frames."""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tacod_client.frames import COPIED_BYTES, receive, send, widen

Pair = tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind(f"ipc://{tmp_path}/pair")
        other.connect(f"ipc://{tmp_path}/pair")
        yield one, other


def arrived(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    assert socket.poll(5000)
    frames = receive(socket)
    assert frames is not None
    return frames


def test_nothing_is_there_to_receive(pair: Pair) -> None:
    assert receive(pair[0]) is None


@pytest.mark.parametrize("size", [0, 5, 1 << 16, COPIED_BYTES + 3])
def test_a_frame_that_came_can_go_on(pair: Pair, size: int) -> None:
    one, other = pair
    content = bytes(range(251)) * (size // 251 + 1)
    content = content[:size]
    send(one, [b"head", memoryview(content)])
    came = arrived(other)[1].buffer
    send(other, [came, came, came[1:], came.tobytes()])
    del came
    assert [frame.bytes for frame in arrived(one)] == [content, content, content[1:], content]


def test_a_connection_is_widened_through_a_frame_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    asked: list[Any] = []
    monkeypatch.setattr(sockets.socket, "setsockopt", lambda self, *option: asked.append(option))
    widen(zmq.Frame(b"of no connection"))
    assert not asked
    send(one, [b"hello"])
    widen(arrived(other)[0])
    assert [option[1] for option in asked] == [sockets.SO_SNDBUF]
