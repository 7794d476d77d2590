"""Linear layers whose weights stay packed, as their file has them, until they are used."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from tacod.rank.ops.fused import has_kernels

__all__ = ["PackedLinear"]

_BAND = 1 << 24
"""How many numbers are unpacked or rounded at once: it bounds what lies beside the result."""


class PackedLinear(nn.Module, abc.ABC):
    """`nn.Linear` over a packed weight; everything else about it, its bias too, is in the compute dtype.

    Here activations stay as they are and the weight is dequantized for each use. Subclasses may do otherwise.

    Args:
        data: The weight's bytes, uint8 or int8 [out_features, bytes of a row].
        in_features: The numbers of a row.
        bias: [out_features] in the compute dtype, or None.
        dtype: The compute dtype.
    """

    data: Tensor
    bias: nn.Parameter | None
    rowwise: ClassVar[tuple[str, ...]] = ()
    """Those buffers, beside ``data``, that have a row for each output where they have more than one number."""

    def __init__(self, data: Tensor, in_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dtype = len(data), in_features, dtype
        self.register_buffer("data", data, persistent=False)
        self.register_parameter("bias", bias)

    @property
    def quantizes(self) -> bool:
        """Whether it does anything to activations, such as quantizing each token by all of its numbers."""
        return False

    @property
    def plain(self) -> bool:
        """Whether it is the product with its `weight`, which may be used in parts."""
        return self._low_rank is None and not self.quantizes

    @abc.abstractmethod
    def numbers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of the packed weight, [rows, in_features] in ``dtype``."""

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x`` [..., in_features] in the compute dtype, [..., out_features]."""
        return self.outputs_of(x, self.prepared(x))

    def outputs_of(self, x: Tensor, prepared: Any) -> Tensor:
        """`forward`, for those who have what `prepared` gives of ``x`` already."""
        out = self.product(prepared)
        if self._low_rank is None:
            return out
        up, down = self._low_rank
        out.view(-1, self.out_features).addmm_(functional.linear(x, down).flatten(0, -2), up.t())
        return out

    def prepared(self, x: Tensor) -> Any:
        """What `product` takes in the place of ``x``: the same for every part of the `outputs`."""
        return x

    def product(self, prepared: Any) -> Tensor:
        """`forward` without what `adapted` adds."""
        return functional.linear(prepared, self._unpacked(self.dtype), self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight in the compute dtype, [out_features, in_features], made anew each time."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers, [out_features, in_features], rounded to ``dtype``; with what `adapted` adds."""
        weight = self._effective(dtype)
        if self._low_rank is None:
            return weight
        up, down = self._low_rank
        return torch.addmm(weight, up.to(dtype), down.to(dtype))

    def _effective(self, dtype: torch.dtype) -> Tensor:
        """What `product` comes to multiply ``x`` by."""
        return self._unpacked(dtype)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        fast = self.unpacked_by_kernel(dtype) if has_kernels(self.data) else None
        return self._in_bands(lambda rows: self.numbers(rows, dtype), dtype) if fast is None else fast

    def unpacked_by_kernel(self, dtype: torch.dtype) -> Tensor | None:
        """`numbers` of all rows on a GPU in one pass, or None where no kernel has it."""
        return None

    def _in_bands(self, unpack: Callable[[slice], Tensor], dtype: torch.dtype) -> Tensor:
        """All rows of what ``unpack`` gives of some, [out_features, in_features], with bounded memory beside them."""
        return in_bands(unpack, (self.out_features, self.in_features), dtype, self.data.device)

    def outputs(self, rows: slice) -> Self:
        """Some of its outputs, on the same memory."""
        part = self._twin()
        for name in {"data", "up", *self.rowwise} & self._buffers.keys():
            part._buffers[name] = sliced(self._buffers[name], rows)
        bias = None if self.bias is None else nn.Parameter(self.bias[rows], requires_grad=False)
        part._parameters = {"bias": bias}
        part.out_features = len(part.data)
        return part

    def adapted(self, up: Tensor, down: Tensor) -> Self:
        """The same layer plus a product of low rank (Hu et al., 2021, arXiv:2106.09685), on the same memory.

        ``up`` is [out_features, r] and ``down`` [r, in_features], of any dtype: they are cast to the compute dtype.
        """
        twin = self._twin()
        for name, factor in (("up", up), ("down", down)):
            twin.register_buffer(name, factor.to(self.data.device, self.dtype), persistent=False)
        return twin

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """The same layer with another compute dtype, on the same memory but for bias and product of low rank."""
        twin = self._twin()
        twin.dtype = dtype
        for name in {"up", "down"} & twin._buffers.keys():
            twin.register_buffer(name, getattr(self, name).to(dtype), persistent=False)
        bias = None if self.bias is None else nn.Parameter(self.bias.to(dtype), requires_grad=False)
        twin._parameters = {"bias": bias}
        return twin

    @property
    def _low_rank(self) -> tuple[Tensor, Tensor] | None:
        up, down = self._buffers.get("up"), self._buffers.get("down")
        return None if up is None or down is None else (up, down)

    def _twin(self) -> Self:
        twin = copy.copy(self)
        twin._buffers, twin._parameters = dict(self._buffers), dict(self._parameters)
        twin._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A model's state has the weight's name and shape; its numbers are nowhere, so they are on no device."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        shape = (self.out_features, self.in_features)
        destination[f"{prefix}weight"] = torch.empty(shape, dtype=self.dtype, device="meta")

    def extra_repr(self) -> str:
        """What printing shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"


def in_bands(
    make: Callable[[slice], Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """All rows of what ``make`` gives of some, of a ``shape``, with bounded memory beside them."""
    rows, columns = shape
    step = max(_BAND // columns, 1)
    if rows <= step:
        return make(slice(None))
    whole = torch.empty(shape, dtype=dtype, device=device)
    for row in range(0, rows, step):
        whole[row : row + step] = make(slice(row, row + step))
    return whole


def sliced(scale: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of a scale that has one for each; one scale for all as it is."""
    return scale if scale is None or scale.numel() == 1 else scale[rows]
