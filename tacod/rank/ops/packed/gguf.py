"""Weights in GGUF's blocks, each with scales of its own.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tacod.checkpoint.header import BLOCKS, LEVELS
from tacod.rank.ops.packed.base import PackedLinear

__all__ = ["BlockLinear", "dequantize_blocks"]


class BlockLinear(PackedLinear):
    """A linear layer whose rows are blocks of a ``kind`` of GGUF; dequantized in fp32, then rounded."""

    def __init__(self, data: Tensor, kind: str, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        numbers, size = BLOCKS[kind]
        super().__init__(data, data.shape[1] // size * numbers, bias, dtype)
        self.kind = kind
        if kind in _OF_LEVELS:
            _levels(data.device)

    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.numbers`."""
        return dequantize_blocks(self.data[rows], self.kind).to(dtype)

    def unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor | None:
        """See `PackedLinear.unpacked_by_kernel`."""
        from tacod.rank.ops.packed import gguf_kernels

        return gguf_kernels.dequantize_blocks(self.data, self.kind, dtype)


def dequantize_blocks(data: Tensor, kind: str) -> Tensor:
    """Numbers in fp32, [..., n], from the bytes of their rows, uint8 [..., bytes]; ``kind`` is one of `BLOCKS`."""
    blocks = data.reshape(-1, BLOCKS[kind][1])
    return _BLOCKS[kind](blocks).reshape(*data.shape[:-1], -1)


def _q4_0(blocks: Tensor) -> Tensor:
    """A scale in fp16, then 32 numbers of 4 bits, from -8 on."""
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:], 16).flatten(1).view(torch.int8) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    """Scale and minimum in fp16, then 32 numbers of 4 bits."""
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:], 16).flatten(1) + _half(blocks[:, 2:4])


def _q5_0(blocks: Tensor) -> Tensor:
    """A scale in fp16, then 32 numbers of 5 bits, from -16 on."""
    return _half(blocks[:, :2]) * (_fives(blocks[:, 2:]).view(torch.int8) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """Scale and minimum in fp16, then 32 numbers of 5 bits."""
    return _half(blocks[:, :2]) * _fives(blocks[:, 4:]) + _half(blocks[:, 2:4])


def _q8_0(blocks: Tensor) -> Tensor:
    """A scale in fp16, then 32 whole numbers."""
    return _half(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)


def _q2_k(blocks: Tensor) -> Tensor:
    """Sixteen groups of 16 numbers of 2 bits; before them scales and minima of 4 bits, behind what these count in."""
    scale = _half(blocks[:, 80:82]) * (blocks[:, :16] & 15)
    minimum = _half(blocks[:, 82:]) * (blocks[:, :16] >> 4)
    return scale[:, :, None] * torch.unflatten(_pairs(blocks[:, 16:80]), 1, (16, 16)) - minimum[:, :, None]


def _q3_k(blocks: Tensor) -> Tensor:
    """Sixteen groups of 16 numbers of 3 bits, from -4 on, the third apart, each with a scale of 6 bits, from -32 on."""
    numbers = (_pairs(blocks[:, 32:96]) | _bits(blocks[:, None, :32], 1, 8).flatten(1) << 2).view(torch.int8) - 4
    low, high = _nibbles(blocks[:, 96:104], 8), _bits(blocks[:, None, 104:108], 2, 4)
    scale = _half(blocks[:, 108:]) * ((low.flatten(1) | high.flatten(1) << 4).view(torch.int8) - 32)
    return scale[:, :, None] * torch.unflatten(numbers, 1, (16, 16))


def _q4_k(blocks: Tensor) -> Tensor:
    """Eight groups of 32 numbers of 4 bits, each with scale and minimum."""
    scale, minimum = _groups(blocks)
    return scale * _nibbles(blocks[:, 16:], 32) - minimum


def _q5_k(blocks: Tensor) -> Tensor:
    """As `_q4_k`; the numbers' fifth bits lie by themselves, bit g of 32 bytes for group g."""
    scale, minimum = _groups(blocks)
    fifth = _bits(blocks[:, None, 16:48], 1, 8)
    return scale * (_nibbles(blocks[:, 48:], 32) + 16 * fifth) - minimum


def _q6_k(blocks: Tensor) -> Tensor:
    """Sixteen groups of 16 numbers of 6 bits, low nibbles and high pairs apart, each with a scale of 8 bits."""
    numbers = (_nibbles(blocks[:, :128], 64).flatten(1) | _pairs(blocks[:, 128:192]) << 4).view(torch.int8) - 32
    scale = _half(blocks[:, 208:210]) * blocks[:, 192:208].view(torch.int8)
    return scale[:, :, None] * torch.unflatten(numbers, 1, (16, 16))


def _iq4_nl(blocks: Tensor) -> Tensor:
    """A scale in fp16, then 32 numbers of 4 bits, which count levels."""
    return _half(blocks[:, :2]) * _leveled(_nibbles(blocks[:, 2:], 16).flatten(1))


def _iq4_xs(blocks: Tensor) -> Tensor:
    """Eight groups of 32 numbers that count levels; their scales have 6 bits, from -32 on: high pairs, low nibbles."""
    high, low = _packed(blocks[:, 2:4], 2), _packed(blocks[:, 4:8], 4)
    scale = _half(blocks[:, :2]) * ((low | high << 4).view(torch.int8) - 32)
    return scale[:, :, None] * torch.unflatten(_leveled(_nibbles(blocks[:, 8:], 16).flatten(1)), 1, (8, 32))


_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}

