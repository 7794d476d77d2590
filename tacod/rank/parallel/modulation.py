"""The modulations of all blocks: they depend only on the conditioning, so ranks can share them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tacod.rank.ops.largest import sharing
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["modulations", "owners"]


def modulations(
    layers: Sequence[Any],
    c: Tensor,
    sequence: SequenceParallel,
    over: Callable[[Iterable[Any]], Iterator[Any]] = iter,
) -> list[Tensor]:
    """The output of each linear layer for ``c`` [B, width] or [B, M, width]: [B, 1 or M, its outputs].

    For one image, a layer multiplies a single row, so its time is that of reading its weights. Each rank computes
    consecutive layers with about as many outputs as the other ranks, and all ranks gather the results. ``over`` gives
    the layers one by one, each when its weights are there.
    """
    sizes = [layer.out_features for layer in layers]
    whose = owners(sizes, sequence.size)
    shares = [0] * sequence.size
    for size, owner in zip(sizes, whose, strict=True):
        shares[owner] += size
    # All ranks of a sequence have the same ``c``.
    with sharing(sequence.images.maximum):
        own = [layer for layer, owner in zip(layers, whose, strict=True) if owner == sequence.whole.rank]
        outs = [layer(c) for layer in over(own)]
    mine = torch.cat(outs, dim=-1) if outs else c.new_empty(*c.shape[:-1], 0)
    everyones = sequence.whole.gather(mine, shares, dim=-1)
    return list(torch.split(everyones.unsqueeze(1) if c.ndim == 2 else everyones, sizes, dim=-1))


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that computes each layer, for their numbers of outputs."""
    total, done, found = max(sum(sizes), 1), 0, []
    for size in sizes:
        # Whose share the middle of this layer's outputs falls into; behind all of them lies one without any.
        found.append(min((2 * done + size) * ranks // (2 * total), ranks - 1))
        done += size
    return found
