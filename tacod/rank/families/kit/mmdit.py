"""Blocks of MMDiTs: text and image with weights of their own in one attention, or as one sequence.

Double blocks after Esser et al., 2024 (arXiv:2403.03206), single blocks after Dehghani et al., 2023
(arXiv:2302.05442), as Flux.1 has both. Parameters are named as in its authors' files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tacod.rank.families.kit.attention import QKNormWeights, SelfAttention
from tacod.rank.families.kit.mlp import feed_forward
from tacod.rank.families.kit.modulation import Modulation
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.linear import linear_gelu, split_inputs, split_outputs
from tacod.rank.ops.qkv import QKV, QKNorm

__all__ = ["DoubleBlock", "SingleBlock", "after_attention", "join_streams"]


def after_attention(
    stream: Stream, modulation: Sequence[Tensor], attention: SelfAttention, attended: Tensor, first: Any, second: Any
) -> None:
    """A stream's second half of a block: its attention's output, then its MLP, each gated.

    ``modulation`` is shift, scale and gate, twice; ``first`` and ``second`` are the layers of the MLP.
    """
    stream.add(modulation[2], attention.project(attended))
    stream.add(modulation[5], feed_forward(first, second, stream.normed(*modulation[3:5])))


class DoubleBlock(nn.Module):
    """Text and image, each with its own weights, in one attention: ``f.text`` and ``f.image``.

    ``f.mask`` is the attention's mask or None, ``f.epsilon`` that of the norms of queries and keys.
    """

    img_mod: Modulation
    img_attn: SelfAttention
    img_mlp: nn.Sequential
    txt_mod: Modulation
    txt_attn: SelfAttention
    txt_mlp: nn.Sequential

    def __init__(self, width: int, heads: int, hidden: int, qkv_bias: bool = True) -> None:
        super().__init__()
        norms = "norm.query_norm.scale", "norm.key_norm.scale"
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(width, 6 * width))
            attention = SelfAttention(width, heads, norm="head", norms=norms, bias=qkv_bias)
            self.add_module(f"{stream}_attn", attention)
            mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, f: ForwardPass) -> None:
        """Text and image one block further."""
        text, image = f.modulation(self.txt_mod.linear, 6), f.modulation(self.img_mod.linear, 6)
        to_text, to_image = f.attend(
            (f.text, lambda: self.txt_attn(f.text.normed(*text[:2]), f.text.rotation, f.epsilon)),
            (f.image, lambda: self.img_attn(f.image.normed(*image[:2]), f.image.rotation, f.epsilon)),
            mask=f.mask,
        ).wait()
        after_attention(f.image, image, self.img_attn, to_image, self.img_mlp[0], self.img_mlp[2])
        after_attention(f.text, text, self.txt_attn, to_text, self.txt_mlp[0], self.txt_mlp[2])


def join_streams(f: ForwardPass) -> None:
    """Between double and single blocks: text and image become ``f.joint``."""
    f.joint = f.join(f.text, f.image)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, on text and image as one sequence: ``f.joint``."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 3 * width + hidden)
        self.linear2 = nn.Linear(width + hidden, width)
        self.norm = QKNormWeights(width // heads, width // heads, ("query_norm.scale", "key_norm.scale"))
        self.modulation = Modulation(width, 3 * width)
        self.heads, self.width = heads, width

    def forward(self, f: ForwardPass) -> None:
        """All tokens one block further.

        Both matrices are used in two parts, so that the feed-forward is computed while queries, keys and values travel,
        and the larger part of the second matrix while what was attended to comes back.
        """
        shift, scale, gate = f.modulation(self.modulation.linear, 3)
        normed = f.joint.normed(shift, scale)
        to_heads, to_hidden = split_outputs(self.linear1, 3 * self.width)
        from_hidden, from_heads = split_inputs(self.linear2, self.width)
        norm = QKNorm(*self.norm.weights, f.epsilon)
        attention = f.attend(
            (f.joint, lambda: QKV(to_heads(normed), self.heads, norm, f.joint.rotation)), mask=f.mask, overlap=True
        )
        hidden = linear_gelu(to_hidden, normed)
        attention.start()
        out = from_hidden(hidden)
        (attended,) = attention.wait()
        f.joint.add(gate, from_heads(attended, out))
