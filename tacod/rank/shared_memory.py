"""Memory that this rank shares with a client: latents are read there, and rank 0 writes the result there.

A client may write at any time. So a latent is copied to the rank's own memory once, and only the copy is used. Ranks
may have copies that differ. Nothing breaks then: what depends on a latent's values, such as whether the step cache
skips blocks, ranks decide by numbers that they have exchanged. Latents of networks that aren't ours, of which nobody
knows what they decide by, are refused here (`tacod.rank.arguments`).
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
from collections.abc import Sequence

import torch
from torch import Tensor

from tacod.rank.comm.cuda_driver import map_host, unmap_host
from tacod_client import wire
from tacod_client.tensors import TORCH_NAMES, as_bytes

__all__ = ["MappedMemories", "MappedMemory"]

log = logging.getLogger(__name__)

_WIRE_NAMES = {getattr(torch, name): wire_name for wire_name, name in TORCH_NAMES.items()}


class MappedMemory:
    """One memory, mapped here. On a GPU it is registered with CUDA, so that copies need no staging and no waiting."""

    def __init__(self, fd: int, nbytes: int, device: torch.device, channel: int | None = None) -> None:
        """Takes over the descriptor ``fd`` of a memory of ``nbytes``, and that of its ``channel``."""
        self._device = device
        self.channel = None if channel is None else socket.socket(fileno=channel)
        """Where the client hears that a result lies here."""
        try:
            self._bytes = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
        finally:
            os.close(fd)
        self.registered = False
        """Whether the GPU copies by itself; copies from and to other memory are staged by the driver."""
        if device.type == "cuda":
            try:
                map_host(self._bytes.data_ptr(), nbytes)
                self.registered = True
            except RuntimeError as error:
                log.info("memory shared with a client can't be registered: %s", error)

    def close(self) -> None:
        """Let go of it, when nothing is copied any more."""
        if self.channel is not None:
            self.channel.close()
        if self.registered:
            torch.cuda.synchronize(self._device)
            unmap_host(self._bytes.data_ptr())
            self.registered = False
        del self._bytes

    def read(self, tensor: wire.Tensor, dtype: torch.dtype) -> Tensor:
        """A copy on the device of a tensor that lies here, in this ``dtype``; on a GPU it may still be under way."""
        assert tensor.offset is not None
        there = self._bytes[tensor.offset : tensor.offset + tensor.nbytes]
        if self._device.type == "cpu":
            copied = torch.from_numpy(there.numpy().copy())
        else:
            copied = there.to(self._device, non_blocking=self.registered)
        return copied.view(getattr(torch, TORCH_NAMES[tensor.dtype])).view(tensor.shape).to(dtype)

    def write(self, outs: Sequence[Tensor], room: Sequence[int]) -> list[wire.Tensor] | None:
        """Copy results to ``room``, an offset and a size, one behind the other; None if they don't fit there.

        On a GPU the copies may still be under way.
        """
        start, nbytes = room
        places = []
        position = start
        for out in outs:
            position = -(-position // wire.ALIGNED_BYTES) * wire.ALIGNED_BYTES
            places.append(position)
            position += out.nbytes
        if position > start + nbytes:
            return None
        for out, place in zip(outs, places, strict=True):
            flat = as_bytes(out)
            there = self._bytes[place : place + out.nbytes]
            if out.device.type == "cpu":
                # By one thread: to wake others takes longer than to copy a latent.
                there.numpy()[:] = flat.numpy()
            else:
                there.copy_(flat, non_blocking=self.registered)
        return [
            wire.Tensor(_WIRE_NAMES[out.dtype], tuple(out.shape), None, offset=place)
            for out, place in zip(outs, places, strict=True)
        ]


class MappedMemories:
    """Those that this rank has, by the supervisor's ids."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: dict[int, MappedMemory] = {}

    def add(self, number: int, nbytes: int, fd: int, channel: int | None = None) -> None:
        """Map one; takes over its descriptors."""
        self._mapped[number] = MappedMemory(fd, nbytes, self._device, channel)

    def drop(self, number: int) -> None:
        """Let go of one."""
        self._mapped.pop(number).close()

    def get(self, number: int | None) -> MappedMemory | None:
        """The one that a command names, if it names one."""
        return self._mapped[number] if number is not None else None
