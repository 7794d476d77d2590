"""Memory that the ranks of a group write into directly: what they exchange is stored where it is read.

A collective copies what was packed once more, in a kernel that has to wait for a free processor. A rank that reaches
the others' memory (over NVLink, or PCIe where the cards allow it) packs it there, or has a copy engine take it there
while it computes on. Based on PyTorch's symmetric memory.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tacod.rank.comm import cuda_driver

if TYPE_CHECKING:
    from tacod.rank.comm.group import Clock, Group

__all__ = ["Peers", "Slot", "reach_peers"]

log = logging.getLogger(__name__)

_ALIGNED = 256
_TRY_BYTES = 1 << 16
DISABLED = "NCCL_P2P_DISABLE"
"""NCCL's own variable, which says that the GPUs are not to reach each other's memory."""


class Block(Protocol):
    """As much memory of each rank, seen from one of them."""

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
        """A tensor in the memory of ``rank``, from the byte ``start`` on."""

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy rows into a rank's memory while this one computes on; ``source`` stays as it is until the barrier."""

    def barrier(self, clock: Clock) -> None:
        """What is computed from here on finds what every rank has written or sent before its own call.

        The clock counts the wait.
        """


class SymmetricBlock:
    """A block on GPUs."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        assert group is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in some versions it is enabled by itself
            symmetric.enable_symm_mem_for_group(group.group_name)
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            self._memory = symmetric.empty([size], dtype=torch.uint8, device=device)
        except RuntimeError:
            # It doesn't come out of what PyTorch keeps for itself, nor is PyTorch asked to give some of that back.
            torch.cuda.empty_cache()
            self._memory = symmetric.empty([size], dtype=torch.uint8, device=device)
        # It is zeroed on the stream: that is done before another rank can leave a mark there.
        torch.cuda.synchronize()
        self._handle = symmetric.rendezvous(self._memory, group.group_name)
        self._carrier = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._carries = False

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


class Peers:
    """The blocks of one group's ranks; they grow, and each attention that is under way has one of its own."""

    def __init__(self, make_block: Callable[[int], Block]) -> None:
        """``make_block`` makes one of so many bytes on each rank; all call it at once."""
        self._make_block = make_block
        self._blocks: list[list[tuple[int, Block]]] = []
        """For each slot its blocks, with their sizes; graphs hold on to those that were outgrown."""
        self._retired: list[list[tuple[int, Block]]] = []
        """Those of before a failure."""
        self._busy: list[bool] = []
        self._views: dict[Any, Tensor] = {}

    def open(self, tokens: Sequence[int], batch: int, heads: Sequence[int], width: int, dtype: torch.dtype) -> Slot:
        """Room for one attention; ``tokens`` and ``heads`` are what each rank has. Every rank calls it alike."""
        # Since then every rank has answered, and before that waited for what it had under way: nobody writes there.
        self._retired.clear()
        slot = self._busy.index(False) if False in self._busy else len(self._busy)
        if slot == len(self._busy):
            self._busy.append(False)
            self._blocks.append([])
        each = batch * width * dtype.itemsize
        arriving = -(-sum(tokens) * 3 * max(heads) * each // _ALIGNED) * _ALIGNED
        size = arriving + max(tokens) * sum(heads) * each
        blocks = self._blocks[slot]
        if not blocks or blocks[-1][0] < size:
            grown = max(size, 2 * blocks[-1][0] if blocks else 0)
            blocks.append((grown, self._make_block(grown)))
        self._busy[slot] = True
        return Slot(self, slot, blocks[-1][1], tokens, batch, heads, width, dtype, arriving)

    def release(self) -> None:
        """No attention is under way: the forward has failed."""
        self._busy = [False] * len(self._busy)

    def discard(self) -> None:
        """Begin anew: a forward that failed may have left one rank waiting where another one isn't.

        Every graph that stores into these blocks must be gone, and what this rank stores be done; others' may still be
        under way.
        """
        self._retired += self._blocks
        self._blocks = []
        self._busy.clear()
        self._views.clear()

    def close(self, slot: int) -> None:
        """That attention has what it needs; its memory is read until the next one in this slot begins."""
        self._busy[slot] = False


class Slot:
    """Where one attention's queries, keys and values arrive at each rank, and what comes back."""

    def __init__(
        self,
        peers: Peers,
        number: int,
        block: Block,
        tokens: Sequence[int],
        batch: int,
        heads: Sequence[int],
        width: int,
        dtype: torch.dtype,
        arriving: int,
    ) -> None:
        self._peers, self._number, self._block = peers, number, block
        self._tokens, self._batch, self._heads, self._width = tokens, batch, heads, width
        self._dtype, self._arriving = dtype, arriving
        self._leaving: list[Tensor] = []
        """What is being copied from."""

    def received(self, rank: int) -> Tensor:
        """In that rank's memory: [all tokens, B, 3, its heads, D]."""
        return self._view(rank, (sum(self._tokens), self._batch, 3, self._heads[rank], self._width), 0)

    def returned(self, rank: int) -> Tensor:
        """In that rank's memory: [its tokens, B, all heads, D]."""
        return self._view(rank, (self._tokens[rank], self._batch, sum(self._heads), self._width), self._arriving)

    def _view(self, rank: int, shape: tuple[int, ...], start: int) -> Tensor:
        key = id(self._block), rank, shape, self._dtype, start
        known = self._peers._views
        if key not in known:
            known[key] = self._block.view(rank, shape, self._dtype, start)
        return known[key]

    def send(self, source: Tensor, target: Tensor) -> None:
        """See `Block.send`; rows of [S, B, ...] to as many in another rank's memory."""
        self._leaving.append(source)
        self._block.send(source, target)

    def barrier(self, clock: Clock) -> None:
        """See `Block.barrier`."""
        self._block.barrier(clock)
        self._leaving.clear()

    def close(self) -> None:
        """See `Peers.close`."""
        self._peers.close(self._number)


def reach_peers(group: Group) -> Peers | None:
    """Memory that this group's ranks can all write into; None, and why in the log, if they can't.

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
            return Peers(lambda size: SymmetricBlock(group.group, size))
    log.warning("the GPUs don't write into each other's memory: %s", reason)
    return None


def _arrives(block: Block, group: Group) -> bool:
    """Whether each rank finds in its memory what every other one has for it, stored there and sent there."""
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
