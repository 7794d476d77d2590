"""Rows of numbers in 8 bits, each with a scale of its own: whole numbers for exchanges, floats for matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.ops.fused import has_kernels

__all__ = ["NarrowLinear", "from_bytes", "narrow_bytes", "quantise_rows", "to_bytes"]

_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise_rows(
    x: Tensor, dtype: torch.dtype, narrow: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows [n, W] as ``dtype`` (int8 or float8_e4m3fn), and scales [n] in fp32: the largest number of each is exact.

    int8 errs by 0.4 % of a row's largest number at most, e4m3 (Micikevicius et al., 2022, arXiv:2209.05433) by 6 % of
    each number. They are written into ``narrow`` and ``scales`` if these are given.
    """
    if narrow is None or scales is None:
        narrow = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if has_kernels(x):
        from tacod.rank.ops import kernels

        kernels.quantise(x, narrow, scales)
        return narrow, scales
    if x.numel():
        torch.div(x.abs().amax(dim=1).float().clamp_min(1e-12), _LIMITS[dtype], out=scales)
        scaled = x.float() / scales[:, None]
        narrow.copy_(scaled.add(0.5).floor() if dtype == torch.int8 else scaled)
    return narrow, scales


def narrow_bytes(rows: int, width: int) -> int:
    """How many bytes `to_bytes` makes of so many rows."""
    return rows * (4 + width)


def to_bytes(x: Tensor) -> Tensor:
    """Rows [..., W] in 8 bits with their scales, flat in uint8: what is sent in their stead."""
    flat = x.reshape(-1, x.shape[-1])
    rows = len(flat)
    sent = torch.empty(narrow_bytes(*flat.shape), dtype=torch.uint8, device=x.device)
    scales, narrow = sent[: 4 * rows].view(torch.float32), sent[4 * rows :].view(torch.int8).view(flat.shape)
    quantise_rows(flat, torch.int8, narrow, scales)
    return sent


def from_bytes(received: Tensor, out: Tensor) -> None:
    """The inverse of `to_bytes`, into ``out`` [..., W], which is contiguous."""
    rows = out.view(-1, out.shape[-1])
    scales = received[: 4 * len(rows)].view(torch.float32)
    narrow = received[4 * len(rows) :].view(torch.int8).view(rows.shape)
    if has_kernels(out):
        from tacod.rank.ops import kernels

        kernels.dequantise(narrow, scales, rows)
        return
    rows.copy_(narrow.float() * scales[:, None])


class NarrowLinear(nn.Module):
    """`nn.Linear` whose product is computed in e4m3: a scale for each output's weights, and one for each token.

    Tokens are quantised as they come. On a CPU the same numbers are multiplied in the compute dtype.

    Args:
        data: The weight in e4m3, [out_features, in_features].
        scales: What its rows are multiplied by, fp32 [out_features].
        bias: [out_features] in the compute dtype, or None.
        dtype: The compute dtype.
    """

    data: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, data: Tensor, scales: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = data.shape
        self.dtype = dtype
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_parameter("bias", bias)

    @staticmethod
    def of(layer: Any) -> NarrowLinear:
        """A layer with a weight in the compute dtype, or a stored one, quantised."""
        weight = layer.weight.detach()
        return NarrowLinear(*quantise_rows(weight, torch.float8_e4m3fn), layer.bias, weight.dtype)

    @property
    def weight(self) -> Tensor:
        """What it multiplies by, in the compute dtype: [out_features, in_features], made anew each time."""
        return (self.data.float() * self.scales[:, None]).to(self.dtype)

    def outputs(self, rows: slice) -> NarrowLinear:
        """Some of its outputs."""
        bias = None if self.bias is None else nn.Parameter(self.bias[rows], requires_grad=False)
        return NarrowLinear(self.data[rows], self.scales[rows], bias, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x`` [..., in_features] in the compute dtype, [..., out_features]."""
        narrow, scales = quantise_rows(x.flatten(0, -2), torch.float8_e4m3fn)
        if x.is_cuda:
            out: Tensor = torch._scaled_mm(
                narrow,
                self.data.t(),
                scale_a=scales[:, None],
                scale_b=self.scales[None, :],
                bias=self.bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        else:
            tokens = (narrow.float() * scales[:, None]).to(x.dtype)
            out = functional.linear(tokens, self.weight, self.bias)
        return torch.unflatten(out, 0, x.shape[:-1])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A model's state has the weight's name and shape, as a stored layer's has."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = torch.empty(self.data.shape, dtype=self.dtype, device="meta")
