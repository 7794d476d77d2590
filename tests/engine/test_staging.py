"""Exchanges through the host's memory, without GPUs: what each would do, in any order that its streams allow."""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tacod.rank.comm import staging
from tacod.rank.comm.staging import EMPTY, FULL, Mailboxes, exchange

SLOT = 4


class Host:
    """The memory in common; fresh, all flags say empty."""

    def __init__(self) -> None:
        self.flags: dict[int, int] = {}
        self.slots: dict[int, Tensor] = {}


class FakeGPU:
    """Two streams, whose next operation is done when the test says so and the flag that it waits for allows.

    In one queue, what was asked for later is done later.
    """

    def __init__(self, host: Host, queues: int) -> None:
        self.host = host
        self.streams: tuple[deque[tuple[str, Tensor, int, int]], ...] = tuple(deque() for _ in range(queues))

    def begin(self) -> None:
        pass

    def leave(self, source: Tensor, flag: int, slot: int) -> None:
        self.streams[0].append(("leave", source, flag, slot))

    def fetch(self, target: Tensor, flag: int, slot: int) -> None:
        self.streams[-1].append(("fetch", target, flag, slot))

    def join(self) -> None:
        pass

    def steps(self) -> list[deque[tuple[str, Tensor, int, int]]]:
        """The streams whose next operation can be done."""
        wanted = {"leave": EMPTY, "fetch": FULL}
        return [each for each in self.streams if each and self.host.flags.get(each[0][2], EMPTY) == wanted[each[0][0]]]

    def do(self, stream: deque[tuple[str, Tensor, int, int]]) -> None:
        verb, tensor, flag, slot = stream.popleft()
        if verb == "leave":
            self.host.slots[slot] = tensor.clone()
            self.host.flags[flag] = FULL
        else:
            tensor.copy_(self.host.slots.pop(slot))
            self.host.flags[flag] = EMPTY


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SLOT_BYTES", SLOT)


@pytest.mark.parametrize("queues", [1, 2])
@settings(deadline=None)
@given(data=st.data(), ranks=st.integers(2, 5), exchanges=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_all_arrives_in_whatever_order_streams_go_on(
    data: st.DataObject, ranks: int, exchanges: int, seed: int, queues: int
) -> None:
    """Also of exchanges that begin before earlier ones end, and of parts that are empty or longer than all slots."""
    order = random.Random(seed)
    host, boxes = Host(), Mailboxes(ranks)
    gpus = [FakeGPU(host, queues) for _ in range(ranks)]
    expected: list[tuple[Tensor, Tensor]] = []
    for _ in range(exchanges):
        sizes = data.draw(st.lists(st.integers(0, 4 * SLOT), min_size=ranks**2, max_size=ranks**2))
        sent = [
            [torch.randint(256, (sizes[a * ranks + b],), dtype=torch.uint8) for b in range(ranks)] for a in range(ranks)
        ]
        received = [[torch.zeros(sizes[b * ranks + a], dtype=torch.uint8) for b in range(ranks)] for a in range(ranks)]
        for rank, gpu in enumerate(gpus):
            exchange(rank, boxes, gpu, sent[rank], received[rank])
        expected += [(received[a][b], sent[b][a]) for a in range(ranks) for b in range(ranks) if a != b]
    while any(stream for gpu in gpus for stream in gpu.streams):
        able = [(gpu, stream) for gpu in gpus for stream in gpu.steps()]
        assert able, "each waits for another"
        gpu, stream = order.choice(able)
        gpu.do(stream)
    assert all(torch.equal(got, wanted) for got, wanted in expected)
    assert not any(host.flags.values()), "every mailbox is empty again"


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_no_two_slots_overlap(ranks: int) -> None:
    boxes = Mailboxes(ranks)
    places = [boxes.slot(a, b, n) for a in range(ranks) for b in range(ranks) for n in range(staging.SLOTS)]
    flags, slots = (sorted(each) for each in zip(*places, strict=True))
    assert all(b - a >= staging.FLAG_BYTES for a, b in itertools.pairwise(flags))
    assert all(b - a >= SLOT for a, b in itertools.pairwise(slots))
    assert flags[-1] + staging.FLAG_BYTES <= slots[0]
    assert slots[-1] + SLOT <= boxes.size
    assert boxes.slot(0, 1, 0) == boxes.slot(0, 1, staging.SLOTS), "slots are used in turns"
