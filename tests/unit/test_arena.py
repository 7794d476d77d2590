"""What the supervisor and its ranks share: what one puts there is what the others read, whatever its size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacod.group.arena import PACKET_BYTES, PLACE, Arena
from tacod_client.errors import ProtocolError
from tacod_client.tensors import rows
from tacod_client.wire import FRAME_BYTES, Message, Tensor, split

MIB = 1 << 20
MANY = PACKET_BYTES // 4
"""So often repeated, a frame of a few bytes is too large for a packet."""


@contextmanager
def shared() -> Iterator[tuple[Arena, Arena]]:
    """The supervisor's and a rank's."""
    mine = Arena()
    theirs = Arena(os.dup(mine.fd))
    try:
        yield mine, theirs
    finally:
        theirs.close()
        mine.close()


def message(*contents: bytes) -> Message:
    return Message("forward", {"all": [Tensor("U8", (len(each),), split(each)) for each in contents]}, 7)


def contents(told: Message) -> list[bytes]:
    return [b"".join(tensor.frames) for tensor in told.body["all"]]


FRAMES = st.lists(st.builds(bytes.__mul__, st.binary(max_size=300), st.sampled_from([1, 1, 90, 200])), max_size=5)


@given(FRAMES, FRAMES)
def test_there_and_back(there: list[bytes], back: list[bytes]) -> None:
    """An answer lies behind what it answers: a rank that is still reading isn't disturbed."""
    with shared() as (mine, theirs):
        asked = theirs.unpack(mine.pack(message(*there)))
        answer = mine.unpack(theirs.pack(message(*back), start=theirs.end), copy=True)
        assert (asked.type, asked.id, contents(asked), contents(answer)) == ("forward", 7, there, back)


def test_it_grows_while_something_of_it_is_still_read() -> None:
    with shared() as (mine, theirs):
        first = theirs.unpack(mine.pack(message(b"first")))
        large = bytes([1, 2, 3, 4]) * (5 * MIB)
        assert len(large) > 2 * FRAME_BYTES
        second = theirs.unpack(mine.pack(message(b"", large), start=MIB))
        assert contents(second) == [b"", large]
        assert contents(first) == [b"first"]


def test_a_part_is_read_where_it_lies() -> None:
    """Of residuals a rank reads its own tokens."""
    with shared() as (mine, theirs):
        told = theirs.unpack(mine.pack(Message("forward", {"x": Tensor("U8", (4, MANY), split(b"abcd" * MANY))})))
        part = rows(told.body["x"], 1, 3)
        mine.pack(Message("forward", {"x": Tensor("U8", (4, MANY), split(b"efgh" * MANY))}))
        assert b"".join(part.frames or ()) == b"efgh" * (MANY // 2)


@pytest.mark.parametrize("contents", [b"small", b"large" * MANY])
def test_small_tensors_travel_in_the_packet_itself(contents: bytes) -> None:
    with shared() as (mine, theirs):
        packet = mine.pack(message(contents))
        start, stop = mine.span(packet)
        is_small = contents == b"small"
        assert (contents in packet, stop == start) == (is_small, is_small)
        told = theirs.unpack(packet)
        mine.pack(message(b"another"))
        assert [b"".join(each.frames) for each in told.body["all"]] == [contents]


def test_what_is_kept_is_a_copy() -> None:
    with shared() as (mine, theirs):
        kept = theirs.unpack(mine.pack(message(b"one" * MANY)), copy=True)
        mine.pack(message(b"two" * MANY))
        assert contents(kept) == [b"one" * MANY]


def test_memory_of_a_large_item_goes_back() -> None:
    with mock.patch("tacod.group.arena.KEPT_BYTES", MIB), shared() as (mine, theirs):
        told = theirs.unpack(mine.pack(message(b"x" * (8 * MIB))), copy=True)
        held = os.fstat(mine.fd).st_blocks * 512
        mine.shrink()
        assert held >= 8 * MIB
        assert os.fstat(mine.fd).st_blocks * 512 <= MIB
        assert contents(told) == [b"x" * (8 * MIB)]
        assert contents(theirs.unpack(mine.pack(message(b"y" * (8 * MIB))))) == [b"y" * (8 * MIB)]


def test_nothing_of_it_stays() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with shared() as (mine, theirs):
        contents(theirs.unpack(mine.pack(message(b"x"))))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_packet_is_small_whatever_it_tells() -> None:
    """Of a model with patches on thousands of weights the names alone are more than a socket takes at once."""
    many = {f"a rather long name of a weight {number}": number for number in range(5000)}
    with shared() as (mine, theirs):
        packet = mine.pack(Message("load", {"patches": many, "all": list(message(b"x", b"y").body["all"])}))
        assert len(packet) < 100
        told = theirs.unpack(packet)
        assert (told.body["patches"], contents(told)) == (many, [b"x", b"y"])
        theirs.pack(message(b"an answer"), start=theirs.end)
        assert Arena.unpack(mine, packet).body["patches"] == many, "an answer lies behind what others may still read"


@pytest.mark.parametrize(
    "packet",
    [
        *(
            b"",
            b"\2",
            b"\3",
            b"\2" + PLACE.pack(0, 1),
            b"\2" + PLACE.pack(0, 1) + (9).to_bytes(8, "little") + b"12345678",
        ),
        *(
            b"\2" + PLACE.pack(0, 1) + b"\xff" * 8,
            b"\2" + PLACE.pack(0, 1 << 62),
            b"\0" * 9,
            b"\1" * 9,
            b"\1" + b"\xff" * 16,
            b"\1" + PLACE.pack(0, 1 << 40),
        ),
        *(b"\0" + PLACE.pack(0, 1), b"\0" + PLACE.pack(0, 1 << 62), b"\0" + b"\xff" * 24),
        *(b"\0" + PLACE.pack(0, 1) + (1 << 40).to_bytes(8, "little"), b"\0" + PLACE.pack(1 << 40, 1) + bytes(8)),
    ],
)
def test_packets_that_it_cannot_have_made(packet: bytes) -> None:
    with shared() as (mine, theirs):
        mine.pack(message(b"x"))
        with pytest.raises(ProtocolError, match="packet"):
            theirs.unpack(packet)


def test_places_that_do_not_fit_the_header() -> None:
    with shared() as (mine, theirs):
        packet = mine.pack(message(b"x" * PACKET_BYTES))
        with pytest.raises(ProtocolError, match=r"tensors\[0\]"):
            theirs.unpack(packet[: 1 + PLACE.size] + bytes(8) + packet[1 + PLACE.size + 8 :])
