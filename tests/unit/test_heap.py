"""What a burst leaves in the heap is given back, and what steps use is not."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from unittest import mock

import pytest

from tacod import heap
from tacod.serving.guard import own_bytes

MIB = 1 << 20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these functions")


@pytest.fixture
def given_back() -> Iterator[mock.Mock]:
    with mock.patch.object(heap, "give_back") as give_back, mock.patch.object(heap, "_free_bytes", return_value=0):
        yield give_back


def look(leftovers: heap.Leftovers, at: int, passed_mib: int, free_mib: int) -> None:
    with mock.patch.object(heap, "_free_bytes", return_value=free_mib * MIB):
        leftovers.attend(at * heap.LOOK_S, passed_mib * MIB)


def test_a_burst_is_given_back_once_it_is_over(given_back: mock.Mock) -> None:
    leftovers = heap.Leftovers()
    look(leftovers, 1, 0, 10)
    look(leftovers, 2, 600, 500)
    assert not given_back.called, "what came since the last look may come again"
    look(leftovers, 3, 600, 500)
    assert given_back.call_count == 1
    look(leftovers, 4, 600, 20)
    assert given_back.call_count == 1


def test_what_steps_use_again_and_again_stays(given_back: mock.Mock) -> None:
    leftovers = heap.Leftovers()
    for at in range(1, 20):
        look(leftovers, at, at * 300, 200)
    assert not given_back.called


def test_a_burst_beside_small_steps_is_given_back(given_back: mock.Mock) -> None:
    leftovers = heap.Leftovers()
    look(leftovers, 1, 1000, 900)
    look(leftovers, 2, 1010, 900)
    assert given_back.call_count == 1


def test_it_looks_now_and_then_only(given_back: mock.Mock) -> None:
    leftovers = heap.Leftovers()
    look(leftovers, 1, 0, 500)
    leftovers.attend(heap.LOOK_S * 1.5, 0)
    assert given_back.call_count == 1


def test_free_pages_are_found_and_given_back() -> None:
    heap.keep_freed_memory()
    blocks = [b"x" * MIB for _ in range(200)]  # zeros would take no memory
    blocks = [block for index, block in enumerate(blocks) if index == 199]
    assert heap._free_bytes() > 150 * MIB
    before = own_bytes()
    heap.give_back()
    assert own_bytes() < before - 100 * MIB
    del blocks
