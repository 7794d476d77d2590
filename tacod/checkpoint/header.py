"""A weight file's header, whatever its format."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tacod_client.errors import ModelUnsupported

__all__ = [
    "BLOCKS",
    "FLOAT8",
    "MAX_DIMS",
    "MAX_TENSORS",
    "PLAIN",
    "SAMPLE_BYTES",
    "Entry",
    "File",
    "Header",
    "Part",
    "TensorInfo",
    "check_count",
    "sample",
]

MAX_DIMS = 64
MAX_TENSORS = 1 << 16
"""Headers are read where clients are answered. Packed models have a few for each layer, which makes thousands."""
_SAMPLES = 32
SAMPLE_BYTES = 4096
"""Of each place that is looked at to tell files apart."""

PLAIN = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the dtypes that are computed with."""
FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Weights of one byte each, which are cast where they are used."""
BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
"""GGUF's quantized kinds: numbers in a block, which lies within a row, and bytes of a block."""
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What 4 bits of IQ4_NL and IQ4_XS stand for (``kvalues_iq4nl``)."""


class TensorInfo(NamedTuple):
    """One tensor of a header."""

    dtype: str
    """As safetensors names it (``BF16``, ``F8_E4M3``), or GGUF (``Q4_K``)."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Part(NamedTuple):
    """Bytes of a file: a whole tensor, or some of its rows."""

    file: str
    start: int
    stop: int


class Entry(NamedTuple):
    """A tensor in a file, and the bytes that hold it."""

    info: TensorInfo
    part: Part


class File(NamedTuple):
    """A file's state when its header was read."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Header:
    """A file's tensors, under the names that the file has for them."""

    file: File
    entries: Mapping[str, Entry]
    texts: Mapping[str, str]
    """The metadata's strings."""
    digest: bytes = field(repr=False)
    """SHA-256 of the header's bytes, and of a `sample` of the tensors'."""


def check_count(path: str, count: int) -> None:
    """Raise `ModelUnsupported` for a file, or a folder's files, of more than `MAX_TENSORS`."""
    if count > MAX_TENSORS:
        raise ModelUnsupported(
            f"{path} has more than {MAX_TENSORS:,} tensors, more than any model; name a model's file"
        )


def sample(file: int, start: int, stop: int) -> bytes:
    """SHA-256 of pieces spread over a part of an open file, its ends among them; of all of it if it is short.

    Training changes every weight, but neither the size nor the header. So this tells files apart that look alike
    because a copy or an archive has set their times, without reading all of their bytes.
    """
    hashed = hashlib.sha256()
    last = max(start, stop - SAMPLE_BYTES)
    for place in sorted({start + (last - start) * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
        hashed.update(os.pread(file, min(SAMPLE_BYTES, stop - place), place))
    return hashed.digest()
