"""Reads tensors from a checkpoint's files, ahead of their use, by a few threads.

Files are read, not mapped: if a mapped file is cut short, the process dies, while a read gets an error. Host memory
holds only what is being read, and the kernel keeps the pages.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from tacod.checkpoint import Checkpoint
from tacod.checkpoint.header import File, Part
from tacod.rank.ops.packed.float8 import FLOAT8_DTYPES
from tacod.rank.weights.pinned import GpuMemory, Memory
from tacod_client.errors import ModelCorrupt

__all__ = ["FILE_DTYPES", "Reader", "as_tensor", "changed"]

FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    **FLOAT8_DTYPES,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Torch's dtypes by safetensors' names for them."""
_THREADS = 4
"""One thread alone copies out of the page cache more slowly than a GPU takes the data."""
_PIECE = 16 << 20
"""Most bytes of one read."""
_AHEAD = 2 * _THREADS * _PIECE
"""Bytes that are read ahead of the tensor that is waited for."""


class _Begun(NamedTuple):
    """A tensor that threads are filling."""

    data: Tensor
    pieces: list[Future[None]]


class Reader:
    """A checkpoint's open files, and the threads that read them into a device's memory.

    Raises `ModelCorrupt` if a file is no longer what its header said.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._files: dict[str, int] = {}
        self._held = ExitStack()

    def __enter__(self) -> Reader:
        with ExitStack() as held:
            for file in self._checkpoint.files:
                self._files[file.path] = _open(file)
                held.callback(os.close, self._files[file.path])
            self.check()
            self._memory = GpuMemory(self._device, 2 * _THREADS, _PIECE) if self._device.type == "cuda" else Memory()
            held.callback(self._memory.close)
            self._threads = ThreadPoolExecutor(_THREADS, "reader")
            held.callback(self._threads.shutdown, cancel_futures=True)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    def check(self) -> None:
        """Raise `ModelCorrupt` if a file has changed since its header was read."""
        for file in self._checkpoint.files:
            _check(file, self._files[file.path])

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """The bytes of tensors, in this order, each in memory of its own on the device: uint8, one dimension.

        The next ones are being read meanwhile.
        """
        begun: deque[_Begun] = deque()
        behind = 0
        for name in names:
            begun.append(self._begin(name))
            behind += len(begun[-1].data)
            while behind - len(begun[0].data) >= _AHEAD:
                behind -= len(begun[0].data)
                yield self._end(begun.popleft())
        while begun:
            yield self._end(begun.popleft())

    def _begin(self, name: str) -> _Begun:
        parts = self._checkpoint.parts[name]
        data = self._memory.allocate(sum(part.stop - part.start for part in parts))
        pieces, at = [], 0
        for part in parts:
            for start in range(part.start, part.stop, _PIECE):
                piece = Part(part.file, start, min(start + _PIECE, part.stop))
                place = data[at : at + piece.stop - piece.start]
                pieces.append(self._threads.submit(self._memory.fill, place, partial(self._fill, piece)))
                at += len(place)
        return _Begun(data, pieces)

    def _end(self, begun: _Begun) -> Tensor:
        for piece in begun.pieces:
            piece.result()
        self._memory.arrive()
        return begun.data

    def _fill(self, piece: Part, room: memoryview) -> None:
        at = piece.start
        while room:
            count = os.preadv(self._files[piece.file], [room], at)
            if count == 0:
                raise changed(piece.file)
            room, at = room[count:], at + count


def as_tensor(file: Checkpoint, name: str, data: Tensor) -> Tensor:
    """The tensor of a file of this name, of its bytes."""
    info = file.tensors[name]
    return data.view(FILE_DTYPES[info.dtype]).reshape(info.shape)


def changed(path: str) -> ModelCorrupt:
    """The error for a file that has changed since the request."""
    return ModelCorrupt(f"{path} changed while it was being loaded; load it again")


def _open(file: File) -> int:
    try:
        return os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelCorrupt(f"{file.path} went while it was being loaded ({error.strerror}); load it again") from None


def _check(file: File, opened: int) -> None:
    stat = os.fstat(opened)
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        raise changed(file.path)
