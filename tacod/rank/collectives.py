"""Exchanges between ranks, and the time that they take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Clock", "Group"]


class Clock:
    """How long this rank was in collectives: wall time on a CPU, CUDA events on a GPU, read without a wait per call."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, on_gpu: bool) -> None:
        """A collective starts."""
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            self._events.append((begin, end))
        else:
            self._started = time.perf_counter()

    def end(self, on_gpu: bool) -> None:
        """The collective that started last is over."""
        if on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take_s(self) -> float:
        """Seconds since the last call; on a GPU this waits for the last collective to end."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
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

    def all_to_all(self, sent: Tensor, send: Sequence[int], receive: Sequence[int]) -> tuple[Tensor, ...]:
        """Exchange flat buffers: ``send[r]`` elements of ``sent`` go to rank r, ``receive[r]`` come from it."""
        received = sent.new_empty(sum(receive))
        width = sent.element_size()
        self.clock.begin(sent.is_cuda)
        # As bytes, because gloo doesn't know every dtype in every version of torch, and nothing is added up here.
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [n * width for n in receive],
            [n * width for n in send],
            group=self.group,
        )
        self.clock.end(sent.is_cuda)
        return torch.split(received, list(receive))

    def gather(self, part: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The ranks' parts, of ``sizes`` along ``dim``, joined on every rank."""
        if self.size == 1:
            return part
        dim %= part.ndim
        shapes = [(*part.shape[:dim], size, *part.shape[dim + 1 :]) for size in sizes]
        sent = part.reshape(-1)
        parts = self.all_to_all(sent.repeat(self.size), [len(sent)] * self.size, [math.prod(shape) for shape in shapes])
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """``tensor`` as the rank ``source`` has it, on every rank; elsewhere it says shape and dtype."""
        flat = tensor.contiguous()
        self.clock.begin(flat.is_cuda)
        dist.broadcast(flat.view(-1).view(torch.uint8), group=self.group, group_src=source)
        self.clock.end(flat.is_cuda)
        return flat

    def pass_on(self, sent: Tensor, count: int) -> Passing:
        """Begin to send a flat buffer to the next rank, and to receive ``count`` elements from the one before."""
        return Passing(self, sent, sent.new_empty(count))


class Passing:
    """A transfer around the ring that goes on while its rank computes."""

    def __init__(self, group: Group, sent: Tensor, received: Tensor) -> None:
        self.group = group
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
        self.group.clock.begin(self.received.is_cuda)
        for work in self._works:
            work.wait()
        self.group.clock.end(self.received.is_cuda)
        return self.received
