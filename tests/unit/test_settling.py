"""A connection takes in the answers that follow completions, and doesn't wait for more than these."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tacod_client import connection as connection_module
from tacod_client.connection import Connection
from tacod_client.request import Request
from tacod_client.wire import Message

LONG_S = 1000.0


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """One that has no daemon."""
    connection = Connection(f"ipc://{tmp_path}/s", 1, 1, None)
    yield connection
    for request in connection._waiting.values():
        request.late = True
    connection.close()


def completed(connection: Connection) -> Request:
    """A request whose answer has yet to come."""
    request = Request("forward", dict)
    request.send_as(len(connection._waiting) + 1)
    request.complete(Message("completion", {"out": 1}, request.id))
    connection._waiting[request.id] = request
    return request


@pytest.fixture
def listening(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], list[int]]:
    """Has something happen whenever the connection listens."""

    def have(happen: Callable[[], None]) -> list[int]:
        times: list[int] = []

        def listen() -> None:
            times.append(len(times))
            happen()

        monkeypatch.setattr(connection, "_listen", listen)
        return times

    return have


def test_the_end_of_a_client_has_the_last_answer_first(
    connection: Connection, listening: Callable[[Callable[[], None]], list[int]]
) -> None:
    """Otherwise its statistics would lack the split of the last forward's time."""
    request, heard = completed(connection), []
    request.when_answered(heard.append)
    listening(lambda: connection._take(Message("done", {"out": 1}, request.id)))
    connection.close()
    assert [each.type for each in heard if each is not None] == ["done"]
    assert connection._waiting == {}


def test_what_other_threads_complete_meanwhile_is_not_waited_for(
    connection: Connection, listening: Callable[[Callable[[], None]], list[int]]
) -> None:
    first = completed(connection)

    def happen() -> None:
        connection._take(Message("done", {"out": 1}, first.id))
        completed(connection)

    times = listening(happen)
    connection.settle()
    assert len(times) == 1


def test_an_answer_that_does_not_come_is_waited_for_once(
    connection: Connection,
    listening: Callable[[Callable[[], None]], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank hangs; each piece of an upload would wait for it."""
    monkeypatch.setattr(connection_module, "SETTLE_S", 0.01)
    request = completed(connection)
    times = listening(lambda: time.sleep(0.001))
    connection.settle()
    assert times
    monkeypatch.setattr(connection_module, "SETTLE_S", LONG_S)
    times.clear()
    connection.settle()
    assert len(times) == 1, "it is looked for"
    assert connection._waiting == {request.id: request}, "it still may come"
    listening(lambda: connection._take(Message("done", {"out": 1}, request.id)))
    connection.settle()
    assert connection._waiting == {}
