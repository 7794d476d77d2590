"""The feed-forward part of a block: linear, activation, linear."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from tacod.rank.ops.fused import gated_silu
from tacod.rank.ops.linear import linear_gelu

__all__ = ["activated", "feed_forward"]


def feed_forward(first: Any, second: Any, x: Tensor, activation: str = "gelu", gate: Any = None) -> Tensor:
    """second(activation(first(x))) on [B, S, W]; layers may lack a bias, and be quantized.

    Args:
        first: From the width to the hidden width; for ``"swiglu"`` without ``gate`` to both of its halves.
        second: From the hidden width to the width.
        x: The tokens.
        activation: ``"gelu"`` (its tanh form), ``"gelu_exact"``, ``"silu"``, or ``"swiglu"`` (Shazeer, 2020,
            arXiv:2002.05202), which is silu of one half, or of ``first``, times the other half, or ``gate``.
        gate: The layer that the activation is multiplied by, where files have it apart.
    """
    out: Tensor = second(activated(first, x, activation, gate))
    return out


def activated(first: Any, x: Tensor, activation: str, gate: Any = None) -> Tensor:
    """What `feed_forward` has between its layers: activation(first(x)), of the hidden width."""
    if activation == "gelu":
        return linear_gelu(first, x)
    hidden: Tensor = first(x)
    if activation == "gelu_exact":
        return functional.gelu(hidden)
    if activation == "silu":
        return functional.silu(hidden)
    if activation == "swiglu":
        one, other = hidden.chunk(2, dim=-1) if gate is None else (hidden, gate(x))
        return gated_silu(one, other)
    raise ValueError(f"activation: {activation!r} is none of gelu, gelu_exact, silu and swiglu")
