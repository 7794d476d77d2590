"""A latent of any number of dimensions as a grid of patches, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod_client.errors import ArgumentError

__all__ = ["Grid", "PatchEmbed"]


class Grid:
    """The patches of a latent [B, C, H, W] or [B, C, T, H, W]; the last ones are padded circularly.

    Only the latent's shape is kept, so anything with a shape will do.
    """

    def __init__(self, latent: Any, patch: int | Sequence[int], name: str = "x") -> None:
        """Lay out a grid. ``patch`` is the size along each side, or one size for all.

        Raises `ArgumentError`, naming ``name``, if there is too little of the latent to pad it with.
        """
        self.sides: tuple[int, ...] = tuple(latent.shape[2:])
        """The latent's sides, without padding."""
        self.patch = (patch,) * len(self.sides) if isinstance(patch, int) else tuple(patch)
        if any(-side % size > side for side, size in zip(self.sides, self.patch, strict=True)):
            sides, patches = (" by ".join(map(str, each)) for each in (self.sides, self.patch))
            raise ArgumentError(
                f"{name}: its latents are {sides}, too small for patches of {patches}; "
                + (
                    f"make both sides {self.patch[0]} or more"
                    if len(set(self.patch)) == 1 and len(self.patch) == 2
                    else "make each side as large as a patch or larger"
                ),
                argument=name,
            )
        self.counts = tuple(-(-side // size) for side, size in zip(self.sides, self.patch, strict=True))
        """Patches along each side: rows and columns, or frames, rows and columns."""

    @property
    def length(self) -> int:
        """How many patches there are."""
        return math.prod(self.counts)

    def pad(self, latent: Tensor) -> Tensor:
        """The latent with whole patches, padded circularly behind each side."""
        padding = [0] * 2 * len(self.sides)
        # From the last side to the first, before and after.
        for at, (side, size) in enumerate(zip(self.sides[::-1], self.patch[::-1], strict=True)):
            padding[2 * at + 1] = -side % size
        return functional.pad(latent, padding, mode="circular") if any(padding) else latent

    def patches(self, latent: Tensor, channels_last: bool = False) -> Tensor:
        """The latent's patches in order, [B, N, C * patch].

        A channel's numbers lie together, or with ``channels_last`` a pixel's channels.
        """
        latent = self.pad(latent)
        for at, (count, size) in enumerate(zip(self.counts, self.patch, strict=True)):
            latent = torch.unflatten(latent, 2 + 2 * at, (count, size))
        dims = len(self.sides)
        rows, pixels = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
        order = [0, *rows, *pixels, 1] if channels_last else [0, *rows, 1, *pixels]
        return latent.permute(order).flatten(1, dims).flatten(2)

    def latent(self, patches: Tensor, channels_last: bool = False) -> Tensor:
        """Patches [B, N, C * patch] as a latent of this grid's sides.

        A channel's numbers lie together, as `patches` gives them, or with ``channels_last`` a pixel's channels. Tokens
        after the first N, such as references', are left out.
        """
        dims = len(self.sides)
        tokens = torch.unflatten(patches[:, : self.length], 1, self.counts)
        if channels_last:
            tokens = torch.unflatten(tokens, -1, (*self.patch, -1)).movedim(-1, 1 + dims)
        else:
            tokens = torch.unflatten(tokens, -1, (-1, *self.patch))
        order = [0, 1 + dims, *(axis for at in range(dims) for axis in (1 + at, 2 + dims + at))]
        latent = tokens.permute(order)
        for at in range(dims):
            latent = latent.flatten(2 + at, 3 + at)
        for axis, side in enumerate(self.sides, start=2):
            latent = latent.narrow(axis, 0, side)
        return latent

    def positions(
        self,
        origin: Sequence[float] = (),
        scale: Sequence[float] = (),
        device: torch.device | None = None,
    ) -> Tensor:
        """Each patch's position along each side, [N, sides] in fp32, starting at ``origin``, ``scale`` apart."""
        lines = [
            line(count, origin[at] if origin else 0.0, scale[at] if scale else 1.0, device)
            for at, count in enumerate(self.counts)
        ]
        return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, -2)

    def segments(self, rows: Sequence[int], device: torch.device | None = None) -> Tensor:
        """For each patch the row of its modulation, int64 [N], where sides have so many rows each (1 or all patches).

        For a timestep for each frame of a video: ``rows`` = (frames, 1, 1).
        """
        index = torch.zeros(self.counts, dtype=torch.int64, device=device)
        for at, count in enumerate(rows):
            places = torch.arange(self.counts[at], device=device) * count // self.counts[at]
            index = index * count + places.reshape([-1 if axis == at else 1 for axis in range(len(rows))])
        return index.flatten()


def line(count: int, start: float, step: float, device: torch.device | None) -> Tensor:
    """``count`` positions from ``start`` on, ``step`` apart, in fp32."""
    if step == 1.0:
        return torch.arange(count, device=device, dtype=torch.float32) + start
    return torch.linspace(start, (count - 1.0) * step + start, count, device=device, dtype=torch.float32)


class PatchEmbed(nn.Module):
    """A convolution over patches; the layer is called ``proj``."""

    def __init__(self, channels: int, patch: Sequence[int], width: int) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.proj = convolution(channels, width, tuple(patch), stride=tuple(patch))  # type: ignore[arg-type]

    def forward(self, patches: Tensor) -> Tensor:
        """Embed some patches [B, S, C * patch], as `Grid.patches` gives them: [B, S, width].

        So a rank embeds its own alone. The sums' order, and with it their last bits, may differ from `whole`'s.
        """
        return functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def whole(self, latent: Tensor) -> Tensor:
        """Embed all patches of a latent that `Grid.pad` has padded: [B, N, width]."""
        tokens: Tensor = self.proj(latent)
        return tokens.flatten(2).transpose(1, 2)
