"""GGUF files whose numbers are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from tacod.checkpoint.header import BLOCKS

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

HALVES: dict[str, dict[int, float]] = {
    "Q4_0": {0: 1 / 4.6},
    "Q4_1": {0: 1 / 4.6, 2: -7.5 / 4.6},
    "Q5_0": {0: 1 / 9.2},
    "Q5_1": {0: 1 / 9.2, 2: -15.5 / 9.2},
    "Q8_0": {0: 1 / 74},
    "Q2_K": {80: 1 / 14, 82: 1 / 9},
    "Q3_K": {108: 1 / 43},
    "Q4_K": {0: 1 / 160, 2: 1 / 20},
    "Q5_K": {0: 1 / 320, 2: 1 / 20},
    "Q6_K": {208: 1 / 1400},
    "IQ4_NL": {0: 1 / 68},
    "IQ4_XS": {0: 1 / 1260},
}
"""Where a block has numbers in fp16, and what makes random blocks' numbers about 1."""


class Stored(NamedTuple):
    """A tensor as a GGUF file holds it: rows of bytes, and their kind."""

    data: Bytes
    kind: str

    @property
    def numbers(self) -> Tensor:
        """What the gguf package reads, in fp32."""
        return torch.from_numpy(gguf.quants.dequantize(self.data, gguf.GGMLQuantizationType[self.kind]))


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    """Rows of random blocks whose numbers are about 1 / sqrt(columns)."""
    generator = np.random.default_rng(seed)
    numbers, size = BLOCKS[kind]
    blocks = generator.integers(0, 256, (rows * columns // numbers, size), dtype=np.uint8)
    for at, scale in HALVES[kind].items():
        half = (scale * generator.uniform(0.5, 1.5, (len(blocks), 1)) / columns**0.5).astype(np.float16)
        blocks[:, at : at + 2] = half.view(np.uint8)
    return blocks.reshape(rows, -1)


def as_stored(tensor: Tensor, kind: str) -> Stored:
    """A tensor in one of the kinds that the gguf package makes, of the same shape."""
    data = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])
    return Stored(data.view(np.uint8), kind)


def write(path: Path, tensors: Mapping[str, Stored], config: str, shapes: Mapping[str, Sequence[int]] = {}) -> Path:
    """Write a file; ``shapes`` are what the tensors' shapes were before they were rearranged."""
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("tacod.config", config)
    writer.add_array("some.words", ["a", "b"])
    writer.add_array("some.numbers", [1.5, 2.5])
    for key, shape in shapes.items():
        writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
    for key, (data, kind) in tensors.items():
        writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
