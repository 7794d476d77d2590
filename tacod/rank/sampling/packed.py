"""Several latents as one tensor, on which samplers run as on a single latent.

ComfyUI's samplers see such a tensor too (`pack_latents`), so noise that a sampler adds is drawn alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tacod.rank.families.base import Output

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    """How latents are packed. A model of a single latent isn't packed: samplers get that latent as it is."""

    shapes: tuple[tuple[int, ...], ...]
    """The shape of each latent, with its batch; empty for a single latent."""

    @classmethod
    def of(cls, latents: Output) -> Packing:
        """The packing of latents like these: a list, or a single one."""
        return cls(tuple(tuple(each.shape) for each in latents) if isinstance(latents, list) else ())

    def pack(self, latents: Output) -> Tensor:
        """Latents [B, ...] as one tensor [B, 1, N], each one's numbers after another's."""
        if not isinstance(latents, list):
            return latents
        return torch.cat([each.reshape(len(each), 1, -1) for each in latents], dim=-1)

    def unpack(self, packed: Tensor) -> Output:
        """Undo `pack`; the batch may be another one."""
        if not self.shapes:
            return packed
        parts = torch.split(packed, [math.prod(shape[1:]) for shape in self.shapes], dim=-1)
        return [part.reshape(len(part), *shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]
