"""Blocks of MMDiTs: text and image with weights of their own in one attention, or as one sequence.

Double blocks after Esser et al., 2024 (arXiv:2403.03206), single blocks after Dehghani et al., 2023
(arXiv:2302.05442), as Flux.1 has both. Parameters are named as in its authors' files.

Both read of the forward ``f.mask``, the attention's mask or None, and ``f.epsilon``, that of the norms of queries and
keys; without modulation layers of their own also ``f.modulations``, which has for each block shift, scale and gate of
each of its branches: of a double block a pair, the text's and the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tacod.rank.families.kit.attention import QKNormWeights, SelfAttention
from tacod.rank.families.kit.mlp import MLP, activated, first_outputs
from tacod.rank.families.kit.modulation import Modulation
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.linear import split_inputs, split_outputs
from tacod.rank.ops.qkv import QKV, QKNorm

__all__ = ["DoubleBlock", "SingleBlock", "after_attention", "join_streams"]


def after_attention(
    stream: Stream,
    modulation: Sequence[Tensor],
    attended: Tensor,
    mlp: Callable[[Tensor], Tensor],
    later: bool = False,
) -> None:
    """A stream's second half of a block: its attention's projected output, then its MLP, each gated.

    ``modulation`` is shift, scale and gate of the attention, then of the MLP. With ``later`` the MLP is computed when
    the tokens are needed: a text's then runs in the next block, while the image's heads travel. A short text's MLP
    takes the time of reading its weights, however few tokens a rank has.
    """

    def add_mlp() -> None:
        stream.add(modulation[5], mlp(stream.normed(*modulation[3:5])))

    stream.add(modulation[2], attended)
    if later:
        stream.later(add_mlp)
    else:
        add_mlp()


class DoubleBlock(nn.Module):
    """Text and image, each with its own weights, in one attention: ``f.text`` and ``f.image``."""

    img_mod: Modulation
    img_attn: SelfAttention
    img_mlp: MLP
    txt_mod: Modulation
    txt_attn: SelfAttention
    txt_mlp: MLP

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        qkv_bias: bool = True,
        *,
        bias: bool = True,
        activation: str = "gelu",
        modulated: bool = True,
    ) -> None:
        """Make the layers.

        Args:
            width: Channels of a token.
            heads: Attention heads.
            hidden: Channels within the MLP.
            qkv_bias: Whether the projections to queries, keys and values have biases.
            bias: Whether the layers after them have.
            activation: Of the MLP: ``"gelu"`` or ``"swiglu"``, both as in `feed_forward`.
            modulated: Whether it has modulation layers of its own.
        """
        super().__init__()
        self.modulated = modulated
        norms = "norm.query_norm.scale", "norm.key_norm.scale"
        for stream in ("img", "txt"):
            if modulated:
                self.add_module(f"{stream}_mod", Modulation(width, 6 * width))
            attention = SelfAttention(width, heads, norm="head", norms=norms, bias=qkv_bias, out_bias=bias)
            self.add_module(f"{stream}_attn", attention)
            self.add_module(f"{stream}_mlp", MLP(width, hidden, ("0", "2"), activation, bias=bias))

    def forward(self, f: ForwardPass) -> None:
        """Text and image one block further."""
        if self.modulated:
            text, image = f.modulation(self.txt_mod.linear, 6), f.modulation(self.img_mod.linear, 6)
        else:
            text, image = f.modulations[self]
        to_text, to_image = f.attend(
            (f.text, lambda: self.txt_attn(f.text.normed(*text[:2]), f.text.rotation, f.epsilon)),
            (f.image, lambda: self.img_attn(f.image.normed(*image[:2]), f.image.rotation, f.epsilon)),
            mask=f.mask,
        ).wait()
        after_attention(f.image, image, self.img_attn.project(to_image), self.img_mlp)
        after_attention(f.text, text, self.txt_attn.project(to_text), self.txt_mlp, later=True)


def join_streams(f: ForwardPass) -> None:
    """Between double and single blocks: text and image become ``f.joint``."""
    f.joint = f.join(f.text, f.image)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, on text and image as one sequence: ``f.joint``."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        bias: bool = True,
        activation: str = "gelu",
        modulated: bool = True,
    ) -> None:
        """Make the layers; see `DoubleBlock`."""
        super().__init__()
        self.linear1 = nn.Linear(width, 3 * width + first_outputs(hidden, activation), bias=bias)
        self.linear2 = nn.Linear(width + hidden, width, bias=bias)
        self.norm = QKNormWeights(width // heads, width // heads, ("query_norm.scale", "key_norm.scale"))
        if modulated:
            self.modulation = Modulation(width, 3 * width)
        self.heads, self.width, self.activation, self.modulated = heads, width, activation, modulated

    def forward(self, f: ForwardPass) -> None:
        """All tokens one block further.

        Both matrices are used in two parts, so that the feed-forward is computed while queries, keys and values travel,
        and the larger part of the second matrix while what was attended to comes back.
        """
        shift, scale, gate = f.modulation(self.modulation.linear, 3) if self.modulated else f.modulations[self]
        normed = f.joint.normed(shift, scale)
        to_heads, to_hidden = split_outputs(self.linear1, 3 * self.width)
        from_hidden, from_heads = split_inputs(self.linear2, self.width)
        norm = QKNorm(*self.norm.weights, f.epsilon)
        attention = f.attend(
            (f.joint, lambda: QKV(to_heads(normed), self.heads, norm, f.joint.rotation)), mask=f.mask, overlap=True
        )
        hidden = activated(to_hidden, normed, self.activation)
        attention.start()
        out = from_hidden(hidden)
        (attended,) = attention.wait()
        f.joint.add(gate, from_heads(attended, out))
