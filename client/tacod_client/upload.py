"""A state dict as the pieces of a safetensors file that is never whole on this side."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tacod_client.tensors import to_wire
from tacod_client.wire import DTYPES, Tensor

__all__ = ["PIECE_BYTES", "digests_of_pieces", "pieces", "upload_id"]

PIECE_BYTES = 8 << 20


def upload_id(nbytes: int, digests: Sequence[bytes]) -> str:
    """The name of a file's content: a function of its size and its pieces' SHA-256."""
    return hashlib.sha256(struct.pack("<Q", nbytes) + b"".join(digests)).hexdigest()


def pieces(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file with these tensors (torch or numpy), `PIECE_BYTES` at a time.

    Raises `ArgumentError`, naming the tensor, for a dtype that doesn't travel.
    """
    buffer = bytearray(_header(tensors, metadata))
    for name in sorted(tensors):
        for frame in to_wire(tensors[name], name).frames or ():
            buffer += frame
            while len(buffer) >= PIECE_BYTES:
                yield bytes(buffer[:PIECE_BYTES])
                del buffer[:PIECE_BYTES]
    if buffer:
        yield bytes(buffer)


def digests_of_pieces(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[int, list[bytes]]:
    """The file's size in bytes, and the SHA-256 of each piece."""
    nbytes, digests = 0, []
    for piece in pieces(tensors, metadata):
        nbytes += len(piece)
        digests.append(hashlib.sha256(piece).digest())
    return nbytes, digests


def _header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in sorted(tensors):
        described = _describe(tensors[name], name)
        end = position + described.nbytes
        entries[name] = {"dtype": described.dtype, "shape": list(described.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _describe(value: Any, name: str) -> Tensor:
    """Dtype and shape, from an empty slice: the contents stay where they are."""
    flat = value.reshape(-1)[:0]
    dtype = to_wire(flat, name).dtype
    assert dtype in DTYPES
    return Tensor(dtype, tuple(value.shape), None)
