"""Packets with descriptors don't wait where they must not."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import pytest

from tacod.group.descriptors import recv_fds, send_fds
from tacod.rank.__main__ import _busy_poll

Ends = tuple[socket.socket, socket.socket]
T = TypeVar("T")

LONG_S = 20.0


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A pair whose ends wait if nothing else is said."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one, other


def at_once(ends: Ends, act: Callable[[], T]) -> T:
    """What a function gives that is not to wait for the other end."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(act)
        try:
            return future.result(LONG_S)
        finally:
            # Whoever waits goes on.
            ends[1].close()


def test_descriptors_come_with_their_packet_and_are_not_inherited(ends: Ends) -> None:
    read, write = os.pipe()
    send_fds(ends[0], b"two", [read, write])
    ends[0].send(b"none")
    packet, (there, here) = recv_fds(ends[1], 9, 2)
    assert packet == b"two"
    assert recv_fds(ends[1], 9, 2, socket.MSG_DONTWAIT) == (b"none", [])
    assert not os.get_inheritable(there)
    assert not os.get_inheritable(here)
    os.write(here, b"x")
    assert os.read(read, 1) == b"x"
    for each in (read, write, there, here):
        os.close(each)
    ends[0].close()
    assert recv_fds(ends[1], 9, 2) == (b"", [])


def test_nobody_waits_for_a_packet_that_is_not_there(ends: Ends) -> None:
    with pytest.raises(BlockingIOError):
        at_once(ends, lambda: recv_fds(ends[0], 9, 2, socket.MSG_DONTWAIT))


def test_nobody_waits_for_one_who_does_not_read(ends: Ends) -> None:
    with suppress(BlockingIOError):
        while True:
            ends[0].send(bytes(1000), socket.MSG_DONTWAIT)
    with pytest.raises(BlockingIOError):
        at_once(ends, lambda: send_fds(ends[0], bytes(1000), [ends[0].fileno()], socket.MSG_DONTWAIT))


def test_a_rank_polls_for_a_while_and_then_goes_on(ends: Ends) -> None:
    assert at_once(ends, lambda: _busy_poll(ends[0])) is None


def test_a_rank_that_polls_finds_its_packet(ends: Ends) -> None:
    ends[1].send(b"work")
    assert at_once(ends, lambda: _busy_poll(ends[0])) == (b"work", [])
