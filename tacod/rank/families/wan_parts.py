"""What Wan's network is made of: blocks, those of VACE beside them, the camera's adapter, and the ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.families import kit
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.norm import Norm

__all__ = ["PATCH", "PIXELS", "Block", "CameraAdapter", "Clip", "Head", "VaceBlock", "embed_patches"]

PATCH = (1, 2, 2)
"""Frames, rows and columns of a token."""
_EPSILON = 1e-6
PIXELS = 8
"""Pixels of a latent cell, along each side of a camera's conditions."""


def embed_patches(layer: nn.Conv3d, patches: Tensor) -> Tensor:
    """A convolution over patches of some patches [B, S, C * patch], in fp32: [B, S, width] in their dtype."""
    assert layer.bias is not None
    weight, bias = layer.weight.flatten(1).float(), layer.bias.float()
    return functional.linear(patches.float(), weight, bias).to(patches.dtype)


class Block(nn.Module):
    """Self-attention over the video, cross-attention to text and image, GELU."""

    def __init__(self, width: int, heads: int, hidden: int, sees_image: bool) -> None:
        super().__init__()
        kinds = ("", "_img") if sees_image else ("",)
        norms = "norm_q.weight", "norm_k.weight"
        self.self_attn = kit.SelfAttention(
            width, heads, layers=("q", "k", "v"), out="o", norm="row", norms=norms, epsilon=_EPSILON
        )
        self.cross_attn = kit.CrossAttention(
            width,
            heads,
            q="q",
            kv=[(f"k{kind}", f"v{kind}") for kind in kinds],
            out="o",
            norm="row",
            norms=("norm_q.weight", *(f"norm_k{kind}.weight" for kind in kinds)),
            epsilon=_EPSILON,
        )
        self.norm3 = nn.LayerNorm(width, _EPSILON)
        self.ffn = kit.MLP(width, hidden, ("0", "2"))
        self.modulation = nn.Parameter(kit.drawn(6, width)[None])

    def forward(self, f: ForwardPass) -> None:
        """The video one block further."""
        self.advance(f, f.image)

    def advance(self, f: ForwardPass, stream: Stream) -> None:
        """A stream one block further; ``f.times`` [B, M, 6 * width] are its modulations but for the block's own."""
        parts = (self.modulation.flatten(1) + f.times).chunk(6, dim=-1)
        normed = stream.normed(*parts[:2])
        (attended,) = f.attend((stream, lambda: self.self_attn(normed, stream.rotation))).wait()
        stream.add(parts[2], self.self_attn.project(attended))
        normed = stream.normed(norm=Norm("layer", _EPSILON, self.norm3.weight, self.norm3.bias))
        stream.add(None, self.cross_attn(normed, f.text, f.picture))
        stream.add(parts[5], self.ffn(stream.normed(*parts[3:5])))


class VaceBlock(Block):
    """A block over the given videos of VACE (Jiang et al., 2025, arXiv:2503.07598), which hints at the video."""

    def __init__(self, width: int, heads: int, hidden: int, first: bool) -> None:
        super().__init__(width, heads, hidden, sees_image=False)
        if first:
            self.before_proj = nn.Linear(width, width)
        self.first = first
        self.after_proj = nn.Linear(width, width)

    def forward(self, f: ForwardPass) -> None:
        """Each of the streams ``f.given`` one block further, and added to the video by its strength."""
        for stream, strength in zip(f.given, f.strengths, strict=True):
            if self.first:
                stream.tokens = self.before_proj(stream.tokens) + f.start
            self.advance(f, stream)
            f.image.add(None, self.after_proj(stream.tokens) * strength)


class Clip(nn.Module):
    """The projection of CLIP's tokens of one image, or of a first and a last one, which ``positions`` tells apart."""

    def __init__(self, inputs: int, width: int, positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(inputs), nn.Linear(inputs, inputs), nn.GELU(), nn.Linear(inputs, width), nn.LayerNorm(width)
        )
        self.emb_pos = None if positions is None else nn.Parameter(kit.drawn(positions, inputs)[None])

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, K, inputs] to [B, K, width]."""
        if self.emb_pos is not None:
            tokens = tokens + self.emb_pos[:, : tokens.shape[1]]
        out: Tensor = self.proj(tokens)
        return out


class CameraAdapter(nn.Module):
    """Where the camera is in each frame, as tokens to add to the video's.

    ``inputs`` are the channels of the conditions, which have ``8`` pixels a latent cell.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.conv = nn.Conv2d(inputs * PIXELS**2, width, PATCH[1:], stride=PATCH[1:])
        self.residual_blocks = nn.ModuleList([CameraBlock(width)])

    def forward(self, conditions: Tensor, first: int, last: int) -> Tensor:
        """Some tokens of conditions [B, inputs, T, 8 * H, 8 * W] of a latent with even sides: [B, last - first, width].

        A convolution needs the pixels around a token, but none of other frames.
        """
        rows, columns = (side // PIXELS // 2 for side in conditions.shape[3:])
        frame = rows * columns
        frames = slice(first // frame, -(-last // frame))
        chosen = conditions[:, :, frames].transpose(1, 2)
        images = functional.pixel_unshuffle(chosen.flatten(0, 1), PIXELS)
        images = self.conv(images)
        for block in self.residual_blocks:
            images = block(images)
        tokens = torch.unflatten(images.flatten(2).transpose(1, 2), 0, chosen.shape[:2]).flatten(1, 2)
        return tokens.narrow(1, first - frames.start * frame, last - first)


class CameraBlock(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, rows, columns] to the same shape."""
        out: Tensor = self.conv2(functional.relu(self.conv1(x))) + x
        return out


class Head(nn.Module):
    """Tokens to the latents of their patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, outputs)
        self.modulation = nn.Parameter(kit.drawn(2, width)[None])

    def forward(self, f: ForwardPass) -> Tensor:
        """The patches of all tokens of all ranks, [B, N, outputs]."""
        shift, scale = (row + f.conditioning for row in self.modulation.unbind(1))
        return f.gather(f.image, self.head(f.image.normed(shift, scale)))
