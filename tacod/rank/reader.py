"""Tensors from a checkpoint's files, one at a time.

Files are read, not mapped: where a mapped file is cut short under a process, the process dies of it, and here it gets
an error. So host memory holds the tensor that is on its way and nothing else, and the kernel keeps the pages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from tacod.checkpoint import Checkpoint, TensorInfo
from tacod.checkpoint.header import File, Part
from tacod.rank.families.base import Place
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["Reader", "arrange"]


class Reader:
    """A checkpoint's open files.

    Raises `ModelCorrupt` if a file is no longer what its header said.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, int] = {}

    def __enter__(self) -> Reader:
        try:
            for file in self._checkpoint.files:
                self._files[file.path] = _open(file)
            self.check()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def check(self) -> None:
        """Raise `ModelCorrupt` if a file has changed since its header was read."""
        for file in self._checkpoint.files:
            stat = os.fstat(self._files[file.path])
            if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                raise _changed(file.path)

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, in host memory of their own: uint8, one dimension."""
        parts = self._checkpoint.parts[name]
        data = torch.empty(sum(part.stop - part.start for part in parts), dtype=torch.uint8)
        room = data.numpy().data
        for part in parts:
            self._fill(room[: part.stop - part.start], part)
            room = room[part.stop - part.start :]
        return data

    def _fill(self, room: memoryview, part: Part) -> None:
        at = part.start
        while room:
            count = os.preadv(self._files[part.file], [room], at)
            if count == 0:
                raise _changed(part.file)
            room, at = room[count:], at + count


def _open(file: File) -> int:
    try:
        return os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelCorrupt(f"{file.path} went while it was being loaded ({error.strerror}); load it again") from None


def _changed(path: str) -> ModelCorrupt:
    return ModelCorrupt(f"{path} changed while it was being loaded; load it again")


def arrange(checkpoint: Checkpoint, layout: Mapping[str, Place]) -> Checkpoint:
    """The same checkpoint under the names of the single file; what that fuses or swaps becomes bytes in that order.

    A tensor without a place keeps its name. Raises `ModelCorrupt` if tensors lack, `ModelUnsupported` if such as are to
    be fused differ in dtype.
    """
    absent = [name for name in layout if name not in checkpoint.tensors]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise ModelCorrupt(f"{checkpoint.path} lacks {', '.join(absent[:5])}{more}; download the folder again")
    pieces: dict[str, list[str]] = {}
    for name, place in sorted(layout.items(), key=lambda item: item[1].rows or (0, 0)):
        pieces.setdefault(place.key, []).append(name)
    tensors, parts = {}, {}
    for key, names in pieces.items():
        tensors[key] = _fuse(checkpoint, key, {name: layout[name] for name in names})
        parts[key] = tuple(part for name in names for part in _order(checkpoint, name, layout[name]))
    for name in checkpoint.tensors:
        if name not in layout:
            tensors[name], parts[name] = checkpoint.tensors[name], checkpoint.parts[name]
    return replace(checkpoint, tensors=tensors, parts=parts, diffusers=False)


def _fuse(checkpoint: Checkpoint, key: str, places: Mapping[str, Place]) -> TensorInfo:
    infos = [checkpoint.tensors[name] for name in places]
    if len(infos) == 1 and next(iter(places.values())).rows is None:
        return infos[0]
    row = 0
    for (name, place), info in zip(places.items(), infos, strict=True):
        assert place.rows is not None
        if place.rows[0] != row or info.shape[:1] != place.rows[1:] or info.shape[1:] != infos[0].shape[1:]:
            raise ModelCorrupt(f"{checkpoint.path}: {name} is {list(info.shape)}, which is no part of {key}")
        if info.dtype != infos[0].dtype:
            raise ModelUnsupported(f"{checkpoint.path}: {' and '.join(places)} are not of one dtype")
        row += place.rows[1]
    return TensorInfo(infos[0].dtype, (row, *infos[0].shape[1:]))


def _order(checkpoint: Checkpoint, name: str, place: Place) -> tuple[Part, ...]:
    parts = checkpoint.parts[name]
    if not place.swap:
        return parts
    (whole,) = parts
    if checkpoint.tensors[name].shape[0] % 2:
        raise ModelCorrupt(f"{checkpoint.path}: {name} has an odd number of rows, which are no scale and shift")
    middle = (whole.start + whole.stop) // 2
    return Part(whole.file, middle, whole.stop), Part(whole.file, whole.start, middle)
