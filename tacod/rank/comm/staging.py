"""Exchanges through the host's memory, between GPUs that don't reach each other's.

NCCL does the same with kernels, which wait until a matrix product leaves them room, and with proxies on the host. Here
a GPU's copy engines put what leaves into mailboxes in memory that all ranks share, and fetch what is for them, while
both compute: each pair of ranks has its own for each direction, of a few slots. A slot's flag says whether it is full;
GPUs wait for flags, and set them, without a kernel and without the host, also within a CUDA graph.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tacod.rank.comm import cuda_driver
from tacod.rank.comm.group import Group

__all__ = ["EMPTY", "FULL", "SLOT_BYTES", "Device", "Mailboxes", "Staging", "exchange", "reach_host"]

log = logging.getLogger(__name__)

SLOTS = 2
"""One is filled while the other is emptied."""
SLOT_BYTES = 4 << 20
FLAG_BYTES = 64
"""A flag has a cache line of its own."""
EMPTY, FULL = 0, 1
_TRY_BYTES = 3 * SLOT_BYTES + 16


class Mailboxes:
    """Where in the common memory each slot and its flag lie, for so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        boxes = ranks * ranks * SLOTS
        self._slots = -(-boxes * FLAG_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size = self._slots + boxes * SLOT_BYTES

    def slot(self, source: int, target: int, number: int) -> tuple[int, int]:
        """Offsets of the flag and of the slot for piece ``number`` of what one rank has for another."""
        box = (source * self.ranks + target) * SLOTS + number % SLOTS
        return box * FLAG_BYTES, self._slots + box * SLOT_BYTES


class Device(Protocol):
    """What copies and waits, in order on each of two streams that go on by themselves."""

    def begin(self) -> None:
        """What is sent from here on finds what was computed before."""

    def leave(self, source: Tensor, flag: int, slot: int) -> None:
        """Once the flag says empty, copy bytes into a slot, and say full; ``flag`` and ``slot`` are offsets."""

    def fetch(self, target: Tensor, flag: int, slot: int) -> None:
        """Once the flag says full, copy bytes out of a slot, and say empty."""

    def join(self) -> None:
        """What is computed from here on finds what was fetched."""


def exchange(rank: int, boxes: Mailboxes, device: Device, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
    """Begin to send ``sent[r]`` to each other rank r, and to receive ``received[r]`` from it: flat, in uint8.

    Every rank calls it alike. `Device.join` ends it.
    """
    device.begin()
    for turn in range(1, boxes.ranks):
        to, source = (rank + turn) % boxes.ranks, (rank - turn) % boxes.ranks
        leaving, coming = _pieces(sent[to]), _pieces(received[source])
        # In turns: whatever queue they share, none that waits stands before one that another rank waits for.
        for number in range(max(len(leaving), len(coming))):
            if number < len(leaving):
                device.leave(leaving[number], *boxes.slot(rank, to, number))
            if number < len(coming):
                device.fetch(coming[number], *boxes.slot(source, rank, number))


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    return torch.split(flat, SLOT_BYTES) if len(flat) else ()


class GPU:
    """The current GPU, and memory of the host that it has mapped."""

    def __init__(self, fd: int, size: int) -> None:
        self._memory = mmap.mmap(fd, size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        cuda_driver.map_host(self._address, size)
        self._leaving, self._coming = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Let go of the memory, once nothing is under way."""
        torch.cuda.synchronize()
        cuda_driver.unmap_host(self._address)

    def begin(self) -> None:
        """See `Device.begin`."""
        for stream in (self._leaving, self._coming):
            stream.wait_stream(torch.cuda.current_stream())

    def leave(self, source: Tensor, flag: int, slot: int) -> None:
        """See `Device.leave`."""
        with torch.cuda.stream(self._leaving):
            cuda_driver.wait_until(self._address + flag, EMPTY)
            cuda_driver.copy_bytes(source.data_ptr(), self._address + slot, source.nbytes)
            cuda_driver.write(self._address + flag, FULL)

    def fetch(self, target: Tensor, flag: int, slot: int) -> None:
        """See `Device.fetch`."""
        # The GPU knows nothing of what waits for other ranks: it is to keep the order in which it was asked.
        self._coming.wait_stream(self._leaving)
        with torch.cuda.stream(self._coming):
            cuda_driver.wait_until(self._address + flag, FULL)
            cuda_driver.copy_bytes(self._address + slot, target.data_ptr(), target.nbytes)
            cuda_driver.write(self._address + flag, EMPTY)

    def join(self) -> None:
        """See `Device.join`."""
        for stream in (self._leaving, self._coming):
            torch.cuda.current_stream().wait_stream(stream)


class Staging:
    """The mailboxes between a group's GPUs, seen from one of its ranks."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._boxes = Mailboxes(group.size)
        self._gpu: GPU | None = None

    def exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """See `exchange`. Until `wait`, what is sent stays as it is and what is received isn't read."""
        if self._gpu is None:
            self._gpu = self._open()
        exchange(self._group.rank, self._boxes, self._gpu, sent, received)

    def wait(self) -> None:
        """What is computed from here on finds what was received, and may write to what was sent."""
        assert self._gpu is not None
        self._gpu.join()

    def _open(self) -> GPU:
        """Memory that rank 0 makes and the others open.

        Raises `RuntimeError` or `OSError` on all ranks if one can't.
        """
        own, gpu = -1, None
        problem: Exception = RuntimeError("another rank can't open it")
        try:
            if self._group.rank == 0:
                own = os.memfd_create("tacod-staging")
                os.ftruncate(own, self._boxes.size)
        except OSError as error:
            problem = error
        place = torch.tensor([os.getpid(), own], dtype=torch.int64, device="cuda")
        pid, number = self._group.broadcast(place, source=0).tolist()
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
            try:
                gpu = GPU(fd, self._boxes.size)
            finally:
                os.close(fd)
        except (OSError, RuntimeError) as error:
            problem = error
        everywhere = self._group.agree(gpu is not None)
        if own >= 0:
            os.close(own)
        if gpu is not None and everywhere:
            return gpu
        if gpu is not None:
            gpu.close()
        raise problem

    def discard(self) -> None:
        """Begin anew at the next exchange: a forward that failed may have left some of it.

        Every graph that exchanges by it must be gone.
        """
        if self._gpu is not None:
            self._gpu.close()
        self._gpu = None


def reach_host(group: Group) -> Staging | None:
    """Memory of the host by which this group's GPUs exchange; None, and why in the log, if they can't.

    All of its ranks call it.
    """
    staging = Staging(group)
    arrived, reason = False, "another rank can't"
    try:
        arrived = _arrives(staging, group)
        if not arrived:
            reason = "what was sent did not arrive"
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    if group.agree(arrived):
        log.info("the GPUs exchange through the host's memory")
        return staging
    staging.discard()
    log.warning("the GPUs don't exchange through the host's memory by themselves: %s; NCCL does it for them", reason)
    return None


def _arrives(staging: Staging, group: Group) -> bool:
    """Whether each rank gets what every other one has for it, in more pieces than there are slots."""
    numbers = torch.arange(_TRY_BYTES // 8, device="cuda")
    sent = [(numbers * group.size + group.rank) * group.size + rank for rank in range(group.size)]
    received = [torch.zeros_like(numbers) for _ in sent]
    staging.exchange([each.view(torch.uint8) for each in sent], [each.view(torch.uint8) for each in received])
    staging.wait()
    others = ((rank, each) for rank, each in enumerate(received) if rank != group.rank)
    return all(bool((each == (numbers * group.size + rank) * group.size + group.rank).all()) for rank, each in others)
