"""What MiniMax-H3's network is made of: blocks, the refiner of its text, and the last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tacod.rank.families import kit
from tacod.rank.families.minimax_h3_layout import MODALITIES
from tacod.rank.families.minimax_h3_modulation import block_rows, final_rows
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.norm import Norm

__all__ = ["PATCH", "Block", "FinalLayer", "TokenRefiner"]

PATCH = (1, 2, 2)
"""Frames, rows and columns of a video's token."""
_EPSILON = 1e-5


class Scale(nn.Module):
    """The weight of an RMS norm of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    @property
    def norm(self) -> Norm:
        """The norm."""
        return Norm("rms", _EPSILON, self.weight)


class Layers(nn.Module):
    """The layers that blocks of the network and of the refiner have: attention and SwiGLU."""

    def __init__(self, hidden: int, heads: int, head_width: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Scale(hidden), Scale(hidden)
        self.attn = kit.SelfAttention(
            hidden,
            heads,
            head_width=head_width,
            layers=("qkv_proj",),
            out="out_proj",
            norm="head",
            bias=False,
            out_bias=False,
            epsilon=_EPSILON,
        )
        self.mlp = kit.MLP(hidden, ffn, ("fc1", "fc2"), "swiglu", bias=False)


class Block(Layers):
    """All tokens in one stream. Pictures, text and sound have modulations of their own, and so has each time."""

    def __init__(self, hidden: int, heads: int, head_width: int, ffn: int, time_width: int) -> None:
        super().__init__(hidden, heads, head_width, ffn)
        self.adaln_proj = kit.Modulation(time_width, 6 * MODALITIES * hidden, "linear")

    def forward(self, f: ForwardPass) -> None:
        """The stream one block further."""
        rows = block_rows(f, self.adaln_proj.linear)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows.to(f.dtype).chunk(6, dim=-1)
        normed = f.joint.normed(shift, scale, norm=self.norm1.norm)
        (attended,) = f.attend((f.joint, lambda: self.attn(normed, f.joint.rotation))).wait()
        f.joint.add(gate, self.attn.project(attended))
        f.joint.add(mlp_gate, self.mlp(f.joint.normed(mlp_shift, mlp_scale, norm=self.norm2.norm)))


class RefinerBlock(Layers):
    """Attention among the tokens of a text, which have no positions here."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, hidden] to the same shape, on every rank alike."""
        x = x + self.attn.project(self.attn.attend_whole(self.norm1.norm(x)))
        refined: Tensor = x + self.mlp(self.norm2.norm(x))
        return refined


class TokenRefiner(nn.Module):
    """Refines a text before the first block."""

    def __init__(self, layers: int, hidden: int, heads: int, head_width: int, ffn: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(hidden, heads, head_width, ffn) for _ in range(layers))
        self.final_norm = Scale(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, hidden] to the same shape."""
        for block in self.blocks:
            x = block(x)
        return self.final_norm.norm(x)


class FinalLayer(nn.Module):
    """A modulated norm, and a projection of the video's tokens and one of the sound's."""

    def __init__(self, hidden: int, time_width: int, video: int, sound: int) -> None:
        super().__init__()
        self.norm = Scale(hidden)
        self.adaln_proj = kit.Modulation(time_width, 2 * hidden, "linear")
        self.video_out, self.audio_out = nn.Linear(hidden, video), nn.Linear(hidden, sound)

    def modulated(self, f: ForwardPass) -> Tensor:
        """This rank's tokens of sound and video, normed, [B, S, hidden]."""
        shift, scale = final_rows(f, self.adaln_proj.linear).to(f.dtype).chunk(2, dim=-1)
        return f.image.normed(shift, scale, norm=self.norm.norm)
