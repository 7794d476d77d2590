"""Packed weights of a file as the layers that compute with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tacod.checkpoint.header import BLOCKS, FLOAT8
from tacod.checkpoint.quantization import Quantization
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import FLOAT8_DTYPES, Float8Linear, Mxfp8Linear, Nvfp4Linear, unblocked
from tacod.rank.ops.packed.gguf import BlockLinear
from tacod.rank.ops.packed.integers import Int4Linear, Int8Linear, W4A8Linear
from tacod_client.errors import ModelCorrupt

__all__ = ["PACKED", "Layer", "has_product", "pack", "pack_plain"]

PACKED = (*FLOAT8, *BLOCKS)
"""The dtypes of weights that are kept as they are without a description, named as in headers."""


_BLOCK_PRODUCTS = (10, 0)
"""The compute capability from which on GPUs multiply blocks of floats that have scales of their own."""


def has_product(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether it is a GPU of this compute capability or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= capability


def pack_plain(data: Tensor, kind: str, rows: int, bias: nn.Parameter | None, dtype: torch.dtype) -> PackedLinear:
    """A layer whose weight has one of `PACKED`, from the weight's bytes, uint8 [n], and how many rows they are."""
    if kind in FLOAT8_DTYPES:
        return Float8Linear(data.view(FLOAT8_DTYPES[kind]).reshape(rows, -1), bias, dtype)
    return BlockLinear(data.reshape(rows, -1), kind, bias, dtype)


