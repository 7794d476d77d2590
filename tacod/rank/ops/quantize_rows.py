"""Rows of numbers in 8 bits, each with a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from tacod.rank.ops.fused import has_kernels

__all__ = ["quantize_rows"]

_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(
    x: Tensor, dtype: torch.dtype, out: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows [n, W] as ``dtype`` (int8 or float8_e4m3fn), and scales [n] in fp32: the largest number of each is exact.

    int8 errs by 0.4 % of a row's largest number at most, e4m3 (Micikevicius et al., 2022, arXiv:2209.05433) by 6 % of
    each number. They are written into ``out`` and ``scales`` if these are given.
    """
    if out is None or scales is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if has_kernels(x):
        from tacod.rank.ops import kernels

        kernels.quantize(x, out, scales)
        return out, scales
    if x.numel():
        torch.div(x.abs().amax(dim=1).float().clamp_min(1e-12), _LIMITS[dtype], out=scales)
        scaled = x.float() / scales[:, None]
        out.copy_(scaled.add(0.5).floor() if dtype == torch.int8 else scaled)
    return out, scales
