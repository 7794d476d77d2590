"""Exchanges between ranks, and the time that they take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from tacod.rank.comm.peers import Peers, Slot
from tacod.rank.comm.staging import Staging
from tacod.rank.ops.fp8_linear import from_bytes, narrow_bytes, to_bytes

__all__ = ["Clock", "Exchange", "Group"]


class Clock:
    """How long this rank was in collectives: wall time on a CPU; on a GPU the device's own, which it adds up itself.

    Of a transfer that goes on while the rank computes, only what it still waits for counts.
    """

    def __init__(self) -> None:
        self.begun = 0
        """Exchanges of any kind that this rank has begun; ranks that have begun the same ones wait for nothing."""
        self._seconds = 0.0
        self._counter: Tensor | None = None
        self._seen: Tensor | None = None
        """What it showed when the host last waited for the GPU."""
        self._counted = 0

    @property
    def counter(self) -> Tensor:
        """The nanoseconds on the current GPU, int64 [1]: kernels add to it, those of a graph at each replay."""
        if self._counter is None:
            self._counter = torch.zeros(1, dtype=torch.int64, device="cuda")
        return self._counter

    @contextmanager
    def counting(self, on_gpu: bool) -> Iterator[None]:
        """Within, a collective or the wait for one."""
        if not on_gpu:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        self._mark(-1)
        try:
            yield
        finally:
            # One mark alone would count for ages.
            self._mark(1)

    def _mark(self, sign: int) -> None:
        from tacod.rank.ops import kernels

        kernels.count_time(self.counter, sign)

    def wait(self) -> None:
        """Until the current GPU is done with what this stream was given; `take_s` counts up to here."""
        if self._counter is not None:
            if self._seen is None:
                self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=True)
            self._seen.copy_(self._counter, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        if self._seen is not None:
            before, self._counted = self._counted, int(self._seen)
            self._seconds += (self._counted - before) / 1e9

    def take_s(self) -> float:
        """Seconds since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken


class Group:
    """Some ranks, seen from one of them. Every rank of a group must make the same calls in the same order.

    Without a process group it is one process alone, and no call of it communicates.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, clock: Clock | None = None) -> None:
        self.group = group
        self.clock = clock or Clock()
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.peers: Peers | None = None
        """Memory of its ranks that all of them write into, where they can."""
        self.staging: Staging | None = None
        """Memory of the host by which they exchange, where they can't."""

    def all_to_all(self, sent: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Exchange flat buffers: ``send[r]`` elements of ``sent`` go to rank r, ``receive[r]`` come from it."""
        self.clock.begun += 1
        received = sent.new_empty(sum(receive))
        width = sent.element_size()
        with self.clock.counting(sent.is_cuda):
            # As bytes, because gloo doesn't know every dtype in every version of torch, and nothing is added up here.
            dist.all_to_all_single(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                [n * width for n in receive],
                [n * width for n in send],
                group=self.group,
            )
        return received

    def exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor], narrow: bool = False) -> Exchange:
        """Begin to send ``sent[r]`` to each other rank r, and to receive ``received[r]`` from it.

        All are contiguous. ``narrow`` sends their rows in 8 bits.
        """
        return Exchange(self, sent, received, narrow)

    def settle(self, slot: Slot) -> None:
        """Wait until all that the ranks have written there has arrived."""
        self.clock.begun += 1
        slot.barrier(self.clock)

    def gather(self, part: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The ranks' parts, of ``sizes`` along ``dim``, joined on every rank."""
        if self.size == 1:
            return part
        dim %= part.ndim
        shapes = [(*part.shape[:dim], size, *part.shape[dim + 1 :]) for size in sizes]
        sent = part.reshape(-1)
        counts = [math.prod(shape) for shape in shapes]
        received = self.all_to_all(sent.repeat(self.size), [len(sent)] * self.size, counts)
        parts = zip(torch.split(received, counts), shapes, strict=True)
        return torch.cat([part.view(shape) for part, shape in parts], dim)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """``tensor`` as the rank ``source`` has it, on every rank; elsewhere it says shape and dtype."""
        self.clock.begun += 1
        flat = tensor.contiguous()
        with self.clock.counting(flat.is_cuda):
            dist.broadcast(flat.view(-1).view(torch.uint8), group=self.group, group_src=source)
        return flat

    def agree(self, verdict: bool) -> bool:
        """Whether all ranks say so."""
        if self.size == 1:
            return verdict
        self.clock.begun += 1
        said = torch.tensor([verdict], dtype=torch.uint8, device="cuda" if self._on_gpu else "cpu")
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self.group)
        return bool(said.item())

    @cached_property
    def _on_gpu(self) -> bool:
        """Whether its collectives' tensors are on a GPU."""
        return self.group is not None and dist.get_backend(self.group) == "nccl"

    def pass_on(self, sent: Tensor, count: int) -> Passing:
        """Begin to send a flat buffer to the next rank, and to receive ``count`` elements from the one before."""
        return Passing(self, sent, sent.new_empty(count))


