"""Weights that the ranks hold together: each rank holds parts of a tensor, and reads the others' parts.

A rank reads by itself, at any time: no other rank has to take part. The parts lie in the GPUs' memory, which the ranks
reach over NVLink or PCIe, or in the host's memory, which all ranks share. Copy engines move them, so a rank computes
meanwhile. Nothing changes a tensor once it is stored.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tacod.rank.comm import cuda_driver
from tacod.rank.comm.group import Group
from tacod.rank.comm.peers import SymmetricBlock
from tacod_client.errors import OutOfMemory

__all__ = ["ALIGNED", "Depot", "HostSlabs", "MakeSlab", "PeerSlabs", "Piece", "Stored", "copy_bytes"]

ALIGNED = 256
"""Where a piece begins, and what its length is a multiple of: tensors of any dtype may lie there."""


class Piece(NamedTuple):
    """Consecutive bytes of a tensor in one rank's segment of a slab."""

    rank: int
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Slab:
    """A piece of memory of each rank, all of them readable here: flat, uint8."""

    segments: Sequence[Tensor]
    on_device: bool
    """Whether a rank computes with what lies in its own segment; else it fetches that too."""
    memory: Any = None
    """What the segments are views of, and lives as long as the slab."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Where a tensor's bytes lie; every rank knows it alike."""

    slab: Slab
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The tensor's bytes."""
        return sum(piece.size for piece in self.pieces)

    def fetched(self, rank: int) -> int:
        """How many of its bytes a rank has to fetch: those that aren't on its device."""
        return sum(piece.size for piece in self.pieces if piece.rank != rank or not self.slab.on_device)

    def whole(self, rank: int) -> Tensor | None:
        """The tensor itself, if that rank holds all of it on its device; None if it doesn't."""
        if not self.slab.on_device or any(piece.rank != rank for piece in self.pieces):
            return None
        (piece,) = self.pieces
        flat = self.slab.segments[rank][piece.start : piece.start + piece.size]
        return flat.view(self.dtype).view(self.shape)

    def fetch(self, target: Tensor) -> None:
        """Copy its bytes into ``target``, flat and uint8; on a GPU, as later work of the current stream."""
        at = 0
        for rank, start, size in self.pieces:
            copy_bytes(self.slab.segments[rank][start : start + size], target[at : at + size])
            at += size

    def read(self, device: torch.device) -> Tensor:
        """A copy of the tensor in memory of its own."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self.fetch(flat)
        return flat.view(self.dtype).view(self.shape)


def copy_bytes(source: Tensor, target: Tensor) -> None:
    """Copy flat bytes between memory that this process reaches; on a GPU by its copy engines."""
    if not target.numel():
        return
    if source.is_cuda or target.is_cuda:
        cuda_driver.copy_bytes(source.data_ptr(), target.data_ptr(), target.nbytes)
    else:
        target.copy_(source)


MakeSlab = Callable[[Sequence[int]], Slab]
"""Makes a slab of so many bytes on each rank; all ranks call it at once, with the same numbers."""


class Depot:
    """Stores tensors that every rank has, so that afterwards the ranks hold them together.

    All ranks of ``group`` make the same calls in the same order. If one of them fails meanwhile it calls `abandon`, and
    the next call of the others fails too.
    """

    def __init__(self, group: Group, slabs: Callable[[], MakeSlab]) -> None:
        """``slabs`` gives what makes the slabs of one load; tensors of different loads share none."""
        self._group = group
        self._slabs = slabs
        self._make_slab = slabs()
        self._over = False
        """Whether a call has just failed on all ranks."""

    def store(self, tensors: Sequence[Tensor], owner: int | None = None) -> list[Stored]:
        """Store tensors: whole at the rank ``owner``, or each shared out evenly.

        Raises `OutOfMemory` on all ranks if one can't, or has called `abandon`.
        """
        ranks = self._group.size
        ends = [0] * ranks
        places: list[tuple[Piece, ...]] = []
        for tensor in tensors:
            parts = _parts(tensor.nbytes, ranks, owner)
            places.append(tuple(Piece(rank, ends[rank], size) for rank, size in parts))
            for rank, size in parts:
                ends[rank] += -(-size // ALIGNED) * ALIGNED
        self._agree(True, "another rank could not load these weights; its log says why")
        slab, problem = None, "another rank has none"
        try:
            slab = self._make_slab(ends)
        except (RuntimeError, OSError) as error:
            problem = str(error).splitlines()[0]
        self._agree(
            slab is not None,
            f"no memory for {max(ends) / 2**20:.0f} MiB of weights on each rank: {problem}; unload a model "
            "(`tacoctl unload`) or end another program",
        )
        assert slab is not None
        stored = []
        for tensor, pieces in zip(tensors, places, strict=True):
            flat, at = tensor.detach().contiguous().view(-1).view(torch.uint8), 0
            for rank, start, size in pieces:
                if rank == self._group.rank:
                    copy_bytes(flat[at : at + size], slab.segments[rank][start : start + size])
                at += size
            stored.append(Stored(slab, pieces, tuple(tensor.shape), tensor.dtype))
        return stored

    def settle(self) -> None:
        """Wait until all that the ranks have stored can be read. Raises what `store` does."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self._agree(True, "another rank could not load these weights; its log says why")
        self._make_slab = self._slabs()

    def abandon(self) -> None:
        """Have the other ranks' next call fail, unless one has failed on all ranks."""
        if not self._over:
            self._group.agree(False)
        self._over = False
        self._make_slab = self._slabs()

    def _agree(self, verdict: bool, otherwise: str) -> None:
        if not self._group.agree(verdict):
            self._over = True
            raise OutOfMemory(otherwise)