_OF_LEVELS = ("IQ4_NL", "IQ4_XS")
"""Their layers have `_levels` made before anything is traced."""
_tables: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    """`LEVELS`, int8 [16]; made once on a device, for a copy to a GPU waits for it."""
    if device not in _tables:
        _tables[device] = torch.tensor(LEVELS, dtype=torch.int8, device=device)
    return _tables[device]


def _leveled(codes: Tensor) -> Tensor:
    """The level of each number of 4 bits, int8."""
    return _levels(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def _half(data: Tensor) -> Tensor:
    """Pairs of bytes as fp16, in fp32."""
    return data.contiguous().view(torch.float16).float()


def _bits(data: Tensor, width: int, count: int) -> Tensor:
    """``count`` fields of ``width`` bits of each byte, the lowest first, along the dimension before the last."""
    shifts = torch.arange(0, width * count, width, dtype=torch.uint8, device=data.device)
    return data >> shifts[:, None] & (1 << width) - 1


def _packed(data: Tensor, width: int) -> Tensor:
    """Fields of ``width`` bits, byte after byte, the lowest of each first: [n, 8 / width * bytes]."""
    return _bits(data[:, :, None, None], width, 8 // width).flatten(1)


def _pairs(data: Tensor) -> Tensor:
    """Runs of 32 bytes as their lowest two bits, then the next ones: [n, 4 * bytes]."""
    return _bits(torch.unflatten(data, 1, (-1, 1, 32)), 2, 4).flatten(1)


def _fives(data: Tensor) -> Tensor:
    """32 numbers of 5 bits, [n, 32]: their highest bits in 4 bytes, then the others in 16."""
    return _nibbles(data[:, 4:], 16).flatten(1) | _packed(data[:, :4], 1) << 4


def _nibbles(data: Tensor, run: int) -> Tensor:
    """Runs of bytes as their low nibbles, then their high ones: [n, 2 * runs, run]."""
    return _bits(torch.unflatten(data, 1, (-1, 1, run)), 4, 2).flatten(1, 2)


def _groups(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the eight groups, each [n, 8, 1]: 6 bits each, in 12 bytes, times two numbers in fp16."""
    low, high, rest = torch.unflatten(blocks[:, 4:16], 1, (3, 4)).unbind(1)
    scale = torch.cat((low & 63, rest & 15 | low >> 2 & 48), dim=1)
    minimum = torch.cat((high & 63, rest >> 4 | high >> 2 & 48), dim=1)
    whole = _half(blocks[:, :4])
    return (whole[:, :1] * scale)[:, :, None], (whole[:, 1:] * minimum)[:, :, None]
