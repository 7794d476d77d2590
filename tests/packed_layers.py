"""Packed layers to test: ComfyUI's golden files of them, and random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.checkpoint.header import BLOCKS
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import Float8Linear, Mxfp8Linear, Nvfp4Linear
from tacod.rank.ops.packed.gguf import BlockLinear, dequantize_blocks
from tacod.rank.ops.packed.integers import Int4Linear, Int8Linear, W4A8Linear
from tacod.rank.weights.packing import Layer, pack

GOLDEN = Path(__file__).parent / "data" / "golden" / "quantised"
FILES = sorted(path.stem.removeprefix("quant_") for path in GOLDEN.glob("quant_*.safetensors"))


class Golden:
    """A file of packed layers, and what ComfyUI's own layers made of them."""

    def __init__(self, name: str) -> None:
        self.path = GOLDEN / f"quant_{name}.safetensors"
        self.checkpoint: Checkpoint = read_checkpoint(str(self.path))
        with safe_open(self.path, framework="pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()

    @property
    def packed(self) -> list[str]:
        layers: list[str] = json.loads(self.metadata["golden.quantised"])
        return layers

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"golden.{name}"]

    def layer(self, name: str, dtype: torch.dtype, weight_only: bool = False) -> Any:
        """The layer that computes with what the file has."""
        bias = self.tensors.get(f"{name}.bias")
        parameter = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        weight = f"{name}.weight"
        shape = (self[f"{name}.y_fp32"].shape[-1], self[f"{name}.x"].shape[-1])
        if weight not in self.checkpoint.quantization:
            plain = nn.Linear(shape[1], shape[0], bias=bias is not None, dtype=dtype)
            plain.weight, plain.bias = nn.Parameter(self.tensors[weight].to(dtype), requires_grad=False), parameter
            return plain
        quantization = self.checkpoint.quantization[weight]
        sides = {leaf: self._side(name, leaf) for leaf in quantization.sides}
        data = self.tensors[weight].reshape(-1).view(torch.uint8)
        return pack(Layer(name, quantization, data, sides, shape, parameter, dtype, weight_only))

    def _side(self, name: str, leaf: str) -> Tensor:
        old = {"weight_scale": "scale_weight", "input_scale": "scale_input"}
        found = self.tensors.get(f"{name}.{leaf}")
        return found if found is not None else self.tensors[f"{name}.{old[leaf]}"]


def float8(*shape: int) -> Tensor:
    """Random numbers in e4m3."""
    return torch.randn(shape).to(torch.float8_e4m3fn)


def bytes_of(*shape: int) -> Tensor:
    """Random bytes."""
    return torch.randint(256, shape, dtype=torch.uint8)


def blocks_of(kind: str, rows: int, count: int) -> Tensor:
    """Rows of ``count`` random blocks of a kind of GGUF, whose numbers are finite: uint8 [rows, bytes]."""
    data = bytes_of(rows * count, BLOCKS[kind][1])
    while (odd := ~dequantize_blocks(data, kind).isfinite().all(1)).any():
        data[odd] = bytes_of(int(odd.sum()), data.shape[1])
    return data.view(rows, -1)


def layers(dtype: torch.dtype) -> dict[str, PackedLinear]:
    """One of each format and kind of scale."""
    one, by_row = torch.rand(()), torch.rand(7, 1)
    codes, book = float8(7, 8), torch.randn(16)
    powers = torch.randint(90, 150, (7, 3), dtype=torch.uint8)
    powers[0] = torch.tensor([0, 1, 2])
    return {
        "e4m3": Float8Linear(float8(7, 80), None, dtype, one),
        "e4m3, by row": Float8Linear(float8(7, 80), None, dtype, by_row),
        "e5m2": Float8Linear(float8(7, 80).to(torch.float8_e5m2), None, dtype),
        "mxfp8": Mxfp8Linear(float8(7, 96), powers, 80, None, dtype),
        "nvfp4": Nvfp4Linear(bytes_of(7, 48), float8(7, 6), one, 90, None, dtype),
        "nvfp4, two tiles": Nvfp4Linear(bytes_of(3, 1024), float8(3, 128), one, 2048, None, dtype),
        "int8": Int8Linear(bytes_of(7, 80).view(torch.int8), 80, one, 0, None, dtype),
        "int8, by row": Int8Linear(bytes_of(7, 80).view(torch.int8), 80, by_row, 0, None, dtype),
        "int8, rotated": Int8Linear(bytes_of(7, 768).view(torch.int8), 768, by_row, 256, None, dtype),
        "int4": Int4Linear(bytes_of(7, 32).view(torch.int8), by_row, 16, None, dtype),
        "W4A8": W4A8Linear(bytes_of(7, 64), codes, book, by_row, 64, None, dtype),
        "W4A8, without a codebook": W4A8Linear(bytes_of(7, 64), codes, None, by_row, 64, None, dtype),
        # More blocks than a program takes, and no multiple of them.
        **{kind: BlockLinear(blocks_of(kind, 7, 19), kind, None, dtype) for kind in BLOCKS},
    }