def _parts(size: int, ranks: int, owner: int | None) -> list[tuple[int, int]]:
    """Ranks, and how many bytes of so many each holds."""
    if owner is not None:
        return [(owner, size)]
    each = -(-size // (ranks * ALIGNED)) * ALIGNED
    return [(rank, min(each, size - rank * each)) for rank in range(ranks) if rank * each < size]


class HostSlabs:
    """Slabs in the host's memory: each rank makes its segment, and maps those of the others.

    With ``gpu`` the segments are mapped for the current GPU too. On CPUs they may stand for their devices' memory.
    """

    def __init__(self, group: Group, gpu: bool, on_device: bool = False) -> None:
        self._group = group
        self._gpu = gpu
        self._on_device = on_device

    def __call__(self, sizes: Sequence[int]) -> Slab:
        """See `MakeSlab`. Raises `OSError` or `RuntimeError` if there is no memory."""
        group, own = self._group, None
        problem: Exception | None = None
        mapped: list[_Mapped] = []
        try:
            try:
                own = os.memfd_create("tacod-weights")
                # What isn't reserved now would end the process when it is written.
                os.posix_fallocate(own, 0, max(sizes[group.rank], 1))
            except OSError as error:
                problem = error
            place = torch.tensor([[os.getpid(), own or 0]], dtype=torch.int64, device="cuda" if self._gpu else "cpu")
            places = group.gather(place, [1] * group.size, dim=0).tolist()
            if not group.agree(problem is None):
                raise problem or OSError("another rank has none")
            try:
                for (pid, number), size in zip(places, sizes, strict=True):
                    mapped.append(_Mapped(f"/proc/{pid}/fd/{number}", size, self._gpu))
            except (OSError, RuntimeError) as error:
                problem = error
            # Each has opened all of them before one is closed.
            group.agree(problem is None)
            if problem is not None:
                raise problem
            return Slab([each.flat for each in mapped], self._on_device, mapped)
        finally:
            if own is not None:
                os.close(own)


class _Mapped:
    """A file in memory as ``flat`` bytes, which a GPU may reach for as long as this object lives."""

    def __init__(self, path: str, size: int, gpu: bool) -> None:
        if not size:
            self.flat = torch.empty(0, dtype=torch.uint8)
            return
        file = os.open(path, os.O_RDWR)
        try:
            memory = mmap.mmap(file, size)
        finally:
            os.close(file)
        self.flat = torch.frombuffer(memory, dtype=torch.uint8)
        if gpu:
            cuda_driver.map_host(self.flat.data_ptr(), size)
            # When the process ends, the driver does it.
            weakref.finalize(self, _unmap, self.flat.data_ptr()).atexit = False


def _unmap(address: int) -> None:
    torch.cuda.synchronize()
    cuda_driver.unmap_host(address)


class PeerSlabs:
    """Slabs in the GPUs' memory, which every rank of the group reaches.

    Such memory is of one size on all ranks. A slab goes where earlier ones have left room on each of them, so what one
    rank holds alone takes no more than what the others hold alone.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._blocks: list[tuple[SymmetricBlock, int, list[int]]] = []
        """Each with its size, and where each rank's room begins."""

    def __call__(self, sizes: Sequence[int]) -> Slab:
        """See `MakeSlab`. Raises `RuntimeError` if there is no memory."""
        sizes = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        block, starts = self._room_for(sizes)
        segments = [
            block.view(rank, (size,), torch.uint8, start)
            for rank, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ]
        starts[:] = [start + size for start, size in zip(starts, sizes, strict=True)]
        return Slab(segments, True, block)

    def _room_for(self, sizes: Sequence[int]) -> tuple[SymmetricBlock, list[int]]:
        """A block with so much room on each rank, and where that begins."""
        for block, size, starts in self._blocks:
            if all(start + wanted <= size for start, wanted in zip(starts, sizes, strict=True)):
                return block, starts
        size = max(*sizes, ALIGNED)
        block, starts = SymmetricBlock(self._group.group, size, self._group.agree), [0] * len(sizes)
        self._blocks.append((block, size, starts))
        return block, starts
