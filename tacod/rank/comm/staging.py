"""Exchanges through the host's memory, between GPUs without peer access.

NCCL does the same with kernels, which wait until a matrix product leaves them room, and with proxy threads on the host.
Here a GPU's copy engines write what it sends into mailboxes in memory that all ranks share, and read what is sent to
it, while both compute. Each pair of ranks has a mailbox for each direction, with a few slots. A slot's flag says
whether it is full. GPUs wait for flags and set them without a kernel and without the host, also within a CUDA graph.
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
"""Two, so that one is filled while the other is emptied."""
SLOT_BYTES = 4 << 20
FLAG_BYTES = 64
"""Each flag has a cache line of its own."""
EMPTY, FULL = 0, 1
_TRY_BYTES = 3 * SLOT_BYTES + 16


class Mailboxes:
    """Where each slot and its flag lie in the shared memory, for this many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        boxes = ranks * ranks * SLOTS
        self._slots = -(-boxes * FLAG_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size = self._slots + boxes * SLOT_BYTES

    def slot(self, source: int, target: int, number: int) -> tuple[int, int]:
        """Offsets of the flag and of the slot for piece ``number`` of what one rank sends to another."""
        box = (source * self.ranks + target) * SLOTS + number % SLOTS
        return box * FLAG_BYTES, self._slots + box * SLOT_BYTES


class Device(Protocol):
    """Copies and waits, in order on each of two streams that run beside the current one."""

    def begin(self) -> None:
        """Make what is sent from here on include all earlier work of the current stream."""

    def leave(self, source: Tensor, flag: int, slot: int) -> None:
        """Wait until the flag says empty, copy bytes into a slot, and set the flag to full.

        ``flag`` and ``slot`` are offsets.
        """

    def fetch(self, target: Tensor, flag: int, slot: int) -> None:
        """Wait until the flag says full, copy bytes out of a slot, and set the flag to empty."""

    def join(self) -> None:
        """Make later work on the current stream see what was fetched."""


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
    """The current GPU with mapped host memory."""

    def __init__(self, fd: int, size: int) -> None:
        self._memory = mmap.mmap(fd, size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        cuda_driver.map_host(self._address, size)
        self._leaving, self._coming = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Release the memory, once no copy is under way."""
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
        """See `exchange`. Until `wait`, what is sent must not change, and what is received must not be read."""
        if self._gpu is None:
            self._gpu = self._open()
        exchange(self._group.rank, self._boxes, self._gpu, sent, received)

    def wait(self) -> None:
        """Make later work see what was received; it may also overwrite what was sent."""
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
        """Start over at the next exchange, because a failed forward may have left some data.

        No graph may use it any more.
        """
        if self._gpu is not None:
            self._gpu.close()
        self._gpu = None


def reach_host(group: Group) -> Staging | None:
    """Host memory by which this group's GPUs exchange; None if they can't, with the reason in the log.

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
    """Whether data that each rank sends arrives at every other rank, in more pieces than there are slots."""
    numbers = torch.arange(_TRY_BYTES // 8, device="cuda")
    sent = [(numbers * group.size + group.rank) * group.size + rank for rank in range(group.size)]
    received = [torch.zeros_like(numbers) for _ in sent]
    staging.exchange([each.view(torch.uint8) for each in sent], [each.view(torch.uint8) for each in received])
    staging.wait()
    others = ((rank, each) for rank, each in enumerate(received) if rank != group.rank)
    return all(bool((each == (numbers * group.size + rank) * group.size + group.rank).all()) for rank, each in others)
