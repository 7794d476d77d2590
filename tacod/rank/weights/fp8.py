"""Models whose blocks' matrices are multiplied in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.fp8 import Fp8Linear

__all__ = ["multiplied_in_fp8", "quantize_block", "quantize_blocks"]


def quantize_blocks(model: DiT) -> None:
    """`quantize_block` of all blocks."""
    for path in model.blocks_at:
        quantize_block(model, path)


def quantize_block(model: DiT, path: str) -> None:
    """Multiply a block's matrices in 8 bits, except for modulations, which see one token per image."""
    for name, layer in multiplied_in_fp8(model, [path]):
        model.set_submodule(name, Fp8Linear.of(layer))


def multiplied_in_fp8(model: DiT, blocks: Iterable[str]) -> list[tuple[str, Any]]:
    """The layers of these blocks that `quantize_block` changes, with their paths."""
    spared = {id(layer) for modulating in model.modulating for layer in modulating.modules()}
    return [
        (name, layer)
        for block in blocks
        for name, layer in model.get_submodule(block).named_modules(prefix=block)
        # The hardware's products take sixteen numbers at once.
        if isinstance(layer, nn.Linear | PackedLinear)
        and id(layer) not in spared
        and layer.in_features % 16 == layer.out_features % 16 == 0
    ]
