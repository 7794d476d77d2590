"""Memory that processes on CPUs write into directly, as GPUs do into each other's: `tacod.rank.peers` without a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tacod.rank.peers import Peers


class SharedBlock:
    """A block of every rank, in files that all of them map."""

    def __init__(self, group: Any, size: int) -> None:
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
        if group.rank == 0:
            folder.rmdir()

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
        """See `tacod.rank.peers.Block.view`."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[rank][start : start + size].view(dtype).view(list(shape))

    def barrier(self) -> None:
        """See `tacod.rank.peers.Block.barrier`."""
        dist.barrier(self.group.group)


def reach_shared(group: Any) -> Peers:
    """As `tacod.rank.peers.reach_peers` on GPUs."""
    return Peers(lambda size: SharedBlock(group, size))
