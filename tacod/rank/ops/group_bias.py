"""Attention whose scores have a bias between two groups of tokens, without a mask of all pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tacod.rank.ops.sdpa import Part, attend_part, merge

__all__ = ["GroupBias", "attend_biased"]


@dataclass(frozen=True)
class GroupBias:
    """A bias of the scores between the first tokens of a sequence and the last ones, its guides; none within a group.

    A guide's bias is added where another token attends to it, and where it attends to another token.
    """

    start: int
    """How many tokens come before the guides."""
    values: Tensor
    """The bias of each guide, fp32 [G]; -inf hides the two from each other."""
    runs: Sequence[tuple[int, float | None]]
    """The guides in runs: how many, and the bias that all of them have, or None if they differ. It says nothing else
    than ``values``, but on the host: guides of one bias need no mask."""


def attend_biased(q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int, bias: GroupBias) -> Part:
    """Attention of some queries over some keys, [B, H, S, D] and [B, H, T, D], which begin at these places.

    Each group of queries attends to each group of keys, and the parts are merged. A bias that is the same for all keys
    of a part is added to the part's log-sum-exp, so only guides of unlike biases need a mask, which is as long as they
    are: the largest tensor beside the result is the result of a part.
    """
    own = min(max(bias.start - q_start, 0), q.shape[2])
    others = min(max(bias.start - k_start, 0), k.shape[2])
    k_guides, v_guides = k[:, :, others:], v[:, :, others:]
    k, v = k[:, :, :others], v[:, :, :others]
    at = k_start + others - bias.start
    parts = []
    if own:
        part = attend_part(q[:, :, :own], k, v)
        for first, last, value in _runs(bias, at, k_guides.shape[2]):
            guides = k_guides[:, :, first:last], v_guides[:, :, first:last]
            if value is None:
                mask = bias.values[at + first : at + last].to(q.dtype)[None, None, None]
                part = merge(part, attend_part(q[:, :, :own], *guides, mask))
            elif value > -math.inf:
                part = merge(part, _shifted(attend_part(q[:, :, :own], *guides), value))
        parts.append(part)
    if own < q.shape[2]:
        first = q_start + own - bias.start
        values = bias.values[first : first + q.shape[2] - own]
        part = attend_part(q[:, :, own:], k_guides, v_guides)
        parts.append(merge(part, _shifted(attend_part(q[:, :, own:], k, v), values)))
    if not parts:
        return attend_part(q, k, v)
    out, seen = zip(*parts, strict=True)
    return torch.cat(out, dim=2), torch.cat(seen, dim=2)


def _shifted(part: Part, by: float | Tensor) -> Part:
    """A part all of whose scores have this much more, a number or one for each query."""
    out, seen = part
    return out, seen + by


def _runs(bias: GroupBias, begin: int, count: int) -> Iterator[tuple[int, int, float | None]]:
    """The runs among ``count`` guides from the guide ``begin`` on: where in them each begins and ends, and its bias."""
    at = -begin
    for length, value in bias.runs:
        first, last = max(at, 0), min(at + length, count)
        if first < last:
            yield first, last, value
        at += length
