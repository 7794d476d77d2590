"""A Triton kernel that dequantizes GGUF's blocks: it reads each block once and writes each number once.

It computes in fp32 what `gguf` computes, and rounds once. This module is imported on GPUs only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tacod.checkpoint.header import BLOCKS, LEVELS

__all__ = ["dequantize_blocks"]

_TILE = 4096
"""How many numbers one program writes."""
_GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16, "IQ4_XS": 8}
"""How many groups of numbers, each with a scale of its own, a block has; one where nothing is said."""
_SHIFT = tl.constexpr(0x4B000000)
"""The bits of 2^23 in fp32; added to a smaller whole number, those of 2^23 plus that number."""
_LARGE = tl.constexpr(8388608.0)
"""2^23."""
_LOW, _HIGH = (
    tl.constexpr(int.from_bytes(bytes(level + 128 for level in half), "little", signed=True))
    for half in (LEVELS[:8], LEVELS[8:])
)
"""`LEVELS` plus 128, in a byte each: two numbers of 64 bits."""


@triton.jit
def _byte(block, place):
    """Bytes of blocks, as int32."""
    return tl.load(block + place).to(tl.int32)


@triton.jit
def _two(block, place):
    """Two bytes, as int32."""
    return _byte(block, place) | _byte(block, place + 1) << 8


@triton.jit
def _half(block, place):
    """Two bytes as fp16, in fp32."""
    return _two(block, place).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _field(block, place, number, RUN: tl.constexpr, WIDTH: tl.constexpr):
    """Fields of WIDTH bits, as int32: RUN bytes have the first ones lowest, and the next ones above; then other bytes.

    ``place`` is the first field's, and ``number`` says which ones.
    """
    count: tl.constexpr = RUN * (8 // WIDTH)
    byte = _byte(block, place + number // count * RUN + number % RUN)
    return byte >> (number % count // RUN * WIDTH) & ((1 << WIDTH) - 1)


@triton.jit
def _fifth(block, place, number):
    """Bits of four bytes, as int32: 16 or 0."""
    word = _two(block, place) | _two(block, place + 2) << 16
    return (word[:, None, None] >> number & 1) << 4


@triton.jit
def _minus(code, LESS: tl.constexpr):
    """Whole numbers from 0 to 2^23, as int32, less LESS: exact in fp32."""
    return (code | _SHIFT).to(tl.float32, bitcast=True) - (_LARGE + LESS)


@triton.jit
def _leveled(code):
    """What 4 bits stand for, fp32."""
    levels = tl.where(code < 8, _LOW, _HIGH)
    return _minus((levels >> (code % 8 * 8)).to(tl.int32) & 255, 128)


@triton.jit
def _scales(block, GROUPS: tl.constexpr, KIND: tl.constexpr):
    """Scale and minimum of blocks' groups, each fp32 [blocks, GROUPS]; kinds without minima have zeros."""
    group = tl.arange(0, GROUPS)[None, :]
    groups = block[:, None]
    minimum = tl.zeros([block.shape[0], GROUPS], tl.float32)
    if KIND == "Q2_K":
        both = _byte(groups, group)
        scale = _half(block, 80)[:, None] * _minus(both & 15, 0)
        minimum = _half(block, 82)[:, None] * _minus(both >> 4, 0)
    elif KIND == "Q3_K":
        code = _field(groups, 96, group, 8, 4) | _field(groups, 104, group, 4, 2) << 4
        scale = _half(block, 108)[:, None] * _minus(code, 32)
    elif KIND == "Q4_K" or KIND == "Q5_K":
        # 6 bits each; the last groups' highest two lie above the first groups' six.
        low = _byte(groups, 4 + group % 4)
        high = _byte(groups, 8 + group % 4)
        rest = _byte(groups, 12 + group % 4)
        code = tl.where(group < 4, low & 63, rest & 15 | low >> 2 & 48)
        scale = _half(block, 0)[:, None] * _minus(code, 0)
        code = tl.where(group < 4, high & 63, rest >> 4 | high >> 2 & 48)
        minimum = _half(block, 2)[:, None] * _minus(code, 0)
    elif KIND == "Q6_K":
        scale = _half(block, 208)[:, None] * _minus(_byte(groups, 192 + group) ^ 128, 128)
    elif KIND == "IQ4_XS":
        code = _field(groups, 4, group, 1, 4) | _field(groups, 2, group, 1, 2) << 4
        scale = _half(block, 0)[:, None] * _minus(code, 32)
    else:
        scale = _half(block, 0)[:, None]
        if KIND == "Q4_1" or KIND == "Q5_1":
            minimum = -_half(block, 2)[:, None]
    return scale, minimum


