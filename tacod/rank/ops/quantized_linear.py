"""Linear layers whose weights stay as their file has them, in 8 bits or fewer, until they are used.

Floats of 8 bits after Micikevicius et al., 2022 (arXiv:2209.05433), with one scale for a layer or none; blocks as in
GGUF, each with scales of its own (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint.header import BLOCKS, FLOAT8

__all__ = ["QUANTIZED", "QuantizedLinear", "dequantize"]

QUANTIZED = (*FLOAT8, *BLOCKS)
"""The kinds of weights that are kept as they are, named as in headers."""

_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_BAND = 1 << 24
"""How many numbers are dequantized at once: it bounds what lies beside the result."""


class QuantizedLinear(nn.Module):
    """`nn.Linear` with a stored weight; everything else about it, its bias too, is in the compute dtype.

    Args:
        data: The weight's bytes, uint8 [out_features, bytes of a row].
        kind: One of `QUANTIZED`.
        bias: [out_features] in the compute dtype, or None.
        dtype: The compute dtype.
        scale: What 8-bit floats are multiplied by: fp32, no dimensions; None for 1.
    """

    data: Tensor
    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, data: Tensor, kind: str, bias: nn.Parameter | None, dtype: torch.dtype, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        numbers, size = BLOCKS.get(kind, (1, 1))
        self.out_features, self.in_features = data.shape[0], data.shape[1] // size * numbers
        self.kind, self.dtype = kind, dtype
        if kind in _OF_LEVELS:
            _levels(data.device)
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x`` [..., in_features] in the compute dtype, [..., out_features]."""
        return functional.linear(x, self.dequantized(x.dtype), self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight in the compute dtype, [out_features, in_features], made anew each time."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers, [out_features, in_features]; computed in fp32, then rounded to ``dtype``."""
        step = max(_BAND // self.in_features, 1)
        if self.out_features <= step:
            return self._weight(self.data, dtype)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.data.device)
        for row in range(0, self.out_features, step):
            weight[row : row + step] = self._weight(self.data[row : row + step], dtype)
        return weight

    def _weight(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        if self.kind in _FLOAT8 and self.scale is None:
            return data.view(_FLOAT8[self.kind]).to(dtype)
        weight = dequantize(data, self.kind)
        return (weight if self.scale is None else weight * self.scale).to(dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A model's state has the weight's name and shape; its numbers are nowhere, so they are on no device."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        shape = (self.out_features, self.in_features)
        destination[f"{prefix}weight"] = torch.empty(shape, dtype=self.dtype, device="meta")

    def extra_repr(self) -> str:
        """What printing shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


def dequantize(data: Tensor, kind: str) -> Tensor:
    """Numbers in fp32, [..., n], from the bytes of their rows, uint8 [..., bytes]; ``kind`` is one of `QUANTIZED`."""
    if kind in _FLOAT8:
        return data.view(_FLOAT8[kind]).float()
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
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_tables: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    """What 4 bits stand for, int8 [16] (``kvalues_iq4nl``); made once on a device, for a copy to a GPU waits for it."""
    if device not in _tables:
        _tables[device] = torch.tensor(_LEVELS, dtype=torch.int8, device=device)
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
