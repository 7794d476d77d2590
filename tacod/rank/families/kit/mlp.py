"""The feed-forward part of a block: linear, activation, linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.families.kit.attention import find, register
from tacod.rank.ops.fused import gated_silu
from tacod.rank.ops.linear import linear_gelu

__all__ = ["MLP", "activated", "feed_forward", "first_outputs"]


class MLP(nn.Module):
    """`feed_forward` with layers of its own, under the names that the authors' files give them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        names: Sequence[str],
        activation: str = "gelu",
        *,
        outputs: int | None = None,
        bias: bool = True,
    ) -> None:
        """Make the layers.

        Args:
            width: Channels of a token.
            hidden: Channels behind the activation.
            names: Of the first and the second layer; of the gate too, where files have it apart.
            activation: As in `feed_forward`.
            outputs: Channels of the result; by default ``width``.
            bias: Whether the layers have biases.
        """
        super().__init__()
        self._names, self._activation = tuple(names), activation
        first = hidden if len(names) == 3 else first_outputs(hidden, activation)
        sizes = (width, first), (hidden, outputs or width), (width, hidden)
        for name, size in zip(names, sizes, strict=False):
            register(self, name, nn.Linear(*size, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., outputs]."""
        first, second, *gate = (find(self, name) for name in self._names)
        return feed_forward(first, second, x, self._activation, *gate)


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
    """The input of the second layer in `feed_forward`: activation(first(x)), of the hidden width."""
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


def first_outputs(hidden: int, activation: str) -> int:
    """The outputs of a first layer that makes the gate too, for ``hidden`` channels behind the activation."""
    return 2 * hidden if activation == "swiglu" else hidden
