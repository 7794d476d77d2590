"""Weights of whole numbers, whose activations are quantized to whole numbers too, each token with a scale of its own.

The arithmetic is that of ComfyUI and comfy-kitchen (https://github.com/Comfy-Org/comfy-kitchen): products are summed
in whole numbers, so they are exact, and scaled in fp32.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from tacod.rank.ops.fused import has_kernels
from tacod.rank.ops.packed.base import PackedLinear, sliced
from tacod.rank.ops.packed.rotation import hadamard, rotate

__all__ = ["Int4Linear", "Int8Linear", "IntegerLinear", "W4A8Linear"]

_ROWS_BYTES = 256 << 20
"""How many bytes of sums are scaled at once."""


class Tokens(NamedTuple):
    """Tokens in int8, each with a scale."""

    numbers: Tensor
    """int8 [n, in_features]."""
    scales: Tensor
    """fp32 [n, 1]."""
    shape: torch.Size
    """How the n tokens lie."""


class IntegerLinear(PackedLinear):
    """A linear layer of whole numbers.

    Args:
        data: See `PackedLinear`.
        in_features: See `PackedLinear`.
        scale: Of the weight, fp32: no dimensions, or [out_features, 1].
        group: How many columns are rotated together (see `rotate`); 0 for none.
        bias: See `PackedLinear`.
        dtype: See `PackedLinear`.
        weight_only: Whether activations stay as they are.
        full_precision: Whether the file says ``full_precision_matrix_mult``. ComfyUI quantizes the activations of these
            formats in spite of it, unless they are in another dtype than the model's.
    """

    scale: Tensor
    rowwise: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(
        self,
        data: Tensor,
        in_features: int,
        scale: Tensor,
        group: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        weight_only: bool = False,
        full_precision: bool = False,
    ) -> None:
        super().__init__(data, in_features, bias, dtype)
        self.group, self.weight_only, self.full_precision = group, weight_only, full_precision
        self.register_buffer("scale", scale, persistent=False)
        if group:
            for each in {dtype, torch.float32}:
                # A copy to a GPU waits for it, and can't be part of a graph.
                hadamard(group, each, data.device)

    @property
    def quantizes(self) -> bool:
        """See `PackedLinear.quantizes`."""
        return not self.weight_only

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """See `PackedLinear.in_dtype`; activations of another dtype stay as they are if the file asks for it."""
        twin = super().in_dtype(dtype)
        twin.weight_only = self.weight_only or (self.full_precision and dtype != self.dtype)
        return twin

    def whole(self, rows: slice) -> Tensor:
        """Rows of the weight before scale and rotation: int8 [rows, in_features]."""
        return self.data[rows]

    def factor(self) -> Tensor:
        """The `whole` of all rows, which tokens are multiplied by."""
        fast = self.factor_by_kernel() if has_kernels(self.data) else None
        return self._in_bands(self.whole, torch.int8) if fast is None else fast

    def factor_by_kernel(self) -> Tensor | None:
        """`factor` on a GPU in one pass, or None where no kernel has it."""
        return None

    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.numbers`; computed in fp32."""
        scale = sliced(self.scale, rows)
        assert scale is not None
        weight = self.whole(rows).float() * scale
        return (rotate(weight, self.group) if self.group else weight).to(dtype)

    def unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor:
        """See `PackedLinear.unpacked_by_kernel`."""
        from tacod.rank.ops.packed import kernels

        return kernels.rotate(self.factor(), self.scale, self.group, dtype)

    def prepared(self, x: Tensor) -> Tensor | Tokens:
        """See `PackedLinear.prepared`: `Tokens`, unless another library quantizes them."""
        if self.weight_only or (has_kernels(x) and _is_kitchens(x.device)):
            return x
        return self.quantized(x)

    def quantized(self, x: Tensor) -> Tokens:
        """``x`` [..., in_features], rotated where the weight is, in int8."""
        tokens = x.flatten(0, -2)
        if has_kernels(x):
            from tacod.rank.ops.packed import kernels

            return Tokens(*kernels.quantize_tokens(tokens, self.group), x.shape[:-1])
        return Tokens(*quantize_tokens(self.rotated(tokens)), x.shape[:-1])

    def product(self, prepared: Tensor | Tokens) -> Tensor:
        """See `PackedLinear.product`."""
        if self.weight_only:
            return super().product(prepared)
        factor = self.factor()
        if isinstance(prepared, Tensor):
            from tacod.rank.ops.packed import kitchen

            if kitchen.takes(factor):
                out = kitchen.int8_linear(prepared.flatten(0, -2), factor, self.scale, self.bias, self.group)
                return torch.unflatten(out, 0, prepared.shape[:-1])
            prepared = self.quantized(prepared)
        return torch.unflatten(self.multiply(prepared, factor), 0, prepared.shape)

    def multiply(self, tokens: Tokens, factor: Tensor) -> Tensor:
        """Of n tokens and `factor`, [n, out_features] in the compute dtype."""
        if has_kernels(factor):
            from tacod.rank.ops.packed import kernels

            if kernels.takes(factor):
                return kernels.multiply(tokens.numbers, tokens.scales, factor, self.scale, self.bias, self.dtype)
        sums = integer_product(tokens.numbers, factor)
        out = torch.empty(sums.shape, dtype=self.dtype, device=factor.device)
        step = max(_ROWS_BYTES // (4 * self.out_features), 1)
        for row in range(0, len(sums), step):
            rows = slice(row, row + step)
            out[rows] = sums[rows].float() * (tokens.scales[rows] * self.scale.reshape(1, -1))
        return out if self.bias is None else out + self.bias

    def rotated(self, tokens: Tensor) -> Tensor:
        """Tokens [n, in_features], rotated where the weight is."""
        return rotate(tokens, self.group) if self.group else tokens


class Int8Linear(IntegerLinear):
    """A linear layer in int8, its data [out_features, in_features]."""

    def factor(self) -> Tensor:
        """See `IntegerLinear.factor`; it isn't packed."""
        return self.data


class Int4Linear(IntegerLinear):
    """A linear layer of signed numbers of 4 bits, two in a byte, the even column in the low nibble (``convrot_w4a4``).

    Activations have 4 bits as well on a CPU and on the GPUs whose Tensor cores multiply them (compute capability 8.x),
    but for layers that ask for 8; elsewhere they have 8 bits.
    """

    def __init__(
        self,
        data: Tensor,
        scale: Tensor,
        group: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        weight_only: bool = False,
        full_precision: bool = False,
        int8_activations: bool = False,
    ) -> None:
        super().__init__(data, 2 * data.shape[1], scale, group, bias, dtype, weight_only, full_precision)
        has_int4 = data.is_cuda and torch.cuda.get_device_capability(data.device)[0] == 8
        # Without a GPU ComfyUI doesn't look at what the layer asks for.
        self.int4_activations = not data.is_cuda or (has_int4 and not int8_activations)

    def whole(self, rows: slice) -> Tensor:
        """See `IntegerLinear.whole`."""
        packed = self.data[rows].view(torch.int8)
        return torch.stack((packed << 4 >> 4, packed >> 4), dim=-1).flatten(1)

    def prepared(self, x: Tensor) -> Tensor | Tokens:
        """See `PackedLinear.prepared`."""
        return x if self.int4_activations else super().prepared(x)

    def product(self, prepared: Tensor | Tokens) -> Tensor:
        """See `PackedLinear.product`; with activations of 4 bits, all in their dtype."""
        if self.weight_only or not isinstance(prepared, Tensor) or not self.int4_activations:
            return super().product(prepared)
        tokens = self.rotated(prepared.flatten(0, -2))
        scales = tokens.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 7
        quantized = (tokens / scales).round().clamp(-7, 7)
        sums = quantized @ self.factor().to(tokens.dtype).t()
        out = sums * scales * self.scale.reshape(1, -1).to(tokens.dtype)
        return torch.unflatten(out if self.bias is None else out + self.bias, 0, prepared.shape[:-1])

    def factor_by_kernel(self) -> Tensor:
        """See `IntegerLinear.factor_by_kernel`."""
        from tacod.rank.ops.packed import kernels

        return kernels.unpack_nibbles(self.data)


class W4A8Linear(IntegerLinear):
    """A linear layer of codes of 4 bits, which stand for numbers of 8 by group and level (``asym_w4a8_int8``).

    Args:
        data: Two codes in a byte, the even column in the low nibble, [out_features, in_features / 2].
        relative: The groups' scales in e4m3, [out_features, in_features / columns of a group].
        codebook: The 16 levels, fp32; None for -8 to 7.
        scale: See `IntegerLinear`.
        group: See `IntegerLinear`.
        bias: See `PackedLinear`.
        dtype: See `PackedLinear`.
        weight_only: See `IntegerLinear`.
        full_precision: See `IntegerLinear`.
    """

    relative: Tensor
    codebook: Tensor | None
    rowwise = ("scale", "relative")

    def __init__(
        self,
        data: Tensor,
        relative: Tensor,
        codebook: Tensor | None,
        scale: Tensor,
        group: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        weight_only: bool = False,
        full_precision: bool = False,
    ) -> None:
        super().__init__(data, 2 * data.shape[1], scale, group, bias, dtype, weight_only, full_precision)
        self.register_buffer("relative", relative, persistent=False)
        self.register_buffer("codebook", codebook, persistent=False)

    def whole(self, rows: slice) -> Tensor:
        """See `IntegerLinear.whole`."""
        packed = self.data[rows].view(torch.uint8)
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        if self.codebook is None:
            levels = codes.float() - 8
        else:
            levels = self.codebook.index_select(0, codes.flatten().int()).view(codes.shape)
        relative = self.relative[rows].float()
        grouped = torch.unflatten(levels, 1, (relative.shape[1], -1)) * relative[:, :, None]
        return grouped.round().clamp(-127, 127).to(torch.int8).flatten(1)

    def factor_by_kernel(self) -> Tensor | None:
        """See `IntegerLinear.factor_by_kernel`."""
        from tacod.rank.ops.packed import kernels

        if not kernels.has_float8(self.data.device):
            return None
        return kernels.unpack_codes(self.data.view(torch.uint8), self.relative, self.codebook)


def _is_kitchens(device: torch.device) -> bool:
    """Whether comfy-kitchen multiplies on this GPU, and quantizes for it."""
    from tacod.rank.ops.packed import kitchen

    capability = torch.cuda.get_device_capability(device)
    return kitchen.needed(capability) and kitchen.serves(capability)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n, W] in int8, and their scales, fp32 [n, 1]: the largest number of each is 127.

    The scale is rounded to the dtype of ``x`` before the division, and the quotient is rounded to even, as in ComfyUI.
    """
    scales = (x.abs().amax(dim=-1, keepdim=True).float() / 127).clamp(min=1e-30)
    divisors = scales.to(x.dtype)
    divisors = divisors.masked_fill(divisors == 0, torch.finfo(x.dtype).tiny)
    return (x / divisors).round().clamp(-128, 127).to(torch.int8), scales


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """X · weightᵀ of int8 [n, K] and [m, K], exactly: [n, m], in int32 on a GPU and in fp64 on a CPU."""
    if not x.is_cuda:
        # PyTorch's product of whole numbers is slow there; 53 bits hold every sum.
        return x.double() @ weight.double().t()
    # cuBLAS takes more than 16 rows, and multiples of 8.
    (n, depth), m = x.shape, len(weight)
    x = padded(x, max(-n % 8, 24 - n), -depth % 8)
    out: Tensor = torch._int_mm(x, padded(weight, -m % 8, -depth % 8).t())
    return out[:n, :m]


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with so many rows and columns of zeros more; itself, not a copy, with none."""
    return functional.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix
