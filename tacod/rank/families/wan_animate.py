"""What Wan 2.2 Animate (Alibaba, 2025, arXiv:2509.14055) adds to Wan's network: a face's motion, frame by frame.

The encoder of motion is that of LIA (Wang et al., 2022, arXiv:2203.09043), on the layers of StyleGAN2 (Karras et al.,
2020, arXiv:1912.04958).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families.config import count_blocks, integer, shape_of
from tacod.rank.families.kit.attention import attend_replicated, register
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.norm import LAYER_NORM
from tacod_client.errors import ModelUnsupported

__all__ = ["EVERY", "FaceBlock", "FaceEncoder", "MotionEncoder", "detect_face"]

EVERY = 5
"""Blocks of the network for each that looks at the face."""
_HEADS = 4
_SLOPE = 0.2
_BLUR = (1.0, 3.0, 3.0, 1.0)
_AT_ONCE = 8
"""Pictures of a face that are encoded at once: their first layers take the most memory of all."""


class _Convolution(nn.Module):
    """A convolution whose weights are scaled by their number, as StyleGAN2 has it, before a leaky ReLU or without."""

    def __init__(self, inputs: int, outputs: int, size: int, halves: bool = False, activated: bool = True) -> None:
        super().__init__()
        self.size, self.halves, self.activated = size, halves, activated
        layer = nn.Module()
        layer.weight = _drawn(outputs, inputs, size, size)
        register(self, f"{int(halves)}", layer)
        if halves:
            blur = nn.Module()
            blur.register_buffer("kernel", _blur(torch.float32, None))
            register(self, "0", blur)
        if activated:
            shift = nn.Module()
            shift.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))
            register(self, f"{1 + int(halves)}", shift)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H, W], or half the sides."""
        layer: Any = self._modules[f"{int(self.halves)}"]
        stride, padding = 1, self.size // 2
        if self.halves:
            # A layer of single pixels looks at every other one, so no others are blurred for it.
            x, stride, padding = _blurred(x, self.size + 1, 2 if self.size == 1 else 1), 1 if self.size == 1 else 2, 0
        out = functional.conv2d(x, _scaled(layer.weight), stride=stride, padding=padding)
        if not self.activated:
            return out
        shift: Any = self._modules[f"{1 + int(self.halves)}"]
        return functional.leaky_relu(out + shift.bias, _SLOPE) * math.sqrt(2)


class _Residual(nn.Module):
    """Two convolutions, of which the second halves the sides, and one of single pixels beside them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _Convolution(inputs, inputs, 3)
        self.conv2 = _Convolution(inputs, outputs, 3, halves=True)
        self.skip = _Convolution(inputs, outputs, 1, halves=True, activated=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / 2, W / 2]."""
        out: Tensor = (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)
        return out


class _Last(nn.Module):
    """A convolution of 4 by 4 pixels without anything behind it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = _drawn(outputs, inputs, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, 4, 4] to [N, outputs, 1, 1]."""
        return functional.conv2d(x, _scaled(self.weight))


class _Linear(nn.Module):
    """A linear layer whose weights are scaled by their number; a class of its own, so that nothing quantizes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = _drawn(outputs, inputs)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] to [N, outputs]."""
        return functional.linear(x, _scaled(self.weight), self.bias)


