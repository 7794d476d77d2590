"""Weights that the ranks hold together: each rank holds parts of a tensor, and reads the others' parts.

A rank reads by itself, at any time: no other rank has to take part. The parts lie in the GPUs' memory, which the ranks
reach over NVLink or PCIe, or in the host's memory, which all ranks share. Copy engines move them, so a rank computes
meanwhile. Nothing changes a tensor once it is stored.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import torch
from torch import Tensor

from tacod.rank.comm import cuda_driver
from tacod.rank.comm.group import Group
from tacod.rank.comm.peers import SymmetricBlock
from tacod.rank.weights.host_memory import free_bytes
from tacod_client.errors import OutOfMemory, TacodError
from tacod_client.tensors import as_bytes
from tacod_client.units import size as in_words

__all__ = [
    "ALIGNED",
    "Depot",
    "HostSlabs",
    "MakeSlab",
    "OwnSlabs",
    "Owner",
    "PeerSlabs",
    "Piece",
    "Stored",
    "aligned",
    "copy_bytes",
]

ANOTHER = "another rank could not load these weights; its log says why"
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

    def copies(self, target: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """What fills ``target``, flat and uint8, with its bytes: for each piece its rank, its source and its target."""
        found, at = [], 0
        for rank, start, size in self.pieces:
            found.append((rank, self.slab.segments[rank][start : start + size], target[at : at + size]))
            at += size
        return found

    def read(self, device: torch.device) -> Tensor:
        """A copy of the tensor in memory of its own."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for _, source, target in self.copies(flat):
            copy_bytes(source, target)
        return flat.view(self.dtype).view(self.shape)


def copy_bytes(source: Tensor, target: Tensor) -> None:
    """Copy flat bytes between memory that this process reaches; on a GPU by its copy engines."""
    if not target.numel():
        return
    if source.is_cuda or target.is_cuda:
        cuda_driver.copy_bytes(source.data_ptr(), target.data_ptr(), target.nbytes)
    else:
        target.copy_(source)


class Owner(NamedTuple):
    """Whose a unit is."""

    loader: int | None = None
    """The rank that has its tensors; None if every rank has them."""
    holder: int | None = None
    """The rank that holds all of it; None if the ranks share it."""


MakeSlab = Callable[[Sequence[int]], Slab]
"""Makes a slab of so many bytes on each rank; all ranks call it at once, with the same numbers."""


