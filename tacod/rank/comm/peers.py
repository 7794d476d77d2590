"""Memory that the ranks of a group write into directly: each rank stores what it sends where it will be read.

A collective copies packed data once more, in a kernel that has to wait for a free multiprocessor. A rank that can
access the others' memory (over NVLink, or PCIe where the cards allow it) packs data there, or has a copy engine move it
there while it computes. Based on PyTorch's symmetric memory.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tacod.rank.comm import cuda_driver
from tacod.rank.comm.clock import Clock
from tacod.rank.comm.collective import Collective
from tacod.rank.comm.group import Group
from tacod.rank.comm.transport import Deal, Exchange
from tacod.rank.ops.qkv import QKV, copy_heads

__all__ = ["Peer", "reach_peers"]

log = logging.getLogger(__name__)

_ALIGNED = 256
_TRY_BYTES = 1 << 16
DISABLED = "NCCL_P2P_DISABLE"
"""NCCL's variable that turns access to other GPUs' memory off."""


class Block(Protocol):
    """An equal piece of memory on each rank, seen from one of them."""

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
        """A tensor in the memory of ``rank``, from the byte ``start`` on."""

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy rows into a rank's memory while this rank computes; ``source`` must not change until the barrier."""

    def barrier(self, clock: Clock) -> None:
        """Make later work see what every rank wrote or sent before its own call. The clock counts the wait."""


class SymmetricBlock:
    """A block on GPUs."""

    def __init__(self, group: dist.ProcessGroup | None, size: int, agree: Callable[[bool], bool] | None = None) -> None:
        """Make it on all ranks at once.

        A rank that has no memory leaves the others waiting, unless ``agree`` says whether all have some
        (`Group.agree`). Raises `RuntimeError` if there is none.
        """
        import torch.distributed._symmetric_memory as symmetric

        assert group is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in some versions it is enabled by itself
            symmetric.enable_symm_mem_for_group(group.group_name)
        device = torch.device("cuda", torch.cuda.current_device())
        problem: RuntimeError | None = None
        try:
            try:
                self._memory = symmetric.empty([size], dtype=torch.uint8, device=device)
            except RuntimeError:
                # It doesn't come out of what PyTorch keeps for itself, nor is PyTorch asked to give some of that back.
                torch.cuda.empty_cache()
                self._memory = symmetric.empty([size], dtype=torch.uint8, device=device)
        except RuntimeError as error:
            if agree is None:
                raise
            problem = error
        if agree is not None and not agree(problem is None):
            raise problem or RuntimeError("another rank has none")
        # It is zeroed on the stream: that is done before another rank can leave a mark there.
        torch.cuda.synchronize()
        self._handle = symmetric.rendezvous(self._memory, group.group_name)
        self._carries = False

    @cached_property
    def _carrier(self) -> torch.cuda.Stream:
        """The stream of what is sent. PyTorch has 32 of them for all, so a block that sends nothing takes none."""
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
        """See `Block.view`."""
        return self._handle.get_buffer(rank, list(shape), dtype, start // dtype.itemsize)

    def send(self, source: Tensor, target: Tensor) -> None:
        """See `Block.send`."""
        self._carrier.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._carrier):
            cuda_driver.copy_rows(source, target)
        self._carries = True

    def barrier(self, clock: Clock) -> None:
        """See `Block.barrier`."""
        from tacod.rank.ops import kernels

        if self._carries:
            torch.cuda.current_stream().wait_stream(self._carrier)
            self._carries = False
        kernels.barrier(self._handle.signal_pad_ptrs_dev, self._handle.rank, self._handle.world_size, clock.counter)


@dataclass(frozen=True)
class _Room:
    """A block in two parts: what arrives, and behind it what returns.

    A rank may still read what returned when the next attention's heads arrive, so the parts are fixed, whatever sizes
    the attentions have.
    """

    arriving: int
    """Bytes."""
    returning: int
    block: Any


def _grown(old: int, wanted: int) -> int:
    """Bytes of a part that must hold so many: as it is, or at least twice as large."""
    return max(wanted, 2 * old) if wanted > old else old


