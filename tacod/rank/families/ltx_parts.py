"""What LTX-Video's and LTX-2's networks are made of (Lightricks, 2024, arXiv:2501.00103).

Parameters are named as in the authors' files (Lightricks/LTX-Video and LTX-2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.families import kit
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.norm import Norm
from tacod.rank.ops.qkv import Rotation

__all__ = [
    "RMS",
    "AdaLNSingle",
    "CrossAttention",
    "Rope",
    "SelfAttention",
    "feed_forward",
    "latent_of",
    "local_times",
]

RMS = Norm("rms", 1e-6)
"""The norm before each branch of a block: without weights."""
_QK_EPSILON = 1e-5
_THETA = 10000.0


_NORMS = "q_norm.weight", "k_norm.weight"


class _Gated(nn.Module):
    """Has an output layer behind gates: each head's result times a number made of the token that attends."""

    def _add_gates(self, width: int, heads: int, gated: bool) -> None:
        self.heads, self.gated = heads, gated
        if gated:
            self.to_gate_logits = nn.Linear(width, heads)

    def out(self, attended: Tensor, x: Tensor) -> Tensor:
        """The result [B, S, W] for tokens ``x`` [B, S, W] that have attended to [B, S, H * D]."""
        if self.gated:
            gates = 2.0 * torch.sigmoid(self.to_gate_logits(x))
            attended = (torch.unflatten(attended, -1, (self.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        projected: Tensor = self.project(attended)  # type: ignore[operator]
        return projected


class SelfAttention(kit.SelfAttention, _Gated):
    """Attention of tokens to their like, whose norms span all heads.

    Args:
        width: Channels of a token.
        heads: Attention heads.
        head_width: Channels of a head.
        gated: Whether it has gates.
    """

    to_v: nn.Linear

    def __init__(self, width: int, heads: int, head_width: int, gated: bool = False) -> None:
        super().__init__(
            width,
            heads,
            head_width=head_width,
            layers=("to_q", "to_k", "to_v"),
            out="to_out.0",
            norm="row",
            norms=_NORMS,
            epsilon=_QK_EPSILON,
        )
        self._add_gates(width, heads, gated)


class CrossAttention(kit.CrossAttention, _Gated):
    """Attention of tokens to others, whose norms span all heads; ``context_width`` are the others' channels."""

    def __init__(
        self, width: int, heads: int, head_width: int, context_width: int | None = None, gated: bool = False
    ) -> None:
        super().__init__(
            width,
            heads,
            head_width=head_width,
            context_width=context_width,
            q="to_q",
            kv=(("to_k", "to_v"),),
            out="to_out.0",
            norm="row",
            norms=_NORMS,
            epsilon=_QK_EPSILON,
        )
        self._add_gates(width, heads, gated)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """What tokens [B, S, W] attend to in what every rank has, `keys_values` [B, L, H * D]: [B, S, W].

        ``mask`` [B, L] is boolean, true where a key counts.
        """
        return self.out(kit.attend_replicated(self.queries(x), keys, values, self.heads, mask), x)


def feed_forward(width: int, bias: bool = True) -> kit.MLP:
    """A block's MLP."""
    return kit.MLP(width, 4 * width, ("net.0.proj", "net.2"), bias=bias)


class AdaLNSingle(kit.MLPEmbedder):
    """Modulations of all blocks from a timestep (adaLN-single: Chen et al., 2023, arXiv:2310.00426)."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__(256, width, ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2"))
        self.linear = nn.Linear(width, rows * width)

    def modulations(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of timesteps [B, M] in fp32: modulations [B, M, rows * width], and the embedded timesteps [B, M, width]."""
        embedded = self.numbers(t, dtype)
        return self.linear(functional.silu(embedded)), embedded


class Rope:
    """Rotary positions whose frequencies are spread over all heads, so that each head has angles of its own.

    Args:
        heads: Attention heads.
        head_width: Channels of a head.
        lengths: For each axis the position that is one whole turn of the lowest frequency.
        double: Whether frequencies are computed in fp64.
        middle: Whether a token stands in the middle of what it covers, or at its start.
        halves: Whether a channel's partner lies in the head's other half, or beside it.
    """

    def __init__(
        self, heads: int, head_width: int, lengths: Sequence[float], *, double: bool, middle: bool, halves: bool
    ) -> None:
        self._heads, self._pairs, self._lengths = heads, heads * head_width // 2, tuple(lengths)
        self._double, self._middle, self._halves = double, middle, halves

    def __call__(self, spans: Tensor) -> Rotation:
        """The rotation of tokens that begin and end at ``spans`` [B or 1, S, axes, 2] in fp32."""
        places = (spans[..., 0] + spans[..., 1]) / 2.0 if self._middle else spans[..., 0]
        fractions = torch.stack([places[..., at] / most for at, most in enumerate(self._lengths)], dim=-1)
        axes = len(self._lengths)
        frequencies = _frequencies(self._pairs // axes, self._double, spans.device)
        angles = (frequencies[:, None] * (fractions.unsqueeze(-2) * 2 - 1)).flatten(-2)
        # The first pairs, which are left over, stay.
        angles = functional.pad(angles, (self._pairs - angles.shape[-1], 0))
        angles = torch.unflatten(angles, -1, (self._heads, -1))
        return Rotation(angles.cos(), angles.sin(), self._halves)


@functools.cache
def _frequencies(count: int, double: bool, device: torch.device) -> Tensor:
    """Rising geometrically from pi / 2 to theta * pi / 2, fp32.

    Computed on the CPU for every device, because devices differ in the last bit.
    """
    if double:
        exact = np.power(_THETA, np.linspace(0.0, 1.0, count, dtype=np.float64))
        return torch.tensor(exact * math.pi / 2, dtype=torch.float32, device="cpu").to(device)
    powers: Tensor = _THETA ** torch.linspace(0.0, 1.0, count, dtype=torch.float32, device="cpu")
    return (powers * math.pi / 2).to(device)


def local_times(f: ForwardPass, timestep: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The timesteps that this rank's tokens have, [B, M], and for each of these the one that it has, int64 [S].

    ``timestep`` [B, M] are those of all tokens, and ``rows`` [N] say which one each token has; None if there is one.
    Where there are more of them than tokens here, each token gets its own.
    """
    if rows is None:
        return timestep, None
    mine = f.sequence.shard(rows, dim=0)
    if 0 < len(mine) < timestep.shape[1]:
        return timestep[:, mine], torch.arange(len(mine), device=mine.device)
    return timestep, mine


def latent_of(stream: Stream, table: Tensor, embedded: Tensor, layer: nn.Module) -> Tensor:
    """This rank's patches of an output [B, S, C]: a norm, modulated by ``table`` [2, W] and timesteps [B, M, W]."""
    shift, scale = (row + embedded for row in table)
    patches: Tensor = layer(stream.normed(shift, scale))
    return patches