@triton.jit
def _whole(block, number, KIND: tl.constexpr):
    """The whole numbers of blocks, fp32; ``number`` says which ones."""
    numbers = block[:, None, None]
    if KIND == "Q4_0":
        value = _minus(_field(numbers, 2, number, 16, 4), 8)
    elif KIND == "Q4_1":
        value = _minus(_field(numbers, 4, number, 16, 4), 0)
    elif KIND == "Q5_0":
        value = _minus(_field(numbers, 6, number, 16, 4) | _fifth(block, 2, number), 16)
    elif KIND == "Q5_1":
        value = _minus(_field(numbers, 8, number, 16, 4) | _fifth(block, 4, number), 0)
    elif KIND == "Q8_0":
        value = _minus(_byte(numbers, 2 + number) ^ 128, 128)
    elif KIND == "Q2_K":
        value = _minus(_field(numbers, 16, number, 32, 2), 0)
    elif KIND == "Q3_K":
        value = _minus(_field(numbers, 32, number, 32, 2) | _field(numbers, 0, number, 32, 1) << 2, 4)
    elif KIND == "Q4_K":
        value = _minus(_field(numbers, 16, number, 32, 4), 0)
    elif KIND == "Q5_K":
        value = _minus(_field(numbers, 48, number, 32, 4) | _field(numbers, 16, number, 32, 1) << 4, 0)
    elif KIND == "Q6_K":
        value = _minus(_field(numbers, 0, number, 64, 4) | _field(numbers, 128, number, 32, 2) << 4, 32)
    elif KIND == "IQ4_NL":
        value = _leveled(_field(numbers, 2, number, 16, 4))
    else:
        tl.static_assert(KIND == "IQ4_XS")
        value = _leveled(_field(numbers, 8, number, 16, 4))
    return value


@triton.jit
def _dequantize_blocks(
    data, out, count,
    KIND: tl.constexpr, SIZE: tl.constexpr, TOGETHER: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """TOGETHER blocks of SIZE bytes; each has GROUPS groups of GROUP numbers."""
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    block = first + tl.arange(0, TOGETHER)
    number = tl.arange(0, GROUPS)[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    # What would lie behind the last block is read from it, and not written.
    source = data + tl.minimum(block, count - 1) * SIZE
    scale, minimum = _scales(source, GROUPS, KIND)
    # Products of a scale and a whole number have 24 bits or fewer: a sum of two of them is rounded once.
    value = scale[:, :, None] * _whole(source, number, KIND) - minimum[:, :, None]
    block = block[:, None, None]
    tl.store(out + block * (GROUPS * GROUP) + number, value.to(out.dtype.element_ty), mask=block < count)


def dequantize_blocks(data: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Numbers in ``dtype``, [m, n], from the bytes of their rows, uint8 [m, bytes]; ``kind`` is one of `BLOCKS`."""
    data = data.contiguous()
    numbers, size = BLOCKS[kind]
    groups = _GROUPS.get(kind, 1)
    rows, width = data.shape
    out = torch.empty(rows, width // size * numbers, dtype=dtype, device=data.device)
    count, together = data.numel() // size, _TILE // numbers
    _dequantize_blocks[(triton.cdiv(count, together),)](
        data, out, count,
        KIND=kind, SIZE=size, TOGETHER=together, GROUPS=groups, GROUP=numbers // groups, num_warps=8,
    )  # fmt: skip
    return out
