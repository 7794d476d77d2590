"""The two small networks that the embedded model has besides its MMDiT: word tables and a latent decoder."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Text(nn.Module):
    """Words to conditioning: a token is the sum of what its word, its neighbours and its place stand for.

    The two words before bind size and colour to a shape (``small red circle``) without any layer, and the word after
    tells what follows.
    """

    OFFSETS = (0, -1, -2, 1)

    def __init__(self, words: int, length: int, width: int) -> None:
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(words, width) for _ in self.OFFSETS)
        self.position = nn.Embedding(length, width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``ids`` [B, length], padded with 0, to ``context`` [B, length, width] and ``y`` [B, width]."""
        context, length = self.position.weight, ids.shape[1]
        padded = F.pad(ids, (2, 2))
        for table, offset in zip(self.words, self.OFFSETS, strict=True):
            context = context + table(padded[:, 2 + offset : 2 + offset + length])
        return context, F.silu(context).mean(1)


class Residual(nn.Module):
    """x + two 3x3 convolutions of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, channels, h, w] to the same shape."""
        change: Tensor = self.two(F.silu(self.one(F.silu(x))))
        return x + change


class Decoder(nn.Module):
    """Latents as the model sees them [B, 16, h, w] to RGB [B, 3, 8h, 8w], from -1 to 1 but not clamped."""

    def __init__(self, channels: int = 16, widths: tuple[int, ...] = (96, 64, 32, 16)) -> None:
        super().__init__()
        self.inward = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.deep = nn.Sequential(*(Residual(widths[0]) for _ in range(3)))
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.refine = nn.ModuleList(Residual(width) for width in widths[1:])
        self.outward = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        x = self.deep(self.inward(latent))
        for up, refine in zip(self.up, self.refine, strict=True):
            x = refine(up(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        rgb: Tensor = self.outward(F.silu(x))
        return rgb


def state(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix``, in fp32 and without it."""
    return {key.removeprefix(prefix): t.to(torch.float32) for key, t in tensors.items() if key.startswith(prefix)}
