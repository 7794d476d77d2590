"""The codec of 8-bit exchanges: each row as int8 with a scale in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from tacod.rank.ops.fused import has_kernels
from tacod.rank.ops.quantize_rows import quantize_rows

__all__ = ["decode", "encode", "encoded_bytes"]


def encoded_bytes(rows: int, width: int) -> int:
    """How many bytes `encode` makes of this many rows."""
    return rows * (4 + width)


def encode(x: Tensor) -> Tensor:
    """Rows [..., W] in 8 bits with their scales, flat in uint8."""
    flat = x.reshape(-1, x.shape[-1])
    rows = len(flat)
    sent = torch.empty(encoded_bytes(*flat.shape), dtype=torch.uint8, device=x.device)
    scales, numbers = sent[: 4 * rows].view(torch.float32), sent[4 * rows :].view(torch.int8).view(flat.shape)
    quantize_rows(flat, torch.int8, numbers, scales)
    return sent


def decode(received: Tensor, out: Tensor) -> None:
    """The inverse of `encode`, into ``out`` [..., W], which is contiguous."""
    rows = out.view(-1, out.shape[-1])
    scales = received[: 4 * len(rows)].view(torch.float32)
    numbers = received[4 * len(rows) :].view(torch.int8).view(rows.shape)
    if has_kernels(out):
        from tacod.rank.ops import kernels

        kernels.dequantize(numbers, scales, rows)
        return
    rows.copy_(numbers.float() * scales[:, None])
