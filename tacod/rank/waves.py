"""Attention that keeps a whole GPU busy to its end.

On Hopper a multiprocessor takes 128 queries of one head at a time, and every such tile takes as long: 12 heads of 4608
tokens are 432 tiles, for 132 multiprocessors 3.27 waves, and take the time of 4. Here only as many queries as fill
waves are attended that way. For the others the keys are shared out among the multiprocessors, as in Flash-Decoding
(Dao et al., 2023), and what each finds is merged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tacod.rank.attention import attend

__all__ = ["attend_in_waves", "whole_waves"]

log = logging.getLogger(__name__)

_TILE = 128
"""Queries that a multiprocessor takes at a time."""
_OWN_COST = 1500
"""What the second kernel and the merging cost by themselves, in keys that a tile would go through meanwhile."""
_HOPPER = (9, 0)


def attend_in_waves(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """As `attend`, for some tokens after the others, and these first: [S', B, H, D], contiguous.

    What is done with one result is beside the computing of the next. There is one only on other GPUs, of a batch, or if
    the keys don't divide; and each rank has as many as its own heads make worth while.
    """
    queries, heads = q.shape[2], q.shape[1]
    rows, parts = queries, 1
    if len(q) == 1 and not torch.is_grad_enabled() and q.is_cuda and _can_share(q.device):
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        rows, parts = whole_waves(queries, k.shape[2], heads, processors)
    shared = None if rows == queries else _share_keys(q[:, :, rows:], k, v, parts)
    if rows and shared is not None:
        yield attend(q[:, :, :rows], k, v).permute(2, 0, 1, 3).contiguous()
    yield attend(q, k, v).permute(2, 0, 1, 3).contiguous() if shared is None else _merge_shares(*shared)


def whole_waves(queries: int, keys: int, heads: int, processors: int) -> tuple[int, int]:
    """How many queries, from the first one on, fill waves, and in how many equal parts the others' keys are best.

    All queries and 1 if nothing is won by it.
    """
    tiles = math.ceil(queries / _TILE)
    full = tiles * heads // processors * processors // heads if heads else tiles
    most = processors // max((tiles - full) * heads, 1)
    parts = next((parts for parts in range(min(most, keys), 1, -1) if keys % parts == 0), 1)
    if full == tiles or keys - keys // parts <= _OWN_COST:
        return queries, 1
    return full * _TILE, parts


def _share_keys(q: Tensor, k: Tensor, v: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """``q`` [1, H, S, D] as a batch of ``parts``, each with its share of the keys; None if cuDNN's kernel can't."""
    keys, values = (torch.unflatten(each[0], 1, (parts, -1)).transpose(0, 1) for each in (k, v))
    queries = q.expand(parts, -1, -1, -1)
    asked = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, False, False)
    return (queries, keys, values) if torch.backends.cuda.can_use_cudnn_attention(asked) else None


def _merge_shares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [S, 1, H, D] of what `_share_keys` gives."""
    from tacod.rank import kernels

    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return kernels.merge(out.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3])).unsqueeze(1)


@cache
def _can_share(device: torch.device) -> bool:
    """Whether this GPU is one that attends in waves, and this PyTorch's cuDNN takes shares of the keys."""
    if torch.cuda.get_device_capability(device) != _HOPPER:
        return False
    q, k, v = torch.zeros(3, 1, 1, 2 * _TILE, 64, dtype=torch.bfloat16, device=device)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            shared = _share_keys(q, k, v, 2)
            return shared is not None and not _merge_shares(*shared).any()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError) as error:
        log.warning("attention doesn't come in whole waves: %s", str(error).splitlines()[0])
        return False
