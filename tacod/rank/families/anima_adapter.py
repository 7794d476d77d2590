"""Anima's text adapter: the words of T5's tokenizer attend to the states of another text encoder (Qwen3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families.config import count_blocks, integer, shape_of, width_of_heads
from tacod.rank.families.inputs import Argument, Spec
from tacod.rank.ops.qkv import Rotation

__all__ = ["Adapter"]

_EPSILON = 1e-6
_TOKENS = 512
"""Contexts have at least so many tokens; those after the text are zeros, and are attended to."""


class Attention(nn.Module):
    """Attention of tokens to themselves or to others, both turned by their places."""

    def __init__(self, width: int, heads: int, others: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(others, width, bias=False)
        self.v_proj = nn.Linear(others, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads, _EPSILON)
        self.k_norm = nn.RMSNorm(width // heads, _EPSILON)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        """Of ``x`` [B, S, W] to ``others`` [B, L, others]."""
        q, k, v = (
            torch.unflatten(layer(each), -1, (self.heads, -1))
            for layer, each in ((self.q_proj, x), (self.k_proj, others), (self.v_proj, others))
        )
        q, k = _rotation(q).apply(self.q_norm(q)), _rotation(k).apply(self.k_norm(k))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, attention to the other encoder's states, GELU; each after a norm."""

    def __init__(self, width: int, heads: int, others: int) -> None:
        super().__init__()
        self.norm_self_attn = nn.RMSNorm(width, _EPSILON)
        self.self_attn = Attention(width, heads, width)
        self.norm_cross_attn = nn.RMSNorm(width, _EPSILON)
        self.cross_attn = Attention(width, heads, others)
        self.norm_mlp = nn.RMSNorm(width, _EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Words [B, S, W] one block further."""
        normed = self.norm_self_attn(x)
        x = x + self.self_attn(normed, normed)
        x = x + self.cross_attn(self.norm_cross_attn(x), context)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class Adapter(nn.Module):
    """``sizes`` is a map of ``words``, ``width``, ``heads``, ``layers`` and ``source_width``.

    Raises `ModelUnsupported`, naming the key, for sizes that can't be.
    """

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.words, self.source_width = integer(sizes, "words"), integer(sizes, "source_width")
        width, heads = width_of_heads(sizes, "width", "heads")
        self.embed = nn.Embedding(self.words, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, self.source_width) for _ in range(integer(sizes, "layers", most=1024))
        )
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.RMSNorm(width, _EPSILON)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo], prefix: str = "llm_adapter") -> dict[str, int] | None:
        """The sizes of a file's adapter; None if it has none.

        Raises `ModelUnsupported`, naming the tensor, if it lacks one that tells them.
        """
        if not any(name.startswith(f"{prefix}.") for name in tensors):
            return None
        words, width = shape_of(tensors, f"{prefix}.embed.weight", 2)
        (head_width,) = shape_of(tensors, f"{prefix}.blocks.0.self_attn.q_norm.weight", 1)
        return {
            "words": words,
            "width": width,
            "heads": width // max(head_width, 1),
            "layers": count_blocks(tensors, f"{prefix}.blocks"),
            "source_width": shape_of(tensors, f"{prefix}.blocks.0.cross_attn.k_proj.weight", 2)[1],
        }

    def arguments(self) -> dict[str, Spec]:
        """What it takes: the other encoder's states, T5's words by number, and how much each counts."""
        return {
            "context": Argument(("B", "L", self.source_width)),
            "t5xxl_ids": Argument(("B", "S"), rows=self.words),
            "t5xxl_weights": Argument(("B", "S", 1), required=False),
        }

    def forward(self, context: Tensor, t5xxl_ids: Tensor, t5xxl_weights: Tensor | None = None) -> Tensor:
        """The context of forwards, [B, 512 or more, width]."""
        x = self.embed(t5xxl_ids)
        for block in self.blocks:
            x = block(x, context)
        out: Tensor = self.norm(self.out_proj(x))
        if t5xxl_weights is not None:
            out = out * t5xxl_weights
        return functional.pad(out, (0, 0, 0, max(_TOKENS - out.shape[1], 0)))


def _rotation(heads: Tensor) -> Rotation:
    """Of the tokens of ``heads`` [B, S, H, D] by their places. Angles are computed in fp32, as the authors do."""
    _, count, _, width = heads.shape
    exponents = torch.arange(0, width, 2, device=heads.device).float() / width
    angle = torch.arange(count, device=heads.device).float()[:, None] * (1.0 / 10000**exponents)
    return Rotation(angle.cos(), angle.sin(), halves=True)