class MotionEncoder(nn.Module):
    """Pictures of a face to vectors of its motion, sums of a few orthogonal directions.

    ``sizes`` are ``widths``, the channels of the pictures from layer to layer, each of which halves the sides, and
    ``style``, ``motion`` and ``outputs``, the channels of the vectors. Raises `ModelUnsupported`, naming the key.
    """

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        widths = sizes.get("widths")
        if not isinstance(widths, list) or not widths:
            raise ModelUnsupported(f"config key 'widths' is {widths!r:.80}; expected a list of whole numbers")
        widths = [integer({"widths": width}, "widths") for width in widths]
        style, motion, outputs = (integer(sizes, key) for key in ("style", "motion", "outputs"))
        layers = [
            _Convolution(3, widths[0], 1),
            *(_Residual(*each) for each in itertools.pairwise(widths)),
            _Last(widths[-1], style),
        ]
        register(self, "enc.net_app.convs", nn.ModuleList(layers))
        count = range(4)
        register(self, "enc.fc", nn.Sequential(*(_Linear(style, style) for _ in count), _Linear(style, motion)))
        register(self, "dec.direction.weight", _drawn(outputs, motion))
        self.side = 4 << (len(widths) - 1)
        """Of a picture, in pixels."""

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, side, side] to [N, outputs]."""
        directions = self.get_parameter("dec.direction.weight")
        # The identity keeps directions apart even if all are zeros.
        apart = directions + 1e-8 * torch.eye(*directions.shape, device=directions.device, dtype=directions.dtype)
        orthogonal, _ = torch.linalg.qr(apart.float())
        vectors = [pictures.new_empty(0, len(directions))]
        for some in torch.split(pictures, _AT_ONCE) if len(pictures) else ():
            for layer in self.get_submodule("enc.net_app.convs").children():
                some = layer(some)
            motion = self.get_submodule("enc.fc")(some.flatten(1))
            vectors.append((motion[..., None] * orthogonal.T.to(motion.dtype)).sum(1))
        return torch.cat(vectors)


class FaceEncoder(nn.Module):
    """Vectors of a face's motion to tokens of each latent frame.

    ``sizes`` are ``outputs``, the channels of the vectors, and ``face``, those within. Raises `ModelUnsupported`,
    naming the key.
    """

    def __init__(self, sizes: Mapping[str, Any], width: int) -> None:
        super().__init__()
        inputs, face = integer(sizes, "outputs"), integer(sizes, "face")
        register(self, "conv1_local.conv", nn.Conv1d(inputs, _HEADS * face, 3))
        register(self, "conv2.conv", nn.Conv1d(face, face, 3, stride=2))
        register(self, "conv3.conv", nn.Conv1d(face, face, 3, stride=2))
        self.out_proj = nn.Linear(face, width)
        self.padding_tokens = _drawn(1, 1, 1, width)

    def forward(self, motion: Tensor, frames: int) -> Tensor:
        """Motion [B, F, outputs] to tokens [B, frames, 5, width]: zeros for a first frame, and where F is too small."""
        x = motion.transpose(1, 2)
        for name in ("conv1_local", "conv2", "conv3"):
            x = self.get_submodule(f"{name}.conv")(functional.pad(x, (2, 0), mode="replicate"))
            if name == "conv1_local":
                x = torch.unflatten(x, 1, (_HEADS, -1)).flatten(0, 1)
            x = functional.silu(LAYER_NORM(x.transpose(1, 2))).transpose(1, 2)
        tokens = torch.unflatten(self.out_proj(x.transpose(1, 2)), 0, (len(motion), _HEADS)).transpose(1, 2)
        padding = self.padding_tokens.expand(*tokens.shape[:2], 1, -1)
        tokens = torch.cat((tokens, padding), dim=2)
        return functional.pad(tokens, (0, 0, 0, 0, 1, max(frames - 1 - tokens.shape[1], 0)))[:, :frames]


class FaceBlock(nn.Module):
    """Attention of each frame's tokens to those of the face in this frame; ``f.face`` [B, T, 5, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear1_q = nn.Linear(width, width)
        self.linear1_kv = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, 1e-6)
        self.k_norm = nn.RMSNorm(width // heads, 1e-6)

    def forward(self, f: ForwardPass) -> None:
        """What the video's tokens see of the face is added to them."""
        if f.face is None:
            return
        q = self._normed(self.linear1_q(f.image.normed()), self.q_norm)
        k, v = self.linear1_kv(LAYER_NORM(f.face)).chunk(2, dim=-1)
        frame = math.prod(f.grid.counts[1:])
        first, last = f.sequence.place(f.grid.length)
        if first < last:
            q = self._attend(q, self._normed(k, self.k_norm), v, first, last, frame)
        f.image.add(None, self.linear2(q))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: int, last: int, frame: int) -> Tensor:
        """What tokens ``first`` to ``last`` attend to, ``frame`` of which are of one frame: [B, last - first, W].

        Of the first and the last frame there may be some tokens only; zeros stand in for the others.
        """
        begin, end = first // frame, -(-last // frame)
        ahead = first - begin * frame
        padded = functional.pad(q, (0, 0, ahead, end * frame - last))
        queries = torch.unflatten(padded, 1, (end - begin, frame)).flatten(0, 1)
        keys, values = (each[:, begin:end].flatten(0, 1) for each in (k, v))
        attended = torch.unflatten(attend_replicated(queries, keys, values, self.heads), 0, (len(q), end - begin))
        return attended.flatten(1, 2)[:, ahead : ahead + last - first]

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """The norm of each head's channels."""
        out: Tensor = norm(torch.unflatten(x, -1, (self.heads, -1))).flatten(-2)
        return out


def detect_face(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The sizes of `MotionEncoder` and `FaceEncoder`."""
    name = "motion_encoder.enc.net_app.convs"
    blocks = range(1, count_blocks(tensors, name) - 1)
    widths = [f"{name}.0.0.weight", *(f"{name}.{n}.conv2.1.weight" for n in blocks)]
    return {
        "widths": [shape_of(tensors, key, 4)[0] for key in widths],
        "style": shape_of(tensors, "motion_encoder.enc.fc.0.weight", 2)[0],
        "motion": shape_of(tensors, "motion_encoder.dec.direction.weight", 2)[1],
        "outputs": shape_of(tensors, "motion_encoder.dec.direction.weight", 2)[0],
        "face": shape_of(tensors, "face_encoder.conv2.conv.weight", 3)[0],
    }


def _drawn(*shape: int) -> nn.Parameter:
    """Standard normal numbers, until a file replaces them; none are drawn on the meta device (see `kit.drawn`)."""
    values = torch.empty(shape)
    return nn.Parameter(values if values.is_meta else values.normal_())


def _blur(dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Binomial weights of 4 by 4 pixels, whose sum is 1."""
    whole = sum(_BLUR) ** 2
    # PyTorch would import its compiler for a product on the meta device, which takes seconds.
    return torch.tensor([[row * column / whole for column in _BLUR] for row in _BLUR], dtype=dtype, device=device)


def _scaled(weight: Tensor) -> Tensor:
    """Weights [outputs, inputs, ...], each output's by the root of their number."""
    return weight * (1 / math.sqrt(weight[0].numel()))


def _blurred(x: Tensor, padding: int, stride: int) -> Tensor:
    """The means of 4 by 4 pixels, binomially weighted; so many rows and columns of zeros are added, half on each side.

    Files hold the weights, which are always these.
    """
    x = functional.pad(x, [(padding + 1) // 2, padding // 2] * 2)
    kernel = _blur(x.dtype, x.device).expand(x.shape[1], 1, -1, -1)
    return functional.conv2d(x, kernel, stride=stride, groups=x.shape[1])