class Depot:
    """Stores tensors, so that the ranks hold them together.

    All ranks of ``group`` make the same calls in the same order. If one of them fails meanwhile it calls `abandon`, and
    the next call of the others raises the same: `OutOfMemory` if it doesn't tell what that is.
    """

    def __init__(
        self, group: Group, slabs: Callable[[], MakeSlab], host: bool = False, near: Group | None = None
    ) -> None:
        """``slabs`` gives what makes the slabs of one load; tensors of different loads share none.

        ``host`` says that they lie in the host's memory, and not for a device's. The ranks of a slab, and of an
        `Owner`, are those of ``near``: all, or this host's. Then each host stores everything, and every rank has it.
        """
        self._group = group
        self._near = near or group
        self._slabs = slabs
        self._make_slab = slabs()
        self._host = host
        self._over = False
        """Whether a call has just failed on all ranks."""

    def exchange(self, told: bytes) -> list[bytes]:
        """What each rank tells the others. Raises what `store` does."""
        self._agree(True, ANOTHER)
        return self._group.tell(told)

    def store(self, units: Sequence[Sequence[Tensor]], whose: Sequence[Owner] = ()) -> list[list[Stored]]:
        """Store the tensors of units; returns where they lie.

        ``whose`` has the `Owner` of each unit; without it each is shared out, and every rank has all of its tensors.
        What a rank doesn't have is on the device meta. On several hosts a call stores one unit, as each host has own
        holders. Raises `OutOfMemory` on all ranks if one can't, or has called `abandon`.
        """
        whose = whose or [Owner()] * len(units)
        stored: dict[int, list[Stored]] = {}
        # What one rank holds alone has a slab of its own, which goes where those of others have left room.
        for holder in sorted({-1 if owner.holder is None else owner.holder for owner in whose}):
            some = [i for i, owner in enumerate(whose) if owner.holder == (None if holder < 0 else holder)]
            stored |= zip(some, self._store([units[i] for i in some], [whose[i] for i in some]), strict=True)
        return [stored[i] for i in range(len(units))]

    def _store(self, units: Sequence[Sequence[Tensor]], whose: Sequence[Owner]) -> list[list[Stored]]:
        """Store units in one slab."""
        ranks = self._near.size
        ends = [0] * ranks
        places: list[list[tuple[Piece, ...]]] = []
        for unit, owner in zip(units, whose, strict=True):
            places.append([])
            for parts in _cut([tensor.nbytes for tensor in unit], ranks, owner.holder):
                places[-1].append(tuple(Piece(rank, ends[rank], size) for rank, size in parts))
                for rank, size in parts:
                    ends[rank] += aligned(size)
        self._agree(True, ANOTHER)
        slab, problem = None, "another rank has none"
        try:
            slab = self._make_slab(ends)
        except (RuntimeError, OSError) as error:
            problem = str(error).splitlines()[0]
        self._agree(
            slab is not None,
            f"no memory for {in_words(max(ends))} of weights {'in the host for' if self._host else 'on'} each "
            f"rank: {problem}; unload a model (`tacoctl unload`) or end another program",
            host=self._host,
        )
        assert slab is not None
        return [
            [
                self._put(tensor, Stored(slab, pieces, tuple(tensor.shape), tensor.dtype), owner)
                for tensor, pieces in zip(unit, parts, strict=True)
            ]
            for unit, parts, owner in zip(units, places, whose, strict=True)
        ]

    def _put(self, tensor: Tensor, stored: Stored, owner: Owner) -> Stored:
        """Write a tensor's pieces: all of them if this rank alone has it, or those that it is to hold."""
        if owner.loader in (None, self._near.rank):
            flat = as_bytes(tensor.detach())
            for rank, target, source in stored.copies(flat):
                if owner.loader is not None or rank == self._near.rank:
                    copy_bytes(source, target)
        return stored

    def settle(self) -> None:
        """Wait until all that the ranks have stored can be read. Raises what `store` does."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self._agree(True, ANOTHER)
        self._make_slab = self._slabs()

    def abandon(self, error: TacodError | None = None) -> None:
        """Have the other ranks' next call raise this error, unless one has failed on all ranks."""
        if not self._over:
            self._group.agree(False)
            self._group.tell(_packed(error))
        self._over = False
        self._make_slab = self._slabs()

    def _agree(self, verdict: bool, otherwise: str, **details: Any) -> None:
        if not self._group.agree(verdict):
            self._over = True
            told = filter(None, self._group.tell(_packed(None)))
            raise next(map(_unpacked, told), OutOfMemory(otherwise, **details))


def _packed(error: TacodError | None) -> bytes:
    """An error for the other ranks; empty for none, and for a lack of memory, of which each tells what it lacks."""
    told: bytes = b"" if error is None or isinstance(error, OutOfMemory) else msgpack.packb(error.to_wire())
    return told


def _unpacked(told: bytes) -> TacodError:
    return TacodError.from_wire(msgpack.unpackb(told))


def aligned(size: int) -> int:
    """Bytes, with those before the next piece."""
    return -(-size // ALIGNED) * ALIGNED


def _cut(sizes: Sequence[int], ranks: int, holder: int | None) -> Iterator[list[tuple[int, int]]]:
    """For each of a unit's tensors the ranks that hold parts of it, in order, with how many bytes each has.

    The unit's bytes are cut into one range for each rank, so most tensors lie whole in one of them.
    """
    each = max(aligned(-(-sum(map(aligned, sizes)) // ranks)), ALIGNED)
    at = 0
    for size in sizes:
        if holder is not None:
            yield [(holder, size)]
        else:
            ends = [min(at + size, (rank + 1) * each) - max(at, rank * each) for rank in range(ranks)]
            yield [(rank, count) for rank, count in enumerate(ends) if count > 0]
        at += aligned(size)


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
        lacking = sum(sizes) - free_bytes()
        # Before any of them takes some.
        if not group.agree(lacking <= 0):
            raise OSError(
                f"{in_words(lacking)} lack in the host, by its own memory and its control groups' limits "
                "(MemoryMax=, --memory)"
                if lacking > 0
                else "another rank has none"
            )
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


class OwnSlabs:
    """Slabs in the memory of a device that is alone on its host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, sizes: Sequence[int]) -> Slab:
        """See `MakeSlab`. Raises `RuntimeError` if there is no memory."""
        (size,) = sizes
        return Slab([torch.empty(size, dtype=torch.uint8, device=self._device)], True)


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