@dataclass(frozen=True)
class Layer:
    """A layer's packed weight as it lies in a file, and what it is to be."""

    where: str
    """File and layer, for messages."""
    quantization: Quantization
    data: Tensor
    """The weight's bytes, uint8 [n]."""
    sides: Mapping[str, Tensor]
    """What lies beside it, by its leaf: in the file's dtype, or bytes for floats of 8 bits."""
    shape: tuple[int, int]
    """Of the layer's weight, [out_features, in_features]."""
    bias: nn.Parameter | None
    """[out_features] in the compute dtype, or None."""
    dtype: torch.dtype
    """The compute dtype."""
    weight_only: bool
    """Whether activations stay as they are. Else they are quantized where ComfyUI does so: for whole numbers always,
    for floats on GPUs with a product for them (`has_product`)."""

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight, without padding."""
        return self.shape[1]

    def native(self, capability: tuple[int, int]) -> bool:
        """Whether activations of floats are quantized, where GPUs multiply them from a compute capability on."""
        quantizes = self.quantization.quantizes and not self.weight_only
        return quantizes and has_product(self.data.device, capability)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype of one byte, without the rows that are padding: [out_features, bytes of a row]."""
        rows = self.padded(self.out_features)
        return self.data.view(dtype).reshape(rows, -1)[: self.out_features].contiguous()

    def padded(self, size: int) -> int:
        """A number of rows or columns with the padding that its format has."""
        unit = self.quantization.padding
        return -(-size // unit) * unit

    def scale(self, leaf: str) -> Tensor:
        """What lies beside the weight, in fp32."""
        return self.sides[leaf].float()

    def optional(self, leaf: str) -> Tensor | None:
        """`scale`, where the file has it."""
        return self.scale(leaf) if leaf in self.sides else None

    def one(self, leaf: str) -> Tensor:
        """A `scale` of one number, without dimensions."""
        return self.scale(leaf).reshape(())

    @property
    def input_scale(self) -> Tensor | None:
        """That of the activations, without dimensions, where the file has one."""
        return self.one("input_scale") if "input_scale" in self.sides else None

    def by_row(self, leaf: str) -> Tensor:
        """One number, or one for each row."""
        found = self.scale(leaf)
        return found.reshape(()) if found.numel() == 1 else found.reshape(-1, 1)

    def blocks(self, columns: int) -> Tensor:
        """The bytes of ``weight_scale`` in the order of rows and blocks."""
        found = self.sides["weight_scale"].view(torch.uint8)
        return unblocked(found, self.padded(self.out_features), columns)[: self.out_features].contiguous()


def _float8(layer: Layer) -> PackedLinear:
    kind = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[layer.quantization.format]
    return Float8Linear(
        layer.rows(FLOAT8_DTYPES[kind]),
        layer.bias,
        layer.dtype,
        layer.by_row("weight_scale"),
        layer.input_scale,
        layer.native((8, 9)),
    )


def _mxfp8(layer: Layer) -> PackedLinear:
    powers = layer.blocks(layer.padded(layer.in_features) // 32)
    _check_finite(layer, "weight_scale", powers != 255)
    return Mxfp8Linear(
        layer.rows(torch.float8_e4m3fn),
        powers,
        layer.in_features,
        layer.bias,
        layer.dtype,
        layer.native(_BLOCK_PRODUCTS),
    )


def _nvfp4(layer: Layer) -> PackedLinear:
    blocks = layer.blocks(layer.padded(layer.in_features) // 16).view(torch.float8_e4m3fn)
    _check_finite(layer, "weight_scale", torch.isfinite(blocks.float()))
    smoothing = layer.optional("pre_quant_scale")
    if smoothing is not None and smoothing.numel() != layer.in_features:
        raise ModelCorrupt(f"{layer.where}.pre_quant_scale has {smoothing.numel()} numbers, not {layer.in_features}")
    return Nvfp4Linear(
        layer.rows(torch.uint8),
        blocks,
        layer.one("weight_scale_2"),
        layer.in_features,
        layer.bias,
        layer.dtype,
        None if smoothing is None else smoothing.flatten(),
        layer.input_scale,
        layer.native(_BLOCK_PRODUCTS),
    )


def _int8(layer: Layer) -> PackedLinear:
    rotation = layer.quantization.rotation
    scale, data = layer.by_row("weight_scale"), layer.rows(torch.int8)
    return Int8Linear(
        data,
        layer.in_features,
        scale,
        rotation,
        layer.bias,
        layer.dtype,
        layer.weight_only,
        layer.quantization.full_precision,
    )


def _int4(layer: Layer) -> PackedLinear:
    return Int4Linear(
        layer.rows(torch.int8),
        layer.by_row("weight_scale"),
        layer.quantization.rotation,
        layer.bias,
        layer.dtype,
        layer.weight_only,
        layer.quantization.full_precision,
        layer.quantization.int8_activations,
    )


def _w4a8(layer: Layer) -> PackedLinear:
    relative = layer.sides["weight_s_rel"].view(torch.float8_e4m3fn).reshape(layer.out_features, -1)
    _check_finite(layer, "weight_s_rel", torch.isfinite(relative.float()))
    codebook = layer.optional("weight_codebook")
    return W4A8Linear(
        layer.rows(torch.int8),
        relative,
        None if codebook is None else codebook.flatten(),
        layer.by_row("weight_s_channel"),
        layer.quantization.rotation,
        layer.bias,
        layer.dtype,
        layer.weight_only,
        layer.quantization.full_precision,
    )


_BUILDERS: dict[str, Callable[[Layer], PackedLinear]] = {
    "float8_e4m3fn": _float8,
    "float8_e5m2": _float8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "int8_tensorwise": _int8,
    "convrot_w4a4": _int4,
    "asym_w4a8_int8": _w4a8,
}


def pack(layer: Layer) -> PackedLinear:
    """The layer that computes with a packed weight.

    Raises `ModelCorrupt` for scales that aren't finite or that don't go with the layer's shape.
    """
    for leaf, found in layer.sides.items():
        if found.dtype.itemsize > 1:
            _check_finite(layer, leaf, torch.isfinite(found))
    return _BUILDERS[layer.quantization.format](layer)


def _check_finite(layer: Layer, leaf: str, finite: Tensor) -> None:
    if not finite.all():
        raise ModelCorrupt(f"{layer.where}.{leaf} holds numbers that aren't finite; download the file again")