class Peer:
    """The transport through each other's memory: a block of each rank for each attention that is under way."""

    def __init__(self, group: Group, make_block: Callable[[int], Block]) -> None:
        """``make_block`` makes one of so many bytes on each rank; all call it at once."""
        self.group = group
        self._collective = Collective(group)
        self._make_block = make_block
        self._blocks: list[list[_Room]] = []
        """For each slot its blocks; graphs hold on to those that were outgrown."""
        self._retired: list[list[_Room]] = []
        """Those of before a failure."""
        self._busy: list[bool] = []
        self._views: dict[Any, Tensor] = {}

    def open(self, deal: Deal, encoding: Literal["exact", "int8"]) -> Exchange:
        """See `Transport.open`. What is sent in 8 bits goes by collectives."""
        if encoding == "int8":
            return self._collective.open(deal, encoding)
        # Since then every rank has answered, and before that waited for what it had under way: nobody writes there.
        self._retired.clear()
        slot = self._busy.index(False) if False in self._busy else len(self._busy)
        if slot == len(self._busy):
            self._busy.append(False)
            self._blocks.append([])
        each = deal.batch * deal.width * deal.dtype.itemsize
        most = max(share.count for share in deal.shares)
        arriving = -(-sum(deal.tokens) * most * each // _ALIGNED) * _ALIGNED
        returning = max(deal.tokens) * sum(len(share.queries) for share in deal.shares) * each
        rooms = self._blocks[slot]
        if not rooms or rooms[-1].arriving < arriving or rooms[-1].returning < returning:
            old = rooms[-1] if rooms else _Room(0, 0, None)
            arrives, returns = _grown(old.arriving, arriving), _grown(old.returning, returning)
            rooms.append(_Room(arrives, returns, self._make_block(arrives + returns)))
        self._busy[slot] = True
        return _PeerExchange(self, slot, rooms[-1].block, deal, rooms[-1].arriving)

    def abort(self) -> None:
        """See `Transport.abort`."""
        self._busy = [False] * len(self._busy)

    def reset(self) -> None:
        """See `Transport.reset`.

        What this rank stores must be done; others' stores may still be under way, so their blocks stay a while.
        """
        self._retired += self._blocks
        self._blocks = []
        self._busy.clear()
        self._views.clear()

    def view(self, block: Block, rank: int, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
        """See `Block.view`; made once."""
        key = id(block), rank, shape, dtype, start
        if key not in self._views:
            self._views[key] = block.view(rank, shape, dtype, start)
        return self._views[key]

    def close(self, slot: int) -> None:
        """That attention has what it needs; its memory is read until the next one in this slot begins."""
        self._busy[slot] = False


class _PeerExchange:
    """One attention's exchange in one slot.

    If no work overlaps a transfer, a kernel stores the data at its final place; otherwise copy engines move it there
    while the rank computes.
    """

    def __init__(self, transport: Peer, slot: int, block: Block, deal: Deal, arriving: int) -> None:
        self._transport, self._slot, self._block = transport, slot, block
        self._deal, self._arriving = deal, arriving
        self._leaving: list[Tensor] = []
        """Sources of the copies under way."""

    def _packed(self, rank: int) -> Tensor:
        """In that rank's memory: [all tokens, B, its packed heads, D]."""
        deal = self._deal
        shape = sum(deal.tokens), deal.batch, deal.shares[rank].count, deal.width
        return self._transport.view(self._block, rank, shape, deal.dtype, 0)

    def _returned(self, rank: int) -> Tensor:
        """In that rank's memory: [its tokens, B, all query heads, D]."""
        deal = self._deal
        shape = deal.tokens[rank], deal.batch, sum(len(share.queries) for share in deal.shares), deal.width
        return self._transport.view(self._block, rank, shape, deal.dtype, self._arriving)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        """See `Block.send`; rows of [S, B, ...] to as many in another rank's memory."""
        self._leaving.append(source)
        self._block.send(source, target)

    def _settle(self) -> None:
        """Wait until all that the ranks have written here has arrived."""
        clock = self._transport.group.clock
        clock.begun += 1
        self._block.barrier(clock)
        self._leaving.clear()

    def send(self, qkv: QKV, stream: int, overlap: bool) -> None:
        """See `Exchange.send`."""
        deal = self._deal
        begin, count = deal.begins(stream)[deal.rank], deal.streams[stream][deal.rank]
        targets = [self._packed(rank)[begin : begin + count] for rank in range(deal.ranks)]
        places = [
            torch.empty_like(target) if overlap and rank != deal.rank else target for rank, target in enumerate(targets)
        ]
        qkv.pack(places, deal.shares)
        for rank in deal.others if overlap else ():
            self._copy(places[rank], targets[rank])

    def received(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.received`."""
        self._settle()
        return self._deal.share.unpack(self._packed(self._deal.rank))

    def give_back(self, outputs: Iterable[Tensor], overlap: bool) -> None:
        """See `Exchange.give_back`."""
        deal = self._deal
        tokens, heads = deal.tokens, slice(deal.share.queries.start, deal.share.queries.stop)
        done, total = 0, sum(tokens)
        for output in outputs:
            result = output.permute(2, 0, 1, 3).contiguous()
            more = overlap or done + len(result) < total
            for rank in (*deal.others, deal.rank):
                # The part of this result that is that rank's.
                begin = sum(tokens[:rank])
                first, last = max(done, begin), min(done + len(result), begin + tokens[rank])
                if first >= last:
                    continue
                source = result[first - done : last - done]
                target = self._returned(rank)[first - begin : last - begin, :, heads]
                if more and rank != deal.rank:
                    self._copy(source, target)
                else:
                    copy_heads(source, target)
            done += len(result)

    def result(self) -> Tensor:
        """See `Exchange.result`."""
        self._settle()
        out = self._returned(self._deal.rank).transpose(0, 1).flatten(2)
        self._transport.close(self._slot)
        return out


def reach_peers(group: Group) -> Peer | None:
    """Memory that this group's ranks can all write into; None if they can't, with the reason in the log.

    Its ranks are on GPUs, and all of them call it.
    """
    if os.environ.get(DISABLED) == "1":
        return None
    # Nothing here is multicast.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    block, reason = None, "another rank can't"
    try:
        block = SymmetricBlock(group.group, _TRY_BYTES)
    except (RuntimeError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0]
    if group.agree(block is not None):
        assert block is not None
        arrived = False
        try:
            arrived = _arrives(block, group)
            reason = "what was written did not arrive"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if group.agree(arrived):
            return Peer(group, lambda size: SymmetricBlock(group.group, size))
    log.warning("the GPUs don't write into each other's memory: %s", reason)
    return None


def _arrives(block: Block, group: Group) -> bool:
    """Whether data that each rank stores or sends arrives in every other rank's memory."""
    rank, size = group.rank, group.size
    shape = (2, size, _TRY_BYTES // 16 // size)
    mine = block.view(rank, shape, torch.int64, 0)
    number = torch.arange(size, device=mine.device)[:, None]
    parcels = (rank * size + number).repeat(1, shape[-1])
    for peer, parcel in enumerate(parcels):
        stored, sent = block.view(peer, shape, torch.int64, 0)
        stored[rank] = parcel
        block.send(parcel, sent[rank])
    block.barrier(group.clock)
    return bool((mine == number * size + rank).all())
