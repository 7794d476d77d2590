"""ComfyUI's attention over tokens that ranks share: exchanged whole, or over near tokens alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tacod.rank.comfyui.tokens import Misfit, Run, Tokens
from tacod.rank.forward.side_effects import ours
from tacod.rank.ops.qkv import QKV

__all__ = ["attend", "attend_causally", "attend_near"]


_NOTHING_TO_DO = ("transformer_options", "low_precision_attention", "_inside_attn_wrapper")
"""Options that don't change what exact attention gives: a call's own, leave to be inexact, and a mark of ComfyUI's."""


def attend(
    shared: Tokens,
    runs: Sequence[Run],
    own_keys: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    enable_gqa: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """The attention of this rank's tokens of these runs over those of all ranks, called as ComfyUI's own is.

    Queries, keys and values are [B, S, H * D], or [B, H, S, D] with ``skip_reshape``; with ``enable_gqa`` there may be
    fewer heads of keys and values. The result is [B, S, H * D], or [B, H, S, D] with ``skip_output_reshape``.
    ``mask`` is added to the scores, or says as bool who attends to whom: [S or 1, S], [B or 1, S or 1, S] or
    [B or 1, 1, S or 1, S], over all tokens, or, with ``own_keys``, for all of them over a rank's own keys.
    ``attn_precision`` may ask for fp32. Raises `Misfit` for what can't be exchanged, before anything is.
    """
    q, k, v, kv_heads = _by_tokens(shared, runs, q, k, v, heads, skip_reshape, enable_gqa, options)
    width, dtype = q.shape[-1] // heads, v.dtype
    if attn_precision is not None:
        q, k, v = (each.to(torch.promote_types(each.dtype, attn_precision)) for each in (q, k, v))
    if scale is not None and not math.isclose(scale, width**-0.5):
        # Kernels divide by the root of the width.
        q = q * (scale * width**0.5)
    lengths = tuple(run.size for run in runs for _ in range(run.frames))
    ordered = None if mask is None else _mask(shared, mask, lengths, own_keys)
    qkv = QKV((q.contiguous(), k.contiguous(), v.contiguous()), heads, kv_heads=kv_heads)
    shared.meet()
    with ours(q, k, v, *([] if ordered is None else [ordered])):
        out = shared.sequence.attend([lambda: qkv], [lengths], ordered).wait().to(dtype, copy=True)
    return torch.unflatten(out, -1, (heads, width)).transpose(1, 2) if skip_output_reshape else out


def attend_causally(
    shared: Tokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    """The attention of this rank's tokens of two runs, [B, S, H * D]: in the first causal, in the other over both.

    Raises `Misfit` as `attend` does.
    """
    runs = list(shared.runs.values())
    if mask is not None or len(runs) != 2 or any(run.frames > 1 for run in runs):
        raise Misfit("a causal attention with a mask, or not of two runs")
    q, k, v, kv_heads = _by_tokens(shared, runs, q, k, v, heads, skip_reshape, enable_gqa, options)
    first, rest = runs
    causal = torch.ones(1, first.size, first.size, dtype=torch.bool, device=q.device).tril()
    ordered = shared.sequence.in_order_of_ranks(causal, (first.size,))
    sizes = [shared.mine([run]) for run in runs]
    parts = zip(*(torch.split(each, sizes, dim=1) for each in (q, k, v)), strict=True)
    one, other = (QKV(tuple(each.contiguous() for each in part), heads, kv_heads=kv_heads) for part in parts)
    shared.meet()
    with ours(q, k, v, ordered):
        leading = shared.sequence.attend([lambda: one], [first.size], ordered, keep=True)
        outs = [leading.wait().clone()]
        shared.meet()
        outs.append(shared.sequence.attend([lambda: other], [rest.size], before=leading.kept).wait())
        return torch.cat(outs, dim=1)


def _by_tokens(
    shared: Tokens,
    runs: Sequence[Run],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    by_heads: bool,
    grouped: bool,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Queries, keys and values of this rank's tokens, [B, S, H * D], and the heads of keys."""
    unknown = [name for name, value in options.items() if name not in _NOTHING_TO_DO and value is not None]
    if unknown:
        raise Misfit(f"an attention with {', '.join(unknown)}, which isn't known here")
    if not all(isinstance(each, Tensor) for each in (q, k, v)):
        raise Misfit(f"an attention of a {type(q).__name__}")
    if by_heads:
        q, k, v = (each.transpose(1, 2).flatten(2) for each in (q, k, v))
    width, mine = q.shape[-1] // heads, shared.mine(runs)
    if not q.shape[1] == k.shape[1] == v.shape[1] == mine:
        raise Misfit(f"an attention of {q.shape[1]} tokens over {k.shape[1]}, where {mine} were expected")
    kv_heads, rest = divmod(k.shape[-1], width)
    if rest or not kv_heads or k.shape != v.shape or heads % kv_heads or (kv_heads != heads and not grouped):
        raise Misfit(f"an attention of {heads} heads of {width}, with {k.shape[-1]} channels of keys")
    return q, k, v, kv_heads


def attend_near(
    shared: Tokens, theirs: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, window: int, dim: int
) -> Tensor:
    """ComfyUI's own attention, ``theirs``, of this rank's tokens over those within a window, which lie along ``dim``.

    Ranks gather keys and values. Raises `Misfit` if there are tokens of several kinds.
    """
    run, *others = shared.runs.values()
    if others or run.frames > 1 or not q.shape[dim] == k.shape[dim] == v.shape[dim] == shared.mine([run]):
        raise Misfit(f"an attention of {q.shape[dim]} tokens over {k.shape[dim]} near ones")
    begin, end = shared.sequence.place(run.size)
    first, last = max(begin - window, 0), min(end + window, run.size)
    near = [shared.join(each, dim, run).narrow(dim, first, last - first) for each in (k, v)]
    places = torch.arange(first, last, device=q.device)
    apart = (torch.arange(begin, end, device=q.device)[:, None] - places).abs()
    mask = torch.zeros(apart.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill_(apart > window, torch.finfo(q.dtype).min)[None, None]
    return theirs(q, *near, heads, mask=mask)


def _mask(shared: Tokens, mask: Tensor, lengths: Sequence[int], own_keys: bool) -> Tensor:
    """A mask over all tokens, with those of keys in the order of ranks: [B or 1, 1, S or 1, S].

    By its length alone a rank can't know a mask of its ``own_keys``: one that is too short for all ranks may be as long
    as the keys of one of them, and that one would exchange it without the others.
    """
    sequence, total, shape = shared.sequence, sum(lengths), list(mask.shape)
    if mask.ndim == 4 and (mask.shape[1] == 1 or mask.stride(1) == 0):
        mask = mask[:, 0]
    elif mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise Misfit(f"a mask of shape {shape}, of each head")
    rows, keys = mask.shape[1:]
    counts = [sum(each) for each in zip(*map(sequence.sizes, lengths), strict=True)]
    if own_keys and rows == 1 and keys == counts[sequence.whole.rank] != total:
        # A mask that goes along, so each rank has that of its own keys.
        shared.meet()
        return sequence.whole.gather(mask.contiguous(), counts, 2)[:, None]
    if keys != total or rows not in (1, total):
        raise Misfit(f"a mask of shape {shape} over {total} tokens")
    return sequence.in_order_of_ranks(mask[:, 0] if rows == 1 else mask, lengths)
