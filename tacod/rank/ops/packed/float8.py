"""Weights in floats of 8 bits (Micikevicius et al., 2022, arXiv:2209.05433), and mxfp8 and nvfp4, which have blocks.

mxfp8 and nvfp4: OCP Microscaling Formats (Rouhani et al., 2023, arXiv:2310.10537) and NVIDIA's variant for e2m1. The
arithmetic is that of ComfyUI, which multiplies in the compute dtype on a CPU, and in fp32 with one rounding on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.ops.fused import has_kernels
from tacod.rank.ops.packed.base import PackedLinear, sliced

__all__ = ["FLOAT8_DTYPES", "Float8Linear", "Mxfp8Linear", "Nvfp4Linear", "unblocked"]

FLOAT8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""By safetensors' names."""
_LABELS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Float8Linear(PackedLinear):
    """A linear layer in e4m3 or e5m2.

    Args:
        data: The weight in either, [out_features, in_features].
        bias: See `PackedLinear`.
        dtype: See `PackedLinear`.
        scale: What the weight is multiplied by, fp32: no dimensions, or [out_features, 1]; None for nothing.
        input_scale: Of the activations, fp32 without dimensions: None for 1. It counts where they are quantized.
        native: Whether activations are quantized too, as ComfyUI does on GPUs that multiply in 8 bits.
    """

    scale: Tensor | None
    input_scale: Tensor | None
    rowwise = ("scale",)

    def __init__(
        self,
        data: Tensor,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        native: bool = False,
    ) -> None:
        super().__init__(data, data.shape[1], bias, dtype)
        self.native = native
        if native and input_scale is None:
            input_scale = torch.ones((), device=data.device)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("input_scale", input_scale if native else None, persistent=False)

    @property
    def label(self) -> str:
        """See `PackedLinear.label`."""
        return _LABELS[self.data.dtype]

    @property
    def quantizes(self) -> bool:
        """See `PackedLinear.quantizes`."""
        return self.native

    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.numbers`."""
        return scaled(self.data[rows], sliced(self.scale, rows), dtype)

    def unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor | None:
        """See `PackedLinear.unpacked_by_kernel`."""
        from tacod.rank.ops.packed import kernels

        if not kernels.has_float8(self.data.device):
            return None
        return kernels.dequantize_float8(self.data, self.scale, self.in_features, dtype)

    def product(self, x: Tensor) -> Tensor:
        """See `PackedLinear.product`."""
        if not self.native:
            return super().product(x)
        assert self.input_scale is not None
        quantized = quantize_float8(x.flatten(0, -2), self.input_scale, self.data.dtype)
        if self._multiplies(x):
            assert self.scale is not None
            out: Tensor = torch._scaled_mm(
                quantized,
                self.data.t(),
                scale_a=self.input_scale,
                scale_b=self.scale,
                bias=self.bias,
                out_dtype=x.dtype,
                use_fast_accum=False,
            )
        else:
            tokens = scaled(quantized, self.input_scale, x.dtype)
            out = functional.linear(tokens, self._unpacked(x.dtype), self.bias)
        return torch.unflatten(out, 0, x.shape[:-1])

    def _multiplies(self, x: Tensor) -> bool:
        """Whether the GPU has a product for these operands; where it has none, ComfyUI multiplies them dequantized."""
        whole = self.in_features % 16 == self.out_features % 16 == 0
        plain = x.is_cuda and x.dtype != torch.float32 and self.data.dtype == torch.float8_e4m3fn
        return plain and whole and self.scale is not None and self.scale.numel() == 1


def scaled(data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Floats of 8 bits times their scale: on a CPU in ``dtype``, on a GPU in fp32, rounded to ``dtype``."""
    if scale is None:
        return data.to(dtype)
    if data.is_cuda:
        return (data.float() * scale).to(dtype)
    return data.to(dtype) * scale.to(dtype)


def quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` divided by ``scale`` (fp32, no dimensions), in ``dtype``; what is too large becomes the largest number."""
    if has_kernels(x):
        from tacod.rank.ops.packed import kernels

        if kernels.has_float8(x.device):
            return kernels.quantize_float8(x, scale, dtype)
    limit = torch.finfo(dtype).max
    return (x * (1.0 / scale).to(x.dtype)).clamp(-limit, limit).to(dtype)


class Mxfp8Linear(PackedLinear):
    """A linear layer in e4m3 with a power of two for each 32 columns.

    Args:
        data: The weight in e4m3, [out_features, blocks * 32].
        scale: The powers' exponents plus 127, uint8 [out_features, blocks].
        in_features: How many columns count; the others are padding.
        bias: See `PackedLinear`.
        dtype: See `PackedLinear`.
    """

    scale: Tensor
    rowwise = ("scale",)
    label = "mxfp8"

    def __init__(
        self, data: Tensor, scale: Tensor, in_features: int, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super().__init__(data, in_features, bias, dtype)
        self.register_buffer("scale", scale, persistent=False)

    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.numbers`."""
        blocks = torch.unflatten(self.data[rows].float(), 1, (-1, 32))
        exponents = self.scale[rows].int() - 127
        return torch.ldexp(blocks, exponents[:, :, None]).to(dtype).flatten(1)[:, : self.in_features]

    def unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor | None:
        """See `PackedLinear.unpacked_by_kernel`."""
        from tacod.rank.ops.packed import kernels

        if not kernels.has_float8(self.data.device):
            return None
        return kernels.dequantize_float8(self.data, self.scale, self.in_features, dtype)


