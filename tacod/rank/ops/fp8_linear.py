"""Linear layers in fp8 (e4m3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.ops.quantize_rows import quantize_rows

__all__ = ["Fp8Linear"]


class Fp8Linear(nn.Module):
    """`nn.Linear` whose product is computed in e4m3: a scale for each output's weights, and one for each token.

    Tokens are quantized as they come. On a CPU the same numbers are multiplied in the compute dtype.

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
    def of(layer: Any) -> Fp8Linear:
        """A layer with a weight in the compute dtype, or a stored one, quantized."""
        weight = layer.weight.detach()
        return Fp8Linear(*quantize_rows(weight, torch.float8_e4m3fn), layer.bias, weight.dtype)

    @property
    def weight(self) -> Tensor:
        """What it multiplies by, in the compute dtype: [out_features, in_features], made anew each time."""
        return (self.data.float() * self.scales[:, None]).to(self.dtype)

    def outputs(self, rows: slice) -> Fp8Linear:
        """Some of its outputs."""
        bias = None if self.bias is None else nn.Parameter(self.bias[rows], requires_grad=False)
        return Fp8Linear(self.data[rows], self.scales[rows], bias, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x`` [..., in_features] in the compute dtype, [..., out_features]."""
        quantized, scales = quantize_rows(x.flatten(0, -2), torch.float8_e4m3fn)
        if x.is_cuda:
            out: Tensor = torch._scaled_mm(
                quantized,
                self.data.t(),
                scale_a=scales[:, None],
                scale_b=self.scales[None, :],
                bias=self.bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        else:
            tokens = (quantized.float() * scales[:, None]).to(x.dtype)
            out = functional.linear(tokens, self.weight, self.bias)
        return torch.unflatten(out, 0, x.shape[:-1])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A model's state has the weight's name and shape, as a stored layer's has."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = torch.empty(self.data.shape, dtype=self.dtype, device="meta")
