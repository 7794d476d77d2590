"""Collectives between some ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tacod.rank.comm.clock import Clock

__all__ = ["Group", "MakeGroup", "Passing"]

MakeGroup = Callable[[list[list[int]]], dist.ProcessGroup]
"""Splits all ranks into process groups and returns this rank's; every rank must call it with the same groups."""
Number = TypeVar("Number", int, float)


class Group:
    """Some ranks, seen from one of them; every rank of a group must make the same calls in the same order.

    Without a process group it stands for one process alone, and no call communicates.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, clock: Clock | None = None) -> None:
        self.group = group
        self.clock = clock or Clock()
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

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

    def gather(self, part: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The ranks' parts, of ``sizes`` along ``dim``, joined on every rank."""
        if self.size == 1:
            return part
        dim %= part.ndim
        before, after = part.shape[:dim], part.shape[dim + 1 :]
        shapes = [(*before, size, *after) for size in sizes]
        counts = [math.prod(shape) for shape in shapes]
        received = self._to_all(part.reshape(-1), counts)
        if math.prod(before) == 1:
            # One behind the other, as they arrive.
            return received.view(*before, sum(sizes), *after)
        parts = zip(torch.split(received, counts), shapes, strict=True)
        return torch.cat([part.view(shape) for part, shape in parts], dim)

    def _to_all(self, sent: Tensor, receive: Sequence[int]) -> Tensor:
        """Send a flat buffer to every rank; ``receive[r]`` elements come from rank r."""
        if not self.on_gpu:
            # gloo sends one buffer only, so each rank's copy is in it.
            return self.all_to_all(sent.repeat(self.size), [len(sent)] * self.size, receive)
        self.clock.begun += 1
        received = sent.new_empty(sum(receive))
        arriving = torch.split(received.view(torch.uint8), [n * sent.element_size() for n in receive])
        with self.clock.counting(sent.is_cuda):
            dist.all_to_all(list(arriving), [sent.view(torch.uint8)] * self.size, group=self.group)
        return received

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The ``tensor`` of the rank ``source``, on every rank; on the others, ``tensor`` gives shape and dtype."""
        self.clock.begun += 1
        flat = tensor.contiguous()
        with self.clock.counting(flat.is_cuda):
            dist.broadcast(flat.view(-1).view(torch.uint8), group=self.group, group_src=source)
        return flat

    def agree(self, verdict: bool) -> bool:
        """Whether it is true on all ranks."""
        if self.size == 1:
            return verdict
        self.clock.begun += 1
        said = torch.tensor([verdict], dtype=torch.uint8, device=self._device)
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self.group)
        return bool(said.item())

    def maximum(self, number: Tensor) -> Tensor:
        """The largest of the ranks' numbers, fp32 of one shape, on every rank."""
        if self.size == 1:
            return number
        self.clock.begun += 1
        found = number.clone()
        with self.clock.counting(found.is_cuda):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found

    def sum(self, addend: Tensor) -> Tensor:
        """The sum of the ranks' tensors, of one shape and in fp32, on every rank."""
        if self.size == 1:
            return addend
        self.clock.begun += 1
        found = addend.contiguous().clone()
        with self.clock.counting(found.is_cuda):
            dist.all_reduce(found, dist.ReduceOp.SUM, group=self.group)
        return found

    def numbers(self, number: Number) -> list[Number]:
        """Every rank's number, in the order of ranks."""
        dtype = torch.float64 if isinstance(number, float) else torch.int64
        mine = torch.tensor([number], dtype=dtype, device=self._device)
        everyones: list[Number] = self.gather(mine, [1] * self.size, dim=0).tolist()
        return everyones

    def tell(self, told: bytes) -> list[bytes]:
        """What each rank tells the others, of any length, in the order of ranks."""
        lengths = self.numbers(len(told))
        # An empty one is no buffer.
        mine = torch.frombuffer(bytearray(told) + b"\0", dtype=torch.uint8)[:-1].to(self._device)
        everyones = self.gather(mine, lengths, dim=0).cpu()
        return [part.numpy().tobytes() for part in torch.split(everyones, lengths)]

    @property
    def _device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    @cached_property
    def on_gpu(self) -> bool:
        """Whether its collectives' tensors are on a GPU."""
        return self.group is not None and dist.get_backend(self.group) == "nccl"

    def pass_on(self, sent: Tensor, count: int) -> Passing:
        """Begin to send a flat buffer to the next rank and to receive ``count`` elements from the previous one."""
        return Passing(self, sent, sent.new_empty(count))


class Passing:
    """A transfer around the ring that runs while its rank computes."""

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
        """What came from the previous rank."""
        with self.group.clock.counting(self.received.is_cuda):
            for work in self._works:
                work.wait()
        return self.received