class Nvfp4Linear(PackedLinear):
    """A linear layer in e2m1, two numbers in a byte, with a scale in e4m3 for each 16 columns and one for all.

    Args:
        data: The weight, uint8 [out_features, blocks * 8], the even column in the high nibble.
        blocks: The blocks' scales in e4m3, [out_features, blocks].
        scale: What all are multiplied by, fp32 without dimensions.
        in_features: How many columns count; the others are padding.
        bias: See `PackedLinear`.
        dtype: See `PackedLinear`.
        smoothing: What activations are multiplied by first, [in_features] (``pre_quant_scale``: Lin et al., 2023,
            arXiv:2306.00978); None for nothing.
    """

    blocks: Tensor
    scale: Tensor
    smoothing: Tensor | None
    levels: Tensor
    rowwise = ("blocks",)
    label = "nvfp4"

    def __init__(
        self,
        data: Tensor,
        blocks: Tensor,
        scale: Tensor,
        in_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        smoothing: Tensor | None = None,
    ) -> None:
        super().__init__(data, in_features, bias, dtype)
        levels = torch.tensor([*_E2M1, *(-each for each in _E2M1)], device=data.device)
        for name, each in (("blocks", blocks), ("scale", scale), ("levels", levels), ("smoothing", smoothing)):
            self.register_buffer(name, each, persistent=False)

    @property
    def quantizes(self) -> bool:
        """See `PackedLinear.quantizes`."""
        return self.smoothing is not None

    def product(self, x: Tensor) -> Tensor:
        """See `PackedLinear.product`."""
        return super().product(x if self.smoothing is None else x * self.smoothing.to(x.dtype))

    def _effective(self, dtype: torch.dtype) -> Tensor:
        weight = super()._effective(dtype)
        return weight if self.smoothing is None else weight * self.smoothing.to(dtype)

    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.numbers`."""
        packed = self.data[rows]
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
        # On a GPU ComfyUI computes this in fp32.
        inner = torch.float32 if packed.is_cuda else dtype
        numbers = self.levels.to(inner).index_select(0, codes.flatten().int()).view(len(codes), -1, 16)
        scales = self.scale.to(inner) * self.blocks[rows].to(inner)
        return (numbers * scales[:, :, None]).to(dtype).flatten(1)[:, : self.in_features]

    def unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor | None:
        """See `PackedLinear.unpacked_by_kernel`."""
        from tacod.rank.ops.packed import kernels

        if not kernels.has_float8(self.data.device):
            return None
        return kernels.dequantize_nvfp4(self.data, self.blocks, self.scale, self.in_features, dtype)


def unblocked(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [rows, columns] from cuBLAS's order: tiles of 128 rows and 4 columns, in a tile 32 x 4 x 4.

    https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
    """
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * 128, across * 4)[:rows, :columns].contiguous()