class Exchange:
    """An all-to-all that, on GPUs, goes on while its rank computes.

    What a rank has for itself stays where it is: it puts it there.
    """

    def __init__(self, group: Group, sent: Sequence[Tensor], received: Sequence[Tensor], narrow: bool) -> None:
        self.group = group
        group.clock.begun += 1
        self._received = received
        self._narrow = narrow
        self._work: dist.Work | Staging | None = None
        nothing = sent[0].new_empty(0, dtype=torch.uint8)
        # As bytes, because gloo doesn't know every dtype in every version of torch, and nothing is added up here.
        others = [rank != group.rank for rank in range(group.size)]
        self._away = [self._bytes(each) if other else nothing for each, other in zip(sent, others, strict=True)]
        self._coming = [self._place(each) if other else nothing for each, other in zip(received, others, strict=True)]
        if group.staging is not None:
            self._work = group.staging
            group.staging.exchange(self._away, self._coming)
            return
        if sent[0].is_cuda:
            self._work = dist.all_to_all(self._coming, self._away, group=group.group, async_op=True)
            return
        # gloo knows no lists.
        sizes = [len(each) for each in self._coming]
        arrived = group.all_to_all(torch.cat(self._away), [len(each) for each in self._away], sizes)
        for each, part in zip(self._coming, torch.split(arrived, sizes), strict=True):
            each.copy_(part)

    def _bytes(self, sent: Tensor) -> Tensor:
        return to_bytes(sent) if self._narrow else sent.view(-1).view(torch.uint8)

    def _place(self, received: Tensor) -> Tensor:
        if not self._narrow:
            return received.view(-1).view(torch.uint8)
        size = narrow_bytes(received.numel() // max(received.shape[-1], 1), received.shape[-1])
        return received.new_empty(size, dtype=torch.uint8)

    def wait(self) -> None:
        """What is computed from here on finds what was received; the clock counts what was not hidden."""
        if self._work is not None:
            with self.group.clock.counting(on_gpu=True):
                self._work.wait()
        if self._narrow:
            for coming, received in zip(self._coming, self._received, strict=True):
                if len(coming):
                    from_bytes(coming, received)


class Passing:
    """A transfer around the ring that goes on while its rank computes."""

    def __init__(self, group: Group, sent: Tensor, received: Tensor) -> None:
        self.group = group
        group.clock.begun += 1
        self.received = received
        self._sent = sent  # kept from being freed, or written to, while it travels
        ranks = dist.get_process_group_ranks(group.group)
        operations = []
        if sent.numel():
            peer = ranks[(group.rank + 1) % group.size]
            operations.append(dist.P2POp(dist.isend, sent.view(torch.uint8), peer, group.group))
        if received.numel():
            peer = ranks[(group.rank - 1) % group.size]
            operations.append(dist.P2POp(dist.irecv, received.view(torch.uint8), peer, group.group))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """What came from the rank before."""
        with self.group.clock.counting(self.received.is_cuda):
            for work in self._works:
                work.wait()
        return self.received
