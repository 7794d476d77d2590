"""Memory of CPU processes that all of them write into: `tacod.rank.comm.peers` without a GPU."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tacod.rank.comm import cuda_driver
from tacod.rank.comm.clock import Clock
from tacod.rank.comm.group import Group
from tacod.rank.comm.peers import Peer


class SharedBlock:
    """A block of every rank, in files that all of them map."""

    def __init__(self, group: Group, size: int) -> None:
        self.group = group
        folders = [tempfile.mkdtemp(prefix="block-")] if group.rank == 0 else [None]
        dist.broadcast_object_list(folders, group=group.group, group_src=0)
        folder = Path(str(folders[0]))
        paths = [folder / str(rank) for rank in range(group.size)]
        paths[group.rank].write_bytes(bytes(size))
        dist.barrier(group.group)
        self._memory = [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]
        dist.barrier(group.group)
        paths[group.rank].unlink()
        dist.barrier(group.group)
        self._leaving: list[tuple[weakref.ref[Tensor], Tensor]] = []
        if group.rank == 0:
            folder.rmdir()

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
        """See `tacod.rank.comm.peers.Block.view`."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[rank][start : start + size].view(dtype).view(list(shape))

    def send(self, source: Tensor, target: Tensor) -> None:
        """See `tacod.rank.comm.peers.Block.send`; as late as may be, and of what a copy engine takes only."""
        cuda_driver.rows_of(source, target)
        self._leaving.append((weakref.ref(source), target))

    def barrier(self, clock: Clock) -> None:
        """See `tacod.rank.comm.peers.Block.barrier`."""
        for source, target in self._leaving:
            kept = source()
            assert kept is not None, "the memory that a copy engine reads was given back"
            target.copy_(kept)
        self._leaving.clear()
        with clock.counting(on_gpu=False):
            dist.barrier(self.group.group)


def reach_shared(group: Group) -> Peer:
    """As `tacod.rank.comm.select.reach` on GPUs."""
    return Peer(group, lambda size: SharedBlock(group, size))
