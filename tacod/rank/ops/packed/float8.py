"""Weights in floats of 8 bits (Micikevicius et al., 2022, arXiv:2209.05433), and mxfp8 and nvfp4, which have blocks.

mxfp8 and nvfp4: OCP Microscaling Formats (Rouhani et al., 2023, arXiv:2310.10537) and NVIDIA's variant for e2m1. The
arithmetic is that of ComfyUI, which dequantizes in the compute dtype on a CPU, and in fp32 with one rounding on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.ops.fused import has_kernels
from tacod.rank.ops.largest import largest
from tacod.rank.ops.packed.base import PackedLinear, in_bands, sliced

__all__ = ["FLOAT8_DTYPES", "Float8Linear", "Mxfp8Linear", "Nvfp4Linear", "unblocked"]

FLOAT8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""By safetensors' names."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_BLOCK = torch.finfo(torch.float8_e4m3fn).max
"""Of the scales of nvfp4's blocks."""


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

    def prepared(self, x: Tensor) -> Tensor:
        """See `PackedLinear.prepared`."""
        if not self.native:
            return x
        assert self.input_scale is not None
        return quantize_float8(x, self.input_scale, self.data.dtype)

    def product(self, prepared: Tensor) -> Tensor:
        """See `PackedLinear.product`."""
        if not self.native:
            return super().product(prepared)
        if not self._multiplies:
            return super().product(scaled(prepared, self.input_scale, self.dtype))
        assert self.input_scale is not None
        assert self.scale is not None
        out: Tensor = torch._scaled_mm(
            prepared.flatten(0, -2),
            self.data.t(),
            scale_a=self.input_scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=False,
        )
        return torch.unflatten(out, 0, prepared.shape[:-1])

    @property
    def _multiplies(self) -> bool:
        """Whether the GPU has a product for these operands; where it has none, ComfyUI multiplies them dequantized."""
        whole = self.in_features % 16 == self.out_features % 16 == 0
        plain = self.data.is_cuda and self.dtype != torch.float32 and self.data.dtype == torch.float8_e4m3fn
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
        native: Whether activations are quantized too, as ComfyUI does on GPUs that multiply such blocks. The product
            is that of the dequantized numbers.
    """

    scale: Tensor
    rowwise = ("scale",)

    def __init__(
        self,
        data: Tensor,
        scale: Tensor,
        in_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        native: bool = False,
    ) -> None:
        super().__init__(data, in_features, bias, dtype)
        self.native = native
        self.register_buffer("scale", scale, persistent=False)

    @property
    def quantizes(self) -> bool:
        """See `PackedLinear.quantizes`."""
        return self.native

    def prepared(self, x: Tensor) -> Tensor:
        """See `PackedLinear.prepared`."""
        if not self.native:
            return x
        return _token_by_token(x, round_mxfp8)

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
        input_scale: Of the activations, fp32 without dimensions, where they are quantized: None for that by which the
            largest number of all tokens of all images fits.
        native: Whether activations are quantized too; see `Mxfp8Linear`.
    """

    blocks: Tensor
    scale: Tensor
    smoothing: Tensor | None
    input_scale: Tensor | None
    levels: Tensor
    rowwise = ("blocks",)

    def __init__(
        self,
        data: Tensor,
        blocks: Tensor,
        scale: Tensor,
        in_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        smoothing: Tensor | None = None,
        input_scale: Tensor | None = None,
        native: bool = False,
    ) -> None:
        super().__init__(data, in_features, bias, dtype)
        self.native = native
        levels = torch.tensor([*_E2M1, *(-each for each in _E2M1)], device=data.device)
        input_scale = input_scale if native else None
        buffers = {
            "blocks": blocks,
            "scale": scale,
            "levels": levels,
            "smoothing": smoothing,
            "input_scale": input_scale,
        }
        for name, each in buffers.items():
            self.register_buffer(name, each, persistent=False)

    @property
    def quantizes(self) -> bool:
        """See `PackedLinear.quantizes`."""
        return self.native or self.smoothing is not None

    def prepared(self, x: Tensor) -> Tensor:
        """See `PackedLinear.prepared`."""
        x = x if self.smoothing is None else x * self.smoothing.to(x.dtype)
        if not self.native:
            return x
        scale = self.input_scale
        if scale is None:
            # The division is in the dtype of ``x``, as in ComfyUI.
            scale = (largest(x).to(x.dtype) / (_LARGEST_BLOCK * _E2M1[-1])).float()
        return _token_by_token(x, lambda tokens: round_nvfp4(tokens, scale))

    def _effective(self, dtype: torch.dtype) -> Tensor:
        weight = super()._effective(dtype)
        return weight if self.smoothing is None else weight * self.smoothing.to(dtype)

    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.numbers`."""
        packed = self.data[rows]
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
        numbers = self.levels.index_select(0, codes.flatten().int()).view(len(codes), -1, 16)
        return scaled_blocks(numbers, self.blocks[rows], self.scale, dtype)[:, : self.in_features]

    def unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor | None:
        """See `PackedLinear.unpacked_by_kernel`."""
        from tacod.rank.ops.packed import kernels

        if not kernels.has_float8(self.data.device):
            return None
        return kernels.dequantize_nvfp4(self.data, self.blocks, self.scale, self.in_features, dtype)


def scaled_blocks(numbers: Tensor, blocks: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of e2m1, fp32 [..., blocks, 16], times the blocks' scales, e4m3 [..., blocks], and one for all.

    On a CPU it is computed in ``dtype``, on a GPU in fp32, as in ComfyUI. [..., blocks * 16] in ``dtype``.
    """
    inner = torch.float32 if numbers.is_cuda else dtype
    scales = scale.to(inner) * blocks.to(inner)
    return (numbers.to(inner) * scales[..., None]).to(dtype).flatten(-2)


def round_mxfp8(x: Tensor) -> Tensor:
    """Tokens [n, W] as the nearest that mxfp8 holds, in their dtype."""
    blocks = _in_blocks(x, 32)
    limit = torch.finfo(torch.float8_e4m3fn).max
    needed = blocks.abs().amax(dim=-1, keepdim=True) / limit
    # The least power of two by which the largest number of a block fits.
    exponents = torch.log2(needed.clamp(min=2**-126)).ceil().clamp(max=127).int()
    quantized = (blocks / torch.ldexp(torch.ones_like(needed), exponents)).clamp(-limit, limit)
    numbers = torch.ldexp(quantized.to(torch.float8_e4m3fn).float(), exponents)
    return numbers.to(x.dtype).flatten(-2)[:, : x.shape[-1]]


def round_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """Tokens [n, W] as the nearest that nvfp4 holds with this ``scale``, in their dtype."""
    numbers, blocks = quantize_nvfp4(_in_blocks(x, 16), scale)
    return scaled_blocks(numbers, blocks, scale, x.dtype)[:, : x.shape[-1]]


def _token_by_token(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``rounded`` gives of tokens, some [n, W] at a time, for ``x`` [..., W]."""
    tokens = x.flatten(0, -2)
    shape = (len(tokens), x.shape[-1])
    return in_bands(lambda rows: rounded(tokens[rows]), shape, x.dtype, x.device).view(x.shape)


def quantize_nvfp4(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of fp32 [..., blocks, 16] as numbers of e2m1, in fp32, and the blocks' scales, e4m3 [..., blocks].

    ``scale`` is the one for all, fp32 without dimensions.
    """
    wanted = x.abs().amax(dim=-1) / _E2M1[-1]
    # Where all is zero, so is the scale.
    blocks = (wanted / scale.masked_fill(scale == 0, 1)).clamp(max=_LARGEST_BLOCK).to(torch.float8_e4m3fn)
    divisors = (scale * blocks.float())[..., None]
    return round_e2m1(x / divisors.masked_fill(divisors == 0, torch.inf)), blocks


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest number of e2m1, of two the even one, of too large ones the largest."""
    x = x.clamp(-_E2M1[-1], _E2M1[-1])
    size = x.abs()
    steps = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / steps).round() * steps


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """``x`` [..., W] in fp32, in blocks of its last dimension, with zeros to fill the last one: [..., blocks, size]."""
    padded = functional.pad(x, (0, -x.shape[-1] % size)) if x.shape[-1] % size else x
    return torch.unflatten(padded.float(), -1, (-1, size))


def unblocked(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [rows, columns] from cuBLAS's order: tiles of 128 rows and 4 columns, in a tile 32 x 4 x 4.

    https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
    """
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * 128, across * 4)[:rows, :columns].contiguous()
