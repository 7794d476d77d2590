"""Avoid wave quantisation: split the keys for the queries of the last, partial wave.

On Hopper a multiprocessor computes a tile of 128 queries of one head, and each tile takes the same time: 12 heads of
4608 tokens are 432 tiles, which on 132 multiprocessors are 3.27 waves and take the time of 4. Here only as many queries
as fill whole waves are computed that way. For the others the multiprocessors share the keys, as in Flash-Decoding (Dao
et al., 2023), and their results are merged. `sdpa.attend_pieces` calls it.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Shares", "merge_shares", "split_tail", "whole_waves"]

log = logging.getLogger(__name__)

Shares = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values as a batch, each entry with its share of one image's keys: [parts, H, S, D]."""

_TILE = 128
"""Queries that a multiprocessor takes at a time."""
_OWN_COST = 1500
"""The cost of the second kernel and of merging, in keys that a tile goes through in that time.

On an H100 12 us, which are 950 keys of width 128 and 1400 of 64 (docs/performance.md).
"""
_HOPPER = (9, 0)
_AGREES = 2e-2
"""How far, in bf16, the merged result may be from that without splitting."""


def whole_waves(queries: int, keys: int, heads: int, processors: int) -> tuple[int, int]:
    """How many queries, from the first one on, fill whole waves, and in how many equal parts to split the others' keys.

    All queries and 1 if splitting saves nothing.
    """
    tiles = math.ceil(queries / _TILE)
    full = tiles * heads // processors * processors // heads if heads else tiles
    most = processors // max((tiles - full) * heads, 1)
    parts = next((parts for parts in range(min(most, keys), 1, -1) if keys % parts == 0), 1)
    if full == tiles or keys - keys // parts <= _OWN_COST:
        return queries, 1
    return full * _TILE, parts


def split_tail(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, Shares] | None:
    """For attention on [B, H, S, D], how many queries fill whole waves, and the others with their shares of the keys.

    None if nothing is to be split: for more than one image, in fp32, under autograd, on other GPUs than Hopper, and if
    `whole_waves` says so.
    """
    if len(q) > 1 or torch.is_grad_enabled() or not _can_share(q.device):
        return None
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    rows, parts = whole_waves(q.shape[2], k.shape[2], q.shape[1], processors)
    shares = None if parts == 1 else _share_keys(q[:, :, rows:], k, v, parts)
    return None if shares is None else (rows, shares)


def _share_keys(q: Tensor, k: Tensor, v: Tensor, parts: int) -> Shares | None:
    """``q`` [1, H, S, D] as a batch of ``parts``, each with its share of the keys; None if cuDNN's kernel can't."""
    keys, values = (torch.unflatten(each[0], 1, (parts, -1)).transpose(0, 1) for each in (k, v))
    queries = q.expand(parts, -1, -1, -1)
    asked = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, False, False)
    return (queries, keys, values) if torch.backends.cuda.can_use_cudnn_attention(asked) else None


def merge_shares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [1, H, S, D] of `Shares`; its tokens are contiguous, [S, 1, H, D], in memory."""
    from tacod.rank.ops import kernels

    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return kernels.merge(out.transpose(1, 2).contiguous(), lse.squeeze(3).contiguous()).transpose(0, 1).unsqueeze(0)


@cache
def _can_share(device: torch.device) -> bool:
    """Whether this GPU computes attention in waves, and this PyTorch's cuDNN can attend to shares of the keys."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _HOPPER:
        return False
    reason = _trouble(device)
    if reason:
        log.warning("keys are not split in attention, which takes longer: %s", reason)
    return not reason


def _trouble(device: torch.device) -> str:
    """What is wrong with a small attention whose keys are shared out; empty if nothing is."""
    numbers = torch.arange(3 * 2 * 2 * _TILE * 64, device=device).sin().to(torch.bfloat16)
    q, k, v = numbers.view(3, 1, 2, 2 * _TILE, 64)
    # So that the shares count for different parts, and tell different things.
    ramp = torch.linspace(0, 1, 2 * _TILE, device=device, dtype=k.dtype)[:, None]
    k, v = k * ramp, v + ramp
    expected = functional.scaled_dot_product_attention(q, k, v)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            shared = _share_keys(q, k, v, 2)
        if shared is None:
            return "cuDNN's kernel doesn't take them"
        error = float((merge_shares(*shared) - expected).norm() / expected.norm())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError) as problem:
        return str(problem).partition("\n")[0] or type(problem).__name__
    return "" if error <= _AGREES else f"what is merged differs by {error:.1e}"
