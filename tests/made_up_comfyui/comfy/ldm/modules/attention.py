"""Attention that a call's options may replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **options: Any) -> Tensor:
    """Attention of [B, S, H * D] by heads."""
    call = options.get("transformer_options") or {}
    if "optimized_attention_override" in call:
        out: Tensor = call["optimized_attention_override"](_attention, q, k, v, heads, mask=mask, **options)
        return out
    return _attention(q, k, v, heads, mask=mask)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **options: Any) -> Tensor:
    q, k, v = (torch.unflatten(each, 2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
