"""The header of a GGUF file.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package's own reader is for files that one
trusts: 69 bytes that announce a long array keep it busy for ever. So the header is walked here, within bounds.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from typing import IO, Any

from tacod.checkpoint.header import BLOCKS, MAX_DIMS, PLAIN, Entry, File, Header, Part, TensorInfo, check_count, sample
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["KINDS", "MAX_HEADER_BYTES", "is_gguf", "read_gguf"]

_MAGIC = b"GGUF"
MAX_HEADER_BYTES = 16 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _INT32 = 8, 9, 5
KINDS = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 6)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"), 16)),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), 24)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
"""All kinds of tensors by their numbers (``ggml_type`` in ggml.h), also those that can't be read, to name them."""
_SHAPE = "comfy.gguf.orig_shape."
"""A field that begins so tells a tensor's shape: city96's tools lay out in rows of 256 what has other rows."""


def is_gguf(path: str) -> bool:
    """Whether a file begins as a GGUF file does: in a hub's cache, to which links lead, names have no suffix.

    Raises `OSError` if the file can't be read.
    """
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf(path: str) -> Header:
    """Read and check a GGUF file's header; its tensors' sizes are given in torch's order, rows first.

    Raises `ModelCorrupt` if the file is truncated or no GGUF file, `ModelUnsupported` if a tensor is of a kind that
    isn't read or if there are too many, `OSError` if the file can't be read.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        cursor = _Cursor(path, file, stat.st_size)
        if cursor.take(len(_MAGIC)) != _MAGIC:
            raise cursor.corrupt("it doesn't begin with GGUF")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ModelUnsupported(f"{path} is GGUF of version {version}; this version reads 2 and 3, little-endian")
        count, fields = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {}
        for _ in range(fields):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        found: dict[str, tuple[TensorInfo, int]] = {}
        for _ in range(count):
            name = cursor.string()
            if name in found:
                raise cursor.corrupt(f"it holds {name!r} twice")
            found[name] = _read_tensor(cursor, name, metadata)
            check_count(path, len(found))
        contents = sample(file.fileno(), cursor.position, stat.st_size)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment is {alignment!r}")
    data = -(-cursor.position // alignment) * alignment
    entries = {name: Entry(info, _place(path, info, data + offset)) for name, (info, offset) in found.items()}
    _check_spans(cursor, entries)
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return Header(File(path, stat.st_size, stat.st_mtime_ns), entries, texts, cursor.digest.digest() + contents)


class _Cursor:
    """Reads onwards, never past the file's end or the most that a header may take."""

    def __init__(self, path: str, file: IO[bytes], size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self.digest = hashlib.sha256()
        self._file = file

    def corrupt(self, what: str) -> ModelCorrupt:
        return ModelCorrupt(f"{self.path} is no whole GGUF file: {what}; download it again")

    def take(self, count: int) -> bytes:
        if self.position + count > min(self.size, MAX_HEADER_BYTES):
            raise self.corrupt(f"its header doesn't fit its {self.size} bytes")
        taken = self._file.read(count)
        if len(taken) != count:
            raise self.corrupt("it became shorter while it was read")
        self.position += count
        self.digest.update(taken)
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode()
        except UnicodeDecodeError:
            raise self.corrupt("a string in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A field's value; an array's only if it is of INT32 and as short as a shape, None for others."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.corrupt(f"its header has a value of type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _INT32 and count <= MAX_DIMS:
            return struct.unpack(f"<{count}i", self.take(4 * count))
        if kind in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
        else:
            raise self.corrupt(f"its header has an array of type {kind}")
        return None


def _read_tensor(cursor: _Cursor, name: str, metadata: Mapping[str, Any]) -> tuple[TensorInfo, int]:
    """A tensor's description, and where it begins in the file's data."""
    dims = cursor.scalar("I")
    if dims > MAX_DIMS:
        raise cursor.corrupt(f"{name!r} has {dims} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dims)]))
    kind = _kind(cursor.scalar("I"))
    if kind not in BLOCKS and kind not in PLAIN:
        known = ", ".join([*BLOCKS, *PLAIN])
        raise ModelUnsupported(f"{cursor.path}: {name} is {kind}; this version reads {known}: use a file of these")
    if any(size >= 1 << 63 for size in shape) or (kind in BLOCKS and (not shape or shape[-1] % BLOCKS[kind][0])):
        raise cursor.corrupt(f"{name!r} can't be {kind} {list(shape)}")
    return TensorInfo(kind, _true_shape(cursor, name, shape, metadata)), cursor.scalar("Q")


def _true_shape(cursor: _Cursor, name: str, shape: tuple[int, ...], metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """A tensor's shape before the tool that made the file changed it."""
    key = f"{_SHAPE}{name}"
    if key in metadata:
        recorded = metadata[key]
        if (
            not isinstance(recorded, tuple)
            or any(size < 0 for size in recorded)
            or math.prod(recorded) != math.prod(shape)
        ):
            raise cursor.corrupt(f"{key} is no shape of the tensor, which has {list(shape)} numbers")
        return recorded
    if name.endswith("pos_embed") and len(shape) == 2:
        return (1, *shape)  # llama.cpp's tools drop leading sizes of one, and families go by this one
    return shape


def _kind(number: int) -> str:
    return KINDS.get(number, f"of the unknown type {number}")


def _place(path: str, info: TensorInfo, start: int) -> Part:
    numbers, size = BLOCKS[info.dtype] if info.dtype in BLOCKS else (1, PLAIN[info.dtype])
    return Part(path, start, start + info.size // numbers * size)


def _check_spans(cursor: _Cursor, entries: dict[str, Entry]) -> None:
    end = 0
    for start, stop, name in sorted((entry.part.start, entry.part.stop, name) for name, entry in entries.items()):
        if start < end:
            raise cursor.corrupt(f"{name!r} overlaps another tensor")
        if stop > cursor.size:
            raise cursor.corrupt(f"{name!r} ends at byte {stop}, and the file at {cursor.size}")
        end = stop
