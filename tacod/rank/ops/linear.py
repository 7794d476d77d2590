"""Linear layers in two parts of their outputs or inputs, and together with what follows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.ops.fused import has_kernels
from tacod.rank.ops.packed.base import PackedLinear

__all__ = ["linear_add", "linear_fp32", "linear_gelu", "split_inputs", "split_outputs"]

Layer = Callable[[Tensor], Tensor]
"""From [B, S, inputs] to [B, S, outputs]."""


@dataclass(frozen=True)
class Part:
    """A linear layer over a view of another one's weight, [outputs, inputs]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Outputs:
    """Some outputs of a packed layer, whose tokens may be quantized for others too."""

    layer: PackedLinear
    prepare: Callable[[Tensor], Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer.outputs_of(x, self.prepare(x))


def _is_whole(layer: Any) -> bool:
    """Whether a layer does more than multiply by its weight."""
    return isinstance(layer, Outputs) or (isinstance(layer, PackedLinear) and not layer.plain)


def split_outputs(layer: Any, *sizes: int) -> tuple[Layer, ...]:
    """A layer as several: its first outputs, of each of these ``sizes``, and the others.

    Tokens that several get are quantized once.
    """
    ends = list(itertools.accumulate(sizes))
    parts = [slice(*each) for each in itertools.pairwise([0, *ends, None])]
    if _is_whole(layer):
        prepare = _once(layer.prepared)
        return tuple(Outputs(layer.outputs(part), prepare) for part in parts)
    weight, bias = layer.weight, layer.bias
    return tuple(Part(weight[part], None if bias is None else bias[part]) for part in parts)


def _once(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same function, which remembers what it gave of the last tensor."""
    last: list[Any] = []

    def remembering(x: Tensor) -> Any:
        if not last or last[0] is not x:
            last[:] = x, function(x)
        return last[1]

    return remembering


def split_inputs(layer: Any, first: int) -> tuple[Layer, Callable[[Tensor, Tensor], Tensor]]:
    """A layer in two steps: one for all but its ``first`` inputs, and one for these, which gets what the other gave."""
    if _is_whole(layer):
        # A token has one scale for all of its numbers.
        return (lambda later: later), lambda x, later: layer(torch.cat((x, later), dim=-1))
    weight = layer.weight
    head = Part(weight[:, :first], None)
    return Part(weight[:, first:], layer.bias), lambda x, later: linear_add(head, x, later)


def linear_add(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    """A linear layer of ``x`` plus ``out``, which it may overwrite; a plain layer without bias rounds once."""
    if _is_whole(layer) or layer.bias is not None:
        added: Tensor = layer(x) + out
        return added
    out.view(-1, out.shape[-1]).addmm_(x.flatten(0, -2), layer.weight.t())
    return out


def linear_fp32(layer: Any, x: Tensor) -> Tensor:
    """A linear layer in fp32, of ``x`` in fp32, whatever the dtype of its weight."""
    if isinstance(layer, PackedLinear):
        out: Tensor = layer.in_dtype(torch.float32)(x)
        return out
    return functional.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def linear_gelu(layer: Any, x: Tensor) -> Tensor:
    """GELU (Hendrycks and Gimpel, 2016, arXiv:1606.08415; its tanh form) of a linear layer.

    On a GPU it is computed where the matrix product ends, before anything is rounded.
    """
    if has_kernels(x) and not _is_whole(layer):
        return _fused_gelu(layer.weight, layer.bias, x)
    hidden: Tensor = layer(x)
    return functional.gelu(hidden, approximate="tanh")


def _fused_gelu(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """GELU of a linear layer in one operation, which adds a bias in any case."""
    added = weight.new_zeros(len(weight)) if bias is None else bias
    out: Tensor = torch._addmm_activation(added, x.flatten(0, -2), weight.t(), use_gelu=True)
    return torch.unflatten(out, 0, x.shape[:-1])
