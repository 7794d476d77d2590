"""Linear layers whose weights are quantized to fp8 (e4m3) at load, and their activations as they come."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.quantize_rows import quantize_rows

__all__ = ["Fp8Linear"]

_FEW = 128
"""Below so many tokens the bias is added apart: cuBLAS has no product with a bias for few tokens and many inputs."""


class Fp8Linear(PackedLinear):
    """`nn.Linear` whose product is computed in e4m3: a scale for each output's weights, and one for each token.

    On a CPU the same numbers are multiplied in the compute dtype.

    Args:
        data: The weight in e4m3, [out_features, in_features].
        scales: What its rows are multiplied by, fp32 [out_features].
        bias: [out_features] in the compute dtype, or None.
        dtype: The compute dtype.
    """

    scales: Tensor
    rowwise = ("scales",)
    quantizes = True

    def __init__(self, data: Tensor, scales: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(data, data.shape[1], bias, dtype)
        self.register_buffer("scales", scales, persistent=False)

    @staticmethod
    def of(layer: nn.Linear | PackedLinear) -> Fp8Linear:
        """A layer with a weight in the compute dtype, or a packed one, quantized."""
        weight = layer.weight.detach()
        return Fp8Linear(*quantize_rows(weight, torch.float8_e4m3fn), layer.bias, weight.dtype)

    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.numbers`."""
        return (self.data[rows].float() * self.scales[rows, None]).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `PackedLinear.product`."""
        quantized, scales = quantize_rows(x.flatten(0, -2), torch.float8_e4m3fn)
        if x.is_cuda:
            few = len(quantized) < _FEW
            out: Tensor = torch._scaled_mm(
                quantized,
                self.data.t(),
                scale_a=scales[:, None],
                scale_b=self.scales[None, :],
                bias=None if few else self.bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
            if few and self.bias is not None:
                out += self.bias
        else:
            tokens = (quantized.float() * scales[:, None]).to(x.dtype)
            out = functional.linear(tokens, self._unpacked(x.dtype), self.bias)
        return torch.unflatten(out, 0, x.shape[:-1])
