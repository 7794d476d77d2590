"""Attention on one device: whole, or in parts that merge."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.ops.split_kv import merge_shares, split_tail

__all__ = ["attend", "attend_part", "attend_pieces", "merge"]

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys: its output in fp32 [B, H, S, D], and the log-sum-exp of its scores [B, H, S]."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention on [B, H, S, D].

    ``mask`` [B or 1, 1, S or 1, S] is added to the scores, or if it is bool says which keys are attended to.
    """
    if not q.numel():
        return torch.empty_like(q)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_pieces(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, split_kv: bool = False
) -> Iterator[Tensor]:
    """`attend` as one result, or as two for consecutive tokens: [B, H, S', D] each.

    With ``split_kv`` the second result is that of `split_kv` for the last, partial wave; what is done with the first
    result overlaps it.
    """
    tail = split_tail(q, k, v) if split_kv and mask is None else None
    rows = q.shape[2] if tail is None else tail[0]
    if rows or tail is None:
        yield attend(q[:, :, :rows], k, v, mask)
    if tail is not None:
        yield merge_shares(*tail[1])


def attend_part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Part:
    """Attention of ``q`` [B, H, S, D] over some of its keys ``k``, ``v`` [B, H, T, D]; T may be 0.

    ``mask`` [B or 1, 1, S or 1, T] is as in `attend`; it may hide all of these keys from a query or an image.
    """
    if not q.numel() or not k.numel():
        shape = q.shape[:-1]
        return q.new_zeros(q.shape, dtype=torch.float32), q.new_full(shape, -math.inf, dtype=torch.float32)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    scale = q.shape[-1] ** -0.5
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
        return _hide(out.float(), lse, mask)
    width, length = q.shape[-1], k.shape[2]
    # The kernels want widths of multiples of 8, and rows of a mask of 16; zeros change neither scores nor outputs.
    q, k, v = (functional.pad(t, (0, -width % 8)) for t in (q, k, v))
    if q.dtype == torch.float32 or mask is not None:
        bias = None
        if mask is not None:
            bias = functional.pad(mask, (0, -length % 16))[..., :length].expand(*q.shape[:-1], length)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return _hide(out[..., :width].float(), lse[..., : q.shape[2]], mask)


def _hide(out: Tensor, lse: Tensor, mask: Tensor | None) -> Part:
    """What a kernel makes of queries whose keys are all masked differs: here they see none of this part."""
    if mask is None:
        return out, lse
    blind = (mask == -math.inf).all(dim=-1)
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -math.inf)


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both, in fp32 (online softmax: Milakov and Gimelshein, 2018, arXiv:1805.02867)."""
    (out, lse), (other_out, other_lse) = one, other
    both = torch.logaddexp(lse, other_lse)
    # Where neither part had a key the weights would be inf - inf.
    base = torch.where(both == -math.inf, 0.0, both)
    weights = ((part - base).exp().unsqueeze(-1) for part in (lse, other_lse))
    return out * next(weights) + other_out * next(weights), both
