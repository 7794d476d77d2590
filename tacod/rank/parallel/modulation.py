"""The modulations of all blocks: they depend only on the conditioning, so ranks can share them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tacod.rank.ops.largest import sharing
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["modulations"]


def modulations(layers: Sequence[Any], c: Tensor, sequence: SequenceParallel) -> list[Tensor]:
    """The output of each linear layer for ``c`` [B, width] or [B, M, width]: [B, 1 or M, its outputs].

    For one image, a layer multiplies a single row, so its time is that of reading its weights. Each rank computes
    consecutive layers with about as many outputs as the other ranks, and all ranks gather the results.
    """
    sizes = [layer.out_features for layer in layers]
    total = sum(sizes)
    shares = [0] * sequence.size
    outs = []
    done = 0
    # All ranks of a sequence have the same ``c``.
    with sharing(sequence.images.maximum):
        for layer, size in zip(layers, sizes, strict=True):
            # Whose share the middle of this layer's outputs falls into.
            owner = (2 * done + size) * sequence.size // (2 * total)
            shares[owner] += size
            if owner == sequence.whole.rank:
                outs.append(layer(c))
            done += size
    mine = torch.cat(outs, dim=-1) if outs else c.new_empty(*c.shape[:-1], 0)
    everyones = sequence.whole.gather(mine, shares, dim=-1)
    return list(torch.split(everyones.unsqueeze(1) if c.ndim == 2 else everyones, sizes, dim=-1))
