"""Asynchronous attention over tokens that ranks share: exchange tokens for heads, attend, and exchange back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tacod.plan import chunks
from tacod.rank.comm.group import Exchange, Group
from tacod.rank.comm.peers import Slot
from tacod.rank.ops.fused import Projected, copy_heads, has_kernels
from tacod.rank.ops.sdpa import attend, attend_part, merge
from tacod.rank.ops.split_kv import attend_in_waves

if TYPE_CHECKING:
    from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["JointAttention"]


class JointAttention:
    """The handle of an asynchronous attention. Work between its creation, `start` and `wait` overlaps communication.

    Tokens are the first dimension of everything that is exchanged, so parts that arrive form one tensor in place.
    """

    def __init__(
        self,
        sequence: SequenceParallel,
        streams: Sequence[Callable[[], Projected]],
        lengths: Sequence[int],
        mask: Tensor | None,
        overlap: bool = False,
    ) -> None:
        """Project each stream, the longest first, and send its heads while the next one is projected.

        ``overlap`` says that the caller computes something before `start`, so the last stream travels beside that.
        """
        size = sequence.ulysses.size
        counts = [sequence.sizes(length) for length in lengths]
        if len(streams) < len(lengths):
            counts = [[sum(each) for each in zip(*counts, strict=True)]]
        self._streams = [[each[i : i + size] for each in counts] for i in range(0, sequence.size, size)]
        """For each run of ranks, how many of each stream's tokens each of its ranks has."""
        self._sequence = sequence
        self._mask = mask
        self._coming: list[Exchange] = []
        self._back: Exchange | None = None
        self._out: Tensor | None = None
        self._received: Tensor | None = None
        self._slot: Slot | None = None
        self._started = False
        order = sorted(range(len(streams)), key=lambda index: -max(counts[index]))
        projected = {}
        for index in order:
            projected[index] = streams[index]()
            if sequence.size > 1 or has_kernels(projected[index].qkv):
                self._send(projected.pop(index), index, overlap or index != order[-1])
        if projected:
            # What can be differentiated: nothing is written in place.
            joint = zip(*(projected[index].heads_now() for index in range(len(streams))), strict=True)
            self._qkv = torch.stack([torch.cat(parts, dim=1) for parts in joint]).transpose(2, 3)

    @property
    def _tokens(self) -> list[list[int]]:
        """For each run, how many tokens each of its ranks has."""
        return [[sum(each) for each in zip(*run, strict=True)] for run in self._streams]

    @property
    def _others(self) -> list[int]:
        """The other ranks of the run, from the next one on: no two ranks begin with the same."""
        group = self._sequence.ulysses
        return [(group.rank + turn) % group.size for turn in range(1, group.size)]

    def _send(self, stream: Projected, index: int, overlap: bool) -> None:
        """Set out this rank's heads of a stream for each rank of its run, and have them travel while it computes on.

        What nothing is computed beside is stored right where it is to be, if this rank reaches that.
        """
        group, ring = self._sequence.ulysses, self._sequence.ring
        run, tokens = self._streams[ring.rank], self._tokens[ring.rank]
        batch, width, dtype = len(stream.qkv), stream.parts.shape[-1], stream.qkv.dtype
        if self._received is None:
            self._heads = chunks(stream.heads, group.size)
            if self._sequence.peers is not None:
                self._slot = self._sequence.peers.open(tokens, batch, self._heads, width, dtype)
                self._received = self._slot.received(group.rank)
            else:
                self._received = stream.qkv.new_empty(sum(tokens), batch, 3, self._heads[group.rank], width)
            self._qkv = self._received.permute(2, 1, 3, 0, 4)
        # Where, among all tokens, this stream's of each rank begin.
        first = [sum(tokens[:rank]) + sum(each[rank] for each in run[:index]) for rank in range(group.size)]
        counts = run[index]
        if self._slot is not None:
            mine = slice(first[group.rank], first[group.rank] + counts[group.rank])
            targets = [self._slot.received(rank)[mine] for rank in range(group.size)]
            places = [
                torch.empty_like(target) if overlap and rank != group.rank else target
                for rank, target in enumerate(targets)
            ]
            stream.pack(places)
            for rank in self._others if overlap else ():
                self._slot.send(places[rank], targets[rank])
            return
        arriving = [self._received.narrow(0, *each) for each in zip(first, counts, strict=True)]
        places = [stream.qkv.new_empty(counts[group.rank], batch, 3, count, width) for count in self._heads]
        places[group.rank] = arriving[group.rank]
        stream.pack(places)
        if group.size > 1:
            self._coming.append(group.exchange(places, arriving, self._sequence.policy.exchange == "int8"))

    def start(self) -> None:
        """Attend and send the result back while the caller computes something else. Optional: `wait` does it too."""
        self._start(overlap=True)

    def _start(self, overlap: bool) -> None:
        self._started = True
        ring, group = self._sequence.ring, self._sequence.ulysses
        for exchange in self._coming:
            exchange.wait()
        if self._slot is not None:
            group.settle(self._slot)
        q, k, v = self._qkv
        if group.size == 1:
            out = self._around_ring(q, k, v) if ring.size > 1 else attend(q, k, v, self._mask)
            self._out = out.transpose(1, 2).flatten(2)
            return
        results = self._results(q, k, v)
        if self._slot is not None:
            self._store_back(self._slot, results, overlap)
            return
        first, *more = results
        leaving = list(torch.split(torch.cat((first, *more)) if more else first, self._tokens[ring.rank]))
        kept = leaving[group.rank]
        tokens, batch, _, width = kept.shape
        self._parts = [kept.new_empty(tokens, batch, count, width) for count in self._heads]
        self._parts[group.rank] = kept
        self._back = group.exchange(leaving, self._parts, self._sequence.policy.exchange == "int8")

    def _results(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
        """This rank's heads for the run's tokens, in one result or several: [S', B, h, D], contiguous."""
        if self._sequence.ring.size > 1:
            yield self._around_ring(q, k, v).permute(2, 0, 1, 3).contiguous()
        elif self._sequence.policy.split_kv and self._mask is None:
            yield from attend_in_waves(q, k, v)
        else:
            yield attend(q, k, v, self._mask).permute(2, 0, 1, 3).contiguous()

    def _around_ring(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _around(self._sequence.ring, q, k, v, list(map(sum, self._tokens)), self._mask)

    def _store_back(self, slot: Slot, results: Iterator[Tensor], overlap: bool) -> None:
        """Store what belongs to each rank's tokens there: by copy engines if something is computed overlap."""
        group, tokens = self._sequence.ulysses, self._tokens[self._sequence.ring.rank]
        heads = slice(sum(self._heads[: group.rank]), sum(self._heads[: group.rank + 1]))
        done, total = 0, sum(tokens)
        for result in results:
            more = overlap or done + len(result) < total
            for rank in (*self._others, group.rank):
                # The part of this result that is that rank's.
                begin = sum(tokens[:rank])
                first, last = max(done, begin), min(done + len(result), begin + tokens[rank])
                if first >= last:
                    continue
                source = result[first - done : last - done]
                target = slot.returned(rank)[first - begin : last - begin, :, heads]
                if more and rank != group.rank:
                    slot.send(source, target)
                else:
                    copy_heads(source, target)
            done += len(result)

    def wait(self) -> Tensor:
        """The attention output of this rank's tokens, [B, S, H * D].

        Where ranks write into each other's memory this is a view of that memory. It stays valid until the next
        attention in the same slot begins, at the earliest the next `SequenceParallel.attend` after this call, which
        overwrites it. Consume it before, or clone it.
        """
        if not self._started:
            self._start(overlap=False)
        if self._back is not None:
            self._back.wait()
            self._out = torch.cat(self._parts, dim=2).transpose(0, 1).flatten(2)
        if self._slot is not None:
            group = self._sequence.ulysses
            group.settle(self._slot)
            self._out = self._slot.returned(group.rank).transpose(0, 1).flatten(2)
            self._slot.close()
        assert self._out is not None
        return self._out


def _around(group: Group, q: Tensor, k: Tensor, v: Tensor, tokens: list[int], mask: Tensor | None) -> Tensor:
    """Attention of this rank's queries over the keys of the whole ring [B, h, S, D]; ``tokens`` are each rank's."""
    rows = None if mask is None else torch.split(mask, tokens, dim=2)[group.rank]
    masks = [None] * group.size if rows is None else torch.split(rows, tokens, dim=3)
    batch, heads, _, width = k.shape
    block = torch.stack((k, v))
    part = None
    for turn in range(group.size):
        before = tokens[(group.rank - turn - 1) % group.size]
        passing = None
        if turn < group.size - 1:
            passing = group.pass_on(block.reshape(-1), 2 * batch * heads * before * width)
        mine = attend_part(q, block[0], block[1], masks[(group.rank - turn) % group.size])
        part = mine if part is None else merge(part, mine)
        if passing is not None:
            block = passing.wait().view(2, batch, heads, before, width)
    assert part is not None
    return part[0].to(q.dtype)
