"""The header of a safetensors file: JSON behind an 8-byte length.

https://github.com/huggingface/safetensors#format. Reading it needs neither torch nor the weights.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from typing import IO, Any

from tacod.checkpoint.header import MAX_DIMS, Entry, File, Header, Part, TensorInfo, check_count, sample
from tacod.checkpoint.json_text import parse_json
from tacod_client.errors import ModelCorrupt

__all__ = ["MAX_HEADER_BYTES", "read_safetensors"]

MAX_HEADER_BYTES = 100 << 20

_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def read_safetensors(path: str) -> Header:
    """Read and check a safetensors file's header.

    Raises `ModelCorrupt` if the file is truncated or no safetensors file, `ModelUnsupported` if it has too many
    tensors, `OSError` if it can't be read.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        raw = _read_header(path, file, stat.st_size)
        data = 8 + len(raw)
        contents = sample(file.fileno(), data, stat.st_size)
    header = _parse_header(path, raw, stat.st_size - data)
    texts = header.pop("__metadata__", None) or {}
    entries = {}
    for key, item in header.items():
        start, stop = item["data_offsets"]
        entries[key] = Entry(TensorInfo(item["dtype"], tuple(item["shape"])), Part(path, data + start, data + stop))
    return Header(File(path, stat.st_size, stat.st_mtime_ns), entries, texts, hashlib.sha256(raw).digest() + contents)


def _read_header(path: str, file: IO[bytes], size: int) -> bytes:
    length = file.read(8)
    count = struct.unpack("<Q", length)[0] if len(length) == 8 else None
    if count is None or not 2 <= count <= MAX_HEADER_BYTES or 8 + count > size:
        raise ModelCorrupt(f"{path} is no whole safetensors file ({size} bytes); download it again")
    return file.read(count)


def _parse_header(path: str, raw: bytes, contents: int) -> dict[str, Any]:
    # Before so many objects are made.
    check_count(path, raw.count(b'"data_offsets"'))
    try:
        header = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: the header is not JSON ({error}); download the file again") from None
    if not isinstance(header, dict):
        raise ModelCorrupt(f"{path}: the header is not a JSON object; download the file again")
    check_count(path, len(header) - ("__metadata__" in header))
    texts = header.get("__metadata__")
    if texts is not None and not (isinstance(texts, dict) and all(isinstance(each, str) for each in texts.values())):
        raise ModelCorrupt(f"{path}: the header's __metadata__ is no object of strings; download the file again")
    end = 0
    spans = sorted(_check_entry(path, key, item) for key, item in header.items() if key != "__metadata__")
    for start, stop in spans:
        if start != end:
            raise ModelCorrupt(f"{path}: the header leaves a hole or an overlap at byte {end}; download the file again")
        end = stop
    if end != contents:
        state = "truncated" if end > contents else "longer than its header says"
        raise ModelCorrupt(f"{path} is {state} ({contents} bytes of tensors instead of {end}); download it again")
    return header


def _check_entry(path: str, key: str, item: Any) -> tuple[int, int]:
    """The offsets at which a header entry's tensor begins and ends."""
    try:
        dtype, shape, (start, end) = item["dtype"], item["shape"], item["data_offsets"]
        bits = _ITEM_BITS[dtype]
        # Types and sizes first: a product over what is no size can take any amount of memory.
        fits = type(shape) is list and len(shape) <= MAX_DIMS
        fits = fits and all(type(size) is int and 0 <= size < 1 << 63 for size in [*shape, start, end])
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise ModelCorrupt(f"{path}: the header's entry for {key!r} is malformed; download the file again")
    if (end - start) * 8 != bits * math.prod(shape):
        raise ModelCorrupt(f"{path}: {key!r} is {dtype} {shape}, which its {end - start} bytes don't hold")
    return start, end
