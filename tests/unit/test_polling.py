"""How a client waits: it sleeps, but not around the time when a completion is due."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacod_client import connection
from tacod_client.connection import LATE_S, LEAD_S, SLICE_S, Connection
from tacod_client.request import Request


class World:
    """A clock and a poller; a message comes at ``comes_s``."""

    def __init__(self, comes_s: float) -> None:
        self.now_s, self.comes_s = 0.0, comes_s
        self.slept: list[tuple[float, float]] = []

    def monotonic(self) -> float:
        self.now_s += 1e-6
        return self.now_s

    def poll(self, wait_ms: int) -> list[tuple[Any, int]]:
        self.now_s += 2e-6
        if wait_ms:
            begun_s = self.now_s
            self.now_s = max(begun_s, min(begun_s + wait_ms / 1000, self.comes_s))
            self.slept.append((begun_s, self.now_s))
        return [("socket", 1)] if self.now_s >= self.comes_s else []


@pytest.fixture(scope="module")
def client() -> Iterator[Connection]:
    made = Connection("ipc:///nowhere", 1.0, 1.0, None)
    yield made
    made.close()


def waits(made: Connection, world: World, due_s: float | None) -> None:
    """Wait slice by slice until the message is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "time", world)
        made._poller = world  # type: ignore[assignment]
        while not made._poll(SLICE_S, due_s):
            assert world.now_s < world.comes_s + SLICE_S


@given(comes_s=st.floats(0, 0.2), due_s=st.none() | st.floats(0, 0.2))
def test_it_sleeps_at_other_times_only(client: Connection, comes_s: float, due_s: float | None) -> None:
    world = World(comes_s)
    waits(client, world, due_s)
    assert world.now_s <= comes_s + 1e-4
    if due_s is None:
        return
    for begun_s, ended_s in world.slept:
        assert ended_s <= due_s - LEAD_S + 1e-5 or begun_s >= due_s + LATE_S
    polled_s = world.now_s - sum(ended_s - begun_s for begun_s, ended_s in world.slept)
    assert polled_s < LEAD_S + LATE_S + 0.002


def test_a_completion_is_due_when_the_last_one_came(client: Connection) -> None:
    client._polls = True
    request = Request("forward", dict)
    request.send_as(1)
    assert client._due_s(request) is None
    client._completed_in_s = 0.07
    assert client._due_s(request) == request.sent_s + 0.07
    assert client._due_s(Request("load", dict)) is None
    client._polls = False
    assert client._due_s(request) is None
