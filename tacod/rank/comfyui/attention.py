"""ComfyUI's attention over tokens that ranks share: exchanged whole, or over near tokens alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tacod.rank.comfyui.tokens import Misfit, Run, Tokens
from tacod.rank.ops.qkv import QKV
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["attend", "attend_near"]


def attend(
    shared: Tokens,
    runs: Sequence[Run],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> Tensor:
    """The attention of this rank's tokens of these runs over those of all ranks, called as ComfyUI's own is.

    Raises `Misfit` for what can't be exchanged, before anything is.
    """
    if skip_reshape:
        q, k, v = (each.transpose(1, 2).flatten(2) for each in (q, k, v))
    width = q.shape[-1] // heads
    mine = shared.mine(runs)
    if not q.shape[1] == k.shape[1] == v.shape[1] == mine:
        raise Misfit(f"an attention of {q.shape[1]} tokens over {k.shape[1]}, where {mine} were expected")
    scale = options.get("scale")
    if k.shape[-1] % width or k.shape != v.shape or (scale is not None and not math.isclose(scale, width**-0.5)):
        raise Misfit("an attention with heads or a scale that aren't usual")
    lengths = tuple(run.size for run in runs for _ in range(run.frames))
    ordered = None if mask is None else _mask(shared.sequence, mask, lengths)
    qkv = QKV((q.contiguous(), k.contiguous(), v.contiguous()), heads, kv_heads=k.shape[-1] // width)
    out = shared.sequence.attend([lambda: qkv], [lengths], ordered).wait().clone()
    return torch.unflatten(out, -1, (heads, width)).transpose(1, 2) if skip_output_reshape else out


def attend_near(
    shared: Tokens, theirs: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, window: int, dim: int
) -> Tensor:
    """ComfyUI's own attention, ``theirs``, of this rank's tokens over those within a window, which lie along ``dim``.

    Ranks gather keys and values. Raises `Misfit` if there are tokens of several kinds.
    """
    (run,) = shared.runs.values()
    if run.frames > 1 or not q.shape[dim] == k.shape[dim] == v.shape[dim] == shared.mine([run]):
        raise Misfit(f"an attention of {q.shape[dim]} tokens over {k.shape[dim]} near ones")
    begin, end = shared.sequence.place(run.size)
    first, last = max(begin - window, 0), min(end + window, run.size)
    near = [shared.join(each, dim, run).narrow(dim, first, last - first) for each in (k, v)]
    places = torch.arange(first, last, device=q.device)
    apart = (torch.arange(begin, end, device=q.device)[:, None] - places).abs()
    mask = torch.zeros(apart.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill_(apart > window, torch.finfo(q.dtype).min)[None, None]
    return theirs(q, *near, heads, mask=mask)


def _mask(sequence: SequenceParallel, mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """A mask over all tokens, with those of keys in the order of ranks."""
    total = sum(lengths)
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    if mask.ndim == 3 and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    counts = [sum(each) for each in zip(*map(sequence.sizes, lengths), strict=True)]
    if mask.ndim == 2 and mask.shape[1] == counts[sequence.whole.rank] != total:
        # A mask that goes along, so each rank has that of its own keys.
        return sequence.whole.gather(mask.contiguous(), counts, 1)[:, None, None]
    if mask.shape[-1] != total or mask.ndim > 3 or (mask.ndim == 3 and mask.shape[1] != total):
        raise Misfit(f"a mask of shape {list(mask.shape)} over {total} tokens")
    return sequence.in_order_of_ranks(mask, lengths)
