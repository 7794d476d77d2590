"""How much of a device's memory a model's weights will take, block by block, from its file's header."""

from __future__ import annotations

import math

import torch

from tacod.checkpoint import Checkpoint
from tacod.checkpoint.quantization import SCALED, beside
from tacod.rank.families.base import DiT
from tacod.rank.weights.fp8 import multiplied_in_fp8
from tacod.rank.weights.packing import PACKED
from tacod.rank.weights.placement import Sizes

__all__ = ["SMALLEST", "sizes_of"]

SMALLEST = 1 << 14
"""Smaller tensors, in bytes, stay whole on each rank."""


def sizes_of(
    model: DiT, checkpoint: Checkpoint, dtype: torch.dtype, fp8: bool = False, smallest: int = SMALLEST
) -> Sizes:
    """The sizes of a model without weights, which a checkpoint of its names will fill in a compute dtype.

    About, for formats that are unpacked. Tensors of fewer bytes than ``smallest`` count as others.
    """
    layers = model.modulating
    names = {id(module): path for path, module in model.named_modules()}
    modulations, blocks = [names[id(layer)] for layer in layers], model.blocks_at
    sizes, others = dict.fromkeys((*modulations, *blocks), 0), 0
    for name, size in _sizes(model, checkpoint, dtype, fp8).items():
        path = name
        # A modulation within a block comes first.
        while path and path not in sizes:
            path = path.rpartition(".")[0]
        if path and size >= smallest:
            sizes[path] += size
        else:
            others += size
    return Sizes({path: sizes[path] for path in blocks}, {path: sizes[path] for path in modulations}, others)


def _sizes(model: DiT, checkpoint: Checkpoint, dtype: torch.dtype, fp8: bool) -> dict[str, int]:
    """The bytes that each tensor will take, with what lies beside it."""
    multiplied = {f"{path}.weight" for path, _ in multiplied_in_fp8(model, model.blocks_at)} if fp8 else set()
    found = {}
    for name, tensor in model.state_dict().items():
        info, quantization = checkpoint.tensors.get(name), checkpoint.quantization.get(name)
        unpacked = info is None or (info.dtype not in PACKED if quantization is None else quantization.format == SCALED)
        if name in multiplied:
            found[name] = math.prod(tensor.shape) + 4 * len(tensor)
        elif unpacked:
            found[name] = math.prod(tensor.shape) * model.dtype_of(name, dtype).itemsize
        else:
            lying = [name, *([beside(name, leaf) for leaf in quantization.sides] if quantization is not None else ())]
            found[name] = sum(part.stop - part.start for each in lying for part in checkpoint.parts[each])
    return found
